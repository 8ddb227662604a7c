"Selection, controls, ablation and read-out against naive formulations, and what each refuses."
import contextlib, copy, inspect, itertools, json, re, struct, warnings
from dataclasses import fields
from types import SimpleNamespace
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import save, save_file
from yfpo.interventions import Trial, ablate, activation_bank, delta_nll, score_card, text_nll
from yfpo.lm.models import load_model, save_model, tiny_model
from yfpo.loss import dpo_loss, objective
from yfpo.beyond.attributors import response_means
from yfpo.beyond.controls import activation_matched, norm_matched, stability
from yfpo.neurons import (NeuronSet, Selection, as_set, capability_relevance, contrast_set, layer_matched, match_answers, match_lengths,
                          model_signature, outside, random_neurons, select_neurons, set_from_scores, split_half, top_neurons)
from yfpo.data.templates import chat_to_select, general_texts, make_problems
from yfpo.relevance import Relevance, Scoring, Tally, accumulate, attribute, digit_ids
from yfpo.lm.responses import Example, collate, encode, format_prompt, hidden_states, text_items
from yfpo.reward import (KINDS_OF_READING, Audit, Fitting, NeuronReader, NeuronReading, ReadOut, RewardStats, fit_and_read, fit_examples,
                         fit_stats, margin_auc, pair_items, read_examples, readout, reward_audit, set_readouts)

@pytest.fixture(scope='module')
def texts(tiny):
    _, tok = tiny
    return [(format_prompt(tok, p.question), p.solution) for p in make_problems(10, seed=4)]

@pytest.fixture(scope='module')
def neurons(tiny, texts): return select_neurons(*tiny, texts, general_texts(10), k=0.1, per_layer=0.2)

@pytest.fixture(scope='module')
def pairs():
    return [dict(prompt=[dict(role='user', content=p.question)], chosen=[dict(role='assistant', content=p.solution)],
                 rejected=[dict(role='assistant', content=p.solution.replace(p.answer, str(int(p.answer) + 7)))])
                 for p in make_problems(8, seed=6)]

def relevance(x): return Relevance(x, torch.stack([x, x]), x, x, 4)

def test_contrast_by_hand(tiny):
    L, F = 2, 64
    cap, gen = torch.zeros(L, F), torch.zeros(L, F)
    cap[0, 3], cap[1, 9], cap[1, 10], gen[1, 10] = .5, .3, .4, .39
    s = contrast_set(relevance(cap), relevance(gen), tiny[0], k=3/128, universal=0, per_layer=1)
    assert list(zip(s.layer.tolist(), s.index.tolist())) == [(0, 3), (1, 9), (1, 10)]
    assert torch.allclose(s.weight, torch.tensor([.5, .3, .01])/.81)

def test_per_layer_cap():
    score = torch.tensor([[9., 8., 7.], [1., 2., 3.]])
    layer, index = top_neurons(score, torch.ones(2, 3, dtype=torch.bool), 4, 2)
    assert list(zip(layer.tolist(), index.tolist())) == [(0, 0), (0, 1), (1, 2), (1, 1)]

@pytest.mark.parametrize('make', [random_neurons, layer_matched])
def test_controls(make, neurons):
    draws = [make(neurons, s) for s in range(25)]
    chosen = set(zip(neurons.layer.tolist(), neurons.index.tolist()))
    for d in draws:
        members = list(zip(d.layer.tolist(), d.index.tolist()))
        assert len(set(members)) == len(neurons) and not chosen & set(members) and d.weight.sum() == pytest.approx(1, abs=1e-5)
    assert len({tuple(d.index.tolist()) for d in draws}) > 20
    if make is layer_matched: assert all(torch.equal(d.layer, neurons.layer) for d in draws)

def _activation_matched(neurons, seed, **how):
    return activation_matched(neurons, torch.rand(2, 64, generator=torch.Generator().manual_seed(0)), seed, **how)

@pytest.mark.parametrize('make', [layer_matched, _activation_matched])
def test_a_control_that_differs_in_one_thing(make, neurons):
    "Identity, direction and weight one by one: what is not asked to differ is the selected set's, by its own rule"
    helps = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    helps[0, :5] = 0                                           # the selected set's rule gives these direction 1
    plain = make(neurons, 7)
    for directions, weights in itertools.product(('random', 'copied', 'relevance'), ('shuffled', 'copied')):
        c = make(neurons, 7, directions=directions, weights=weights, relevance=helps)
        assert torch.equal(c.layer, neurons.layer) and torch.equal(c.index, plain.index), 'the draw does not depend on them'
        expected = dict(random=plain.direction, copied=neurons.direction,
                        relevance=torch.tensor([-1. if helps[l, i] < 0 else 1. for l, i in zip(c.layer, c.index)]))[directions]
        assert torch.equal(c.direction, expected) and torch.equal(c.weight, neurons.weight if weights == 'copied' else plain.weight)
    with pytest.raises(ValueError, match='needs relevance='): make(neurons, 7, directions='relevance')
    with pytest.raises(ValueError, match='2 layers of 64 neurons'): make(neurons, 7, directions='relevance', relevance=helps[:1])
    with pytest.raises(ValueError, match="directions.*copied"): make(neurons, 7, directions='copies')
    with pytest.raises(ValueError, match='weights'): make(neurons, 7, weights='random')

def test_round_trip_and_refusals(neurons, tiny, tmp_path):
    assert NeuronSet.load(neurons.save(tmp_path/'s')) == neurons
    with pytest.raises(ValueError, match='another model'): neurons.check(tiny_model(hidden=64))
    with pytest.raises(ValueError, match='another model'): NeuronReader(tiny_model(neurons=32), neurons)
    bad = copy.deepcopy(neurons); bad.index[0] = 64
    with pytest.raises(ValueError, match='outside'): bad.check(tiny[0])
    with pytest.raises(FileNotFoundError, match='holds no NeuronSet'): NeuronSet.load(tmp_path)

@pytest.mark.parametrize('kwargs,says', [(dict(capability=[]), 'no capability'), (dict(general=[]), 'no general'), (dict(k=0.), 'k is 0'),
                                         (dict(k=float('nan')), 'k is nan')])
def test_selection_refuses(kwargs, says, tiny, texts):
    with pytest.raises(ValueError, match=says): select_neurons(*tiny, **{**dict(capability=texts, general=general_texts(10)), **kwargs})

def test_ablation_equals_surgery(tiny, neurons, texts):
    model, tok = tiny
    twin = copy.deepcopy(model)
    for l, i in zip(neurons.layer, neurons.index): twin.model.layers[l].mlp.down_proj.weight.data[:, i] = 0
    batch = collate(encode(tok, texts), tok.pad_token_id)
    with ablate(model, neurons, spare_first=False): h = hidden_states(model, batch)
    m = batch['attention_mask'].bool()
    assert torch.allclose(h[m], hidden_states(twin, batch)[m], atol=1e-6)

def test_first_token_is_spared(tiny, neurons):
    model, _ = tiny
    x = torch.tensor([[5, 6, 7]])
    with ablate(model, neurons): a = model(x).logits
    assert torch.equal(a[:, 0], model(x).logits[:, 0]) and not torch.equal(a[:, 2], model(x).logits[:, 2])

def test_ablation_restores_after_an_error(tiny, neurons, texts):
    model, tok = tiny
    base = text_nll(model, tok, texts)
    with pytest.raises(RuntimeError):
        with ablate(model, neurons): raise RuntimeError
    assert torch.equal(text_nll(model, tok, texts), base) and delta_nll(model, tok, texts, neurons).abs().max() > 0

@pytest.mark.parametrize('kw, says', [(dict(mode='amplify'), 'use one of zero, mean'),
    (dict(mode='mean'), 'needs .values.*mean activations'), (dict(mode='resample'), 'needs .values.*activation_bank'),
    (dict(mode='resample', values=torch.zeros(4, 1)), 'make it with this set')])
def test_ablations_that_cannot_be_are_refused(kw, says, tiny, neurons):
    with pytest.raises(ValueError, match=says), ablate(tiny[0], neurons, **kw): pass

TOLD = (select_neurons, layer_matched, random_neurons, NeuronSet, NeuronReader, RewardStats, fit_stats, dpo_loss, objective, ablate,
        delta_nll)

@pytest.mark.parametrize('f', TOLD, ids=lambda f: f.__name__)
def test_help_tells_every_parameter_and_what_is_refused(f):
    text = inspect.getdoc(f)
    named = [p.name for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert named and [k for k in named if not re.search(rf'\b{k}\b', text)] == [] and 'ValueError' in text

def naive_phi(model, tok, example, s, stats, clip=3.):
    "The read-out one neuron and one token at a time"
    acts = {}
    hooks = [l.mlp.down_proj.register_forward_pre_hook(lambda m, x, n=n: acts.__setitem__(n, x[0][0]))
             for n, l in enumerate(model.model.layers)]
    model(torch.tensor([example.ids]))
    for h in hooks: h.remove()
    total = 0.
    for k in range(len(s)):
        l, i = int(s.layer[k]), int(s.index[k])
        norm = model.model.layers[l].mlp.down_proj.weight[:, i].norm()
        z = [max(-clip, min(clip, ((s.direction[k]*acts[l][t, i]*norm - stats.mean[k])/stats.std[k]).item()))
             for t in range(example.start, len(example.ids))]
        total += float(s.weight[k])*sum(z)/len(z)
    return total

def test_readout_against_the_naive_one(tiny, neurons, pairs):
    model, tok = tiny
    stats, phi = fit_stats(model, tok, pairs, neurons)
    ex = encode(tok, pair_items(pairs))
    for j, e in enumerate(ex[:3]): assert phi[j, 0].item() == pytest.approx(naive_phi(model, tok, e, neurons, stats), abs=1e-4)

def test_rescaling_hack(tiny, neurons, pairs):
    model, tok = tiny
    stats, _ = fit_stats(model, tok, pairs, neurons)
    ex, hacked = encode(tok, pair_items(pairs)), copy.deepcopy(model)
    for l, i in zip(neurons.layer, neurons.index):
        hacked.model.layers[l].mlp.up_proj.weight.data[i] *= 8; hacked.model.layers[l].mlp.down_proj.weight.data[:, i] /= 8
    phi = lambda m, ro: read_examples(m, ex, tok.pad_token_id, neurons, stats, ro)
    assert torch.allclose(phi(hacked, ReadOut()), phi(model, ReadOut()), atol=1e-4)
    assert torch.allclose(phi(hacked, ReadOut.paper_literal()), 8*phi(model, ReadOut.paper_literal()), rtol=1e-3)

def test_reward_refusals(tiny, neurons, tmp_path):
    stats = RewardStats(torch.zeros(len(neurons)), torch.ones(len(neurons)), torch.ones(len(neurons)))
    with pytest.raises(ValueError, match='no token'): readout(torch.zeros(1, 3, len(neurons)), torch.zeros(1, 3), neurons, stats)
    with pytest.raises(ValueError, match='no pairs'): reward_audit(*tiny, [], neurons, {})
    with pytest.raises(FileNotFoundError, match='no reward statistics'): RewardStats.load(tmp_path)
    with pytest.raises(ValueError, match='unknown'): ReadOut('rawr')

def test_audit_finds_a_planted_signal(tiny, neurons, pairs):
    rows = reward_audit(*tiny, pairs, neurons, {'random': random_neurons(neurons, 0)})
    assert [r['readout'] for r in rows if r['kind'] == 'selected'] == list(KINDS_OF_READING) and len(rows) == 2*len(KINDS_OF_READING) + 3
    assert all(0 <= r['low'] <= r['auc'] <= r['high'] <= 1 for r in rows)
    longer = [dict(p, chosen=[dict(role='assistant', content=p['chosen'][0]['content'] + ' Indeed so.')]) for p in pairs]
    assert {r['signal']: r['auc'] for r in reward_audit(*tiny, longer, neurons, {})}['length'] == 1.0
    assert margin_auc([1, 1, -1, 0]) == 0.625

def test_audit_sees_neurons_that_know(tiny, neurons, pairs):
    "Neurons chosen for telling these very pairs apart must pass, by the read-outs they were chosen for"
    model, tok = tiny
    right, wrong = response_means(model, encode(tok, pair_items(pairs)), tok.pad_token_id, 8).chunk(2)
    score = (right - wrong).mean(0)/(right - wrong).std(0)
    know = set_from_scores(score.abs(), score.abs() > 0, score, model, Selection(k=.02, per_layer=1.))
    rows = {r['readout']: r['auc'] for r in reward_audit(model, tok, pairs, know, {}) if r['kind'] == 'selected'}
    assert rows['standardised'] > .75 and rows['contribution'] > .75
    flipped = NeuronSet(know.layer, know.index, know.weight, -know.direction, know.meta)
    back = {r['readout']: r['auc'] for r in reward_audit(model, tok, pairs, flipped, {}) if r['kind'] == 'selected'}
    assert back['standardised'] == pytest.approx(1 - rows['standardised'], abs=.05) and back['relevance'] == rows['relevance']

def test_audit_is_blind_to_the_free_rescaling(tiny, neurons, pairs):
    "Of the read-outs only the literal one can be moved without changing the function"
    model, tok = tiny
    hacked = copy.deepcopy(model)
    for l, i in list(zip(neurons.layer, neurons.index))[::2]:
        hacked.model.layers[l].mlp.up_proj.weight.data[i] *= 8; hacked.model.layers[l].mlp.down_proj.weight.data[:, i] /= 8
    ex = encode(tok, pair_items(pairs))
    a, b = (set_readouts(m, ex, tok.pad_token_id, [neurons], digit_ids(tok)) for m in (model, hacked))
    moved = {k for k in a if not torch.allclose(a[k], b[k], atol=1e-4, rtol=1e-3)}
    assert moved == {'raw'}

# ---- what is no set

GOOD = dict(layer=torch.tensor([0, 1, 1]), index=torch.tensor([5, 60, 61]), weight=torch.tensor([.5, .25, .25]),
            direction=torch.tensor([1., -1., 1.]))
MEMBERS = {
    'short': (dict(index=torch.tensor([5, 60])), r'its index has the shape \(2,\) where layer has \(3,\)'),
    'two axes': (dict(weight=torch.ones(3, 1)), r'its weight has the shape \(3, 1\) and not one dimension'),
    'all two': ({k: v[None] for k, v in GOOD.items()}, r'its layer has the shape \(1, 3\) and not one dimension'),
    'no axis': (dict(layer=torch.tensor(3)), 'its layer has the shape'),
    'nan': (dict(weight=torch.tensor([.5, float('nan'), .5])), 'a weight is NaN'),
    'inf': (dict(weight=torch.tensor([1., 1., torch.inf])), 'inf'),
    'negative': (dict(weight=torch.tensor([.5, -.5, 1.])), 'below 0'), 'all zero': (dict(weight=torch.zeros(3)), 'every weight is 0'),
    'double': (dict(layer=torch.tensor([0, 1, 1]), index=torch.tensor([5, 60, 60])), 'neuron 60 of layer 1 is in it 2 times'),
    'no direction': (dict(direction=torch.tensor([1., 0., 1.])), 'neither 1 nor -1'),
    'nan direction': (dict(direction=torch.tensor([1., float('nan'), 1.])), 'neither 1 nor -1'),
    'fraction': (dict(index=torch.tensor([5., 60.5, 61.])), 'its index is of torch.float32'),
    'boolean': (dict(layer=torch.tensor([False, True, True])), 'its layer is of torch.bool'),
    'complex': (dict(weight=torch.ones(3)*1j), 'its weight is of torch.complex64'),
    'whole weights': (dict(weight=torch.tensor([1, 1, 1])), 'its weight is of torch.int64'),
    'below 0': (dict(layer=torch.tensor([0, -1, 1])), 'below 0'),
    'ten times': (dict(weight=torch.tensor([5., 2.5, 2.5])), 'its weights sum to 10 and not to 1')}

def write(folder, tensors, meta='{}'):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder/'neurons.safetensors'); (folder/'neurons.json').write_text(meta)
    return folder

@pytest.mark.parametrize('case', MEMBERS)
def test_one_checker_for_the_constructor_the_file_and_the_model(case, tiny, tmp_path):
    change, says = MEMBERS[case]
    with pytest.raises(ValueError, match=f'this is no NeuronSet, .*{says}'): NeuronSet(**{**GOOD, **change})
    with pytest.raises(ValueError, match=f'the NeuronSet in .* is damaged, .*{says}.*: select again'):
        NeuronSet.load(write(tmp_path/'s', {**GOOD, **change}))
    s = NeuronSet(**GOOD, meta=dict(model=model_signature(tiny[0])))
    for k, v in change.items(): setattr(s, k, v)
    with pytest.raises(ValueError, match=says): s.check(tiny[0])

@pytest.mark.parametrize('make, says', [
    (lambda f: write(f, {k: v for k, v in GOOD.items() if k != 'weight'}), "lacks 'weight'"),
    (lambda f: write(f, {**GOOD, 'odd': torch.ones(3)}), "holds 'odd'"),
    (lambda f: write(f, GOOD, '[1, 2]'), 'its meta is a list and no dict'),
    (lambda f: write(f, GOOD, '{"model": "tiny"}'), "'model' in its meta is no dict"), (lambda f: write(f, GOOD, '{"a"'), 'cut or damaged'),
    (lambda f: write(f, GOOD, '{"a": 1, "a": 2}'), "the key 'a' stands twice"), (lambda f: write(f, GOOD, r'{"a": "\ud800"}'), 'surrogate'),
    (lambda f: write(f, GOOD, '['*100_000), 'cut or damaged'), (lambda f: write(f, GOOD, ''), 'cut or damaged'),
    (lambda f: (write(f, GOOD)/'neurons.json').write_bytes(b'\xff\xfe'), 'neurons.json is cut or damaged'),
    (lambda f: (write(f, GOOD)/'neurons.safetensors').write_bytes(save(GOOD)[:-7]), 'neurons.safetensors is cut or damaged'),
    (lambda f: (write(f, GOOD)/'neurons.safetensors').write_bytes(b''), 'neurons.safetensors is cut or damaged'),
    (lambda f: ((write(f, GOOD)/'neurons.json').unlink(), (f/'neurons.json').mkdir()), 'holds no NeuronSet')])
def test_a_damaged_file_is_said_in_a_sentence(make, says, tmp_path):
    make(tmp_path/'s')
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: NeuronSet.load(tmp_path/'s')
    assert '\n' not in str(e.value)

def test_joined_sets_may_share_members():
    assert len(NeuronSet(**{k: torch.cat([v, v]) for k, v in GOOD.items()}, meta=dict(selector='joined'))) == 6

@pytest.mark.parametrize('whole, real', [(torch.uint8, torch.float16), (torch.int16, torch.bfloat16), (torch.int32, torch.float64)])
def test_members_have_one_type_whatever_was_given(whole, real, tiny):
    s = NeuronSet(*(GOOD[k].to(d) for k, d in zip(GOOD, (whole, whole, real, real))), meta=dict(model=model_signature(tiny[0])))
    assert [getattr(s, k).dtype for k in GOOD] == [torch.int64]*2 + [torch.float32]*2
    with NeuronReader(tiny[0], s) as reader: assert reader.norms().shape == (3,)

@pytest.mark.parametrize('given', [[], {}, True, 'folder', None])
def test_what_is_no_set_is_said(given):
    with pytest.raises(ValueError, match=f'neurons is a {type(given).__name__}, but must be a NeuronSet: select'): as_set(given)

numbers = st.one_of(st.integers(-2**70, 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=5))
jsons = st.recursive(numbers, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(['model', 'chosen_on', 'selector', 'k']) |
                     st.text(max_size=3), x, max_size=3), max_leaves=6)
dtypes = st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float64, torch.complex64,
                          torch.float8_e4m3fn, torch.uint16])
tensors = st.builds(lambda values, dtype, as2d: torch.tensor(values).to(dtype).reshape((1, -1) if as2d else (-1,)),
                    st.lists(st.sampled_from([0., 1., -1., 2., .5, float('nan'), float('inf'), 1e30]), max_size=4), dtypes, st.booleans())
whole = st.dictionaries(st.sampled_from(['layer', 'index', 'weight', 'direction', 'odd']), tensors, max_size=5).map(save)
near = st.integers(0, 4).flatmap(lambda n: st.fixed_dictionaries({k: st.lists(st.sampled_from(v), min_size=n, max_size=n).map(
    lambda x, d=d: torch.tensor(x, dtype=d)) for k, v, d in (('layer', [0, 1], torch.int64), ('index', [3, 4, 5, -1], torch.int64),
    ('weight', [0., .5, 1.], torch.float32), ('direction', [1., -1.], torch.float32))}).map(save))
written = jsons.map(lambda x: json.dumps(x).encode())
header = st.builds(lambda h, rest: struct.pack('<Q', len(h)) + h + rest, written, st.binary(max_size=40))
def damaged(b): return st.builds(lambda b, at, c: b[:at % (len(b) + 1)] + c + b[at % (len(b) + 1) + len(c):], b, st.integers(0, 999),
                                 st.binary(max_size=3))
weights = st.one_of(near, near, whole, st.binary(max_size=60), header, damaged(near), damaged(whole))
metas = st.one_of(st.just(b'{}'), written, st.binary(max_size=20), damaged(written))

def test_any_bytes_load_whole_or_are_refused_in_one_line(tmp_path):
    seen = dict(loaded=0, refused=0)
    @settings(max_examples=1500, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(weights, metas)
    def holds(tensors, meta):
        (tmp_path/'neurons.safetensors').write_bytes(tensors); (tmp_path/'neurons.json').write_bytes(meta)
        try: s = NeuronSet.load(tmp_path)
        except (ValueError, FileNotFoundError) as e:
            seen['refused'] += 1
            assert type(e) in (ValueError, FileNotFoundError) and '\n' not in str(e) and str(tmp_path) in str(e)
            return
        seen['loaded'] += 1
        assert len(s.layer) == len(s.index) == len(s.weight) == len(s.direction) and isinstance(s.meta, dict)
        assert s.weight.isfinite().all() and set(s.direction.tolist()) <= {1., -1.} and s == NeuronSet.load(s.save(tmp_path/'again'))
        assert s.meta.get('selector') == 'joined' or len(set(zip(s.layer.tolist(), s.index.tolist()))) == len(s)
    holds()
    assert seen['loaded'] > 50 and seen['refused'] > 500

# ---- weights of another checkpoint

def test_another_checkpoint_is_said_once_and_refused_when_strict(neurons, tiny, tmp_path):
    kept, other = NeuronSet.load(neurons.save(tmp_path/'s')), tiny_model(seed=5)
    other.name = 'elsewhere'
    with pytest.warns(UserWarning, match='was selected on the weights of tiny .*those of elsewhere .* are others: after training') as said:
        kept.check(other); kept.check(other); neurons.check(other)
    assert len(said) == 1 and '\n' not in str(said[0].message)
    with pytest.raises(ValueError, match='selected on the weights of tiny .*: select neurons in this model'): kept.check(other, strict=True)

def test_the_same_checkpoint_in_any_clothes_is_the_same(neurons, tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    folder = save_model(*tiny, tmp_path/'m')
    wrapped = get_peft_model(load_model(folder)[0], LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for m in (tiny[0], load_model(folder)[0], load_model(folder, dtype='bfloat16')[0], wrapped): neurons.check(m, strict=True)
        for make in (random_neurons, layer_matched): assert make(neurons).meta['chosen_on'] == neurons.meta['chosen_on']

def test_training_in_place_is_no_other_model_and_old_sets_still_load(neurons, tmp_path):
    model = tiny_model()
    meta = {k: v for k, v in neurons.meta.items() if k != 'chosen_on'}
    old = NeuronSet(neurons.layer, neurons.index, neurons.weight, neurons.direction, meta)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        neurons.check(model)
        with torch.no_grad(): model.model.norm.weight.add_(1)
        neurons.check(model)
        NeuronSet.load(old.save(tmp_path/'old')).check(tiny_model(seed=7), strict=True)
    with pytest.raises(ValueError, match='are others'): neurons.check(model, strict=True)

def test_a_set_is_at_home_beside_the_weights_that_were_trained_on_it(neurons, tiny, tmp_path):
    "Saved as a trainer saves: no warning there, one anywhere else, and strict means strict"
    from yfpo.beyond.cards import neuron_cards
    from yfpo.trainer import save_beside
    stats = SimpleNamespace(save=lambda folder: folder.mkdir())
    for name, seed in (('a', 11), ('b', 12)):
        save_model(tiny_model(seed=seed), tiny[1], tmp_path/name)
        save_beside(tmp_path/name, tiny_model(seed=seed), tiny[1], SimpleNamespace(neurons=neurons, stats=stats))
    (a, _), (b, _) = (load_model(str(tmp_path/x)) for x in 'ab')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for own in (NeuronSet.load(tmp_path/'a'/'neurons'), NeuronSet.from_pretrained(tmp_path/'a')):
            assert own.check(a) == neurons
            for make in (layer_matched, random_neurons, outside): make(own).check(a)
            assert neuron_cards(a, tiny[1], own, ['1 + 1 = 2'], top=2, n_effect=0)
    with pytest.warns(UserWarning, match='are others'): own.check(b)
    with pytest.raises(ValueError, match='are others'): own.check(a, strict=True)
    with pytest.warns(UserWarning, match='are others'): NeuronSet.load(own.save(tmp_path/'else')).check(a)

# ---- texts

@pytest.mark.parametrize('given, says', [('2+2', "the capability texts are one text, '2\\+2': give a list"), (b'2+2', 'are one text'),
    (None, 'the capability texts are None: give a list of texts'), (7, 'texts are 7'), ([], 'there are no capability texts'),
    ((x for x in ()), 'no capability texts'), ([1, 2], 'capability text 0 is 1: give a text'),
    (['a long text', ''], 'capability text 1 is empty'),
    ([('p', '')], 'text 0 has an empty completion'), ([('p',)], 'text 0 has 1 parts and not 2'), ([('p', 'r', 's')], 'has 3 parts'),
    ([('p', 3)], 'has 3 as its completion'), ([(None, 'r')], 'has None as its prompt'), ([dict(prompt='p')], 'has no completion'),
    (dict(prompt='p', completion='r'), 'are one dict'), ([dict(prompt=[], completion='r')], r'has \[\] as its prompt'),
    ([dict(prompt='p', completion=[dict(role='user')])], 'as its completion'), ([float('nan')], 'text 0 is nan')])
def test_texts_are_checked_by_one_function(given, says, tiny):
    given = list(given) if hasattr(given, '__next__') else given
    with pytest.raises(ValueError, match=says) as e: select_neurons(*tiny, given, general_texts(4))
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match=says.replace('capability', 'general')): select_neurons(*tiny, general_texts(4), given)

def test_any_iterable_of_texts(neurons, tiny, texts):
    again = select_neurons(*tiny, iter(texts), (t for t in general_texts(10)), k=0.1, per_layer=0.2)
    assert again == neurons
    chat = [dict(prompt=[dict(role='user', content='2+2')], completion=[dict(role='assistant', content='4 it is')])]
    assert text_items(tuple(chat)) == chat

def test_relevance_takes_tokenised_texts_only(tiny):
    with pytest.raises(ValueError, match="'2' is no Example: tokenise texts with `encode` first"): attribute(tiny[0], '2+2', 0)
    with pytest.raises(ValueError, match='no texts to attribute'): attribute(tiny[0], None, 0)
    ex = encode(tiny[1], ['one two three', 'four five'])
    assert torch.equal(attribute(tiny[0], iter(ex), 0).mean, attribute(tiny[0], ex, 0).mean)

@pytest.mark.parametrize('odd', [{1}, '\ud800', object()])
def test_a_set_that_cannot_be_saved_leaves_the_earlier_one(odd, tmp_path):
    first = NeuronSet(**GOOD, meta=dict(k=1))
    first.save(tmp_path)
    with pytest.raises(ValueError, match='meta of this NeuronSet cannot be saved'):
        NeuronSet(**{**GOOD, 'layer': GOOD['layer'] + 1}, meta=dict(odd=odd)).save(tmp_path)
    assert NeuronSet.load(tmp_path) == first

def test_a_table_is_no_list_of_texts(tiny):
    with pytest.raises(ValueError, match='the capability texts are one Table: give a list'):
        select_neurons(*tiny, type('Table', (list,), dict(columns=['a']))(['question']), general_texts(4))

# ---- what mathematics is contrasted with

def same(a, b): return torch.equal(a.mean, b.mean) and torch.equal(a.weighted, b.weighted) and a.n == b.n

def test_general_text_is_cut_from_prose_or_taken_from_answers(tiny, texts):
    "Plain text is one stream cut to the examples' lengths; answers to a prompt keep their prompts and are matched with solutions"
    net, tok = tiny
    def scores(ex): return attribute(net, ex, tok.pad_token_id, 'attnlrp')
    cap, prose, chat = encode(tok, texts[:4]), general_texts(6), chat_to_select(6)
    got = capability_relevance(net, tok, texts[:4], prose)
    assert same(got[0], scores(cap)) and same(got[1], scores(match_lengths(encode(tok, prose, max_length=10**6), cap)))
    pairs = [(format_prompt(tok, r['prompt'][0]['content'], ''), r['completion'][0]['content']) for r in chat]
    gen, cut = match_answers(encode(tok, pairs), cap)
    for general in (chat, pairs):
        for a, b in zip(capability_relevance(net, tok, texts[:4], general), (scores(cut), scores(gen))): assert same(a, b)
    with pytest.raises(ValueError, match='^there are 3 general answers for 4 capability texts: give at least as many$'):
        capability_relevance(net, tok, texts[:4], chat[:3])
    with pytest.raises(ValueError, match='^some general texts are plain and some answer a prompt: give texts of one kind$'):
        capability_relevance(net, tok, texts[:4], prose + chat)

def test_answers_match_solutions_in_length():
    "Pairs of equal response length, by trying every choice of answers: none is better, and what is cut is an end of a response"
    g = torch.Generator().manual_seed(0)
    def some(n, mark): return [Example([mark + i]*int(s + r), int(s)) for i, (s, r) in enumerate(torch.randint(1, 30, (n, 2), generator=g))]
    def size(e): return len(e.ids) - e.start
    for _ in range(20):
        answers, caps = some(5, 100), some(3, 0)
        gen, cap = match_answers(answers, caps)
        taken = [e.ids[0] - 100 for e in gen]
        assert [e.ids[0] for e in cap] == [0, 1, 2] and len(set(taken)) == 3
        for g_, c, j, full in zip(gen, cap, taken, caps):
            assert size(g_) == size(c) == min(size(answers[j]), size(full)) and (g_.start, c.start) == (answers[j].start, full.start)
        def gap(js): return sum(abs(size(answers[j]) - size(c)) for j, c in zip(js, caps))
        assert gap(taken) == min(map(gap, itertools.permutations(range(5), 3)))

# ---- sets that say nothing of their model, and settings

@pytest.mark.parametrize('meta, says', [(dict(chosen_on=dict(weights=[])), r"'chosen_on' in its meta has \[\] as its weights"),
                                        (dict(chosen_on=dict(name=['a'])), 'as its name, which is no text')])
def test_what_a_set_was_chosen_on_is_text(meta, says, tmp_path):
    with pytest.raises(ValueError, match=says): NeuronSet(**GOOD, meta=meta)
    with pytest.raises(ValueError, match=says): NeuronSet.load(write(tmp_path/'s', GOOD, json.dumps(meta)))

def drawn(s): return [lambda: random_neurons(s), lambda: layer_matched(s), lambda: outside(s), lambda: norm_matched(s, tiny_model())]

@pytest.mark.parametrize('own, says', [(None, 'does not say which model it was chosen in'), ({}, 'does not say'),
    (dict(layers=2), 'does not say'),
    (dict(layers='2', width=64), 'does not say'), (dict(layers=2, width=-1), 'does not say'),
    (dict(layers=1, width=64), "outside its model's 1 layers"),
    (dict(layers=2, width=10), 'layers of 10 neurons')])
def test_controls_of_a_set_without_a_model(own, says):
    for draw in drawn(NeuronSet(**GOOD, meta={} if own is None else dict(model=own))):
        with pytest.raises(ValueError, match=says): draw()

def test_controls_of_what_is_no_set_and_seeds(neurons):
    for draw in drawn(None):
        with pytest.raises(ValueError, match='neurons is a NoneType'): draw()
    for make in (random_neurons, layer_matched, outside):
        with pytest.raises(ValueError, match="seed is 'x'"): make(neurons, seed='x')
    with pytest.raises(ValueError, match='n is 0'): outside(neurons, n=0)

@pytest.mark.parametrize('model', [None, 'tiny', (1, 2), torch.nn.Linear(2, 2)])
def test_a_set_is_checked_against_a_model(model, neurons):
    with pytest.raises(ValueError, match=f'the model is a {type(model).__name__} and no model that writes text'): neurons.check(model)

def test_what_differs_is_shown_as_it_is(tiny):
    sig = model_signature(tiny[0])
    with pytest.raises(ValueError, match=r"\(layers '2' there, 2 here\)"):
        NeuronSet(**GOOD, meta=dict(model=dict(sig, layers='2'))).check(tiny[0])
    with pytest.raises(ValueError, match=r'\(heads 4 there, None here\)'):
        NeuronSet(**GOOD, meta=dict(model=dict(sig, heads=4))).check(tiny[0])
    with pytest.raises(ValueError, match='does not say which model it was chosen in'): NeuronSet(**GOOD).check(tiny[0])

@pytest.mark.parametrize('path, says', [(None, 'None is no path'), (5, '5 is no path'), (b'x', 'no path'), (['x'], 'no path'),
    ('x'*300, 'too long'),
                                        ('~nosuchuser/x', 'names a user')])
def test_what_is_no_folder_of_a_set(path, says):
    with pytest.raises(ValueError, match=says): NeuronSet(**GOOD).save(path)
    with pytest.raises(ValueError, match=says): NeuronSet.load(path)

def test_a_set_cannot_be_saved_there(tmp_path):
    (tmp_path/'file').write_text('mine')
    with pytest.raises(FileExistsError, match='file is a file: give a folder'): NeuronSet(**GOOD).save(tmp_path/'file')
    with pytest.raises(OSError, match='/proc/x/neurons.safetensors cannot be written .*: give another path'):
        NeuronSet(**GOOD).save('/proc/x')

@pytest.mark.parametrize('kw, says', [(dict(k='x'), "k is 'x'"), (dict(k=True), 'k is True'), (dict(universal='x'), "universal is 'x'"),
    (dict(per_layer=None), 'per_layer is None'), (dict(threshold='x'), "threshold is 'x'"), (dict(batch_size='x'), "batch_size is 'x'"),
    (dict(batch_size=1.5), 'batch_size is 1.5'), (dict(max_length='x'), "max_length is 'x'"),
    (dict(method=['attnlrp']), "did you mean 'attnlrp'"),
    (dict(method={}), 'attributor {} is unknown'), (dict(capability=['a']*3), 'is one token, .a., .* at least two'),
    (dict(capability=['x\ud800']), 'capability text 0 holds half'), (dict(general=['x\ud800']), 'general text 0 holds half')])
def test_settings_of_a_selection(kw, says, tiny, texts):
    with pytest.raises(ValueError, match=says): select_neurons(*tiny, **{**dict(capability=texts, general=general_texts(10)), **kw})

# --- settings have one home

OF = {accumulate: [Tally], attribute: [Tally], select_neurons: [Selection, Scoring], stability: [Selection, Scoring],
      contrast_set: [Selection], split_half: [Selection], read_examples: [NeuronReading], fit_and_read: [Fitting],
      fit_examples: [Fitting], fit_stats: [Fitting], set_readouts: [Audit], reward_audit: [Audit], delta_nll: [Trial],
      score_card: [Trial]}

@pytest.mark.parametrize('f', OF, ids=lambda f: f.__name__)
def test_help_tells_every_setting_with_the_default_of_its_class(f):
    told = inspect.signature(f).parameters
    for cls in OF[f]:
        for own in fields(cls): assert told[own.name].default == own.default, own.name

MISTAKES = {accumulate: 'evry', attribute: 'bacth_size', select_neurons: 'per_leyer', stability: 'methd', contrast_set: 'univeral',
            split_half: 'threshhold', read_examples: 'unred', fit_and_read: 'max_fitt', fit_examples: 'max_fitt', fit_stats: 'batchsize',
            set_readouts: 'relevanse', reward_audit: 'relevanse', delta_nll: 'modus', score_card: 'alfa', activation_bank: 'max_len',
            ablate: 'sed'}
MEANT = ['every', 'batch_size', 'per_layer', 'method', 'universal', 'threshold', 'unread', 'max_fit', 'max_fit', 'batch_size',
         'relevance', 'relevance', 'mode', 'alpha', 'max_length', 'seed']

@pytest.mark.parametrize('f, wrong, right', [(*pair, right) for pair, right in zip(MISTAKES.items(), MEANT, strict=True)])
def test_a_mistyped_setting_is_answered_with_the_nearest(tiny, f, wrong, right):
    known = dict(model=tiny[0], tokenizer=tiny[1], pairs=[dict(prompt='a', chosen='b', rejected='c')])
    need = [k for k, p in inspect.signature(f).parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(ValueError, match=f"has no setting '{wrong}': did you mean '{right}'"), contextlib.ExitStack() as stack:
        made = f(**{k: known.get(k, []) for k in need}, **{wrong: 1})
        stack.enter_context(made)                              # a scope checks when it is entered

def test_each_cut_of_general_text_begins_as_every_text_does():
    "The first token that Gemma's and Llama's tokenizers add stands at the head of a cut, and nowhere in it"
    prose = [[1, *range(10*i, 10*i + 8)] for i in range(1, 5)]
    gen, cap = [Example(x, 1) for x in prose], [Example([1, 7, 7, 7, 8], 3), Example([1, 7, 7], 1), Example([1] + [7]*12, 2)]
    out = match_lengths(gen, cap, first=1)
    assert [e.ids.count(1) for e in out] == [1]*3 and all(e.ids[0] == 1 for e in out)
    assert [(len(e.ids), e.start) for e in out] == [(len(e.ids), e.start) for e in cap]
    stream = [t for x in prose for t in x[1:]]
    assert [t for e in out for t in e.ids[1:]] == stream[:4 + 2 + 12]
    bare = match_lengths(gen, [Example(e.ids[1:], 1) for e in cap], first=1)    # a chat template may leave it out
    assert [t for e in bare for t in e.ids] == stream[:4 + 2 + 12]
