"Rows and summaries against hand-made tables and independent formulas; strictness about what is counted."
import math
import numpy as np
import pytest
from scipy import stats
from yfpo.beyond.votes import majority_at_k, pass_at_k, sample_rows
from yfpo.evaluate import (HeldOut, by_question, choice_rows, evaluate_model, gold_nll, mean_interval, outcome, pair_accuracy, proportion,
                           repeats, score_answers, summarise, text_rows)
from yfpo.data.problems import Problem
from yfpo.data.templates import make_problems
from yfpo.lm.responses import format_prompt, response_logprobs
from yfpo.reward import READOUTS, fit_stats, pair_items, reward_audit

def row(arm, i, right, seed=0, **kw):
    return dict(arm=arm, seed=seed, set='t', id=str(i), answer='4', text='#### 4' if right else '#### 5', n_tokens=3, finished=True,
                nll_gold=1. + i/10 + (arm == 'b'), **kw)

def rows(arm, rights, **kw): return score_answers([row(arm, i, r, **kw) for i, r in enumerate(rights)])

def test_wilson_by_formula():
    k, n, z = 7, 40, stats.norm.ppf(.975)
    p, mid = k/n, (k/n + z*z/(2*n))/(1 + z*z/n)
    half = z/(1 + z*z/n)*math.sqrt(p*(1-p)/n + z*z/(4*n*n))
    assert proportion(k, n) == pytest.approx((p, mid - half, mid + half))

def test_three_rules_disagree_where_they_should():
    r, = score_answers([dict(text='It is $18.00', answer='18')])
    assert (r['correct_strict'], r['correct_numeric']) == (False, True)

@pytest.mark.parametrize('bad,says', [
    (lambda: by_question([]), 'no evaluated'), 
    (lambda: summarise([dict(rows('a', [1])[0], nll_gold=math.nan)]), 'nan'), (lambda: by_question(rows('a', [1])*2), 'twice'),
    (lambda: evaluate_model(None, None, []), 'no questions'), (lambda: pair_accuracy(None, None, []), 'no pairs')])
def test_bad_input(bad, says):
    with pytest.raises(ValueError, match=says): bad()

def test_a_model_end_to_end(tiny):
    got = evaluate_model(*tiny, make_problems(5, seed=2), arm='base', set='templates', max_new_tokens=6, progress=False)
    assert len(got) == 5 and all(math.isfinite(r['nll_gold']) and r['difficulty'] in (1, 2, 3) for r in got)
    assert {r['metric'] for r in summarise(got)} >= {'accuracy_strict', 'accuracy_flexible', 'accuracy_numeric', 'no_answer', 'truncated',
                                                     'nll_gold'}

def test_scoring_fewer_solutions_leaves_the_other_numbers(tiny):
    ps = make_problems(5, seed=2)
    kw = dict(max_new_tokens=6, progress=False)
    whole, part = evaluate_model(*tiny, ps, arm='a', **kw), evaluate_model(*tiny, ps, arm='a', n_nll=2, **kw)
    assert [r.get('nll_gold') for r in part] == [pytest.approx(r['nll_gold'], abs=1e-4) for r in whole[:2]] + [None]*3
    assert [r['text'] for r in part] == [r['text'] for r in whole]
    n = {r['metric']: r['n'] for r in summarise(part) if r['set'] == ''}
    assert n['accuracy_numeric'] == 5 and n['nll_gold'] == 2

def test_probes_by_a_second_way(tiny):
    import torch
    model, tok = tiny
    texts, items = ['Rain fell on the hills.', 'A dog ran.'], [dict(prompt='The keys', completion=' are', wrong=[' is', ' were'])]
    def logp(prompt, text):
        ids = tok(prompt, add_special_tokens=False).input_ids; all_ = ids + tok(text, add_special_tokens=False).input_ids
        with torch.no_grad(): lp = model(torch.tensor([all_])).logits.log_softmax(-1)[0]
        return [lp[t-1, all_[t]].item() for t in range(max(1, len(ids)), len(all_))]
    for r, t in zip(text_rows(model, tok, texts), texts): assert r['nll_text'] == pytest.approx(-np.mean(logp('', t)), abs=1e-4)
    right, *wrong = (np.mean(logp('The keys', c)) for c in (' are', ' is', ' were'))
    got, = choice_rows(model, tok, items)
    assert got['choice_margin'] == pytest.approx(right - max(wrong), abs=1e-4) and got['choice_correct'] == (right > max(wrong))
    main = {r['metric']: r for r in summarise(text_rows(model, tok, texts) + [got])}
    assert set(main) == {'nll_text', 'choice_accuracy', 'choice_margin'}

def test_a_vote_counts_the_number_and_not_its_spelling():
    assert majority_at_k(['1000']*4, '1,000', 2) == majority_at_k(['1000', '1000.0'], '1000', 2) == 1.
    assert majority_at_k(['1000', None, 'x'], 'x', 1) == pytest.approx(1/3)

@pytest.mark.parametrize('text,says', [('', False), ('a b c d e f g h', False), ('x ' * 9, True),
                                       ('So there are 4 of them in each box. So there are 4 of them in each bag.', True)])
def test_repetition(text, says): assert repeats(text) == says

def test_pass_and_majority_by_drawing():
    "Against plain simulation: draw k of the samples, look, repeat"
    g, answers = np.random.default_rng(0), ['4', '4', '5', '6', None, '5', '5']
    for k in (1, 2, 3, 5, 7):
        hits, votes = [], []
        for _ in range(20000):
            s = [answers[i] for i in g.permutation(7)[:k]]
            hits.append('4' in s)
            said = [x for x in s if x]
            top = max(map(said.count, said), default=0)
            best = {x for x in said if said.count(x) == top}
            votes.append(('4' in best)/max(1, len(best)))
        assert pass_at_k(2, 7, k) == pytest.approx(np.mean(hits), abs=.012)
        assert majority_at_k(answers, '4', k) == pytest.approx(np.mean(votes), abs=.012)
    assert majority_at_k(answers*3, '4', 5, most=50) == majority_at_k(answers*3, '4', 5, most=50)      # drawn subsets are seeded
    assert majority_at_k([None, None], '4', 2) == 0

def test_samples_of_a_model(tiny):
    ps = make_problems(3, seed=4)
    kw = dict(n=4, ks=(1, 4), max_new_tokens=5, progress=False)
    rows_ = sample_rows(*tiny, ps, arm='a', set='t', **kw)
    assert rows_ == sample_rows(*tiny, ps, arm='a', set='t', **kw) and [r['id'] for r in rows_] == [p.id for p in ps]
    assert {r['metric'] for r in summarise(rows_)} == {'pass_1', 'pass_4', 'majority_1', 'majority_4'}
    with pytest.raises(ValueError, match='from 1 to 4'): sample_rows(*tiny, ps, **{**kw, 'ks': (8,)})
    with pytest.raises(ValueError, match='no questions'): sample_rows(*tiny, [])

@pytest.mark.parametrize('kw, says', [(dict(ks=(1, 4)), 'pass@4 cannot be read off 2 samples'), (dict(ks='x'), "the ks are one text, 'x'"),
    (dict(ks=1), 'the ks are 1: give a list'), (dict(ks=['x']), 'pass@x cannot be read'), (dict(n=1.5), 'n is 1.5')])
def test_what_cannot_be_read_off_samples_is_refused_before_they_are_made(kw, says):
    with pytest.raises(ValueError, match=says): sample_rows(None, None, make_problems(2), **{**dict(n=2, ks=(1,)), **kw})

@pytest.mark.parametrize('call, says', [(lambda: pass_at_k(1, 2, 'x'), 'pass@x'), (lambda: pass_at_k(3, 2, 1), '3 of 2 samples are right'),
                                        (lambda: majority_at_k(['1'], '1', 1.5), 'majority@1.5')])
def test_shares_of_samples(call, says):
    with pytest.raises(ValueError, match=says): call()

# --- what is measured on held-out data

def said(text): return [dict(role='assistant', content=text)]

def held_out(tok, ends=('one', 'two')):
    return [dict(prompt=[dict(role='user', content=p.question)], chosen=said(p.solution + ends[0]), rejected=said(p.solution + ends[1]*i))
            for i, p in enumerate(make_problems(5, seed=3), 1)]

def a_set(model, seed=0):
    import torch
    from yfpo.neurons import NeuronSet, model_signature
    at = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:6]
    return NeuronSet(torch.tensor([0, 0, 0, 1, 1, 1]), at, torch.full((6,), 1/6), torch.tensor([1., -1.]*3),
                     dict(model=model_signature(model)))

@pytest.mark.parametrize('name', READOUTS)
def test_an_outcome_is_read_as_its_statistics_are(name, tiny):
    model, tok = tiny
    pairs, s, ps = held_out(tok), a_set(model), make_problems(2, seed=2)
    stats, phi = fit_stats(model, tok, pairs, s, READOUTS[name])
    got = outcome(model, tok, HeldOut(pairs, ps, ['Rain fell.'], s, stats))
    assert np.allclose(got['phi'], (phi[:, 0] - phi[:, 1]).numpy()/stats.scale, atol=1e-4)
    own = response_logprobs(model, tok, pair_items(pairs), eos=False)
    assert np.allclose(got['chosen'], [x.sum().item() for x in own[:5]], atol=1e-3)
    other = dict(pairs=pairs, problems=ps, prose=['Rain fell.'], stats=stats)
    with pytest.raises(ValueError, match='fitted for another set of neurons'):
        outcome(model, tok, HeldOut(neurons=a_set(model, 1), **other))

def test_a_pair_that_is_cut_before_it_differs(tiny):
    model, tok = tiny
    pairs = [dict(prompt='q', chosen='a'*400 + x, rejected='a'*400 + y) for x, y in ('bc', 'cd')]
    short, s = dict(prompt='q', chosen='yes', rejected='no'), a_set(model)
    stats, _ = fit_stats(model, tok, pairs + [short], s)
    held = dict(problems=[Problem('a', 'Two?', '#### 2', '2', 'own')], prose=['Rain fell.'], neurons=s, stats=stats)
    for f in (lambda p, **kw: pair_accuracy(model, tok, p, **kw), lambda p, **kw: reward_audit(model, tok, p, s, {}, **kw),
              lambda p, **kw: outcome(model, tok, HeldOut(p, **held, **kw)),
              lambda p, **kw: choice_rows(model, tok, [dict(prompt='q', completion=x['chosen'], wrong=x['rejected']) for x in p], **kw)):
        with pytest.raises(ValueError, match='in 2 of 2 groups .* are equal up to max_length=300: raise it'):
            f(pairs, max_length=300)
        with pytest.warns(UserWarning, match=r'in 2 of 3 groups \(number 0 the first\)'):
            f([*pairs, short], max_length=300)
        f(pairs, max_length=700)
    assert len({r['logp_chosen'] for r in pair_accuracy(model, tok, pairs)}) == 2
    p, = make_problems(1, seed=2)
    n = len(format_prompt(tok, p.question).encode())
    assert gold_nll(model, tok, [p], max_length=2000) == gold_nll(model, tok, [p]) != gold_nll(model, tok, [p], max_length=n + 5)
