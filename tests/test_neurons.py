"Selection, controls, ablation and read-out against naive formulations, and what each refuses."
import copy
import pytest, torch
from yfpo.interventions import ablate, delta_nll, text_nll
from yfpo.models import tiny_model
from yfpo.attributors import response_means
from yfpo.neurons import (NeuronSet, contrast_set, layer_matched, model_signature, random_neurons, select_neurons, set_from_scores,
                          top_neurons)
from yfpo.problems import general_texts, make_problems
from yfpo.relevance import Relevance, digit_ids
from yfpo.responses import collate, encode, format_prompt, hidden_states
from yfpo.reward import (KINDS_OF_READING, NeuronReader, ReadOut, RewardStats, fit_stats, margin_auc, pair_items, read_examples, readout,
                         reward_audit, set_readouts)

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
    assert [r['readout'] for r in rows if r['kind'] == 'selected'] == list(KINDS_OF_READING) and len(rows) == 2*6 + 3
    assert all(0 <= r['low'] <= r['auc'] <= r['high'] <= 1 for r in rows)
    longer = [dict(p, chosen=[dict(role='assistant', content=p['chosen'][0]['content'] + ' Indeed so.')]) for p in pairs]
    assert {r['signal']: r['auc'] for r in reward_audit(*tiny, longer, neurons, {})}['length'] == 1.0
    assert margin_auc([1, 1, -1, 0]) == 0.625

def test_audit_sees_neurons_that_know(tiny, neurons, pairs):
    "Neurons chosen for telling these very pairs apart must pass, by the read-outs they were chosen for"
    model, tok = tiny
    right, wrong = response_means(model, encode(tok, pair_items(pairs)), tok.pad_token_id, 8).chunk(2)
    score = (right - wrong).mean(0)/(right - wrong).std(0)
    know = set_from_scores(score.abs(), score.abs() > 0, score, model, k=.02, per_layer=1.)
    rows = {r['readout']: r['auc'] for r in reward_audit(model, tok, pairs, know, {}) if r['kind'] == 'selected'}
    assert rows['standardised'] > .75 and rows['contribution'] > .75
    flipped = NeuronSet(know.layer, know.index, know.weight, -know.direction, know.meta)
    back = {r['readout']: r['auc'] for r in reward_audit(model, tok, pairs, flipped, {}) if r['kind'] == 'selected'}
    assert back['standardised'] == pytest.approx(1 - rows['standardised'], abs=.05) and back['relevance'] == rows['relevance']

def test_audit_is_blind_to_the_free_rescaling(tiny, neurons, pairs):
    "Of the six read-outs only the literal one can be moved without changing the function"
    model, tok = tiny
    hacked = copy.deepcopy(model)
    for l, i in list(zip(neurons.layer, neurons.index))[::2]:
        hacked.model.layers[l].mlp.up_proj.weight.data[i] *= 8; hacked.model.layers[l].mlp.down_proj.weight.data[:, i] /= 8
    ex = encode(tok, pair_items(pairs))
    a, b = (set_readouts(m, ex, tok.pad_token_id, [neurons], digit_ids(tok)) for m in (model, hacked))
    moved = {k for k in a if not torch.allclose(a[k], b[k], atol=1e-4, rtol=1e-3)}
    assert moved == {'raw'}
