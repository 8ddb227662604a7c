"What is offered to TRL: the entry for its paper index and the example notebook run as they stand, and promise no result."
import json, re, time
import pytest
from conftest import ROOT

ENTRY, EXAMPLE = (ROOT/'nbs'/'beyond'/'trl'/f for f in ('paper_index.md', 'yfpo_neurons.ipynb'))

def cells(kind): return [''.join(c['source']) for c in json.loads(EXAMPLE.read_text())['cells'] if c['cell_type'] == kind]

def test_the_entry_trains_with_the_settings_of_the_recipe(tmp_path, monkeypatch):
    "Its code as it stands, but for the model; settings are those of the recipe `gsm8k-full` and of the package, so they cannot drift apart"
    from yfpo.lab.recipes import read_recipe
    from yfpo.trainer import YFPOConfig, YFPOTrainer
    code, = re.findall(r'```python\n(.*?)```', ENTRY.read_text(), re.S)
    recipe = read_recipe('gsm8k-full')
    assert f'"{recipe.shared["model"]}"' in code
    names = dict(capability=['1 + 2 = 3', '4 * 5 = 20'], general=['the sea is calm', 'a quiet road'],
                 train_dataset=[dict(prompt=f'{i} + 1 =', chosen=f' {i + 1}', rejected=f' {i}') for i in range(9)])
    monkeypatch.chdir(tmp_path)
    before = {}
    monkeypatch.setattr(YFPOTrainer, 'train', lambda self, f=YFPOTrainer.train: (before.update(
        {k: p.detach().clone() for k, p in self.model.named_parameters()}), f(self))[1])
    exec(code.replace(recipe.shared['model'], 'tiny'), names)
    args, trainer, plain = names['training_args'], names['trainer'], YFPOConfig('x')
    for k, v in recipe.shared['train'].items(): assert getattr(args, k) == v, k
    for k in ('objective', 'neuron_weight', 'neuron_kappa', 'readout', 'beta', 'learning_rate', 'loss_type'):
        assert getattr(args, k) == getattr(plain, k), k
    own = recipe.stages['neurons']
    assert {k: names['neurons'].meta[k] for k in ('k', 'per_layer')} == {k: own[k] for k in ('k', 'per_layer')}
    assert trainer.state.global_step == 2 and any((p != before[k]).any() for k, p in trainer.model.named_parameters())
    assert trainer.term is not None and trainer.neurons == names['neurons']

def test_the_entry_has_the_form_of_the_index():
    "TRL's own: a heading, the paper's page, one paragraph, one block whose every setting says where it comes from"
    text = ENTRY.read_text().partition('\n---\n')[2]
    from yfpo.trainer import YFPOTrainer
    paper = YFPOTrainer._paper
    assert f"### {paper['title']}\n\n**📜 Paper**: https://huggingface.co/papers/{paper['id']}\n\n" in text
    settings = re.findall(r'^    (\w+)=[^,]+,(.*)$', re.search(r'YFPOConfig\((.*?)\n\)', text, re.S)[1], re.M)
    assert len(settings) > 8 and all(says.strip().startswith('#') for k, says in settings if k != 'output_dir')
    assert 'not the official implementation' in text and 'a reading of it' in text
    assert not re.search(r'outperform|improves|better than|state[- ]of[- ]the[- ]art|\d %', text)

def test_the_example_runs(tmp_path, monkeypatch):
    "All its code, in order, on the embedded model, in less than two minutes of two cores"
    monkeypatch.chdir(tmp_path)
    names, begun = {}, time.process_time()
    for c in cells('code'): exec(c, names)
    assert time.process_time() - begun < 2*120
    log, trainer = names['log'], names['trainer']
    assert trainer.state.global_step == len(log) == 10 and log[['rewards/margins', 'neurons/margins']].abs().iloc[0].max() < 1e-4
    assert (log['neurons/margins'].iloc[1:].abs() > 1e-3).all() and log.notna().all().all()
    from yfpo import NeuronSet, load_model
    assert NeuronSet.load(tmp_path/'yfpo-model'/'neurons') == names['neurons']
    start, end = (next(m.parameters()) for m in (load_model('smollm2-135m-instruct')[0], names['model']))
    assert (start != end).any()

def test_the_example_has_the_form_of_trl_s():
    "The sections of TRL's own examples, no private names, and no claim"
    heads = [re.match(r'#+ .*', c)[0] for c in cells('markdown') if c.startswith('#')]
    assert heads[0].startswith('# ') and heads[1:6] == ['## Key concepts', '## Install dependencies', '## Load the model',
                                                                        '## Load the dataset', '## Select the neurons']
    code, text = '\n'.join(cells('code')), '\n'.join(cells('markdown'))
    assert not re.search(r'import _|\._\w|from yfpo\.', code), 'only names that the package offers'
    assert 'a reading of it' in text and not re.search(r'outperform|improves|better than|\d %', text)
