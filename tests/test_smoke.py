"The whole chain on the tiny model, through the command line and papermill."
import json, os, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from conftest import ROOT
from yfpo.lab.publish import run_here
from yfpo.lab.recipes import read_recipe

YFPO = str(Path(sys.executable).parent/'yfpo')

def yfpo(*args): return subprocess.run([YFPO, *map(str, args)], capture_output=True, text=True)

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    "A finished run of the smoke recipe"
    run = tmp_path_factory.mktemp('smoke')
    r = yfpo('run', 'smoke', '--run-dir', run)
    assert r.returncode == 0, r.stderr
    return run, r.stdout

def test_tables_figures_manifest(smoke):
    run, out = smoke
    assert 'SMOKE RUN, NOT A RESULT' in out and 'figures' in out and '[1/46] problems' in out
    main = pd.read_csv(run/'results'/'main.csv')
    assert list(main.columns) == ['arm', 'seed', 'set', 'n', 'metric', 'value', 'low', 'high']
    assert set(main.arm) == {'base', 'sft', *read_recipe('smoke').arms}
    assert {'accuracy_numeric', 'nll_gold', 'pair_accuracy', 'truncated', 'no_answer'} <= set(main.metric)
    main = main.dropna(subset=["low", "high"])                  # one question has no interval
    assert len(main) and (main.low <= main.value + 1e-9).all() and (main.value <= main.high + 1e-9).all()
    m = json.loads((run/'results'/'manifest.json').read_text())
    assert m['recipe'] == 'smoke' and len(m['stages']) == 46 and m['versions']['torch']
    assert all(s['peak_memory_mb'] > 0 for s in m['stages'].values())
    assert str(run) not in json.dumps(m)
    for t in m['tests'].values():                              # pairs compares questions with them and refuses overlaps
        assert {*t['opened_by'][:2]} == {'pairs', 'pairs-warm1'} and t['opened_by'][-1] == 'browse'
        assert all(l.startswith('evaluate-') for l in t['opened_by'][2:-1]), t
    for d, suffixes in (('tables', ('md', 'tex', 'csv')), ('figures', ('png', 'pdf'))):
        assert all(list((run/'results'/d).glob(f'*.{s}')) for s in suffixes)

def test_training_starts_at_ln2(smoke):
    run, _ = smoke
    first = {f.stem: pd.read_csv(f).iloc[0] for f in (run/'results'/'training').glob('*.csv')}
    for name in ('dpo-seed0', 'yfpo-seed0', 'yfpo-seed1'):
        assert abs(first[name]['rewards/margins']) < 1e-4 and first[name]['neurons/loss'] == pytest.approx(0.693147, abs=1e-4)

def test_second_run_does_nothing(smoke):
    run, _ = smoke
    start = os.times().children_user                           # seconds of the processor: whatever else runs takes none of them
    r = yfpo('run', 'smoke', '--run-dir', run)
    assert 'nothing to do' in r.stdout and '[1/' not in r.stdout and os.times().children_user - start < 8

def test_only_what_is_missing_runs_again(smoke):
    run, _ = smoke
    (run/'results'/'tables'/'audit.md').unlink()
    out = yfpo('run', 'smoke', '--run-dir', run).stdout
    assert out.count('up to date') == 45 and 'tables ... up to date' not in out

def test_report_gives_the_same_bytes(smoke):
    run, _ = smoke
    files = [f for d in ('tables', 'figures') for f in (run/'results'/d).iterdir()]
    before = {f.name: f.read_bytes() for f in files}
    r = yfpo('report', 'smoke', '--results', run/'results')
    assert r.returncode == 0, r.stderr
    assert [f.name for f in files if f.read_bytes() != before[f.name]] == []

def test_plain_papermill_from_anywhere(smoke, tmp_path):
    run, _ = smoke
    exe = str(Path(sys.executable).parent/'papermill')
    (tmp_path/'p.yaml').write_text(f"results_dir: '{run/'results'}'\n")
    r = subprocess.run([exe, str(ROOT/'nbs/paper/tables.ipynb'), 'out.ipynb', '-p', 'recipe', 'smoke', '-p', 'only', 'audit', '-f',
                        'p.yaml', '--no-progress-bar'], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    r = subprocess.run([exe, '--help-notebook', str(ROOT/'nbs/paper/stages/train.ipynb')], cwd=tmp_path, capture_output=True, text=True)
    assert 'processes: int (default 1)' in r.stdout and 'Unknown type' not in r.stdout

@pytest.mark.parametrize('stage,given,says', [
    ('stages/problems', ['recpie', 'first-look'], "no parameter 'recpie': did you mean 'recipe'?"),
    ('stages/problems', ['n_test', '-5'], 'n_test is -5'),
    ('stages/problems', ['recipe', '3'], 'recipe is 3, an int, but must be of type str'),
    ('tables', ['results', 'x'], "did you mean 'results_dir'?"), ('tables', ['only', 'mian'], "only names 'mian': did you mean 'main'?"),
    ('figures', ['only', 'method margin'], "only names 'margin': did you mean 'margins'?"),
    ('figures', ['only', 'breakage'], 'gsm8k-cpu/breakage.csv is missing'),
    ('stages/sft', ['learning_rate', 'nan'], 'learning_rate is nan'), ('experiments', ['nosuch', '1'], "no parameter 'nosuch'")])
def test_plain_papermill_refuses_what_the_notebook_does_not_know(tmp_path, stage, given, says):
    exe = str(Path(sys.executable).parent/'papermill')
    r = subprocess.run([exe, str(ROOT/f'nbs/paper/{stage}.ipynb'), 'o.ipynb', '-p', *given, '--no-progress-bar'], cwd=tmp_path,
                       capture_output=True, text=True)
    assert r.returncode and says in r.stderr.strip().splitlines()[-1], r.stderr[-2000:]

def test_an_unknown_kind_of_rejected_response_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rejected is 'x': there are other, corrupted"):
        run_here(ROOT/'nbs'/'paper'/'stages'/'bench_step.ipynb', run_dir=str(tmp_path), rejected=['x'])

def test_missing_upstream_names_the_command(tmp_path):
    exe = str(Path(sys.executable).parent/'papermill')
    r = subprocess.run([exe, str(ROOT/'nbs/paper/stages/sft.ipynb'), 'o.ipynb', '-p', 'run_dir', str(tmp_path/'r'), '--no-progress-bar'],
                       cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode and 'yfpo run smoke --until problems' in r.stderr

@pytest.mark.parametrize('args,says', [
    (['run', 'smok'], "did you mean 'smoke'?"), (['run', 'smoke', '-p', 'neuron_wieght', '0.2'], "did you mean 'neuron_weight'?"),
    (['run', 'smoke', '-p', 'batch_size', 'eight'], 'must be of type int'), (['run', 'smoke', '--until', 'trian'], "did you mean 'train'?"),
    (['run', 'gsm8k-cpu', '--data-dir', '/nowhere'], '/nowhere'), (['check', 'first-look'], 'main.csv is missing')])
def test_bad_input_is_one_sentence(args, says, tmp_path):
    r = yfpo(*args, '--run-dir', tmp_path)
    assert r.returncode == 1 and says in r.stderr and 'Traceback' not in r.stderr and r.stderr.count('\n') == 1
