"One arm through the recipe's own files, in one process and in two: the same losses, the same files."
import json, os, re, subprocess, sys, time
from dataclasses import asdict, fields
from pathlib import Path
import pandas as pd
import pytest, torch
from conftest import ROOT
from yfpo.lab.arms import ARMS, BLUE, NEURONS, Arm, arm_contrasts
from yfpo.lab.launch import arm_parameters, failure_file, launch_arm, neurons_of, train_arm
from yfpo.lab.recipes import read_recipe
from yfpo.lab.publish import run_here
from yfpo.lab.stages import stage_files
from yfpo.neurons import NeuronSet, contrast_set
from yfpo.relevance import Relevance
from yfpo.lm.models import load_model, save_model
from yfpo.data.pairs import pairs_from_corruption, save_pairs
from yfpo.data.templates import make_problems
from yfpo.data.files import write_jsonl
from yfpo.lm.training import NotFiniteError
from yfpo.trainer import YFPOConfig
from test_trainer import some_neurons

TRAIN = dict(neuron_weight=.5, learning_rate=1e-3, num_train_epochs=1., per_device_train_batch_size=2)
SETTINGS = dict(train=TRAIN, precision='float32', moves=dict(every=.3, warmup=.2, n_select=2, per_layer=.5))

@pytest.fixture
def ready(tiny, tmp_path):
    "A run folder with what the earlier stages leave"
    problems = make_problems(12, seed=1)
    pairs, _ = pairs_from_corruption(problems, seed=0)
    write_jsonl(tmp_path/'problems'/'select.jsonl', [asdict(p) for p in problems[:4]])
    save_pairs(tmp_path/'pairs'/'train.jsonl', pairs[:6])
    save_model(*tiny, tmp_path/'sft'/'model')
    some_neurons(tiny[0]).save(tmp_path/'neurons'/'selected')
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    for name, x in (('capability', values), ('mean-abs', values.abs())):
        Relevance(x.clone(), torch.stack([x, x]), x.clone(), x.clone(), 4).save(tmp_path/'neurons'/f'{name}.safetensors')
    return tmp_path

@pytest.mark.parametrize('arm', ARMS)
def test_an_arm(ready, arm):
    log = train_arm(ready, 'smoke', arm, 0, **SETTINGS)
    seen = pd.read_csv(ready/'results'/'training'/f'{arm}-seed0.csv')
    assert len(log) == 3 and seen.loss.tolist() == pytest.approx([r['loss'] for r in log], rel=1e-5)
    model, _ = load_model(str(ready/'train'/f'{arm}-seed0'/'model'))
    start, _ = load_model(str(ready/'sft'/'model'))
    assert any((a != b).any() for a, b in zip(model.state_dict().values(), start.state_dict().values()))
    assert (ready/'results'/'moves').exists() == (ARMS[arm].neurons == 'moving')
    assert not list((ready/'train'/f'{arm}-seed0').glob('.model*')) and list((ready/'train'/'reference').glob('*.safetensors'))

def test_a_row_is_an_arm(ready, monkeypatch):
    "Its settings reach the trainer, and it is compared and recipes take it, though the recipe's own fields say otherwise"
    monkeypatch.setitem(ARMS, 'slow', Arm('DPO, slow', BLUE, 'half the rate', train=dict(neuron_weight=0.), times=dict(learning_rate=.5)))
    own, slow = (train_arm(ready, 'smoke', arm, 0, **SETTINGS) for arm in ('dpo', 'slow'))
    assert slow[0]['learning_rate'] == own[0]['learning_rate']/2 > 0 and slow[0]['loss'] == own[0]['loss']
    assert ('slow', 'dpo') in arm_contrasts()

def test_a_control_differs_from_yfpo_in_one_thing(ready):
    net, _ = load_model(str(ready/'sft'/'model'))
    def set_of(arm, seed=3): return neurons_of(arm, seed, ready, 'smoke', net)
    own, signs = set_of('yfpo'), Relevance.load(ready/'neurons'/'capability.safetensors').weighted
    assert own == NeuronSet.load(ready/'neurons'/'selected') == set_of('dpo') == set_of('dpo-diluted') == set_of('yfpo-literal')
    top = set_of('yfpo-top')
    assert top != own and top.meta['selector'].endswith('-top') and set_of('yfpo-top', 5) == top
    how = {k: own.meta[k] for k in ('k', 'per_layer', 'universal') if k in own.meta}
    assert top == contrast_set(Relevance.load(ready/'neurons'/'capability.safetensors'), None, net, **how)
    reversed_ = set_of('yfpo-reversed')
    assert torch.equal(reversed_.direction, -own.direction) and torch.equal(reversed_.index, own.index)
    for arm in ('yfpo-random', 'yfpo-activation-matched'):
        c = set_of(arm)
        assert torch.equal(c.layer, own.layer) and torch.equal(c.weight, own.weight) and not torch.equal(c.index, own.index)
        assert torch.equal(c.direction, torch.where(signs[c.layer, c.index] < 0, -1., 1.)) and set_of(arm, 4) != c == set_of(arm)

def test_neurons_of_a_new_kind_are_made_or_refused(ready, monkeypatch):
    "A word alone does not train the selected neurons under another name"
    with pytest.raises(ValueError, match="or add one; see `neurons_of`"): Arm('YFPO (half)', BLUE, 'half of them', neurons='half')
    monkeypatch.setattr('yfpo.lab.arms.NEURONS', (*NEURONS, 'half'))
    monkeypatch.setitem(ARMS, 'yfpo-half', Arm('YFPO (half)', BLUE, 'half of them', neurons='half'))
    with pytest.raises(ValueError, match="yfpo-half rewards neurons of the kind 'half'"): neurons_of('yfpo-half', 0, ready, 'smoke', None)

@pytest.mark.parametrize('arm', ['yfpo', 'yfpo-random', 'yfpo-literal', 'yfpo-reversed'])
def test_every_arm_gets_the_dose(ready, arm):
    "On the reference, the neuron term's gradient is that share of DPO's; measured a second time, while training at rate 0"
    how = dict(SETTINGS, dose=.7, dose_batches=3, gradients=1)
    how['train'] = {**TRAIN, 'learning_rate': 0.}
    log = train_arm(ready, 'smoke', arm, 0, **how)
    ratio = sum(r['gradients/neurons'] for r in log)/sum(r['gradients/preference'] for r in log)
    assert len(log) == 3 and ratio == pytest.approx(.7, rel=.02)
    noted = json.loads((ready/'results'/'dose'/f'{arm}-seed0.json').read_text())
    assert noted['neuron_weight'] == noted['weight'] > 0 and noted['n'] == 3 and 0 < noted['kept'] < 1.5

def test_the_weighing_arm_weighs_pairs_by_the_policys_own_margin(ready):
    "No dose, and no gradient through neurons: at the start all pairs weigh the same, so the gradient is that of DPO"
    log = train_arm(ready, 'smoke', 'yfpo-weighing', 0, **SETTINGS, dose=.7, gradients=1)
    plain = train_arm(ready, 'smoke', 'dpo', 0, **SETTINGS)
    assert not (ready/'results'/'dose'/'yfpo-weighing-seed0.json').exists() and 'gradients/neurons' not in log[0]
    assert log[0]['grad_norm'] == pytest.approx(plain[0]['grad_norm'], rel=1e-3) and log[-1]['loss'] != plain[-1]['loss']
    assert all(r['neurons/weight'] == 1. for r in log if 'neurons/weight' in r)

def test_the_diluted_arm_is_slower_dpo(ready):
    how = dict(SETTINGS, dose=2., dose_batches=2)
    log, plain = (train_arm(ready, 'smoke', arm, 0, **how) for arm in ('dpo-diluted', 'dpo'))
    noted = json.loads((ready/'results'/'dose'/'dpo-diluted-seed0.json').read_text())
    assert noted['neuron_weight'] == 0 and .2 < noted['kept'] < .8 and not (ready/'results'/'dose'/'dpo-seed0.json').exists()
    rates = [a['learning_rate']/b['learning_rate'] for a, b in zip(log, plain) if b['learning_rate']]
    assert rates == pytest.approx([noted['kept']]*len(rates), rel=1e-4) and log[0]['loss'] == plain[0]['loss']

def test_measuring_changes_nothing(ready):
    "The order of the pairs and every loss are those of a training at that weight, on which nothing was measured"
    dosed = train_arm(ready, 'smoke', 'yfpo', 0, **SETTINGS, dose=.7, dose_batches=2, gradients=1)
    weight = json.loads((ready/'results'/'dose'/'yfpo-seed0.json').read_text())['weight']
    plain = train_arm(ready, 'smoke', 'yfpo', 0, **dict(SETTINGS, train={**TRAIN, 'neuron_weight': weight}))
    assert [r['loss'] for r in dosed] == [r['loss'] for r in plain] and [r['grad_norm'] for r in dosed] == [r['grad_norm'] for r in plain]
    assert 'gradients/cosine' in dosed[0] and 'gradients/cosine' not in plain[0]

def test_the_stage_promises_a_dose_where_one_is_taken():
    "The gradient of `yfpo-weighing` goes through no neuron, and a weight of 0 stays 0; the diluted arm takes its rate from the dose"
    def doses(**params):
        files = {a: stage_files(ROOT/'nbs'/'paper'/'stages'/'train.ipynb', dict(params, arm=a), 'train')[1] for a in ARMS}
        return {a for a, f in files.items() if f'results/dose/{a}-seed0.json' in f}
    assert doses() == set() and doses(dose=.5) == {*ARMS} - {'dpo', 'yfpo-weighing'}
    assert doses(dose=.5, train=dict(neuron_weight=0.)) == {'dpo-diluted'}

@pytest.mark.parametrize('arm', ARMS)
def test_what_an_arm_says_can_be_done(arm):
    a = ARMS[arm]
    assert {*a.train, *a.times} <= {f.name for f in fields(YFPOConfig)} and {*a.against} <= {'sft', *ARMS} - {arm} and a.against
    assert re.fullmatch(r'#[0-9A-F]{6}', a.color) and [k for k, b in ARMS.items() if (b.name, b.color) == (a.name, a.color)] == [arm]
    assert read_recipe('smoke').model_validate({**read_recipe('smoke').model_dump(), 'arms': [arm]}).arms == [arm]

def test_two_processes_take_the_same_steps(ready):
    one = train_arm(ready, 'smoke', 'yfpo', 0, **SETTINGS)
    first = {k: v.clone() for k, v in load_model(str(ready/'train'/'yfpo-seed0'/'model'))[0].state_dict().items()}
    two = launch_arm(2, ready, 'smoke', 'yfpo', 0, **SETTINGS)
    assert [r['loss'] for r in two] == pytest.approx([r['loss'] for r in one], abs=2e-4)
    for k, v in load_model(str(ready/'train'/'yfpo-seed0'/'model'))[0].state_dict().items(): assert (v - first[k]).abs().max() < 2e-3, k

def test_each_of_many_processes_says_what_it_writes(tmp_path):
    "Whatever the training writes is in the step's list: the dose too, which an earlier try may have made as well"
    (tmp_path/'spec.json').write_text(json.dumps(dict(run=str(tmp_path))))
    code = """import sys
from pathlib import Path
from yfpo.lab import launch
def train_arm(run):
    for f in ('dose/yfpo-seed0.json', 'training/yfpo-seed0.csv'):
        (Path(run)/'results'/f).parent.mkdir(parents=True); (Path(run)/'results'/f).write_text('')
launch.train_arm = train_arm
launch.arm_command(['--spec', sys.argv[1]])"""
    env = {**os.environ, 'YFPO_RUN': str(tmp_path), 'YFPO_WRITES': str(tmp_path/'writes'), 'RANK': '1'}
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'spec.json')], env=env, check=True)
    made = [str(tmp_path/'results'/f) for f in ('dose/yfpo-seed0.json', 'training/yfpo-seed0.csv')]
    assert (tmp_path/'writes').read_text().split() == made

def test_what_goes_wrong_is_one_sentence(ready):
    with pytest.raises(ValueError, match='unknown'): train_arm(ready, 'smoke', 'ppo', 0)
    (ready/'pairs'/'train.jsonl').unlink()
    with pytest.raises(FileNotFoundError, match='--until pairs'): train_arm(ready, 'smoke', 'dpo', 0)
    with pytest.raises(ValueError, match=r'2 processes: .*until pairs.*launch.log'): launch_arm(2, ready, 'smoke', 'dpo', 0, **SETTINGS)

def files(folder): return {p: p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

@pytest.mark.parametrize('processes', [1, 2])
def test_an_arm_that_is_not_finite_leaves_the_earlier_one_and_a_mark(ready, processes):
    def train(**kw):
        given = dict(SETTINGS, train={**TRAIN, **kw})
        return train_arm(ready, 'smoke', 'yfpo', 0, **given) if processes == 1 else launch_arm(2, ready, 'smoke', 'yfpo', 0, **given)
    train()
    model, log = ready/'train'/'yfpo-seed0'/'model', ready/'results'/'training'
    before = files(model), files(log)
    with pytest.raises(NotFiniteError, match=r'^the (loss|gradient norm) is (nan|inf) at step \d, on the pairs templates-') as e:
        train(learning_rate=1e7)
    assert (files(model), files(log)) == before and not list(model.parent.glob('.model*'))
    assert json.loads(failure_file(ready, 'yfpo', 0).read_text()) == dict(arm='yfpo', seed=0, why=str(e.value))
    train()
    assert not failure_file(ready, 'yfpo', 0).exists() and files(model).keys() == before[0].keys()

def test_the_stage_is_not_done_when_its_arm_is_not_finite(ready):
    "The cells of the stage as they are end with the sentence, and leave a mark and no log"
    with pytest.raises(NotFiniteError, match=r'^the .* at step \d'):
        run_here(ROOT/'nbs'/'paper'/'stages'/'train.ipynb', run_dir=str(ready), arm='yfpo', train={**TRAIN, 'learning_rate': 1e7},
                 precision='float32')
    assert failure_file(ready, 'yfpo', 0).exists() and not (ready/'results'/'training').exists()
    run_here(ROOT/'nbs'/'paper'/'stages'/'train.ipynb', run_dir=str(ready), arm='dpo', train=TRAIN, precision='float32')
    assert [p.name for p in (ready/'results'/'training').iterdir()] == ['dpo-seed0.csv']

@pytest.mark.skipif(not Path('/proc').exists(), reason='looks at /proc')
def test_the_processes_of_an_arm_die_with_its_step(ready):
    "kill -9 of the kernel, and nothing goes on writing into the run"
    code = f"from yfpo.lab.launch import launch_arm; launch_arm(2, {str(ready)!r}, 'smoke', 'yfpo', 0, train=dict(num_train_epochs=1000.))"
    p = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'YFPO_STEP': 'train/k', 'OMP_NUM_THREADS': '1'})
    def workers(): return subprocess.run(['pgrep', '-f', f'yfpo.lab.launch --spec {ready}'], capture_output=True, text=True).stdout.split()
    deadline = time.time() + 120
    while len(workers()) < 3 and time.time() < deadline and p.poll() is None: time.sleep(.2)
    assert len(workers()) >= 3, 'the launcher and its two processes'
    p.kill(); p.wait()
    deadline = time.time() + 20
    while workers() and time.time() < deadline: time.sleep(.2)
    assert not workers()

def test_by_hand_from_a_recipe(ready):
    def launch(*args):
        return subprocess.run([sys.executable, '-m', 'yfpo.lab.launch', '--recipe', 'smoke', '--arm', 'yfpo', *args], capture_output=True,
                              text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'YFPO_RUN': str(ready),
                                                     'YFPO_WRITES': str(ready/'writes')})
    r = launch('--run-dir', str(ready))
    assert r.returncode == 1 and '--until gate' in r.stderr, 'smoke takes its settings from the gate'
    (ready/'gate').mkdir(); (ready/'gate'/'chosen.json').write_text(json.dumps(dict(learning_rate=2e-3, clip=4.)))
    r = launch('--run-dir', str(ready))
    assert r.returncode == 0, r.stderr[-1500:]
    assert pd.read_csv(ready/'results'/'training'/'yfpo-seed0.csv').learning_rate.max() == pytest.approx(2e-3)
    assert (ready/'train'/'yfpo-seed0'/'model'/'config.json').exists()
    listed = {Path(l).name for l in (ready/'writes').read_text().splitlines() if not l.startswith('< ')}
    assert 'yfpo-seed0.csv' in listed and any(n.startswith(('model', 'config')) for n in listed), listed
    r = launch('--seed', '7')
    assert r.returncode == 1 and 'trains no yfpo at seed 7' in r.stderr and 'Traceback' not in r.stderr

CONFIGS = ROOT/'nbs'/'paper'/'profiles'/'accelerate'

@pytest.mark.parametrize('name, processes', [('one-gpu', 1), ('several-gpus', 2)])
def test_the_configurations_of_accelerate(ready, name, processes):
    "As one types it, on processes of the CPU in place of GPUs: the losses of one process"
    one = train_arm(ready, 'smoke', 'yfpo', 0, **SETTINGS)
    spec = ready/'spec.json'
    spec.write_text(json.dumps(dict(run=str(ready), recipe='smoke', arm='yfpo', seed=0, **SETTINGS)))
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(CONFIGS/f'{name}.yaml'), '--main_process_port', '0',
               '--module', 'yfpo.lab.launch', '--spec', str(spec)]
    r = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert r.returncode == 0, r.stderr[-1500:]
    seen = pd.read_csv(ready/'results'/'training'/'yfpo-seed0.csv')
    assert seen.loss.tolist() == pytest.approx([x['loss'] for x in one], abs=2e-4)
    spec.write_text(json.dumps(dict(run=str(ready), recipe='smoke', arm='yfpo', seed=0, train={**TRAIN, 'per_device_train_batch_size': 3})))
    r = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert ('3 pairs, which 2 processes cannot share' in r.stderr) == (processes == 2), r.stderr[-1500:]

def test_a_configuration_of_accelerate_in_a_recipe(ready, monkeypatch):
    "The stage hands it on, and its content is in the step's key"
    from yfpo.lab.keys import input_hashes
    from yfpo.lab.publish import run_here
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true'); monkeypatch.setenv('OMP_NUM_THREADS', '1')
    nb = ROOT/'nbs'/'paper'/'stages'/'train.ipynb'
    how = dict(run_dir=str(ready), recipe='smoke', arm='yfpo', seed=0, train=TRAIN)
    one = run_here(nb, **how)['log']
    given = dict(processes=2, accelerate='nbs/paper/profiles/accelerate/several-gpus.yaml')
    two = run_here(nb, **how, **given)['log']
    assert [r['loss'] for r in two] == pytest.approx([r['loss'] for r in one], abs=2e-4)
    assert len(input_hashes(given)['accelerate']) == 64
    (odd := ready/'odd.yaml').write_text('distributed_type: NOSUCH\n')
    with pytest.raises(ValueError, match='whole log'): run_here(nb, **how, processes=2, accelerate=str(odd))       # so it is read
    with pytest.raises(FileNotFoundError, match='accelerate is nosuch.yaml, which is no file: give one, such as'):
        run_here(nb, **how, processes=2, accelerate='nosuch.yaml')

def test_uneven_shares_are_refused(ready, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(ValueError, match='4 processes cannot share'): train_arm(ready, 'smoke', 'dpo', 0,
                                                                                train=dict(per_device_train_batch_size=6))

SMALL = dict(k=.1, per_layer=.2, max_new_tokens=12, max_length=512, n_samples=2, ks=[1, 2], processes=2, train_set='templates',
             test_sets=['templates'],
             pair_source='both', n_sft=16, n_select=12, n_pairs=12, n_general=12, batch_size=4, learning_rate=1e-3, fractions=[.05, .2])

def test_the_full_recipe_on_the_tiny_model(tmp_path):
    "The recipe for one GPU and more, scaled down: the same stages and parameters, two processes of accelerate launch, its estimate first"
    r = read_recipe('gsm8k-full').model_dump(exclude_none=True, exclude={'extends', 'without'})
    kept = ('problems', 'sft', 'responses', 'pairs', 'neurons', 'train', 'evaluate', 'browse', 'compare')      # smoke runs the others
    def small(k, v): return SMALL[k] if k in SMALL else min(v, 6) if type(v) is int else v
    train = dict(learning_rate=1e-3, num_train_epochs=1., per_device_train_batch_size=4)
    r |= dict(name='scaled', shared=dict(model='tiny', data_dir='', seed=0, train=train), arms=['yfpo', 'yfpo-dynamic'], seeds=[0], jobs=2,
              outputs=dict(tables=['main']),
              stages={s: {k: small(k, v) for k, v in p.items()} for s, p in r['stages'].items() if s in kept})
    r['stages']['train'] = dict(processes=2, moves=dict(per_layer=.2, n_select=6))
    r['stages']['compare'] = dict(family=['yfpo-dynamic - yfpo'], outcome=['templates', 'nll_gold'])
    f = tmp_path/'scaled.yaml'
    f.write_text(json.dumps(r))                                # JSON is YAML
    done = subprocess.run([Path(sys.executable).parent/'yfpo', 'run', str(f), '--run-dir', str(tmp_path/'run')], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert 'Estimate for scaled on one NVIDIA H100' in done.stdout and '**Table.**' in done.stdout
    log = (tmp_path/'run'/'train'/'yfpo-dynamic-seed0'/'launch.json')
    assert log.exists() and (tmp_path/'run'/'results'/'moves'/'yfpo-dynamic-seed0.csv').exists()
    assert 'pass@2' in (tmp_path/'run'/'results'/'tables'/'sampled.md').read_text()
    assert {'pass_1', 'pass_2', 'majority_2'} <= {l.split(',')[4] for l in (tmp_path/'run'/'results'/'main.csv').read_text().splitlines()}

def test_the_recipe_for_a_gpu_on_the_tiny_model(tmp_path):
    "which-neurons-large with 2 training pairs and 2 steps an arm: every stage and arm of it, first of all the checks of the device"
    r = read_recipe('which-neurons-large').model_dump(exclude_none=True, exclude={'extends', 'without'})
    few = dict(n_select=12, n_sft=16, n_questions=12, n_pairs=12, n_dev=4, n_test=4, n_samples=2, max_train=2, max_dev=2, k=.1,
               per_layer=.2, n_general=12, n_draws=3, dose_batches=1, n_prose=3, n_choices=4, steps=2, rounds=2, reward_rounds=2,
               shapes=[[20, 8]], shape_pairs=2, learning_rates=[1e-3], likelihoods=[0., 1.], learning_rate=1e-3, batch_size=4)
    for stage, given in r['stages'].items(): given.update({k: few[k] for k in given if k in few})
    r['stages']['gate']['by'] = 'nll'                          # a random model answers nothing
    r['stages']['pairs']['pair_source'] = 'both'
    r['shared'] |= dict(model='tiny', max_new_tokens=8, train=dict(num_train_epochs=1., per_device_train_batch_size=1))
    f = tmp_path/'scaled.yaml'
    f.write_text(json.dumps(dict(r, name='scaled', seeds=[0, 1, 2], jobs=2)))
    command = [Path(sys.executable).parent/'yfpo', 'run', str(f), '--run-dir', str(tmp_path/'run')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr
    results = tmp_path/'run'/'results'
    logs = [pd.read_csv(results/'training'/f'{a}-seed{s}.csv') for a in r['arms'] for s in (0, 1, 2)]
    assert len(logs) == 21 and {len(log) for log in logs} == {2}
    assert (pd.read_csv(results/'device.csv').holds == 1).all() and (results/'bench_step.csv').exists()
    said = set(pd.read_csv(results/'contrasts.csv').contrast)
    assert {'yfpo - yfpo-random', 'yfpo - dpo-diluted', 'yfpo - yfpo-reversed', 'yfpo - dpo'} <= said

def test_the_benchmark_runs_under_the_engine(tmp_path):
    "Every stage of bench but lm-evaluation-harness's, on the tiny model: what each writes is what it declares"
    how = dict(bench_step=dict(rounds=1, reward_rounds=1, dtypes=['float32'], rejected=['other'], shapes=[[20, 8]]),
               bench_relevance=dict(dtypes=['float32']), bench_losses=dict(steps=2, shapes=[[20, 8]]),
               bench_scaling=dict(responses=[6], sizes=[.1], widths=[32], processes=[1]))
    assert {f'bench_{k}' for k in ('generation', 'summary')} | how.keys() == read_recipe('bench').stages.keys()
    f = tmp_path/'scaled.yaml'
    f.write_text(json.dumps(dict(name='scaled', shared=dict(model='tiny', data_dir=''), stages=how)))
    command = [Path(sys.executable).parent/'yfpo', 'run', str(f), '--run-dir', str(tmp_path/'run')]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-800:] + done.stderr
    assert {f.stem for f in (tmp_path/'run'/'results').glob('bench_*.csv')} == how.keys()
    times = pd.read_csv(tmp_path/'run'/'results'/'bench_scaling.csv')
    assert times[times.axis == 'pairs'].x.tolist() == [1, 2] and (times.seconds > 0).all()
