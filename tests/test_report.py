"Table text compared whole; the same frame gives the same bytes; a smoke run cannot pass for a result."
import json, shutil
import pandas as pd
import pytest
from conftest import ROOT
from yfpo.data.files import write_rows
from yfpo.lab.figures import draw_ablation, draw_method, draw_neurons, draw_training, save_figure
from yfpo.lab.report import COLUMNS, SOURCES, main_table, read_results, write_table

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

CPU = ROOT/'nbs'/'paper'/'results'/'cpu'

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
    assert {*COLUMNS} == {k for k, (f, _) in SOURCES.items() if f.endswith('.csv')}
    for folder in (ROOT/'nbs'/'paper'/'results').glob('*/'):
        for name, (pattern, _) in SOURCES.items():
            if any(folder.glob(pattern)): assert len(read_results(folder, name))

@pytest.mark.parametrize('folder,recipe', [('runs/demo/results', 'demo'), ('results/demo', 'demo'), ('elsewhere', 'RECIPE')])
def test_a_missing_file_names_the_recipe(tmp_path, folder, recipe):
    with pytest.raises(FileNotFoundError, match=f'yfpo run {recipe} --until compare'): read_results(tmp_path/folder, 'main')
    (tmp_path/'elsewhere').mkdir(exist_ok=True)
    shutil.copy(CPU/'manifest.json', tmp_path/'elsewhere')
    with pytest.raises(FileNotFoundError, match='yfpo run cpu --until compare'): read_results(tmp_path/'elsewhere', 'main')

def test_neurons_of_layers_that_are_not_there():
    neurons, selection = read_results(CPU, 'neurons'), read_results(CPU, 'selection')
    neurons.loc[2, 'layer'] = 99
    with pytest.raises(ValueError, match=r'neurons.csv, row 3: neuron \d+ of layer 99, but neurons.json has 30 layers'):
        draw_neurons(neurons, selection)
