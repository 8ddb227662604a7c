"Differences against hand-made tables, independent formulas and simulated truths."
import math
import numpy as np
import pytest
from scipy import stats
from test_evaluate import row, rows
from yfpo.evaluate import summarise
from yfpo.lab.statistics import (check_declared, compare, contrasts, detectable_difference, detectable_mean, equivalent, holm, mcnemar,
                                 over_seeds, paired_bootstrap, paired_interval)

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

def test_summary_and_contrasts():
    data = rows('yfpo', [1, 1, 1, 0]) + rows('yfpo-random', [1, 0, 0, 0]) + rows('dpo', [0, 0, 0, 0])
    main = {(r['arm'], r['metric']): r for r in summarise(data)}
    assert main['yfpo', 'accuracy_numeric']['value'] == .75 and main['yfpo', 'nll_gold']['value'] == pytest.approx(1.15)
    c = {(r['contrast'], r['metric']): r for r in contrasts(data, n_boot=200, outcome=['t', 'accuracy_numeric'])}
    first = c['yfpo - yfpo-random', 'accuracy_numeric']
    assert first['delta'] == pytest.approx(.5) and first['p'] == mcnemar([1, 1, 1, 0], [1, 0, 0, 0])
    assert first['primary'] and np.isnan(first['mde'])  # nothing is detectable on four questions
    second = c['yfpo - dpo', 'accuracy_numeric']
    assert second['family'] and not second['primary'] and not c['yfpo - yfpo-random', 'nll_gold']['family']
    assert [first['p_holm'], second['p_holm']] == holm([first['p'], second['p']])

def test_seeds_are_paired():
    data = [r for s in range(3) for arm, v in (('yfpo', [1, 1, 0]), ('yfpo-random', [1, 0, 0])) for r in rows(arm, v, seed=s)]
    got = [r['seed'] for r in contrasts(data, n_boot=100) if r['metric'] == 'accuracy_numeric']
    assert got == [0, 1, 2, 'all']

def test_the_two_level_bootstrap_by_drawing(seed=3):
    "The vectorised resampling is the plain loop: seeds with replacement, questions with replacement, mean"
    d = np.random.default_rng(0).normal(.1, 1, (4, 30)) + np.random.default_rng(1).normal(0, .3, (4, 1))
    g = np.random.default_rng(seed)
    draws = [d[g.integers(0, 4, 4)][:, g.integers(0, 30, 30)].mean() for _ in range(20000)]
    got = paired_bootstrap(d, 0*d, 20000, seed)
    assert got == pytest.approx((d.mean(), *np.quantile(draws, [.025, .975])), abs=.015)

def test_over_seeds_is_a_t_test_where_questions_do_not_differ():
    means = np.array([.1, .3, .2, .25, .05])
    d = np.repeat(means[:, None], 50, 1)                       # every question alike: the seed is all there is
    got, ref = over_seeds(d), stats.ttest_1samp(means, 0)
    assert got['p'] == pytest.approx(ref.pvalue) and (got['low'], got['high']) == pytest.approx(tuple(ref.confidence_interval()))
    assert over_seeds(np.zeros((3, 9)))['p'] == 1 and over_seeds(np.full((3, 9), .2))['p'] < 1e-9

def test_the_false_alarm_rate_over_seeds():
    g = np.random.default_rng(0)
    p = [over_seeds(g.normal(0, .1, (5, 1)) + g.normal(0, .2, (1, 40)) + g.normal(0, .5, (5, 40)))['p'] for _ in range(1000)]
    assert np.mean(np.array(p) < .05) < .06

def test_holm_by_its_definition():
    g = np.random.default_rng(0)
    for _ in range(50):
        p = g.uniform(size=5)
        o = np.argsort(p)
        want = {i: min(1, max((5 - j)*p[o[j]] for j in range(r + 1))) for r, i in enumerate(o)}
        assert holm(p) == pytest.approx([want[i] for i in range(5)])
    assert holm([]) == []
    with pytest.raises(ValueError, match='no p-value'): holm([.1, math.nan])

def test_equivalence_is_the_90_percent_interval():
    g = np.random.default_rng(0)
    for _ in range(200):
        delta, se, df, m = g.normal(0, .05), g.uniform(.001, .05), g.integers(2, 60), .06
        half = stats.t.ppf(.95, df)*se
        assert (equivalent(delta, se, df, m) < .05) == (-m < delta - half and delta + half < m)
    assert equivalent(.2, .01, 5, .1) > .99 and math.isnan(equivalent(0, math.nan, 3, .1))

def test_contrasts_over_seeds_by_hand():
    g = np.random.default_rng(5)
    each = [(a, s) for a in ('yfpo', 'dpo') for s in (0, 1, 2)]
    data = [dict(arm=a, seed=s, set='prose', id=str(i), nll_text=float(g.normal(2, .1))) for a, s in each for i in range(6)]
    data += [dict(arm=a, seed=s, set='t', id=str(i), nll_gold=float(g.normal(1, .1))) for a, s in each for i in range(8)]
    got = {(r['set'], r['seed']): r for r in contrasts(data, n_boot=500, family=['yfpo - dpo'], harm=dict(nll_text=.5))}
    x = {(a, s): np.array([r['nll_gold'] for r in data if (r['arm'], r['seed'], r['set']) == (a, s, 't')]) for a, s in each}
    d = np.stack([x['yfpo', s] - x['dpo', s] for s in (0, 1, 2)])
    assert got['t', 1]['delta'] == pytest.approx(d[1].mean()) and got['t', 1]['p'] == pytest.approx(stats.ttest_1samp(d[1], 0).pvalue)
    all_, ref = got['t', 'all'], over_seeds(d)
    assert all_['delta'] == pytest.approx(ref['delta']) and all_['p'] == all_['p_holm'] == pytest.approx(ref['p'])
    assert all_['boot_low'] < all_['delta'] < all_['boot_high'] and all_['primary'] and not got['t', 0]['family']
    assert got['prose', 'all']['p_equivalent'] < .05 and math.isnan(got['prose', 'all']['p_holm'])
    assert math.isnan(got['t', 'all']['p_equivalent'])

# What the libraries have as well must agree with them; what they have not must hold what it promises in a simulation.

def pairs_of_answers(g, n, share, delta, runs):
    "Whether each of two models is right, (runs, n) each: they differ on a `share` of questions, and by `delta` on average"
    u = g.uniform(size=(runs, n))
    only_a, only_b = u < (share + delta)/2, u > 1 - (share - delta)/2
    both = g.uniform(size=(runs, n)) < .5
    return (only_a | (both & ~only_b)), (only_b | (both & ~only_a))

def test_mcnemar_and_its_detectable_difference_by_simulation():
    "Rarely below 5 % where nothing differs, and about as often as `power` says at the difference that it names"
    from scipy.stats import binomtest
    g, n, share = np.random.default_rng(0), 300, .2
    p = [mcnemar(a, b) for a, b in zip(*pairs_of_answers(g, n, share, 0, 1000))]
    assert .01 < np.mean(np.array(p) < .05) < .06
    p = [mcnemar(a, b) for a, b in zip(*pairs_of_answers(g, n, share, detectable_difference(share, n), 1000))]
    assert .72 < np.mean(np.array(p) < .05) < .85
    for b, c in ((0, 0), (3, 9), (7, 7), (1, 40)):
        other = binomtest(b, b + c).pvalue if b + c else 1
        assert mcnemar([1]*b + [0]*c, [0]*b + [1]*c) == pytest.approx(other) if b + c else mcnemar([1], [1]) == 1

@pytest.mark.parametrize('n,share,delta', [(16, .1, 0), (50, .3, .1), (300, .05, .02), (300, .4, -.2)])
def test_the_interval_of_paired_shares_by_simulation(n, share, delta):
    g = np.random.default_rng(1)
    held = []
    for a, b in zip(*pairs_of_answers(g, n, share, delta, 1500)):
        _, low, high = paired_interval(int((a & ~b).sum()), int((b & ~a).sum()), n)
        held.append(low <= delta <= high)
    assert .935 < np.mean(held) <= 1 and (n < 100 or np.mean(held) < .975)

def test_the_mean_of_differences_by_simulation_and_by_the_libraries():
    "t test, bootstrap and detectable difference of one seed: scipy's and statsmodels' numbers, and what they promise"
    from statsmodels.stats.power import NormalIndPower
    g, n = np.random.default_rng(2), 60
    d = g.normal(.02, .1, n)
    got, ref = compare(d, 0*d, 'nll_gold', 20000), stats.ttest_1samp(d, 0)
    assert got['p'] == pytest.approx(ref.pvalue) and got['se'] == pytest.approx(stats.sem(d)) and got['df'] == ref.df
    other = stats.bootstrap((d,), np.mean, n_resamples=20000, method='percentile', rng=np.random.default_rng(3)).confidence_interval
    assert (got['low'], got['high']) == pytest.approx((other.low, other.high), abs=1e-3)
    power = NormalIndPower(ddof=0).power(got['mde']/d.std(ddof=1), n, .05, ratio=0)
    assert power == pytest.approx(.8, abs=1e-4)
    runs = [compare(x, 0*x, 'nll_gold', 400) for x in g.normal(0, .1, (500, n))]
    assert .93 < np.mean([r['low'] < 0 < r['high'] for r in runs]) < .97 and .03 < np.mean([r['p'] < .05 for r in runs]) < .07
    true = (stats.norm.ppf(.975) + stats.norm.ppf(.8))*.1/math.sqrt(n)
    assert np.median([r['mde'] for r in runs]) == pytest.approx(true, rel=.02)
    assert .76 < np.mean([stats.ttest_1samp(x, 0).pvalue < .05 for x in g.normal(true, .1, (2000, n))]) < .82

def test_holm_by_simulation():
    g = np.random.default_rng(3)
    p = 2*stats.norm.sf(abs(g.normal(size=(1000, 5)) + [0, 0, 5, 5, 5]))                 # two true nulls among three clear effects
    fallen = p[p[:, :2].min(1) < .05]
    assert len(fallen) > 80 and 30 < sum(min(holm(row)[:2]) < .05 for row in fallen) < 65

def test_equivalence_by_simulation_and_by_statsmodels():
    "At the margin itself equivalence is claimed in 5 % of experiments, well inside in nearly all"
    from statsmodels.stats.weightstats import ttost_paired
    g, n, margin = np.random.default_rng(4), 40, .05
    def p(x): return equivalent(x.mean(), x.std(ddof=1)/math.sqrt(n), n - 1, margin)
    for x in g.normal(.02, .1, (20, n)): assert p(x) == pytest.approx(ttost_paired(x, 0*x, -margin, margin)[0])
    assert .035 < np.mean([p(x) < .05 for x in g.normal(margin, .1, (2000, n))]) < .065
    assert np.mean([p(x) < .05 for x in g.normal(0, .05, (500, n))]) > .95

@pytest.mark.parametrize('seed_spread,share,low,high', [(.3, False, .93, .975), (.05, False, .96, 1), (.05, True, .96, 1)])
def test_intervals_over_seeds_by_simulation(seed_spread, share, low, high):
    "Five seeds on sixty questions: as wide as they must be where the seeds differ most, and on the wide side where the questions do"
    g, held, false = np.random.default_rng(5), [], []
    for _ in range(600):
        mean = .1 + g.normal(0, seed_spread, (5, 1)) + g.normal(0, .1, (1, 60))
        d = np.sign(mean)*(g.uniform(size=(5, 60)) < abs(mean)) if share else mean + g.normal(0, .3, (5, 60))
        r = over_seeds(d, share)
        held.append(r['low'] < .1 < r['high'])
        if not share: false.append(over_seeds(d - .1)['p'] < .05)
    assert low < np.mean(held) <= high
    if not share: assert np.mean(false) == pytest.approx(1 - np.mean(held))

@pytest.mark.parametrize('bad,says', [
    (lambda: contrasts(rows('yfpo', [1, 0]) + rows('dpo', [1])), 'different questions'),
    (lambda: over_seeds(np.ones((1, 4))), 'at least two'),
    (lambda: contrasts(rows('yfpo', [1, 0]), outcome=['gsm8k', 'nll_gold']), 'declared outcome'),
    (lambda: equivalent(0, 1, 2, -1), 'above 0'),
    (lambda: mcnemar([math.nan, 1, 0], [0, 1, 1]), 'an answer is nan, but is either right or wrong: give 1 or 0'),
    (lambda: mcnemar(['no', 'yes'], ['no', 'no']), "an answer is 'no', but is either right or wrong"),
    (lambda: mcnemar([2, .3], [0, 1]), 'an answer is 2'),
    (lambda: paired_interval(9, 9, 4), 'only_a and only_b are 9 and 9 of 4 questions: give counts of different ones among them'),
    (lambda: paired_interval(-3, 5, 4), 'only_a and only_b are -3'), (lambda: paired_interval(0, 0, 0), 'n is 0: give the number'),
    (lambda: paired_interval(1, 2, 9, 95), 'level is 95: give a number between 0 and 1'),
    (lambda: holm([-.1]), 'a p-value is -0.1: give a number from 0 to 1'), (lambda: holm([1.5, .2]), 'a p-value is 1.5'),
    (lambda: over_seeds([[math.nan, 1.], [1., 2.]]), 'some differences are NaN or infinite: evaluate those arms again'),
    (lambda: over_seeds([[], []]), 'the set is empty'), (lambda: over_seeds([1., 2., 3.]), r'shape \(3,\): give one row a seed'),
    (lambda: over_seeds([[1., 2.], [3., 4.]], level=95), 'level is 95'),
    (lambda: equivalent(0, -.1, 3, .1), 'the standard error is -0.1: give a number of at least 0'),
    (lambda: equivalent(math.nan, .1, 3, .1), 'the difference is nan'), (lambda: equivalent(0, .1, 0, .1), 'df is 0'),
    (lambda: paired_bootstrap([1., 2.], [0., 1.], 0), 'n_boot is 0: give at least 1 draw'),
    (lambda: paired_bootstrap([1., 2.], [0., 1.], level=95), 'level is 95'),
    (lambda: detectable_difference(-.1, 10), 'share is -0.1: give a number from 0 to 1'),
    (lambda: detectable_difference(.1, 10, power=1), 'power is 1: give a number between 0 and 1'),
    (lambda: detectable_mean([1., 2.], level=95), 'level is 95'),
    (lambda: check_declared(['dpo'], ['dpo', 'sft']), 'not among CONTRASTS'),
    (lambda: check_declared(['yfpo - dpo'], ['dpo']), 'no contrast can be made of the arms dpo')])
def test_bad_input(bad, says):
    with pytest.raises(ValueError, match=says): bad()

def test_each_seed_is_compared_with_the_warm_start_at_which_it_began():
    "Two warm starts, four seeds: 0 and 2 began at the first, 1 and 3 at the second"
    right = {('dpo', s): s % 2 for s in range(4)} | {('sft', 0): 0, ('sft', 1): 1}
    rows = [dict(arm=a, seed=s, set='t', id=str(i), answer='1', correct_numeric=bool(v), nll_gold=float(v)) for (a, s), v in right.items()
            for i in range(3)]
    out = [r for r in contrasts(rows, outcome=('t', 'accuracy_numeric'), family=['dpo - sft']) if r['contrast'] == 'dpo - sft']
    assert {r['seed'] for r in out} == {0, 1, 2, 3, 'all'} and all(r['delta'] == 0 for r in out if r['metric'] == 'nll_gold')
