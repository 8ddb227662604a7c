"The runner on toy notebooks: strictness before anything starts, resume by content, killed stages, honest publishing."
import json, math, os, re, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from unittest import mock
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from conftest import ROOT
from yfpo.lab.cli import main
from yfpo.lab.recipes import Outputs, merged, read_recipe, read_yaml
from yfpo.lab.publish import run_here
from yfpo.lm.machine import cores_here, hardware
from yfpo.lab.stages import check_parameter, choices, notebook_parameters, parameters_in, plan, words_of

SPEC = dict(display_name='python3', language='python', name='python3')
HEAD = "recipe:str = 'toy' # name of the recipe\n"
NO_FILES = "reads, writes = [], ['results']"
SFT_FILES = "reads = []\nwrites = ['sft/model.txt', 'sft/pid']"
TRAIN_FILES = """reads = ['sft/model.txt']
writes = [f'results/training/{arm}-seed{seed}.txt', 'results/main.csv']"""
SFT = (HEAD + "run_dir:str = '' # folder of the run\nlr:float = 0.1 # learning rate\nwait:float = 0.0 # seconds\n"
       "upset:bool = False # fail at the end\nsets:list = ['a'] # names\nmodel:str = 'tiny' # model",
       """import os, sys, time
from pathlib import Path
out = Path(run_dir)/'sft'
out.mkdir(parents=True, exist_ok=True)
(out/'pid').write_text(str(os.getpid()))
time.sleep(wait)
if upset: raise ValueError('the optimiser is upset')
(out/'model.txt').write_text(f'{lr} {sets} {model}')
(Path(run_dir)/'python.txt').write_text(f'{sys.executable} {os.getcwd()}')""", SFT_FILES)
TRAIN = (HEAD + "run_dir:str = '' # folder of the run\narm:str = 'dpo' # arm\nseed:int = 0 # seed\nbeta:float = 0.1 # strength",
         """from pathlib import Path
f = Path(run_dir)/'results'/'training'/f'{arm}-seed{seed}.txt'
f.parent.mkdir(parents=True, exist_ok=True)
f.write_text(f'{beta} ' + (Path(run_dir)/'sft'/'model.txt').read_text() + '\\n1\\n')
(Path(run_dir)/'results'/'main.csv').write_text('arm\\n')""", TRAIN_FILES)
TABLE = (HEAD + "results_dir:str = '' # folder of results\nonly:str = '' # names of tables",
         """from pathlib import Path
def draw(name): assert name in only.split()
draw('main')
d = Path(results_dir)
for sub in ('tables', 'figures'): (d/sub).mkdir(exist_ok=True)
(d/'tables'/'main.md').write_text('MAIN ' + ' '.join(sorted(f.stem for f in (d/'training').iterdir())))
(d/'figures'/'curve.png').write_bytes(b'png')""")
RECIPE = ("name: toy\nabout: toys\nshared: {model: tiny}\narms: [dpo]\nseeds: [0, 1]\n"
          "stages:\n  sft: {lr: 1e-3}\n  train: {beta: 1}\noutputs: {tables: [main]}\n")

def notebook(path, parameters, code, files=None):
    path.parent.mkdir(exist_ok=True)
    cell = lambda source, **meta: dict(cell_type='code', id=f'c{len(source)}', metadata=meta, source=source, outputs=[],
                                       execution_count=None)
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=SPEC),
                                    cells=[cell(parameters, tags=['parameters']), *([cell(files)] if files else []), cell(code)])))

def make(folder):
    "A small repository: two stages, one table, one recipe"
    paper = folder/'nbs'/'paper'
    (paper/'recipes').mkdir(parents=True)
    (paper/'recipes'/'toy.yaml').write_text(RECIPE)
    for name, nb in {'stages/sft': SFT, 'stages/train': TRAIN, 'tables': TABLE}.items(): notebook(paper/f'{name}.ipynb', *nb)
    return folder

def yfpo(root, *args, **kw):
    return subprocess.run([Path(sys.executable).parent/'yfpo', *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, 'YFPO_ROOT': str(root)}, **kw)

def recipe(root, old, new):
    f = root/'nbs'/'paper'/'recipes'/'toy.yaml'
    assert old in f.read_text()
    f.write_text(f.read_text().replace(old, new))

@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv('YFPO_ROOT', str(tmp_path/'repo'))
    return make(tmp_path/'repo')

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A toy repository whose recipe has run, and what it printed"
    root = make(tmp_path_factory.mktemp('toys')/'repo')
    r = yfpo(root, 'run', 'toy', cwd=root.parent)
    assert r.returncode == 0, r.stderr
    return root, r.stdout

@pytest.fixture
def again(finished, tmp_path):
    "A copy of the finished repository to change"
    root = shutil.copytree(finished[0], tmp_path/'repo')
    return root

# --- strictness: nothing of a wrong recipe starts ---

@pytest.mark.parametrize('old,new,says', [
    ('lr: 1e-3', 'lrr: 1e-3', "did you mean 'lr'?"), ('lr: 1e-3', 'lr: fast', "lr is 'fast', a str, but must be of type float"),
    ('lr: 1e-3', 'lr: true', 'must be of type float'),
    ('lr: 1e-3', 'sets: a', 'must be of type list'), ('beta: 1', 'bta: 1', "did you mean 'beta'?"),
    ('model: tiny', 'modle: tiny', "did you mean 'model'?"),
    ('  train:', '  trian:', "did you mean"), ('[dpo]', '[dpoo]', "did you mean 'dpo'?"),
    ('seeds: [0, 1]', 'seeds: [-1]', 'seeds is -1'), ('seeds: [0, 1]', 'seeds: [0, 0]', 'seeds names 0 twice'),
    ('[dpo]', '[dpo, dpo]', "arms names 'dpo' twice"), ('seeds: [0, 1]', 'seeds: [one]', 'seeds'), ('seeds: [0, 1]', 'seeds: 0', 'seeds'),
    ('[main]', '[mian]', "names 'mian', which tables.ipynb does not draw: did you mean 'main'?"),
    ('tables: [main]', 'tabels: [main]', "unknown key 'tabels': did you mean 'tables'?"),
    ('tables: [main]', 'tables: main', "must be a valid list"),
    ('{tables: [main]}', '[main]', "must be a valid dictionary"), ('[main]', '[main, main]', "outputs, tables names 'main' twice"),
    ('  train:', '  tables:', "'tables' is no stage: what is drawn stands in `outputs`"), ('shared:', 'shraed:', "did you mean 'shared'?"),
    ('{beta: 1}', 'beta', 'train'),
    ('lr: 1e-3', 'lr: 1e-3, lr: 2e-3', 'duplicate key'), ('{lr: 1e-3}', '{lr: 1e-3', 'not valid YAML'), ('name: toy', 'name: tyo', 'toy')])
def test_a_wrong_recipe_is_one_sentence(toy, old, new, says):
    recipe(toy, old, new)
    with pytest.raises(ValueError) as e: plan(read_recipe('toy'))
    assert says in str(e.value) and '\n' not in str(e.value)

def test_without_names_stages(toy):
    base = toy/'nbs/paper/recipes/base.yaml'
    base.write_text(RECIPE.replace('name: toy', 'name: base'))
    recipe(toy, 'about: toys', 'about: toys\nextends: base\nwithout: [[a]]')
    with pytest.raises(ValueError, match='without.* must be a valid string'): read_recipe('toy')

def test_numbers_are_numbers(toy):
    steps = plan(read_recipe('toy'))
    assert [s['label'] for s in steps] == ['sft', 'train-dpo-seed0', 'train-dpo-seed1', 'tables']
    assert steps[0]['params']['lr'] == 1e-3 and steps[1]['params']['beta'] == 1. and type(steps[1]['params']['beta']) is float
    assert check_parameter('lr', 2, dict(lr=('float', .1, '')), 'x') == 2.
    with pytest.raises(ValueError, match='must be of type int'): check_parameter('n', True, dict(n=('int', 1, '')), 'x')

@pytest.mark.parametrize('cell', ["lr:float|None = None # rate", "lr = 0.1 # rate", "lr:float = 1/10 # rate", "lr:dict = {1: x} # rate",
                                  "lr:list[int] = [1] # rates"])
def test_a_parameter_that_papermill_would_misread_is_refused(toy, cell):
    nb = toy/'nbs'/'paper'/'stages'/'sft.ipynb'
    notebook(nb, HEAD + cell, 'lr', SFT_FILES)
    with pytest.raises(ValueError, match='stages/sft.ipynb'): notebook_parameters(nb)

def test_no_recipe_no_repository(toy, monkeypatch, capsys):
    with pytest.raises(SystemExit) as e: main(['run', 'tooy'])
    assert "did you mean 'toy'?" in str(e.value)
    monkeypatch.setenv('YFPO_ROOT', str(toy/'nbs'))
    with pytest.raises(SystemExit) as e: main(['list'])
    assert 'clone' in str(e.value)

def test_a_recipe_by_path(toy, tmp_path):
    f = tmp_path/'mine.yaml'
    f.write_text(RECIPE.replace('name: toy', 'name: mine'))
    assert plan(read_recipe(str(f)))[0]['params']['recipe'] == 'mine'

def test_stage_notebooks_by_themselves_do_what_the_smoke_recipe_does():
    "Run All of one stage after `yfpo run smoke` must not mix two sizes of data"
    asked = ('gated', 'starts', 'temperatures', 'n_tried', 'dose', 'dose_batches', 'gradients', 'per_round')     # off by itself
    smoke = read_recipe('smoke')
    for stage, own in smoke.stages.items():
        known = notebook_parameters(ROOT/'nbs'/'paper'/'stages'/f'{stage}.ipynb')
        given = merged({k: v for k, v in smoke.shared.items() if k in known}, {k: v for k, v in own.items() if k not in asked})
        assert {k: known[k][1] for k in given} == given, stage

def test_what_most_steps_wait_for_starts_first(tmp_path):
    "Short steps that nobody waits for fill the end, when two run beside each other"
    from yfpo.lab.pace import most_awaited
    steps = plan(read_recipe('first-look'), str(tmp_path))
    order = [s['label'] for s in most_awaited(steps, steps)]
    at = order.index
    assert at('train-yfpo-seed0') < at('train-dpo-seed1') < at('evaluate-seed0') < at('audit') < at('tables')
    assert at('pairs') < at('evaluate-reference')
    assert sorted(order) == sorted(s['label'] for s in steps) and at('problems') == 0

COST = 'cost: {parameters: 1e9, question_tokens: 100, solution_tokens: 50, device: a GPU, tflops: 100.0, writing_tflops: 10.0}\n'

@pytest.mark.parametrize('old,new,says', [
    ('parameters: 1e9', 'parameter: 1e9', "did you mean 'parameters'?"), (', tflops: 100.0', '', "lacks the key 'tflops'"),
    ('tflops: 100.0', 'tflops: fast', 'must be a valid number'), ('solution_tokens: 50', 'solution_tokens: 0', 'must be greater than 0')])
def test_a_wrong_cost_is_one_sentence(toy, old, new, says):
    recipe(toy, 'about: toys\n', 'about: toys\n' + COST.replace(old, new))
    with pytest.raises(ValueError) as e: read_recipe('toy')
    assert says in str(e.value)

def test_the_estimate_by_hand():
    "Training and evaluation of the full recipe, counted without the code; and the totals are sums"
    from yfpo.lab.forecast import estimate, estimate_text
    r = read_recipe('gsm8k-full')
    rows = {x['stage']: x for x in estimate(r)}
    q, s, N = r.cost.question_tokens, r.cost.solution_tokens, r.cost.parameters
    pairs, arms = 4000*(q + 2*s), 8*8                          # pairs, arms and seeds
    again = 8*10                                               # eight seeds choose again ten times
    assert rows['train']['tokens'] == arms*pairs + (1 + again)*pairs + 2*again*64*(q + s)
    assert rows['train']['pflop'] == pytest.approx((6*arms*pairs + 2*(1 + again)*pairs + 4*2*again*64*(q + s))*N/1e15)
    assert rows['gate']['tokens'] == 6*pairs + 7*500*2*(q + s)
    assert rows['sft']['hours'] == pytest.approx(6*2000*(q + s)*N/(3600e12*r.cost.tflops))
    assert f"{sum(x['hours'] for x in rows.values()):8.2f} h" in estimate_text(r).splitlines()[-1]
    fewer = {x['stage']: x for x in estimate(r, plan(r, overrides=dict(n_sft=100)))}
    assert fewer['sft']['tokens'] == 100*(q + s) and fewer['train'] == rows['train'], 'with what -p has set'

def test_a_costly_recipe_says_so_before_it_starts(again):
    r = yfpo(ROOT, 'run', 'gsm8k-full', '--until', 'problems', '--data-dir', again, '--run-dir', again/'full')
    assert r.returncode == 1 and r.stdout.index('Estimate for gsm8k-full on one NVIDIA H100') < r.stdout.index('[1/1] problems')
    assert 'Estimate for gsm8k-full' in yfpo(ROOT, 'cost', 'gsm8k-full').stdout

def test_every_recipe_has_a_cost(again, tmp_path):
    "Where nothing has run, no number is made up; after a run, what its steps took"
    out = yfpo(make(tmp_path/'fresh'), 'cost', 'toy').stdout
    assert 'so the time is not known' in out and 'in all' not in out and 'yfpo run toy --until' in out.splitlines()[-1]
    out = yfpo(again, 'cost', 'toy').stdout
    assert 'times from earlier runs here' in out and {'sft', 'train', 'tables'} <= {l.split()[0] for l in out.splitlines()}

def test_the_order_follows_from_the_files_that_stages_declare(toy):
    needs = {s['label']: s['needs'] for s in plan(read_recipe('toy'))}
    assert needs == {'sft': [], 'train-dpo-seed0': ['sft'], 'train-dpo-seed1': ['sft'],
                     'tables': ['sft', 'train-dpo-seed0', 'train-dpo-seed1']}

@pytest.mark.parametrize('stages', ['  train: {beta: 1}\n', '  train: {beta: 1}\n  sft: {lr: 1e-3}\n'])
def test_a_stage_whose_source_is_absent_or_comes_later_is_refused(toy, stages):
    recipe(toy, '  sft: {lr: 1e-3}\n  train: {beta: 1}\n', stages)
    with pytest.raises(ValueError, match='train-dpo-seed0 reads sft/model.txt, which no step before it writes: put stage sft before it'):
        plan(read_recipe('toy'))

@pytest.mark.parametrize('files, says', [
    ("reads = ['../x']\nwrites = []", "reads names '../x', which is no path in the run's folder"),
    ("reads = ['/etc/passwd']\nwrites = []", 'no path'),
    ('reads = 3\nwrites = []', 'reads is 3, but must be a list of paths'), ('reads = [nosuch]\nwrites = []', 'fails: NameError'),
    ('writes = []', 'has 0 cells that set `reads` and `writes`')])
def test_files_that_a_stage_cannot_declare(toy, files, says):
    notebook(toy/'nbs'/'paper'/'stages'/'sft.ipynb', *SFT[:2], files)
    with pytest.raises(ValueError) as e: plan(read_recipe('toy'))
    assert says in str(e.value) and '\n' not in str(e.value) and 'stages/sft.ipynb' in str(e.value)

# --- a run ---

def test_run_prints_steps_table_and_figures(finished):
    root, out = finished
    assert '[1/4] sft ...' in out and '[4/4] tables ...' in out and 'MAIN dpo-seed0 dpo-seed1' in out and 'curve.png' in out
    m = json.loads((root/'runs/toy/results/manifest.json').read_text())
    assert set(m['stages']) == {'sft', 'train-dpo-seed0', 'train-dpo-seed1', 'tables'} and m['stages']['sft']['params']['lr'] == 1e-3
    assert all(s['peak_memory_mb'] > 10 and s['seconds'] > 0
               for s in m['stages'].values()) and m['hardware']['cores'] and str(root) not in json.dumps(m)
    python, cwd = (root/'runs/toy/python.txt').read_text().split()
    assert Path(python).parent == Path(sys.executable).parent, "the kernel is this interpreter's"
    assert not Path(cwd) == root.parent, 'never the working directory'

def test_second_run_does_nothing(finished):
    root, _ = finished
    before = {f: f.stat().st_mtime_ns for f in (root/'runs').rglob('*') if f.is_file()}
    start = os.times().children_user
    out = yfpo(root, 'run', 'toy').stdout
    assert 'nothing to do' in out and '[' not in out and os.times().children_user - start < 5
    assert before == {f: f.stat().st_mtime_ns for f in before}

def test_only_what_changed_runs_again(again):
    recipe(again, 'beta: 1', 'beta: 2')
    out = yfpo(again, 'run', 'toy').stdout
    assert '[1/4] sft ... up to date' in out and out.count('up to date') == 1 and out.count(' s\n') == 3
    assert (again/'runs/toy/results/training/dpo-seed0.txt').read_text().startswith('2.0')

def test_prose_may_change_and_code_may_not(again):
    nb = again/'nbs'/'paper'/'tables.ipynb'
    notebook(nb, TABLE[0].replace('folder of results', 'where results are'), TABLE[1])
    assert 'nothing to do' in yfpo(again, 'run', 'toy').stdout
    notebook(nb, TABLE[0], TABLE[1].replace("'MAIN '", "'MOAN '"))
    out = yfpo(again, 'run', 'toy').stdout
    assert out.count('up to date') == 3 and 'MOAN' in out

def test_force_runs_a_stage_and_what_follows(again):
    out = yfpo(again, 'run', 'toy', '--force', 'train').stdout
    assert out.count('up to date') == 1 and out.count(' s\n') == 3

def test_a_seed_or_an_arm_that_is_gone_leaves_the_results(again):
    recipe(again, 'seeds: [0, 1]', 'seeds: [0]')
    out = yfpo(again, 'run', 'toy').stdout
    assert 'MAIN dpo-seed0\n' in out and not (again/'runs/toy/results/training/dpo-seed1.txt').exists()
    assert set(json.loads((again/'runs/toy/results/manifest.json').read_text())['stages']) == {'sft', 'train-dpo-seed0', 'tables'}
    recipe(again, '[dpo]', '[yfpo]')
    assert 'MAIN yfpo-seed0\n' in yfpo(again, 'run', 'toy').stdout

def test_a_dropped_arm_is_gone_also_when_the_step_was_killed_in_between(again):
    recipe(again, '[dpo]', '[yfpo, dpo]')
    nb = again/'nbs'/'paper'/'stages'/'train.ipynb'
    notebook(nb, TRAIN[0], TRAIN[1] + '\nif arm == "yfpo" and beta == 2: raise ValueError("no")', TRAIN_FILES)
    assert 'MAIN dpo-seed0 dpo-seed1 yfpo-seed0 yfpo-seed1' in yfpo(again, 'run', 'toy').stdout
    recipe(again, '[yfpo, dpo]', '[yfpo]')
    recipe(again, 'beta: 1', 'beta: 2')
    assert yfpo(again, 'run', 'toy').returncode == 1
    assert (again/'runs/toy/results/training/yfpo-seed0.txt').exists(), 'whole until it succeeds'
    assert not (again/'runs/toy/results/training/dpo-seed0.txt').exists(), 'an arm that the recipe no longer has'
    notebook(nb, *TRAIN)
    assert 'MAIN yfpo-seed0 yfpo-seed1\n' in yfpo(again, 'run', 'toy').stdout
    assert not list((again/'runs/toy/done').glob('*.old'))

def test_report_redraws_in_place(again):
    r = yfpo(again, 'report', 'toy', '--results', again/'runs/toy/results')
    assert r.returncode == 0 and 'MAIN dpo-seed0 dpo-seed1' in r.stdout

def test_publish_copies_what_the_recipe_made_and_nothing_else(again):
    to = again/'nbs/paper/results/toy'
    assert yfpo(again, 'publish', 'toy').returncode == 0
    first = {f.relative_to(to): f.read_bytes() for f in to.rglob('*') if f.is_file()}
    assert Path('manifest.json') in first and Path('tables/main.md') in first
    recipe(again, 'beta: 1', 'beta: 3')
    r = yfpo(again, 'publish', 'toy')
    assert r.returncode == 1 and 'yfpo run toy' in r.stderr, 'settings that were not run are not published'
    assert {f.relative_to(to): f.read_bytes() for f in to.rglob('*') if f.is_file()} == first

def test_publish_sees_an_edited_number_of_the_same_length(again):
    f = next(f for f in sorted((again/'runs/toy/results').rglob('*')) if f.is_file() and f.name != 'manifest.json')
    f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:])
    r = yfpo(again, 'publish', 'toy')
    assert r.returncode == 1 and 'gone or changed' in r.stderr

def test_a_trial_with_p_is_not_published_until_the_recipe_itself_has_run(again):
    assert yfpo(again, 'run', 'toy', '--until', 'sft', '-p', 'lr', '0.5').returncode == 0
    r = yfpo(again, 'publish', 'toy')
    assert r.returncode == 1 and 'other parameters' in r.stderr
    assert yfpo(again, 'run', 'toy', '--until', 'sft').returncode == 0
    r = yfpo(again, 'publish', 'toy')
    assert yfpo(again, 'run', 'toy').returncode == 0 and yfpo(again, 'publish', 'toy').returncode == 0

def test_only_one_stage_runs_on_what_is_there(again, tmp_path):
    r = yfpo(make(tmp_path/'fresh'), 'run', 'toy', '--only', 'tables')
    assert r.returncode == 1 and 'tables reads what step ' in r.stderr and 'yfpo run toy --until' in r.stderr
    assert 'nothing to do' in yfpo(again, 'run', 'toy', '--only', 'train').stdout
    nb = again/'nbs'/'paper'/'stages'/'sft.ipynb'                  # the code of an earlier stage changes: it is not what was asked for
    nb.write_text(nb.read_text().replace('optimiser is upset', 'optimiser is cross'))
    assert 'nothing to do' in yfpo(again, 'run', 'toy', '--only', 'train').stdout
    r = yfpo(again, 'run', 'toy', '--only', 'train', '--force', 'train')
    assert r.stdout.count('] train-dpo-seed') == 4 and 'train-dpo-seed1' in r.stdout and 'sft ...' not in r.stdout
    assert yfpo(again, 'run', 'toy', '--only', 'tables').returncode == 0 and yfpo(again, 'publish', 'toy').returncode == 0
    r = yfpo(again, 'run', 'toy', '--only', 'trian')
    assert r.returncode == 1 and "did you mean 'train'?" in r.stderr

def test_what_the_runner_sets_cannot_be_given(toy):
    for k in ('seed', 'arms', 'recipe', 'run_dir'):
        with pytest.raises(ValueError, match=f"'{k}' is set by the runner"): plan(read_recipe('toy'), overrides={k: 1})
    recipe(toy, '{beta: 1}', '{beta: 1, seed: 3}')
    with pytest.raises(ValueError, match="stage 'train': 'seed' is set by the runner"): plan(read_recipe('toy'))

def test_a_value_that_is_no_yaml_is_one_sentence(again):
    r = yfpo(again, 'run', 'toy', '-p', 'lr', '[1')
    assert r.returncode == 1 and 'not a YAML value' in r.stderr and 'Traceback' not in r.stderr

# --- steps beside each other ---

SLOW = (HEAD + "run_dir:str = '' # folder of the run\narm:str = 'dpo' # arm\nseed:int = 0 # seed\nbeta:float = 0.1 # strength\n"
        "sulks:bool = False # one seed fails",
        """import os, time
from pathlib import Path
run = Path(run_dir)
(run/'results').mkdir(exist_ok=True)
(run/'met').mkdir(exist_ok=True)
(run/'met'/f'{seed}.here').write_text('')
other = run/'met'/('1.here' if seed == 0 else '0.here')
for _ in range(300):
    if other.exists(): break
    time.sleep(.1)
(run/'results'/f'{seed}.csv').write_text(f'seed {seed} met {other.exists()}')
(run/f'{seed}.tmp').write_text(os.environ.get('OMP_NUM_THREADS', ''))
os.replace(run/f'{seed}.tmp', run/'results'/f'{seed}.moved')
if sulks and seed == 0: raise ValueError('seed 0 sulks')""",
        "reads = ['sft/model.txt']\nwrites = [f'met/{seed}.here', f'results/{seed}.csv', f'results/{seed}.moved']")
BOTH = (HEAD + "results_dir:str = '' # folder of results\nonly:str = '' # names of tables",
        """from pathlib import Path
def draw(name): assert name in only.split()
draw('main')
d = Path(results_dir)
(d/'tables').mkdir(exist_ok=True)
(d/'tables'/'main.md').write_text(' '.join(sorted(f.read_text() for f in d.glob('*.csv'))))""")

@pytest.fixture
def side(toy):
    "The toy repository with two seeds that wait for each other"
    for name, nb in {'stages/train': SLOW, 'tables': BOTH}.items(): notebook(toy/'nbs'/'paper'/f'{name}.ipynb', *nb)
    recipe(toy, 'about: toys', 'about: toys\njobs: 2')
    return toy

def test_steps_run_beside_each_other_and_each_knows_its_files(side):
    r = yfpo(side, 'run', 'toy')
    assert r.returncode == 0 and 'seed 0 met True seed 1 met True' in r.stdout, r.stdout + r.stderr
    marks = {a: json.loads((side/f'runs/toy/done/train-dpo-seed{a}.json').read_text()) for a in (0, 1)}
    for a, m in marks.items(): assert set(m['files']) == {f'met/{a}.here', f'results/{a}.csv', f'results/{a}.moved'}
    share = str(max(1, cores_here()//2))
    assert (side/'runs/toy/results/0.moved').read_text() == share
    m = json.loads((side/'runs/toy/results/manifest.json').read_text())
    assert m['jobs'] == 2 and m['total_seconds'] <= sum(s['seconds'] for s in m['stages'].values()) + .2
    assert 'nothing to do' in yfpo(side, 'run', 'toy').stdout and 'nothing to do' in yfpo(side, 'run', 'toy', '--jobs', '1').stdout

def test_a_failure_lets_the_others_finish_and_stops_what_follows(side):
    r = yfpo(side, 'run', 'toy', '-p', 'sulks', 'true')
    assert r.returncode == 1 and 'seed 0 sulks' in r.stderr and r.stderr.count('\n') == 1
    done = {f.stem for f in (side/'runs/toy/done').glob('*.json')}
    assert done == {'sft', 'train-dpo-seed1'} and '] tables' not in r.stdout
    r = yfpo(side, 'run', 'toy', '--jobs', '-1')
    assert r.returncode == 1 and 'jobs is -1' in r.stderr

def test_a_step_that_nothing_can_run_beside_has_all_cores():
    from yfpo.lab.workflow import _alone
    steps = [dict(label=l, needs=n) for l, n in (('a', []), ('b', ['a']), ('c', ['a']), ('d', ['b', 'c']), ('e', ['d']), ('f', ['a', 'e']))]
    assert _alone(steps) == {'a', 'd', 'e', 'f'} and _alone(steps[:3]) == {'a'} and _alone(steps[:2]) == {'a', 'b'}

def test_jobs_must_be_a_number_of_steps(toy):
    recipe(toy, 'about: toys', 'about: toys\njobs: -1')
    with pytest.raises(ValueError, match='jobs is -1, but must be greater than or equal to 0'): read_recipe('toy')
    recipe(toy, 'jobs: -1', 'jobs: 0')
    assert read_recipe('toy').jobs == 0, 'as many as suit the machine'

# --- failing and killed ---

def test_a_failing_stage_names_error_and_notebook_and_is_resumed(again):
    r = yfpo(again, 'run', 'toy', '-p', 'upset', 'true')
    assert r.returncode == 1 and 'the optimiser is upset' in r.stderr and 'notebooks/sft.ipynb' in r.stderr
    assert 'Traceback' not in r.stderr and r.stderr.count('\n') == 1
    assert r.stdout.endswith('failed\n')
    assert (again/'runs/toy/sft/model.txt').read_text() and (again/'runs/toy/results/tables/main.md').exists(), 'what was there stays whole'
    out = yfpo(again, 'run', 'toy').stdout
    assert '[1/4] sft ...' in out or 'nothing to do' in out
    assert 'nothing to do' in yfpo(again, 'run', 'toy').stdout

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError: return False

def test_a_template_that_is_gone_ends_the_run(toy, tmp_path):
    "Two steps import a module, so the template imports it, and ends: no step waits for it"
    (tmp_path/'broken_import.py').write_text('raise ImportError("a library is missing")')
    notebook(toy/'nbs/paper/stages/train.ipynb', TRAIN[0], 'import broken_import\n' + TRAIN[1], TRAIN_FILES)
    r = subprocess.run([Path(sys.executable).parent/'yfpo', 'run', 'toy'], capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'YFPO_ROOT': str(toy), 'PYTHONPATH': f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert r.returncode == 1 and ('the process that starts the notebooks is gone' in r.stderr or hardware()['gpus'])
    assert 'a library is missing' in r.stderr

def test_a_run_where_the_folder_for_temporary_files_has_a_long_path(toy, tmp_path):
    "A socket's path has at most 107 bytes"
    own = tmp_path/('t'*50)/('t'*50)
    own.mkdir(parents=True)
    r = subprocess.run([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft'], capture_output=True, text=True, timeout=300,
                       env={**os.environ, 'YFPO_ROOT': str(toy), 'TMPDIR': str(own)})
    assert r.returncode == 0, r.stderr

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks at /proc')
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_takes_its_kernel_along_and_goes_on_later(toy, sig, request):
    recipe(toy, 'lr: 1e-3', 'lr: 1e-3, wait: 60')
    own = tempfile.mkdtemp(dir='/tmp')                             # short, or it is not taken
    request.addfinalizer(lambda: shutil.rmtree(own))
    p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft'],
                         env={**os.environ, 'YFPO_ROOT': str(toy), 'TMPDIR': own},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # jobs in the background ignore it
    pid = toy/'runs/toy/sft/pid'
    deadline = time.time() + 180
    while not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(.1)
    kernel = int(pid.read_text())
    busy = yfpo(toy, 'run', 'toy', '--until', 'sft')
    assert busy.returncode == 1 and 'another' in busy.stderr
    p.send_signal(sig)
    _, err = p.communicate(timeout=60)
    assert p.returncode and 'Traceback' not in err
    deadline = time.time() + 15
    while alive(kernel) and time.time() < deadline: time.sleep(.1)
    assert not alive(kernel), 'no kernel goes on writing behind the next run'
    def left(): return [f.name for f in Path(own).iterdir() if not f.name.startswith('snakemake')]
    while left() and time.time() < deadline: time.sleep(.1)
    assert not left(), 'no folder, no socket, no key stays behind'
    recipe(toy, ', wait: 60', '')
    r = yfpo(toy, 'run', 'toy', '--until', 'sft')
    assert r.returncode == 0 and '[1/1] sft ...' in r.stdout and (toy/'runs/toy/sft/model.txt').exists()

LONG = (HEAD + "run_dir:str = '' # folder of the run\nn:int = 3 # parts\n"
        "breaks:int = 9 # part before which it breaks, once\nmodel:str = 'tiny' # model",
        """from pathlib import Path
from yfpo.lab.step import kept
log, broken = Path(run_dir)/'made.txt', Path(run_dir)/'broken'
def part(i):
    if i == breaks and not broken.exists(): broken.touch(); raise KeyboardInterrupt
    log.open('a').write(f'{i} ')
    return [i]
rows = [x for i in range(n) for x in kept(run_dir, f'part-{i}', lambda: part(i))]
(Path(run_dir)/'results').mkdir(exist_ok=True)
(Path(run_dir)/'results'/'rows.csv').write_text(str(rows))""", "reads, writes = [], ['results/rows.csv']")

def test_a_long_stage_goes_on_from_the_parts_it_finished(toy):
    recipe(toy, 'lr: 1e-3', 'breaks: 2')
    recipe(toy, '  train: {beta: 1}\n', '')
    notebook(toy/'nbs/paper/stages/sft.ipynb', *LONG)
    run, made = toy/'runs/toy', lambda: (toy/'runs/toy/made.txt').read_text()
    r = yfpo(toy, 'run', 'toy', '--until', 'sft')
    assert r.returncode == 1 and 'KeyboardInterrupt' in r.stderr and made() == '0 1 ', r.stderr
    r = yfpo(toy, 'run', 'toy', '--until', 'sft')
    assert 'going on from a killed run' in r.stdout and made() == '0 1 2 ' and (run/'results/rows.csv').read_text() == '[0, 1, 2]'
    assert json.loads((run/'results/manifest.json').read_text())['stages']['sft']['resumed'] is True
    assert not list((run/'partial').glob('*')), 'parts go with the stage'
    r = yfpo(toy, 'run', 'toy', '--until', 'sft', '--force', 'sft')
    assert made() == '0 1 2 0 1 2 ' and 'going on' not in r.stdout
    (run/'broken').unlink()
    assert yfpo(toy, 'run', 'toy', '--until', 'sft', '--force', 'sft').returncode == 1 and made().endswith(' 0 1 ')
    recipe(toy, 'breaks: 2', 'breaks: 2, n: 2')
    r = yfpo(toy, 'run', 'toy', '--until', 'sft')
    assert 'going on' not in r.stdout and made().endswith(' 0 1 0 1 '), 'parts made under other settings are not used'

def test_the_page_reads_a_seed_that_was_trained():
    "Whatever seed a recipe shares, for questions and draws, and unless it names another"
    r = read_recipe('smoke')
    r.shared['seed'], r.seeds = 7, [2, 3]
    def seeds(): return {s['label']: s['params'].get('train_seed', s['params'].get('seed')) for s in plan(r)
                         if s['label'] in ('browse', 'evaluate-reference', 'audit')}
    assert seeds() == {'browse': 2, 'evaluate-reference': 2, 'audit': 7}
    r.stages['browse'] = dict(train_seed=3, arms_read=['yfpo'])
    assert seeds()['browse'] == 3
    del r.stages['browse']['train_seed']
    r.shared['train_seed'] = 3
    assert seeds()['browse'] == 3, 'shared by the stages'
    del r.shared['train_seed']
    assert next(s for s in plan(r, overrides=dict(train_seed=3)) if s['label'] == 'browse')['params']['train_seed'] == 3, 'from -p'

# --- what a value may be ---

@pytest.mark.parametrize('value,says', [
    ('-5', 'at least 1'), ('0', 'at least 1'), ('99999999999999999999', 'at most 100,000'), ('8.0', 'must be of type int'),
    ('yes', 'of type int'),
    ('true', 'of type int'), ('1:30', 'of type int'), ('.nan', 'of type int'), ('[3]', 'of type int'), ('~', 'of type int')])
def test_a_count_that_makes_no_sense_is_refused_before_anything_runs(value, says):
    r = read_recipe('smoke')
    r.stages['problems']['n_test'] = read_yaml(value, 'it')
    with pytest.raises(ValueError, match='n_test is') as e: plan(r)
    assert says in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('declared,bad,good', [
    ("k:float = 0.1 # share of all neurons to select", [0, -.1, 1.1, math.nan, math.inf], [1, .5]),
    ("k:list = [0.1] # shares of all neurons", [[0.], [1.5], [math.nan], ['a'], [], [.1, .1], [[.1]], [True]], [[.1, 1.], [.5]]),
    ("k:float = 0.1 # of yfpo-dynamic: at most this share of one layer", [-1, 2], [0.]),
    ("learning_rate:float = 1e-3 # of AdamW, constant", [0, -1e-3, math.nan, math.inf, 10**400], [1e-9, 1]),
    ("rates:list = [1e-3] # of AdamW", [[0.], [-1.], [math.inf]], [[1, 1e-3]]),
    ("epochs:float = 1.0 # passes over the pairs", [0, -1], [.5, 2]),
    ("weight:float = 0.5 # weight of the neuron term", [-1, math.inf], [0, 100]),
    ("n:int = 0 # pairs at most, 0 keeps all", [-1, 10**7], [0, 5]), ("n:int = 8 # pairs a step", [-1, 0, 1.5, '8', None], [1, 10**5]),
    ("n:int = 8 # pairs a pass, 0 for what fits", [-1], [0, 3]), ("seed:int = 0 # of the draws", [-1, 2**32], [0, 2**32 - 1]),
    ("level:list = [] # levels, 1 to 3; empty for all", [[0], [4], [None], [{}]], [[], [1, 3]]),
    ("top_p:float = 1.0 # nucleus mass, 0 to 1", [1.2, -.1], [.9]), ("sets:list = ['a'] # names", [['a', 'a'], [1], []], [['b', 'a']]),
    ("shapes:list = [[20, 8]] # tokens", [[[0, 8]], [20], [['a']], [[]], [[1, 2, 3]]], [[[1, 1], [1, 1]]]),
    ("on:bool = False # whether", [0, 'no', None], [True])])
def test_limits_follow_from_what_the_cell_says(declared, bad, good):
    known = parameters_in(declared, 'x')
    name, = known
    for v in bad:
        with pytest.raises(ValueError, match=f'^x: {name} (is|has|names)'): check_parameter(name, v, known, 'x')
    for v in good: assert check_parameter(name, v, known, 'x') == v

def test_every_default_is_within_its_own_limits():
    for nb in (ROOT/'nbs'/'paper').rglob('*.ipynb'):
        known = notebook_parameters(nb)
        for k, (_, default, _) in known.items(): assert check_parameter(k, default, known, nb.name) == default

FREE = ('recipe', 'run_dir', 'results_dir', 'only', 'data_dir', 'model', 'revision', 'task', 'arms', 'arms_read', 'family', 'outcome',
        'kind', 'drawn', 'arm', 'first', 'real', 'older', 'limits', 'neurons', 'study', 'strong', 'share', 'judge',
        'accelerate')                                                     # refused where not found

def test_every_word_that_a_stage_takes_is_one_of_a_list_or_free():
    for nb in sorted((ROOT/'nbs'/'paper').rglob('*.ipynb')):
        for k, (kind, default, _) in notebook_parameters(nb).items():
            words = [x for x in (default if kind == 'list' else [default]) if isinstance(x, str)]
            if not words or k in FREE: continue
            assert any({*words} <= {*c} for c in choices()[k]), (nb.name, k)
            with pytest.raises(ValueError, match=f'^x: {k} is .nosuch'):
                check_parameter(k, ['nosuch'] if kind == 'list' else 'nosuch', notebook_parameters(nb), 'x')

def test_words_of_parameters_are_keys_of_the_tables_they_come_from():
    import yfpo.beyond.attributors
    from yfpo.relevance import ATTRIBUTORS
    from yfpo.lm.sampling import BACKENDS
    from yfpo.loss import OBJECTIVES
    from yfpo.lab.gate import RANKS
    from yfpo.lm.machine import FORMATS
    from yfpo.beyond.methods import METHODS
    from yfpo.data.sources import DRAWN_SETS, OTHER_SETS
    from yfpo.reward import READOUTS
    tables = dict(objective=OBJECTIVES, readout=READOUTS, method=ATTRIBUTORS, backend=BACKENDS, precision=FORMATS, by=RANKS)
    for k, table in tables.items(): assert sorted(choices()[k][0]) == sorted(table), k
    assert sorted(choices()['method'][1]) == sorted(METHODS)
    assert sorted(choices()['source'][0]) == sorted(['templates', 'templates-ood', 'gsm8k/train', 'gsm8k/test', 'svamp', *OTHER_SETS,
                                                     *DRAWN_SETS])

def test_a_new_row_of_a_table_is_a_new_word(tmp_path, monkeypatch):
    import yfpo
    (tmp_path/'a.py').write_text("x, y = 1, 2\nTABLE = {'one': f(1),\n         'two': 2}\nTABLE.pop('one')\n")
    (tmp_path/'b.py').write_text("TABLE.update({'three': 3})\nOTHER = dict(four=4)\nWORDS = ('five',)\n")
    monkeypatch.setattr(yfpo, '__file__', str(tmp_path/'__init__.py'))
    assert words_of('TABLE', 'a', 'b') == ('one', 'two', 'three')
    assert words_of('OTHER', 'b') == ('four',) and words_of('WORDS', 'b') == ('five',)
    with pytest.raises(ValueError, match='a.py sets no NOSUCH'): words_of('NOSUCH', 'a')

def test_numbers_are_read_as_yaml_1_2_does():
    text = '[010, 1:30, yes, no, on, off, y, 1e-3, -1e-3, 0o17, 0x1F, ~, null, True, .5, 5., +1, -.inf, 1e5]'
    assert read_yaml(text, 'x') == [
        10, '1:30', 'yes', 'no', 'on', 'off', 'y', 1e-3, -1e-3, 15, 31, None, None, True, .5, 5., 1, -math.inf, 1e5]

@pytest.mark.parametrize('text,says', [
    ('a: 1\nb: 2\na: 3', 'line 3: not valid YAML: found duplicate key "a"'), ('{a: 1, "a": 2}', 'duplicate key "a"'),
    ('['*5000, 'brackets'), ('{a: '*5000, 'brackets'), ('- '*3000 + 'a', 'levels'), ('a: &a [*a]', 'anchor or alias'),
    ('a: 2001-01-01', 'put it in quotes if it is meant as a text'),
    ('{1: 2}', 'the key 1 is no name'),
    ('{[1]: 2}', 'is no name'), ('a: *b', 'anchor or alias'), ('a: !!python/object:os.system x', 'plain values only'),
    ('a: !!int x', 'plain values only'), ('a: !!map [1]', 'plain values only'), ('a: "\\uD800"', 'no character'), ('a: "\\UFFFFFFFF"', 'x'),
    ('a: "\\0"', 'no character'),
    ('a: 1\n--- \nb: 2', 'document'), ('a: [1', 'line 1'), ('\tb', 'line 1'), ('a\0', 'special characters'),
    ('x'*70000, '65,536 are allowed'),
    ('a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n' + ''.join(f'{y}: &{y} [{", ".join(["*" + x]*9)}]\n' for x, y in zip('abcdefghi', 'bcdefghij')),
    'anchor or alias')])
def test_yaml_that_is_wrong_or_endless_is_one_sentence_at_once(text, says):
    start = time.process_time()                             # a busy machine is not slow code
    with pytest.raises(ValueError) as e: read_yaml(text, 'x')
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400 and time.process_time() - start < 1

def test_the_nearest_name_is_near():
    from yfpo.lab.recipes import nearest
    assert nearest('trian', ['train', 'bench']) == "did you mean 'train'?"
    assert nearest('nosuch', ['bench', 'epochs']) == 'there are bench, epochs' and nearest('means', ['tanh']) == 'there are tanh'
    assert nearest('x', []) == 'there are none' and len(nearest('x', [f'name-{i}' for i in range(99)])) < 190

@pytest.mark.parametrize('old,new,says', [
    ('[0, 1]', '[4294967296]', 'less than 4294967296'), ('[0, 1]', '[true]', 'seeds is True'), ('[main]', '[../x]', 'is no name: letters'),
    ('[main]', '[[a]]', 'must be a valid string'), ('[main]', '[nosuch]', 'there are main'),
    ('  sft:', '  ../sft:', 'is no name: letters'),
    ('  sft:', '  nosuch:', 'there are sft, train'), ('about: toys', 'about: toys\njobs: 1000000', 'jobs is 1000000'),
    ('about: toys', 'about: [a]', 'about is .*must be a valid string'),
    ('about: toys\n', 'about: toys\n' + COST.replace('100.0', '.inf'), 'must be a finite number'),
    ('about: toys\n', 'about: toys\n' + COST.replace('100.0', '-1'), 'must be greater than 0'),
    ('name: toy', "name: '..'", "'..' is no name"), ('about: toys', 'about: toys\nextends: nosuch', 'there is no recipe'),
    ('about: toys', 'about: toys\nextends: toy', 'extends it: one of the two must stand alone')])
def test_what_else_can_be_wrong_with_a_recipe(toy, old, new, says):
    recipe(toy, old, new)
    with pytest.raises(ValueError) as e: plan(read_recipe('toy'))
    assert re.search(says if '.*' in says else re.escape(says), str(e.value)) and '\n' not in str(e.value)

# --- any recipe at all ---

MARKS = ['[', ']', '{', '}', ':', ' ', '\n', '- ', '&a ', '*a', '!!int ', '"', "'", '#', '|', '>', '%', '@', '~', '.nan', '1e999', '0x',
    '---', '\t', '\0',
         '9'*400, '\ud7ff', '-1', '<<: ', '? ', '=', '!<%ff>', 'true', '\\U11111111']

@st.composite
def spoilt(draw):
    "A recipe with parts taken out, doubled, or replaced"
    text = RECIPE
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(text)))
        j = draw(st.integers(i, min(len(text), i + 12)))
        put = draw(st.sampled_from(MARKS) | st.text(max_size=4) | st.integers().map(str) | st.floats().map(str))
        text = text[:i] + put*draw(st.sampled_from([1, 1, 1, 2, 300])) + text[j:]
    return text

@pytest.fixture(scope='module')
def toys(tmp_path_factory): return make(tmp_path_factory.mktemp('any')/'repo')

@given(text=spoilt() | st.text(max_size=300))
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_is_a_recipe_or_one_sentence(toys, text):
    "Never a traceback, a flood of lines, or a long wait"
    f = toys/'nbs'/'paper'/'recipes'/'toy.yaml'
    f.write_text(text, encoding='utf-8', errors='surrogatepass')
    start = time.process_time()
    with mock.patch.dict(os.environ, YFPO_ROOT=str(toys)):
        try: assert all(s['label'] and s['params']['recipe'] == 'toy' for s in plan(read_recipe('toy')))
        except (ValueError, FileNotFoundError) as e:
            said = str(e).replace(str(toys), '')
            assert '\n' not in said and 10 < len(said) < 400, said
    assert time.process_time() - start < 1 and not (toys/'runs').exists()

# --- the command ---

def test_version(capsys):
    from yfpo import __version__
    main(['--version'])
    assert capsys.readouterr().out == f'yfpo {__version__}\n'

def said(*args):
    "What a failing command says, which is one sentence"
    with pytest.raises(SystemExit) as e: main([*map(str, args)])
    assert isinstance(e.value.code, str) and e.value.code.startswith('yfpo: ') and '\n' not in e.value.code, e.value.code
    return e.value.code

def test_a_value_with_a_minus_reaches_the_notebook(toy):
    from yfpo.lab.cli import _values
    seen = mock.Mock()
    with mock.patch('yfpo.lab.cli._run', seen):
        main(['run', 'toy', '-p', 'lr', '-1e-3', '-p', 'n', '-.inf', '--jobs', '2', '-p', 's', '--x'])
    given = seen.call_args[0][2]
    assert _values(given['p']) == dict(lr=-1e-3, n=-math.inf, s='--x') and given['jobs'] == 2
    with mock.patch('yfpo.lab.cli._run', seen): main(['run', 'toy', '-p', 'train.beta=.2', '-p', 's', 'a=b', '--until=sft'])
    given = seen.call_args[0][2]
    assert _values(given['p']) == dict(train=dict(beta=.2), s='a=b') and given['until'] == 'sft', 'as other tools write it'
    assert _values([('train.beta', '.2'), ('train.seed', '3'), ('n', '1')]) == dict(train=dict(beta=.2, seed=3), n=1)
    assert 'wait is -0.001, but must be at least 0' in said('run', 'toy', '-p', 'wait', '-1e-3')
    assert "'wait' twice" in said('run', 'toy', '-p', 'wait', '1', '-p', 'wait', '2')
    for args in (['-p'], ['-p', 'lr']):
        with pytest.raises(SystemExit) as e: main(['run', 'toy', *args])
        assert e.value.code == 2

def test_what_never_ran_leaves_no_folder(toy):
    for args in (['check', 'toy'], ['publish', 'toy'], ['report', 'toy'], ['run', 'toy', '--until', 'nosuch'],
        ['run', 'toy', '-p', 'nosuch', '1'],
                 ['run', 'toy', '--jobs', '-1'], ['run', 'toy', '--jobs', 10**9]): said(*args)
    assert not (toy/'runs').exists()

def test_errors_of_the_system_are_one_sentence(toy, tmp_path, monkeypatch):
    file, paper = tmp_path/'file', toy/'nbs'/'paper'
    file.write_text('')
    assert 'is a file, but must be a folder' in said('run', 'toy', '--run-dir', file)
    assert f'{file}/x: Not a directory' in said('run', 'toy', '--run-dir', file/'x')
    (tmp_path/'mine.yaml').mkdir()
    assert 'is a folder' in said('run', tmp_path/'mine.yaml') and 'no recipe' in said('run', 'x'*5000)
    assert 'no recipe' in said('run', 'a\0b')
    (paper/'recipes'/'bytes.yaml').write_bytes(b'name: \xff')
    assert 'is not UTF-8 text (byte 6)' in said('run', 'bytes')
    (paper/'stages'/'sft.ipynb').write_text('{"cells": ')
    assert 'stages/sft.ipynb is no notebook' in said('run', 'toy')
    notebook(paper/'stages'/'sft.ipynb', 'recipe:str = = 3', 'x', SFT_FILES)
    assert 'line 1 of the cell `parameters` is not Python' in said('run', 'toy')
    notebook(paper/'stages'/'sft.ipynb', SFT[0], '%%time\nx', SFT_FILES)
    assert "'%%time' is not Python" in said('run', 'toy')
    monkeypatch.setattr('yfpo.lab.workflow.read_recipe', mock.Mock(side_effect=OSError(28, 'No space left on device', '/disk/a')))
    assert said('run', 'toy') == 'yfpo: /disk/a: No space left on device'
    monkeypatch.setattr('yfpo.lab.workflow.read_recipe', mock.Mock(side_effect=ModuleNotFoundError("No module named 'x'", name='x')))
    assert said('run', 'toy') == "yfpo: a run needs x: pip install 'yfpo[lab]'"

def test_nobody_reads_on():
    "`yfpo env | head -1`, with a reader that is gone before the first line"
    r, w = os.pipe()
    os.close(r)
    p = subprocess.run([Path(sys.executable).parent/'yfpo', 'list'], stdout=w, stderr=subprocess.PIPE, text=True)
    os.close(w)
    assert p.returncode == 1 and p.stderr == ''

def test_broken_results_are_named(again, monkeypatch):
    monkeypatch.setenv('YFPO_ROOT', str(again))
    results, committed = again/'runs/toy/results', again/'nbs/paper/results/toy'
    (again/'nbs/paper/tolerances.yaml').write_text('main.csv: {nll: .1}\ncontrasts.csv: {nll: .1}\n')
    main(['publish', 'toy'])
    for text, why in (('', 'is no table'), ('arm\na\n', 'has no column seed, set, metric, value'),
                      ('arm,seed,set,metric,value\na,0,t,nll,x\n', "row 1: value is 'x', which is no number"),
                      ('arm,seed,set,metric,value\na,0,t,nll,1\na,0,t,nll,1\n', 'row 2: a, 0, t, nll stands there twice')):
        (results/'main.csv').write_text(text)
        assert why in said('check', 'toy')
    for text, why in (('main.csv: {nll: -1}\ncontrasts.csv: {}\n', 'nll is -1, but must be a number above 0'),
        ('a: 1', 'must name main.csv and contrasts.csv'),
                      ('main.csv: 3\ncontrasts.csv: .nan', 'contrasts.csv is nan')):
        (again/'nbs/paper/tolerances.yaml').write_text(text)
        assert why in said('check', 'toy')
    (committed/'manifest.json').write_text('{"stages": {')
    assert 'manifest.json, line 1: not valid JSON' in said('report', 'toy')
    (committed/'manifest.json').write_text('[]')
    assert 'manifest.json holds a list and no object' in said('report', 'toy')
    (committed/'manifest.json').unlink()
    shutil.rmtree(committed/'training')
    assert 'tables main failed: FileNotFoundError' in said('report', 'toy')

def test_publishing_that_is_killed_half_way_loses_nothing(again, monkeypatch):
    monkeypatch.setenv('YFPO_ROOT', str(again))
    main(['publish', 'toy'])
    to = again/'nbs/paper/results/toy'
    before = {f.relative_to(to): f.read_bytes() for f in to.rglob('*') if f.is_file()}
    with monkeypatch.context() as m:
        m.setattr(shutil, 'copy2', mock.Mock(side_effect=OSError(28, 'No space left on device')))
        assert said('publish', 'toy') == 'yfpo: No space left on device'
    assert {f.relative_to(to): f.read_bytes() for f in to.rglob('*') if f.is_file()} == before
    main(['publish', 'toy'])
    assert [f.name for f in to.parent.iterdir()] == ['toy']

@pytest.mark.parametrize('flags, words', [
    (['--only', ''], "no stage ''"), (['--force', '', '--until', 'sft'], "no stage ''"), (['--until', ''], '--until is empty'),
    (['--only', 'sft', '--until', 'train'], 'exclude each other'), (['--until', 'sft', '--force', 'train'], "--force names 'train'"),
    (['--only', 'sft', '--force', 'train'], "--force names 'train', which does not run here: there are sft"),
    (['--only', 'train'], 'which has not run'), (['--data-dir', '/nowhere'], 'which is no folder'),
    (['-p', 'data_dir', 'nosuch'], 'data_dir'), (['--until', 'all'], "no stage 'all'"), (['--only', 'all'], "no stage 'all'"),
    (['--data-dir', '~nosuchuser/x'], 'which is no folder')])
def test_flags_that_cannot_be_meant_leave_no_folder(toy, tmp_path, flags, words):
    r = yfpo(toy, 'run', 'toy', '--run-dir', tmp_path/'new', *flags)
    assert r.returncode == 1 and words in r.stderr and 'Traceback' not in r.stderr and not (tmp_path/'new').exists(), r.stderr

def test_an_estimate_reads_what_a_run_would(tmp_path):
    recipe = read_recipe('gsm8k-full')
    from yfpo.lab.forecast import estimate
    first = sum(r['pflop'] for r in estimate(recipe))
    more = recipe.model_copy(update=dict(shared=dict(recipe.shared, batch_size=4)))
    assert sum(r['pflop'] for r in estimate(more)) == first
    for change, words in ((dict(shared=dict(modle='x')), 'modle'), (dict(stages=dict(problmes={})), "did you mean 'problems'"),
                          (dict(stages=dict(problems=dict(n_pairs='many'))), 'must be of type int')):
        with pytest.raises(ValueError, match=words): estimate(recipe.model_copy(update=change))

def test_an_output_draws(toy):
    recipe(toy, '{tables: [main]}', '{sft: []}')
    assert "an unknown key 'sft': there are tables, figures, cost" in yfpo(toy, 'run', 'toy').stderr

def test_what_is_drawn_stands_in_the_recipe(toy):
    with pytest.raises(ValueError, match="'only' is set by the runner"): plan(read_recipe('toy'), overrides=dict(only='x'))
    assert plan(read_recipe('toy'))[-1]['params']['only'] == 'main'
    recipe(toy, '[main]', '[]')
    assert 'only' not in plan(read_recipe('toy'))[-1]['params'], 'all that the results are there for'

def test_a_report_of_nothing_leaves_nothing(toy, tmp_path):
    (tmp_path/'empty').mkdir()
    assert 'holds no results; make them with `yfpo run toy`' in yfpo(toy, 'report', 'toy', '--results', tmp_path/'empty').stderr
    assert not [*(tmp_path/'empty').iterdir()]

# ---- two parameters that contradict, and a log that is none

@pytest.mark.parametrize('stage, params, says', [
    ('responses', dict(n_samples=2, temperature=0.), 'greedy answers to one question are all the same'),
    ('responses', dict(temperature=0.), 'greedy answers'), ('evaluate', dict(n_samples=2, temperature=0.), 'greedy answers'),
    ('evaluate', dict(n_samples=2, ks=[1, 4]), 'ks names 4 and n_samples is 2'), ('evaluate', dict(n_samples=1), 'ks names 2'),
    ('responses', dict(n_samples=1, temperature=0.), None), ('evaluate', dict(n_samples=0, temperature=0.), None),
    ('evaluate', dict(n_samples=4, ks=[1, 4]), None)])
def test_parameters_that_contradict(stage, params, says):
    recipe = read_recipe('smoke')
    stages = {k: recipe.stages.get(k) for k in ('problems', 'sft', 'responses', 'pairs', 'neurons')} | {stage: params}
    recipe = recipe.model_copy(update=dict(arms=[], outputs=Outputs(), shared={}, stages=stages))
    if says is None:
        assert stage in {s['stage'] for s in plan(recipe)}
        return
    with pytest.raises(ValueError, match=f"^stage '{stage}' of recipe 'smoke': .*{says}"): plan(recipe)
    with pytest.raises(ValueError, match=f'{stage}.ipynb: .*{says}'):
        run_here(ROOT/'nbs'/'paper'/'stages'/f'{stage}.ipynb', **params)

@pytest.mark.parametrize('name, row, says', [('weight-1.0', dict(step='x'), "row 1 has no step|step is 'x', but must be a number"),
    ('weight-1.0', dict(loss=1.), 'row 1 has no step'), ('weight-1.0', dict(step=1, loss='low'), "loss is 'low', but must be a number"),
    ('weight-x', dict(step=1), 'has no number after `weight-` in its name')])
def test_a_dashboard_that_holds_no_numbers(name, row, says, tmp_path):
    (tmp_path/'dashboards').mkdir()
    (tmp_path/'dashboards'/f'{name}.jsonl').write_text(json.dumps(row) + '\n')
    with pytest.raises(ValueError, match=says): run_here(ROOT/'nbs'/'paper'/'figures.ipynb', results_dir=str(tmp_path), only='dashboard')
