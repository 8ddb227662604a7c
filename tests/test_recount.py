"Every number of main.csv and contrasts.csv once more from the per-question files, by code that shares nothing with the package."
import json, math, re
from collections import defaultdict
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from conftest import answers_in
from scipy.stats import t as student

RESULTS = Path(__file__).resolve().parent.parent/'nbs'/'paper'/'results'
RECIPES = sorted(f.parent.name for f in RESULTS.glob('*/contrasts.csv'))
Z = 1.959963984540054                                          # 97.5 % point of the normal distribution
SHARES = {'accuracy_strict': 'correct_strict', 'accuracy_flexible': 'correct_flexible', 'accuracy_numeric': 'correct_numeric',
          'pair_accuracy': 'pair_correct', 'pair_accuracy_mean': 'pair_correct_mean', 'choice_accuracy': 'choice_correct',
          'knowledge': 'knows', 'knowledge_norm': 'knows_norm'}
MEANS = {'nll_gold': 'nll_gold', 'nll_text': 'nll_text', 'choice_margin': 'choice_margin', 'knowledge_margin': 'knows_margin'}

def own_strict(text):
    "lm-evaluation-harness' strict-match for gsm8k, and its normalisation"
    m = re.search(r'#### (\-?[0-9\.\,]+)', text)
    return None if m is None else m[1].replace(',', '').rstrip('.')

def own_flexible(text):
    "Its flexible-extract: the last thing that looks like a number"
    found = re.findall(r'(-?[$0-9.,]{2,})|(-?[0-9]+)', text)
    return re.sub(r'[,$]', '', next(x for x in found[-1] if x)).rstrip('.') if found else None

def loops(text):
    words = text.split()
    return any(words[i:i+8] == words[j:j+8] for i in range(len(words) - 7) for j in range(i + 1, len(words) - 7))

@pytest.fixture(scope='module', params=RECIPES)
def data(request):
    "(values {(arm, seed, set, metric): {id: value}}, main, contrasts, rows) of one recipe"
    folder, values = RESULTS/request.param, defaultdict(dict)
    rows = answers_in(folder/'samples')
    for r in rows:
        own = {m: r[k] for m, k in SHARES.items() if k in r} | {m: r[k] for m, k in MEANS.items() if k in r}
        own |= {k: v for k, v in r.items() if re.fullmatch(r'(pass|majority)_\d+', k)}
        if 'text' in r:
            own |= dict(no_answer=r['numeric'] is None, truncated=not r['finished'], format_rate='#### ' in r['text'] and
                        own_strict(r['text']) is not None, repetition=loops(r['text']))
        for m, v in own.items():
            values[r['arm'], r['seed'], r['set'], m][r['id']] = float(v)
            if r.get('difficulty') is not None and m in ('accuracy_numeric', 'nll_gold'):
                values[r['arm'], r['seed'], f"{r['set']}-d{r['difficulty']}", m][r['id']] = float(v)
    return values, pd.read_csv(folder/'main.csv'), pd.read_csv(folder/'contrasts.csv'), rows

def is_mean(metric): return metric in MEANS or metric.startswith(('pass_', 'majority_'))

def test_the_verdicts(data):
    "Strict and flexible verdicts from the text alone"
    answers = [r for r in data[3] if 'text' in r]
    assert len(answers) > 100
    for r in answers:
        gold = r['answer'].replace(',', '')
        assert r['correct_strict'] == (own_strict(r['text']) == gold), r['id']
        assert r['correct_flexible'] == (own_flexible(r['text']) == gold), r['id']

def test_every_level(data):
    values, main = data[:2]
    assert len(main) == len(values)
    for r in main.itertuples():
        x = np.array(list(values[r.arm, r.seed, r.set, r.metric].values()))
        n, p = len(x), x.mean()
        if is_mean(r.metric): want = p, p - Z*x.std(ddof=1)/math.sqrt(n), p + Z*x.std(ddof=1)/math.sqrt(n)
        else:                                                  # Wilson
            mid, half = (p + Z*Z/2/n)/(1 + Z*Z/n), Z*math.sqrt(p*(1 - p)/n + Z*Z/4/n/n)/(1 + Z*Z/n)
            want = p, mid - half, mid + half
        assert n == r.n and (r.value, r.low, r.high) == pytest.approx(want, rel=2e-5, abs=2e-5), (r.arm, r.set, r.metric)

def one_seed(d, metric):
    "delta, p of one seed, and the interval where it has a formula"
    n, mean = len(d), d.mean()
    if is_mean(metric):
        se = d.std(ddof=1)/math.sqrt(n)
        return mean, 2*student.sf(abs(mean)/se, n - 1) if se else float(mean == 0), None
    b, c = int((d > 0).sum()), int((d < 0).sum())
    p = min(1., 2*sum(math.comb(b + c, k) for k in range(min(b, c) + 1))/2**(b + c))
    x, y = (b + 1)/(n + 2), (c + 1)/(n + 2)                    # Bonett and Price
    half = Z*math.sqrt((x + y - (x - y)**2)/(n + 2))
    return mean, p, (max(-1, x - y - half), min(1, x - y + half))

def all_seeds(d, metric): # (seeds, questions)
    "delta, p, interval over seeds and questions: the variances of both means add, S - 1 degrees of freedom"
    delta, S = d.mean(), len(d)
    if not is_mean(metric): d = np.hstack([d, np.ones((S, 1)), -np.ones((S, 1))])
    se = math.sqrt(np.var(d.mean(1), ddof=1)/S + np.var(d.mean(0), ddof=1)/d.shape[1])
    half = student.ppf(.975, S - 1)*se
    return delta, 2*student.sf(abs(d.mean())/se, S - 1) if se else float(d.mean() == 0), (d.mean() - half, d.mean() + half)

def both_drawn(d, metric):
    "delta, p, interval by the analysis of variance of a two-way layout, seeds and questions both drawn; Satterthwaite's df"
    (S, n), m = d.shape, d.mean()
    if not is_mean(metric) and not d.any():
        d = np.hstack([d, np.ones((S, 1)), -np.ones((S, 1))])
        n += 2
    row, column = d.mean(1) - m, d.mean(0) - m
    squares = n*(row**2).sum()/(S - 1), S*(column**2).sum()/(n - 1), ((d - m - row[:, None] - column)**2).sum()/(S - 1)/(n - 1)
    v = max(squares[0], squares[2]) + max(squares[1], squares[2]) - squares[2]
    if not v: return m, float(m == 0), (m, m)
    df = max(1., v*v/sum(q*q/k for q, k in zip(squares, (S - 1, n - 1, (S - 1)*(n - 1)))))
    half = student.ppf(.975, df)*math.sqrt(v/S/n)
    return m, 2*student.sf(abs(m)/math.sqrt(v/S/n), df), (m - half, m + half)

def test_two_ways_to_count_both_drawn():
    "The recount itself beside the package's, on made-up tables"
    from yfpo.lab.statistics import crossed
    g = np.random.default_rng(0)
    for d in (g.normal(0, 1, (3, 9)), g.normal(0, 1, (4, 1)) + g.normal(0, .1, (4, 6)), np.zeros((3, 5)), np.sign(g.normal(size=(5, 8)))):
        delta, p, interval = both_drawn(d, 'accuracy_numeric')
        r = crossed(d, share=True)
        assert (r['delta'], r['p'], r['low'], r['high']) == pytest.approx((delta, p, *interval))

def differences(values, r, seeds):
    "A row of differences for each seed, in the order of the first seed's items where all have the same"
    a, b = r.contrast.split(' - ')
    def at(arm, s):
        own = sorted({k[1] for k in values if k[0] == arm})
        return values[arm, s if s in own else own[s % len(own)], r.set, r.metric]         # warm starts take turns
    both = [(at(a, s), at(b, s)) for s in seeds]
    rows = [{q: x[q] - y[q] for q in x} for x, y in both if x.keys() == y.keys() or r.set != 'pairs']
    first = rows[0] if all(d.keys() == rows[0].keys() for d in rows) else None
    return [np.array([d[q] for q in first or d]) for d in rows]

def seed_means(d, metric):
    "delta, p, interval where seeds share no items: Student's t over one mean a seed"
    m = np.array([x.mean() for x in d])
    se, df = m.std(ddof=1)/math.sqrt(len(m)), len(m) - 1
    half = student.ppf(.975, df)*se
    return m.mean(), 2*student.sf(abs(m.mean())/se, df) if se else float(m.mean() == 0), (m.mean() - half, m.mean() + half)

def test_every_difference(data):
    values, _, table, _ = data
    for r in table.itertuples():
        trained = sorted({k[1] for k in values if k[0] == r.contrast.split(' - ')[0]})
        d = differences(values, r, trained if str(r.seed) == 'all' else [int(r.seed)])
        same, test = len({len(x) for x in d}) == 1, getattr(r, 'test', '')                   # the test that was declared
        count = seed_means if test == 'over_means' else both_drawn if test == 'crossed' else all_seeds
        made = one_seed(d[0], r.metric) if str(r.seed) != 'all' else count(d if count is seed_means else np.array(d), r.metric)
        delta, p, interval = made
        where = (r.contrast, r.seed, r.set, r.metric)
        assert r.n == min(map(len, d)) and r.delta == pytest.approx(delta, rel=1e-4, abs=2e-6), where
        assert r.set == 'pairs' or (same and test != 'over_means'), where
        assert r.p == pytest.approx(p, rel=5e-3, abs=2e-5), where
        if interval: assert (r.low, r.high) == pytest.approx(interval, rel=1e-3, abs=2e-5), where

def test_holm_equivalence_and_bootstrap(data):
    values, _, table, _ = data
    family = table[table.family].sort_values('p')
    worst = 0.
    for i, r in enumerate(family.itertuples()):
        worst = max(worst, min(1., (len(family) - i)*r.p))
        assert r.p_holm == pytest.approx(worst, rel=1e-4)
    for r in table[table.p_equivalent.notna()].itertuples():
        margin = .05
        if r.se: want = max(student.sf((r.delta + margin)/r.se, r.df), student.cdf((r.delta - margin)/r.se, r.df))
        else: want = float(abs(r.delta) >= margin)
        assert r.p_equivalent == pytest.approx(want, rel=2e-2, abs=2e-4)
    g, seeds = np.random.default_rng(11), sorted({k[1] for k in values if k[0] == 'yfpo'})
    for r in family.itertuples():                              # both levels drawn again, by the plain loop
        d = np.array(differences(values, r, seeds))
        S, n = d.shape
        draws = [d[g.integers(0, S, S)][:, g.integers(0, n, n)].mean() for _ in range(4000)]
        assert (r.boot_low, r.boot_high) == pytest.approx(tuple(np.quantile(draws, [.025, .975])), abs=.15*(r.boot_high - r.boot_low))

@pytest.mark.parametrize('folder', sorted(f.parent for f in RESULTS.glob('*/dose')), ids=lambda f: f.name)
def test_the_dose_table(folder):
    "From each run's own files: an equal dose, the margin that DPO's part reached beside YFPO's, and the share of clipped steps"
    notes, logs = ([(f.stem.rpartition('-seed')[0], f) for f in sorted(folder.glob(p))] for p in ('dose/*.json', 'training/*.csv'))
    terms = {f.stem: json.loads(f.read_text()) for _, f in notes}
    for k, d in terms.items():
        if d['neuron_weight']: assert d['neuron_weight']*d['neurons']/d['preference'] == pytest.approx(d['dose']), k
    reached, over, steps = defaultdict(list), defaultdict(int), defaultdict(int)
    said = (folder/'tables'/'dose.md').read_text()
    limit = float(re.search(r'gradient norm above ([\d.]+)\. Recipe', said)[1])
    for arm, f in logs:
        rows = pd.read_csv(f)
        reached[arm].append(rows['rewards/margins'][len(rows)//2:].mean())
        over[arm] += int((rows.grad_norm > limit).sum()); steps[arm] += len(rows)
    shown = pd.read_csv(folder/'tables'/'dose.csv', dtype=str).set_index('arm')
    assert len(shown) == len(reached) and 'YFPO' in shown.index
    ours = {'DPO': 'dpo', 'YFPO': 'yfpo', 'YFPO (reversed)': 'yfpo-reversed', 'YFPO (random neurons)': 'yfpo-random'}
    for label, arm in ours.items():
        if arm not in reached: continue
        part = 100*np.mean(reached[arm])/np.mean(reached['yfpo'])
        assert float(shown['DPO margin reached'][label]) == pytest.approx(np.mean(reached[arm]), abs=6e-4)
        assert shown["of YFPO's (%)"][label] == f'{part:.0f}'
        line = next(l for l in said.split('\n') if l.startswith(f'| {label} |'))
        assert (f'| **{part:.0f}** |' in line) == (not 80 <= part <= 120)
        assert shown['clipped steps (%)'][label] == f'{100*over[arm]/steps[arm]:.0f}'

def test_the_table_of_steps():
    "From the logs: the neuron term's norm over the sum of both, by quarters of the training, and how many steps were clipped"
    shown = pd.read_csv(RESULTS/'which-share'/'tables'/'steps.csv', dtype=str).set_index('arm')
    for label, arm in {'YFPO': 'yfpo', 'YFPO (reversed)': 'yfpo-reversed', 'YFPO (random neurons)': 'yfpo-random'}.items():
        rows = pd.read_csv(RESULTS/'which-share'/'training'/f'{arm}-seed0.csv').sort_values('step')
        a, b = rows['gradients/neurons'], rows['gradients/preference']
        share = 100*a/(a + b)
        assert len(rows) == 32 == int(shown.steps[label]) and (rows['gradients/cosine'].abs() < .2).all()
        assert shown["term's share, first quarter (%)"][label] == f'{share[:8].mean():.0f}'
        assert shown['last quarter (%)'][label] == f'{share[-8:].mean():.0f}' and shown['clipped steps (%)'][label] == '0'
        whole = np.sqrt(a**2 + b**2 + 2*rows['gradients/cosine']*a*b)
        assert whole.tolist() == pytest.approx(rows.grad_norm.tolist(), rel=1e-3), 'both parts make the gradient that was logged'
