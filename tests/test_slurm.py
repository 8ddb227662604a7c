"A recipe on a real SLURM of one node: the same command, the same bytes, arms beside each other, a cancelled job run again."
import os, shutil, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import ROOT
from test_run import make

def answers(*command):
    try: return subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired): return None

def ready():
    "Whether a SLURM answers here, and Snakemake can speak to it"
    r = answers('sinfo', '-h', '-o', '%a')
    try: import snakemake_executor_plugin_slurm
    except ImportError: return False
    return bool(r and r.returncode == 0 and 'up' in r.stdout)

pytestmark = pytest.mark.skipif(not ready(), reason='no SLURM here: .ci/slurm starts one of one node')

@pytest.fixture(scope='module')
def profile(tmp_path_factory):
    "The committed profile; a SLURM without accounting is asked through squeue"
    folder = shutil.copytree(ROOT/'nbs'/'paper'/'profiles'/'slurm', tmp_path_factory.mktemp('profile')/'slurm')
    r = answers('sacct')
    if not r or r.returncode:
        with open(folder/'config.yaml', 'a') as f: f.write('slurm-status-command: squeue\n')
    return folder

def yfpo(*args, **env):
    return subprocess.run([Path(sys.executable).parent/'yfpo', *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})

def jobs():
    "(id, state, what for) of every job that SLURM remembers"
    out = answers('squeue', '-h', '-t', 'all', '-o', '%A %T %k').stdout
    return [l.split(None, 2) for l in out.splitlines()]

def small(tmp_path):
    "A recipe of the smoke stages up to training and comparison, by path"
    (tmp_path/'spread.yaml').write_text('name: spread\nextends: smoke\narms: [dpo, yfpo]\nseeds: [0]\nwarm_starts: 1\n'
        'without: [audit, causal, selectors, stability, faithfulness, capability, cards, grid, dynamic, zoo, overoptimisation, parts, '
        'hacks, breakage, browse]\nstages: {gate: {starts: 1}, '
        'compare: {family: [yfpo - dpo]}}\noutputs: {tables: [main], figures: [contrasts]}\n')
    return tmp_path/'spread.yaml'

def numbers(run):
    folders = [run/'results'/d for d in ('training', 'samples', 'eval', 'margins')]
    return {f.relative_to(run): f.read_bytes() for d in folders for f in d.iterdir()} | {
    f.name: f.read_bytes() for f in (run/'results').glob('*.csv')}

def test_a_recipe_gives_the_same_bytes_on_slurm(profile, tmp_path):
    recipe, before = small(tmp_path), {j[0] for j in jobs()}
    here = yfpo('run', recipe, '--run-dir', tmp_path/'here')
    there = yfpo('run', recipe, '--run-dir', tmp_path/'there', '--profile', profile)
    assert here.returncode == 0 and there.returncode == 0, here.stderr + there.stderr
    assert numbers(tmp_path/'here') == numbers(tmp_path/'there') and len(numbers(tmp_path/'here')) >= 10
    own = [what for i, state, what in jobs() if i not in before]
    assert {'rule_step_train_dpo_seed0', 'rule_step_train_yfpo_seed0'} <= set(own), 'one job an arm and seed'
    assert 'nothing to do' in yfpo('run', recipe, '--run-dir', tmp_path/'there', '--profile', profile).stdout

def test_a_cancelled_job_runs_again(profile, tmp_path):
    root = make(tmp_path/'repo')
    f = root/'nbs'/'paper'/'recipes'/'toy.yaml'
    f.write_text(f.read_text().replace('lr: 1e-3', 'lr: 1e-3, wait: 25'))
    before = {j[0] for j in jobs()}
    p = subprocess.Popen([Path(sys.executable).parent/'yfpo', 'run', 'toy', '--until', 'sft', '--profile', str(profile)],
                         stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env={**os.environ, 'YFPO_ROOT': str(root)})
    pid = root/'runs/toy/sft/pid'
    deadline = time.time() + 300
    while not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(.2)
    job, = [i for i, state, _ in jobs() if state == 'RUNNING' and i not in before]
    first = pid.read_text()
    subprocess.run(['scancel', job], check=True)
    out, _ = p.communicate(timeout=600)
    assert p.returncode == 0 and pid.read_text() != first and (root/'runs/toy/done/sft.json').exists(), out
