"YFPOTrainer against TRL's DPOTrainer, a naive oracle and itself: weight 0, gradients, accumulation, resume, LoRA, saving, refusals"
import copy, json, os, re
os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1')
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer
from yfpo.models import load_model, tiny_model
from yfpo.neurons import NeuronSet, model_signature
from yfpo.reward import READOUTS, NeuronReader, RewardStats, contributions
from yfpo.trainer import YFPOConfig, YFPOTrainer, lean_head, spoken_example, spoken_mask, train_sft

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')

def chat(q, good, bad): return dict(prompt=[dict(role='user', content=q)], chosen=[dict(role='assistant', content=good)],
                                    rejected=[dict(role='assistant', content=bad)])
PAIRS = [chat(f'{a} + {b} = ?', f'{a}+{b}={a+b}\n#### {a+b}', f'{a}+{b}={a+b+d}, so it is\n#### {a+b+d}'[:14 + 5*i])
         for i, (a, b, d) in enumerate(((3, 4, 1), (12, 9, -2), (5, 5, 10), (20, 7, 3), (8, 31, -1), (6, 2, 2)))]

@pytest.fixture(scope='module')
def tiny():
    torch.set_num_threads(1)
    return load_model('tiny')

def some_neurons(model, K=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(128, generator=g)[:K]
    w = torch.rand(K, generator=g)
    return NeuronSet(flat//64, flat % 64, w/w.sum(), torch.randint(0, 2, (K,), generator=g).float()*2 - 1,
                     dict(model=model_signature(model), selector='hand'))

def config(folder, cls=YFPOConfig, **kwargs):
    base = dict(max_steps=5, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, save_strategy='no', disable_tqdm=True,
                bf16=False, activation_checkpointing=False, dataloader_pin_memory=False)
    return cls(output_dir=str(folder), **{**base, **kwargs})

def make(tiny, folder, rows=PAIRS, model=None, trainer_kw={}, **kwargs):
    model = copy.deepcopy(tiny[0]) if model is None else model
    t = YFPOTrainer(model=model, args=config(folder, **kwargs), train_dataset=rows, processing_class=tiny[1], neurons=some_neurons(tiny[0]),
                    **trainer_kw)
    t.remove_callback(PrinterCallback)
    return t

def run(*args, resume=None, **kwargs):
    t = make(*args, **kwargs)
    t.train(resume_from_checkpoint=resume)
    return t

def column(t, key): return [l[key] for l in t.state.log_history if key in l]
def equal_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

# --- weight 0

@pytest.mark.parametrize('extra', [{}, dict(gradient_accumulation_steps=2), dict(activation_checkpointing=True),
                                   dict(precompute_ref_log_probs=True), dict(loss_type='ipo')])
def test_weight_zero_is_dpo_bit_for_bit(tiny, tmp_path, extra):
    ours = run(tiny, tmp_path/'a', neuron_weight=0., **extra)
    ref = None if 'precompute_ref_log_probs' in extra else copy.deepcopy(tiny[0])
    trl = DPOTrainer(model=copy.deepcopy(tiny[0]), ref_model=ref, args=config(tmp_path/'b', DPOConfig, **extra),
                     train_dataset=Dataset.from_list(PAIRS), processing_class=tiny[1])
    trl.train()
    assert len(column(trl, 'loss')) == 5
    for key in ('loss', 'grad_norm', 'rewards/margins', 'logps/chosen', 'entropy'): assert column(ours, key) == column(trl, key), key
    assert equal_weights(ours, trl) and not equal_weights(ours, make(tiny, tmp_path/'c'))
    assert 'neurons/margins' in ours.state.log_history[0]

def test_no_neurons_at_weight_zero_is_plain_dpo(tiny, tmp_path):
    t = YFPOTrainer(model=copy.deepcopy(tiny[0]), args=config(tmp_path, neuron_weight=0), train_dataset=PAIRS, processing_class=tiny[1])
    t.train()
    assert not any(k.startswith('neurons') for k in t.state.log_history[0]) and column(t, 'loss')[0] == pytest.approx(0.693147, abs=1e-6)

# --- the neuron term

def naive_loss(model, ref, tok, neurons, stats, weight, literal):
    "Everything by hand, one response at a time, from the text on"
    def look(m, p, r):
        head = tok.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        full = tok(tok.apply_chat_template(p + r, tokenize=False), add_special_tokens=False).input_ids
        start, body = len(tok(head, add_special_tokens=False).input_ids), len(tok(r[0]['content'], add_special_tokens=False).input_ids)
        x, acts = torch.tensor([full]), {}
        hooks = [layer.mlp.down_proj.register_forward_pre_hook(lambda _, a, l=l: acts.__setitem__(l, a[0]))
                 for l, layer in enumerate(m.model.layers)]
        lp = m(x).logits.log_softmax(-1)
        for h in hooks: h.remove()
        logp = sum(lp[0, t-1, full[t]] for t in range(start, len(full)))
        phi = 0.
        for k in range(len(neurons)):
            l, i = int(neurons.layer[k]), int(neurons.index[k])
            a = acts[l][0, start:start + body, i]
            if literal: phi = phi + a.mean()/len(neurons); continue
            c = neurons.direction[k]*a*m.model.layers[l].mlp.down_proj.weight[:, i].detach().norm()
            phi = phi + neurons.weight[k]*((c - stats.mean[k])/stats.std[k]).clamp(-3, 3).mean()
        return logp, phi
    out = 0.
    for row in PAIRS[:3]:
        (pw, fw), (pl, fl) = (look(model, row['prompt'], row[k]) for k in ('chosen', 'rejected'))
        with torch.no_grad(): (rw, gw), (rl, gl) = (look(ref, row['prompt'], row[k]) for k in ('chosen', 'rejected'))
        margin = (fw - fl) if literal else ((fw - fl) - (gw - gl))/stats.scale
        out = out - F.logsigmoid(0.1*((pw - rw) - (pl - rl))) - weight*(margin if literal else F.logsigmoid(2.*margin - 0.5))
    return out/3

@pytest.mark.parametrize('literal', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_loss_and_gradient_against_a_naive_oracle(tiny, tmp_path, literal, checkpointing):
    kw = dict(readout='paper-literal', objective='add-linear') if literal else dict(neuron_kappa=2., neuron_margin=0.5)
    t = make(tiny, tmp_path, PAIRS[:3], per_device_train_batch_size=3, neuron_weight=0.7, activation_checkpointing=checkpointing, **kw)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        for p in t.model.parameters(): p.add_(0.02*torch.randn(p.shape, generator=g))          # away from the reference
    other = copy.deepcopy(tiny[0]); other.load_state_dict(t.model.state_dict())
    if checkpointing: t.model.activation_checkpointing_enable()
    t.model.train()
    loss = t.compute_loss(t.model, t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(3)])))
    loss.backward()
    slow = naive_loss(other, tiny[0], tiny[1], t.neurons, t.reward_stats, 0.7, literal)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-4)
    for (n, p), q in zip(t.model.named_parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=2e-3, atol=2e-4*q.grad.abs().max().item()), n

def test_logged_loss_is_trl_plus_weighted_term_and_training_raises_the_margin(tiny, tmp_path):
    t = run(tiny, tmp_path, neuron_weight=0.5, max_steps=12, per_device_train_batch_size=6)
    assert column(t, 'loss')[0] == pytest.approx(1.5*0.6931472, abs=1e-4)
    assert column(t, 'neurons/margins')[-1] > 0.5 > abs(column(t, 'neurons/margins')[0]) and column(t, 'neurons/accuracies')[-1] > 0.6
    for c, r, m in zip(*(column(t, f'neurons/{k}') for k in ('chosen', 'rejected', 'margins'))): assert c - r == pytest.approx(m, abs=1e-5)

def test_the_same_trajectory_with_checkpointing_precompute_and_given_stats(tiny, tmp_path):
    base = run(tiny, tmp_path/'0', neuron_weight=0.5)
    again = run(tiny, tmp_path/'1', neuron_weight=0.5, activation_checkpointing=True)
    pre = run(tiny, tmp_path/'2', neuron_weight=0.5, precompute_ref_log_probs=True)
    given = run(tiny, tmp_path/'3', neuron_weight=0.5, trainer_kw=dict(reward_stats=base.reward_stats))
    for other in (again, given): assert column(base, 'loss') == column(other, 'loss') and equal_weights(base, other)
    assert column(pre, 'loss') == pytest.approx(column(base, 'loss'), abs=1e-5)

def test_accumulation_is_the_big_batch(tiny, tmp_path):
    big, small = (run(tiny, tmp_path/str(b), neuron_weight=0.5, per_device_train_batch_size=b, gradient_accumulation_steps=6//b,
                      max_steps=3) for b in (6, 2))
    assert column(big, 'loss') == pytest.approx(column(small, 'loss'), abs=1e-4)
    assert column(big, 'grad_norm') == pytest.approx(column(small, 'grad_norm'), rel=1e-3)

def test_lean_head_gives_the_same_losses_and_restores(tiny, tmp_path):
    from trl.trainer import utils
    before, base = utils._use_triton, run(tiny, tmp_path/'0', neuron_weight=0.5)
    with lean_head(): lean = run(tiny, tmp_path/'1', neuron_weight=0.5)
    assert column(lean, 'loss') == pytest.approx(column(base, 'loss'), abs=1e-5) and utils._use_triton is before

# --- resume, evaluation, saving

def test_resume_continues_the_same_trajectory(tiny, tmp_path):
    kw = dict(neuron_weight=0.5, save_strategy='steps', save_steps=2, max_steps=6)
    whole = run(tiny, tmp_path/'a', **kw)
    t = make(tiny, tmp_path/'a', **kw)
    t.train(resume_from_checkpoint=str(tmp_path/'a'/'checkpoint-4'))
    assert column(t, 'loss') == column(whole, 'loss') and equal_weights(t, whole)
    assert NeuronSet.load(tmp_path/'a'/'checkpoint-4'/'neurons') == whole.neurons and (tmp_path/'a'/'README.md').exists()

def test_evaluation_of_own_and_of_later_data_agree(tiny, tmp_path):
    t = run(tiny, tmp_path, neuron_weight=0.5, trainer_kw=dict(eval_dataset=PAIRS[:4]), per_device_eval_batch_size=4)
    own, later = t.evaluate(), t.evaluate(PAIRS[:4])
    for k in ('eval_loss', 'eval_neurons/margins', 'eval_neurons/loss'): assert own[k] == pytest.approx(later[k], abs=1e-4)
    assert own['eval_loss'] > 0 and set(t.evaluate({'x': PAIRS[:2]})) >= {'eval_x_loss'}

def test_saved_folder_is_complete_and_plain(tiny, tmp_path):
    t = run(tiny, tmp_path/'out', neuron_weight=0.5)
    t.save_model(str(tmp_path/'m'))
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), t.model.state_dict().values()))
    stats = RewardStats.load(tmp_path/'m'/'reward')
    assert stats.scale == t.reward_stats.scale and torch.equal(stats.std, t.reward_stats.std)
    make(tiny, tmp_path/'next', model=again, neuron_weight=0.5)                                  # training can go on from the folder

# --- LoRA

@pytest.mark.parametrize('target', [['down_proj'], ['q_proj', 'up_proj']])
def test_lora(tiny, tmp_path, target):
    from peft import LoraConfig
    lora = lambda: dict(peft_config=LoraConfig(r=4, target_modules=target, lora_dropout=0., task_type='CAUSAL_LM'))
    t = run(tiny, tmp_path/'a', neuron_weight=0.5, learning_rate=1e-2, max_steps=8, per_device_train_batch_size=6,
            trainer_kw=dict(eval_dataset=PAIRS, **lora()), per_device_eval_batch_size=6)
    assert column(t, 'loss')[0] == pytest.approx(1.5*0.6931472, abs=1e-4) and column(t, 'loss')[-1] < column(t, 'loss')[0]
    own, later = t.evaluate(), t.evaluate(PAIRS)   # the second reads the reference with the adapter off
    assert own['eval_neurons/margins'] == pytest.approx(later['eval_neurons/margins'], abs=1e-4)
    zero = run(tiny, tmp_path/'b', neuron_weight=0., trainer_kw=lora())
    trl = DPOTrainer(model=copy.deepcopy(tiny[0]), args=config(tmp_path/'c', DPOConfig), train_dataset=Dataset.from_list(PAIRS),
                     processing_class=tiny[1], **lora())
    trl.train()
    assert column(zero, 'loss') == column(trl, 'loss') and equal_weights(zero, trl)

# --- which tokens

def test_spoken_tokens_of_trl_batches_are_the_words_of_the_response(tiny, tmp_path):
    t = make(tiny, tmp_path)
    batch = t.data_collator([t.train_dataset[i] for i in range(6)])
    mask = spoken_mask(batch['input_ids'], batch['completion_mask'], t.special)
    said = [tiny[1].decode(ids[m]) for ids, m in zip(batch['input_ids'], mask)]
    assert said == [p[k][0]['content'] for k in ('chosen', 'rejected') for p in PAIRS]
    for i, row in enumerate(t.train_dataset):
        e = spoken_example(row['prompt_ids'], row['chosen_ids'], set(t.special.tolist()))
        assert mask[i].nonzero()[:, 0].tolist() == list(range(e.start, len(e.ids)))

# --- SFT

def test_sft_learns_completions_only_and_leaves_the_model_clean(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    log = train_sft(model, tiny[1], rows, tmp_path, epochs=8, batch_size=3, learning_rate=3e-3)
    again = copy.deepcopy(tiny[0])
    assert train_sft(again, tiny[1], rows, tmp_path, epochs=8, batch_size=3,
                     learning_rate=3e-3) == log and log[-1]['loss'] < log[0]['loss'] - 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert 'forward' not in model.__dict__ and not model.training and all(p.grad is None for p in model.parameters())
    ids = [tiny[1].apply_chat_template(r['prompt'] + r['completion'], tokenize=True)['input_ids'] for r in rows[:1]][0]
    start = len(tiny[1].apply_chat_template(rows[0]['prompt'], add_generation_prompt=True)['input_ids'])
    lp = tiny[0](torch.tensor([ids])).logits.log_softmax(-1)[0]
    nll = -torch.stack([lp[t-1, ids[t]] for t in range(start, len(ids))]).mean()
    one = train_sft(copy.deepcopy(tiny[0]), tiny[1], rows[:1], tmp_path, batch_size=1)
    assert one[0]['loss'] == pytest.approx(nll.item(), rel=1e-4)

# --- refusals

def test_a_foreign_or_missing_neuron_set_is_refused(tiny, tmp_path):
    neurons = some_neurons(tiny_model(neurons=32))
    with pytest.raises(ValueError, match='selected in another model'):
        YFPOTrainer(model=tiny[0], args=config(tmp_path), train_dataset=PAIRS, processing_class=tiny[1], neurons=neurons)
    with pytest.raises(ValueError, match='there are no neurons'):
        YFPOTrainer(model=tiny[0], args=config(tmp_path), train_dataset=PAIRS, processing_class=tiny[1])

same = {**PAIRS[0], 'rejected': PAIRS[0]['chosen']}
empty = {**PAIRS[0], 'chosen': [dict(role='assistant', content=' ')]}
@pytest.mark.parametrize('rows, words', [([], 'is empty'), (None, 'is empty'), ([PAIRS[0], same], 'row 1 .* same text'),
                                         ([empty], 'empty chosen response'),
    ([dict(prompt='a', chosen='b')], "no 'rejected' column"), (Dataset.from_list([dict(prompt='a', chosen='b')]), "no 'rejected' column")])
def test_bad_rows_are_refused_in_a_sentence(tiny, tmp_path, rows, words):
    with pytest.raises(ValueError, match=words): make(tiny, tmp_path, rows)

@pytest.mark.parametrize('kw, words',
                         [(dict(neuron_weight=-0.1), 'neuron_weight is -0.1'), (dict(neuron_weight=float('nan')), 'not a finite number'),
    (dict(objective='add-logstic'), "did you mean 'add-logistic'"), (dict(readout='papr-literal'), "did you mean 'paper-literal'"),
    (dict(neuron_kappa=0), 'slope must be above 0'),
    (dict(activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=True)), 'no gradient')])
def test_bad_settings_are_refused_in_a_sentence(tmp_path, kw, words):
    with pytest.raises(ValueError, match=words): config(tmp_path, **kw)

def test_reentrant_checkpointing_is_allowed_at_weight_zero_and_truncation_is_reported(tiny, tmp_path):
    run(tiny, tmp_path/'a', neuron_weight=0., activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=True),
        max_steps=1)
    with pytest.raises(ValueError, match='max_length=12'): make(tiny, tmp_path/'b', max_length=12)

def test_defaults_that_differ_from_trl(tmp_path):
    ours, trl = YFPOConfig(str(tmp_path)), DPOConfig(str(tmp_path), bf16=False)
    new = {'neuron_weight', 'objective', 'neuron_kappa', 'neuron_margin', 'readout'}
    a, b = ours.to_dict(), trl.to_dict()
    forced = {'use_cpu', 'dataloader_pin_memory'} if not torch.accelerator.is_available() else set()   # what a CPU means
    assert set(a) - set(b) == new and {k for k in b if a[k] != b[k]} <= {'bf16', 'logging_dir', *forced}
    assert all(YFPOConfig.__dataclass_fields__[k].metadata['help'] for k in new)

def test_the_quick_start_runs(tmp_path, monkeypatch):
    "The README's own lines on the embedded model, with four texts and two pairs"
    code = re.search(r'## On your own model and data.*?```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    space = dict(math_texts=['3 + 4 = 7, so there are 7 apples.', 'Half of 18 is 18 / 2 = 9.'],
                 other_texts=['The river was wide and slow, and the boats lay still.',
                              'She closed the door behind her and walked down to the sea.'], pairs=PAIRS[:2])
    exec(code, space)
    assert space['trainer'].state.global_step == 3 and len(space['neurons']) and (tmp_path/'neurons').is_dir()

def test_bf16_trains_on_a_cpu(tiny, tmp_path):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    assert all(r['loss'] > 0 for r in train_sft(model, tok, rows, str(tmp_path/'s'), bf16=True))
    t = YFPOTrainer(model=model, args=YFPOConfig(output_dir=str(tmp_path/'d'), bf16=True, max_steps=1), train_dataset=PAIRS,
                    processing_class=tok, neurons=some_neurons(model))
    t.train()
    assert all(p.dtype == torch.float32 for p in model.parameters())
