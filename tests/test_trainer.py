"YFPOTrainer against TRL's DPOTrainer, a naive oracle and itself: weight 0, gradients, accumulation, resume, LoRA, saving, refusals"
import copy, json, math, os, re, signal, subprocess, sys, warnings
os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1')
import pytest, torch
import torch.nn.functional as F
from conftest import ROOT
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer
from yfpo.loss import OBJECTIVES, PER_TOKEN, PREFERENCE_LOSSES, preference_loss
from yfpo.lm.decoding import Edit
from yfpo.lm.models import base_fingerprint, load_model, tiny_model
from yfpo.neurons import NeuronSet, chosen_on, model_signature, outside
from yfpo.lm.packing import PACKS
from yfpo.lm.responses import Example
from yfpo.reward import READOUTS, NeuronReader, RewardStats, contributions
from yfpo.lm.rows import completion_dataset, preference_dataset, spoken_example, spoken_mask, turn_spans
from yfpo.trainer import YFPOConfig, YFPOTrainer, pair_rewards, watched
from yfpo.lm.training import NotFiniteError, complete_checkpoint, lean_head, train_sft

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')

def chat(q, good, bad): return dict(prompt=[dict(role='user', content=q)], chosen=[dict(role='assistant', content=good)],
                                    rejected=[dict(role='assistant', content=bad)])
PAIRS = [chat(f'{a} + {b} = ?', f'{a}+{b}={a+b}\n#### {a+b}', f'{a}+{b}={a+b+d}, so it is\n#### {a+b+d}'[:14 + 5*i])
         for i, (a, b, d) in enumerate(((3, 4, 1), (12, 9, -2), (5, 5, 10), (20, 7, 3), (8, 31, -1), (6, 2, 2)))]

def turns(*said): return [dict(role=r, content=c) for r, c in zip(('user', 'assistant')*9, said)]
nan, inf = math.nan, math.inf

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
                                   dict(precompute_ref_log_probs=True), dict(loss_type='ipo'), dict(loss_type=['sigmoid', 'sft'])])
@pytest.mark.parametrize('objective', ['add-logistic', 'yoked', 'reweight'])
def test_weight_zero_is_dpo_bit_for_bit(tiny, tmp_path, extra, objective):
    ours = run(tiny, tmp_path/'a', neuron_weight=0., objective=objective, share_prompts=False, **extra)
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

METRICS = ('loss', 'grad_norm', 'rewards/margins', 'rewards/accuracies', 'logps/chosen', 'logps/rejected', 'entropy', 'mean_token_accuracy',
           'logits/chosen', 'logits/rejected', 'neurons/margins', 'neurons/size', 'neurons/size_outside', 'neurons/clipped')

@pytest.mark.parametrize('extra', [{}, dict(gradient_accumulation_steps=2), dict(activation_checkpointing=True), dict(loss_type='ipo'),
                                   dict(precompute_ref_log_probs=True), dict(loss_type=['sigmoid', 'sft']), dict(use_weighting=True),
                                   dict(ld_alpha=0.5), dict(anchor_weight=0.3), dict(objective='yoked'), dict(objective='reweight'),
                                   dict(readout='divergent'), dict(max_length=40), dict(bf16=True, per_device_train_batch_size=1)])
def test_shared_prompts_change_nothing_but_the_work(tiny, tmp_path, extra):
    kw = dict(neuron_weight=0.5, eval_strategy='steps', eval_steps=5, trainer_kw=dict(eval_dataset=PAIRS), **extra)
    done, hooks = dict(on=0, off=0), []
    def made(name):
        t = make(tiny, tmp_path/name, share_prompts=name == 'on', **kw)
        def count(module, args): done[name] += args[0].shape[0]*args[0].shape[1]
        hooks.append(t.model.model.layers[0].mlp.register_forward_pre_hook(Edit(count)))
        t.train()
        return t
    on, off = made('on'), made('off')
    loose = 1e-1 if extra.get('bf16') else 2e-4
    for key in METRICS + ('eval_loss', 'eval_neurons/margins'):
        a, b = column(on, key), column(off, key)
        if key == 'rewards/accuracies': a, b = a[1:], b[1:]      # at step 1 the policy is the reference: the sign of its margin is rounding
        least = 1e-2 if extra.get('bf16') and key == 'neurons/clipped' else 1e-6             # one value at the edge of the clip
        assert len(a) == len(b) and a == pytest.approx(b, rel=loose, abs=loose*max(map(abs, b)) + least), key
    assert column(on, 'neurons/share')[1:] == pytest.approx(column(off, 'neurons/share')[1:], abs=5e-2 if extra.get('bf16') else 2e-3)
    if not extra.get('bf16'):
        for x, y in zip(on.model.parameters(), off.model.parameters()): assert torch.allclose(x, y, atol=2e-4)
    assert PACKS[on.model] == {('sdpa', 'torch.float32'): ''}
    assert done['on'] < (0.9 if 'max_length' in extra else 0.75)*done['off']

@pytest.mark.parametrize('precompute', [False, True])
def test_twenty_steps_of_weight_zero_are_trls_losses(tiny, tmp_path, precompute):
    kw = dict(max_steps=20, precompute_ref_log_probs=precompute)
    ours = run(tiny, tmp_path/'a', neuron_weight=0., **kw)
    trl = DPOTrainer(model=copy.deepcopy(tiny[0]), ref_model=None if precompute else copy.deepcopy(tiny[0]),
                     args=config(tmp_path/'b', DPOConfig, **kw), train_dataset=Dataset.from_list(PAIRS), processing_class=tiny[1])
    trl.train()
    assert len(column(trl, 'loss')) == 20 and column(trl, 'loss')[-1] < 0.6
    assert column(ours, 'loss') == pytest.approx(column(trl, 'loss'), rel=1e-4)

def test_a_model_that_cannot_be_packed_is_trained_the_plain_way(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    model.config._attn_implementation = 'paged|sdpa'
    with pytest.warns(UserWarning, match='prompts are not shared: its attention, paged'):
        t = make(tiny, tmp_path, model=model, neuron_weight=0.)
    assert t._packed(t.model, batch_of(t)) is None
    model.config._attn_implementation = 'sdpa'
    windowed = make(tiny, tmp_path, neuron_weight=0.)
    windowed.model.config.sliding_window = 20                  # columns of a packed row are not positions
    assert windowed._packed(windowed.model, batch_of(windowed)) is None

def test_prompt_learning_goes_the_plain_way(tiny, tmp_path):
    from peft import PromptTuningConfig
    tuned = dict(peft_config=PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3))
    def made(name, **more):
        args = config(tmp_path/name, neuron_weight=0., max_steps=2, **more)
        t = YFPOTrainer(model=copy.deepcopy(tiny[0]), args=args, train_dataset=PAIRS, processing_class=tiny[1], **tuned)
        t.remove_callback(PrinterCallback)
        t.train()
        return column(t, 'loss')
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match='PromptTuningConfig counts positions by column'): on = made('on')
    torch.manual_seed(0)
    assert on == made('off', share_prompts=False)

def test_too_many_logits_are_left_to_the_model(tiny, tmp_path, monkeypatch):
    "Beyond the limit TRL's own head scores the padded batch; the neurons are read as ever"
    from yfpo.lm.packing import PackedForward
    logs = []
    for limit in (2**30, 100):
        monkeypatch.setattr(PackedForward, 'limit', limit)
        t = run(tiny, tmp_path/str(limit), neuron_weight=0.5, anchor_weight=0.2, max_steps=3)
        logs.append([column(t, k) for k in ('loss', 'neurons/margins', 'grad_norm')])
    for a, b in zip(*logs): assert a == pytest.approx(b, rel=1e-3, abs=1e-5)

# --- the neuron term

def moved(t, seed=3):
    "The trainer's model a little away from its reference"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in t.model.parameters(): p.add_(0.02*torch.randn(p.shape, generator=g))
    return t

def batch_of(t, n=3): return t._prepare_inputs(t.data_collator([t.train_dataset[i] for i in range(n)]))

@pytest.mark.parametrize('name', PREFERENCE_LOSSES)
def test_each_preference_loss_is_trls_own(tiny, tmp_path, name):
    "The whole of TRL's loss code on a real batch, against our one line"
    t = moved(make(tiny, tmp_path, neuron_weight=0., loss_type=[name], label_smoothing=0.05, beta=0.3))
    batch = dict(batch_of(t, 4)); batch.pop('ref_row')
    with watched(t.model, t.ref_model, [t.neurons]) as (_, logps): theirs = DPOTrainer.compute_loss(t, t.model, batch)
    w, l = pair_rewards(logps, batch, 0.3)['mean' if name in PER_TOKEN else 'sum'].T
    ours = preference_loss(name, w, l, 0.3, 0.05, t.args.discopop_tau).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    grads = [torch.autograd.grad(x, t.model.model.layers[0].mlp.up_proj.weight, retain_graph=True)[0] for x in (theirs, ours)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5*grads[0].abs().max().item())

def naive_loss(model, ref, tok, neurons, stats, weight, objective, literal=False, kappa=1., m=0., mean_weight=1.):
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
        d, frozen = 0.1*((pw - rw) - (pl - rl)), (gw - gl)/stats.scale
        out = out + {'add-linear': lambda: -F.logsigmoid(d) - weight*margin,
                     'add-logistic': lambda: -F.logsigmoid(d) - weight*F.logsigmoid(kappa*margin - m),
                     'yoked': lambda: -F.logsigmoid(d + weight*margin), 'offset': lambda: -F.logsigmoid(d - weight*frozen),
                     'reweight': lambda: -F.logsigmoid(d)*2*torch.sigmoid(weight*frozen)/mean_weight}[objective]()
    return out/3

@pytest.mark.parametrize('objective, literal', [(o, False) for o in OBJECTIVES] + [('add-linear', True)])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_loss_and_gradient_against_a_naive_oracle(tiny, tmp_path, objective, literal, checkpointing):
    kw = dict(readout='paper-literal') if literal else dict(neuron_kappa=2., neuron_margin=0.5)
    t = moved(make(tiny, tmp_path, PAIRS[:3], per_device_train_batch_size=3, neuron_weight=0.7, activation_checkpointing=checkpointing,
                   objective=objective, **kw))
    other = copy.deepcopy(tiny[0]); other.load_state_dict(t.model.state_dict())
    if checkpointing: t.model.activation_checkpointing_enable()
    t.model.train()
    loss = t.compute_loss(t.model, batch_of(t))
    loss.backward()
    slow = naive_loss(other, tiny[0], tiny[1], t.neurons, t.reward_stats, 0.7, objective, literal, 2., 0.5, t.term.mean_weight)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-4)
    for (n, p), q in zip(t.model.named_parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=2e-3, atol=2e-4*q.grad.abs().max().item()), n

def test_yoked_loss_keeps_what_else_trl_computes(tiny, tmp_path):
    "A weighted sum of losses: the neurons enter the two pair losses, the SFT part stays TRL's"
    kw = dict(loss_type=['sigmoid', 'ipo', 'sft'], loss_weights=[1., 0.01, 0.5], objective='yoked')
    t = moved(make(tiny, tmp_path, neuron_weight=0.7, share_prompts=False, **kw))
    with torch.no_grad():
        batch = batch_of(t)
        t.set_weight(0.); plain = t.compute_loss(t.model, batch).item()
        t.set_weight(0.7)
        with watched(t.model, t.ref_model, [t.neurons]) as (_, logps): full = t.compute_loss(t.model, batch).item()
        margin = torch.tensor([t._metrics['train' if t.model.training else 'eval'][f'neurons/{k}'][-1] for k in ('chosen', 'rejected')])
    assert full != pytest.approx(plain, abs=1e-4) and margin.abs().sum() > 0
    r = pair_rewards(logps, batch, t.args.beta)
    a, b = r['sum'].diff(dim=1)[:, 0], r['mean'].diff(dim=1)[:, 0]
    base = (-F.logsigmoid(-a)).mean() + 0.01*((-b/0.1 - 5)**2).mean()
    assert plain - base.item() == pytest.approx(0.5*_sft_part(logps[0], batch), rel=1e-4)

def _sft_part(logp, batch):
    n = len(logp)//2
    return -(logp[:n].sum()/batch['completion_mask'][:n, 1:].sum()).item()

@pytest.mark.parametrize('side', ['chosen', 'rejected'])
def test_grad_to_reaches_one_side_only(tiny, tmp_path, side):
    "With the DPO part's gradient taken off, a response on the other side gets none from the neuron term"
    t = moved(make(tiny, tmp_path, neuron_weight=1., grad_to=side, share_prompts=False))
    seen = []
    h = t.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, x: (seen.append(x[0]), x[0].retain_grad())[0])
    batch = batch_of(t)
    full = t.compute_loss(t.model, batch)
    t.set_weight(0.)
    plain = t.compute_loss(t.model, batch)
    h.remove()
    full.backward(); plain.backward()
    extra = (seen[0].grad - seen[1].grad).abs().sum((1, 2)).view(2, -1).amax(1)       # chosen half, rejected half
    quiet, loud = (extra[1], extra[0]) if side == 'chosen' else (extra[0], extra[1])
    assert quiet < 1e-6*loud

def test_anchor_pulls_the_neurons_outside_back(tiny, tmp_path):
    t = moved(make(tiny, tmp_path, neuron_weight=0., anchor_weight=0.5, n_outside=40))
    inside = set(zip(t.neurons.layer.tolist(), t.neurons.index.tolist()))
    assert len(t.term.outside) == 40 and not inside & set(zip(t.term.outside.layer.tolist(), t.term.outside.index.tolist()))
    batch = batch_of(t)
    full = t.compute_loss(t.model, batch).item()
    t.args.anchor_weight = 0.
    plain = t.compute_loss(t.model, batch).item()
    mask = spoken_mask(batch['input_ids'], batch['completion_mask'], t.rewarded.special)
    def contribution(m, l, i):
        seen = []
        h = m.model.layers[l].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][..., i]))
        with torch.no_grad(): m.model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'])
        h.remove()
        return seen[0]*m.model.layers[l].mlp.down_proj.weight[:, i].norm()
    drift = 0.
    for j, (l, i) in enumerate(zip(t.term.outside.layer.tolist(), t.term.outside.index.tolist())):
        d = (contribution(t.model, l, i) - contribution(tiny[0], l, i))/t.term.outside_stats.std[j]
        drift += ((d.square()*mask).sum(1)/mask.sum(1)).mean().item()/40
    assert full - plain == pytest.approx(0.5*drift, rel=1e-3) and drift > 0
    free, held = (run(tiny, tmp_path/str(w), neuron_weight=1., anchor_weight=w, max_steps=15, learning_rate=3e-3) for w in (0., 3.))
    assert drift_outside(held) < 0.8*drift_outside(free)

def drift_outside(t):
    "The anchor's own measure on the first pairs, by the difference it makes to the loss"
    t.model.eval()
    def loss(w): t.args.anchor_weight = w; return t.compute_loss(t.model, batch_of(t, 6)).item()
    with torch.no_grad(): return loss(1.) - loss(0.)

def test_outside_sample_is_seeded_and_a_full_set_is_refused(tiny):
    a, b, c = (outside(some_neurons(tiny[0]), 30, s) for s in (0, 0, 1))
    assert a == b and a != c
    assert len(outside(some_neurons(tiny[0], 128 - 3))) == 3
    with pytest.raises(ValueError, match='every neuron'): outside(some_neurons(tiny[0], 128))

@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_objective_trains_and_logs(tiny, tmp_path, objective):
    t = run(tiny, tmp_path, neuron_weight=0.5, objective=objective, max_steps=12, per_device_train_batch_size=6,
            trainer_kw=dict(eval_dataset=PAIRS[:4]), loss_type=['sigmoid'])
    keys = {f'neurons/{k}' for k in ('chosen', 'rejected', 'margins', 'accuracies', 'ref_margins', 'clipped', 'share', 'size',
                                     'size_outside')}
    assert keys <= set(t.state.log_history[0]) and all(0 <= x <= 1 for x in column(t, 'neurons/share'))
    assert column(t, 'loss')[-1] < column(t, 'loss')[0]
    if OBJECTIVES[objective].live: assert column(t, 'neurons/margins')[-1] > 0.3
    assert t.evaluate()['eval_neurons/size'] > 0 and 0.5 < column(t, 'neurons/size')[0] < 2

def test_reference_is_read_once_and_kept(tiny, tmp_path, monkeypatch):
    a = run(tiny, tmp_path, neuron_weight=0.5)
    from yfpo import trainer
    def fail(*args, **kw): raise AssertionError('the reference was read again')
    monkeypatch.setattr(trainer, 'fit_and_read', fail)
    b = run(tiny, tmp_path, neuron_weight=0.5)
    assert column(a, 'loss') == column(b, 'loss') and equal_weights(a, b)
    with pytest.raises(AssertionError): make(tiny, tmp_path, rows=PAIRS[:5], neuron_weight=0.5)              # other texts
    with pytest.raises(AssertionError): make(tiny, tmp_path, model=moved(a).model, neuron_weight=0.5)        # another reference
    for kept in (tmp_path/'_reference').glob('*.safetensors'): kept.write_bytes(kept.read_bytes()[:50])        # a broken file is made again
    with pytest.raises(AssertionError): make(tiny, tmp_path, neuron_weight=0.5)

def test_one_reference_folder_serves_every_seed_and_weight(tiny, tmp_path, monkeypatch):
    shared = str(tmp_path/'reference')
    own = [run(tiny, tmp_path/f'own{s}', neuron_weight=0.5, seed=s, data_seed=s) for s in (0, 1)]
    first = run(tiny, tmp_path/'0', neuron_weight=0.5, seed=0, data_seed=0, reference_dir=shared)
    from yfpo import trainer
    from yfpo.lm import tables
    def fail(*args, **kw): raise AssertionError('the reference was read again')
    for module, name in ((trainer, 'fit_and_read'), (tables, 'shared_logprobs')): monkeypatch.setattr(module, name, fail)
    second = run(tiny, tmp_path/'1', neuron_weight=0.5, seed=1, data_seed=1, reference_dir=shared)
    for a, b in zip(own, (first, second)): assert column(a, 'loss') == column(b, 'loss') and equal_weights(a, b)
    assert column(first, 'loss') != column(second, 'loss')
    run(tiny, tmp_path/'2', neuron_weight=2., reference_dir=shared)                                          # the weight does not matter
    assert not (tmp_path/'0'/'reference').exists()

def test_the_reference_table_holds_what_the_reference_says(tiny, tmp_path):
    t = make(tiny, tmp_path, neuron_weight=0.5)
    live, pad = t.compute_ref_log_probs, batch_of(t, 6)
    chosen, rejected = live(t.ref_model, {k: v for k, v in pad.items() if k != 'ref_row'})
    assert torch.allclose(t.ref_logps[pad['ref_row']], torch.stack([chosen, rejected], 1), atol=1e-4)
    for kw in (dict(share_prompts=False), dict(precompute_ref_log_probs=True), dict(ld_alpha=.5)):
        assert make(tiny, tmp_path/'off', neuron_weight=0.5, **kw).ref_logps is None

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
    assert column(base, 'loss') == column(given, 'loss') and equal_weights(base, given)
    for other in (again, pre): assert column(other, 'loss') == pytest.approx(column(base, 'loss'), abs=1e-5)   # attention by mask, or not
    plain = [run(tiny, tmp_path/f'4{on}', neuron_weight=0.5, share_prompts=False, activation_checkpointing=on) for on in (False, True)]
    assert column(plain[0], 'loss') == column(plain[1], 'loss') and equal_weights(*plain)

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

KILLED = '''
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from test_trainer import config, load_model, make, torch
from transformers import TrainerCallback, Trainer
torch.set_num_threads(1)
kind = {kind!r}
class Stop(TrainerCallback):
    def on_substep_end(self, args, state, control, **kw):
        if kind == 'step' and state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)
def dying(name):
    old = getattr(Trainer, name)
    def f(self, *args, **kw):
        if kind == name and self.state.global_step == 6:
            Path(args[0]).mkdir(exist_ok=True); (Path(args[0])/'half').write_text('x')
            os.kill(os.getpid(), signal.SIGKILL)
        return old(self, *args, **kw)
    setattr(Trainer, name, f)
for n in ('_save_rng_state', '_save_optimizer_and_scheduler', '_save'): dying(n)
t = make(load_model('tiny'), Path({folder!r}), trainer_kw=dict(callbacks=[Stop()]), **{kw!r})
t.train(resume_from_checkpoint=True)
'''

@pytest.mark.parametrize('kind', ['step', '_save', '_save_optimizer_and_scheduler', '_save_rng_state'])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny, tmp_path, kind):
    "SIGKILL within a step (between two accumulated batches) or at three points of writing a checkpoint"
    kw = dict(neuron_weight=0.5, save_strategy='steps', save_steps=2, max_steps=8, gradient_accumulation_steps=2)
    code = KILLED.format(tests=str(ROOT/'tests'), kind=kind, folder=str(tmp_path/'a'), kw=kw)
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert complete_checkpoint(tmp_path/'a').endswith('checkpoint-4')
    t, whole = run(tiny, tmp_path/'a', resume=True, **kw), run(tiny, tmp_path/'b', **kw)
    assert column(t, 'loss') == column(whole, 'loss') and len(column(t, 'loss')) == 8 and equal_weights(t, whole)

TWO = '''
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trainer import column, make, load_model, torch
torch.set_num_threads(1)
t = make(load_model('tiny'), Path({folder!r}), per_device_train_batch_size=1, use_cpu=True, **{kw!r})
t.train()
if t.is_world_process_zero():
    keys = ('loss', 'neurons/margins', 'rewards/margins', 'neurons/size_outside')
    Path({folder!r}, 'log.json').write_text(json.dumps([t.accelerator.num_processes, *(column(t, k) for k in keys)]))
'''

@pytest.mark.parametrize('kw', [dict(), dict(objective='yoked', anchor_weight=0.1), dict(objective='reweight'),
                                dict(precompute_ref_log_probs=True)])
def test_two_processes_give_the_losses_of_one(tiny, tmp_path, kw):
    kw = dict(neuron_weight=0.5, max_steps=4, **kw)
    script = tmp_path/'two.py'
    script.write_text(TWO.format(tests=str(ROOT/'tests'), folder=str(tmp_path/'a'), kw=kw))
    launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
              '--mixed_precision', 'no',
              '--dynamo_backend', 'no', '--main_process_port', '0', str(script)]
    r = subprocess.run(launch, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    n, *two = json.loads((tmp_path/'a'/'log.json').read_text())
    one = run(tiny, tmp_path/'b', per_device_train_batch_size=2, **kw)
    assert n == 2
    for k, values in zip(('loss', 'neurons/margins', 'rewards/margins'), two): assert values == pytest.approx(column(one, k), abs=2e-5), k

def test_from_folder_goes_on(tiny, tmp_path):
    a = run(tiny, tmp_path/'a', neuron_weight=0.5)
    a.save_model(str(tmp_path/'m'))
    b = YFPOTrainer.from_folder(tmp_path/'m', config(tmp_path/'b', neuron_weight=0.5), PAIRS, tiny[1])
    b.train()
    assert b.neurons == a.neurons and column(b, 'loss')[0] == pytest.approx(1.5*0.6931472, abs=1e-4)
    keep = YFPOTrainer.from_folder(tmp_path/'m', config(tmp_path/'c', neuron_weight=0.5), PAIRS, tiny[1], keep_stats=True)
    assert keep.reward_stats.scale == a.reward_stats.scale != b.reward_stats.scale
    with pytest.raises(FileNotFoundError, match='no model'): YFPOTrainer.from_folder(tmp_path, config(tmp_path/'d'), PAIRS, tiny[1])

def test_the_card_names_neurons_reward_and_audit(tiny, tmp_path):
    run(tiny, tmp_path, neuron_weight=0.5, save_strategy='steps', save_steps=5, objective='yoked', anchor_weight=.1,
        trainer_kw=dict(card_sections={'Audit': 'no signal that can be told from a coin'}))
    text = (tmp_path/'README.md').read_text()
    for words in ('8 in 2 layers, hand', '`yoked`, Y3: L(r + λ φ̃), λ = 0.5', 'η = 0.1 on 120 neurons outside',
                  '`standardised`', '## Audit', 'told from a coin', 'YFPO'):
        assert words in text, words

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
    zero = run(tiny, tmp_path/'b', neuron_weight=0., share_prompts=False, trainer_kw=lora())
    trl = DPOTrainer(model=copy.deepcopy(tiny[0]), args=config(tmp_path/'c', DPOConfig), train_dataset=Dataset.from_list(PAIRS),
                     processing_class=tiny[1], **lora())
    trl.train()
    assert column(zero, 'loss') == column(trl, 'loss') and equal_weights(zero, trl)

# --- which tokens

def test_spoken_tokens_of_trl_batches_are_the_words_of_the_response(tiny, tmp_path):
    t = make(tiny, tmp_path)
    batch = t.data_collator([t.train_dataset[i] for i in range(6)])
    mask = spoken_mask(batch['input_ids'], batch['completion_mask'], t.rewarded.special)
    said = [tiny[1].decode(ids[m]) for ids, m in zip(batch['input_ids'], mask)]
    assert said == [p[k][0]['content'] for k in ('chosen', 'rejected') for p in PAIRS]
    for i, row in enumerate(t.train_dataset):
        e = spoken_example(row['prompt_ids'], row['chosen_ids'], set(t.rewarded.special.tolist()))
        assert mask[i].nonzero()[:, 0].tolist() == list(range(e.start, len(e.ids)))

def read(t, rows=None):
    "What is read of each response, as text: chosen, then rejected"
    rows = t.train_dataset if rows is None else rows
    batch = t.data_collator([*rows])
    texts = [t._tokenizer.decode(ids[m]) for ids, m in zip(batch['input_ids'], batch['read_mask'])]
    return texts[:len(rows)], texts[len(rows):]

def test_what_is_read_of_one_turn_is_what_the_mask_says(tiny, tmp_path):
    t = make(tiny, tmp_path)
    batch = t.data_collator([*t.train_dataset])
    assert torch.equal(batch['read_mask'], spoken_mask(batch['input_ids'], batch['completion_mask'], t.rewarded.special))
    assert all(type(e) is Example for e in t.table.texts['train_dataset'])

LONG = [dict(p, chosen=[*p['chosen'], *turns('Sure?', 'Yes, it is.')], rejected=[*p['rejected'], *turns('Sure?', f'No, it is {i}.')])
        for i, p in enumerate(PAIRS)]

@pytest.mark.parametrize('readout', ['standardised', 'divergent'])
def test_all_turns_of_the_assistant_are_read(tiny, tmp_path, readout):
    t = make(tiny, tmp_path, LONG, readout=readout)
    said = [[''.join(m['content'] for m in p[k] if m['role'] == 'assistant') for p in LONG] for k in ('chosen', 'rejected')]
    assert list(read(t)) == said
    on, off = (run(tiny, tmp_path/str(s), LONG, neuron_weight=.5, readout=readout, share_prompts=s) for s in (True, False))
    for k in ('loss', 'neurons/margins', 'neurons/chosen'): assert column(on, k) == pytest.approx(column(off, k), abs=2e-4), k
    assert abs(column(on, 'neurons/margins')[0]) < 1e-5 and abs(column(on, 'neurons/margins')[-1]) > .1

def test_the_read_out_of_several_turns_is_the_mean_over_their_words(tiny, tmp_path):
    "By hand, from the text on"
    t, (model, tok) = make(tiny, tmp_path, LONG), tiny
    m, row, s, n = LONG[3], t.train_dataset[3], t.reward_stats, t.neurons
    ids = tok.apply_chat_template(m['prompt'] + m['rejected'])['input_ids']
    assert ids == row['prompt_ids'] + row['rejected_ids']
    own = [tok(x['content'], add_special_tokens=False).input_ids for x in m['rejected'] if x['role'] == 'assistant']
    at = [j + k for w in own for j in range(len(ids)) if ids[j:j + len(w)] == w for k in range(len(w))]
    assert len(at) == sum(map(len, own))
    with NeuronReader(model, n) as reader, torch.no_grad(): model(torch.tensor([ids]))
    z = (contributions(reader.activations()[0, at], n, s.wnorm) - s.mean)/s.std
    assert t.ref_phi[3, 1].item() == pytest.approx((z.clamp(-3, 3) @ n.weight).mean().item(), abs=1e-4)

def templated(tok, template):
    tok = copy.deepcopy(tok)
    tok.chat_template = template
    return tok

@pytest.mark.parametrize('rows', [PAIRS, LONG])
def test_a_template_without_generation_prompt(tiny, tmp_path, rows):
    "The header comes with the answer then, and is not read"
    tok = templated(tiny[1], tiny[1].chat_template.split('{% if add_generation_prompt')[0])
    t = make((tiny[0], tok), tmp_path, rows)
    assert read(t) == read(make(tiny, tmp_path, rows)) and t.train_dataset[0]['chosen_ids'][0] == tok.convert_tokens_to_ids('<|im_start|>')
    run((tiny[0], tok), tmp_path, rows, neuron_weight=.5)

def test_marks_of_the_template_are_taken(tiny, tmp_path):
    "TRL's own way to say which tokens are the assistant's"
    marked = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
              "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
              "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    t = make((tiny[0], templated(tiny[1], marked)), tmp_path, LONG)
    assert read(t) == read(make(tiny, tmp_path, LONG))
    hushed = marked.replace("{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' and 'Yes' not in m['content'] %}")
    assert read(make((tiny[0], templated(tiny[1], hushed)), tmp_path, LONG))[0] == [p['chosen'][0]['content'] for p in LONG]

def test_calls_of_tools_are_read(tiny, tmp_path):
    calling = tiny[1].chat_template.replace("m['content']", "(m['content'] or '') + ('<|im_start|>call ' + m['tool_calls'][0]['name'] if "
                                            "m['tool_calls'] else '')")
    rows = [dict(p, chosen=[dict(role='assistant', content=None, tool_calls=[dict(name=f'add{i}')]), dict(role='tool', content='7'),
                            dict(role='assistant', content=f'It is {i}.')]) for i, p in enumerate(PAIRS)]
    t = make((tiny[0], templated(tiny[1], calling)), tmp_path, rows)
    assert read(t) == ([f'<|im_start|>call add{i}It is {i}.' for i in range(6)], [p['rejected'][0]['content'] for p in PAIRS])

def test_a_template_that_does_not_take_an_answer_everywhere_is_named(tiny, tmp_path):
    strict = "{% if messages | length > 2 and messages[1]['content'] in 'xy' %}{{ raise_exception('no such turn') }}{% endif %}"
    with pytest.raises(ValueError, match=r'turns of row 0 cannot be told apart \(no such turn\)'):
        make((tiny[0], templated(tiny[1], strict + tiny[1].chat_template)), tmp_path, LONG)

def test_what_the_templates_of_trl_say_is_found(tiny):
    "In all of them that take text: header, end of turn and other roles are left out"
    import trl
    from pathlib import Path
    said, checked = turns('2+2=?', 'It is 4.', 'And 3+3?', 'That is 6, of course.'), 0
    for f in sorted((Path(trl.__file__).parent/'chat_templates').glob('*.jinja')):
        if f.name.startswith(('idefics3', 'llava_next', 'smolvlm')): continue   # of processors: content comes in parts
        render = lambda m: tiny[1].apply_chat_template(m, tokenize=False, chat_template=f.read_text())
        text, spans = turn_spans(render, said, 1)
        assert [text[a:b] for a, b in spans] == [said[1]['content'], said[3]['content']], f.name
        checked += 1
    assert checked > 40

def test_later_data_is_read_as_the_training_data(tiny, tmp_path):
    t = run(tiny, tmp_path, LONG, neuron_weight=.5, trainer_kw=dict(eval_dataset=LONG[:4]), per_device_eval_batch_size=4)
    own, later = t.evaluate(), t.evaluate(LONG[:4])
    for k in ('eval_loss', 'eval_neurons/margins'): assert own[k] == pytest.approx(later[k], abs=1e-4)
    pre = run(tiny, tmp_path/'p', LONG, neuron_weight=.5, precompute_ref_log_probs=True, trainer_kw=dict(ref_model=copy.deepcopy(tiny[0])))
    assert pre.evaluate(LONG[:4])['eval_neurons/margins'] == pytest.approx(later['eval_neurons/margins'], abs=1e-3)

@pytest.mark.parametrize('name', ['sft', 'simpo', 'kto'])
def test_the_other_methods_refuse_what_they_would_read_in_part(tiny, tmp_path, name, monkeypatch):
    import test_dynamic
    monkeypatch.setattr(test_dynamic, 'PAIRS', LONG)
    with pytest.raises(ValueError, match=r"goes on behind its first special token, with 'user\\nSure"):
        test_dynamic.by_method(name, tiny, tmp_path, .5)

# --- a reference that moves, or that another trainer read

def test_a_reference_that_follows_the_policy_is_read_anew(tiny, tmp_path):
    "With a full copy after every step, the policy never differs from it: the neurons as little as the log-probabilities"
    kw = dict(neuron_weight=.5, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.)
    for share in (True, False):
        t = run(tiny, tmp_path/str(share), share_prompts=share, **kw)
        for k in ('rewards/margins', 'neurons/margins', 'neurons/chosen'):
            assert column(t, k) == pytest.approx([0.]*5, abs=1e-4), (k, share)
    still = run(tiny, tmp_path/'still', neuron_weight=.5)
    assert abs(column(still, 'neurons/margins')[-1]) > 1e-2

def test_a_model_of_which_only_the_set_moved_is_another_reference(tiny, tmp_path):
    from yfpo.beyond.methods import training_only
    model, shared = copy.deepcopy(tiny[0]), dict(neuron_weight=.5, reference_dir=str(tmp_path/'reference'))
    few = NeuronSet(torch.tensor([0, 1, 1]), torch.tensor([5, 7, 9]), torch.ones(3)/3, torch.ones(3), some_neurons(model).meta)
    with training_only(model, few): run(tiny, tmp_path/'a', model=model, learning_rate=3e-2, **shared)
    t = make(tiny, tmp_path/'b', model=model, **shared)
    batch = batch_of(t, 6)
    live = t.compute_ref_log_probs(t.ref_model, {k: v for k, v in batch.items() if k != 'ref_row'})
    assert torch.allclose(t.ref_logps[batch['ref_row']], torch.stack(live, 1), atol=1e-3)
    assert t.ref_phi.sub(make(tiny, tmp_path/'c', model=model, neuron_weight=.5).ref_phi).abs().max() < 1e-4

# --- SFT

def test_sft_learns_completions_only_and_leaves_the_model_clean(tiny, tmp_path):
    model = copy.deepcopy(tiny[0])
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    log = train_sft(model, tiny[1], rows, tmp_path, num_train_epochs=8, per_device_train_batch_size=3, learning_rate=3e-3)
    again = copy.deepcopy(tiny[0])
    assert train_sft(again, tiny[1], rows, tmp_path, num_train_epochs=8, per_device_train_batch_size=3,
                     learning_rate=3e-3) == log and log[-1]['loss'] < log[0]['loss'] - 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert 'forward' not in model.__dict__ and not model.training and all(p.grad is None for p in model.parameters())
    ids = [tiny[1].apply_chat_template(r['prompt'] + r['completion'], tokenize=True)['input_ids'] for r in rows[:1]][0]
    start = len(tiny[1].apply_chat_template(rows[0]['prompt'], add_generation_prompt=True)['input_ids'])
    lp = tiny[0](torch.tensor([ids])).logits.log_softmax(-1)[0]
    nll = -torch.stack([lp[t-1, ids[t]] for t in range(start, len(ids))]).mean()
    one = train_sft(copy.deepcopy(tiny[0]), tiny[1], rows[:1], tmp_path, per_device_train_batch_size=1)
    assert one[0]['loss'] == pytest.approx(nll.item(), rel=1e-4)

# --- numbers that are not finite

def broken(model):
    "The model with one weight that is not a number"
    model = copy.deepcopy(model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float('nan')
    return model

@pytest.mark.parametrize('kw', [{}, dict(max_grad_norm=0), dict(gradient_accumulation_steps=2), dict(share_prompts=False),
                                dict(neuron_weight=0.), dict(logging_steps=3), dict(objective='yoked', anchor_weight=.1)])
def test_training_stops_at_the_first_number_that_is_not_finite(tiny, tmp_path, kw):
    "Before the optimiser moves: the last checkpoint is the last good one, and nothing is logged as 0"
    t = make(tiny, tmp_path, save_strategy='steps', save_steps=1, save_total_limit=1, **{**dict(learning_rate=1e6, neuron_weight=.5), **kw})
    with pytest.raises(NotFiniteError) as e: t.train()
    said = re.fullmatch(r'the (loss|gradient norm) is (nan|inf) at step (\d), on the pairs ([\d, ]+): nothing of it was saved, the '
                        r'last good checkpoint is (\S+); lower .*', str(e.value))
    assert said, str(e.value)
    rows = [int(x) for x in said[4].split(', ')]
    whole = 2*kw.get('gradient_accumulation_steps', 1) if said[1] == 'gradient norm' else 2
    assert len(rows) in (2, whole) and set(rows) <= set(range(6)) and int(said[3]) == t.state.global_step + 1
    assert [c.name for c in tmp_path.glob('checkpoint-*')] == [f'checkpoint-{t.state.global_step}'] == [said[5].split('/')[-1]]
    good = AutoModelForCausalLM.from_pretrained(said[5])
    assert all(p.isfinite().all() for p in good.parameters())
    assert all(l > 0 and math.isfinite(l) for l in column(t, 'loss')) and all(map(math.isfinite, column(t, 'grad_norm')))

def test_weights_that_overflow_in_the_last_step_are_not_saved(tiny, tmp_path):
    t = make(tiny, tmp_path, learning_rate=1e39, max_steps=1, neuron_weight=.5)
    with pytest.raises(NotFiniteError, match=r'weights, .* are not finite after step 1: they are not saved'): t.train()
    (tmp_path/'m').mkdir(); (tmp_path/'m'/'model.safetensors').write_text('the earlier one')
    with pytest.raises(NotFiniteError, match='not saved'): t.save_model(str(tmp_path/'m'))
    assert (tmp_path/'m'/'model.safetensors').read_text() == 'the earlier one' and len(list((tmp_path/'m').iterdir())) == 1
    with pytest.raises(NotFiniteError, match='are not finite'): run(tiny, tmp_path/'c', learning_rate=1e39, max_steps=1, neuron_weight=.5,
                                                                    save_strategy='steps', save_steps=1)
    assert not list((tmp_path/'c').glob('checkpoint-*'))

def test_a_model_or_a_set_that_is_not_finite_is_refused(tiny, tmp_path):
    with pytest.raises(NotFiniteError, match='the model has weights .* in model.layers.1.mlp.up_proj.weight'):
        make(tiny, tmp_path/'a', model=broken(tiny[0]))
    neurons = some_neurons(tiny[0])
    neurons.weight[2] = float('nan')
    with pytest.raises(ValueError, match='a weight is NaN, infinite'):
        YFPOTrainer(model=tiny[0], args=config(tmp_path), train_dataset=PAIRS, processing_class=tiny[1], neurons=neurons)
    with pytest.raises(NotFiniteError, match='the ref_model has weights'):
        make(tiny, tmp_path/'b', trainer_kw=dict(ref_model=broken(tiny[0])))
    t = make(tiny, tmp_path/'c', neuron_weight=.5)
    t.model.load_state_dict(broken(tiny[0]).state_dict())                       # between the reading and the training
    with pytest.raises(NotFiniteError, match='loss is nan at step 1'): t.train()

@pytest.mark.parametrize('accumulate', [1, 2])
def test_sft_stops_too_and_leaves_the_model_clean(tiny, tmp_path, accumulate):
    model, rows = copy.deepcopy(tiny[0]), [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    with pytest.raises(NotFiniteError, match=r'at step \d: nothing of it was saved'):
        train_sft(model, tiny[1], rows, tmp_path, learning_rate=1e7, num_train_epochs=9, per_device_train_batch_size=2,
                  gradient_accumulation_steps=accumulate)
    assert 'forward' not in model.__dict__ and not list(tmp_path.glob('checkpoint-*'))
    with pytest.raises(NotFiniteError, match='model has weights'): train_sft(broken(tiny[0]), tiny[1], rows, tmp_path)

@pytest.mark.parametrize('name', ['sft', 'simpo', 'cpo', 'orpo', 'kto'])
def test_the_other_methods_stop_too(tiny, tmp_path, name):
    from test_dynamic import by_method
    with pytest.raises(NotFiniteError, match=r'(loss|gradient norm) is (nan|inf) at step \d'):
        by_method(name, tiny, tmp_path, .5, learning_rate=1e7, max_steps=9, save_strategy='steps', save_steps=9)
    assert not list(tmp_path.glob('checkpoint-*'))

def test_grpo_stops_too(tiny, tmp_path):
    from yfpo.beyond.methods import METHODS
    cls, cfg, own = METHODS['grpo']
    class Bad(cls):
        def compute_loss(self, *args, **kw): return super().compute_loss(*args, **kw)*float('nan')
    args = cfg(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, num_generations=2, max_completion_length=6, bf16=False,
               use_cpu=True, report_to='none', disable_tqdm=True, save_strategy='no', **own)
    t = Bad(model=copy.deepcopy(tiny[0]), args=args, train_dataset=Dataset.from_list([dict(prompt='2+2=')]*4), processing_class=tiny[1],
            reward_funcs=[lambda completions, **kw: [float(len(set(c))) for c in completions]])
    with pytest.raises(NotFiniteError, match='loss is nan at step 1'): t.train()

@pytest.mark.parametrize('sets', [PAIRS[:2], dict(own=PAIRS[:2], other=PAIRS[2:4])])
def test_an_evaluation_that_is_not_finite_stops_too(tiny, tmp_path, sets):
    t = make(tiny, tmp_path, neuron_weight=.5, trainer_kw=dict(eval_dataset=sets))
    assert all(math.isfinite(v) for v in t.evaluate().values())
    t.model.load_state_dict(broken(tiny[0]).state_dict())
    with pytest.raises(NotFiniteError, match=r'the eval_(own_)?loss is nan at step 0: nothing of it was saved'): t.evaluate()

def test_the_loss_is_looked_at_once(tiny, tmp_path, monkeypatch):
    "In place of transformers' filter, which asks twice of each batch: no further wait for a device"
    t, asked = make(tiny, tmp_path, neuron_weight=.5, gradient_accumulation_steps=2, max_steps=2), []
    for name in ('isnan', 'isinf', 'isfinite'):
        old = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda x, n=name, f=old: (asked.append(n) if x.dim() == 0 and x.dtype.is_floating_point else None,
                                                                   f(x))[1])
    t.train()
    assert not t.args.logging_nan_inf_filter and asked == ['isfinite']*3

@pytest.mark.parametrize('kw, words', [
    (dict(learning_rate=inf), 'learning_rate is inf'), (dict(num_train_epochs=0), 'num_train_epochs is 0'),
    (dict(per_device_train_batch_size=0), 'per_device_train_batch_size is 0'), (dict(max_length=0), 'max_length is 0')])
def test_bad_settings_of_sft_are_refused(tiny, tmp_path, kw, words):
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    with pytest.raises(ValueError, match=words): train_sft(tiny[0], tiny[1], rows, tmp_path, **kw)

def test_settings_at_the_edge_are_allowed(tmp_path):
    for kw in (dict(learning_rate=0.), dict(max_length=None), dict(max_grad_norm=0), dict(max_grad_norm=inf), dict(ld_alpha=0.),
               dict(loss_type='aot'), dict(loss_type=('sigmoid', 'sft')), dict(reference_dir=tmp_path), dict(num_train_epochs=0)):
        config(tmp_path, **kw)

# --- reward statistics

def silent(model, neurons):
    "The model, its neurons of the set writing nothing"
    model = copy.deepcopy(model)
    for l, i in zip(neurons.layer.tolist(), neurons.index.tolist()): model.model.layers[l].mlp.down_proj.weight.data[:, i] = 0
    return model

def test_a_margin_that_is_always_zero_is_refused_with_its_cause(tiny, tmp_path):
    mute = silent(tiny[0], some_neurons(tiny[0]))
    with pytest.raises(ValueError, match='equal in all 6 pairs, because these neurons write the same in every text'):
        make(tiny, tmp_path/'a', model=mute, neuron_weight=.5)
    with pytest.warns(UserWarning, match='the neuron metrics mean nothing: the read-outs of chosen and rejected are equal'):
        run(tiny, tmp_path/'b', model=mute, neuron_weight=0., max_steps=1)
    alike = [chat(f'{a} + 1 = ?', f'{a + 1}', f'{a + 1}<|im_end|> or not') for a in range(4)]    # alike up to the end
    with pytest.raises(ValueError, match='because the tokens that are read are the same in both'):
        make(tiny, tmp_path/'c', [dict(prompt=p['prompt'][0]['content'], **{k: p[k][0]['content'] for k in ('chosen', 'rejected')})
                                  for p in alike], neuron_weight=.5)

@pytest.mark.parametrize('n', [1, 2])
def test_margins_without_spread_are_refused(tiny, tmp_path, n):
    rows = [dict(PAIRS[0], id=i) for i in range(n)]
    with pytest.raises(ValueError, match=f'margins of the {n} pairs have no spread'): make(tiny, tmp_path, rows, neuron_weight=.5)
    stats = make(tiny, tmp_path/'b').reward_stats
    assert make(tiny, tmp_path, rows, neuron_weight=.5, trainer_kw=dict(reward_stats=stats)).reward_stats is stats
    make(tiny, tmp_path, rows, neuron_weight=.5, readout='paper-literal')                                  # which is in units of nothing

@pytest.mark.parametrize('change, words', [(dict(mean=1e4), 'every value is at the clip'), (dict(scale=nan), 'the scale .* not finite'),
                                           (dict(std=nan), 'the std of the reward statistics is not'), (dict(scale=0.), 'no spread')])
def test_given_statistics_that_cannot_be_are_refused(tiny, tmp_path, change, words):
    s = copy.deepcopy(make(tiny, tmp_path).reward_stats)
    for k, v in change.items(): setattr(s, k, v if k == 'scale' else torch.full_like(getattr(s, k), v))
    if 'mean' in change: s.mean[::2] = -1e4                                    # at both ends of the clip, so that weights do not cancel
    with pytest.raises(ValueError, match=words): make(tiny, tmp_path/'b', neuron_weight=.5, trainer_kw=dict(reward_stats=s))

def test_the_other_methods_refuse_a_read_out_without_spread(tiny, tmp_path):
    from test_dynamic import sft
    from yfpo.beyond.methods import NeuronReward
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    with pytest.raises(ValueError, match='the 3 read-outs have a spread of 0'): sft(tiny, tmp_path, rows[:1]*3)
    with pytest.raises(ValueError, match='read-outs of the texts have a spread of 0'):
        NeuronReward(*tiny, some_neurons(tiny[0]), [('2+2=', '4')])

# --- the rows that TRL takes

FULL = [dict(chosen=p['prompt'] + p['chosen'], rejected=p['prompt'] + p['rejected']) for p in PAIRS]

def tokens(t): return [(r['prompt_ids'], r['chosen_ids'], r['rejected_ids']) for r in t.train_dataset]

def trls(tiny, folder, rows, **kw):
    "The tokens of TRL's own trainer"
    return tokens(DPOTrainer(model=copy.deepcopy(tiny[0]), ref_model=copy.deepcopy(tiny[0]), args=config(folder, DPOConfig, **kw),
                             train_dataset=Dataset.from_list(rows), processing_class=tiny[1]))

@pytest.mark.parametrize('kind', [list, Dataset.from_list])
def test_a_prompt_may_be_implicit_or_repeated(tiny, tmp_path, kind):
    plain = tokens(make(tiny, tmp_path, PAIRS))
    assert tokens(make(tiny, tmp_path, kind(FULL))) == plain == trls(tiny, tmp_path, FULL)
    asked = [p['prompt'] for p in PAIRS]
    for prompts in (asked, [a[0]['content'] for a in asked]):                   # as a conversation, and as UltraFeedback has it
        assert tokens(make(tiny, tmp_path, kind([dict(r, prompt=p) for r, p in zip(FULL, prompts)]))) == plain
    texts = [dict(chosen=f'{a} + {a} = {2*a} .', rejected=f'{a} + {a} = {2*a + 1}') for a in range(3, 7)]
    assert tokens(make(tiny, tmp_path, kind(texts))) == trls(tiny, tmp_path, texts)
    headed = [{k: [dict(role='system', content='Be brief.')] + v for k, v in r.items()} for r in FULL]
    with_system = [dict(r, prompt=a) for r, a in zip(headed, asked)]
    assert tokens(make(tiny, tmp_path, kind(with_system))) == trls(tiny, tmp_path, headed)

def test_responses_that_share_no_beginning_have_an_empty_prompt(tiny, tmp_path):
    d = preference_dataset([dict(chosen='yes ', rejected='no')])
    assert d[0] == dict(prompt='', chosen='yes ', rejected='no')

def test_an_empty_prompt_gives_the_same_loss_with_and_without_sharing(tiny, tmp_path):
    rows = [dict(prompt='', chosen=f'{a}+{a}={2*a}', rejected=f'{a}+{a}={2*a + b}, so') for a, b in ((3, 1), (14, 2), (25, 1), (6, 30))]
    on, off = (run(tiny, tmp_path/str(s), rows, neuron_weight=.5, share_prompts=s) for s in (True, False))
    for k in ('loss', 'logps/chosen', 'neurons/margins'): assert column(on, k) == pytest.approx(column(off, k), abs=1e-4), k

def test_text_parts_and_tool_calls(tiny, tmp_path):
    parts = [{k: [dict(m, content=[dict(type='text', text=m['content'][:3]), dict(type='text', text=m['content'][3:])]) for m in v]
              for k, v in p.items()} for p in PAIRS]
    plain = tokens(make(tiny, tmp_path, PAIRS))
    assert tokens(make(tiny, tmp_path, parts)) == plain == tokens(make(tiny, tmp_path, Dataset.from_list(parts)))
    assert tokens(make(tiny, tmp_path, parts[:3] + PAIRS[3:])) == plain                                  # both in one table
    call = dict(role='assistant', content=None, tool_calls=[dict(type='function', function=dict(name='add', arguments='3'))])
    assert len(preference_dataset([{**PAIRS[0], 'chosen': [call]}])) == 1
    image = {**PAIRS[0], 'prompt': [dict(role='user', content=[dict(type='image')])]}
    with pytest.raises(ValueError, match="prompt of row 0 of train_dataset has a part of type 'image'"): preference_dataset([image])

def test_white_space_counts_where_tokens_differ(tiny, tmp_path):
    rows = [dict(prompt='2+2=', chosen='4\n', rejected='4'), dict(prompt='3+3=', chosen='6', rejected='7')]
    assert tokens(make(tiny, tmp_path, rows)) == trls(tiny, tmp_path, rows)
    tok = copy.deepcopy(tiny[1])
    tok.chat_template = tok.chat_template.replace("m['content']", "m['content'] | trim")
    rows = [PAIRS[0], {**PAIRS[1], 'rejected': [dict(role='assistant', content=PAIRS[1]['chosen'][0]['content'] + ' ')]}]
    with pytest.raises(ValueError, match='row 1 of train_dataset has the same tokens'): make((tiny[0], tok), tmp_path, rows)

def test_what_the_cut_takes_is_counted(tiny, tmp_path):
    long = chat('7 + 8 = ? '*20, '15', '16')
    with pytest.warns(UserWarning, match='1 of 7 pairs of train_dataset are left out, row 2 the first: their prompts fill max_length=60'):
        t = make(tiny, tmp_path, PAIRS[:2] + [long] + PAIRS[2:], max_length=60)
    assert t.train_dataset['pair_row'] == [0, 1, 3, 4, 5, 6] and t.named([2, 5]) == '3, 6'
    alike = chat('1 + 1 = ?', '2 it is and it is and it is and it is 2', '2 it is and it is and it is and it is 3')
    with pytest.warns(UserWarning, match='1 of 3 pairs of train_dataset are equal within max_length=40 and teach nothing, row 1 the first'):
        make(tiny, tmp_path, [PAIRS[0], alike, PAIRS[1]], max_length=40)
    with pytest.raises(ValueError, match='all pairs of train_dataset are equal within max_length=40'):
        make(tiny, tmp_path, [alike], max_length=40)
    with pytest.raises(ValueError, match='no pair of train_dataset has a response within max_length=8'):
        make(tiny, tmp_path, PAIRS, max_length=8)

def test_pairs_that_come_again_or_the_other_way_are_named():
    turned = dict(PAIRS[2], chosen=PAIRS[2]['rejected'], rejected=PAIRS[2]['chosen'])
    with pytest.warns(UserWarning) as w: preference_dataset(PAIRS + [PAIRS[1], turned])
    said = [str(x.message) for x in w]
    assert any(re.match(r'1 pairs of train_dataset come again \(rows 1 and 6\)', m) for m in said), said
    assert any(re.match(r'1 pairs of train_dataset prefer what another row rejects \(rows 2 and 7\)', m) for m in said), said

@pytest.mark.parametrize('row, words', [
    (dict(prompt='a', chosen=PAIRS[0]['chosen'], rejected=PAIRS[0]['rejected']), 'prompt is text in row 1 and messages in row 0'),
    (dict(prompt=PAIRS[0]['prompt'], chosen='4', rejected='5'), 'row 1 of train_dataset mixes text and messages'),
    (dict(prompt='a', chosen='4', rejected='5'), 'mixes text and messages: prompt is text in row 1 and messages in row 0'),
    (dict(PAIRS[0], prompt=None), 'prompt of row 1 of train_dataset is None'), (dict(PAIRS[0], chosen=None), 'chosen of row 1 .* is None'),
    (dict(PAIRS[0], chosen=[]), 'chosen of row 1 .* is an empty list'), (dict(PAIRS[0], chosen=3), 'chosen of row 1 .* neither text nor'),
    (dict(chosen=PAIRS[0]['chosen'], rejected=PAIRS[0]['rejected']), "row 1 of train_dataset has no 'prompt'"),
    (dict(PAIRS[0], rejected=turns('a')), 'row 1 .* empty rejected')])
def test_rows_that_are_not_pairs_are_named(row, words):
    with pytest.raises(ValueError, match=words): preference_dataset([PAIRS[1], row])

def test_conversations_without_a_common_beginning_are_refused():
    row = dict(chosen=turns('a', 'b'), rejected=turns('c', 'd'))
    with pytest.raises(ValueError, match='row 0 of train_dataset has no prompt'): preference_dataset([row])

@pytest.mark.parametrize('rows, words', [([dict(prompt='a', completion='')], 'row 0 of rows has an empty completion'),
    ([dict(prompt='a', completion='b'), dict(prompt=turns('a'), completion=turns('', 'b')[1:])],
     'prompt is text in row 0 and messages in row 1'),
    ([dict(prompt='a', completion=None)], 'completion of row 0 of rows is None')])
def test_bad_rows_of_sft_are_named(tiny, tmp_path, rows, words):
    with pytest.raises(ValueError, match=words): train_sft(tiny[0], tiny[1], rows, tmp_path)

def test_lists_keep_what_the_template_is_told(tiny, tmp_path):
    tok = copy.deepcopy(tiny[1])
    tok.chat_template = "{% if style %}{{ style }}\n{% endif %}{% if tools %}{{ tools | length }} tools\n{% endif %}" + tok.chat_template
    rows = [dict(p, chat_template_kwargs=dict(style='short'), tools=[dict(type='function', function=dict(name='f', n=i))])
            for i, p in enumerate(PAIRS)]
    as_list, as_table = (tokens(make((tiny[0], tok), tmp_path, r)) for r in (rows, Dataset.from_list(rows)))
    assert as_list == as_table and tok.decode(as_list[0][0]).startswith('short\n1 tools\n<|im_start|>user')
    with pytest.raises(ValueError, match='row 1 of train_dataset sets .* in chat_template_kwargs'): preference_dataset([rows[0], PAIRS[1]])
    sft = [dict(prompt=p['prompt'], completion=p['chosen'], chat_template_kwargs=dict(style='short '*s)) for p in PAIRS[:2] for s in (1, 9)]
    assert completion_dataset(sft)['chat_template_kwargs'][1] == dict(style='short '*9)

def test_columns_that_are_null(tiny, tmp_path):
    "As in a table that was joined from several: what no row sets is not there, what some rows set is a sentence"
    plain = tokens(make(tiny, tmp_path, PAIRS))
    nulls = [dict(p, tools=None, chat_template_kwargs=None, id=None) for p in PAIRS]
    assert tokens(make(tiny, tmp_path, Dataset.from_list(nulls))) == plain == tokens(make(tiny, tmp_path, nulls))
    some = Dataset.from_list([dict(p, chat_template_kwargs=dict(style='short') if i else None) for i, p in enumerate(PAIRS)])
    with pytest.raises(ValueError, match='chat_template_kwargs of row 0 of train_dataset is None'): preference_dataset(some)
    with pytest.raises(ValueError, match='prompt of row 1 of train_dataset is None'):
        preference_dataset(Dataset.from_list([PAIRS[0], dict(PAIRS[1], prompt=None)]))

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
    (dict(neuron_kappa=0), 'slope must be above 0'), (dict(grad_to='none'), 'is the preference loss alone'),
    (dict(anchor_weight=-1.), 'anchor_weight is -1'), (dict(n_outside=0), 'n_outside is 0'),
    (dict(objective='yoked', ld_alpha=0.5), 'ld_alpha=None'),
    (dict(objective='offset', f_divergence_type='forward_kl'), 'reverse_kl'), (dict(objective='reweight', loss_type=['aot']), 'aot is not'),
    (dict(activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=True)), 'no gradient'),
    (dict(neuron_weight='0.1'), 'not a finite number'), (dict(objective=None), 'objective None is unknown'),
    (dict(readout=None), 'readout None is unknown'), (dict(reference_dir=3), 'reference_dir is 3'),
    (dict(loss_type='sigmod'), "loss_type 'sigmod' is unknown: did you mean 'sigmoid'"), (dict(loss_type=[]), 'loss_type is'),
    (dict(loss_type=''), "loss_type '' is unknown"), (dict(loss_type=None), 'loss_type is None'),
    (dict(loss_type=['sigmoid', 3]), '3 is unknown'),
    (dict(loss_type=['sigmoid', 'sft'], loss_weights=[1, nan]), r'loss_weights\[1\] is nan'),
    *((dict(beta=b), 'beta is') for b in (0, -.1, inf, nan, '0.1', True)), (dict(discopop_tau=0), 'discopop_tau is 0'),
    (dict(loss_type='robust', label_smoothing=.5), 'less than 0.5'), (dict(loss_type='exo_pair'), 'above 0'),
    (dict(label_smoothing=nan), 'label_smoothing is nan'), (dict(ld_alpha=2.), 'ld_alpha is 2'), (dict(ld_alpha=nan), 'ld_alpha is nan'),
    (dict(f_divergence_type='kl'), "'kl' is unknown: there are reverse_kl"),
    (dict(f_alpha_divergence_coef=inf), 'f_alpha_divergence_coef is inf'),
    *((dict(learning_rate=r), 'learning_rate is') for r in (inf, nan, -1e-6)), (dict(max_grad_norm=nan), 'max_grad_norm is nan'),
    (dict(max_grad_norm=-1), 'max_grad_norm is -1'), (dict(weight_decay=nan), 'weight_decay is nan'),
    *((dict(max_length=n), 'max_length is') for n in (0, 1, -5, 12.5)), (dict(max_steps=-1, num_train_epochs=0), 'num_train_epochs is 0'),
    (dict(max_steps=-1, num_train_epochs=nan), 'num_train_epochs is nan'),
    *((dict([(k, 0)]), f'{k} is 0') for k in ('per_device_train_batch_size', 'per_device_eval_batch_size', 'gradient_accumulation_steps')),
    *((dict(share_prompts=x), 'share_prompts is .* True or False') for x in ('no', 0, None)),
    (dict(sync_ref_model='yes'), 'sync_ref_model is'),
    (dict(use_liger_kernel=True), 'leave it off'), (dict(sync_ref_model=True, ref_model_sync_steps=0), 'ref_model_sync_steps is 0'),
    (dict(sync_ref_model=True, ref_model_mixup_alpha=1.5), 'ref_model_mixup_alpha is 1.5'),
    (dict(sync_ref_model=True, objective='reweight'), 'sync_ref_model=False')])
def test_bad_settings_are_refused_in_a_sentence(tmp_path, kw, words):
    with pytest.raises(ValueError, match=words): config(tmp_path, **kw)

def test_reentrant_checkpointing_is_allowed_at_weight_zero_and_truncation_is_reported(tiny, tmp_path):
    run(tiny, tmp_path/'a', neuron_weight=0., activation_checkpointing=True, activation_checkpointing_kwargs=dict(use_reentrant=True),
        max_steps=1)
    with pytest.raises(ValueError, match='max_length=12'): make(tiny, tmp_path/'b', max_length=12)

def test_defaults_that_differ_from_trl(tmp_path):
    ours, trl = YFPOConfig(str(tmp_path)), DPOConfig(str(tmp_path), bf16=False)
    new = {'neuron_weight', 'objective', 'neuron_kappa', 'neuron_margin', 'readout', 'grad_to', 'anchor_weight', 'n_outside',
           'share_prompts', 'reference_dir'}
    a, b = ours.to_dict(), trl.to_dict()
    forced = {'use_cpu', 'dataloader_pin_memory'} if not torch.accelerator.is_available() else set()   # what a CPU means
    assert set(a) - set(b) == new and {k for k in b if a[k] != b[k]} <= {'bf16', 'logging_dir', *forced}
    assert all(YFPOConfig.__dataclass_fields__[k].metadata['help'] for k in new)

def test_bf16_trains_on_a_cpu(tiny, tmp_path):
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    rows = [dict(prompt=p['prompt'], completion=p['chosen']) for p in PAIRS]
    assert all(r['loss'] > 0 for r in train_sft(model, tok, rows, str(tmp_path/'s'), precision="bfloat16"))
    t = YFPOTrainer(model=model, args=YFPOConfig(output_dir=str(tmp_path/'d'), bf16=True, max_steps=1), train_dataset=PAIRS,
                    processing_class=tok, neurons=some_neurons(model))
    t.train()
    assert all(p.dtype == torch.float32 for p in model.parameters())

def test_an_adapter_that_the_trainer_saved_is_read_back(tiny, tmp_path):
    "By load_model, by from_folder and by PEFT itself: the same logits"
    from peft import LoraConfig, PeftModel
    from yfpo.lm.models import load_model
    t = YFPOTrainer(model=copy.deepcopy(tiny[0]), args=config(tmp_path/'run', max_steps=2, learning_rate=1e-2), train_dataset=PAIRS,
                    processing_class=tiny[1], neurons=some_neurons(tiny[0]),
                    peft_config=LoraConfig(r=2, task_type='CAUSAL_LM', init_lora_weights=False))
    t.remove_callback(PrinterCallback)
    t.train()
    t.save_model(str(tmp_path/'m'))
    tiny[1].save_pretrained(tmp_path/'m')
    x = torch.tensor([tiny[1]('2+2=4').input_ids])
    with torch.no_grad():
        own = t.model.eval()(x).logits
        for m in (load_model(str(tmp_path/'m'))[0], PeftModel.from_pretrained(copy.deepcopy(tiny[0]), tmp_path/'m').eval(),
                  YFPOTrainer.from_folder(tmp_path/'m', config(tmp_path/'on'), PAIRS, tiny[1]).model.eval()):
            torch.testing.assert_close(m(x).logits, own)
        assert not torch.allclose(tiny[0](x).logits, own, atol=1e-3)

def test_a_set_notes_the_weights_after_training_with_a_fused_optimiser(tiny, tmp_path):
    "Which torch does not note; a set of the untrained model still counts as the same model's, without a warning"
    before = chosen_on(model := copy.deepcopy(tiny[0]))
    t = run(tiny, tmp_path, model=model)
    after = chosen_on(model)
    assert t.args.optim == 'adamw_torch_fused' and after['weights'] == base_fingerprint(model, torch.bfloat16) != before['weights']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for note in (before, after): _noted(model, note).check(model)
    with pytest.raises(ValueError, match='was selected on the weights'): _noted(model, before).check(model, strict=True)
    _noted(model, after).check(model, strict=True)

def _noted(model, note):
    s = some_neurons(model)
    s.meta['chosen_on'] = note
    return s
