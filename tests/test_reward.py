"Reward statistics and pairs: what is refused, and in which words"
import copy, json
import pytest, torch
from datasets import Dataset
from hypothesis import assume, given, settings, strategies as st
from test_trainer import LONG, PAIRS, column, make, run, some_neurons, tiny
from yfpo.lm.responses import encode
from yfpo.lm.rows import divergent, divergent_examples, places, spoken_example
from yfpo.neurons import NeuronSet
from yfpo.reward import READOUTS, RewardStats, checked_pairs, clipped_share, fit_moments, fit_stats, read_examples, readout, reward_audit

__all__ = ['tiny']
nan = float('nan')

@pytest.fixture(scope='module')
def stats(tiny): return fit_stats(*tiny, PAIRS, some_neurons(tiny[0]))[0]

def with_(stats, **change): return RewardStats(**{**vars(copy.deepcopy(stats)), **change})
def first(x, v): return torch.cat([torch.tensor([v]), x[1:]])

# ---- every row of READOUTS

def read_by(name, neurons):
    "A read-out of drawn activations, after 3 and 5 tokens, and its gradient"
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, len(neurons), generator=g).requires_grad_()
    std, wnorm = torch.rand(2, len(neurons), generator=g) + .5
    stats = RewardStats(torch.full_like(std, .3), std, wnorm, scale=.7, slope=.2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1]*5]).bool()
    phi = readout(a, mask, neurons, stats, READOUTS[name])
    return phi.detach(), torch.autograd.grad(phi.sum(), a)[0], mask

@pytest.mark.parametrize('name', READOUTS)
def test_a_read_out_reads_the_response_alone_and_has_a_gradient(tiny, name):
    phi, grad, mask = read_by(name, some_neurons(tiny[0]))
    assert phi.shape == (2,) and phi.isfinite().all() and grad.isfinite().all()
    assert (grad[mask].abs().sum(-1) > 0).all() and (grad[~mask] == 0).all()

def test_no_two_read_outs_are_the_same(tiny):
    "By their numbers, or else by the tokens that they read; one whose kind `readout` does not know would be the standardised one"
    seen = {n: (*read_by(n, some_neurons(tiny[0]))[0].tolist(), ro.over, ro.ref_relative) for n, ro in READOUTS.items()}
    assert [(a, b) for a in seen for b in seen if a < b and seen[a] == seen[b]] == []

@pytest.mark.parametrize('name', READOUTS)
def test_a_read_out_trains(tiny, tmp_path, name):
    "By its name in the settings; its margin is 0 at first where it is relative to the reference, and it moves"
    on, off = (run(tiny, tmp_path/str(w), readout=name, neuron_weight=w) for w in (.5, 0.))
    first, last = column(on, 'neurons/margins')[0], column(on, 'neurons/margins')[-1]
    assert (abs(first) < 1e-4) == READOUTS[name].ref_relative and last != first
    assert any((a != b).any() for a, b in zip(on.model.state_dict().values(), off.model.state_dict().values()))

def test_new_kinds_by_hand(tiny):
    "|c|/σ and the positive part of c/σ, limited and averaged; the sum is the mean times the number of tokens"
    neurons, std = some_neurons(tiny[0]), torch.full((len(some_neurons(tiny[0])),), 2.)
    a, stats = torch.randn(1, 4, len(neurons), generator=torch.Generator().manual_seed(1))*5, RewardStats(torch.ones_like(std), std,
                                                                                                          3*torch.ones_like(std))
    mask = torch.tensor([[True, True, True, False]])
    c = a[0, :3]*neurons.direction*3/2
    expected = dict(absolute=c.abs().clamp(max=3.), positive=c.clamp(0., 3.))
    for name, x in expected.items():
        assert readout(a, mask, neurons, stats, READOUTS[name]).item() == pytest.approx((x @ neurons.weight).mean().item(), rel=1e-5)
    assert clipped_share(a, mask, neurons, stats, READOUTS['absolute']).item() == pytest.approx((c.abs() >= 3).float().mean().item())
    mean, total = (readout(a, mask, neurons, stats, READOUTS[k]).item() for k in ('standardised', 'sum'))
    assert total == pytest.approx(3*mean, rel=1e-5)

# ---- statistics that are given

@pytest.mark.parametrize('change, words', [
    (dict(mean=torch.zeros(1), std=torch.ones(1), wnorm=torch.ones(1)), r'mean .* has the shape \(1,\), and there are 8 neurons'),
    (dict(std=-torch.ones(8)), 'the std of neuron 0 in the reward statistics is -1'),
    (dict(std=first(torch.ones(8), 0.)), 'the std of neuron 0 in the reward statistics is 0'),
    (dict(wnorm=-torch.ones(8)), 'the wnorm of neuron 0'), (dict(mean=[0.]*8), 'the mean .* is no tensor of floats'),
    (dict(std=torch.ones(8, dtype=torch.int64)), 'the std .* is no tensor of floats'),
    (dict(mean=torch.full((8,), nan)), 'the mean .* not finite'),
    (dict(scale='1'), "the scale of the reward statistics is '1' and no number"), (dict(scale=None), 'the scale .* is None and no number'),
    (dict(scale=-1.), r'the scale .* is -1\.0, which is no spread'), (dict(scale=nan), 'the scale .* is nan, which is not finite'),
    (dict(slope=nan), 'the slope .* is nan, which is not finite')])
def test_statistics_that_cannot_be_are_refused(stats, tiny, change, words):
    with pytest.raises(ValueError, match=words) as e: RewardStats.given(with_(stats, **change), some_neurons(tiny[0]))
    assert str(e.value).endswith(': leave reward_stats out, to fit them anew')

@pytest.mark.parametrize('what', [5, '/tmp/x', {}, True])
def test_what_is_no_statistics_is_refused(tiny, tmp_path, what):
    with pytest.raises(ValueError, match=f'reward_stats is a {type(what).__name__}, but must be RewardStats'):
        make(tiny, tmp_path, trainer_kw=dict(reward_stats=what))

def test_statistics_of_another_set_or_read_out_are_refused(stats, tiny, tmp_path):
    own, other = some_neurons(tiny[0]), some_neurons(tiny[0], seed=5)
    assert RewardStats.given(stats, own, 'standardised') is stats and RewardStats.given(None, own) is None
    with pytest.raises(ValueError, match='fitted for another set of neurons'): RewardStats.given(stats, other)
    with pytest.raises(ValueError, match="for the readout 'standardised', and not for 'contribution'"):
        make(tiny, tmp_path/'a', readout='contribution', trainer_kw=dict(reward_stats=stats))
    with pytest.raises(ValueError, match=r'has the shape \(1,\), and there are 8'):
        make(tiny, tmp_path/'b', trainer_kw=dict(reward_stats=fit_stats(*tiny, PAIRS, some_neurons(tiny[0], 1))[0]))
    older = with_(stats, readout='', neurons='')
    assert RewardStats.given(older, other, 'contribution') is older                    # which do not tell

@pytest.mark.parametrize('change', [lambda s: dict(std=s.std*1e12), lambda s: dict(scale=1e12)])
def test_statistics_that_switch_the_reward_off_are_refused(stats, tiny, tmp_path, change):
    with pytest.raises(ValueError, match='in units of the scale, which is rounding'):
        make(tiny, tmp_path, neuron_weight=.5, trainer_kw=dict(reward_stats=with_(stats, **change(stats))))

# ---- their file

def test_the_note_of_set_and_read_out_is_read_back(stats, tiny, tmp_path):
    stats.save(tmp_path)
    back = RewardStats.load(tmp_path)
    assert (back.readout, back.neurons, back.scale) == ('standardised', stats.neurons, stats.scale) and len(back.neurons) == 16
    (tmp_path/'reward.json').write_text('{"scale": 0.5, "slope": 0.0}')                # as files were before
    assert RewardStats.load(tmp_path).readout == '' and RewardStats.load(tmp_path).scale == .5

def wrong(name, text): return lambda f: (f/name).write_bytes(text)
def without(f):
    from safetensors.torch import save_file
    save_file(dict(mean=torch.ones(8), std=torch.ones(8)), f/'reward.safetensors')

@pytest.mark.parametrize('spoil, words', [
    (wrong('reward.json', b'{'), 'reward.json is cut or damaged'), (wrong('reward.json', b'[1]'), 'reward.json holds a list, and no dict'),
    (wrong('reward.json', b'{}'), "reward.json lacks 'scale'"), (wrong('reward.json', b'{"scale": 1, "x": 2}'), "reward.json holds 'x'"),
    (wrong('reward.json', b'{"scale": "a"}'), "the scale .* is 'a' and no number"), (wrong('reward.json', b'{"scale": NaN}'), 'not finite'),
    (wrong('reward.safetensors', b'123'), 'reward.safetensors is cut or damaged'), (without, "reward.safetensors lacks 'wnorm'"),
    (lambda f: (f/'reward.json').unlink(), r'holds no reward statistics \(reward.json\)')])
def test_a_damaged_file_is_said_in_a_sentence(stats, tmp_path, spoil, words):
    stats.save(tmp_path); spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as e: RewardStats.load(tmp_path)
    assert type(e.value) in (ValueError, FileNotFoundError) and '\n' not in str(e.value) and str(tmp_path) in str(e.value)

# ---- the pairs that are read

ONE = PAIRS[0]
@pytest.mark.parametrize('pair, words', [
    ({k: ONE[k] for k in ('chosen', 'rejected')}, "pair 1 to fit reward statistics on has no 'prompt'"), ('text', "has no 'prompt'"),
    (dict(ONE, chosen=None), 'has None as its chosen'), (dict(ONE, rejected=[dict(role='assistant', content=None)]), 'as its rejected'),
    (dict(ONE, chosen=[dict(role='assistant', content=[dict(type='text', text='4')])]), 'as its chosen'),
    (dict(ONE, chosen=ONE['chosen'] + ONE['prompt'] + ONE['chosen']), 'has 3 messages as its chosen, of which one can be read'),
    (dict(ONE, chosen=ONE['prompt']), 'a message of the user as its chosen')])
def test_pairs_that_would_be_read_otherwise_are_refused(tiny, pair, words):
    own = some_neurons(tiny[0])
    for f in (lambda: fit_stats(*tiny, [ONE, pair], own), lambda: reward_audit(*tiny, [ONE, pair], own, {})):
        with pytest.raises(ValueError, match=words.replace('to fit reward statistics on', '.*')): f()

@pytest.mark.parametrize('pairs, words', [([], 'there are no pairs to audit: give held-out'), ('ab', 'are one str'),
                                          (dict(ONE), 'are one dict'), (None, 'are one NoneType')])
def test_what_is_no_list_of_pairs_is_refused(pairs, words):
    with pytest.raises(ValueError, match=words): checked_pairs(pairs, 'to audit', 'give held-out preference pairs')

def test_any_iterable_of_pairs_gives_the_trainers_scale(tiny, stats, tmp_path):
    for rows in ((p for p in PAIRS), Dataset.from_list(PAIRS)):
        assert fit_stats(*tiny, rows, some_neurons(tiny[0]))[0].scale == pytest.approx(stats.scale)
    assert make(tiny, tmp_path).reward_stats.scale == pytest.approx(stats.scale, rel=1e-4)
    with pytest.raises(ValueError, match='messages as its'): fit_stats(*tiny, LONG, some_neurons(tiny[0]))

def test_no_text_at_all_is_refused(tiny):
    with pytest.raises(ValueError, match='no tokens to fit reward statistics on'): fit_moments([], some_neurons(tiny[0]), torch.ones(8))

# ---- where a pair diverges

def both_ways(chosen, rejected, prompt):
    "Places read from the first difference on, by `divergent_examples` and by `divergent` on the padded batch; (tokens, read or not) each"
    ex = [spoken_example(prompt, ids, (), None, read) for ids, read in (chosen, rejected)]
    T = len(prompt) + max(len(x) for x, _ in (chosen, rejected))
    ids, mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.bool)
    for row, on, (x, read) in zip(ids, mask, (chosen, rejected)):
        row[:len(prompt) + len(x)] = torch.tensor([*prompt, *x])
        on[len(prompt):len(prompt) + len(x)] = torch.tensor(read)
    texts = [range(len(e.ids))[p] if isinstance(p := places(e), slice) else p for e in divergent_examples(ex)]
    return [[*p] for p in texts], [m.nonzero()[:, 0].tolist() for m in divergent(ids, mask)]

def test_an_answer_of_one_turn_beside_one_of_several_is_cut_where_they_differ():
    assert both_ways(([5, 6, 7], [True]*3), ([5, 6, 8, 2, 11, 12, 4], [1, 1, 1, 0, 0, 0, 1]), [9, 9]) == ([[4], [4, 8]], [[4], [4, 8]])

@given(st.lists(st.lists(st.tuples(st.integers(3, 4), st.booleans()), min_size=1, max_size=7), min_size=2, max_size=2),
       st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_the_table_and_the_policy_are_read_at_the_same_places(answers, n):
    "Whichever tokens of either answer the assistant says"
    answers = [([t for t, _ in a], [on for _, on in a]) for a in answers]
    assume(all(any(on[not n:]) for _, on in answers))          # token 0 of a text is never read
    if not n: answers = [(ids, [False, *on[1:]]) for ids, on in answers]
    by_table, by_policy = both_ways(*answers, [9]*n)
    assert by_table == by_policy

def test_read_examples_refuses_statistics_of_another_set(tiny, stats):
    other = some_neurons(tiny[0], seed=1)
    with pytest.raises(ValueError, match='fitted for another set of neurons'):
        read_examples(tiny[0], encode(tiny[1], [('2+2=', '4')]), 0, other, stats)

def test_an_audit_checks_its_controls_and_needs_no_selector(tiny):
    own, control = some_neurons(tiny[0]), some_neurons(tiny[0], seed=1)
    del control.meta['selector']
    assert {r['kind'] for r in reward_audit(*tiny, PAIRS, own, dict(c=control), relevance=False)} == {'selected', 'unnamed', 'baseline'}
    control.meta['model'] = dict(control.meta['model'], layers=1)
    with pytest.raises(ValueError, match='was selected in another model'): reward_audit(*tiny, PAIRS, own, dict(c=control))

def test_an_audit_reads_digits_only_where_there_are_any(tiny):
    "Pairs of another capability have none: two read-outs would repeat the first"
    words = [dict(prompt='say', chosen='guten Tag', rejected=w) for w in ('good day', 'hello')]
    def kinds(pairs): return {r['readout'] for r in reward_audit(*tiny, pairs, some_neurons(tiny[0]), {}, relevance=False)} - {''}
    assert kinds(PAIRS) - kinds(words) == {'digits only', 'answer only'} and kinds(words) < kinds(PAIRS)
