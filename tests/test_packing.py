"A packed batch against each sequence alone: every family, kernels, LoRA, odd shapes, and what is refused"
import copy, random
from functools import partial
import pytest, torch
from yfpo.lm.decoding import any_batch, odd_attention
from yfpo.lm.packing import (PACKS, PackedForward, branch_attention, forest, model_inputs, pack, pack_examples, packed_states, packs,
                             shared_batches, shared_logprobs, target_scores, why_plain)
from yfpo.lm.responses import Example, collate, example_logprobs, hidden_states
from families import FAMILIES, random_model

def trees(seed, n=12, vocab=6):
    "Random sequences over few words, so that many begin alike"
    g = random.Random(seed)
    return [[g.randrange(1, vocab) for _ in range(g.randrange(1, 14))] for _ in range(n)]

def alone(model, seqs):
    def one(s): return hidden_states(model, dict(input_ids=torch.tensor([s]), attention_mask=torch.ones(1, len(s), dtype=torch.long)))[0]
    with torch.no_grad(): return [one(s) for s in seqs]

@pytest.mark.parametrize('seed', range(20))
def test_forest_holds_every_sequence_once(seed):
    seqs = trees(seed)
    groups = [s[0] for s in seqs] if seed % 2 else None
    p = pack(seqs, groups, capacity=30*(seed % 3))
    for a, s in zip(p.at, seqs):
        assert p.input_ids.flatten()[a].tolist() == s and p.position_ids.flatten()[a].tolist() == list(range(len(s)))
    mask = p.mask()[:, 0]
    for a in p.at:                                             # a token sees just what comes before it in its own sequence
        row, col = a[0]//p.input_ids.shape[1], a % p.input_ids.shape[1]
        for t in range(len(a)): assert mask[row, col[t]].nonzero()[:, 0].tolist() == sorted(col[:t+1].tolist())
    prefixes = {(groups[i] if groups else 0, *s[:t]) for i, s in enumerate(seqs) for t in range(1, len(s) + 1)}
    assert (p.branch > 0).sum() == len(prefixes) and p.input_ids.shape[1] <= max(30*(seed % 3), len(prefixes))

@pytest.mark.parametrize('kind', sorted(FAMILIES))
def test_every_family(kind):
    model = random_model(kind).eval()
    seqs = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 10, 11, 12], [5, 6, 7, 8, 9, 3, 4], [20, 21], [20, 21, 22]]
    if odd := odd_attention(model):
        assert why_plain(model) == odd
        return
    assert why_plain(model) == ''
    with torch.no_grad(): states = (p := pack(seqs, [0, 0, 0, 1, 1])) and packed_states(model, p)
    for a, h in zip(p.at, alone(model, seqs)): assert torch.allclose(states[a], h, atol=2e-5)

@pytest.mark.parametrize('kind,attention', [('llama', 'eager'), ('llama', 'sdpa'), ('gemma2', 'eager'), ('qwen3', 'sdpa')])
def test_gradients_of_the_plain_pass(kind, attention):
    model = random_model(kind)
    model.set_attn_implementation(attention)
    ex = [Example([5, 6, 7, 8, 9, 3], 3), Example([5, 6, 7, 8, 10, 11, 12], 3), Example([9, 8, 7, 4], 2), Example([9, 8, 2], 2)]
    b = collate(ex, 0)
    batch = dict(input_ids=b['input_ids'], attention_mask=b['attention_mask'], labels=b['input_ids'].masked_fill(~b['response_mask'], -100))
    w, out = torch.tensor([1., -1., .5, -2.]), []
    for packed in (True, False):
        m = copy.deepcopy(model)
        if packed: lp = PackedForward(m)(**batch).log_probs
        else:
            z = m(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits[:, :-1].float()
            lp = z.log_softmax(-1).gather(-1, batch['input_ids'][:, 1:, None])[..., 0]*(batch['labels'][:, 1:] != -100)
        (lp.sum(1)*w).sum().backward()
        out.append((lp.detach(), [p.grad for p in m.parameters() if p.grad is not None]))
    assert torch.allclose(out[0][0], out[1][0], atol=1e-5)
    assert all((a - b).norm() <= 1e-4*b.norm() + 1e-7 for a, b in zip(out[0][1], out[1][1]))

def test_flex_mask_is_the_same_mask(tiny):
    create_mask = pytest.importorskip('torch.nn.attention.flex_attention').create_mask
    p = pack(trees(3))
    model = copy.deepcopy(tiny[0]); model.config._attn_implementation = 'flex_attention'
    block = model_inputs(model, p)['attention_mask']
    R, T = p.input_ids.shape
    assert torch.equal(create_mask(block.mask_mod, R, 1, T, T, device='cpu'), p.mask())

def test_scores_against_autograd_in_all_dtypes():
    g = torch.Generator().manual_seed(0)
    z, y, w = torch.randn(40, 97, generator=g)*4, torch.randint(0, 97, (40,), generator=g), torch.randn(40, generator=g)
    z[3, :50] = 9.; y[3] = 20                                  # ties: only the first of them is the likeliest
    for dtype, tol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        a = z.clone().to(dtype).requires_grad_()
        s = target_scores(a*1, y, tile=7, squares=True)
        (s.log_probs*w).sum().backward()
        b = z.to(dtype).float().clone().requires_grad_()
        lp = b.log_softmax(-1)
        (lp.gather(-1, y[:, None])[:, 0]*w).sum().backward()
        assert torch.allclose(s.log_probs, lp.gather(-1, y[:, None])[:, 0], atol=1e-4) and torch.allclose(a.grad.float(), b.grad, atol=tol)
        assert torch.equal(s.is_top1, b.argmax(-1) == y) and not s.is_top1[3]
        assert torch.allclose(s.entropy, -(lp.exp()*lp).sum(-1), atol=1e-4) and torch.allclose(s.mean_logits, b.mean(-1), atol=1e-4)
        assert torch.allclose(s.log_sum_sq_probs, (2*lp).logsumexp(-1), atol=1e-4)

def test_confident_tokens_keep_their_gradient_in_half_precision():
    "1 - p of a token that is nearly certain, from logits in bfloat16"
    z = torch.zeros(4, 50); z[:, 7] = torch.tensor([4., 7., 9., 11.])
    a, b = z.bfloat16().requires_grad_(), z.double().requires_grad_()
    target_scores(a*1, torch.full((4,), 7)).log_probs.sum().backward()
    b.log_softmax(-1)[:, 7].sum().backward()
    assert torch.allclose(a.grad[:, 7].double(), b.grad[:, 7], rtol=1e-2)

@pytest.mark.parametrize('mode', ['zero', 'mean', 'resample'])
def test_ablation_on_packed_rows_is_that_on_plain_ones(tiny, mode):
    from test_trainer import some_neurons
    from yfpo.interventions import ablate
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    neurons, g = some_neurons(model, 20), torch.Generator().manual_seed(0)
    values = torch.randn(*((2, 64) if mode == 'mean' else (7, 20)), generator=g)
    ex = [Example([1, 2, 3, 9 + i, 5, 6][:4 + i % 3], 2 + i % 2) for i in range(6)]
    packs(model, 9)
    with ablate(model, neurons, mode, None if mode == 'zero' else values):
        a, b = shared_logprobs(model, ex, tok.pad_token_id), example_logprobs(model, ex, tok.pad_token_id)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b))
    plain = example_logprobs(model, ex, tok.pad_token_id)
    assert max((x - y).abs().max() for x, y in zip(a, plain)) > 1e-3

def test_no_verdict_while_others_edit_the_model(tiny):
    model = copy.deepcopy(tiny[0])
    h = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: None)
    with pytest.warns(UserWarning, match="a hook of 'test_packing' may look at positions"): assert not packs(model, 9)
    assert not PACKS.get(model)
    h.remove()
    assert packs(model, 9)

@pytest.mark.parametrize('tried', [False, True])
def test_a_strangers_hook_sees_each_example_in_a_row_of_its_own(tiny, tried):
    "One that looks at column 5, whether or not the model was tried out before it came"
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    ex = [Example([1, 2, 3, 9 + i, 5, 6, 7, 8], 3) for i in range(6)]
    plain = shared_logprobs(model, ex, tok.pad_token_id) if tried else example_logprobs(model, ex, tok.pad_token_id)
    def silence(m, args):
        x = args[0].clone()
        x[:, 5] = 0
        return (x,)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(partial(silence))
    own, ref = shared_logprobs(model, ex, tok.pad_token_id), example_logprobs(model, ex, tok.pad_token_id)
    assert not any_batch(model) and all(torch.equal(a, b) for a, b in zip(own, ref))
    assert max((a - b).abs().max() for a, b in zip(own, plain)) > 1e-3

@pytest.mark.parametrize('key, value', [('alibi', True), ('window_size', 4), ('layer_types', ['linear_attention', 'full_attention'])])
def test_configurations_that_speak_against_it(tiny, key, value):
    model = copy.deepcopy(tiny[0])
    setattr(model.config, key, value)
    assert why_plain(model)

def test_stand_in_is_copied_like_its_model(tiny):
    twin = copy.deepcopy(PackedForward(tiny[0]))
    assert twin.config.vocab_size == tiny[0].config.vocab_size and twin.model is not tiny[0]

def test_nothing_to_read(tiny):
    from test_trainer import some_neurons
    from yfpo.reward import RewardStats, read_examples
    one = torch.ones(8)
    assert read_examples(tiny[0], [], 0, some_neurons(tiny[0]), RewardStats(one, one, one)).shape == (0,)

def test_scores_cannot_be_differentiated_twice():
    z = torch.randn(4, 9, requires_grad=True)
    s = target_scores(z*1, torch.tensor([1, 2, 3, 4])).log_probs.sum()
    s.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='already differentiated'): s.backward()

def test_odd_batches(tiny):
    model, tok = tiny
    ex = [Example([1, 2, 3], 2), Example([1, 2, 3], 2), Example([1, 2, 3, 4], 2), Example([7, 7], 1), Example([1, 9], 1)]
    for some in (ex, ex[:1], ex[:2], ex[3:]):
        for a, b in zip(shared_logprobs(model, some, tok.pad_token_id), example_logprobs(model, some, tok.pad_token_id)):
            assert torch.allclose(a, b, atol=1e-5)
    assert shared_logprobs(model, [], 0) == []
    with pytest.raises(ValueError, match='sequence 1 has no tokens'): pack([[1], []])
    with pytest.raises(ValueError, match='batch_size is 0'): shared_batches(ex, 0)
    assert sorted(i for b in shared_batches(ex, 2) for i in b) == list(range(5)) and all(len(b) <= 2 for b in shared_batches(ex, 2))

def test_response_without_tokens_and_left_padding(tiny):
    "A row whose response was cut off has no score; rows padded on the left are read as they are"
    model, _ = tiny
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    on = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 6, 7], [-100]*5])
    out = PackedForward(model)(ids, on, labels)
    ref = example_logprobs(model, [Example([5, 6, 7], 1)], 0)[0]
    assert torch.allclose(out.log_probs[0, 2:], ref, atol=1e-5) and not out.log_probs[1].any() and not out.log_probs[0, :2].any()
    with torch.enable_grad(): PackedForward(model)(ids, on, torch.full_like(ids, -100)).log_probs.sum().backward()
    model.zero_grad()

def test_work_is_counted(tiny):
    "Tokens through the model: prompts once, response once, and the head on responses alone"
    model, _ = tiny
    prompt, seen = list(range(1, 41)), []
    ex = [Example(prompt + [50 + i]*(5 + i), 40) for i in range(4)]
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0]*a[0].shape[1])),
             model.lm_head.register_forward_hook(lambda m, a, out: seen.append(len(out)))]
    b = collate(ex, 0)
    packs(model, 9)
    seen.clear()
    PackedForward(model)(b['input_ids'], b['attention_mask'], b['input_ids'].masked_fill(~b['response_mask'], -100))
    for h in hooks: h.remove()
    assert seen == [40 + 5 + 6 + 7 + 8, 5 + 6 + 7 + 8]
    assert pack_examples(model, ex).input_ids.shape == (1, 66)

def test_on_a_cpu_what_all_prompts_begin_with_is_computed_once(tiny):
    "Two questions behind one system prompt: one root, counted in tokens; on other devices each prompt stands alone"
    model, _ = tiny
    system, out = list(range(3, 23)), []
    for q in ([30, 31, 32], [40, 41]):
        for r in ([50, 51], [60, 61, 62]): out.append(Example(system + q + r, len(system + q)))
    packed = pack_examples(model, out)
    assert packed.input_ids.numel() == 20 + 3 + 2 + 2*(2 + 3)
    got, ref = shared_logprobs(model, out, 0), example_logprobs(model, out, 0)
    for a, b in zip(got, ref): assert torch.allclose(a, b, atol=2e-5)
    rows = pack([e.ids for e in out], [tuple(e.ids[:e.start]) for e in out])
    assert (rows.branch > 0).sum() == 2*20 + 3 + 2 + 2*(2 + 3)

def test_a_response_from_the_very_first_token_on_is_refused():
    "Nothing predicts it; a text without a prompt starts at 1"
    model = random_model('llama').eval()
    with pytest.raises(ValueError, match='response of example 1 starts at token 0'):
        shared_logprobs(model, [Example([5, 6, 7], 1), Example([5, 6, 8], 0)], 0)
    whole = [Example([5, 6, 7], 1), Example([5, 6, 8, 9], 1)]
    for a, b in zip(shared_logprobs(model, whole, 0), example_logprobs(model, whole, 0)):
        assert torch.allclose(a, b, atol=1e-5) and len(a) > 1

def test_a_batch_without_prompts_has_the_log_probabilities_of_the_plain_pass():
    model = random_model('llama').eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    on = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    out = PackedForward(model)(ids, on, ids.masked_fill(on == 0, -100)).log_probs
    lp = model(ids, attention_mask=on).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]*on[:, 1:]
    assert torch.allclose(out, lp, atol=1e-5)

@pytest.mark.parametrize('kw, says', [(dict(dropout=.1), 'dropout'), (dict(softcap=30.), 'softcap'), (dict(dropout=.1, s_aux=1), 's_aux')])
def test_attention_of_another_kind_is_not_computed_branch_by_branch(kw, says):
    attend = branch_attention(pack([[1, 2, 3], [1, 2, 4]]))
    with pytest.raises(ValueError, match=f'attention with {says} is not computed'): attend(None, None, None, None, **kw)
