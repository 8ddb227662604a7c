"Table text compared whole; the same frame gives the same bytes; a smoke run cannot pass for a result."
import pandas as pd
import pytest
from yfpo.problems import write_rows
from yfpo.figures import draw_ablation, draw_method, draw_training, save_figure
from yfpo.report import main_table, read_results, write_table

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
