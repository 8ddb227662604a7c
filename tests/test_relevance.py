"AttnLRP: the identities, and what must not leak out of its scope."
import copy
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import AttentionInterface
from yfpo.models import load_model, tiny_model
from yfpo.relevance import attnlrp, centred_logits, lxt_patches, neuron_relevance, residual_relevance
from yfpo.responses import Example, collate

small = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = dict(llama=lambda: LlamaForCausalLM(LlamaConfig(**small)), mistral=lambda: MistralForCausalLM(MistralConfig(**small)),
                qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**small)))

@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(1)
    return FAMILIES[request.param]().eval()

@pytest.fixture(scope='module')
def batch():
    g = torch.Generator().manual_seed(0)
    ex = [Example(torch.randint(3, 97, (n,), generator=g).tolist(), s) for n, s in ((19, 7), (11, 2), (23, 15))]
    return collate(ex, 0)

def gradients(model, batch):
    z = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    g = torch.autograd.grad(torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), batch['input_ids'][:, 1:].flatten()),
                            list(model.parameters()))
    return z.detach(), g

def test_t1_conserved_at_every_layer(model, batch):
    y = centred_logits(model, batch).detach()
    total = residual_relevance(model, batch, 'cp-lrp').sum(-1)
    assert total.shape == (3, 4) and ((total - y[:, None]).abs()/y.abs().max()).max() < 1e-5

@pytest.mark.parametrize('broken', ['norm', 'gate'])
def test_t1_catches_a_missing_rule(broken, batch, monkeypatch):
    p, m = lxt_patches(), tiny_model(vocab=97)
    if broken == 'norm': monkeypatch.setattr(p, 'rms_norm_forward', type(m.model.norm).forward)
    else: monkeypatch.setattr(p, 'gated_mlp_forward', type(m.model.layers[0].mlp).forward)
    y = centred_logits(m, batch).detach()
    assert ((residual_relevance(m, batch, 'cp-lrp').sum(-1) - y[:, None]).abs()/y.abs().max()).max() > 0.05

def attention_relevances(model, batch, rule='attnlrp'):
    "Total relevance at o_proj input and at q, k, v outputs of each layer, and of the residual stream: naive, one retained gradient each"
    got = []
    def keep(t): t.retain_grad(); got.append(t); return t
    hooks = []
    for l in model.model.layers:
        a = l.self_attn
        hooks += [p.register_forward_hook(lambda m, x, out: keep(out)) for p in (a.q_proj, a.k_proj, a.v_proj)]
        hooks.append(a.o_proj.register_forward_pre_hook(lambda m, x: (keep(x[0]),)))
    emb = model.get_input_embeddings().register_forward_hook(lambda m, x, out: keep(out.detach().requires_grad_()))
    with attnlrp(model, rule): centred_logits(model, batch).sum().backward()
    for h in [*hooks, emb]: h.remove()
    model.zero_grad()
    R = [(t*t.grad).sum().item() for t in got]
    return R[0], [R[1+4*i:5+4*i] for i in range(len(model.model.layers))]

def test_t2_t3_accounting_of_attention(batch):
    torch.manual_seed(2)
    m = FAMILIES['llama']().double().eval()
    y = centred_logits(m, batch).sum().item()
    emb, layers = attention_relevances(m, batch)
    absorbed = sum(o - q - k - v for q, k, v, o in layers)
    assert emb == pytest.approx(y - absorbed, abs=1e-6*abs(y))        # T2 summed over layers
    for q, k, v, o in layers: assert v == pytest.approx(o/2, abs=1e-7) and q == pytest.approx(k, abs=1e-7)   # T3

@pytest.mark.parametrize('rule', ['attnlrp', 'cp-lrp', 'gradient'])
def test_t7_eager_equals_sdpa(rule, batch, model):
    a = neuron_relevance(model, batch, rule)
    model.set_attn_implementation('eager')
    assert ((a - neuron_relevance(model, batch, rule)).abs().max()/a.abs().max()) < 5e-6

def test_t9_nothing_leaks(model, batch):
    other = copy.deepcopy(model)
    z, g = gradients(model, batch)
    registry = dict(AttentionInterface._global_mapping)
    with attnlrp(model):
        zi, gi = gradients(model, batch)
        zo, go = gradients(other, batch)
    za, ga = gradients(model, batch)
    assert torch.equal(zi, z) and not all(torch.equal(a, b) for a, b in zip(gi, g))
    assert all(torch.equal(a, b) for a, b in zip(ga, g)) and all(torch.equal(a, b) for a, b in zip(go, g))
    assert AttentionInterface._global_mapping == registry

def test_relevance_leaves_training_state(model, batch):
    model.train(); next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    neuron_relevance(model, batch)
    assert model.training and [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())

def test_t10_invariant_under_rescaling(batch):
    m = tiny_model(vocab=97)
    r = neuron_relevance(m, batch)
    m.model.layers[1].mlp.up_proj.weight.data[5] *= 7; m.model.layers[1].mlp.down_proj.weight.data[:, 5] /= 7
    assert torch.allclose(neuron_relevance(m, batch), r, atol=1e-5)

def test_prompt_and_padding_do_not_count(batch):
    m = tiny_model(vocab=97)
    none = {**batch, 'response_mask': torch.zeros_like(batch['response_mask'])}
    none['response_mask'][0] = batch['response_mask'][0]
    r = neuron_relevance(m, none)
    assert r[0].abs().sum() > 0 and r[1:].abs().sum() == 0

def test_refusals(batch):
    m, _ = load_model('tiny')
    with attnlrp(m), pytest.raises(ValueError, match='already inside'):
        with attnlrp(m): pass
    with pytest.raises(ValueError, match='variant'):
        with attnlrp(m, 'lrp'): pass
