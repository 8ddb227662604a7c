"Mixtures of experts: a dense twin and a loop as second formulations, experts that no token meets, edits against edited weights, training."
import copy
import pytest, torch
from conftest import ROOT
from datasets import Dataset
from families import random_model
from torch.nn.functional import linear
from trl import DPOConfig, DPOTrainer
from test_trainer import PAIRS, column, config, equal_weights
from yfpo.beyond.families import random_batch
from yfpo.interventions import ablate, mean_activations, patch, record
from yfpo.lm.experts import ExpertNeurons, expert_neurons
from yfpo.lm.models import byte_tokenizer
from yfpo.lm.packing import packs
from yfpo.lm.responses import Example, collate, generate, hidden_states
from yfpo.neurons import NeuronSet, control_sets, layer_matched, model_signature, select_neurons
from yfpo.lm.families import FAMILIES, down_projs, mlps_of, width, write_matrix
from yfpo.relevance import attnlrp, neuron_relevance, relevance_sums, residual_relevance
from yfpo.reward import NeuronReader, fit_moments, write_norms
from yfpo.trainer import YFPOConfig, YFPOTrainer

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
EXPERTS = [f for f in sorted(FAMILIES) if FAMILIES[f].experts]

@pytest.fixture(scope='module')
def batch(): return random_batch()

def relative(a, b): return ((a - b).abs().max()/b.abs().max()).item()
def exact(family, **sizes):
    "In float64, which only one way to compute experts knows"
    m = random_model(family, **sizes)
    m.set_experts_implementation('eager')
    return m.double()
def router(mlp): return getattr(mlp, 'gate', None) or mlp.router
def everything(m):
    L, F = len(down_projs(m)), width(m)
    return NeuronSet(torch.arange(L).repeat_interleave(F), torch.arange(F).repeat(L), torch.full((L*F,), 1/(L*F)), torch.ones(L*F),
                     dict(model=model_signature(m)))
def some(m, layer, index): # equal weights
    n = len(index)
    return NeuronSet(torch.full((n,), layer), torch.as_tensor(index), torch.full((n,), 1/n), torch.ones(n), dict(model=model_signature(m)))
def hooks_of(m): return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())
def hooked(m): return hooks_of(m) > 0

# ---- second formulations

TWINS = dict(mixtral='llama', qwen3_moe='qwen3', flex_olmo='olmo2', granitemoe='granite')

def twin_of(moe, family):
    "A dense model that is `moe` where every token meets every expert with the same weight: all experts beside each other"
    F, E = moe.config.intermediate_size, len(mlps_of(moe)[0].experts.down_proj)
    F = getattr(moe.config, 'moe_intermediate_size', F)
    same = {k: getattr(moe.config, k) for k in ('rms_norm_eps', 'rope_parameters')}
    dense = random_model(TWINS[family], intermediate_size=E*F, **same).double()
    theirs = {k: v for k, v in moe.state_dict().items() if k in dense.state_dict()}
    dense.load_state_dict(theirs, strict=False)
    for a, b in zip(mlps_of(dense), mlps_of(moe)):
        rows = b.experts.gate_up_proj
        a.gate_proj.weight.data, a.up_proj.weight.data = rows[:, :F].flatten(0, 1), rows[:, F:].flatten(0, 1)
        a.down_proj.weight.data = torch.cat(list(b.experts.down_proj), 1)/E
    return dense, E

@pytest.mark.parametrize('family', TWINS)
@pytest.mark.parametrize('rule', ['attnlrp', 'cp-lrp', 'gradient'])
def test_all_experts_with_equal_weights_are_one_dense_mlp(family, rule, batch):
    moe = exact(family, num_experts_per_tok=4)
    for mlp in mlps_of(moe): router(mlp).weight.data.zero_()
    dense, E = twin_of(moe, family)
    on = batch['attention_mask'].bool()
    with torch.no_grad(): assert relative(hidden_states(moe, batch)[on], hidden_states(dense, batch)[on]) < 1e-6
    own, theirs = (relevance_sums(m, batch, rule) for m in (moe, dense))
    assert relative(own[0], theirs[0]) < 1e-5 and relative(own[2]*E, theirs[2]) < 1e-5
    assert relative(residual_relevance(moe, batch, rule), residual_relevance(dense, batch, rule)) < 1e-5

@pytest.mark.parametrize('implementation', ['eager', 'grouped_mm', 'batched_mm'])
@pytest.mark.parametrize('family', EXPERTS)
def test_activations_are_those_of_a_loop(family, implementation, batch):
    m, seen = random_model(family), {}
    m.set_experts_implementation(implementation)
    mlp = mlps_of(m)[1]
    h = mlp.register_forward_pre_hook(lambda mod, args: seen.update(x=args[0].detach()))
    got = record(m, batch, everything(m))[..., width(m):2*width(m)]
    h.remove()
    F, want = mlp.experts.down_proj.shape[-1], torch.zeros_like(got)
    for b, row in enumerate(seen['x']):
        for t, x in enumerate(row):
            _, weights, index = router(mlp)(x[None])
            for w, e in zip(weights[0], index[0]):
                W = mlp.experts.gate_up_proj[e]
                want[b, t, e*F:(e+1)*F] = w*torch.nn.functional.silu(W[:F]@x)*(W[F:]@x)
    assert relative(got, want) < 1e-5 and torch.equal(got == 0, want == 0)
    wrote = linear(got, write_matrix(down_projs(m)[1]))
    assert relative(wrote, mlp(seen['x'])) < 1e-5 and not hooked(m)

def test_the_readers_weight_is_the_whole_matrix():
    m = random_model('mixtral')
    d = down_projs(m)[0]
    E, D, F = mlps_of(m)[0].experts.down_proj.shape
    assert width(m) == E*F and torch.equal(d.weight[:, 2*F + 5], mlps_of(m)[0].experts.down_proj[2, :, 5])
    assert torch.allclose(write_norms(d, torch.tensor([2*F + 5])), mlps_of(m)[0].experts.down_proj[2, :, 5].norm())

# ---- what is read, replaced, or differentiated

def test_readers_and_scopes_change_no_bit_and_stay_nowhere(batch):
    m = random_model('qwen3_moe')
    s = some(m, 1, [3, 40])
    def run():
        for p in m.parameters(): p.grad = None
        h = hidden_states(m, batch)
        h.square().sum().backward()
        return h.detach(), [None if p.grad is None else p.grad.clone() for p in m.parameters()]
    for training in (False, True):
        m.train(training)
        plain, grads = run()
        with NeuronReader(m, s) as r: read, own = run()
        assert torch.equal(read, plain) and r.activations().abs().sum() > 0
        if training: assert all(a is b or torch.equal(a, b) for a, b in zip(own, grads))
        else: assert all(relative(a, b) < 1e-4 for a, b in zip(own, grads) if a is not None)
        with attnlrp(m): assert torch.equal(hidden_states(m, batch), plain)
        assert torch.equal(run()[0], plain) and not hooked(m)

def test_the_gradient_of_what_is_read_reaches_experts_and_router(batch):
    "Also while training, where the activations are computed beside the path of the loss"
    m, grads = exact('mixtral'), []
    s = some(m, 1, [3, 60])
    for training in (False, True):
        m.train(training).zero_grad()
        with NeuronReader(m, s) as r: hidden_states(m, batch)
        r.activations().sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in m.parameters()])
    assert all((a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-12)) for a, b in zip(*grads))
    at, layer = dict(zip([n for n, _ in m.named_parameters()], grads[0])), 'model.layers.1.mlp'
    up, F = at[f'{layer}.experts.gate_up_proj'], 48
    assert up[0, 3].abs().sum() > 0 and up[1, 12].abs().sum() > 0 and up[0, F + 3].abs().sum() > 0 and up[2:].abs().sum() == 0
    assert at[f'{layer}.gate.weight'].abs().sum() > 0 and at['model.layers.0.mlp.gate.weight'].abs().sum() > 0

def test_a_hook_sees_what_an_earlier_one_wrote(batch):
    m = random_model('mixtral')
    s = everything(m)
    with ablate(m, s, spare_first=False):
        assert record(m, batch, s).abs().max() == 0
        with NeuronReader(m, s) as r, torch.no_grad(): hidden_states(m, batch)
    assert r.activations().abs().max() == 0 and record(m, batch, s).abs().max() > 0 and not hooked(m)

def test_a_copy_has_neurons_of_its_own(batch):
    m = random_model('mixtral')
    down_projs(m)
    other = copy.deepcopy(m)
    for a, b in zip(down_projs(m), down_projs(other)): assert a is not b and b.own[1] is not a.own[1]
    with torch.no_grad(): plain = hidden_states(other, batch)
    with ablate(m, everything(m)), torch.no_grad(): assert torch.equal(hidden_states(other, batch), plain)
    assert down_projs(m)[0] is down_projs(m)[0] and isinstance(down_projs(m)[0], ExpertNeurons)

@pytest.mark.parametrize('family', EXPERTS)
def test_ablation_is_zeroed_columns_also_while_generating(family):
    m, tok = random_model(family, vocab_size=259), byte_tokenizer()
    m.generation_config.eos_token_id = None
    index = torch.arange(0, width(m), 2)
    s, cut = some(m, 1, index), copy.deepcopy(m)
    F = mlps_of(m)[1].experts.down_proj.shape[-1]
    for i in index.tolist(): mlps_of(cut)[1].experts.down_proj.data[i//F, :, i % F] = 0
    questions = ['Tom has 3 apples.', 'A longer question: how many pears are left?']
    def texts(net): return [r['text'] for r in generate(net, tok, questions, max_new_tokens=8, progress=False)]
    with ablate(m, s, spare_first=False): own = texts(m)
    assert own == texts(cut) != texts(m)
    with ablate(m, s, 'scale', alpha=2., spare_first=False): twice = texts(m)
    for i in index.tolist(): mlps_of(cut)[1].experts.down_proj.data[i//F, :, i % F] = 2*mlps_of(m)[1].experts.down_proj[i//F, :, i % F]
    assert twice == texts(cut)

def test_a_patched_neuron_writes_where_no_token_meets_its_expert(batch):
    m = random_model('mixtral')
    s = some(m, 1, [7])
    a = record(m, batch, s)
    assert (a == 0).any() and (a != 0).any()
    seen = []
    h = mlps_of(m)[1].register_forward_hook(lambda mod, args, out: seen.append(out.detach()))
    with torch.no_grad():
        hidden_states(m, batch)
        with patch(m, s, a + 1, spare_first=False): hidden_states(m, batch)
    h.remove()
    assert torch.allclose(seen[1] - seen[0], down_projs(m)[1].weight[:, 7].expand_as(seen[0]), atol=1e-5)

# ---- attacks

def test_an_expert_that_no_token_meets(batch):
    m = random_model('mixtral', num_local_experts=6)
    def first_four(mod, args, out): best = out[0][:, :4].softmax(-1).topk(2); return out[0], best.values, best.indices
    for mlp in mlps_of(m): mlp.gate.register_forward_hook(first_four)
    F = 48
    R, a = neuron_relevance(m, batch), record(m, batch, everything(m)).view(*batch['input_ids'].shape, -1, 6*F)
    assert R.isfinite().all() and R[..., 4*F:].abs().max() == 0 and a[..., 4*F:].abs().max() == 0 and a[..., :4*F].abs().max() > 0
    with torch.no_grad():
        plain = hidden_states(m, batch)
        with ablate(m, some(m, 1, range(4*F, 6*F))): gone = hidden_states(m, batch)
    assert relative(gone, plain) < 1e-5

def test_a_neuron_that_never_fired_has_the_floor_of_those_that_did():
    s = some(random_model('mixtral'), 1, range(4))
    a = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    a[:, 2] = 0
    std = fit_moments([a], s, torch.ones(4)).std
    assert std[2] == pytest.approx(std[[0, 1, 3]].min().item(), rel=.3)
    assert fit_moments([a*0], s, torch.ones(4)).std.tolist() == [pytest.approx(1e-6)]*4

@pytest.mark.parametrize('family', EXPERTS)
def test_selection_and_controls(family, tmp_path):
    m, tok = random_model(family, vocab_size=259), byte_tokenizer()
    texts = [(f'{a} + {a} =', f' {2*a}') for a in range(12, 20)]
    s = select_neurons(m, tok, texts, ['a plain text about nothing', 'and another one, a bit longer'], k=.05, per_layer=.3)
    s.save(tmp_path/'set')
    again = NeuronSet.load(tmp_path/'set').check(m)
    assert again == s
    for c in control_sets(s, 2).values(): assert len(c.check(m)) == len(s)
    assert layer_matched(s).layer.bincount().tolist() == s.layer.bincount().tolist()
    sizes = dict(num_local_experts=8, num_experts=8, intermediate_size=24, moe_intermediate_size=12)     # as many neurons, of other experts
    with pytest.raises(ValueError, match='another model .experts 4 there, 8 here'): s.check(random_model(family, vocab_size=259, **sizes))

# ---- training

@pytest.fixture(scope='module')
def small():
    torch.set_num_threads(1)
    return {f: random_model(f, vocab_size=259, num_hidden_layers=2, tie_word_embeddings=False) for f in ('mixtral', 'qwen3_moe')}

def trained(model, folder, neurons=None, peft=None, **kwargs):
    t = YFPOTrainer(model=copy.deepcopy(model), args=config(folder, **kwargs), train_dataset=PAIRS, processing_class=byte_tokenizer(),
                    neurons=neurons, **(dict(peft_config=peft) if peft else {}))
    t.train()
    return t

def members(m): # in every expert
    F = width(m)
    index = torch.arange(3, F, F//8)
    return NeuronSet(torch.arange(len(index)) % 2, index, torch.full((len(index),), 1/len(index)), torch.ones(len(index)),
                     dict(model=model_signature(m), selector='hand'))

@pytest.mark.parametrize('extra', [{}, dict(activation_checkpointing=True)])
@pytest.mark.parametrize('family', ['mixtral', 'qwen3_moe'])
def test_weight_zero_is_dpo_bit_for_bit(small, family, extra, tmp_path):
    m = small[family]
    ours = trained(m, tmp_path/'a', members(m), neuron_weight=0., share_prompts=False, max_steps=3, **extra)
    trl = DPOTrainer(model=copy.deepcopy(m), ref_model=copy.deepcopy(m), args=config(tmp_path/'b', DPOConfig, max_steps=3, **extra),
                     train_dataset=Dataset.from_list(PAIRS), processing_class=byte_tokenizer())
    trl.train()
    for key in ('loss', 'grad_norm', 'rewards/margins'): assert column(ours, key) == column(trl, key), key
    assert equal_weights(ours, trl) and 'neurons/margins' in ours.state.log_history[0] and 'aux_loss' in ours.state.log_history[0]
    assert hooks_of(ours.model) == hooks_of(trl.model)         # transformers' own, that record the router

@pytest.mark.parametrize('family', ['mixtral', 'qwen3_moe'])
def test_the_term_moves_its_margin(small, family, tmp_path):
    m = small[family]
    t = trained(m, tmp_path, members(m), neuron_weight=2., share_prompts=False, max_steps=12)
    margins = column(t, 'neurons/margins')
    assert margins[-1] > margins[0] + .1
    moved = {n for (n, a), b in zip(t.model.named_parameters(), m.parameters()) if not torch.equal(a, b)}
    assert any('gate_up_proj' in n for n in moved) and any(n.endswith('mlp.gate.weight') for n in moved)

@pytest.mark.parametrize('extra', [dict(activation_checkpointing=True), dict(share_prompts=True), dict(precompute_ref_log_probs=True),
                                   dict(share_prompts=True, activation_checkpointing=True)])     # sharing needs a loss without the router's
def test_the_same_trajectory_another_way(small, extra, tmp_path):
    m = small['mixtral']
    a, b = (trained(m, tmp_path/n, members(m), neuron_weight=1., max_steps=3, router_aux_loss_coef=0., **{'share_prompts': False, **kw})
            for n, kw in (('a', {}), ('b', extra)))
    for key in ('loss', 'neurons/margins', 'neurons/size'): assert column(a, key) == pytest.approx(column(b, key), rel=2e-4, abs=2e-5), key
    for x, y in zip(a.model.parameters(), b.model.parameters()): assert torch.allclose(x, y, atol=2e-4)

def test_prompts_are_shared(small):
    with torch.no_grad(): assert packs(small['mixtral'], 20)

def test_lora_on_attention_trains_and_on_experts_is_refused(small, tmp_path):
    peft = pytest.importorskip('peft')
    m = small['mixtral']
    attention = peft.LoraConfig(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM')
    t = trained(m, tmp_path/'a', members(m), attention, neuron_weight=1., max_steps=4)
    assert column(t, 'neurons/margins')[-1] != column(t, 'neurons/margins')[1]
    experts = peft.LoraConfig(r=4, target_modules=[], target_parameters=['mlp.experts.gate_up_proj'], task_type='CAUSAL_LM')
    with pytest.raises(ValueError, match='the experts have an adapter, which PEFT adds .* put the adapter on attention, or merge it first'):
        trained(m, tmp_path/'b', members(m), experts, neuron_weight=1.)

def test_a_trained_model_goes_on_from_its_folder(small, tmp_path):
    m = small['qwen3_moe']
    trained(m, tmp_path/'a', members(m), neuron_weight=1., max_steps=2).save_model(str(tmp_path/'saved'))
    t = YFPOTrainer.from_folder(tmp_path/'saved', config(tmp_path/'b', max_steps=1), PAIRS, byte_tokenizer())
    assert t.neurons == members(m) and list((tmp_path/'saved').glob('*.safetensors'))
    t.train()
    assert column(t, 'loss')

def test_a_loss_of_the_router_that_trl_cannot_compute_is_refused(tmp_path):
    m = random_model('granitemoe', vocab_size=259, num_hidden_layers=2)
    with pytest.raises(ValueError, match="no loss for the router of 'granitemoe' models: set router_aux_loss_coef=0"):
        trained(m, tmp_path/'a', members(m), neuron_weight=1.)
    assert column(trained(m, tmp_path/'b', members(m), neuron_weight=1., router_aux_loss_coef=0., max_steps=1), 'loss')
