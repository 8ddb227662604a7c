"Seeds and questions both drawn, and differences beside the margin reached: against other formulas, and by simulation."
import math, re
from itertools import combinations
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, answers_in
from matplotlib.text import Text
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from yfpo.data.files import read_jsonl, write_rows
from yfpo.lab.figures import draw_specificity
from yfpo.lab.findings import finding
from yfpo.lab.recipes import read_recipe
from yfpo.lab.stages import notebook_parameters
from yfpo.lab.results import read_results
from yfpo.lab.statistics import (CONTRASTS, FAMILY, TESTS, Design, _intervals, _mean_squares, contrasts, crossed, equivalence_power,
                                 equivalent, margin_in_training, margin_on_pairs, over_seeds, paired_bootstrap, simulate, specificity)
from yfpo.lab.tables import beside_margins, contrast_table, declared_outcome, designs, harm_margins, harm_table, power_table
from yfpo.lab.verdict import verdict
from yfpo.lab.wording import ARM_NAMES

RESULTS = ROOT/'nbs'/'paper'/'results'

def table(g, S, n, of_seeds, of_questions, rest, runs=()):
    "Differences with three sources of variance, given by their standard deviations"
    return (g.normal(0, of_seeds, (*runs, S, 1)) + g.normal(0, of_questions, (*runs, 1, n)) + g.normal(0, rest, (*runs, S, n)))

def test_the_crossed_error_by_the_analysis_of_variance():
    "Mean squares from statsmodels' table of a two-way layout"
    d = .1 + table(np.random.default_rng(0), 4, 12, .2, .3, .4)
    long = pd.DataFrame([dict(s=s, q=q, y=d[s, q]) for s in range(4) for q in range(12)])
    a = anova_lm(ols('y ~ C(s) + C(q)', long).fit())
    ms, df = a.mean_sq, a.df
    v = ms['C(s)'] + ms['C(q)'] - ms['Residual']
    got = crossed(d)
    assert (ms['C(s)'] > ms['Residual'] < ms['C(q)']) and got['se'] == pytest.approx(math.sqrt(v/48)) and got['delta'] == d.mean()
    assert got['df'] == pytest.approx(v**2/sum(ms[k]**2/df[k] for k in ms.index))
    assert got['p'] == pytest.approx(2*stats.t.sf(d.mean()/got['se'], got['df']))
    half = stats.t.ppf(.975, got['df'])*got['se']
    assert (got['low'], got['high']) == pytest.approx((d.mean() - half, d.mean() + half))

def test_the_crossed_error_by_maximum_likelihood():
    "statsmodels' mixed model with the same two effects has the same error of the mean, where there is enough of each"
    from statsmodels.regression.mixed_linear_model import MixedLM
    d = table(np.random.default_rng(1), 20, 25, .3, .4, .5)
    long = pd.DataFrame([dict(s=s, q=q, y=d[s, q]) for s in range(20) for q in range(25)])
    fit = MixedLM.from_formula('y ~ 1', long, groups=np.ones(len(long)), re_formula='0', vc_formula=dict(s='0 + C(s)', q='0 + C(q)')).fit()
    assert crossed(d)['se'] == pytest.approx(fit.bse['Intercept'], rel=.02)

def test_the_crossed_test_by_simulation():
    "The chance of a false alarm is near 5 % with five seeds, with three at most 8 %, and what it calls detectable is found"
    g = np.random.default_rng(2)
    shapes = (5, 60, (.2, .3, .3), .03, .07), (3, 100, (.007, .036, .019), .02, .085), (8, 120, (0, .1, .3), .02, .065)
    for S, n, parts, low, high in shapes:
        assert low < np.mean([crossed(d)['p'] < .05 for d in table(g, S, n, *parts, runs=(700,))]) < high
    made = table(g, 8, 60, .1, .2, .3, runs=(500,))
    true = math.sqrt(.1**2/8 + .2**2/60 + .3**2/480)
    effect = np.median([crossed(d)['mde'] for d in made])
    assert effect == pytest.approx(3*true, rel=.15) and .7 < np.mean([crossed(d + effect)['p'] < .05 for d in made]) < .9

def test_no_part_is_below_zero():
    d = np.zeros((3, 9))
    assert crossed(d)['p'] == 1 and crossed(d + .2)['p'] < 1e-9 and crossed(d, share=True)['se'] > 0 and crossed(d, share=True)['p'] == 1
    flat = np.random.default_rng(3).normal(0, 1, (4, 30))
    flat -= flat.mean(1, keepdims=True)                        # every seed has the same mean: no seed has an effect
    s, q, r = (crossed(flat)['se']**2*120, 4*flat.mean(0).var(ddof=1), 0)
    assert s == pytest.approx(max(q, ((flat - flat.mean(0))**2).sum()/(3*29)))
    assert math.isnan(crossed(np.ones((3, 1)))['p'])

NORMAL, COINS = Design(4, 30, .1, .2, .3), Design(5, 60, .2, .6, logit=.5, hardness=1.5, alike=.3)

@pytest.mark.parametrize('design', [NORMAL, COINS])
def test_many_tests_at_once_are_each_test(design):
    d = design.differences(6, .2, 1)
    got = _intervals(d, design.share, 4000, 0)
    for k, own in enumerate(d):
        for name, f in (('crossed', crossed), ('over_seeds', over_seeds)):
            r = f(own, design.share)
            assert got[name][:, k] == pytest.approx((r['low'], r['high'])), name
            assert (r['p'] < .05) == (got[name][0, k] > 0 or got[name][1, k] < 0)
        assert got['bootstrap'][:, k] == pytest.approx(paired_bootstrap(own, 0*own, 20000)[1:], abs=.05*own.std()/math.sqrt(len(own)))

def test_false_alarms_by_the_distributions_of_mean_squares():
    "No table is drawn: mean squares of normal parts are chi squares, and the mean is normal"
    for S, n, a, b, c in ((3, 100, .007, .036, .019), (5, 32, .176, .088, .117)):
        g, N = np.random.default_rng(0), 200_000
        e = np.array([n*a*a + c*c, S*b*b + c*c, c*c])[:, None]
        df = np.array([S - 1, n - 1, (S - 1)*(n - 1)])[:, None]
        s, q, r = e*g.chisquare(df, (3, N))/df
        mean = g.normal(0, math.sqrt(a*a/S + b*b/n + c*c/S/n), N)
        v = np.maximum(s, r) + np.maximum(q, r) - r
        nu = np.maximum(v*v/(np.stack([s, q, r])**2/df).sum(0), 1)
        want = dict(crossed=np.mean(2*stats.t.sf(abs(mean)/np.sqrt(v/S/n), nu) < .05),
                    over_seeds=np.mean(2*stats.t.sf(abs(mean)/np.sqrt((s + q)/S/n), S - 1) < .05))
        got = {r['test']: r for r in simulate(Design(S, n, a, b, c), 3000, 50, seed=5)}
        for k, p in want.items(): assert abs(got[k]['type_i'] - p) < 4*math.sqrt(p*(1 - p)/3000) + 1e-4, k

@pytest.mark.parametrize('design', [NORMAL, COINS])
def test_the_detectable_effect_is_found_four_times_in_five(design):
    "With fresh experiments, each test alone"
    found = {r['test']: r['detectable'] for r in simulate(design, 2000, 200)}
    unit = design.differences(4000, .2, 1).mean()/.2 if design.share else 1.
    lo, hi = 0., 4.
    for name, f in (('crossed', crossed), ('over_seeds', over_seeds)):
        if design.share:                                       # the logit that moves the share by as much
            for _ in range(30):
                mid = (lo + hi)/2
                lo, hi = (mid, hi) if design.differences(2000, mid, 2).mean() < found[name] else (lo, mid)
            d, lo, hi = design.differences(500, mid, 3), 0., 4.
        else: d = design.differences(500, found[name], 3)
        assert .72 < np.mean([f(x, design.share)['p'] < .05 for x in d]) < .88, (name, unit)

def test_a_design_has_the_variances_of_its_results():
    "Mean squares of simulated tables are those of the committed ones; for answers roughly, since coins are a model"
    for recipe, near in (('gsm8k-cpu', .05), ('which-neurons', .4)):
        answers, table = read_results(RESULTS/recipe, 'answers'), read_results(RESULTS/recipe, 'contrasts')
        for r, design in designs(answers, table)[:2]:
            a, b = r.contrast.split(' - ')
            key = dict(accuracy_numeric='correct_numeric').get(r.metric, r.metric)
            x, y = ([[q[key] for q in answers if (q['arm'], q['seed'], q['set']) == (m, s, r.set) and key in q]
                     for s in range(design.seeds)] for m in (a, b))
            seen = np.array(_mean_squares(np.array(x, float) - np.array(y, float)))
            seen[:2] = np.maximum(seen[:2], seen[2])           # a part below zero is none
            made = np.mean(_mean_squares(design.differences(1500)), axis=1)
            assert made == pytest.approx(seen, rel=near), (recipe, r.contrast)

def test_what_the_plan_said_of_the_tests():
    "At nominal 5 %, with the variances of the committed recipes: the old t errs less than once in 25, the crossed test at most 8 %"
    for recipe in ('first-look', 'which-neurons', 'gsm8k-cpu'):
        table = power_table(read_results(RESULTS/recipe, 'answers'), read_results(RESULTS/recipe, 'contrasts'), 500)
        rate = {k: table[f'type I, {v} (%)'].str.split().str[0].astype(float) for k, v in TESTS.items()}
        assert rate['over_seeds'].max() < 5.5 and .5 < rate['crossed'].min() and rate['crossed'].max() < 9.5
        assert (table['detectable, crossed'].astype(float) < table['detectable, t, S - 1'].astype(float)).all()
        assert recipe == 'which-neurons' or rate['bootstrap'].max() > 6

def test_the_declared_test_judges_and_the_other_stands_beside():
    g = np.random.default_rng(8)
    rows = [dict(arm=a, seed=s, set='t', id=str(q), nll_gold=1 + .1*(a == 'dpo') + g.normal(0, .2)) for a in ('yfpo', 'dpo')
            for s in range(4) for q in range(9)]
    old, new = (next(r for r in contrasts(rows, 200, family=['yfpo - dpo'], test=k) if r['primary']) for k in ('over_seeds', 'crossed'))
    x, y = (np.array([r['nll_gold'] for r in rows if r['arm'] == a]).reshape(4, 9) for a in ('yfpo', 'dpo'))
    d = x - y
    assert new['p'] == new['p_holm'] == old['crossed_p'] == crossed(d)['p'] and old['p'] == new['over_seeds_p'] == over_seeds(d)['p']
    assert (new['test'], old['test']) == ('crossed', 'over_seeds') and new['mde'] == crossed(d)['mde'] == old['crossed_mde']
    shown = contrast_table(pd.DataFrame([new]))
    assert 'p, t, S - 1' in shown and shown['p, t, S - 1'].item() == f"{old['p']:.3f}"
    with pytest.raises(ValueError, match="no test over seeds called 'anova': use one of over_seeds, crossed"):
        contrasts(rows, 200, test='anova')

def run(g, arms, seeds, n, slope, effect=0., own=.01):
    "Answers whose NLL follows the margin, plus an effect of the arm `yfpo` that no margin explains"
    reached = {(a, s): m + g.normal(0, .03) for s in range(seeds) for a, m in arms.items()}
    hard, drawn = g.normal(1, .3, n), {k: g.normal(0, own) for k in reached}
    rows = [dict(arm=a, seed=s, set='t', id=str(q), nll_gold=hard[q] + slope*x + drawn[a, s] + effect*(a == 'yfpo') + g.normal(0, .03))
            for (a, s), x in reached.items() for q in range(n)]
    return rows, reached

ARMS, OUTCOME = {'dpo': .5, 'yfpo': .35, 'yfpo-random': .2, 'yfpo-dynamic': .34}, ('t', 'nll_gold')

def test_the_slope_and_what_it_leaves_by_regression():
    "statsmodels' fixed-effects regression of the runs; with levels of arms, the difference is a coefficient"
    rows, reached = run(np.random.default_rng(4), ARMS, 4, 30, .3, .02)
    means = pd.DataFrame(rows).groupby(['arm', 'seed'], as_index=False).nll_gold.mean()
    means['x'] = [reached[k] for k in zip(means.arm, means.seed)]
    for own, formula in ((False, 'nll_gold ~ x + C(seed)'), (True, "nll_gold ~ x + C(seed) + C(arm, Treatment('yfpo-random'))")):
        b = ols(formula, means).fit().params
        got = specificity(rows, reached, OUTCOME, own=own)['left'][0]
        w = means.pivot(index='seed', columns='arm')
        left = ((w.nll_gold.yfpo - w.nll_gold['yfpo-random']) - b['x']*(w.x.yfpo - w.x['yfpo-random'])).mean()
        assert got['slope']['value'] == pytest.approx(b['x']) and got['left']['value'] == pytest.approx(left)
        if own: assert left == pytest.approx(b["C(arm, Treatment('yfpo-random'))[T.yfpo]"])
    flat = means.groupby('seed')[['x', 'nll_gold']].transform(lambda v: v - v.mean())
    assert specificity(rows, reached, OUTCOME)['r'] == pytest.approx(flat.x.corr(flat.nll_gold))

def test_the_interval_by_leaving_out_each_seed():
    "Where all questions agree, it is the plain jackknife over seeds, a t with S - 1 degrees of freedom"
    g = np.random.default_rng(5)
    rows, reached = run(g, ARMS, 5, 1, .3)
    rows = [dict(r, id=str(q)) for r in rows for q in range(6)]
    def left(seeds): return specificity([r for r in rows if r['seed'] in seeds], {k: x for k, x in reached.items() if k[1] in seeds},
                                        OUTCOME)['left'][0]['left']
    whole, each = left(range(5)), [left([k for k in range(5) if k != s])['value'] for s in range(5)]
    se = math.sqrt(4/5*sum((v - np.mean(each))**2 for v in each))
    half = stats.t.ppf(.975, 4)*se
    assert (whole['low'], whole['high'], whole['df']) == pytest.approx((whole['value'] - half, whole['value'] + half, 4))

@pytest.mark.parametrize('own', [False, True])
def test_what_is_left_by_simulation(own):
    "No neurons: rarely more than nothing is left, though the difference is there; an effect beside the margin is found and not biased"
    g = np.random.default_rng(6)
    none, some = ([specificity(*run(g, ARMS, 5, 12, .3, e), OUTCOME, own=own)['left'][0] for _ in range(150)] for e in (0., .1))
    assert np.mean([r['whole']['p'] < .05 for r in none]) > .5 and np.mean([r['left']['p'] < .05 for r in none]) < .12
    assert np.mean([r['left']['p'] < .05 for r in some]) > .5
    if own: assert np.mean([r['left']['value'] for r in some]) == pytest.approx(.1, abs=.01)

def test_the_first_experiment_recounted():
    "r = .91 and .0153 to -.002: gsm8k-cpu, held-out pairs, from files alone and by statsmodels"
    folder = RESULTS/'gsm8k-cpu'
    arms, y, x = ('dpo', 'yfpo', 'yfpo-random', 'yfpo-dynamic'), {}, {}
    for a in arms:
        for s in range(3):
            asked = answers_in(folder/'samples', f'{a}-seed{s}')
            y[a, s] = np.mean([r['nll_gold'] for r in asked if r['set'] == 'gsm8k' and 'nll_gold' in r])
            m = pd.read_csv(folder/'margins'/f'{a}-seed{s}.csv')
            m = m[m.split == 'dev'].groupby('phase').logp_margin.mean()
            x[a, s] = m['after'] - m['before']
    runs = pd.DataFrame([dict(arm=a, seed=s, x=x[a, s], y=y[a, s]) for a, s in x])
    inside = runs.groupby('seed')[['x', 'y']].transform(lambda v: v - v.mean())
    slope = ols('y ~ x + C(seed)', runs).fit().params['x']
    whole, dx = (np.mean([v['yfpo', s] - v['yfpo-random', s] for s in range(3)]) for v in (y, x))
    assert round(inside.x.corr(inside.y), 2) == .91 and round(whole, 4) == .0153 and round(whole - slope*dx, 3) == -.002
    got = beside_margins(*(read_results(folder, k) for k in ('answers', 'training', 'margins')), ('gsm8k', 'nll_gold'))['held-out pairs']
    assert got['r'] == pytest.approx(inside.x.corr(inside.y)) and got['left'][0]['left']['value'] == pytest.approx(whole - slope*dx)

def test_margins_by_hand():
    log = pd.read_csv(RESULTS/'gsm8k-cpu'/'training'/'yfpo-seed1.csv')
    got = margin_in_training(log.assign(arm='yfpo', seed=1).to_dict('records'))
    assert got == {('yfpo', 1): pytest.approx(log[log.step > 13]['rewards/margins'].mean())} and log.step.max() == 26
    pairs = [dict(arm='a', seed=0, split=sp, phase=p, logp_margin=v) for sp, p, v in
             (('dev', 'before', 1.), ('dev', 'after', 4.), ('train', 'before', 0.), ('train', 'after', 9.))]
    assert margin_on_pairs(pairs) == {('a', 0): 3.} and margin_on_pairs(pairs, 'train') == {('a', 0): 9.}

@pytest.mark.parametrize('bad,says', [
    (lambda rows, x: specificity(rows, {k: v for k, v in x.items() if k != ('dpo', 1)}, OUTCOME),
     "arm 'dpo' has no margin or no .* of seed 1"),
    (lambda rows, x: specificity(rows, x, ('t', 'accuracy_numeric')), 'has no margin or no'),
    (lambda rows, x: specificity(rows, {k: v for k, v in x.items() if k[1] == 0}, OUTCOME), 'there are 4 arms and 1 seeds'),
    (lambda rows, x: specificity(rows[1:], x, OUTCOME), 'answered different questions'),
    (lambda rows, x: margin_in_training([], 2), 'last is 2: give a number from 0 to 1'),
    (lambda rows, x: crossed([1., 2.]), 'give one row a seed'), (lambda rows, x: crossed([[1., 2.]]), 'at least two')])
def test_bad_input(bad, says):
    with pytest.raises(ValueError, match=says): bad(*run(np.random.default_rng(7), ARMS, 2, 3, .1))

@pytest.mark.parametrize('recipe', ['first-look', 'which-neurons', 'gsm8k-cpu'])
def test_the_figure_can_be_read_on_a_narrow_page(recipe):
    "At 390 pixels no word is below 9 pixels, out of the picture, or on another one"
    folder = RESULTS/recipe
    outcome = declared_outcome(read_results(folder, 'contrasts'))
    fig = draw_specificity(beside_margins(*(read_results(folder, k) for k in ('answers', 'training', 'margins')), outcome), outcome)
    fig.draw_without_rendering()
    words = [t for ax in fig.axes for t in [*(c for c in ax.get_children() if isinstance(c, Text)), ax.xaxis.label, ax.yaxis.label,
                                            *ticks(ax)] if t.get_text()]
    words += fig.legends[0].get_texts()
    boxes = [t.get_window_extent() for t in words]
    assert len(words) > 20 and all(t.get_fontsize()*fig.dpi/72*390/fig.bbox.width > 9 for t in words)
    assert all(b.x0 >= -1 and b.x1 <= fig.bbox.width + 1 for b in boxes)
    assert not [(a.get_text(), b.get_text()) for (a, x), (b, y) in combinations(zip(words, boxes), 2) if x.overlaps(y)]

def ticks(ax):
    "The labels that are drawn: shown, and inside the limits of their axis"
    for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
        for tick in axis.get_major_ticks():
            if tick.label1.get_visible() and low <= tick.get_loc() <= high: yield tick.label1

# The family of the new design, and equivalence where it can be tested.

def design_rows(g, shift=0.):
    "Four seeds of six arms on twenty questions; YFPO is better than each by `shift`"
    arms = ('dpo', 'dpo-diluted', 'yfpo', 'yfpo-reversed', 'yfpo-random', 'yfpo-literal')
    return [dict(arm=a, seed=s, set='t', id=str(q), nll_gold=1 - shift*(a == 'yfpo') + g.normal(0, .05)) for a in arms for s in range(4)
            for q in range(20)]

def test_the_family_is_four_contrasts_and_holm_counts_all():
    rows = contrasts(design_rows(np.random.default_rng(9), .02), 200, test='crossed')
    own = [r for r in rows if r['family']]
    assert [r['contrast'] for r in own] == [f'yfpo - {a}' for a in ('yfpo-random', 'dpo-diluted', 'yfpo-reversed', 'dpo')] == list(FAMILY)
    assert [r['primary'] for r in own] == [True, False, False, False] and all(r['seed'] == 'all' for r in own)
    p = sorted(r['p'] for r in own)
    assert min(r['p_holm'] for r in own) == pytest.approx(min(1, 4*p[0]))
    assert 'yfpo-literal - dpo' in {r['contrast'] for r in rows} and 'yfpo - yfpo-activation-matched' not in {r['contrast'] for r in rows}

def test_every_recipe_of_the_plan_compares_its_four():
    "Those that plan.md names, with what they inherit and what the stage takes by default; two of them compare nothing"
    names = set(re.findall(r'recipes/([\w-]+)\.yaml', (ROOT/'nbs'/'paper'/'plan.md').read_text()))
    assert names >= {'which-neurons', 'which-neurons-large', 'which-neurons-gemma', 'gsm8k'}
    own = notebook_parameters(ROOT/'nbs'/'paper'/'stages'/'compare.ipynb')['family'][1]
    readings = {n for n in names if 'compare' not in read_recipe(n).stages}
    assert readings == {'which-share', 'right-or-wrong'}
    for name in names - readings: assert read_recipe(name).stages['compare'].get('family', own) == list(FAMILY), name

def pairs_of(g, start, arms, seeds, n, shift):
    "Held-out pairs of a warm start: half of their names are those of every other start, and mean other texts"
    names, level = [f'q{i}' if i < n//2 else f'q{i}-{start}' for i in range(n)], g.normal(0, 1, n)
    return [dict(arm=a, seed=s, set='pairs', id=i, nll_gold=v + shift.get(a, 0.) + g.normal(0, .1)) for a in arms for s in seeds
            for i, v in zip(names, level)]

@pytest.mark.parametrize('sizes', [(20, 18, 20), (20, 20, 20)], ids=['unequal', 'equal'])
def test_pairs_of_other_warm_starts_are_other_pairs(sizes):
    "Each seed is one mean, by scipy's t test; what two models were not both given is not compared"
    g, trained = np.random.default_rng(12), ('dpo', 'yfpo', 'yfpo-random')
    rows = [dict(arm=a, seed=s, set='t', id=str(q), nll_gold=g.normal()) for q in range(10)
            for a, seeds in (('base', [0]), ('sft', range(3)), *((a, range(6)) for a in trained)) for s in seeds]
    for k, n in enumerate(sizes):
        rows += pairs_of(g, k, (*(['base'] if not k else []), 'sft'), [k], n, {}) + pairs_of(g, k, trained, [k, k + 3], n, dict(yfpo=.05))
    table = pd.DataFrame(contrasts(rows, 200, outcome=['t', 'nll_gold'], test='crossed')).query('metric == "nll_gold"')
    pairs, value = table[table.set == 'pairs'], {(r['arm'], r['seed'], r['id']): r['nll_gold'] for r in rows if r['set'] == 'pairs'}
    for arm in ('dpo', 'yfpo-random'):
        d = [np.mean([v - value[arm, s, i] for (a, s2, i), v in value.items() if (a, s2) == ('yfpo', s)]) for s in range(6)]
        row, theirs = pairs[(pairs.contrast == f'yfpo - {arm}') & (pairs.seed == 'all')].iloc[0], stats.ttest_1samp(d, 0)
        assert row.test == 'over_means' and (row.delta, row.p, row.df) == pytest.approx((np.mean(d), theirs.pvalue, 5))
        assert (row.low, row.high) == pytest.approx(tuple(theirs.confidence_interval())) and row.n == min(sizes)
    assert list(pairs[pairs.contrast == 'sft - base'].seed) == [0] and len(pairs[pairs.contrast == 'dpo - sft']) == 7
    assert set(table[(table.set == 't') & (table.seed == 'all')].test) == {'crossed'}
    shown = contrast_table(table, ['nll_gold'])
    assert set(shown[shown.set == 'held-out pairs']['p, t, S - 1']) == {''} and '' not in set(shown[shown.set == 't']['p, t, S - 1'])

def test_questions_are_matched_by_name_and_not_by_place():
    g = np.random.default_rng(13)
    rows = design_rows(g, .02)
    other = [r for s in range(4) for r in g.permutation([r for r in rows if r['seed'] == s])]
    a, b = (pd.DataFrame(contrasts(x, 200, test='crossed')).query('seed == "all"') for x in (rows, other))
    both = a.merge(b, on=['contrast', 'set', 'metric'])
    assert len(both) == len(a) > 4 and both.p_x.to_numpy() == pytest.approx(both.p_y.to_numpy())

def test_an_old_family_keeps_its_rows():
    "Without the new arms, contrasts and their order are those of the committed results"
    for recipe in ('first-look',):
        table = read_results(RESULTS/recipe, 'contrasts')
        arms = {a for c in table.contrast for a in c.split(' - ')}
        assert [f'{a} - {b}' for a, b in CONTRASTS if {a, b} <= arms] == list(dict.fromkeys(table.contrast))

def test_every_arm_has_a_name_and_a_colour_of_its_own():
    arms = [a for c in CONTRASTS for a in c]
    assert {*arms} <= {*ARM_NAMES} and len({v for v in ARM_NAMES.values()}) == len({c for _, c in ARM_NAMES.values()}) == len(ARM_NAMES)

def test_the_verdict_names_the_controls_it_has(tmp_path):
    def recipe(name, shift):
        (tmp_path/name).mkdir()
        made = contrasts(design_rows(np.random.default_rng(10), shift), 200, test='crossed')
        write_rows(tmp_path/name/'contrasts.csv', pd.DataFrame(made))
        return tmp_path/name
    won, none = verdict([recipe('won', .1)]), verdict([recipe('none', 0.)])
    assert won == [*(f"YFPO beats {x} in `won`, significantly after Holm's correction."
                     for x in ('DPO', 'YFPO on random neurons', 'a slower DPO', 'the reversed reward')),
                   'All four declared differences hold after correction for their number.']
    assert none[0] == ('YFPO is not shown to beat DPO, YFPO on random neurons, a slower DPO or the reversed reward: no declared difference '
                       'between them is significant.') and len(none) == 2

def test_the_power_of_equivalence_by_simulation():
    "The formula, where nothing differs, beside the share of experiments that pass"
    g = np.random.default_rng(11)
    for n, margin in ((10, .02), (10, .06), (30, .04), (5, .2)):
        x = g.normal(0, .1, (3000, n))
        passed = np.mean([equivalent(v.mean(), v.std(ddof=1)/math.sqrt(n), n - 1, margin) < .05 for v in x])
        said = equivalence_power(.1/math.sqrt(n), n - 1, margin)
        assert said == pytest.approx(passed, abs=.15) and (said >= .5) == (passed >= .5)
    assert equivalence_power(0, 3, .1) == 1 and equivalence_power(1, 3, .1) == 0

def test_a_row_that_cannot_pass_says_so():
    "By hand: the 90 % interval alone is wider than the margin"
    for recipe in ('first-look', 'gsm8k-cpu', 'which-neurons'):
        folder = RESULTS/recipe
        margins, df = harm_margins(read_results(folder, 'manifest')), read_results(folder, 'contrasts')
        shown = harm_table(df, margins)
        own = df[df.p_equivalent.notna() & (~df.contrast.isin(df[df.seed.astype(str) == 'all'].contrast) | (df.seed.astype(str) == 'all'))]
        assert len(own) == len(shown)
        for (_, r), text in zip(own.iterrows(), shown['p of equivalence']):
            if r.se and stats.t.ppf(.95, r.df)*r.se > margins[r.metric]: assert text == 'not testable at this n'
            if text == 'not testable at this n': assert stats.t.ppf(.95, r.df)*r.se > .25*margins[r.metric]
    told = {r: str(finding(RESULTS/r, 'harm')) for r in ('gsm8k-cpu', 'which-neurons')}
    assert 'On verb agreement, no difference is testable at this n.' in told['gsm8k-cpu']
    assert 'both testable differences' in told['which-neurons']

def test_the_mean_preference_for_verb_forms_by_hand():
    df = pd.read_csv(RESULTS/'which-neurons'/'contrasts.csv')
    df = df[(df.metric == 'choice_margin') & (df.seed == 'all') & df.contrast.isin(FAMILY)]
    assert len(df) == 4 and (df.high < 0).all()
    said = str(finding(RESULTS/'which-neurons', 'forms'))
    assert 'In all four comparisons, YFPO lowers the mean preference for right verb forms.' in said
    assert f'are {df.delta.min():.4f} to {df.delta.max():.4f} nats per token, uncorrected' in said
