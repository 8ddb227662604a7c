"AttnLRP: the identities on every family, an explicit second formulation, mutants, and what must not leak out of its scope."
import copy
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock
import pytest, torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.activations import ACT2FN
from explicit_lrp import block_relevance
from families import SMALL, VARIANTS, capped, random_model, row
from yfpo import relevance
from yfpo.beyond.identities import identities, lxt_attnlrp, lxt_patches
from yfpo.lm.models import load_model, tiny_model
from yfpo.lm.families import FAMILIES, activation_of, down_projs, family_of, mlps_of
from yfpo.relevance import (SEEDS, Relevance, _capped, answer_mask, attnlrp, attribute, explained, neuron_relevance, relevance_flows,
                            residual_relevance)
from yfpo.lm.responses import Example, collate, encode

EVERY = [*sorted(FAMILIES), *VARIANTS]

@pytest.fixture(params=EVERY)
def model(request): return random_model(request.param)

@pytest.fixture(scope='module')
def batch():
    g = torch.Generator().manual_seed(0)
    ex = [Example(torch.randint(3, 97, (n,), generator=g).tolist(), s) for n, s in ((19, 7), (11, 2), (23, 15))]
    return collate(ex, 0)

def relative(a, b): return ((a - b).abs().max()/b.abs().max()).item()

def gradients(model, batch):
    z = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    loss = torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), batch['input_ids'][:, 1:].flatten())
    return z.detach(), torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

# ---- identities

def test_identities_hold_for_every_family(model, batch):
    e = identities(model, batch)
    assert e.pop('T9 same output') == 0 and max(e.values()) < 5e-6, e

def test_t1_without_biases_is_the_plain_sum(batch):
    m = random_model('llama')
    y = explained(m, batch).detach()
    total = residual_relevance(m, batch, 'cp-lrp').sum(-1)
    assert total.shape == (3, 4) and ((total - y[:, None]).abs()/y.abs().max()).max() < 5e-6

def test_t5_biases_are_needed_and_suffice(batch):
    m = random_model('qwen2')
    f = relevance_flows(m, batch, 'cp-lrp')
    bare = (f['stream'][:, 0] - f['y']).abs().max()/f['y'].abs().max()
    assert bare > 1e-2 and identities(m, batch)['T1 conserved'] < 5e-6

@pytest.mark.parametrize('family', EVERY)
def test_identities_in_bfloat16(family, batch):
    e = identities(random_model(family).bfloat16(), batch)
    assert max(e.values()) < 6e-2 and e['T9 same output'] == 0, e

@pytest.mark.parametrize('rule', ['attnlrp', 'cp-lrp', 'gradient'])
def test_t7_eager_equals_sdpa(rule, batch, model):
    if capped(model.config.model_type): pytest.skip('sdpa has no capped scores')
    a = neuron_relevance(model, batch, rule)
    model.set_attn_implementation('eager')
    assert relative(neuron_relevance(model, batch, rule), a) < 5e-6

def test_t10_invariant_under_rescaling(batch):
    m = random_model('llama')
    r = neuron_relevance(m, batch)
    c = torch.logspace(-1, 1, 48)
    with torch.no_grad():
        for b in m.model.layers: b.mlp.up_proj.weight *= c[:, None]; b.mlp.down_proj.weight /= c
    assert relative(neuron_relevance(m, batch), r) < 1e-5

def test_batches_and_padding_change_nothing(model, batch):
    g = torch.Generator().manual_seed(0)
    ex = [Example(torch.randint(3, 97, (n,), generator=g).tolist(), s) for n, s in ((19, 7), (11, 2), (23, 15))]
    together = neuron_relevance(model, collate(ex, 0))
    alone = torch.cat([neuron_relevance(model, collate([e], 0)) for e in ex])
    left = neuron_relevance(model, collate(ex, 0, side='left'))
    assert relative(alone, together) < 1e-5 and relative(left, together) < 1e-5

@pytest.mark.parametrize('rule', ['attnlrp', 'cp-lrp', 'gradient'])
def test_reading_the_prompt_apart_is_exact(rule, model, batch):
    "Against one pass over the whole text with a graph; the texts are longer than the sliding windows"
    whole = [None]*3
    def read(i, a, g): whole[i] = ((a*g)*batch['response_mask'][..., None]).sum(1)
    y = relevance.explain(model, batch, down_projs(model), rule, read)
    seen = []
    apart = relevance.split_prompt(batch)
    y2 = relevance.explain(model, apart, down_projs(model), rule, lambda i, a, g: seen.append(a.shape[1]))
    assert relative(neuron_relevance(model, batch, rule), torch.stack(whole, 1)) < 1e-5 and relative(y2, y) < 1e-5
    assert set(seen) == {12}                                     # the longest response; the prompt carries no graph

# ---- T6: the rules written out

def explicit(model, seed='centred'):
    "Relevance of the block's input and its neurons by explicit rules, with the positions that count"
    ids = torch.randint(3, 97, (9,), generator=torch.Generator().manual_seed(3))
    W, seeds = model.lm_head.weight.detach(), torch.zeros(9, 32, dtype=model.dtype)
    for t in range(4, 9): seeds[t-1] = (W[ids[t]] - W.mean(0))/getattr(model.config, 'logits_scaling', 1)
    return collate([Example(ids.tolist(), 4)], 0), *block_relevance(model, ids, seeds)

@pytest.mark.parametrize('family', ['llama', 'mistral', 'ministral3', 'smollm3', 'seed_oss', 'qwen2', 'granite', 'starcoder2', 'exaone4',
                                    'mixtral', 'qwen3_moe', 'granitemoe'])
def test_t6_explicit_rules(family):
    m = random_model(family, num_hidden_layers=1).double()
    if row(family).experts: m.set_experts_implementation('eager')              # the other ways know no float64
    b, R_x, R_a = explicit(m)
    got = neuron_relevance(m, b)[0, 0]
    stream = residual_relevance(m, b)[0, 0]
    assert relative(got, R_a[4:].sum(0).float()) < 1e-5 and relative(stream, R_x.sum(-1).float()) < 1e-5

def test_lxt_agrees(batch):
    m = random_model('llama')
    ours = neuron_relevance(m, batch)
    with lxt_attnlrp(m): theirs = neuron_relevance(m, batch)
    assert relative(theirs, ours) < 2e-5
    with pytest.raises(ValueError, match='Llama'), lxt_attnlrp(random_model('gpt2')): pass

# ---- mutants: whoever removes a rule is caught

def without(*names): return [mock.patch.dict(relevance.FACTORS, {n: 1}) for n in names]
def derivative(f):
    def slope(x):
        with torch.enable_grad(): y = x.detach().requires_grad_(); return torch.autograd.grad(f(y).sum(), y)[0]
    return slope

MUTANTS = {'norm': lambda: [mock.patch.object(relevance, 'held_norm', lambda norm, kind: norm.forward)], 'gate': lambda: without('gate'),
           'silu': lambda: [mock.patch.dict(relevance.MULTIPLIERS, SiLUActivation=derivative(ACT2FN['silu']))],
           'query': lambda: without('query'), 'key': lambda: without('key'), 'query and key': lambda: without('query', 'key'),
           'value': lambda: without('value'), 'all factors of attention': lambda: without('query', 'key', 'value')}
BESIDE = {'inner': lambda: without('inner'), 'outer': lambda: without('outer')}  # of families without attention in some layers
def routed(weigh): # a mutant of what a token's weight does to a neuron of an expert
    return lambda act, multiplier: lambda gate, up, weight: weigh(relevance._Gated.apply(gate, up, act, multiplier), weight)
ROUTED = {'router': routed(lambda a, w: w*a), 'no weight': routed(lambda a, w: a),      # the router is no constant, or is left out
          'half': routed(lambda a, w: relevance.scale_gradient(w.detach()*a, 1/2))}     # half to a router that hands nothing on
JUDGES = {'T1': lambda m, b: identities(m, b)['T1 conserved'], 'T2': lambda m, b: identities(m, b)['T2 balance of a block'],
          'T3': lambda m, b: max(identities(m, b)[k] for k in ('T3 value half', 'T3 query is key')),
          'T4': lambda m, b: identities(m, b)['T4 softmax'], 'T6': None}
CAUGHT = {'norm': {'T1', 'T2', 'T6'}, 'gate': {'T1', 'T2', 'T6'}, 'silu': {'T1', 'T2', 'T6'}, 'query': {'T3', 'T4', 'T6'},
          'key': {'T3', 'T4', 'T6'}, 'query and key': {'T4', 'T6'}, 'value': {'T3', 'T6'}, 'all factors of attention': {'T3', 'T4', 'T6'}}

@pytest.mark.parametrize('mutant', MUTANTS)
def test_mutant_is_caught_by(mutant, batch):
    "The table rule x test: who notices which missing rule"
    two = random_model("llama").double()
    b, m1 = batch, random_model('llama', num_hidden_layers=1).double()
    eb, R_x, R_a = explicit(m1)
    def judge(name):
        if name != 'T6': return JUDGES[name](two, b)
        stream = residual_relevance(m1, eb)[0, 0]
        return max(relative(neuron_relevance(m1, eb)[0, 0], R_a[4:].sum(0).float()), relative(stream, R_x.sum(-1).float()))
    assert all(judge(j) < 1e-5 for j in JUDGES)
    with ExitStack() as s:
        for p in MUTANTS[mutant](): s.enter_context(p)
        assert {j for j in JUDGES if judge(j) > 1e-3} == CAUGHT[mutant]

def mutants_of(m):
    "Those of `MUTANTS` that change something in a model of this family, and the identities that must notice"
    family, mlp = row(m.config.model_type), mlps_of(m)[0]
    act = activation_of(mlp, family)
    x = torch.zeros(1, 1, m.config.hidden_size)
    skip = ['gate'] if family.parts(mlp, x)[1] is None else []
    true = {'silu': lambda: [mock.patch.dict(relevance.MULTIPLIERS, {type(act).__name__: derivative(act)})]}
    beside = {k: (f, {'T1', 'T2'}) for k, f in BESIDE.items() if family.also == 'convolutions'}
    if family.experts: beside = {k: (lambda k=k: [mock.patch.object(relevance, '_routed', ROUTED[k])], {'T1', 'T2'}) for k in ROUTED}
    return {k: (({**MUTANTS, **true})[k], CAUGHT[k] - {'T6'}) for k in MUTANTS if k not in skip} | beside

def test_every_family_notices_every_mutant(model, batch):
    assert all(judge(model, batch) < 5e-6 for judge in JUDGES.values() if judge)
    for name, (patches, caught) in mutants_of(model).items():
        with ExitStack() as s:
            for p in patches(): s.enter_context(p)
            assert {j for j, judge in JUDGES.items() if judge and judge(model, batch) > 1e-4} == caught, name

def test_shares_of_a_gated_convolution(batch):
    "y = C conv(B x): half to C, a quarter to B and to x"
    m, R = random_model('lfm2'), {}
    conv = next(b.conv for b in m.model.layers if hasattr(b, 'conv'))
    def keep(name, t):
        if t.requires_grad: t.register_hook(lambda g, t=t.detach(): R.update({name: (t*g).sum((0, 1))}))
    with attnlrp(m):
        conv.in_proj.register_forward_hook(lambda mod, args, out: keep('parts', out), prepend=True)
        conv.out_proj.register_forward_pre_hook(lambda mod, args: keep('y', args[0]))
        relevance.explain(m, batch, down_projs(m), 'attnlrp', lambda *a: None)
    parts, y = R['parts'].view(3, 32).sum(1), R['y'].sum()
    assert torch.allclose(parts, y*torch.tensor([.25, .5, .25]), rtol=1e-4) and y.abs() > 1e-2

@pytest.mark.parametrize('part', ['decay', 'beta', 'address'])
def test_mutant_of_the_delta_rule(part, batch):
    "What the rule holds constant must be constant: with a gradient through it, relevance is not conserved, or keys and queries differ"
    m, plain = random_model('qwen3_5_text'), relevance.delta_rule
    assert max(judge(m, batch) for judge in JUDGES.values() if judge) < 5e-6
    def live(q, k, v, beta, decay, state, address):
        slip = (k.sum(-1) - k.sum(-1).detach())*.5             # 0, with a gradient
        if part == 'beta': beta = beta*(1 + slip)
        if part == 'decay': decay = decay + slip
        return plain(q, k, v, beta, decay, state, k if part == 'address' else address)
    with mock.patch.object(relevance, 'delta_rule', live): assert identities(m, batch)['T3 query is key'] > 1e-4

def test_mutant_one_backend_unpatched(batch):
    m = random_model('llama')
    plain = relevance._ruled
    def only_sdpa(attend, scope): return attend if attend.__name__ == 'eager' else plain(attend, scope)
    a = neuron_relevance(m, batch)
    m.set_attn_implementation('eager')
    with mock.patch.object(relevance, '_attention_scope', lambda base, scope, wrap=only_sdpa: TRUE_SCOPE(base, scope, wrap)):
        assert relative(neuron_relevance(m, batch), a) > 1e-2
TRUE_SCOPE = relevance._attention_scope

def test_mutant_reading_behind_the_product(batch):
    "T10 catches who reads relevance of up_proj's output with the wrong tensor"
    m = tiny_model(vocab=97)
    def activation_only(m):
        with attnlrp(m): return relevance.relevance_sums(m, batch)[2]      # mean activation instead of relevance
    before = activation_only(m)
    with torch.no_grad(): m.model.layers[1].mlp.up_proj.weight[5] *= 7; m.model.layers[1].mlp.down_proj.weight[:, 5] /= 7
    assert relative(activation_only(m), before) > 1e-2

# ---- numbers at the edge

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('name', ['silu', 'gelu', 'gelu_new', 'gelu_pytorch_tanh', 'relu'])
def test_activation_rule_is_finite_everywhere(name, dtype):
    f = ACT2FN[name]
    gate = torch.tensor([-60000., -30., -1e-7, -0., 0., 1e-7, 2., 30., 60000.]).to(dtype).requires_grad_()
    y = relevance._Gated.apply(gate, None, f, relevance.MULTIPLIERS[type(f).__name__])
    g = torch.autograd.grad(y.sum(), gate)[0]
    assert torch.isfinite(g).all() and torch.equal(y, f(gate))
    ok = gate.detach().abs() < 100
    near = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-3)
    assert torch.allclose((gate*g)[ok].float(), y[ok].float(), **near)

def test_bfloat16_relevance_ranks_as_float32(batch):
    m = random_model('llama')
    r = neuron_relevance(m, batch)
    low = neuron_relevance(copy.deepcopy(m).bfloat16(), batch)
    assert relative(low, r) < 6e-2 and torch.corrcoef(torch.stack([low.flatten(), r.flatten()]))[0, 1] > .995

# ---- scope

def test_t9_nothing_leaks(model, batch):
    other = copy.deepcopy(model)
    z, g = gradients(model, batch)
    registry = dict(AttentionInterface._global_mapping)
    with attnlrp(model):
        zi, gi = gradients(model, batch)
        zo, go = gradients(other, batch)
    za, ga = gradients(model, batch)
    assert torch.equal(zi, z) and not all(b is not None and torch.equal(a, b) for a, b in zip(g, gi))
    assert all(torch.equal(a, b) for a, b in zip(ga, g)) and all(torch.equal(a, b) for a, b in zip(go, g))
    assert AttentionInterface._global_mapping == registry and not any('forward' in m.__dict__ for m in model.modules())

def test_relevance_leaves_training_state(model, batch):
    model.train(); next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    neuron_relevance(model, batch)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('reentrant', [True, False])
def test_gradient_checkpointing(batch, reentrant):
    m = random_model('llama')
    r = neuron_relevance(m, batch)
    m.gradient_checkpointing_enable(dict(use_reentrant=reentrant)); m.train()
    assert relative(neuron_relevance(m, batch), r) < 1e-6

@pytest.mark.parametrize('family,modules', [('llama', ['up_proj', 'down_proj', 'q_proj']), ('lfm2', ['w1', 'w2', 'in_proj', 'v_proj']),
    ('qwen3_5_text', ['down_proj', 'q_proj', 'in_proj_qkv', 'in_proj_z', 'in_proj_a']), ('gpt_neox', ['dense_4h_to_h', 'query_key_value'])])
def test_lora(family, modules, batch):
    peft = pytest.importorskip('peft')
    m = random_model(family)
    p = peft.get_peft_model(copy.deepcopy(m), peft.LoraConfig(r=4, lora_dropout=.5, target_modules=modules))
    torch.manual_seed(0)
    for n, w in p.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(w, std=.1)
    r = neuron_relevance(p, batch)
    e = identities(p, batch)
    merged = neuron_relevance(copy.deepcopy(p).merge_and_unload(), batch)
    assert relative(r, merged) < 1e-4 and max(e.values()) < 1e-5 and relative(r, neuron_relevance(m, batch)) > 1e-2

def test_prompt_and_padding_do_not_count(batch):
    "A response of one token in the middle counts that token's neurons alone; its own prediction comes from before, so nothing is left"
    m = random_model('llama')
    one = {k: v[2:] for k, v in batch.items()}
    one['response_mask'] = one['response_mask'] & (torch.arange(23) == 17)
    assert neuron_relevance(m, one).abs().max() == 0
    two = {**one, 'response_mask': (torch.arange(23) >= 16)[None] & (torch.arange(23) < 18)[None]}
    at = relevance.token_relevance(m, two, torch.arange(3).repeat_interleave(48), torch.arange(48).repeat(3))
    assert at[0, :16].abs().sum() > 0 and neuron_relevance(m, two).sum().item() == pytest.approx(at[0, 16].item(), rel=1e-3)

# ---- seeds and sets

@pytest.mark.parametrize('seed', SEEDS)
def test_conserved_for_every_seed(seed, batch):
    m, digits = random_model('llama'), torch.arange(3, 97)
    y = explained(m, batch, seed, digits).detach()
    total = residual_relevance(m, batch, 'cp-lrp', seed, digits).sum(-1)
    if seed == 'logprob':      # conserves z_y - E_p[z], not log p
        from yfpo.lm.responses import head_logits, hidden_states
        b, t = batch['response_mask'].nonzero(as_tuple=True)
        z = head_logits(m, hidden_states(m, batch)[b, t-1]).detach()
        one = z.gather(1, batch['input_ids'][b, t][:, None])[:, 0] - (torch.softmax(z, -1)*z).sum(-1)
        y = torch.zeros(3).index_add(0, b, one)
    assert ((total - y[:, None]).abs()/y.abs().max()).max() < 1e-5

def test_the_explained_number_is_that_of_the_models_own_logits(model):
    "Capped or scaled logits too"
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(2))
    b = dict(input_ids=ids, attention_mask=torch.ones_like(ids), response_mask=torch.arange(12)[None] > 4)
    z = model(ids).logits[0, 4:11].float()
    y = ids[0, 5:]
    assert explained(model, b).item() == pytest.approx((z.gather(1, y[:, None])[:, 0] - z.mean(1)).sum().item(), rel=1e-4)

def test_answer_mask_takes_the_last_run():
    ids = torch.tensor([[5, 1, 2, 5, 3, 3, 9], [5, 5, 1, 9, 9, 9, 9]])
    b = dict(input_ids=ids, response_mask=(torch.arange(7) > 0).expand(2, 7))
    assert answer_mask(b, torch.tensor([1, 2, 3])).long().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match='response 1 of the batch holds no digit'): answer_mask(b, torch.tensor([2, 3]))

def test_sums_resume_and_refuse(tmp_path):
    m, tok = load_model('tiny')
    ex = encode(tok, [f'text number {i} and more' for i in range(7)])
    whole = attribute(m, ex, 0, batch_size=2)
    path, true, n = tmp_path/'s.safetensors', relevance.explain, []
    def dies(*a, **k):
        n.append(1)
        if len(n) == 3: raise KeyboardInterrupt
        return true(*a, **k)
    with mock.patch.object(relevance, 'explain', dies), pytest.raises(KeyboardInterrupt):
        attribute(m, ex, 0, batch_size=2, path=path, every=1)
    again = attribute(m, ex, 0, batch_size=2, path=path)
    assert all(torch.equal(getattr(whole, k), getattr(again, k)) for k in ('mean', 'halves', 'weighted', 'activation'))
    with pytest.raises(ValueError, match='another model, other texts or other settings'):
        attribute(m, ex, 0, batch_size=2, path=path, seed='logit')
    with pytest.raises(FileNotFoundError): Relevance.load(tmp_path/'none')

# ---- refusals

def test_refusals(batch):
    m, _ = load_model('tiny')
    with attnlrp(m), pytest.raises(ValueError, match='already inside'):
        with attnlrp(m): pass
    with pytest.raises(ValueError, match='variant'):
        with attnlrp(m, 'lrp'): pass
    with pytest.raises(ValueError, match="'answer' needs the digit tokens"): neuron_relevance(m, batch, seed='answer')
    with pytest.raises(ValueError, match='seed .* is unknown'): neuron_relevance(m, batch, seed='prob')
    empty = {**batch, 'response_mask': batch['response_mask'] & (torch.arange(3) > 0)[:, None]}
    with pytest.raises(ValueError, match='response mask is empty'): neuron_relevance(m, empty)
    with attnlrp(m), pytest.raises(ValueError, match="inside a scope of 'attnlrp'"): neuron_relevance(m, batch, 'gradient')
    with pytest.raises(ValueError, match="use 'response' or 'text'"): neuron_relevance(m, batch, on='prompt')
    long = {k: v[:1, :1].expand(1, 3000) for k, v in batch.items()}
    long['response_mask'] = torch.arange(3000)[None] > 9
    with pytest.raises(ValueError, match='encode with max_length'): neuron_relevance(m, long)
    m.config.quantization_config = dict(load_in_4bit=True)
    with pytest.raises(ValueError, match='quantised'): neuron_relevance(m, batch)

def test_a_broken_weight_is_refused():
    m, tok = load_model('tiny')
    m.model.layers[1].mlp.up_proj.weight.data[3, 3] = float('nan')
    with pytest.raises(ValueError, match='relevance is NaN or infinite'): attribute(m, encode(tok, ['one text']), tok.pad_token_id)

def test_already_patched_is_refused(batch):
    m, _ = load_model('tiny')
    norm = type(m.model.norm)
    with mock.patch.object(norm, 'forward', lxt_patches().rms_norm_forward), pytest.raises(ValueError, match='already patched'):
        neuron_relevance(m, batch)
    assert neuron_relevance(m, batch).isfinite().all()

def test_unsupported_families_are_named():
    moe = AutoModelForCausalLM.from_config(AutoConfig.for_model('qwen2_moe', **SMALL, num_experts=2))
    with pytest.raises(ValueError, match='no rule counts that one: supported are llama, mistral'): neuron_relevance(moe, {})
    opt = AutoModelForCausalLM.from_config(AutoConfig.for_model('opt', vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=1,
                                                                num_attention_heads=4, word_embed_proj_dim=32))
    with pytest.raises(ValueError, match="'opt' models: supported are"): neuron_relevance(opt, {})

@pytest.mark.parametrize('kind,settings,says', [
    ('gpt_oss', {}, 'a mixture of experts of another make'), ('lfm2_moe', {}, 'a mixture of experts of another make'),
    ('gemma4_text', dict(enable_moe_block=True), 'a mixture of experts of another make'),
    ('qwen2_moe', {}, 'a mixture of experts, one of which every token meets'), ('deepseek_v3', {}, 'one of which every token meets'),
    ('qwen3_moe', dict(mlp_only_layers=[1]), 'whose layers differ in their number of neurons'),
    ('qwen3_moe', dict(decoder_sparse_step=2), 'whose layers differ in their number of neurons'),
    ('olmoe', dict(clip_qkv=8.), 'whose queries, keys and values are clipped'),
    ('gemma4_text', dict(use_double_wide_mlp=True, num_kv_shared_layers=10), 'whose layers differ in their number of neurons'),
    ('gemma4', {}, 'which read more than text .load the text model alone.'), ('qwen3_vl', {}, 'which read more than text'),
    ('gemma3_text', dict(use_bidirectional_attention=True), 'whose tokens see those behind them'),
    ('lfm2', dict(conv_bias=True), 'with biases in their convolutions'), ('olmo_hybrid', {}, 'with layers of type linear_attention'),
    ('t5', {}, 'an encoder-decoder'), ('mamba', {}, "'mamba' models, with layers of type linear_attention")])
def test_what_no_rule_covers_is_named(kind, settings, says):
    with pytest.raises(ValueError, match=says) as e: family_of(SimpleNamespace(config=AutoConfig.for_model(kind, **settings)))
    assert 'supported are llama' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('how', [BitsAndBytesConfig(load_in_4bit=True), dict(quant_method='gptq', bits=4), dict(quant_method='awq'),
                                 dict(quant_method='fp8')], ids=['bitsandbytes', 'gptq', 'awq', 'fp8'])
def test_a_quantised_model_is_refused(request, how):
    name, config = request.node.callspec.id, AutoConfig.for_model('llama')
    config.quantization_config = how
    with pytest.raises(ValueError, match=f'the model is quantised .{name}., and its weights cannot be read as numbers: load it'):
        family_of(SimpleNamespace(config=config))

def test_exception_inside_the_scope(batch):
    m = random_model('llama')
    _, g = gradients(m, batch)
    with pytest.raises(RuntimeError, match='stop'), attnlrp(m): raise RuntimeError('stop')
    assert all(torch.equal(a, b) for a, b in zip(gradients(m, batch)[1], g))

@pytest.mark.parametrize('change,says', [
    (lambda t, m: ({k: v for k, v in t.items() if k != 'halves'}, m), 'lacks halves: select the neurons again'),
    (lambda t, m: ({**t, 'more': t['mean'].clone()}, m), 'holds more'), (lambda t, m: (t, {}), 'does not say of how many texts'),
    (lambda t, m: ({**t, 'mean': t['mean'][:1].clone()}, m), 'holds averages over different neurons'),
    (lambda t, m: (t, {'n': 'x'}), 'is cut or damaged')])
def test_relevances_that_were_edited(tmp_path, change, says):
    from safetensors.torch import save_file
    t = {k: torch.zeros(*s) for k, s in (('mean', (2, 3)), ('halves', (2, 2, 3)), ('weighted', (2, 3)), ('activation', (2, 3)))}
    save_file(t, tmp_path/'r', {'n': '4'})
    assert Relevance.load(tmp_path/'r').n == 4
    t, meta = change(t, {'n': '4'})
    save_file(t, tmp_path/'r', meta)
    with pytest.raises(ValueError, match=says): Relevance.load(tmp_path/'r')

def test_capped_attention_without_a_mask_is_refused():
    "It would see the tokens behind"
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="load the model with attn='eager'"): _capped(None, q, q, q, None, .5, 30.)

def test_explaining_leaves_the_mode_of_every_part():
    m = tiny_model().train()
    m.model.layers[0].eval()
    before = [x.training for x in m.modules()]
    neuron_relevance(m, collate([Example([5, 6, 7], 1)], 0))
    assert [x.training for x in m.modules()] == before
