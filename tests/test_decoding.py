"The decoding loop against transformers' own generate: families, kernels, adapters, interventions, ends, and what is refused"
import copy, math, sys, types
import pytest, torch
from yfpo.lm.decoding import (GumbelNoise, common_beginning, completions, decode, decodes, left_padded, odd_attention, plain_decode,
                              read_beginning, text_ids,
                           why_plain_decoding)
from yfpo.lm.packing import _window
from yfpo.lm.models import byte_tokenizer, load_model
from yfpo.data.templates import make_problems
from yfpo.lm.responses import format_prompt, generate
from families import FAMILIES, random_model

SHOTS = [[7, 8, 9, 10, 11, 12, 13], [7, 8, 9, 10, 20], [7, 8, 9, 10, 20, 21, 22, 23, 24, 25], [7, 8, 9, 10, 30, 31]]

def both(model, tok, prompts, n=10, keys=None, **kw):
    def noise(): return GumbelNoise(keys, 1.) if keys else None
    own = decode(model, prompts, read_beginning(model, common_beginning(prompts)), lambda x: False, n, noise(), **kw)
    return own, plain_decode(model, tok, prompts, n, noise())

@pytest.mark.parametrize('kind', sorted(FAMILIES))
def test_every_family(kind, tiny):
    "Hidden states are those of the plain pass, or the family is named as one that decodes in its own way"
    model = random_model(kind).eval()
    why = why_plain_decoding(model)
    assert bool(why) == (_window(model) < math.inf or bool(odd_attention(model))), why
    if why: return
    model.generation_config.eos_token_id = None
    class Tok: pad_token_id, eos_token_id = 0, None; get_vocab = staticmethod(dict)
    own, plain = both(model, Tok, SHOTS)
    assert own == plain

@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('keys', [None, 'abcd'])
def test_tokens_are_those_of_generate(attention, keys):
    model, tok = load_model('tiny', attn=attention)
    own, plain = both(model, tok, SHOTS, 24, keys)
    ends = {tok.pad_token_id, tok.eos_token_id}
    cut = lambda r: r[:next((i for i, t in enumerate(r) if t in ends), len(r))]
    assert [cut(r) for r in own] == [cut(r) for r in plain] and model.config._attn_implementation == attention

def test_one_prompt_and_no_common_beginning(tiny):
    model, tok = tiny
    for prompts in ([[5, 6, 7]], [[5]], [[5, 6], [9, 6, 7]]):
        own, plain = both(model, tok, prompts)
        assert [a[:len(b)] for a, b in zip(own, plain)] == [b[:len(a)] for a, b in zip(own, plain)]
    assert common_beginning([[5, 6], [5, 6]]) == [5] and common_beginning([[5], [5, 6]]) == []

def test_work_is_counted(tiny):
    "The common beginning goes through the model once, and a row that is done not at all"
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(a[0].numel()))
    prompts = [[7]*40 + [20 + i] for i in range(10)]
    b = read_beginning(model, common_beginning(prompts))
    decode(model, prompts, b, lambda x: len(x) >= 2 and x[0] % 2 == 0 or len(x) == 6, 6)
    hook.remove()
    assert seen[0] == 40 and seen[1] == 10 and sum(seen) <= 40 + 10 + 5*10

def test_adapters(tiny):
    peft = pytest.importorskip('peft')
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['down_proj', 'q_proj'], init_lora_weights=False)).eval()
    assert decodes(model)
    plain = both(tiny[0], tok, SHOTS)[0]
    own, theirs = both(model, tok, SHOTS)
    assert own == theirs and own != plain

@pytest.mark.parametrize('mode', ['zero', 'scale'])
def test_ablation_scopes_reach_the_loop(tiny, mode):
    from test_trainer import some_neurons
    from yfpo.interventions import ablate, patch_from
    model, tok = copy.deepcopy(tiny[0]), tiny[1]
    qs, s = [p.question for p in make_problems(5, seed=2)], some_neurons(model, 40)
    run = lambda backend: generate(model, tok, qs, max_new_tokens=12, batch_size=3, progress=False, backend=backend)
    free = run('auto')
    with ablate(model, s, mode, alpha=5.):
        assert decodes(model)
        assert run('auto') == run('transformers') != free
    donor = load_model('tiny')[0]
    donor.model.layers[0].mlp.up_proj.weight.data *= 3
    with patch_from(model, donor, s):
        assert not decodes(model)                              # the donor's cache counts rows
        run('auto')
    assert decodes(model) and run('auto') == free

def test_trained_mode_is_left_as_it_was(tiny):
    model = copy.deepcopy(tiny[0]).train()
    assert decodes(model) and model.training

def test_a_stop_text_ends_a_response(tiny):
    model, tok = tiny
    prompts = [format_prompt(tok, p.question) for p in make_problems(6, seed=4)]
    long = {i: t for ix, rows in completions(model, tok, prompts, max_new_tokens=30) for i, t in zip(ix, rows)}
    stop = next(c for t in long.values() for c in t[0] if c.isascii() and c.isalnum())
    cut = {i: t for ix, rows in completions(model, tok, prompts, max_new_tokens=30, stop=[stop]) for i, t in zip(ix, rows)}
    for i, (text, n, finished, ids) in cut.items():
        assert stop not in text and text == long[i][0].split(stop)[0].strip() and len(ids) <= len(long[i][3])
        assert finished == (stop in long[i][0] or long[i][2])

def test_vllm_gets_what_was_asked(tiny, monkeypatch):
    "A stand-in with vLLM's documented interface: prompts, limits, ends and seeds arrive, texts come back in order"
    model, tok = tiny
    monkeypatch.setitem(sys.modules, 'vllm', None)
    with pytest.raises(ImportError, match=r"needs vllm: pip install 'yfpo\[vllm\]'"): list(completions(model, tok, ['a'], backend='vllm'))
    seen = {}
    class SamplingParams:
        def __init__(self, **kw): self.__dict__.update(kw)
    class LLM:
        def __init__(self, model, **kw): seen['weights'] = load_model(model)[0]
        def generate(self, prompts, params):
            seen['params'] = params
            out = plain_decode(seen['weights'], tok, [p['prompt_token_ids'] for p in prompts], params[0].max_tokens)
            One = lambda ids: types.SimpleNamespace(token_ids=ids, text=tok.decode(ids), finish_reason='length')
            return [types.SimpleNamespace(outputs=[One(o)]) for o in out]
    monkeypatch.setitem(sys.modules, 'vllm', types.SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))
    qs = [p.question for p in make_problems(3, seed=6)]
    made = generate(model, tok, qs, max_new_tokens=7, backend='vllm', stop=['Q:'], progress=False)
    assert [m['text'] for m in made] == [m['text'] for m in generate(model, tok, qs, max_new_tokens=7, progress=False)]
    p = seen['params'][0]
    assert p.max_tokens == 7 and p.temperature == 0 and p.stop == ['Q:'] and set(p.stop_token_ids) >= {tok.eos_token_id}
    generate(model, tok, qs, n=2, temperature=1., max_new_tokens=3, backend='vllm', progress=False)
    assert len({p.seed for p in seen['params']}) == 6

@pytest.mark.parametrize('kw,says', [(dict(backend='vlm'), "'vlm' is unknown"), (dict(batch_size=-1), 'batch_size is -1')])
def test_bad_input(tiny, kw, says):
    with pytest.raises(ValueError, match=says): list(completions(*tiny, ['a'], **kw))

@pytest.mark.parametrize('prompts, kw, says', [
    ('abc', {}, "the prompts are one text, 'abc'"), (None, {}, 'the prompts are None'), ([], {}, 'there are no prompts'),
    (['a', None], {}, 'the prompt 1 is None and no text'), (['a', 'x\ud800'], {}, 'the prompt 1 holds half of a surrogate pair'),
    (['a'], dict(batch_size='x'), "batch_size is 'x'"), (['a'], dict(batch_size=1.5), 'batch_size is 1.5'),
    (['a'], dict(temperature=True), 'temperature is True'), (['a'], dict(temperature=1.), 'keys are None: sampling needs a list'),
    (['a', 'b'], dict(temperature=1., keys=['k']), 'text for each of the 2 prompts')])
def test_what_nothing_can_be_written_to(tiny, prompts, kw, says):
    with pytest.raises(ValueError, match=says): list(completions(*tiny, prompts, **{**dict(max_new_tokens=1), **kw}))

def test_texts_and_tokens_that_a_model_cannot_read(tiny):
    tok = byte_tokenizer()
    tok.add_tokens(['####'])
    with pytest.raises(ValueError, match='a text has the token 259, and the model knows those below 259'):
        list(completions(tiny[0], tok, ['x ####'], max_new_tokens=1))
    for x in (None, 5, '\ud800'):
        with pytest.raises(ValueError, match='the text (is|holds)'): text_ids(tok, x)
    with pytest.raises(ValueError, match='pad_id is None'): left_padded([[5], [6, 7]], None)

def test_what_vllm_would_not_see_is_refused(tiny, monkeypatch):
    "An adapter is in the keys of a saved model, and an intervention in none"
    from peft import LoraConfig, get_peft_model
    from yfpo.interventions import ablate
    from yfpo.neurons import NeuronSet, model_signature
    monkeypatch.setitem(sys.modules, 'vllm', types.SimpleNamespace(LLM=None, SamplingParams=None))
    model, tok = load_model('tiny')
    s = NeuronSet(torch.tensor([0]), torch.tensor([3]), torch.ones(1), torch.ones(1), dict(model=model_signature(model)))
    with ablate(model, s), pytest.raises(ValueError, match='vLLM knows nothing of the intervention'):
        list(completions(model, tok, ['a'], backend='vllm'))
    adapted = get_peft_model(model, LoraConfig(target_modules=['q_proj'], task_type='CAUSAL_LM'))
    for m in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match='vLLM cannot read the adapter.*merge_and_unload'):
            list(completions(m, tok, ['a'], backend='vllm'))

def test_both_ways_ignore_what_a_model_says_about_generation():
    model, tok = load_model('tiny')
    def texts(backend): return [t for _, made in completions(model, tok, ['a', 'bcd'], max_new_tokens=9, backend=backend) for t in made]
    want = texts('auto')
    told = dict(num_beams=3, suppress_tokens=sorted({t for *_, ids in want for t in ids}), min_new_tokens=9, repetition_penalty=3.)
    for k, v in told.items(): setattr(model.generation_config, k, v)
    before = model.generation_config.to_dict()
    assert texts('auto') == texts('transformers') == want and model.generation_config.to_dict() == before
