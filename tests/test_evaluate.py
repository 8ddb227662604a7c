"Statistics against hand-made tables and independent formulas; strictness about what is compared."
import math
import numpy as np
import pytest
from scipy import stats
from yfpo.evaluate import (by_question, contrasts, detectable_difference, evaluate_model, mcnemar, mean_interval, pair_accuracy,
                           paired_bootstrap, proportion, score_answers, summarise)
from yfpo.problems import make_problems

def row(arm, i, right, seed=0, **kw):
    return dict(arm=arm, seed=seed, set='t', id=str(i), answer='4', text='#### 4' if right else '#### 5', n_tokens=3, finished=True,
                nll_gold=1. + i/10 + (arm == 'b'), **kw)

def rows(arm, rights, **kw): return score_answers([row(arm, i, r, **kw) for i, r in enumerate(rights)])

def test_wilson_by_formula():
    k, n, z = 7, 40, stats.norm.ppf(.975)
    p, mid = k/n, (k/n + z*z/(2*n))/(1 + z*z/n)
    half = z/(1 + z*z/n)*math.sqrt(p*(1-p)/n + z*z/(4*n*n))
    assert proportion(k, n) == pytest.approx((p, mid - half, mid + half))

def test_mcnemar_by_counting():
    a, b = [1]*10 + [1]*9 + [0]*2 + [0]*5, [1]*10 + [0]*9 + [1]*2 + [0]*5
    tail = sum(math.comb(11, k) for k in range(3))/2**11
    assert mcnemar(a, b) == pytest.approx(2*tail) and mcnemar(a, a) == 1

def test_bootstrap_covers_and_repeats():
    x, y = np.arange(50.), np.arange(50.) - .5
    assert paired_bootstrap(x, y)[0] == pytest.approx(.5) and paired_bootstrap(x, y, seed=1) == paired_bootstrap(x, y, seed=1)
    d, low, high = paired_bootstrap(np.random.default_rng(0).normal(0, 1, 200), np.zeros(200), seed=3)
    assert low < d < high and high - low == pytest.approx(2*1.96/math.sqrt(200), rel=.2)

def test_detectable_difference_shrinks_with_n():
    a, b = detectable_difference(.1, 300), detectable_difference(.1, 1319)
    assert a > b and b == pytest.approx(.024, abs=.002)        # 10 % discordant at GSM8K's size: 2.4 points

def test_three_rules_disagree_where_they_should():
    r, = score_answers([dict(text='It is $18.00', answer='18')])
    assert (r['correct_strict'], r['correct_numeric']) == (False, True)

def test_summary_and_contrasts():
    data = rows('yfpo', [1, 1, 1, 0]) + rows('yfpo-random', [1, 0, 0, 0]) + rows('dpo', [0, 0, 0, 0])
    main = {(r['arm'], r['metric']): r for r in summarise(data)}
    assert main['yfpo', 'accuracy_numeric']['value'] == .75 and main['yfpo', 'nll_gold']['value'] == pytest.approx(1.15)
    c = {(r['contrast'], r['metric']): r for r in contrasts(data, n_boot=200)}
    first = c['yfpo - yfpo-random', 'accuracy_numeric']
    assert first['delta'] == pytest.approx(.5) and first['p'] == mcnemar([1, 1, 1, 0], [1, 0, 0, 0])
    assert first['primary'] and np.isnan(first['mde'])  # nothing is detectable on four questions
    assert not c['yfpo - dpo', 'accuracy_numeric']['primary']

def test_seeds_are_paired():
    data = [r for s in range(3) for arm, v in (('yfpo', [1, 1, 0]), ('yfpo-random', [1, 0, 0])) for r in rows(arm, v, seed=s)]
    got = [r['seed'] for r in contrasts(data, n_boot=100) if r['metric'] == 'accuracy_numeric']
    assert got == [0, 1, 2, 'all']

@pytest.mark.parametrize('bad,says', [
    (lambda: by_question([]), 'no evaluated'), (lambda: contrasts(rows('yfpo', [1, 0]) + rows('dpo', [1])), 'different questions'),
    (lambda: summarise([dict(rows('a', [1])[0], nll_gold=math.nan)]), 'nan'), (lambda: by_question(rows('a', [1])*2), 'twice'),
    (lambda: evaluate_model(None, None, []), 'no questions'), (lambda: pair_accuracy(None, None, []), 'no pairs')])
def test_bad_input(bad, says):
    with pytest.raises(ValueError, match=says): bad()

def test_a_model_end_to_end(tiny):
    got = evaluate_model(*tiny, make_problems(5, seed=2), 'base', 0, 'templates', max_new_tokens=6, progress=False)
    assert len(got) == 5 and all(math.isfinite(r['nll_gold']) and r['difficulty'] in (1, 2, 3) for r in got)
    assert {r['metric'] for r in summarise(got)} >= {'accuracy_strict', 'accuracy_flexible', 'accuracy_numeric', 'no_answer', 'truncated',
                                                     'nll_gold'}
