"Table text compared whole; the same frame gives the same bytes; a smoke run cannot pass for a result."
import json, re, shutil
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp
from yfpo.data.files import write_rows
from yfpo.evaluate import score_answers
from yfpo.lab.figures import (draw_ablation, draw_contrasts, draw_margins, draw_method, draw_neurons, draw_training, draw_worked_problem,
                              save_figure)
from yfpo.lab.findings import answer_text, contrast_text, finding, findings, taken_hold
from yfpo.lab.results import RESULT_COLUMNS, SOURCES, read_results
from yfpo.lab.tables import latex_table, main_table, write_table
from yfpo.lab.recipes import read_recipe
from yfpo.lab.verdict import together, verdict
from yfpo.lab.wording import delta_unit

MAIN = pd.DataFrame([dict(arm=a, seed=0, set=s, n=50, metric=m, value=v, low=v-.1, high=v+.1) for a, d in (('yfpo', .02), ('sft', 0.))
                     for s, m, v in (('gsm8k', 'accuracy_numeric', .2 + d), ('gsm8k', 'nll_gold', 1.2 - d),
                                     ('pairs', 'pair_accuracy', .7 + d))])

def test_main_table_whole(tmp_path):
    md = write_table(main_table(MAIN), tmp_path/'main', 'Arms.', 'demo')
    assert md == '\n'.join(['**Table.** Arms. Recipe: demo.', '',
                            '| arm | seeds | GSM8K accuracy (%) | GSM8K NLL (nats/token) | held-out pairs (%) |',
                            '| :-- | --: | --: | --: | --: |',
        '| SFT | 1 | 20.0 [10.0, 30.0] | 1.200 [1.100, 1.300] | 70.0 [60.0, 80.0] |',
        '| YFPO | 1 | 22.0 [12.0, 32.0] | 1.180 [1.080, 1.280] | 72.0 [62.0, 82.0] |', ''])
    tex = (tmp_path/'main.tex').read_text()
    assert r'\toprule' in tex and r'accuracy (\%)' in tex and 'Recipe: demo.' in tex

def test_latex_is_text():
    made = latex_table(pd.DataFrame({'a_b': ['\\input{x}', '**50 %**'], 'c': ['~^', '$&#']}), 'C{}', 'tab:x')
    for t in (r'a\_b', r'\textbackslash{}input\{x\}', r'\textbf{50 \%}', r'\textasciitilde{}\textasciicircum{}', r'\$\&\#',
              r'\caption{C\{\}}', r'\begin{tabular}{ll}', r'\midrule'): assert t in made

def test_bytes_repeat(tmp_path):
    for d in 'ab': write_table(main_table(MAIN), tmp_path/d/'t', 'x', 'demo'); save_figure(draw_method(), tmp_path/d/'f', 'demo')
    for f in (tmp_path/'a').iterdir(): assert f.read_bytes() == (tmp_path/'b'/f.name).read_bytes(), f.name

def test_smoke_is_unmistakable(tmp_path):
    assert 'NOT A RESULT' in write_table(main_table(MAIN), tmp_path/'t', 'x', 'smoke')
    assert save_figure(draw_method(), tmp_path/'s', 'smoke').read_bytes() != save_figure(draw_method(), tmp_path/'d', 'demo').read_bytes()

def test_missing_and_broken_results(tmp_path):
    with pytest.raises(FileNotFoundError, match='--until compare'): read_results(tmp_path, 'main')
    with pytest.raises(ValueError, match='no kind of result'): read_results(tmp_path, 'mian')
    (tmp_path/'main.csv').write_text('')
    with pytest.raises(ValueError, match='empty'): read_results(tmp_path, 'main')
    with pytest.raises(ValueError, match='no rows'): write_table(MAIN[:0], tmp_path/'t', 'x', 'demo')
    with pytest.raises(ValueError, match='hold none of'): draw_training(pd.DataFrame(dict(arm=['dpo'], seed=[0], step=[1])))

def test_rows_round_trip(tmp_path):
    write_rows(tmp_path/'main.csv', MAIN)
    assert read_results(tmp_path, 'main').round(6).equals(MAIN.round(6))

def test_ablation_has_a_panel_each():
    df = pd.DataFrame([dict(set=s, draw=d, mode=m, fraction=f, k=9, text=t, delta_nll=f*9, low=f, high=f*20, n=8)
                       for s in ('selected', 'random') for d in (0, 1)
                       for m in ('zero', 'mean') for f in (.01, .1) for t in ('math', 'general')])
    assert len(draw_ablation(df).axes) == 4
    titles = [ax.get_title(loc='left') for ax in draw_ablation(pd.concat([df, df[df.text == 'math'].assign(text='chat')])).axes]
    assert titles == [f'{t}, {m} ablation' for m in ('zero', 'mean') for t in ('solutions', 'prose', 'chat answers')]

CPU = ROOT/'nbs'/'paper'/'results'/'first-look'

def edited(name, folder, change, raw=False):
    "A copy of one committed file, its text changed"
    f = folder/name
    f.parent.mkdir(parents=True, exist_ok=True)
    f.write_bytes(change((CPU/name).read_bytes())) if raw else f.write_text(change((CPU/name).read_text()))
    return folder

def lines(change): return lambda text: ''.join(change(text.splitlines(keepends=True)))
def first_cell(text): return ''.join(l.partition(',')[2] for l in text.splitlines(keepends=True))

@pytest.mark.parametrize('file,change,says', [
    ('main.csv', lines(lambda l: l + l[5:6]), r'row \d+ stands there twice'),
    ('main.csv', lines(lambda l: [l[0], ',,,,,,,\n', *l[2:]]), "row 1: arm is '', but must be text"),
    ('main.csv', lines(lambda l: [l[0], 'dpo,0,templates,16,nll_gold,,,\n', *l[2:]]), "row 1: value is '', but must be a number: run its"),
    ('main.csv', lambda t: t[:-3], 'was cut inside its last line: delete it and run its stage again'),
    ('main.csv', first_cell, 'main.csv lacks the column arm: delete it and run its stage again'),
    ('main.csv', lambda t: t.replace(',16,', ',many,', 1), "row 1: n is 'many', but must be a number"),
    ('main.csv', lines(lambda l: [*l[:3], l[3][:-1] + ',9\n', *l[4:]]), 'row 3 has 9 cells, the first line 8'),
    ('main.csv', lines(lambda l: l[:1]), 'has a header and no rows'), ('main.csv', lambda t: t.replace('dpo', '"dpo', 1), 'no CSV file'),
    ('contrasts.csv', lambda t: t.replace(',True,', ',maybe,', 1), "family is 'maybe', but must be True or False"),
    ('contrasts.csv', lines(lambda l: l + l[-1:]), 'stands there twice'),
    ('contrasts.csv', lambda t: t.replace('p_holm', 'p_helm').replace(',set,', ',sat,'), 'lacks the column set'),
    ('sft.csv', lambda t: t.replace('loss', 'lass'), 'lacks the column loss'), ('audit.csv', first_cell, 'lacks the column readout'),
    ('neurons.json', lambda t: t[:40], 'neurons.json: not valid JSON'), ('neurons.json', lambda t: '[]', 'neurons.json lacks n_layers'),
    ('neurons.json', lambda t: t.replace('n_layers', 'layers'), 'lacks n_layers: an older version wrote it, or it was edited; make it'),
    ('neurons.json', lambda t: t.replace('"k": ', '"k": "x", "_": '), "k is 'x', but must be of type int"),
    ('worked_problems.json', lambda t: t[:40], 'worked_problems.json: not valid JSON'),
    ('worked_problems.json', lambda t: '[]', 'holds no problems: delete it and run the stage `cards` again'),
    ('worked_problems.json', lambda t: t.replace('"tokens"', '"token"', 1), 'worked_problems.json, problem 1 lacks tokens'),
    ('worked_problems.json', lambda t: t.replace('"tokens": [', '"tokens": ["x", ', 1), 'problem 1: tokens and relevances differ'),
    ('manifest.json', lambda t: t.replace('total_seconds', 'seconds'), 'manifest.json lacks total_seconds'),
    ('manifest.json', lambda t: json.dumps({**json.loads(t), 'about': None}), 'about is None, but must be of type str'),
    ('manifest.json', lambda t: t.replace('"cores"', '"core"'), 'manifest.json, hardware lacks cores')])
def test_a_file_that_was_cut_or_edited(tmp_path, file, change, says):
    name = next(k for k, (f, _) in SOURCES.items() if f == file)
    with pytest.raises(ValueError, match=says if file in says else f'{file}.*{says}'):
        read_results(edited(file, tmp_path, change), name)

@pytest.mark.parametrize('file,name', [('main.csv', 'main'), ('neurons.json', 'selection'), ('eval/dpo-seed0.csv', 'evaluation')])
def test_bytes_that_are_no_text(tmp_path, file, name):
    with pytest.raises(ValueError, match=r'is not UTF-8 text \(byte 0\); save it as UTF-8'):
        read_results(edited(file, tmp_path, lambda b: b'\xff\xfe\0' + b, raw=True), name)

def test_every_committed_file_has_its_columns():
    assert {*RESULT_COLUMNS} == {k for k, (f, _) in SOURCES.items() if f.endswith('.csv')}
    for folder in (ROOT/'nbs'/'paper'/'results').glob('*/'):
        for name, (pattern, _) in SOURCES.items():
            if any(folder.glob(pattern)): assert len(read_results(folder, name))

def test_all_that_is_drawn_reads_kinds_of_results_that_there_are(tmp_path):
    from yfpo.lab.figures import FIGURE_OF
    from yfpo.lab.report import TABLE_OF, drawer
    assert [(n, k) for known in (FIGURE_OF, TABLE_OF) for n, (_, *kinds) in known.items() for k in kinds if k not in SOURCES] == []
    with pytest.raises(ValueError, match="one reads 'nosuch', which `SOURCES` in lab/11_results does not have"):
        drawer(dict(one=(len, 'main', 'nosuch')), None, tmp_path, 'demo')('one')

@pytest.mark.parametrize('folder,recipe', [('runs/demo/results', 'demo'), ('results/demo', 'demo'), ('elsewhere', 'RECIPE')])
def test_a_missing_file_names_the_recipe(tmp_path, folder, recipe):
    with pytest.raises(FileNotFoundError, match=f'yfpo run {recipe} --until compare'): read_results(tmp_path/folder, 'main')
    (tmp_path/'elsewhere').mkdir(exist_ok=True)
    shutil.copy(CPU/'manifest.json', tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match='yfpo run first-look --until compare'): read_results(tmp_path/'elsewhere', 'main')

def test_neurons_of_layers_that_are_not_there():
    neurons, selection = read_results(CPU, 'neurons'), read_results(CPU, 'selection')
    neurons.loc[2, 'layer'] = 99
    with pytest.raises(ValueError, match=r'neurons.csv, row 3: neuron \d+ of layer 99, but neurons.json has 30 layers'):
        draw_neurons(neurons, selection)

RESULTS = ROOT/'nbs'/'paper'/'results'
FOLDERS = sorted(f.parent for f in RESULTS.glob('*/manifest.json'))
SPELT = 'two three four five six seven eight nine ten eleven twelve'
DIGITS = r'(?<![\w`@-])[+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?(?![\w-])'

def sentences(text): return re.split(r'(?<=[.!?])\s+(?=[A-Z`])', re.sub(r'\*\*.*?\*\*\s*', '', text).strip())
def numbers(sentence):
    "Those in digits and those in words; names such as GSM8K or `gsm8k-cpu` are none"
    return re.findall(DIGITS, sentence) + re.findall(rf"\b(?:{SPELT.replace(' ', '|')})\b", sentence, re.I)

def test_the_counter_counts():
    assert sentences('**Dose.** It is 1.50 [1.4, 1.6]. Of `gsm8k-cpu`, three do. No 2e-06.') == [
        'It is 1.50 [1.4, 1.6].', 'Of `gsm8k-cpu`, three do.', 'No 2e-06.']
    assert [numbers(x) for x in ('It is -1.50 [1.4, 1.6].', 'Of `gsm8k-cpu` and GSM8K, three do.', '1,319 of 2e-06', 'one of pass@1')] == [
        ['-1.50', '1.4', '1.6'], ['three'], ['1,319', '2e-06'], []]

@pytest.mark.parametrize('text', [str(x) for f in FOLDERS for x in findings(f)] + [str(x) for x in together(FOLDERS)]
                         + [' '.join(verdict(FOLDERS))], ids=lambda t: t[2:t.find('.')][:30])
def test_a_finding_is_short(text):
    for s in sentences(text): assert len(s.split()) <= 40 and len(numbers(s)) <= 2, s
    assert len(text.split()) <= 75 and len(sentences(text)) <= 6

def shown(x): return ' '.join(x.table.astype(str).to_numpy().ravel())

@pytest.mark.parametrize('folder', FOLDERS, ids=lambda f: f.name)
def test_every_measured_number_of_a_sentence_stands_in_its_table(folder):
    "With its interval, which sentences do not carry; counts and settings are whole numbers and stand where they may"
    for x in findings(folder) + together([folder]):
        beside = {n.lstrip('+') for n in re.findall(DIGITS, shown(x).replace('*', ''))}
        said = {n.lstrip('+') for s in sentences(str(x)) for n in re.findall(DIGITS, s) if '.' in n}
        assert said <= beside, (x.title, said - beside)

def test_statements_agree_with_the_files():
    "What the sentences say, once more from the files, by hand"
    f = RESULTS/'gsm8k-cpu'
    audit, ablation, k = pd.read_csv(f/'audit.csv'), pd.read_csv(f/'ablation.csv'), json.loads((f/'neurons.json').read_text())['k']
    s = audit[(audit.kind == 'selected') & (audit.readout == 'standardised')].iloc[0]
    assert s.low < .5 < s.high
    assert f'in {100*s.auc:.0f} % of {s.n} held-out pairs. That is not clearly different from chance.' in str(finding(f, 'audit'))
    own = ablation[(ablation['mode'] == 'mean') & (ablation.k == k) & (ablation.text == 'math')]
    assert f"solutions by {own[own.set == 'selected'].delta_nll.item():.2f} nats" in str(finding(f, 'causal'))
    assert f"at most {own[own.set == 'layer-matched'].delta_nll.max():.2f} on solutions" in str(finding(f, 'causal'))
    for folder in FOLDERS:
        if not (folder/'contrasts.csv').exists(): continue
        table, said = pd.read_csv(folder/'contrasts.csv'), str(finding(folder, 'contrasts'))
        p = table[table.primary].iloc[0]
        ours = (p.delta < 0) == (p.metric == 'nll_gold')
        better = re.escape('YFPO' if ours else 'YFPO (random neurons)')
        shown = float(re.search(r', is ([+-][\d.]+) (?:points|nats per token)', said)[1])
        assert bool(re.search(rf'favours {better}[.,]', said)) == bool(shown), 'a shown 0 favours none'
        assert p.contrast == 'yfpo - yfpo-random'
        assert (table[table.family].p_holm >= .05).all() == ('No declared difference is significant' in said)
        assert ('Lower NLL is better.' in said) == (p.metric == 'nll_gold')

def row(contrast, delta, p, metric='nll_gold', **kw):
    return dict(dict(contrast=contrast, seed='all', set='gsm8k', metric=metric, n=100, delta=delta, low=delta - .01, high=delta + .01,
                     se=.005, df=4, p=p, mde=.02, family=True, primary=contrast == 'yfpo - yfpo-random', p_holm=p), **kw)

def recipe(folder, *rows):
    folder.mkdir()
    write_rows(folder/'contrasts.csv', pd.DataFrame([*rows]))
    return folder

EQUAL = 'That does not show them equal: where a test is least sensitive, true differences below '

def test_a_clear_win(tmp_path):
    one = recipe(tmp_path/'one', row('yfpo - dpo', -.1, .01), row('yfpo - yfpo-random', -.2, .001))
    two = recipe(tmp_path/'two', row('yfpo - dpo', .1, .01, 'accuracy_numeric'), row('yfpo - yfpo-random', .2, .001, 'accuracy_numeric'))
    assert verdict([one, two]) == ["YFPO beats DPO in `one` and `two`, significantly after Holm's correction.",
                                   "YFPO beats YFPO on random neurons in `one` and `two`, significantly after Holm's correction.",
                                   'All four declared differences hold after correction for their number.']

def test_a_clear_loss(tmp_path):
    one = recipe(tmp_path/'one', row('yfpo - dpo', .1, .01), row('yfpo - yfpo-random', -.2, .9, mde=.5))
    assert verdict([one]) == ["YFPO loses to DPO in `one`, significantly after Holm's correction.",
                              'YFPO is not shown to beat YFPO on random neurons: no declared difference between them is significant.',
                              'The other differences are not shown to be zero: where a test is least sensitive, true differences below '
                              '0.50 nats per token would often be missed.']

def test_a_null(tmp_path):
    one = recipe(tmp_path/'one', row('yfpo - dpo', -.1, .4, mde=.3), row('yfpo - yfpo-random', .2, .4))
    two = recipe(tmp_path/'two', row('yfpo - dpo', .1, .1, 'accuracy_numeric', mde=.084),
                 row('yfpo - yfpo-random', -.2, .6, 'accuracy_numeric'))
    assert verdict([one, two]) == ['YFPO is not shown to beat DPO or YFPO on random neurons: no declared difference between them is '
                                   'significant.',
                                   f'{EQUAL}0.30 nats per token or 8.4 points of accuracy would often be missed.']
    mixed = [recipe(tmp_path/f'r{i}', row('yfpo - dpo', -.1, p)) for i, p in enumerate((.01, .6))]
    assert verdict(mixed)[:2] == ["YFPO beats DPO in `r0`, significantly after Holm's correction.",
                                  'Whether YFPO beats YFPO on random neurons was not asked.']

def test_no_results_and_recipes_that_judge_nothing(tmp_path):
    none = ['No recipe that declares its comparisons has results yet.']
    tuned = recipe(tmp_path/'first-look', row('yfpo - dpo', -.1, .01))
    free = recipe(tmp_path/'free', row('yfpo - dpo', -.1, .01, family=False, p_holm=float('nan')))
    assert verdict([]) == verdict([tuned]) == verdict([free]) == verdict([tmp_path/'nosuch']) == none

def test_the_committed_verdict():
    "From the declared differences of every recipe that may judge, counted by hand"
    tables = {f.name: pd.read_csv(f/'contrasts.csv') for f in FOLDERS if (f/'contrasts.csv').exists() and read_recipe(f.name).in_verdict}
    assert 'first-look' not in tables
    assert {*tables} == {'which-neurons', 'which-neurons-hold', 'which-neurons-gemma', 'gsm8k'}
    own = pd.concat([t[t.family] for t in tables.values()])
    sure = own[own.p_holm < .05]
    assert len(own) == 16 and sure.contrast.tolist() == ['yfpo - dpo'] and (sure.delta > 0).all() and own.primary.sum() == 4
    assert (tables['gsm8k'].p_holm < .05).sum() == 1
    lost, null, unseen = verdict(FOLDERS)
    assert lost == "YFPO loses to DPO in `gsm8k`, significantly after Holm's correction."
    assert 'not shown to beat YFPO on random neurons, a slower DPO or the reversed reward' in null
    said = ' '.join([*verdict(FOLDERS), *map(str, together(FOLDERS))])
    assert not re.search('favour|estimates?', said)            # recipes have unlike outcomes: their signs are not counted
    power = pd.concat([pd.read_csv(CPU.parent/r/'tables'/'power.csv') for r in ('which-neurons', 'which-neurons-hold')])
    points = own[own.metric == 'accuracy_numeric']
    assert {*own.metric} == {'accuracy_numeric', 'nll_gold'} and power['detectable, crossed'].max() > 100*points.mde.max(), 'simulated'
    assert f"or {power['detectable, crossed'].max():.1f} points of accuracy" in unseen

def test_every_panel_of_contrasts_says_which_side_is_better():
    axes = [ax for ax in draw_contrasts(read_results(CPU.parent/'gsm8k-cpu', 'contrasts')).axes if ax.get_visible()]
    said = {ax.get_title(loc='left'): ax.get_xlabel() for ax in axes}
    assert len(said) == len(axes) == 5
    for title, label in said.items():
        assert label == ('nats/token. Lower is better' if title.endswith('NLL') else 'points. Higher is better'), title

def test_one_contrast_is_one_row():
    df = read_results(CPU, 'contrasts')
    panels = [[ax for ax in draw_contrasts(df, only=only).axes if ax.get_visible()] for only in ([], ['yfpo - dpo'])]
    assert [len(p[0].get_yticklabels()) for p in panels] == [df.contrast.nunique() - df.contrast.str.contains('base').any(), 1]
    assert len(panels[0]) == len(panels[1]) > 1 and panels[1][0].get_yticklabels()[0].get_text() == 'YFPO minus DPO'
    with pytest.raises(ValueError, match='no rows of yfpo - grpo'): draw_contrasts(df, only=['yfpo - grpo'])

@pytest.mark.parametrize('folder', [f for f in FOLDERS if (f/'contrasts.csv').exists()], ids=lambda f: f.name)
def test_a_declared_contrast_is_told_in_sixty_words(folder):
    "Its numbers are those of its row, and what it says of them follows from the corrected p"
    df = read_results(folder, 'contrasts')
    own = df[df.family]
    for r in own[(own.seed.astype(str) == 'all') | ~own.contrast.isin(own[own.seed.astype(str) == 'all'].contrast)].itertuples():
        text, (scale, digits) = contrast_text(df, r.contrast), delta_unit(r.metric)
        told = [f'{round(scale*v, digits) + 0.:.{digits}f}' for v in (r.delta, r.low, r.high)]
        assert len(text.split()) <= 60 and all(x.replace('-0.0 ', '0.0 ') in text for x in told), text
        assert (' better than ' in text or ' worse than ' in text) == (r.p_holm < .05) and f'{r.n} ' in text
    assert contrast_text(df, 'sft - base') == ''

@pytest.mark.parametrize('recipe', ['first-look', 'which-neurons', 'gsm8k-cpu'])
def test_no_line_crosses_the_words_of_margins(recipe):
    "With the sign turned, zero lies on the right, where the words are"
    margins = read_results(CPU.parent/recipe, 'margins')
    fig = draw_margins(margins.assign(logp_margin=-margins.logp_margin))
    fig.draw_without_rendering()
    for ax in fig.axes:
        words = [t.get_window_extent() for t in ax.texts]
        zero = [l.get_window_extent() for l in ax.lines if list(l.get_xdata()) == [0, 0]]
        assert len(words) == 2 and len(zero) == 1 and not [w for w in words if w.overlaps(zero[0])]

@pytest.mark.parametrize('recipe', ['first-look', 'gsm8k-cpu'])
def test_a_worked_problem_can_be_read_on_a_narrow_page(recipe):
    "At 390 pixels no token is turned, smaller than 9 pixels, out of the picture, or on another; the title is read there too"
    for worked in read_results(CPU.parent/recipe, 'worked_problems'):
        fig = draw_worked_problem(worked)
        fig.draw_without_rendering()
        ax, scale = fig.axes[0], 390/fig.bbox.width
        tokens = [t for t in ax.texts if t.get_family() == ['DejaVu Sans Mono']]
        boxes = [t.get_window_extent() for t in tokens]
        assert len(tokens) == len(worked['tokens']) and all(t.get_rotation() == 0 for t in tokens)
        assert all(t.get_fontsize()*fig.dpi/72*scale > 9 for t in [*tokens, ax.title])
        assert all(0 <= b.x0 and b.x1 <= fig.bbox.width for b in [*boxes, ax.title.get_window_extent()])
        assert not [(a, b) for a, b in zip(boxes, boxes[1:]) if a.overlaps(b)]

def margins_of(gain, arms=('dpo', 'yfpo'), starts=2):
    "Margins of held-out pairs, which belong to warm starts; YFPO moves that of its neurons by `gain` spreads"
    g = np.random.default_rng(3)
    return pd.DataFrame([dict(arm=a, seed=s, pair=f'{s % starts}-{i}', split='dev', phase=p, logp_margin=1.,
                              neuron_margin=g.normal(0, .01) + gain*(a == 'yfpo' and p == 'after'))
                         for a in arms for s in range(4) for i in range(9 + s % starts) for p in ('before', 'after')])

@pytest.mark.parametrize('starts', [1, 2])
def test_how_far_the_reward_took_hold(starts):
    "By hand: the mean over seeds of (after - before), YFPO minus DPO; scipy's t where warm starts have pairs of their own"
    m = margins_of(.3, starts=starts)
    def moved(a, s): return m[(m.arm == a) & (m.seed == s)].groupby('pair').apply(
        lambda t: t[t.phase == 'after'].neuron_margin.iloc[0] - t[t.phase == 'before'].neuron_margin.iloc[0], include_groups=False)
    seeds = [(moved('yfpo', s) - moved('dpo', s)).mean() for s in range(4)]
    mean, low, high = taken_hold(m)
    assert mean == pytest.approx(np.mean(seeds)) and low < .3 < high
    if starts == 2: assert (low, high) == pytest.approx(tuple(ttest_1samp(seeds, 0).confidence_interval()))
    assert taken_hold(m[m.arm == 'yfpo']) is None

@pytest.mark.parametrize('kw,gain,said', [
    (dict(p_holm=.01), 0., 'The choice of neurons matters here: YFPO minus YFPO (random neurons) is +1.0 points.'),
    (dict(), .3, 'A choice of neurons that matters by more than 5 points is excluded here, where DPO minus SFT is +8.0 points. '
                 'YFPO and YFPO (random neurons) differ on 25 % of the questions.'),
    (dict(), .05, 'The reward hardly moved the neurons that it rewards, so this run cannot say whether the choice of neurons matters. '
                  'YFPO minus YFPO (random neurons) is +1.0 [0.0, 2.0] points, and on 25 % of the questions only one of the two is right.'),
    (dict(high=.051), .3, 'There is no answer at this size.'), (dict(low=-.051), .3, 'There is no answer at this size.'),
    (dict(metric='nll_gold'), .3, 'There is no answer at this size.')])
def test_the_answer_by_the_rules_of_the_plan(kw, gain, said):
    metric = kw.get('metric', 'accuracy_numeric')
    rows = pd.DataFrame([row('yfpo - yfpo-random', .01, .6, metric, **{k: v for k, v in kw.items() if k != 'metric'}),
                         row('dpo - sft', .08, .01, metric, family=False)])
    answers = [dict(arm=a, seed=s, set='gsm8k', id=str(i), answer='4', text='#### 4' if a == 'yfpo' or i else '#### 5')
               for a in ('yfpo', 'yfpo-random') for s in range(2) for i in range(4)]
    text = answer_text(score_answers(answers), rows, margins_of(gain))
    assert text == said

@pytest.mark.parametrize('folder', [f for f in FOLDERS if (f/'contrasts.csv').exists()], ids=lambda f: f.name)
def test_what_a_training_gives_and_takes(folder):
    "A row a training, from the warm start first; every cell is that of contrasts.csv, bold where its interval leaves zero out"
    from yfpo.lab.tables import METRIC_LABELS, balance_table, counting, whole_sets
    df, table = whole_sets(counting(pd.read_csv(folder/'contrasts.csv'))), balance_table(pd.read_csv(folder/'contrasts.csv'))
    asked = df[df.metric.isin([*METRIC_LABELS]) & df.contrast.str.endswith((' - sft', ' - dpo'))]
    assert len(table) == asked.contrast.nunique() and table.contrast.iloc[0].endswith('minus SFT')
    cells = [c for _, row in table.drop(columns='contrast').iterrows() for c in row if c]
    assert len(cells) == len(asked) and sum('**' in c for c in cells) == ((asked.low > 0) | (asked.high < 0)).sum()
    told = sorted(float(re.match(r'\**([+-][\d.]+)', c)[1]) for c in cells)
    scale = [1 if m.startswith('nll') else 100 for m in asked.metric]
    assert told == pytest.approx(sorted(k*d for k, d in zip(scale, asked.delta)), abs=.06)
