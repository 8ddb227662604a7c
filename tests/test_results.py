"Committed results: the main result has its form, and every table and figure comes out of the results files byte for byte."
import json, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from conftest import ROOT

RECIPES = sorted(p.parent.name for p in (ROOT/'nbs'/'paper'/'results').glob('*/manifest.json'))

def test_both_recipes_are_there(): assert {'cpu', 'gsm8k-cpu'} <= set(RECIPES)

@pytest.mark.parametrize('recipe', RECIPES)
def test_main_result_and_manifest(recipe):
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    main, manifest = pd.read_csv(folder/'main.csv'), json.loads((folder/'manifest.json').read_text())
    assert list(main.columns) == ['arm', 'seed', 'set', 'n', 'metric', 'value', 'low', 'high']
    assert set(main.arm) == {'base', 'sft', 'dpo', 'yfpo', 'yfpo-random'} and main.value.notna().all()
    assert manifest['recipe'] == recipe and manifest['git'] and not manifest['git_dirty'] and manifest['versions']['torch']
    assert sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) < 4e6
    text = ''.join(f.read_text() for f in folder.rglob('*') if f.suffix in ('.json', '.csv', '.md', '.tex'))
    assert str(ROOT) not in text and '/tmp/' not in text

@pytest.mark.parametrize('recipe', RECIPES)
def test_main_csv_follows_from_the_answers(recipe):
    "The intervals of main.csv once more, from the per-question files"
    from yfpo.evaluate import summarise
    from yfpo.problems import read_jsonl
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    rows = [r for f in sorted((folder/'samples').glob('*.jsonl')) for r in read_jsonl(f)]
    key = ['arm', 'seed', 'set', 'metric']
    new, old = pd.DataFrame(summarise(rows)).set_index(key), pd.read_csv(folder/'main.csv').set_index(key)
    pd.testing.assert_frame_equal(new.loc[old.index, old.columns], old, rtol=1e-5, check_dtype=False)

@pytest.mark.parametrize('recipe', RECIPES)
def test_tables_and_figures_come_out_byte_for_byte(recipe, tmp_path):
    folder, copy = ROOT/'nbs'/'paper'/'results'/recipe, tmp_path/recipe
    shutil.copytree(folder, copy)
    before = {f: f.read_bytes() for d in ('tables', 'figures') for f in (copy/d).iterdir()}
    for f in before: f.unlink()
    r = subprocess.run([Path(sys.executable).parent/'yfpo', 'report', recipe, '--results', copy], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert len(before) > 10 and [f.name for f in before if not f.exists() or f.read_bytes() != before[f]] == []
