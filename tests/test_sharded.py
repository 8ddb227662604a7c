"Weights in parts on two processes (FSDP2): the same losses, weights and files as in one process that holds all"
import json, os, subprocess, sys, warnings
from types import SimpleNamespace
import pytest, torch, yaml
from safetensors.torch import load_file
from conftest import ROOT
from test_trainer import PAIRS, column, config, make, run
from yfpo.lm.models import fingerprint, gathered, load_model, sharded, unwrap, whole
from yfpo.lab.launch import launch_arm
from yfpo.lm.training import whole_checkpoint
from yfpo.trainer import YFPOTrainer, _check_shards

FSDP2 = ROOT/'nbs'/'paper'/'profiles'/'accelerate'/'fsdp2.yaml'
# accelerate shards on accelerators only: here a group of CPU processes is taken for one of them
SCRIPT = '''
import json, sys
from pathlib import Path
import accelerate.state as S
before = S.PartialState.__init__
def init(self, *args, **kwargs):
    before(self, *args, **kwargs)
    if self._shared_state.get('distributed_type') == S.DistributedType.MULTI_CPU:
        self._shared_state['distributed_type'] = S.DistributedType.MULTI_GPU
S.PartialState.__init__ = init
sys.path.insert(0, {tests!r})
from test_trainer import column, make, load_model, torch, PAIRS
from transformers import TrainerCallback
torch.set_num_threads(1)
kw, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
resume, changed, more = kw.pop('resume', None), kw.pop('changed', False), dict(eval_dataset=PAIRS[:4])
net, tok = load_model('tiny')
if changed: net.model.layers[0].mlp.down_proj.weight.data += .25           # no longer what its name stands for
if kw.pop('lora', False):
    from peft import LoraConfig
    more['peft_config'] = LoraConfig(r=4, target_modules=['down_proj', 'q_proj'], task_type='CAUSAL_LM')
t = make((net, tok), folder, per_device_train_batch_size=1, use_cpu=True, trainer_kw=more, **kw)
taken = []
class Count(TrainerCallback):
    def on_step_end(self, *args, **kwargs): taken.append(1)
t.add_callback(Count())
t.train(resume_from_checkpoint=resume)
said = t.evaluate()
t.save_model(str(folder/'model'))
if t.is_world_process_zero():
    kind = [t.accelerator.num_processes, t.is_fsdp_enabled, type(next(t.model_wrapped.parameters())).__name__, len(taken)]
    logged = [column(t, k) for k in ('loss', 'neurons/margins', 'rewards/margins')]
    (folder/'log.json').write_text(json.dumps([kind, said['eval_loss'], *logged]))
'''
KEYS = 'loss', 'neurons/margins', 'rewards/margins'

def sharded_run(place, folder, config=FSDP2, **kw):
    script = place/'script.py'
    script.write_text(SCRIPT.format(tests=str(ROOT/'tests')))
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', str(config), '--main_process_port', '0', str(script),
               json.dumps(kw), str(folder)]
    r = subprocess.run(command, capture_output=True, text=True, cwd=place, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=300)
    return r, json.loads((folder/'log.json').read_text()) if r.returncode == 0 else None

@pytest.mark.parametrize('kw', [dict(), dict(anchor_weight=0.1, objective='yoked'), dict(precompute_ref_log_probs=True), dict(lora=True)])
def test_shards_give_the_losses_and_the_model_of_one_process(tiny, tmp_path, kw):
    kw = dict(neuron_weight=0.5, max_steps=3, **kw)
    r, found = sharded_run(tmp_path, tmp_path/'two', **kw)
    assert r.returncode == 0, r.stderr[-2000:]
    kind, loss, *two = found
    assert kind == [2, True, 'DTensor', 3] and 'prompts are not shared' in r.stderr
    more = dict(eval_dataset=None)
    if kw.pop('lora', False):
        from peft import LoraConfig
        more['peft_config'] = LoraConfig(r=4, target_modules=['down_proj', 'q_proj'], task_type='CAUSAL_LM')
    one = run(tiny, tmp_path/'one', per_device_train_batch_size=2, trainer_kw=more, **kw)
    for k, values in zip(KEYS, two): assert values == pytest.approx(column(one, k), abs=2e-5), k
    one.save_model(str(tmp_path/'one'/'model'))
    weights = [load_file(next((tmp_path/x/'model').glob('*.safetensors'))) for x in ('one', 'two')]
    shared = weights[0].keys() & weights[1].keys()
    assert len(shared) >= len(weights[0]) - 1                  # a tied head may be written once or twice
    for k in shared: torch.testing.assert_close(weights[0][k], weights[1][k], atol=2e-5, rtol=0)
    net, _ = load_model(str(tmp_path/'two'/'model'))           # an adapter finds its base beside it, with the hash it was given
    assert all(p.isfinite().all() for p in net.parameters())
    assert {f.name for f in (tmp_path/'two'/'model').iterdir()} >= {'neurons', 'reward'}

@pytest.mark.parametrize('lora', [False, True])
def test_a_sharded_training_goes_on_from_its_checkpoint(tmp_path, lora):
    kw = dict(neuron_weight=0.5, max_steps=3, save_strategy='steps', save_steps=2, lora=lora)
    r, whole_run = sharded_run(tmp_path, tmp_path/'a', **kw)
    assert r.returncode == 0, r.stderr[-2000:]
    weights = load_file(next((tmp_path/'a'/'model').glob('*.safetensors')))
    r, again = sharded_run(tmp_path, tmp_path/'a', resume=str(tmp_path/'a'/'checkpoint-2'), **kw)
    assert r.returncode == 0, r.stderr[-2000:]
    assert again[1:] == whole_run[1:] and (again[0][-1], whole_run[0][-1]) == (1, 3)
    found = load_file(next((tmp_path/'a'/'model').glob('*.safetensors')))
    assert all(torch.equal(weights[k], found[k]) for k in weights)

def test_the_base_of_an_adapter_is_saved_whole(tiny, tmp_path):
    "It is not the model of its name, so it lies beside the adapter, gathered from both processes"
    r, _ = sharded_run(tmp_path, tmp_path/'a', neuron_weight=0.5, max_steps=1, lora=True, changed=True)
    assert r.returncode == 0, r.stderr[-2000:]
    base, own = load_file(tmp_path/'a'/'model'/'base'/'model.safetensors'), dict(tiny[0].named_parameters())
    at = 'model.layers.0.mlp.down_proj.weight'
    assert own.keys() == base.keys() and torch.equal(base[at], own[at] + .25)
    assert all(torch.equal(base[k], own[k]) for k in base if k != at)
    assert unwrap(load_model(str(tmp_path/'a'/'model'))[0]).model.layers[0].mlp.down_proj.base_layer.weight.equal(base[at])

def test_what_shards_cannot_do_is_refused(tiny, tmp_path, monkeypatch):
    from yfpo.beyond.dose import fit_dose
    from yfpo.beyond.dynamic import DynamicSelection
    from yfpo.beyond.monitors import Monitor
    from yfpo.data.problems import Problem
    t = make(tiny, tmp_path, neuron_weight=0.5)
    monkeypatch.setattr(t, 'is_fsdp_enabled', True)
    with pytest.raises(ValueError, match='not selected anew where weights are sharded'):
        DynamicSelection(t, tiny[1], [('', 'a')], [('', 'b')])
    with pytest.raises(ValueError, match='no answers where weights are sharded'):
        Monitor(t, tiny[1], [Problem('a', 'x', '1', '1', 'x', {})])
    with pytest.raises(ValueError, match='a dose is not measured on sharded weights'): fit_dose(t, .5)

@pytest.mark.parametrize('version, kind, reads, words', [
    (1, 'FULL_STATE_DICT', True, 'FSDP 1 hides'), (1, 'FULL_STATE_DICT', False, ''), (2, 'FULL_STATE_DICT', True, ''),
    (2, 'SHARDED_STATE_DICT', True, 'is no folder of weights: set fsdp_state_dict_type')])
def test_kinds_of_fsdp(version, kind, reads, words):
    args = SimpleNamespace(share_prompts=True)
    with pytest.raises(ValueError, match=words) if words else warnings.catch_warnings(record=True):
        _check_shards(SimpleNamespace(fsdp_version=version, state_dict_type=kind), args, reads)
    assert args.share_prompts == bool(words)

def test_zero_3_is_refused_before_a_model_is_loaded(tiny, tmp_path):
    neurons, args = make(tiny, tmp_path).neurons, config(tmp_path)
    for stage in (2, 3):
        args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
        with pytest.raises((ValueError, OSError), match='ZeRO 3 hides the weights' if stage == 3 else 'no-such-model'):
            YFPOTrainer('no-such-model', args=args, train_dataset=PAIRS, neurons=neurons)

@pytest.mark.parametrize('files, whole', [(['optimizer.bin', 'scheduler.pt'], True), (['optimizer.bin'], False), (['global_step4/x'], True),
                                          (['optimizer.pt', 'scheduler.pt'], True), (['optimizer.pt'], False)])
def test_what_a_whole_checkpoint_has(tmp_path, files, whole):
    "As FSDP, DeepSpeed (whose own scheduler is in its folder) and a plain training write it"
    for f in ('rng_state_0.pth', 'rng_state_1.pth', *files):
        (tmp_path/f).parent.mkdir(exist_ok=True)
        torch.save({}, tmp_path/f)
    assert not whole_checkpoint(tmp_path, 2, True), 'trainer_state.json is written last'
    (tmp_path/'trainer_state.json').write_text('{}')
    assert whole_checkpoint(tmp_path, 2, True) == whole

@pytest.mark.parametrize('options, many', [((), True), (('--config_file', 'fsdp2.yaml'), False)])
def test_a_configuration_says_itself_how_processes_share(tmp_path, monkeypatch, options, many):
    "With --multi_gpu beside it, accelerate forgets FSDP"
    def ran(command, **kw): seen.extend(command); return SimpleNamespace(returncode=1, stderr='', stdout='')
    seen, _ = [], monkeypatch.setattr(subprocess, 'run', ran)
    with pytest.raises(ValueError, match='ended with code 1'): launch_arm(2, tmp_path, 'smoke', 'yfpo', 0, options=options)
    assert ('--multi_gpu' in seen) == many and all(o in seen for o in options)

def test_a_whole_model_is_left_as_it_is(tiny):
    net, before = tiny[0], fingerprint(tiny[0])
    with gathered(net): assert not sharded(net)
    w = net.get_input_embeddings().weight
    assert whole(w) is w and fingerprint(net) == before

def test_the_profile_asks_for_what_is_tested():
    found = yaml.safe_load(FSDP2.read_text())
    assert found['distributed_type'] == 'FSDP' and found['fsdp_config']['fsdp_version'] == 2 and found['num_processes'] == 2
