"Sets that move, monitors, other methods: resuming, LoRA, families, and what is refused"
import copy, json
from dataclasses import replace
import pytest, torch
from datasets import Dataset
from families import FAMILIES, random_model
from test_trainer import PAIRS, config, equal_weights, make, some_neurons, tiny
from transformers import PrinterCallback
from trl import GRPOConfig, SFTConfig
from yfpo.beyond.dynamic import DynamicSelection, renewed, shuffled_like
from yfpo.beyond.methods import METHODS, NeuronReward, NeuronSFTTrainer, neuron_parameters, training_only
from yfpo.lm.decoding import Edit
from yfpo.lm.models import tiny_model
from yfpo.beyond.monitors import Monitor, StopRule
from yfpo.neurons import NeuronSet, jaccard, model_signature
from yfpo.data.templates import general_texts, make_problems
from yfpo.data.files import read_jsonl
from yfpo.lm.responses import format_prompt

pytestmark = pytest.mark.filterwarnings('ignore')
__all__ = ['tiny']

def texts(tok): return [(format_prompt(tok, p.question), p.solution) for p in make_problems(6, seed=5)], general_texts(6)
def dynamic(tiny, folder, resume=None, **kw):
    t = make(tiny, folder, neuron_weight=0.5, max_steps=6, save_strategy='steps', save_steps=2, **kw)
    d = DynamicSelection(t, tiny[1], *texts(tiny[1]), every=1, warmup=0, decay=0.5, per_layer=0.3)
    t.train(resume_from_checkpoint=resume)
    return t, d

def test_dynamic_selection_resumes_bit_for_bit(tiny, tmp_path):
    whole, a = dynamic(tiny, tmp_path/'a')
    again, b = dynamic(tiny, tmp_path/'a', resume=str(tmp_path/'a'/'checkpoint-4'))
    assert whole.neurons == again.neurons and equal_weights(whole, again) and [r['step'] for r in a.rows] == [r['step'] for r in b.rows]
    assert whole.neurons != whole.start.term.neurons and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ('mean', 'general'))

def test_a_swap_of_no_neuron_keeps_the_statistics_that_the_caller_gave(tiny, tmp_path):
    stats = replace(make(tiny, tmp_path/'a').reward_stats, scale=7.)
    t = make(tiny, tmp_path/'b', neuron_weight=.5, trainer_kw=dict(reward_stats=stats))
    d = DynamicSelection(t, tiny[1], *texts(tiny[1]), swap='random', per_layer=1., leave=1000.)
    before, scores = d.policy, torch.zeros(2, 64)
    scores[before.layer, before.index] = 1.                    # its own members come first
    d.mean, d.general = scores, scores*0
    d._measure = lambda model: (scores, scores*0, scores)
    d.reselect(1)
    assert d.rows[-1]['turnover'] == 0 and jaccard(d.policy, before) == 1 and t.reward_stats.scale == 7

def test_a_dose_is_measured_in_the_number_format_of_the_training(tiny, tmp_path):
    from yfpo.beyond.dose import fit_dose
    t, seen = make(tiny, tmp_path, neuron_weight=.5, bf16=True), []
    own, head = t.compute_loss, t.model.lm_head
    t.compute_loss = lambda *a: (seen.append(torch.is_autocast_enabled('cpu')), own(*a))[1]
    head.register_forward_hook(Edit(lambda *a: seen.append(torch.is_autocast_enabled('cpu'))))
    head.eval()
    before = vars(t.model).get('forward')
    fit_dose(t, .5, batches=1)
    assert seen == [False, True] and vars(t.model).get('forward') is before and not head.training

def test_a_checkpoint_without_the_selection_is_refused(tiny, tmp_path):
    make(tiny, tmp_path, neuron_weight=0.5, max_steps=2, save_strategy='steps', save_steps=2).train()
    with pytest.raises(FileNotFoundError, match='no state of the dynamic selection'): dynamic(tiny, tmp_path,
            resume=str(tmp_path/'checkpoint-2'))

def test_dynamic_selection_needs_a_reference_and_neurons(tiny, tmp_path):
    t = make(tiny, tmp_path, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match='precompute_ref_log_probs=False'): DynamicSelection(t, tiny[1], *texts(tiny[1]))

def test_new_members_get_the_references_statistics(tiny, tmp_path):
    "The table after a change is the table of a trainer that began with that set"
    t, _ = dynamic(tiny, tmp_path/'a')
    fresh = make(tiny, tmp_path/'b')
    fresh.set_neurons(t.neurons)
    assert torch.allclose(t.ref_phi, fresh.ref_phi, atol=1e-6) and t.reward_stats.scale == pytest.approx(fresh.reward_stats.scale)

def test_lora_selects_with_the_adapter_and_reads_without(tiny, tmp_path):
    from peft import LoraConfig
    lora = LoraConfig(r=4, target_modules=['up_proj', 'down_proj'], lora_dropout=0., task_type='CAUSAL_LM')
    t = make(tiny, tmp_path/'a', neuron_weight=0.5, max_steps=4, learning_rate=1e-2, trainer_kw=dict(peft_config=lora))
    d = DynamicSelection(t, tiny[1], *texts(tiny[1]), every=2, warmup=0, decay=0., per_layer=0.3)
    t.train()
    plain = make(tiny, tmp_path/'b')
    plain.set_neurons(t.neurons)
    assert torch.allclose(t.ref_phi, plain.ref_phi, atol=1e-4) and d.rows[-1]['spearman'] < 1

@pytest.mark.parametrize('per_layer, K', [(1., 8), (.1, 8)])
def test_renewed_sets_keep_their_size_and_have_no_twins(per_layer, K):
    g = torch.Generator().manual_seed(1)
    model = tiny_model()
    now = some_neurons(model, K)
    for _ in range(20):
        score = torch.randn(2, 64, generator=g)
        new = renewed(now, score, score > 0, torch.randn(2, 64, generator=g), per_layer=per_layer)
        now = shuffled_like(new, 3, int(torch.randint(99, (1,), generator=g)))
        for s in (new, now): assert len(s) == K == len(set(zip(s.layer.tolist(), s.index.tolist()))) and abs(s.weight.sum() - 1) < 1e-5

def test_nobody_eligible_leaves_the_set_as_it_is():
    now = some_neurons(tiny_model())
    new = renewed(now, torch.rand(2, 64), torch.zeros(2, 64, dtype=torch.bool), torch.ones(2, 64))
    assert set(zip(new.layer.tolist(), new.index.tolist())) == set(zip(now.layer.tolist(), now.index.tolist()))

def test_monitor_resumes_its_log_and_reads_lora_without_the_adapter(tiny, tmp_path):
    from peft import LoraConfig
    lora = LoraConfig(r=4, target_modules=['q_proj', 'down_proj'], lora_dropout=0., task_type='CAUSAL_LM')
    def once(resume=None):
        t = make(tiny, tmp_path, neuron_weight=1., max_steps=4, learning_rate=1e-2, save_strategy='steps', save_steps=2,
                 trainer_kw=dict(peft_config=lora))
        m = Monitor(t, tiny[1], make_problems(3, seed=1), general_texts(2), every=1, max_new_tokens=6)
        t.train(resume_from_checkpoint=resume)
        return m.rows
    rows = once()
    assert [r['step'] for r in rows] == [0, 1, 2, 3,
                                         4] and rows[0]['kl'] == 0 and rows[-1]['kl'] != 0 and rows[0]['norm_set'] == pytest.approx(1)
    assert once(str(tmp_path/'checkpoint-2')) == rows == read_jsonl(tmp_path/'monitor.jsonl')

def test_stop_rule_of_an_unknown_metric_never_fires(): assert not StopRule('nothing').fires([{}, {}, {}])

# --- methods

def sft(tiny, folder, rows, **kw):
    args = SFTConfig(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to='none', bf16=False, use_cpu=True,
                     disable_tqdm=True,
                     logging_steps=1, save_strategy='no', learning_rate=1e-3, **kw)
    t = NeuronSFTTrainer(model=copy.deepcopy(tiny[0]), args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny[1],
                         neurons=some_neurons(tiny[0]), neuron_weight=0.5)
    t.remove_callback(PrinterCallback)
    return t

def test_sft_term_does_not_grow_with_accumulation(tiny, tmp_path):
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS[:4]]
    logs = []
    for b, a in ((4, 1), (2, 2)):
        t = sft(tiny, tmp_path/str(a), rows, gradient_accumulation_steps=a, gradient_checkpointing=False)
        t.args.per_device_train_batch_size = t._train_batch_size = b
        t.args.max_steps = 2
        t.train()
        logs.append([l['grad_norm'] for l in t.state.log_history if 'grad_norm' in l])
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)

def test_a_method_refuses_neurons_that_no_trained_weight_reaches(tiny, tmp_path):
    t = sft(tiny, tmp_path, [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS[:4]], activation_checkpointing=False)
    t.model.requires_grad_(False).model.layers[1].mlp.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match='no trained weight lies before these neurons'): t.train()

def test_a_method_looks_at_the_weights_before_training_alone(tiny, tmp_path, monkeypatch):
    "Their hash takes as long as a step of a small model"
    import yfpo.lm.sets as at
    t, asked = sft(tiny, tmp_path, [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS[:4]], optim='adamw_torch'), []
    t.neurons.meta['chosen_on'] = at.chosen_on(t.model)
    own = at.base_fingerprint
    monkeypatch.setattr(at, 'base_fingerprint', lambda *a: asked.append(1) or own(*a))
    t.neurons.check(t.model)
    t.train()
    assert asked == []

def test_a_text_that_was_never_read_is_refused(tiny, tmp_path):
    t = sft(tiny, tmp_path, [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS[:4]])
    t.ref_phi = {}
    with pytest.raises(ValueError, match='was not read before training'): t.train()

@pytest.mark.parametrize('kw, words', [(dict(neuron_weight=-1.), 'neuron_weight is -1'), (dict(neuron_weight=float('nan')), 'finite'),
                                       (dict(readout='divergent'), 'cannot be used'), (dict(neurons=None), 'needs neurons=')])
def test_bad_settings_are_refused(tiny, tmp_path, kw, words):
    with pytest.raises(ValueError, match=words):
        NeuronSFTTrainer(model=tiny[0], args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False), processing_class=tiny[1],
                         train_dataset=Dataset.from_list([dict(prompt='a', completion='b')]),
                         **{**dict(neurons=some_neurons(tiny[0])), **kw})

@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_only_the_weights_of_the_set_move(family):
    model = random_model(family)
    L, F = model_signature(model)['layers'], model_signature(model)['width']
    s = NeuronSet(torch.tensor([0, L-1]), torch.tensor([1, F-1]), torch.tensor([.5, .5]), torch.ones(2), dict(model=model_signature(model)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with training_only(model, s):
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=.1, weight_decay=0.)
        ids = torch.arange(3, 11)[None]
        model(input_ids=ids, labels=ids).loss.backward(); opt.step()
    moved = {k: (v != before[k]).sum().item() for k, v in model.state_dict().items() if (v != before[k]).any()}
    D = model.config.hidden_size
    assert moved and all(FAMILIES[family].mlp in k for k in moved) and max(moved.values()) <= 2*D
    assert all(p.requires_grad for p in model.parameters()) and sum(moved.values()) <= 2*(3*D + 2)
    assert len(neuron_parameters(model, 0)) >= 2

def by_method(name, tiny, folder, weight, parent=False, **kw):
    "A run of one method, ours or TRL's own"
    trainer, cfg, own = METHODS[name]
    if parent: trainer = next(c for c in trainer.__mro__ if not c.__module__.startswith('yfpo'))
    rows = {'sft': [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS],
            'kto': [dict(prompt=p['prompt'], completion=p[k], label=k == 'chosen') for p in PAIRS for k in ('chosen', 'rejected')]}
    base = dict(max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy='no', bf16=False, use_cpu=True,
                disable_tqdm=True, report_to='none', learning_rate=1e-3, gradient_checkpointing=False, dataloader_pin_memory=False)
    args = cfg(output_dir=str(folder), **{**base, **own, **kw})
    more = {} if parent else dict(neurons=some_neurons(tiny[0]), neuron_weight=weight)
    if parent and name == 'kto': more['ref_model'] = copy.deepcopy(tiny[0])
    data = Dataset.from_list(rows.get(name, PAIRS))
    t = trainer(model=copy.deepcopy(tiny[0]), args=args, train_dataset=data, processing_class=tiny[1], **more)
    t.remove_callback(PrinterCallback)
    t.train()
    return t

def losses(t): return [l['loss'] for l in t.state.log_history if 'loss' in l]

@pytest.mark.parametrize('extra', [dict(gradient_accumulation_steps=2), dict(gradient_checkpointing=True)], ids=lambda d: next(iter(d)))
@pytest.mark.parametrize('name', ['sft', 'simpo', 'cpo', 'orpo', 'kto'])
def test_methods_under_accumulation_and_checkpointing(name, extra, tiny, tmp_path):
    "Weight 0 is the parent's run bit for bit; with a weight, checkpointing changes no loss"
    ours, theirs = by_method(name, tiny, tmp_path/'a', 0., **extra), by_method(name, tiny, tmp_path/'b', 0., parent=True, **extra)
    assert losses(ours) == losses(theirs) and len(losses(ours)) == 3 and equal_weights(ours, theirs)
    if 'gradient_checkpointing' not in extra: return
    on, off = (by_method(name, tiny, tmp_path/k, .5, gradient_checkpointing=k == 'on') for k in ('on', 'off'))
    assert losses(on) == pytest.approx(losses(off), rel=1e-5) and losses(on) != losses(ours)

# --- what is refused before anything is trained

nan = float('nan')

@pytest.fixture(scope='module')
def still(tiny, tmp_path_factory): return make(tiny, tmp_path_factory.mktemp('still'), neuron_weight=.5)

@pytest.mark.parametrize('kw, words', [
    (dict(every=0), 'every is 0: give a whole number'), (dict(every=-1), 'every is -1'), (dict(every='x'), "every is 'x'"),
    (dict(every=nan), 'every is nan'), (dict(warmup=-1), 'warmup is -1'), (dict(warmup=2.5), 'warmup is 2.5'),
    (dict(leave=0), 'leave is 0, which is below 1'), (dict(leave=-1), 'leave is -1'), (dict(leave=float('inf')), 'leave is inf'),
    (dict(per_layer=0), 'per_layer is 0'), (dict(per_layer=5), 'per_layer is 5'), (dict(per_layer='x'), "per_layer is 'x'"),
    (dict(universal=2), 'universal is 2'), (dict(universal=-1), 'universal is -1'), (dict(decay='x'), "decay is 'x'"),
    (dict(decay=1), 'decay is 1: give a number from 0 to below 1'), (dict(batch_size=0), 'batch_size is 0'),
    (dict(evry=1), "Moves has no setting 'evry': did you mean 'every'")])
def test_settings_of_the_selection_are_refused_at_once(still, tiny, kw, words):
    with pytest.raises(ValueError, match=words): DynamicSelection(still, tiny[1], *texts(tiny[1]), **kw)

@pytest.mark.parametrize('kw, words', [
    (dict(every=0), 'every is 0'), (dict(every=-3), 'every is -3'), (dict(every='x'), "every is 'x'"), (dict(every=nan), 'every is nan'),
    (dict(prose='a string'), "the prose texts are one text, 'a string': give a list"), (dict(prose=[None]), 'prose text 0 is None'),
    (dict(draw=5), 'draw is 5: give a function'), (dict(problems=['2+2?']), 'problem 0 is a str: give Problems'),
    (dict(problems=[{}]), 'problem 0 is a dict'), (dict(problems={}), 'problems is a dict'), (dict(problems=[]), 'no problems'),
    (dict(stop=StopRule()), 'watches prose_nll, and there is no prose'), (dict(stop='kl'), "stop is 'kl': give a StopRule"),
    (dict(stop=StopRule('prose_nl'), prose=['Some words.']), "did you mean 'prose_nll'"), (dict(n_samples=0), 'n_samples is 0'),
    (dict(n_sample=2), "Looks has no setting 'n_sample': did you mean 'n_samples'")])
def test_settings_of_the_monitor_are_refused_at_once(still, tiny, kw, words):
    with pytest.raises(ValueError, match=words): Monitor(still, tiny[1], **{**dict(problems=make_problems(1)), **kw})

def test_a_monitor_takes_a_generator_and_a_rule_of_what_it_measures(still, tiny):
    m = Monitor(still, tiny[1], (p for p in make_problems(2)), (t for t in ['One.', 'Two.']), stop=StopRule('prose_nll'), every=1)
    assert len(m.problems) == 2 == len(m.prose)
    for metric in ('kl', 'phi_policy', 'norm_outside'): Monitor(still, tiny[1], make_problems(1), stop=StopRule(metric))

@pytest.mark.parametrize('kw, words', [(dict(patience=1.5), 'patience is 1.5'), (dict(patience='a'), "patience is 'a'"),
                                       (dict(worse_by='x'), "worse_by is 'x'"), (dict(metric=5), 'metric is 5')])
def test_stop_rules_that_cannot_be_are_refused(kw, words):
    with pytest.raises(ValueError, match=words): StopRule(**kw)

PLAIN = {'sft': [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS],
         'kto': [dict(prompt=p['prompt'], completion=p[k], label=k == 'chosen') for p in PAIRS for k in ('chosen', 'rejected')]}

def built(name, tiny, folder, rows=None, change=None, **kw):
    "A trainer of one method, not run"
    cls, cfg, own = METHODS[name]
    args = cfg(output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, bf16=False, use_cpu=True, report_to='none',
               disable_tqdm=True, **own)
    model = copy.deepcopy(tiny[0])
    if change: change(model)
    more = dict(neurons=some_neurons(tiny[0]), train_dataset=PLAIN.get(name, PAIRS) if rows is None else rows)
    return cls(model=model, args=args, processing_class=tiny[1], **{**more, **kw})

def freeze(model): model.requires_grad_(False)
def spoil(model): model.model.layers[0].mlp.down_proj.weight.data[0, 0] = nan

@pytest.mark.parametrize('name', ['sft', 'simpo', 'cpo', 'orpo', 'kto'])
def test_a_method_refuses_what_it_cannot_train(name, tiny, tmp_path):
    from yfpo.lm.training import NotFiniteError
    with pytest.raises(ValueError, match='no weight of the model can be trained'): built(name, tiny, tmp_path, change=freeze)
    with pytest.raises(NotFiniteError, match='weights that are not finite, in model.layers.0.mlp.down_proj'):
        built(name, tiny, tmp_path, change=spoil)
    for k in ('train_dataset', 'eval_dataset'):
        for empty in ([], Dataset.from_list([])):
            with pytest.raises(ValueError, match=f'{k} is empty: give at least one row with prompt'):
                built(name, tiny, tmp_path, **{k: empty})
    with pytest.raises(ValueError, match=r"the readout \['standardised'\] is unknown"):
        built(name, tiny, tmp_path, readout=['standardised'])
    for what in ([], {}, True, tmp_path):
        with pytest.raises(ValueError, match=f'neurons is a {type(what).__name__}, but must be a NeuronSet'):
            built(name, tiny, tmp_path, neurons=what)

@pytest.mark.parametrize('name', ['sft', 'simpo', 'cpo', 'orpo', 'kto'])
def test_a_method_reads_lists_as_datasets(name, tiny, tmp_path):
    rows = PLAIN.get(name, PAIRS)
    ours = built(name, tiny, tmp_path, rows, eval_dataset=dict(own=rows[:2]))
    theirs = built(name, tiny, tmp_path, Dataset.from_list(rows), eval_dataset=dict(own=Dataset.from_list(rows[:2])))
    assert ours.ref_phi == theirs.ref_phi and ours.reward_stats.scale == theirs.reward_stats.scale

@pytest.mark.parametrize('labels', [(0, 5), (-1, 1), ('True', 'False'), (None, True), (.5, 1.)])
def test_labels_of_kto_are_true_or_false(labels, tiny, tmp_path):
    rows = [dict(r, label=labels[i % 2]) for i, r in enumerate(PLAIN['kto'])]
    bad = next(i for i, x in enumerate(labels) if type(x) not in (bool, int) or x not in (0, 1))
    for data in (rows, Dataset.from_list(rows)):
        with pytest.raises(ValueError, match=f'label of row {bad} of train_dataset is {labels[bad]!r}: give True or False'):
            built('kto', tiny, tmp_path, data)

def test_labels_of_kto_may_be_0_and_1(tiny, tmp_path):
    rows = [dict(r, label=int(r['label'])) for r in PLAIN['kto']]
    assert built('kto', tiny, tmp_path, rows).ref_phi == built('kto', tiny, tmp_path).ref_phi
