"Attributors on every family, selectors with a criterion of their own, controls, interventions and cards beyond their notebooks."
import copy, math
import numpy as np, peft, pytest, torch
from families import random_model
from test_relevance import relative
from yfpo.beyond.attributors import integrated_gradients, logprob_increase
from yfpo.lm.families import FAMILIES
from yfpo.relevance import ATTRIBUTORS, attribute
from yfpo.beyond.cards import cards_html, neuron_cards, promoted
from yfpo.beyond.controls import activation_matched, bottom_neurons, norm_matched
from yfpo.beyond.effects import faithfulness, hiding_curve
from yfpo.interventions import ablate, delta_nll, draw_rank, patch, patch_from, record, selectivity, single_effects
from yfpo.lm.models import byte_tokenizer, load_model
from yfpo.neurons import NeuronSet, capability_relevance, contrast_set, jaccard, model_signature, select_neurons, spearman
from yfpo.data.templates import general_texts, make_problems
from yfpo.relevance import explained, rule_scope, seed_gradient
from yfpo.lm.families import blocks_of, down_projs, head_weights, mlps_of, width, write_matrix
from yfpo.reward import write_norms
from yfpo.lm.responses import Example, collate, format_prompt, generate, hidden_states

DIGITS = torch.arange(10, 20)
SCALES = dict(granite=1/2.5, granitemoe=1/2.5, cohere=.5, cohere2=.5)            # of the logits, from families.SMALL

@pytest.fixture(scope='module')
def examples():
    g = torch.Generator().manual_seed(0)
    def ids(n): return [40, 11, *torch.randint(20, 97, (n,), generator=g).tolist(), 12, 14]
    return [Example(ids(n), s) for n, s in ((17, 7), (9, 6), (21, 15), (12, 5))]

@pytest.mark.parametrize('method', ATTRIBUTORS)
@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_every_attributor_on_every_family(method, family, examples):
    m = random_model(family, num_hidden_layers=2 if method in ('relp', 'atp') else 1)   # one parallel block sees no other prompt
    options = {**({'digits': DIGITS} if method in ('relp', 'atp') else {}), **({'steps': 2} if method == 'knowledge' else {})}
    if method == 'logprob' and FAMILIES[family].after:
        with pytest.raises(ValueError, match=f'not defined for .{family}.: what a neuron writes passes a norm'):
            attribute(m, examples, 0, method)
        return
    r = attribute(m, examples, 0, method, batch_size=2, **options)
    alone = attribute(m, examples, 0, method, batch_size=1, **options)
    assert r.mean.shape == (len(down_projs(m)), width(m)) and r.mean.isfinite().all() and r.mean.abs().sum() > 0
    assert relative(alone.mean, r.mean) < 1e-3                                 # a text does not depend on its batch

@pytest.mark.parametrize('family', ['llama', 'gpt2', 'phi3'])
def test_path_scores_add_up_to_the_layer(family, examples):
    m, b = random_model(family), collate(examples, 0)
    R = integrated_gradients(m, b, steps=40)[0].sum(-1)
    for l, d in enumerate(down_projs(m)):
        h = d.register_forward_pre_hook(lambda mod, x: (torch.where(b['response_mask'][..., None], 0., x[0]),))
        with torch.no_grad(): without = explained(m, b)
        h.remove()
        with torch.no_grad(): y = explained(m, b)
        assert torch.allclose(R[:, l], y - without, rtol=2e-2, atol=2e-2*y.abs().max().item())

@pytest.mark.parametrize('family', [f for f in sorted(FAMILIES) if not FAMILIES[f].after])
def test_logprob_increase_by_brute_force(family, examples):
    m, b = random_model(family), collate(examples[:2], 0)
    R = logprob_increase(m, b)[0]
    final, by, scale = getattr(m.base_model, FAMILIES[family].final), .4 if 'granite' in family else 1, SCALES.get(family, 1)
    keep = {}
    hooks = [blocks_of(m)[1].register_forward_hook(lambda mod, x, y: keep.update(end=y[0] if isinstance(y, tuple) else y)),
             mlps_of(m)[1].register_forward_hook(lambda mod, x, y: keep.update(mlp=by*y)),
             down_projs(m)[1].register_forward_pre_hook(lambda mod, x: keep.update(a=x[0]))]
    with torch.no_grad():
        hidden_states(m, b)
        for row in (0, 1):
            t = len(examples[row].ids) - 1
            mid, a = (keep['end'] - keep['mlp'])[row, t-1], keep['a'][row, t-1]
            for i in (0, 7):
                wrote, word = by*a[i]*write_matrix(down_projs(m)[1])[:, i], b['input_ids'][row, t]
                lp = [torch.log_softmax(scale*m.lm_head(final(x)), -1)[word] for x in (mid + wrote, mid)]
                assert R[row, 1, i].item() == pytest.approx((lp[0] - lp[1]).item(), abs=2e-5)
    for h in hooks: h.remove()

def test_nothing_stays_behind(examples):
    m = random_model('llama')
    with torch.no_grad(): before = hidden_states(m, collate(examples, 0))
    for method in ATTRIBUTORS: attribute(m, examples, 0, method, **({'digits': DIGITS} if method in ('relp', 'atp') else {}))
    with torch.no_grad(): assert torch.equal(hidden_states(m, collate(examples, 0)), before)
    assert all(p.requires_grad for p in m.parameters()) and not any(m_._forward_hooks or m_._forward_pre_hooks for m_ in m.modules())

def test_a_response_of_one_token(random_single):
    net, examples = random_single
    for method in ('attnlrp', 'cp-lrp', 'gradient'):
        with pytest.raises(ValueError, match="on='text'"): attribute(net, examples, 0, method, batch_size=2)
        text = [attribute(net, examples, 0, method, batch_size=b, on='text').mean for b in (1, 3)]
        assert text[0].abs().sum() > 0 and relative(*text) < 1e-5, 'batches change nothing'
    with pytest.raises(ValueError, match="takes no 'on'"): attribute(net, examples, 0, 'wanda', on='text')

@pytest.fixture
def random_single():
    net, _ = load_model('tiny')
    return net, [Example([3, 5, 7, 9][:n] + [11], n) for n in (2, 3, 4)]

def test_refusals(examples):
    m = random_model('llama')
    with pytest.raises(ValueError, match='there are attnlrp'): attribute(m, examples, 0, 'lime')
    with pytest.raises(ValueError, match='takes no'): attribute(m, examples, 0, 'wanda', seed='logit')
    for every in (0, 'a'):
        with pytest.raises(ValueError, match='every is'): attribute(m, examples, 0, 'wanda', every=every)
    with pytest.raises(ValueError, match='there is 1: give at least two'):
        seed_gradient(m, torch.zeros(1, 32), DIGITS[:1], 'contrast', DIGITS[:1])
    with pytest.raises(ValueError, match='needs the digit tokens'): attribute(m, examples, 0, 'relp')
    with pytest.raises(ValueError, match='no counterfactual'): attribute(m, [Example([3, 4, 5, 6], 2)], 0, 'atp', digits=DIGITS)
    with pytest.raises(ValueError, match='list is empty'): attribute(m, [], 0, 'wanda')

def test_a_digit_that_is_given_twice_counts_once(examples):
    m = random_model('llama')
    once, twice = (attribute(m, examples, 0, seed='contrast', digits=d).mean for d in (DIGITS, torch.cat([DIGITS, DIGITS[:3]])))
    assert torch.equal(once, twice)

def test_interventions_that_fit_no_model(examples):
    m, s = random_model('llama'), NeuronSet(torch.zeros(2).long(), torch.arange(2), torch.ones(2)/2, torch.ones(2))
    s.meta['model'] = model_signature(m)
    with pytest.raises(ValueError, match=r'means are \(99, 9\)'):
        with ablate(m, s, 'mean', torch.zeros(99, 9)): pass
    with pytest.raises(ValueError, match='neurons is a str, but must be a NeuronSet'):
        with ablate(m, 'folder'): pass
    with pytest.raises(ValueError, match='alpha is nan'):
        with ablate(m, s, 'scale', alpha=math.nan): pass

# ---- selection and controls

@pytest.fixture(scope='module')
def chosen():
    m, tok = load_model('tiny')
    math_texts = [(format_prompt(tok, p.question), p.solution) for p in make_problems(10, seed=5)]
    return m, tok, math_texts, select_neurons(m, tok, math_texts, general_texts(10), k=.1, per_layer=.2)

def test_counterfactual_selection_needs_no_general_text(chosen):
    from yfpo.relevance import digit_ids
    m, tok, texts, _ = chosen
    s = select_neurons(m, tok, texts, general_texts(2), k=.1, per_layer=.2, method='relp', digits=digit_ids(tok))
    assert s.meta['selector'] == 'relp-top' and s.meta['n_general'] == 0

def test_matched_controls(chosen):
    m, tok, texts, s = chosen
    values = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) + .1
    for draw in range(20):
        c = activation_matched(s, values, seed=draw, pool=3)
        assert jaccard(c, s) == 0 and torch.equal(c.layer, s.layer) and len(set(zip(c.layer.tolist(), c.index.tolist()))) == len(s)
    with pytest.raises(ValueError, match='values to match have the shape'): activation_matched(s, values[:, :5])
    n = norm_matched(s, m, pool=1)
    norm = torch.stack([write_matrix(d).detach().norm(dim=0) for d in down_projs(m)])
    near = (norm[n.layer, n.index].log() - norm[s.layer, s.index].log()).abs().mean()
    assert near < .1
    cap, gen = capability_relevance(m, tok, texts, general_texts(10))
    score = (cap.mean - gen.mean).abs()
    low = bottom_neurons(s, cap, gen)
    assert score[low.layer, low.index].max() <= score.flatten().sort().values[len(s) + len(s)]
    assert contrast_set(cap, gen, m, k=.1, per_layer=.2) == s

def test_spearman_is_a_rank_correlation():
    a = torch.tensor([3., 1., 2., 10.])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    flat = torch.tensor([[0., 0., 0.], [1., 2., 0.]])          # many neurons score nothing: their order is no information
    assert spearman(flat, flat.roll(1, 1)) == pytest.approx(np.corrcoef([2.5, 2.5, 2.5, 5, 6, 2.5], [2.5, 2.5, 2.5, 2.5, 5, 6])[0, 1])

# ---- interventions

def everything(m):
    L, F = len(down_projs(m)), width(m)
    return NeuronSet(torch.arange(L).repeat_interleave(F), torch.arange(F).repeat(L), torch.full((L*F,), 1/(L*F)), torch.ones(L*F),
                     dict(model=model_signature(m)))

@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_patching_everything_gives_the_donor(family, examples):
    m, donor = random_model(family), random_model(family)
    for mlp in mlps_of(donor):
        for n, p in mlp.named_parameters():
            if n.split('.')[0] != FAMILIES[family].down: p.data *= 1.3
    b = collate(examples, 0)
    with torch.no_grad():
        want, own = hidden_states(donor, b), hidden_states(m, b)
        with patch_from(m, donor, everything(m), spare_first=False): got = hidden_states(m, b)
        values = record(donor, b, everything(m))
        with patch(m, everything(m), values, spare_first=False): again = hidden_states(m, b)
    on = b['attention_mask'].bool()
    assert relative(got[on], want[on]) < 1e-5 and relative(again[on], want[on]) < 1e-5 and relative(own[on], want[on]) > 1e-2
    with torch.no_grad(): assert torch.equal(hidden_states(m, b), own)

def test_interventions_while_decoding_ignore_padding(chosen):
    m, tok, _, s = chosen
    donor = random_donor(m)
    bank = torch.randn(50, len(s), generator=torch.Generator().manual_seed(0))
    short, long = 'Tom has 3 apples.', 'A much longer question, so that the first one is padded on the left: how many pears are there?'
    for scope in (lambda: ablate(m, s, 'resample', bank), lambda: ablate(m, s, 'scale', alpha=2.), lambda: patch_from(m, donor, s)):
        with scope(): alone = generate(m, tok, [short], max_new_tokens=6, progress=False)[0]['text']
        with scope(): both = generate(m, tok, [short, long], max_new_tokens=6, progress=False)[0]['text']
        assert alone == both

@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_every_family_generates_without_a_set_alone_and_in_a_batch(family):
    m, tok = random_model(family, vocab_size=259), byte_tokenizer()
    at = torch.arange(0, 48, 3)
    s = NeuronSet(torch.zeros_like(at), at, torch.full((16,), 1/16), torch.ones(16), dict(model=model_signature(m)))
    def texts(*prompts): return [r['text'] for r in generate(m, tok, list(prompts), max_new_tokens=6, progress=False)]
    short, long = 'Tom has 3 apples.', 'A much longer question, so that the first one is padded on the left: how many pears?'
    def logits():
        with torch.no_grad(): return m(input_ids=torch.arange(3, 20)[None]).logits
    before, z = texts(short, long), logits()
    with ablate(m, s): alone, both, less = texts(short) + texts(long), texts(short, long), logits()
    assert alone == both and (less - z).abs().max() > 1e-2 and texts(short, long) == before

def random_donor(m):
    import copy
    d = copy.deepcopy(m)
    for layer in d.model.layers: layer.mlp.gate_proj.weight.data *= 2
    return d

def test_a_model_is_not_its_own_donor(chosen):
    m, _, _, s = chosen
    with pytest.raises(ValueError, match='its own donor'), patch_from(m, m, s): pass

def test_single_effects_are_ablations(chosen, examples):
    m = random_model('llama')
    b = collate(examples, 0)
    e = single_effects(m, b, torch.tensor([0, 2]), torch.tensor([5, 9]))
    h = down_projs(m)[2].register_forward_pre_hook(lambda mod, x: (x[0]*~(b['response_mask'][..., None] & (torch.arange(48) == 9)),))
    with torch.no_grad(): y = explained(m, b).sum()
    h.remove()
    with torch.no_grad(): assert e[1].item() == pytest.approx((explained(m, b).sum() - y).item(), abs=1e-4)

def test_statistics_of_the_card():
    assert selectivity(torch.tensor([1., 1.]), torch.tensor([-1., -1.])) == (math.inf,)*3
    assert draw_rank(1., [0.]*19) == (0, 19, 1/20)
    g = torch.Generator().manual_seed(0)
    math_rise, other = torch.rand(400, generator=g) + 2, torch.rand(400, generator=g) + .5
    v, low, high = selectivity(math_rise, other)
    assert low < v < high and v == pytest.approx((math_rise.mean()/other.mean()).item(), rel=1e-5)
    se = v*(math_rise.var()/math_rise.mean()**2/400 + other.var()/other.mean()**2/400).sqrt().item()     # delta method
    assert (high - low)/2 == pytest.approx(1.96*se, rel=.15)

def test_delta_takes_the_modes(chosen):
    m, tok, texts, s = chosen
    zero = delta_nll(m, tok, texts[:3], s)
    assert torch.allclose(delta_nll(m, tok, texts[:3], s, mode='scale', alpha=0.), zero, atol=1e-6)
    assert torch.allclose(delta_nll(m, tok, texts[:3], s, mode='scale', alpha=1.), torch.zeros(3), atol=1e-6)

def test_faithfulness_of_a_known_map(examples):
    "A map that is the true effect of hiding each token has a positive area, its reverse the negative of it"
    m = random_model('llama')
    ex = [Example(e.ids[:len(e.ids)-1], len(e.ids) - 2) for e in examples]
    b = collate(ex, 0)
    area, most, least = faithfulness(m, b, 'attnlrp', steps=5)
    assert area.shape == (4,) and torch.allclose(most[:, 0], least[:, 0]) and torch.allclose(most[:, -1], least[:, -1], atol=1e-4)
    truth = torch.zeros(b['input_ids'].shape)
    for t in range(1, truth.shape[1]):                              # hiding token t alone, by putting it first in the order
        only = torch.zeros_like(truth); only[:, t] = 1
        n = ((torch.arange(truth.shape[1]) > 0) & (torch.arange(truth.shape[1]) < b['response_mask'].long().argmax(1)[:, None] - 1)).sum(1)
        for row in range(4):
            if 0 < t < b['response_mask'][row].long().argmax() - 1:
                one = {k: v[row:row+1] for k, v in b.items()}
                c = hiding_curve(m, one, only[row:row+1], True, int(n[row]))
                truth[row, t] = (c[0, 0] - c[0, 1]).item()
    most, least = (hiding_curve(m, b, truth, first, 5) for first in (True, False))
    assert (least - most).mean() > 0
    assert torch.allclose(hiding_curve(m, b, -truth, True, 5).mean(), least.mean(), atol=1e-3)

@pytest.mark.parametrize('family', sorted(FAMILIES))
def test_cards_for_every_family(family, examples):
    class Tok:
        pad_token_id, eos_token_id, added_tokens_decoder = 0, None, {}
        def __len__(self): return 97
        def decode(self, ids): return f'<{ids[0]}>'
        def __call__(self, text, **k): return type('E', (), dict(input_ids=[int(t) for t in text.split()]))
        def apply_chat_template(self, messages, **k): raise AssertionError('the items are texts, not messages')
    m = random_model(family)
    items = [(' '.join(map(str, e.ids[:e.start])), ' '.join(map(str, e.ids[e.start:]))) for e in examples]
    cards = neuron_cards(m, Tok(), everything(m), items, top=2, contexts=2)
    assert len(cards) == 2 and all(len(c['contexts']) <= 2 and len(c['promotes']) == 8 for c in cards) and '&lt;' in cards_html(cards)

@pytest.mark.parametrize('family', sorted(f for f in FAMILIES if not FAMILIES[f].experts and FAMILIES[f].also != 'per-layer inputs'))
def test_the_tokens_that_a_neuron_promotes_are_those_its_gradient_raises(family, examples):
    "Gradients of the logits, all norms held, by a neuron of the last layer: the norm behind the MLP counts, and so does centring"
    class Tok:
        def __len__(self): return 97
        def decode(self, ids): return ids[0]
    m, x = random_model(family), []
    last = len(down_projs(m)) - 1
    s = NeuronSet(torch.full((5,), last), torch.arange(5), torch.full((5,), .2), torch.ones(5), dict(model=model_signature(m)))
    hook = down_projs(m)[last].register_forward_pre_hook(lambda mod, args: x.append(args[0]))
    with rule_scope(m, 'attnlrp'):
        z = m.get_output_embeddings()(hidden_states(m, collate(examples[:1], 0)))[0, -1]
        G = torch.stack([torch.autograd.grad(v, x[0], retain_graph=True)[0][0, -1, :5] for v in z[:97]], 1)         # (5, V)
    hook.remove()
    for tokens, big in zip(promoted(m, Tok(), s, 5), (True, False)):
        assert [{*row} for row in tokens] == [{*row} for row in G.topk(5, largest=big).indices.tolist()]

# ---- adapters of every kind

def _adapter(kind, down, head):
    at, how = [down, *head], dict(task_type='CAUSAL_LM')
    if kind == 'lora': return peft.LoraConfig(r=4, target_modules=at, lora_dropout=.3, init_lora_weights=False, **how)
    if kind == 'dora': return peft.LoraConfig(r=4, target_modules=at, use_dora=True, init_lora_weights=False, **how)
    if kind == 'ia3': return peft.IA3Config(target_modules=at, feedforward_modules=[down], init_ia3_weights=False, **how)
    return dict(loha=peft.LoHaConfig, lokr=peft.LoKrConfig)[kind](r=4, target_modules=at, init_weights=False, **how)

ADAPTERS = [('lora', 'llama', 'down_proj', ['lm_head']), ('dora', 'llama', 'down_proj', []), ('ia3', 'llama', 'down_proj', []),
            ('loha', 'llama', 'down_proj', ['lm_head']), ('lokr', 'llama', 'down_proj', ['lm_head']), ('lora', 'gpt2', 'mlp.c_proj', [])]

@pytest.fixture(params=ADAPTERS, ids=lambda p: ' '.join(p[:2]))
def adapted(request):
    "A model with an adapter that was trained, in training mode, and the same one merged"
    kind, family, down, head = request.param
    m = peft.get_peft_model(random_model(family, tie_word_embeddings=False), _adapter(kind, down, head))
    g = torch.Generator().manual_seed(3)
    for k, p in m.named_parameters():
        if p.requires_grad: p.data += .3*torch.randn(p.shape, generator=g)
    return m.train(), copy.deepcopy(m).eval().merge_and_unload()

def test_write_norms_are_those_of_the_merged_weights(adapted):
    index = torch.tensor([5, 0, 17])
    with adapted[0].disable_adapter(): off = write_norms(down_projs(adapted[0])[0], index)
    own, merged = (write_norms(down_projs(m)[0], index) for m in adapted)
    assert torch.allclose(own, merged, rtol=1e-4) and not torch.allclose(own, off, rtol=1e-2) and adapted[0].training
    assert all(m.training for m in adapted[0].modules())
    adapted[0].merge_adapter()
    assert torch.allclose(write_norms(down_projs(adapted[0])[0], index), merged, rtol=1e-4)

@pytest.mark.parametrize('method', ['wanda', 'logprob', 'attnlrp'])
def test_scores_are_those_of_the_merged_weights(adapted, examples, method):
    own, merged = (attribute(m.eval(), examples, 0, method).mean for m in adapted)
    assert relative(own, merged) < 1e-4

@pytest.mark.parametrize('seed', ['centred', 'contrast', 'logprob'])
def test_what_is_explained_of_an_adapted_head_are_its_logits(adapted, examples, seed):
    with torch.no_grad(): own, merged = (explained(m.eval(), collate(examples, 0), seed, DIGITS) for m in adapted)
    assert torch.allclose(own, merged, atol=1e-3)

@pytest.mark.parametrize('how', [dict(modules_to_save=['lm_head']), dict(lora_bias=True, target_modules=['lm_head'])])
def test_a_head_that_was_trained_whole_or_with_a_bias(examples, how):
    "And with the adapter off, the head as it was"
    m = random_model('llama', tie_word_embeddings=False)
    m.lm_head = torch.nn.Linear(m.lm_head.in_features, m.lm_head.out_features)
    h, plain = torch.randn(3, m.config.hidden_size), m.lm_head
    before = plain.weight.clone(), plain.bias.clone()
    m = peft.get_peft_model(m, peft.LoraConfig(task_type='CAUSAL_LM', init_lora_weights=False, **{'target_modules': ['q_proj'], **how}))
    for k, p in m.named_parameters():
        if p.requires_grad: p.data += .3*torch.randn(p.shape)
    head, (W, b) = m.get_output_embeddings(), head_weights(m)
    assert torch.allclose(head(h), torch.nn.functional.linear(h, W, b), atol=1e-4) and not torch.allclose(W, before[0], atol=1e-2)
    with m.disable_adapter(): W, b = head_weights(m)
    assert torch.allclose(W, before[0]) and torch.allclose(b, before[1])

def test_a_head_that_another_adapter_trained():
    "With an adapter on that has no head of its own, the head is as it was"
    m = random_model('llama', tie_word_embeddings=False)
    own = m.lm_head.weight.clone()
    how = dict(task_type='CAUSAL_LM', target_modules=['q_proj'])
    m = peft.get_peft_model(m, peft.LoraConfig(modules_to_save=['lm_head'], **how))
    m.add_adapter('other', peft.LoraConfig(**how))
    m.base_model.model.lm_head.modules_to_save['default'].weight.data += 1
    assert torch.equal(head_weights(m)[0], own + 1)
    m.set_adapter('other')
    assert torch.equal(head_weights(m)[0], own)
