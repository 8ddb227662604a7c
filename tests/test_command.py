"Your own model and files: names in place of objects, select, train and audit as functions and as commands, the hub, trackers."
import copy, importlib, json, math, os, re, shutil, subprocess, sys, types
from pathlib import Path
os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1')
import pandas as pd, pytest, torch
from conftest import ROOT
from datasets import disable_progress_bars
from huggingface_hub.utils import filter_repo_objects
from test_trainer import PAIRS, column, config, some_neurons
from transformers import PrinterCallback, TrainerCallback
from yfpo.beyond.command import parse_training, read_pairs, read_texts, select, training
from yfpo.data.files import write_jsonl
from yfpo.data.templates import general_texts, make_problems
from yfpo.lab.audit import audit
from yfpo.lab.cli import main
from yfpo.lab.effect import effect
from yfpo.lab.results import read_results
from yfpo.lab.statistics import paired_bootstrap
from yfpo.lm.models import load_model, save_model
from yfpo.lm.responses import encode, response_logprobs
from yfpo.lm.training import load_policy
from yfpo.neurons import NeuronSet, control_sets, layer_matched, random_neurons
from yfpo.reward import READOUTS, RewardStats, fit_stats, pair_items, read_examples, reward_audit
from yfpo.trainer import YFPOTrainer

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')

@pytest.fixture(scope='module')
def place(tmp_path_factory, tiny):
    "A folder with a model, texts, pairs and a set of its neurons"
    d = tmp_path_factory.mktemp('yours')
    torch.set_num_threads(1)
    save_model(*tiny, d/'model')
    write_jsonl(d/'texts.jsonl', [dict(prompt=p.question + ' ', completion=p.solution) for p in make_problems(8, seed=1)])
    write_jsonl(d/'other.jsonl', [dict(text=t) for t in general_texts(24, seed=1, words=(120, 150))])
    write_jsonl(d/'pairs.jsonl', PAIRS)
    select(str(d/'model'), d/'texts.jsonl', d/'other.jsonl', d/'neurons', k=.06, per_layer=.2)
    return d

def yaml_of(place, folder, **settings):
    base = dict(model_name_or_path=place/'model', neurons=place/'neurons', dataset_name=place/'pairs.jsonl', output_dir=folder/'out',
                max_steps=2, learning_rate='1e-3', per_device_train_batch_size=2, disable_tqdm='true', logging_steps=1,
                activation_checkpointing='false')
    path = folder/'yfpo.yaml'
    path.write_text(''.join(f'{k}: {v}\n' for k, v in {**base, **settings}.items()))
    return str(path)

def said_by(*args):
    "What the command says as it ends with an error"
    with pytest.raises(SystemExit) as e: main([*map(str, args)])
    return str(e.value)

# --- end to end

@pytest.mark.parametrize('adapter', [{}, dict(use_peft='true', lora_r=4)], ids=['full', 'lora'])
def test_select_train_and_audit(place, tmp_path, capsys, adapter):
    files = dict(capability=place/'texts.jsonl', general=place/'other.jsonl')
    main(['select', '--model', str(place/'model'), *(x for k, v in files.items() for x in (f'--{k}', str(v))), '--to', str(tmp_path/'set'),
          '--k', '.06', '--per-layer', '.2'])
    *_, what, where = capsys.readouterr().out.splitlines()
    neurons = NeuronSet.load(tmp_path/'set')
    assert where == f'the set is in {tmp_path/"set"}: neurons.safetensors, neurons.json' and neurons == NeuronSet.load(place/'neurons')
    assert what.startswith(f'{len(neurons)} of 128 neurons (attnlrp-contrast, 8 capability and 8 general texts), most of them in layers ')
    main(['train', '--config', yaml_of(place, tmp_path, neurons=tmp_path/'set', **adapter), '--neuron_weight', '0.5'])
    *_, where = capsys.readouterr().out.splitlines()
    assert where == f'the model is in {tmp_path/"out"}, with `neurons/` and `reward/` beside the weights'
    assert NeuronSet.from_pretrained(tmp_path/'out') == neurons and len(RewardStats.load(tmp_path/'out'/'reward').mean) == len(neurons)
    assert (tmp_path/'out'/'adapter_config.json').exists() == bool(adapter) and 'λ = 0.5' in (tmp_path/'out'/'README.md').read_text()
    before, after = (load_model(str(f))[0] for f in (place/'model', tmp_path/'out'))
    ids = torch.tensor([[1, 5, 9, 30]])
    assert not torch.allclose(before(ids).logits, after(ids).logits)
    main(['audit', '--model', str(tmp_path/'out'), '--neurons', str(tmp_path/'out'), '--pairs', str(place/'pairs.jsonl'),
          '--to', str(tmp_path/'audit'), '--n-draws', '2'])
    *_, verdict, where = capsys.readouterr().out.splitlines()
    assert re.match(r'Reward audit\. The margin of the selected neurons picks .* in \d+ % of 6', verdict)
    assert where == f'the audit is in {tmp_path/"audit"}: audit.csv, audit.png' and (tmp_path/'audit'/'audit.png').stat().st_size > 10_000
    assert (read_results(tmp_path/'audit', 'audit').kind == 'layer-matched').sum() == 2*10
    main(['effect', '--before', str(place/'model'), '--after', str(tmp_path/'out'), '--pairs', str(place/'pairs.jsonl'),
          '--to', str(tmp_path/'effect')])
    *_, verdict, where = capsys.readouterr().out.splitlines()
    assert re.match(r'On 6 pairs the neuron margin changes by [+-]\d\.\d\d \[', verdict)
    assert where == f'the effect is in {tmp_path/"effect"}: effect.csv, effect.png'
    assert (tmp_path/'effect'/'effect.png').stat().st_size > 5_000

def test_as_processes_below_accelerate(place, tmp_path):
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'OMP_NUM_THREADS': '1'}
    env = {k: v for k, v in env.items() if k != 'TQDM_DISABLE'}
    def run(*args):
        r = subprocess.run([sys.executable, '-m', *map(str, args)], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert r.returncode == 0, r.stderr[-3000:]
        return r
    r = run('yfpo.lab.cli', 'select', '--model', place/'model', '--capability', place/'texts.jsonl', '--general', place/'other.jsonl',
            '--to', 'neurons', '--k', .06, '--per-layer', .2)
    assert r.stdout.splitlines()[-1].startswith('the set is in neurons') and '%|' in r.stderr, 'a bar is shown'
    config = yaml_of(place, tmp_path, neurons='neurons', output_dir='out', per_device_train_batch_size=1)
    r = run('accelerate.commands.launch', '--multi_gpu', '--num_machines', '1', '--num_processes', '2', '--mixed_precision', 'no',
            '--dynamo_backend', 'no', '--main_process_port', '0', '--module', 'yfpo.lab.cli', 'train', '--config', config, '--use_cpu')
    assert r.stdout.count('the model is in out') == 1 and NeuronSet.load(tmp_path/'out'/'neurons') == NeuronSet.load(place/'neurons')
    r = run('yfpo.lab.cli', 'audit', '--model', 'out', '--neurons', 'neurons', '--pairs', place/'pairs.jsonl', '--n-draws', 1,
            '--no-relevance')
    assert r.stdout.splitlines()[-1] == 'the audit is in audit: audit.csv, audit.png' and (tmp_path/'audit'/'audit.png').exists()

def test_help_is_light_and_names_the_commands():
    code = ("import sys\nfrom yfpo.lab.cli import main\nmain(['--help'])\nmain(['select', '--help'])\nmain(['audit', '--help'])\n"
            "print([m for m in ('torch', 'trl', 'pandas') if m in sys.modules])")
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert r.stdout.splitlines()[-1] == '[]' and all(f'\n  {c} ' in r.stdout for c in ('select', 'audit', 'train'))

# --- texts and pairs

CHAT = [dict(role='user', content='2 + 3 = ?'), dict(role='assistant', content='5')]

def test_the_three_forms_of_a_text(tmp_path):
    rows = [dict(text='a b'), dict(prompt='a', completion='b'), dict(messages=CHAT), dict(messages=CHAT[1:]),
            dict(prompt=CHAT[:1], completion=CHAT[1:], text='not read')]
    both = dict(prompt=CHAT[:1], completion=CHAT[1:])
    assert read_texts(write_jsonl(tmp_path/'x.jsonl', rows)) == ['a b', dict(prompt='a', completion='b'), both, '5', both]

def test_the_preference_formats(tmp_path):
    def read(*rows): return read_pairs(write_jsonl(tmp_path/'x.jsonl', rows))
    texts, chats = dict(prompt='1+1=', chosen='2', rejected='3'), dict(chosen=CHAT, rejected=[CHAT[0], dict(CHAT[1], content='6')])
    assert read(dict(texts, question_id='q')) == [dict(texts, question_id='q')]
    assert read(dict(chosen='so it is 2', rejected='so it is 3')) == [dict(prompt='so it is', chosen=' 2', rejected=' 3')]
    assert read(chats) == [dict(prompt=CHAT[:1], chosen=CHAT[1:], rejected=[dict(CHAT[1], content='6')])]

@pytest.mark.parametrize('read, row, says', [
    (read_texts, dict(txt='a'), "row 1 of .*x.jsonl has a column 'txt': did you mean 'text'\\? A row needs text, or prompt and completion"),
    (read_texts, dict(prompt='a', completions='b'), "has a column 'completions': did you mean 'completion'\\?"),
    (read_texts, dict(a=1), "has the columns 'a', and a row needs text"), (read_texts, {}, 'has the columns of nothing'),
    (read_texts, dict(text=3), 'row 1 of .* is 3: a row needs'), (read_texts, dict(text=''), 'is empty'),
    (read_texts, dict(messages='hi'), "has 'hi' as its messages: give a list"),
    (read_texts, dict(messages=CHAT[:1]), "ends with a message of role 'user': end with the assistant's answer"),
    (read_texts, dict(prompt='a', completion=''), 'has an empty completion'),
    (read_pairs, dict(prompt='a', choosen='b', rejected='c'), "row 1 of .* has a column 'choosen': did you mean 'chosen'\\?"),
    (read_pairs, dict(prompt='a', text='b'), "has the columns 'prompt', 'text', and a row needs chosen and rejected"),
    (read_pairs, dict(chosen='a', rejected='a', prompt=''), 'the same text as chosen and as rejected')])
def test_a_row_that_cannot_be_read_is_named(tmp_path, read, row, says):
    good = dict(text='a', chosen='b', rejected='c', prompt='') if read is read_pairs else dict(text='a')
    with pytest.raises(ValueError, match=says): read(write_jsonl(tmp_path/'x.jsonl', [good, row]))

# --- every error is one sentence

def test_what_goes_wrong_in_select(place, tmp_path):
    good = dict(model=place/'model', capability=place/'texts.jsonl', general=place/'other.jsonl', to=tmp_path/'set')
    def says(*more, **kw): return said_by('select', *(x for k, v in {**good, **kw}.items() for x in (f'--{k}', v)), *more)
    empty, file = tmp_path/'empty.jsonl', tmp_path/'file'
    empty.write_text('\n'); file.write_text('')
    assert says(capability=tmp_path/'no.jsonl') == f'yfpo: {tmp_path}/no.jsonl does not exist; give the path of a JSONL file'
    assert says(general=empty) == (f'yfpo: {empty} is empty: write at least one row of text, or prompt and completion, or messages into '
                                   'it, a JSON object a line')
    assert says(to=file) == f'yfpo: {file} is a file: give a folder'
    assert f'the folder {tmp_path} holds no config.json' in says(model=tmp_path)
    assert "is neither embedded ('smollm2-135m-instruct', 'tiny'), an existing folder" in says(model=tmp_path/'nowhere')
    assert 'k is 2.0: give a share' in says('--k', 2) and "the attributor 'lrp' is unknown" in says('--method', 'lrp')
    assert not (tmp_path/'set').exists()
    with pytest.raises(ValueError, match="select has no setting 'per_layers': did you mean 'per_layer'"): select(**good, per_layers=1)

def test_what_goes_wrong_in_audit(place, tmp_path):
    good = dict(model=place/'model', neurons=place/'neurons', pairs=place/'pairs.jsonl', to=tmp_path/'audit')
    def says(*more, **kw): return said_by('audit', *(x for k, v in {**good, **kw}.items() for x in (f'--{k}', v)), *more)
    assert 'no.jsonl does not exist' in says(pairs='no.jsonl')
    assert says(neurons='no') == "yfpo: the set 'no' is neither an existing folder nor a hub id of the form owner/name: check the spelling"
    assert f'{place}/model holds no NeuronSet' in says(neurons=place/'model')
    assert 'n_draws is 0: give a whole number, 1 or more' in says('--n-draws', 0)
    other = NeuronSet.load(place/'neurons')
    other.meta['model'] = dict(other.meta['model'], layers=30)
    other.save(tmp_path/'other')
    assert 'was selected in another model (layers 30 there, 2 here)' in says(neurons=tmp_path/'other')
    assert not (tmp_path/'audit').exists()

@pytest.mark.parametrize('settings, more, says', [
    ({}, ['--pairs', 'x.jsonl'], 'yfpo train calls --pairs --dataset_name, as the scripts of TRL do'),
    ({}, ['--lerning_rate', '1'], "yfpo train has no setting 'lerning_rate': did you mean 'learning_rate'?"),
    (dict(neuron_wieght=1), [], "yfpo train has no setting 'neuron_wieght': did you mean 'neuron_weight'?"),
    (dict(max_steps='many'), [], "invalid int value: 'many'"), (dict(objective='add'), [], "the objective 'add' is unknown"),
    (dict(model_name_or_path='null'), [], 'there is no model: set model_name_or_path to a folder or a hub id'),
    (dict(neurons='null'), [], 'neuron_weight is 0.1 but there are no neurons: set neurons to a folder or a hub id'),
    (dict(neurons='nowhere'), [], "the set 'nowhere' is neither an existing folder nor a hub id"),
    (dict(dataset_name='null'), [], 'there are no pairs: set dataset_name to a JSONL file'),
    (dict(dataset_name='no.jsonl'), [], 'no.jsonl does not exist; give the path of a JSONL file'),
    (dict(eval_strategy='steps', eval_steps=1), [], 'there are no pairs to evaluate on: set eval_dataset_name'),
    (dict(eval_strategy='steps', eval_steps=1, eval_dataset_name='no.jsonl'), [], 'no.jsonl does not exist'),
    (dict(model_name_or_path='nowhere'), [], "the model 'nowhere' is neither embedded"),
    (dict(model_init_kwargs='{atn: x}'), [], 'TRL cannot load the folder'), ({}, ['--config'], '--config has no file')])
def test_what_goes_wrong_in_train(place, tmp_path, settings, more, says):
    said = said_by('train', '--config', yaml_of(place, tmp_path, **settings), *more)
    assert says in said and '\n' not in said, said

def test_a_config_that_is_none(tmp_path):
    file = tmp_path/'x.yaml'
    assert said_by('train', '--config', file) == f'yfpo: {file} does not exist; give the path of a YAML file with the settings'
    for text, says in (('a: [1', 'is not valid YAML'), ('- 1', 'holds no settings: write them'), ('', 'holds no settings')):
        file.write_text(text)
        assert says in (said := said_by('train', f'--config={file}')) and '\n' not in said

# --- settings and data of a training

def test_the_command_line_wins_over_the_yaml_and_trls_fields_are_there(place, tmp_path):
    own, args, about, mixture = parse_training(['--config', yaml_of(place, tmp_path, beta=.3, loss_type='[sigmoid, sft]'), '--beta', '.2',
                                                '--no_share_prompts', '--lora_r', '8', '--use_peft', '--dataset_train_split', 'part'])
    assert (args.beta, args.loss_type, args.share_prompts, args.learning_rate) == (.2, ['sigmoid', 'sft'], False, 1e-3)
    assert (about.lora_r, about.use_peft, own.dataset_train_split, own.neurons) == (8, True, 'part', str(place/'neurons'))
    assert parse_training([])[1].output_dir == 'yfpo-out'

def test_pairs_from_a_folder_of_data_by_split(place, tmp_path):
    (tmp_path/'data').mkdir()
    for name, rows in (('train', PAIRS), ('test', PAIRS[:2])): write_jsonl(tmp_path/'data'/f'{name}.jsonl', rows)
    more = dict(dataset_name=tmp_path/'data', eval_strategy='steps', eval_steps=2)
    trainer, _ = training(['--config', yaml_of(place, tmp_path, **more)])
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (6, 2)
    with pytest.raises(ValueError, match="the split of the pairs 'tets' is unknown: did you mean 'test'"):
        training(['--config', yaml_of(place, tmp_path, **more, dataset_test_split='tets')])
    own = dict(more, dataset_name=place/'pairs.jsonl', eval_dataset_name=place/'pairs.jsonl')
    assert len(training(['--config', yaml_of(place, tmp_path, **own)])[0].eval_dataset) == 6

# --- names in place of objects

def by_name(place, folder, **kw):
    how = {k: kw.pop(k) for k in ('model', 'neurons', 'processing_class') if k in kw}
    how = {**dict(model=str(place/'model'), neurons=str(place/'neurons')), **how}
    t = YFPOTrainer(**how, train_dataset=PAIRS, args=config(folder, **kw))
    t.remove_callback(PrinterCallback)
    return t

def test_a_name_is_the_loaded_model(place, tmp_path):
    named = by_name(place, tmp_path/'a', neuron_weight=.5)
    model, tok = load_model(str(place/'model'))
    given = by_name(place, tmp_path/'b', neuron_weight=.5, model=model, processing_class=tok, neurons=NeuronSet.load(place/'neurons'))
    for t in (named, given): t.train()
    assert column(named, 'loss') == column(given, 'loss') and len(column(named, 'loss')) == 5
    assert named.model.name == 'model' and named.processing_class.chat_template == tok.chat_template

def test_it_is_loaded_as_trl_loads_it(place, tmp_path, monkeypatch, caplog):
    import yfpo.lm.training as at
    seen, old = [], at.create_model_from_path
    monkeypatch.setattr(at, 'create_model_from_path', lambda name, **kw: (seen.append((name, kw)), old(name, **kw))[1])
    t = by_name(place, tmp_path, neuron_weight=0., model_init_kwargs=dict(dtype='bfloat16', attn_implementation='eager'))
    assert seen == [(str(place/'model'), dict(trust_remote_code=False, use_safetensors=True, output_loading_info=True, dtype='bfloat16',
                                              attn_implementation='eager'))]
    assert t.model.dtype == torch.bfloat16 and t.model.config._attn_implementation == 'eager'
    assert t.args.model_init_kwargs == dict(dtype='bfloat16', attn_implementation='eager') and 'will be ignored' not in caplog.text
    assert t.ref_model is not None and not any(p.requires_grad for p in t.ref_model.parameters())

def test_models_of_the_package_and_adapters_are_loaded_by_us(place, tmp_path):
    from peft import LoraConfig
    t = by_name(place, tmp_path/'a', model='tiny', model_init_kwargs=dict(dtype='float32', revision='main'))
    assert t.model.name == 'tiny'
    lora = YFPOTrainer(model=str(place/'model'), neurons=place/'neurons', train_dataset=PAIRS, args=config(tmp_path/'b', max_steps=1),
                       peft_config=LoraConfig(task_type='CAUSAL_LM', r=2))
    lora.save_model(str(tmp_path/'adapter'))
    assert json.loads((tmp_path/'adapter'/'base.json').read_text())['name'] == str(place/'model')
    again = by_name(place, tmp_path/'c', model=str(tmp_path/'adapter'), neurons=str(tmp_path/'adapter'))
    assert 'default' in again.model.peft_config
    with pytest.raises(ValueError, match="model_init_kwargs has 'device_map', which 'tiny' does not take"):
        by_name(place, tmp_path/'d', model='tiny', model_init_kwargs=dict(device_map='auto'))

def test_names_that_lead_nowhere_and_weights_that_are_not_whole(place, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the model 'owner/nothing' is neither .* nor on the hub as far as it can be reached"):
        by_name(place, tmp_path/'a', model='owner/nothing')
    with pytest.raises(FileNotFoundError, match='holds no config.json'): by_name(place, tmp_path/'a', model=str(tmp_path))
    with pytest.raises(ValueError, match='args is a DPOConfig'):
        from trl import DPOConfig
        YFPOTrainer(model='nowhere', args=DPOConfig(str(tmp_path), bf16=False, use_cpu=True), train_dataset=PAIRS)
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(place/'model', tmp_path/'cut')
    weights = load_file(folder/'model.safetensors')
    save_file({k: v for k, v in weights.items() if 'layers.1.mlp.up' not in k}, folder/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match="the weights of 'cut' are not those of its model, it lacks 1 weight, such as .*.1.mlp.up"):
        by_name(place, tmp_path/'a', model=str(folder))

def test_a_model_on_several_devices_is_not_copied(place, tmp_path, monkeypatch):
    import yfpo.trainer as at
    def spread(name, args, quantization=None):
        model, tok = load_policy(name, args, quantization)
        model.hf_device_map = {'model.layers.0': 0, 'model.layers.1': 1}
        return model, tok
    monkeypatch.setattr(at, 'load_policy', spread)
    with pytest.raises(ValueError, match='lies on several devices, where it cannot be copied as the reference'): by_name(place, tmp_path)

# --- the hub

class Hub:
    "In place of huggingface_hub: repositories are folders"
    def __init__(self, folder): self.folder, self.made = folder, {}
    def create_repo(self, repo_id, private=None, exist_ok=False, token=None):
        (self.folder/repo_id).mkdir(parents=True, exist_ok=exist_ok)
        self.made[repo_id] = private
        return types.SimpleNamespace(repo_id=repo_id)
    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns=(), **kwargs):
        files = [str(f.relative_to(folder_path)) for f in Path(folder_path).rglob('*') if f.is_file()]
        for f in filter_repo_objects(files, ignore_patterns=ignore_patterns or None):
            (self.folder/repo_id/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path)/f, self.folder/repo_id/f)
        return f'commit: {commit_message}'
    def snapshot_download(self, repo_id, revision=None, allow_patterns=()):
        if not (self.folder/repo_id).is_dir(): raise OSError(f'404: no repository {repo_id}\nsecond line')
        files = [str(f.relative_to(self.folder/repo_id)) for f in (self.folder/repo_id).rglob('*') if f.is_file()]
        for f in filter_repo_objects(files, allow_patterns=allow_patterns):
            (self.folder/'cache'/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.folder/repo_id/f, self.folder/'cache'/f)
        self.asked = revision
        return str(self.folder/'cache')

@pytest.fixture
def hub(tmp_path, monkeypatch):
    h = Hub(tmp_path/'hub')
    monkeypatch.setattr('huggingface_hub.HfApi', lambda *a, **k: h)
    monkeypatch.setattr('huggingface_hub.snapshot_download', h.snapshot_download)
    monkeypatch.setattr('transformers.trainer.hf_api', lambda *a, **k: h)
    return h

def tree(folder): return sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())

def test_a_set_goes_to_the_hub_and_comes_back(place, hub, tiny):
    neurons = NeuronSet.load(place/'neurons')
    stats, _ = fit_stats(*tiny, read_pairs(place/'pairs.jsonl'), neurons)
    assert neurons.push_to_hub('me/sums', stats=stats, private=True) == 'commit: Upload neurons' and hub.made == {'me/sums': True}
    at = hub.folder/'me'/'sums'
    assert tree(at) == ['README.md', 'neurons.json', 'neurons.safetensors', 'reward/reward.json', 'reward/reward.safetensors']
    card = (at/'README.md').read_text()
    assert card.startswith('---\ntags: [yfpo, neurons]\n---\n\n# sums\n') and "NeuronSet.from_pretrained('me/sums')" in card
    assert f'| neurons | {len(neurons)} in 2 layers |' in card and '| selector | attnlrp-contrast |' in card
    own = NeuronSet.from_pretrained('me/sums', revision='v1')
    assert own == neurons and hub.asked == 'v1' and own.home == ''
    assert tree(hub.folder/'cache') == ['neurons.json', 'neurons.safetensors', 'reward/reward.json'], 'and nothing else is downloaded'
    shutil.rmtree(hub.folder/'cache'); neurons.save(hub.folder/'me'/'model'/'neurons'); stats.save(hub.folder/'me'/'model'/'reward')
    assert NeuronSet.from_pretrained('me/model').home == 'me/model', 'as `load_model` calls the model beside it'
    assert RewardStats.load(at/'reward').scale == stats.scale

def test_the_card_names_a_base_that_is_on_the_hub(place, hub):
    neurons = NeuronSet.load(place/'neurons')
    neurons.meta['chosen_on'] = dict(neurons.meta['chosen_on'], name='Qwen/Qwen2.5-0.5B')
    neurons.push_to_hub('me/sums')
    assert '\nbase_model: Qwen/Qwen2.5-0.5B\n' in (hub.folder/'me'/'sums'/'README.md').read_text()

def test_a_trainer_pushes_card_set_and_statistics(place, hub, tmp_path):
    t = by_name(place, tmp_path/'out', max_steps=1, hub_model_id='me/model', save_strategy='steps', save_steps=1)
    t.train()
    t.push_to_hub()
    pushed = tree(hub.folder/'me'/'model')
    assert {'README.md', 'model.safetensors', 'neurons/neurons.json', 'reward/reward.safetensors', 'tokenizer.json'} <= {*pushed}
    assert not [f for f in pushed if 'reference' in f or 'checkpoint' in f] and (tmp_path/'out'/'_reference').is_dir()
    assert '## Neuron reward' in (hub.folder/'me'/'model'/'README.md').read_text()
    again = by_name(place, tmp_path/'again', neurons='me/model')
    assert again.neurons == t.neurons

def test_what_the_hub_refuses(place, hub, tmp_path):
    neurons = NeuronSet.load(place/'neurons')
    with pytest.raises(FileNotFoundError, match=r"^the set 'me/no' is no folder here, and cannot be read from the hub \(404: no repository "
                                                r"me/no\): check the spelling, or download it and give its folder$"):
        NeuronSet.from_pretrained('me/no')
    with pytest.raises(ValueError, match="revision is 'v1', but .* is a folder and not the hub"):
        NeuronSet.from_pretrained(place/'neurons', revision='v1')
    with pytest.raises(FileNotFoundError, match='is a file: give the folder with neurons.safetensors and neurons.json'):
        NeuronSet.from_pretrained(place/'neurons'/'neurons.json')
    with pytest.raises(ValueError, match="'sums' is no hub id: give owner/name"): neurons.push_to_hub('sums')
    with pytest.raises(ValueError, match='stats is a dict, but must be RewardStats'): neurons.push_to_hub('me/sums', stats={})
    alien = RewardStats(*torch.ones(3, 2))
    with pytest.raises(ValueError, match='and there are .* neurons'): neurons.push_to_hub('me/sums', stats=alien)
    (hub.folder/'me'/'other').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='holds no NeuronSet'):
        (hub.folder/'cache').mkdir()
        NeuronSet.from_pretrained('me/other')

def test_without_a_stand_in_the_hub_is_asked_for_real():
    "Offline, so the real function refuses, in one sentence"
    with pytest.raises(FileNotFoundError, match="^the set 'me/no' is no folder here, and cannot be read from the hub [^\n]*$"):
        NeuronSet.from_pretrained('me/no')

# --- audit

def test_an_audit_is_that_of_the_experiments(place, tiny):
    neurons, pairs = NeuronSet.load(place/'neurons'), read_pairs(place/'pairs.jsonl')
    own = audit(tiny, neurons, pairs, n_draws=2, seed=3, max_fit=4)
    controls = {**{f'layer-matched #{s}': layer_matched(neurons, s) for s in (4, 5)},
                **{f'random #{s}': random_neurons(neurons, s) for s in (4, 5)}}
    assert control_sets(neurons, 2, 3) == controls
    theirs = pd.DataFrame(reward_audit(*tiny, pairs, neurons, controls, seed=3, max_fit=4))
    pd.testing.assert_frame_equal(own.rows, theirs)
    assert own.verdict.startswith('**Reward audit.** ') and own._repr_markdown_() == own.verdict
    assert 'selected neurons, raw' in [*own.table.iloc[:, 0]]
    dots = sum(len(c.get_offsets()) for c in own.figure().axes[0].collections)
    assert dots == len(own.rows)
    pd.testing.assert_frame_equal(audit(str(place/'model'), str(place/'neurons'), place/'pairs.jsonl', 2, 3, max_fit=4).rows, theirs)
    with pytest.raises(ValueError, match="audit has no setting 'max_fits': did you mean 'max_fit'"): audit(tiny, neurons, pairs, max_fits=1)

# --- effect

def louder_at(model, neurons):
    res = copy.deepcopy(model)
    for layer, at in neurons.by_layer().items():
        with torch.no_grad(): res.model.layers[layer].mlp.up_proj.weight[neurons.index[at]] *= 1.5
    return res

def test_an_effect_by_hand(place, tiny):
    "Margins from the log-probabilities and read-outs of the library's own parts; a model against itself; a set turned up"
    neurons, pairs = NeuronSet.load(place/'neurons'), read_pairs(place/'pairs.jsonl')
    louder = louder_at(tiny[0], neurons)
    found = effect(tiny, (louder, tiny[1]), pairs, neurons)
    rows, n = found.rows.set_index(['phase', 'pair']), len(pairs)
    stats, phi = fit_stats(*tiny, pairs, neurons)
    for phase, net in (('before', tiny[0]), ('after', louder)):
        logp = [x.sum().item() for x in response_logprobs(net, tiny[1], pair_items(pairs), eos=True)]
        read = read_examples(net, encode(tiny[1], pair_items(pairs)), tiny[1].pad_token_id, neurons, stats)
        assert rows.loc[phase].logp_margin.tolist() == pytest.approx([a - b for a, b in zip(logp[:n], logp[n:])], abs=1e-4)
        assert rows.loc[phase].neuron_margin.tolist() == pytest.approx(((read[:n] - read[n:])/stats.scale).tolist(), abs=1e-4)
    by = rows.neuron_margin.unstack('phase')
    assert found.change('neuron_margin')[0] == pytest.approx((by.after - by.before).mean()) != 0
    same = effect(str(place/'model'), str(place/'model'), place/'pairs.jsonl', str(place/'neurons'))
    assert same.change('neuron_margin') == same.change('logp_margin') == (0., 0., 0.) and len(same.figure().axes) == 2
    assert effect(tiny, (louder, tiny[1]), iter(pairs), neurons).rows.equals(found.rows), 'from a generator too'
    broken = copy.deepcopy(tiny[0])
    with torch.no_grad(): broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match='margins after training are not finite on 6 pairs, 0 the first'):
        effect(tiny, (broken, tiny[1]), pairs, neurons)
    for bad, words in ((dict(neurons=None), 'no set beside it: give neurons'), (dict(seed=-1), 'seed is -1'),
                       (dict(pairs=[]), 'no pairs to read the effect on'), (dict(pairs=pairs[:1]), 'have no spread'),
                       (dict(pairs=[dict(chosen='a', rejected='b')]), "has no 'prompt'"), (dict(readout='sums'), "did you mean 'sum'"),
                       (dict(batch_sizes=2), "effect has no setting 'batch_sizes': did you mean 'batch_size'")):
        with pytest.raises(ValueError, match=words): effect(tiny, tiny, **{**dict(pairs=pairs, neurons=neurons), **bad})

def test_an_effect_is_read_as_it_was_trained(place, tiny, tmp_path):
    "The read-out beside the weights, dropout off, the longest text as asked, and questions as the unit"
    neurons, pairs = NeuronSet.load(place/'neurons'), read_pairs(place/'pairs.jsonl')
    folder = save_model(*tiny, tmp_path/'m')
    neurons.save(tmp_path/'m'/'neurons')
    fit_stats(*tiny, pairs, neurons, READOUTS['sum'])[0].save(tmp_path/'m'/'reward')
    found = effect(tiny, str(folder), pairs)
    assert found.readout == 'sum' and '(read-out `sum`)' in found.verdict
    assert not found.rows.neuron_margin.equals(effect(tiny, str(folder), pairs, readout='standardised').rows.neuron_margin)
    noisy = copy.deepcopy(tiny[0]).train()
    for m in noisy.modules(): m.attention_dropout = .5
    assert effect(tiny, (noisy, tiny[1]), pairs, neurons).change('logp_margin') == (0., 0., 0.) and noisy.training
    late = [dict(prompt='a', chosen='7'*90 + '1', rejected='7'*90 + '2')]*2
    with pytest.raises(ValueError, match='max_length=60: raise it'): effect(tiny, tiny, late, neurons, max_length=60)
    twice = [dict(p, question_id=f'q{i//2}') for i, p in enumerate(pairs)]
    two = effect(tiny, (louder_at(tiny[0], neurons), tiny[1]), twice, neurons)
    by = two.rows.groupby(['question', 'phase']).logp_margin.mean().unstack('phase')
    assert len(by) == len(pairs)//2 and two.change('logp_margin') == paired_bootstrap(by.after, by.before)

def test_what_goes_wrong_in_effect(place, tmp_path):
    good = dict(before=place/'model', after=place/'model', pairs=place/'pairs.jsonl', neurons=place/'neurons', to=tmp_path/'effect')
    def says(**kw): return said_by('effect', *(x for k, v in {**good, **kw}.items() for x in (f'--{k}', v)))
    assert 'no.jsonl does not exist' in says(pairs='no.jsonl') and f'{place}/model holds no NeuronSet' in says(neurons=place/'model')
    assert "is neither embedded ('smollm2-135m-instruct', 'tiny'), an existing folder" in says(after=tmp_path/'nowhere')
    assert not (tmp_path/'effect').exists()

# --- trackers

class Kept(TrainerCallback):
    def __init__(self): self.logs = []
    def on_log(self, args, state, control, logs=None, **kwargs): self.logs.append(dict(logs))

def trained(place, folder, callbacks, **kw):
    model, tok = load_model(str(place/'model'))
    args = config(folder, neuron_weight=.5, max_steps=2, eval_strategy='steps', eval_steps=1, **kw)
    t = YFPOTrainer(model=model, args=args, train_dataset=PAIRS, eval_dataset=PAIRS[:2], processing_class=tok, neurons=place/'neurons',
                    callbacks=callbacks)
    t.remove_callback(PrinterCallback)
    t.train()
    return t

METRICS = ('margins', 'accuracies', 'chosen', 'rejected', 'share', 'size', 'size_outside', 'clipped', 'loss')

def test_callbacks_get_the_neuron_metrics(place, tmp_path):
    kept = Kept()
    trained(place, tmp_path, [kept])
    steps, evals = ([l for l in kept.logs if k in l] for k in ('loss', 'eval_loss'))
    assert len(steps) == len(evals) == 2
    for rows, start in ((steps, ''), (evals, 'eval_')):
        assert all(type(r[f'{start}neurons/{m}']) is float for r in rows for m in METRICS)

class Writer:
    "In place of tensorboard's SummaryWriter"
    def __init__(self, **kwargs): self.scalars, self.texts = [], []
    def add_scalar(self, name, value, step): self.scalars.append((name, value, step))
    def add_text(self, *args): self.texts.append(args)
    def flush(self): pass
    def close(self): pass

def test_tensorboard_is_given_the_neuron_metrics(place, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils as at
    monkeypatch.setattr(at, 'is_tensorboard_available', lambda: True)
    made = []
    def writer(**kwargs): made.append(Writer()); return made[-1]
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=writer))
    t = trained(place, tmp_path, None, report_to='tensorboard')
    names = {n: (v, s) for n, v, s in made[0].scalars}
    assert {f'{mode}/neurons/{m}' for mode in ('train', 'eval') for m in METRICS} <= {*names}
    assert names['train/neurons/margins'] == (column(t, 'neurons/margins')[-1], 2)

def test_tensorboards_own_files_hold_the_neuron_metrics(place, tmp_path):
    pytest.importorskip('tensorboard')
    t = trained(place, tmp_path, None, report_to='tensorboard')
    events = importlib.import_module('tensorboard.backend.event_processing.event_accumulator')
    folder = next((tmp_path/'runs').rglob('events.out*')).parent
    found = events.EventAccumulator(str(folder)); found.Reload()
    seen = [e.value for e in found.Scalars('train/neurons/margins')]
    assert seen == pytest.approx(column(t, 'neurons/margins')[:2], abs=1e-6)

def test_trackio_is_given_the_neuron_metrics(place, tmp_path, monkeypatch):
    from transformers.integrations import integration_utils as at
    logged, none = [], lambda *args, **kwargs: None
    space = types.SimpleNamespace(current_space_id=types.SimpleNamespace(get=none))
    stand_in = types.SimpleNamespace(init=none, finish=none, freeze=none, save=none, log=lambda m, *a, **k: logged.append(m),
                                     __version__='0.21.0', config=type('Config', (dict,), dict(update=none))(), context_vars=space)
    monkeypatch.setattr(at, 'is_trackio_available', lambda: True)
    monkeypatch.setitem(sys.modules, 'trackio', stand_in)
    trained(place, tmp_path, None, report_to='trackio')
    assert {f'{mode}/neurons/{m}' for mode in ('train', 'eval') for m in METRICS} <= {k for m in logged for k in m}

# --- the page of an own set

def questions(path, *rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path

def test_a_page_of_an_own_set(place, tmp_path, capsys):
    asked = questions(tmp_path/'q.jsonl', dict(question='2 + 3?', answer=5), dict(question='4 boxes of 2?', answer='4 * 2 = 8.\n#### 8'))
    main(['page', '--model', str(place/'model'), '--neurons', str(place/'neurons'), '--questions', str(asked), '--to',
          str(tmp_path/'p.html'),
          '--max-new-tokens', '4', '--dtype', 'float32'])
    assert capsys.readouterr().out.splitlines()[-1] == f"the page is {tmp_path/'p.html'}: open it in a browser"
    text = (tmp_path/'p.html').read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [(q['question'], q['answer']) for q in data['questions']] == [('2 + 3?', '5'), ('4 boxes of 2?', '8')]
    assert {*data['answers']} == {'selected', 'random'} and text.count('<article class="card">') == 6
    assert all(len(a['tokens']) <= 4 for rows in data['answers'].values() for row in rows for a in row)

@pytest.mark.parametrize('row,says', [(dict(answer=3), 'row 2 has no question: write a JSON object a line'),
                                      ([1], 'line 2: a JSON object was expected, not list'),
                                      (dict(question='a', answer=[3]), 'row 2: the answer is [3]'),
                                      (dict(question='a', answer='so #### none'), 'row 2'), (dict(question='', answer=3), 'row 2')])
def test_questions_that_cannot_be_read(place, tmp_path, row, says):
    asked = questions(tmp_path/'q.jsonl', dict(question='2 + 3?', answer=5), row)
    assert says in said_by('page', '--model', place/'model', '--neurons', place/'neurons', '--questions', asked, '--to', tmp_path/'p.html')
    assert not (tmp_path/'p.html').exists()

def test_questions_without_an_answer_or_with_a_text(tmp_path):
    from yfpo.beyond.explorer import is_right, read_questions
    asked = questions(tmp_path/'q.jsonl', dict(question='Who?'), dict(question='Where?', answer='In Rome'),
                      dict(question='2 + 3?', answer='5'))
    assert [p.answer for p in read_questions(asked)] == ['', 'In Rome', '5']
    assert is_right('x', '') is None and is_right('He lives in Rome.', 'In Rome') and not is_right('Within Romeo', 'in Rome')
    assert is_right('2 and then 5', '5') and not is_right('5 and then 2', '5')

def test_what_goes_wrong_in_page(place, tmp_path):
    base = ['page', '--model', place/'model', '--neurons', place/'neurons', '--to', tmp_path/'p.html']
    assert 'nowhere.jsonl' in said_by(*base, '--questions', tmp_path/'nowhere.jsonl')
    assert 'is empty' in said_by(*base, '--questions', questions(tmp_path/'q.jsonl'))
    asked = questions(tmp_path/'q.jsonl', dict(question='2 + 3?', answer=5))
    assert 'nowhere' in said_by(*base, '--questions', asked, '--neurons', tmp_path/'nowhere')
    assert 'max_new_tokens is 0' in said_by(*base, '--questions', asked, '--max-new-tokens', '0')

@pytest.mark.parametrize('name', ['select', 'audit', 'page', 'bundle'])
def test_a_row_of_the_table_becomes_an_option(name):
    "Only what was typed arrives, as the row's type, beside the defaults of the command itself; the help shows every row"
    import click
    from dataclasses import replace
    from click.testing import CliRunner
    from yfpo.lab.cli import COMMANDS
    own, seen = next(c for c in COMMANDS if c.name == name), []
    app = click.Group()
    replace(own, run=seen.append).add(click, app)
    key = lambda o: o.name.split('/')[0].strip('-').replace('-', '_')
    first, typed = ['cpu'] if own.recipe else [], {int: '3', float: '.5', str: 'x'}
    least = [w for o in own.options if o.needed for w in (o.name, 'x')]
    run = lambda words: CliRunner().invoke(app, [name, *first, *words])
    assert run(least).exit_code == 0 and run(least[2:]).exit_code == 2
    assert seen.pop() == {**dict.fromkeys(['recipe']*own.recipe, 'cpu'), **{key(o): 'x' for o in own.options if o.needed},
                          **{key(o): o.default for o in own.options if o.default is not None}}
    words = [w for o in own.options for w in ([o.name.split('/')[1]] if '/' in o.name else [o.name, typed[o.type]])]
    assert run(words).exit_code == 0
    want = {key(o): False if '/' in o.name else o.type(typed[o.type]) for o in own.options}
    assert seen == [{**dict.fromkeys(['recipe']*own.recipe, 'cpu'), **want}]
    shown = ' '.join(CliRunner().invoke(app, [name, '--help'], terminal_width=1000, max_content_width=1000).output.split())
    for o in own.options: assert o.name.replace('/', ' / ') in shown and o.help in shown, o
    assert own.help in shown and own.example in shown

def test_names_complete_in_a_shell():
    "What the line in `yfpo --help` sets up: commands, options, and recipes where one is asked for"
    yfpo = Path(sys.executable).parent/'yfpo'
    def offered(*words):
        env = {**os.environ, '_YFPO_COMPLETE': 'bash_complete', 'COMP_WORDS': ' '.join(words), 'COMP_CWORD': str(len(words) - 1)}
        return {l.partition(',')[2] for l in subprocess.run([yfpo], env=env, capture_output=True, text=True).stdout.splitlines()}
    assert 'publish' in offered('yfpo', 'pu') and {'which-neurons', 'which-share'} <= offered('yfpo', 'run', 'which')
    assert '--profile' in offered('yfpo', 'run', 'smoke', '--pro')

def test_every_command_that_takes_a_recipe_shows_an_example():
    from yfpo.lab.cli import _app
    app = _app()
    for name, c in app.commands.items():
        if any(p.name == 'recipe' for p in c.params): assert c.epilog and f'yfpo {name}' in c.epilog, name

# --- help that can be read ---

def test_the_short_help_of_train_and_the_whole(capsys):
    for word, some in (('--help', '--neurons NEURONS'), ('--help-all', '--adam_beta1')):
        with pytest.raises(SystemExit) as e: parse_training([word])
        assert e.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(some in l for l in lines) and (len(lines) < 150) == (word == '--help')
    from yfpo.beyond.command import short_help
    from yfpo.trainer import YFPOConfig
    assert all(f'--{n}' in short_help() for n in YFPOConfig.__annotations__), 'every setting of ours'

def test_defaults_in_the_help_of_select_are_those_of_the_library():
    from yfpo.lab.cli import COMMANDS
    from yfpo.neurons import Selection
    from yfpo.relevance import Scoring
    own = {f.name: f.default for c in (Selection, Scoring) for f in c.__dataclass_fields__.values()}
    options = {o.name[2:].replace('-', '_'): o.help for c in COMMANDS if c.name == 'select' for o in c.options}
    told = {k: h.split('default ')[1].split(',')[0].rstrip('.') for k, h in options.items() if 'default ' in h and k in own}
    assert told.keys() == {'k', 'universal', 'per_layer', 'threshold', 'method'} and told == {k: f'{own[k]:g}' if k != 'method' else own[k]
                                                                                            for k in told}

def test_rows_of_a_data_set_of_texts_are_texts():
    from yfpo.lm.responses import text_items
    assert text_items([dict(text='a'), 'b']) == ['a', 'b']
    with pytest.raises(ValueError, match='given text 0 has no prompt'): text_items([dict(text='a', more=1)])

def test_a_card_names_the_model_that_was_trained(place, tmp_path):
    t = by_name(place, tmp_path/'out')
    t.create_model_card()
    text = (tmp_path/'out'/'README.md').read_text()
    assert f'fine-tuned version of `{t.model.name}`' in text and 'None' not in text.split('## Quick')[0]

def test_no_recipes_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path/'nbs'/'paper'/'recipes').mkdir(parents=True)
    monkeypatch.setenv('YFPO_ROOT', str(tmp_path))
    with pytest.raises(SystemExit, match='there are no recipes in .*: run this in a clone'): main(['list'])
