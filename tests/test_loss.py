"The objective as tensors: naive oracles, exact facts at weight 0, gradients, refusals"
import ast, math
from pathlib import Path
import pytest, torch
from yfpo.loss import (LOSS_TYPES, OBJECTIVES, PREFERENCE_LOSSES, SIDES, add_linear, add_logistic, anchor, check_losses,
                       check_objective, dpo_loss, objective, offset, pair_weights, preference_loss, reweight, route, yoked)
from yfpo.data.checks import check_count, check_steps

B = 7
def draw(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, generator=g, dtype=dtype) * 3 - 40 for _ in range(4)] + [torch.randn(B, generator=g, dtype=dtype) * 2]

def rewards(seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, generator=g, dtype=torch.float64) for _ in range(n)]

def joined(name, base, w, l, pw, pl, weight, **kw):
    o = objective(name)
    if o.form == 'reward': return preference_loss(base, *o.join(w, l, pw, pl, weight), **kw)
    return o.join(preference_loss(base, w, l, **kw), pw - pl, weight)

def slow_dpo(pw, pl, rw, rl, beta):
    return [-math.log(1 / (1 + math.exp(-beta * ((a - c) - (b - d))))) for a, b, c, d in zip(*(t.tolist() for t in (pw, pl, rw, rl)))]

@pytest.mark.parametrize('beta', [0.01, 0.1, 1.])
def test_dpo_against_scalar_arithmetic(beta):
    *logps, _ = draw(1, torch.float64)
    assert dpo_loss(*logps, beta).tolist() == pytest.approx(slow_dpo(*logps, beta), rel=1e-9)

def test_dpo_at_step_one_is_log_two():
    w, l = draw()[:2]
    assert torch.allclose(dpo_loss(w, l, w, l, 0.3), torch.full((B,), math.log(2)), atol=1e-7)

def test_every_objective_against_scalar_arithmetic():
    w, l, pw, pl = rewards(2)
    rows = list(zip(*(t.tolist() for t in (w, l, pw, pl))))
    soft = lambda x: math.log(1 + math.exp(-x))
    slow = {'add-linear': [soft(a - b) - 0.3*(p - q) for a, b, p, q in rows],
            'add-logistic': [soft(a - b) + 0.3*soft(p - q) for a, b, p, q in rows],
            'yoked': [soft(a - b + 0.3*(p - q)) for a, b, p, q in rows],
            'offset': [soft(a - b - 0.3*(p - q)) for a, b, p, q in rows],
            'reweight': [soft(a - b)*2/(1 + math.exp(-0.3*(p - q))) for a, b, p, q in rows]}
    assert set(slow) == set(OBJECTIVES)
    for name, values in slow.items(): assert joined(name, 'sigmoid', w, l, pw, pl, 0.3).tolist() == pytest.approx(values), name
    assert add_logistic(w, pw, 0.3, kappa=2., margin=0.5).tolist() == pytest.approx([a + 0.3*soft(2*p - 0.5) for a, _, p, _ in rows])

@pytest.mark.parametrize('name', OBJECTIVES)
def test_weight_zero_is_the_parent_bit_for_bit(name):
    w, l, pw, pl = rewards(3)
    pw[0], pl[1] = float('inf'), float('nan')
    for weight in (0., 0):
        for base in PREFERENCE_LOSSES:
            kw = dict(label_smoothing=0.1)
            assert torch.equal(joined(name, base, w, l, pw, pl, weight, **kw), preference_loss(base, w, l, **kw))

@pytest.mark.parametrize('name', OBJECTIVES)
@pytest.mark.parametrize('base', PREFERENCE_LOSSES)
def test_gradcheck(name, base):
    x = [t.requires_grad_() for t in rewards(4)]
    free = x if objective(name).live else x[:2]
    assert torch.autograd.gradcheck(lambda *a: joined(name, base, *a, *x[len(a):], 0.3, beta=0.7, label_smoothing=0.1), free)

@pytest.mark.parametrize('base', [b for b in PREFERENCE_LOSSES if b not in ('ipo', 'sppo_hard', 'hinge')])
def test_descent_raises_the_margin_of_every_pair(base):
    "`ipo` and `sppo_hard` aim at a finite reward and `hinge` lets go beyond its margin, so they are exempt under Y3"
    for name in (n for n, o in OBJECTIVES.items() if o.live):
        w, l, pw, pl = (t.requires_grad_() for t in rewards(5))
        joined(name, base, w, l, pw, pl, 0.3, beta=0.1, label_smoothing=1e-3).sum().backward()
        if base in ('nca_pair', 'apo_down', 'exo_pair', 'discopop') and name == 'yoked':
            assert (pl.grad - pw.grad).mean() > 0                              # not monotone in each pair, but on the whole
        else: assert (pl.grad - pw.grad > 0).all(), (name, base)

@pytest.mark.parametrize('side', SIDES)
def test_grad_to_cuts_exactly_the_other_side(side):
    pw, pl = (t.requires_grad_() for t in rewards(6, 2))
    a, b = route(pw, pl, side)
    assert (a.requires_grad, b.requires_grad) == SIDES[side] and torch.equal(a, pw) and torch.equal(b, pl)

def test_a_detached_margin_is_a_no_op_in_y1_and_y2_and_a_reweighting_in_y3():
    w, l, pw, pl = rewards(7)
    w.requires_grad_()
    plain = torch.autograd.grad(preference_loss('sigmoid', w, l).sum(), w)[0]
    for f in (add_linear, add_logistic):
        assert torch.equal(torch.autograd.grad(f(preference_loss('sigmoid', w, l), (pw - pl).detach(), 0.5).sum(), w)[0], plain)
    ratio = [torch.autograd.grad(preference_loss('sigmoid', *f(w, l, pw, pl, 0.5)).sum(), w)[0]/plain for f in (yoked, offset)]
    up = pw > pl
    assert (ratio[0][up] < 1).all() and (ratio[0][~up] > 1).all() and (ratio[1][up] > 1).all() and (ratio[1][~up] < 1).all()

def test_offset_and_reweight_send_nothing_into_the_readouts():
    w, l, pw, pl = (t.requires_grad_() for t in rewards(8))
    for name in ('offset', 'reweight'):
        grads = torch.autograd.grad(joined(name, 'sigmoid', w, l, pw, pl, 0.5).sum(), (w, pw, pl), allow_unused=True)
        assert grads[0] is not None and grads[1:] == (None, None)

def test_logistic_is_bounded_and_linear_is_not():
    far, dpo = torch.tensor([1e4]), torch.zeros(1)
    assert add_logistic(dpo, far, 0.1).item() == 0. and add_linear(dpo, far, 0.1).item() == pytest.approx(-1000.)
    assert torch.isfinite(add_logistic(dpo, -far, 0.1)).all()

def test_weights_have_mean_one_over_the_training_set():
    delta = rewards(9, 1)[0]
    mean = pair_weights(delta, 1.5).mean().item()
    assert reweight(torch.ones(B), delta, 1.5, mean).mean().item() == pytest.approx(1.)
    assert ((pair_weights(delta, 1.5) > 1) == (delta > 0)).all()

def test_anchor_is_zero_at_the_reference_and_one_per_sigma():
    g = torch.Generator().manual_seed(0)
    c, std, mask = torch.randn(3, 5, 4, generator=g), torch.rand(4, generator=g) + .5, torch.tensor([[0, 1, 1, 1, 0]]*3)
    assert anchor(c, c, mask, std).tolist() == [0, 0, 0]
    assert anchor(c + std, c, mask, std).tolist() == pytest.approx([1, 1, 1], rel=1e-5)
    far = c.clone(); far[:, 0] += 100                                          # outside the mask
    assert anchor(far, c, mask, std).tolist() == [0, 0, 0]
    ref = c.clone().requires_grad_()
    assert not anchor(c, ref, mask, std).requires_grad
    with pytest.raises(ValueError, match='no token to hold neurons on'): anchor(c, c, torch.zeros_like(mask), std)

@pytest.mark.parametrize('weight', [-0.1, float('nan'), float('inf'), '0.1', True, None])
@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_bad_weight_is_refused(name, weight):
    args = (torch.zeros(2),)*(4 if objective(name).form == 'reward' else 2)
    with pytest.raises(ValueError, match='weight is .*give'): objective(name).join(*args, weight)

def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'add-linear'"): objective('add_liner')
    with pytest.raises(ValueError, match="did you mean 'apo_zero'"): preference_loss('apo_zer', torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="did you mean 'chosen'"): route(torch.zeros(1), torch.zeros(1), 'chosn')
    with pytest.raises(ValueError, match='label_smoothing'): preference_loss('exo_pair', torch.zeros(1), torch.zeros(1))

@pytest.mark.parametrize('kw, words', [(dict(name='add-linear', grad_to='none'), 'is the preference loss alone'),
    (dict(name='add-logistic', grad_to='none'), 'is the preference loss alone'), (dict(name='offset', grad_to='rejected'), 'no meaning'),
    (dict(name='yoked', loss_types=['sigmoid', 'aot']), 'aot is not'), (dict(name='add-linear', kappa=-1.), 'neuron_kappa is -1'),
    (dict(name='add-linear', margin=float('nan')), 'neuron_margin is nan')])
def test_combinations_that_mean_nothing_are_refused(kw, words):
    with pytest.raises(ValueError, match=words): check_objective(**kw)

def test_combinations_that_mean_something_are_not():
    for kw in (dict(name='add-linear', weight=0, grad_to='none'), dict(name='yoked', grad_to='none'),
               dict(name='add-linear', loss_types=['aot']),
               dict(name='yoked', loss_types=['sigmoid', 'sft']), dict(name='offset', grad_to='none')): check_objective(**kw)

def test_loss_imports_torch_and_the_standard_library_only():
    import yfpo.loss, sys
    tree = ast.parse(Path(yfpo.loss.__file__).read_text())
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert names <= {'torch'} | set(sys.stdlib_module_names)

def test_loss_types_are_those_of_trl():
    "Every name is a branch of TRL's loss, and every branch is a name"
    import inspect, re
    from trl import DPOTrainer
    assert set(LOSS_TYPES) == set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert check_losses('sigmoid') == ['sigmoid'] and check_losses(LOSS_TYPES, .1) == list(LOSS_TYPES)

@pytest.mark.parametrize('types, eps, words', [
    ('sigmod', 0., "did you mean 'sigmoid'"), ([], 0., 'give a name'), (None, 0., 'None: give a name'), ({'sigmoid': 1}, 0., 'give a name'),
    (('sigmoid', ''), 0., "'' is unknown"), ('robust', .5, 'less than 0.5'), ('exo_pair', 0., 'above 0'),
    ('sigmoid', 1., 'less than 1'), ('sigmoid', math.nan, 'not a finite number'), ('sigmoid', -.1, 'below 0')])
def test_losses_that_cannot_be_are_refused(types, eps, words):
    with pytest.raises(ValueError, match=words): check_losses(types, eps)

@pytest.mark.parametrize('value', [0, -1, 1.5, True, '3', None, math.nan])
def test_counts_are_whole_numbers_from_one_on(value):
    with pytest.raises(ValueError, match=f'n is {value!r}: give a whole number, 1 or more'): check_count('n', value)
    assert check_count('n', 1) == 1 and check_count('n', 0, 0) == 0

ONES = torch.ones(3)

@pytest.mark.parametrize('args, words', [
    (('sppo_hard', ONES, ONES, 0.), 'beta is 0.0: give a number above 0'), (('ipo', ONES, ONES, 0.), 'beta is 0.0'),
    (('sigmoid', ONES, ONES, -1.), 'beta is -1'), (('sigmoid', ONES, ONES, math.nan), 'beta is nan'),
    (('robust', ONES, ONES, .1, .5), 'less than 0.5'), (('robust', ONES, ONES, .1, 2.), 'label_smoothing is 2'),
    (('discopop', ONES, ONES, .1, 0., 0.), 'discopop_tau is 0.0: give a number above 0'), ((['ipo'], ONES, ONES), 'did you mean'),
    (('ipo', [1.], ONES), 'chosen is a list: give a tensor'),
    (('ipo', ONES, torch.ones(2)), r'rejected has the shape \(2,\) and chosen \(3,\)')])
def test_a_loss_refuses_what_the_settings_of_a_run_refuse(args, words):
    with pytest.raises(ValueError, match=words): preference_loss(*args)

def test_dpo_refuses_too():
    with pytest.raises(ValueError, match='beta is -1, which is below 0'): dpo_loss(ONES, ONES, ONES, ONES, beta=-1)
    with pytest.raises(ValueError, match='ref_rejected is a list'): dpo_loss(ONES, ONES, ONES, [1.])

@pytest.mark.parametrize('f', [lambda: objective(['yoked']), lambda: check_objective({'yoked': 1}), lambda: route(ONES, ONES, ['both']),
                               lambda: check_objective('yoked', grad_to=['both'])])
def test_names_that_are_no_text_are_unknown(f):
    with pytest.raises(ValueError, match='is unknown: (did you mean|there are)'): f()

@pytest.mark.parametrize('value', [0, -1, 1.5, math.nan, math.inf, 'x', True, None])
def test_steps_are_whole_or_a_share(value):
    with pytest.raises(ValueError, match=f'every is {value}|every is {value!r}'): check_steps('every', value)
    assert [check_steps('every', x) for x in (.1, 1, 3.)] == [.1, 1, 3.] and check_steps('warmup', 0, 0) == 0

@pytest.mark.parametrize('call', [lambda x: add_linear(x, ONES, .1), lambda x: add_linear(ONES, x, 0), lambda x: add_logistic(x, ONES, .1),
    lambda x: yoked(ONES, ONES, x, ONES, .1), lambda x: offset(ONES, ONES, ONES, x, .1), lambda x: reweight(ONES, x, .1),
    lambda x: route(ONES, x, 'chosen'), lambda x: anchor(ONES, x, ONES, ONES)])
def test_tensors_of_one_shape_are_needed(call):
    with pytest.raises(ValueError, match='is a list: give a tensor'): call([1., 2.])
    with pytest.raises(ValueError, match='has the shape'): call(torch.ones(len(ONES), 1))

@pytest.mark.parametrize('call, says', [(lambda: pair_weights([1.], .1), 'ref_delta is a list'),
                                        (lambda: reweight(ONES, ONES, .1, 0.), 'mean is 0'),
                                        (lambda: add_logistic(ONES, ONES, .1, margin='x'), "margin is 'x'")])
def test_other_parts_of_an_objective(call, says):
    with pytest.raises(ValueError, match=says): call()
