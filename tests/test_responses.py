"Prompt, log-probabilities and decoding against slow formulations."
import pytest, torch
from yfpo.lm.sampling import stop_texts
from yfpo.lm.models import byte_tokenizer, load_model
from yfpo.lm.packing import shared_logprobs
from yfpo.data.templates import make_problems
from yfpo.relevance import attribute
from yfpo.data.files import read_jsonl
from yfpo.interventions import ablate
from yfpo.neurons import NeuronSet, model_signature
from yfpo.lm.decoding import stop_ids, text_ids, turn_end
from yfpo.lm.responses import Example, collate, encode, example_logprobs, format_prompt, generate, response_logprobs, written
from yfpo.data.problems import INSTRUCTION

def slow_logprobs(model, tokenizer, prompt, response):
    ids = tokenizer(prompt).input_ids + tokenizer(response).input_ids
    z = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), -1)
    return torch.tensor([z[i-1, ids[i]] for i in range(len(tokenizer(prompt).input_ids), len(ids))])

def test_logprobs_one_token_at_a_time(tiny):
    model, tok = tiny
    items = [(format_prompt(tok, p.question), p.solution) for p in make_problems(5, seed=3)]
    for fast, (p, r) in zip(response_logprobs(model, tok, items, eos=False), items):
        assert torch.allclose(fast.double(), slow_logprobs(model, tok, p, r), atol=1e-5)

def test_chat_items_equal_strings(tiny):
    _, tok = tiny
    chat = dict(prompt=[dict(role='user', content=f'Two?\n\n{INSTRUCTION}')], completion=[dict(role='assistant', content='2')])
    assert encode(tok, [chat]) == encode(tok, [(format_prompt(tok, 'Two?'), '2')])

def test_greedy_is_argmax(tiny):
    model, tok = tiny
    ids = tok(format_prompt(tok, 'How many?'), return_tensors='pt').input_ids
    n = ids.shape[1]
    for _ in range(10): ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    row = generate(model, tok, ['How many?', 'How many apples are there in the three large baskets?'], max_new_tokens=10, progress=False)[0]
    assert row['text'] == tok.decode(ids[0, n:], skip_special_tokens=True).strip()

def test_generation_ignores_padding_noise(tiny):
    model, tok = tiny
    qs = [p.question for p in make_problems(7, seed=1)]
    a = generate(model, tok, qs, n=2, temperature=1., max_new_tokens=10, seed=1, batch_size=3, progress=False)
    assert a == generate(model, tok, qs, n=2, temperature=1., max_new_tokens=10, seed=1, batch_size=14, progress=False)
    assert a != generate(model, tok, qs, n=2, temperature=1., max_new_tokens=10, seed=2, batch_size=14, progress=False)

def test_resume_refuses_another_model(tiny, tmp_path):
    model, tok = tiny
    generate(model, tok, ['a'], max_new_tokens=2, path=tmp_path/'r.jsonl', progress=False)
    other = load_model('tiny')[0]
    other.model.norm.weight.data += 1
    with pytest.raises(ValueError, match='another model'):
        generate(other, tok, ['a'], max_new_tokens=2, path=tmp_path/'r.jsonl', progress=False)

def test_a_file_knows_a_model_by_every_weight(tiny, tmp_path):
    "The weights that change lie apart from every n-th one, in the columns of a down-projection"
    model, tok = tiny
    generate(model, tok, ['a'], max_new_tokens=2, path=tmp_path/'r.jsonl', progress=False)
    other = load_model('tiny')[0]
    for b in other.model.layers: b.mlp.down_proj.weight.data[:, 1:] += 1
    with pytest.raises(ValueError, match='another model'):
        generate(other, tok, ['a'], max_new_tokens=2, path=tmp_path/'r.jsonl', progress=False)

@pytest.mark.parametrize('call,says', [
    (lambda m, t: generate(m, t, [], progress=False), 'no problems'), (lambda m, t: encode(t, ['x']), 'is one token, .* at least two'),
    (lambda m, t: collate([], 0), 'empty'), (lambda m, t: collate([Example([1, 2], 1)], 0, side='LEFT'), "side is 'LEFT'"),
    (lambda m, t: collate([Example([1, 2], 1), Example([3, 4], 0)], 0), 'response of example 1 starts at token 0'),
    (lambda m, t: encode(t, [('p'*50, 'r')], max_length=20), 'no response token')])
def test_bad_input(call, says, tiny):
    with pytest.raises(ValueError, match=says): call(*tiny)

def test_the_embedded_model_answers():
    model, tok = load_model()
    row = generate(model, tok, ['What is 2 + 2?'], max_new_tokens=24, progress=False)[0]
    assert '4' in row['text'] and tok.pad_token_id != tok.eos_token_id and model.config.num_hidden_layers == 30

@pytest.mark.parametrize('how,says', [(dict(temperature=-1.), 'temperature is -1'), (dict(temperature=float('nan')), 'temperature is nan'),
    (dict(temperature=float('inf')), 'temperature is inf'), (dict(top_p=0), 'top_p is 0'), (dict(top_p=1.5), 'top_p is 1.5'),
    (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(backend='x'), "backend 'x' is unknown")])
def test_settings_that_nothing_can_be_drawn_with(how, says, tmp_path):
    "Refused also where a file already holds every answer"
    model, tok = load_model('tiny')
    generate(model, tok, ['2+2?'], max_new_tokens=2, path=tmp_path/'r.jsonl', progress=False)
    with pytest.raises(ValueError, match=says):
        generate(model, tok, ['2+2?'], path=tmp_path/'r.jsonl', progress=False, **{**dict(max_new_tokens=2), **how})

@pytest.mark.parametrize('call,says', [
    (lambda m, t: generate(m, t, '2+2'), "the problems are one text, '2\\+2'"), (lambda m, t: generate(m, t, [None]), 'problem 0 is None'),
    (lambda m, t: generate(m, t, ['a'], n=0), 'n is 0'), (lambda m, t: generate(m, t, ['a'], stop=['']), 'stop is'),
    (lambda m, t: generate(m, t, ['a'], temperature='x'), "temperature is 'x'"),
    (lambda m, t: encode(t, ['a b'], max_length=-1), 'max_length is -1'),
    (lambda m, t: encode(t, [('p', [dict(role='assistant', content='4'), dict(role='user', content='thanks')])]), 'has 2 messages'),
    (lambda m, t: encode(t, [('p', [dict(role='user', content='thanks')])]), 'message of the user')])
def test_what_would_be_read_as_something_else_is_refused(call, says, tiny):
    with pytest.raises(ValueError, match=says): call(*tiny)

def test_one_stop_text_is_one_end(): assert stop_texts('QQW') == ('QQW',) and stop_texts(['a', 'b']) == ('a', 'b')

@pytest.mark.parametrize('was', [b'my precious notes', b'{"a": 1}', b'{broken\n', b'[1]\n', b'null\n', b'\0\n', b'\xe9\n',
                                 b'['*100_000 + b'\n', b'{"id": "0", "sample": 0, "run": "x", "prompt": "y"}\n'])
@pytest.mark.parametrize('restart', [False, True])
def test_a_file_of_something_else_is_kept(was, restart, tiny, tmp_path):
    (tmp_path/'r').write_bytes(was)
    with pytest.raises(ValueError, match='mend or remove') as e:
        generate(*tiny, ['x y'], max_new_tokens=2, path=tmp_path/'r', restart=restart, progress=False)
    assert '\n' not in str(e.value) and (tmp_path/'r').read_bytes() == was

NO_TEXT = '\ud800'
@pytest.mark.parametrize('item, says', [
    (NO_TEXT + 'xy', 'item 0 holds half of a surrogate pair'), ((NO_TEXT, 'x'), 'has a prompt that holds half'),
    (('x', NO_TEXT), 'has a completion that holds half'), (([dict(role='user', content=NO_TEXT)], 'x'), 'has a prompt that holds half'),
    (([dict(content='a')], 'x'), 'a message without a role'), (([dict(role=5, content='a')], 'x'), 'a message without a role'),
    (None, 'item 0 is None'), ('a', 'item 0 is one token, .a., which nothing predicts: give at least two')])
def test_an_item_that_cannot_be_scored(item, says, tiny):
    with pytest.raises(ValueError, match=says): response_logprobs(*tiny, [item])

@pytest.mark.parametrize('call, says', [
    (lambda m, t: response_logprobs(m, t, None), 'the items are None: give a list'), (lambda m, t: encode(t, 'abc'), "are one text, 'abc'"),
    (lambda m, t: response_logprobs(load_model('tiny'), t, ['ab']), 'the model is a tuple and no model that writes text'),
    (lambda m, t: response_logprobs(m, None, ['ab']), 'the tokenizer is a NoneType'),
    (lambda m, t: generate(None, t, ['x']), 'model is a NoneType'),
    (lambda m, t: generate(m, None, ['x']), 'the tokenizer is a NoneType'),
    (lambda m, t: generate(m, t, [NO_TEXT]), "question of problem '0' holds"),
    (lambda m, t: generate(m, t, ['x'], template='x'), "template is 'x': give a function"),
    (lambda m, t: generate(m, t, ['x'], template=lambda q: 5), "prompt of question '0' is 5 and no text"),
    (lambda m, t: generate(m, t, ['x'], stop=5), 'stop is 5'), (lambda m, t: generate(m, t, ['x'], stop=[5]), r'stop is \[5\]'),
    (lambda m, t: generate(m, t, ['x'], batch_size='x'), "batch_size is 'x'"),
    (lambda m, t: generate(m, t, ['x'], max_new_tokens=1.5), 'max_new_tokens is 1.5'),
    (lambda m, t: response_logprobs(m, t, ['ab'], batch_size='x'), "batch_size is 'x'"),
    (lambda m, t: response_logprobs(m, t, ['ab'], batch_size=1.5), 'batch_size is 1.5'),
    (lambda m, t: format_prompt(t, None), 'question is None')])
def test_what_is_given_to_a_model_is_checked(call, says, tiny):
    with pytest.raises(ValueError, match=says) as e: call(*tiny)
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('path, says', [(5, '5 is no path'), (b'x', "b'x' is no path"), ({}, '{} is no path'),
    ('~nosuchuser/x', 'names a user'),
                                        ('/tmp', '/tmp is a folder'), ('/proc/x', '/proc/x cannot be written'), ('x'*300, 'too long')])
def test_a_path_that_takes_no_responses(path, says, tiny):
    with pytest.raises((ValueError, OSError), match=says): generate(*tiny, ['x'], max_new_tokens=1, path=path, progress=False)

@pytest.mark.parametrize('template, says', [(None, 'has None as its chat_template'), ('', "has '' as its chat_template"),
    (5, 'has 5 as its'),
    ("{{ raise_exception('no roles') }}", 'cannot write .*no roles'), ('{% for', 'cannot write .*unexpected'),
    ('{{ 1/0 }}', 'ZeroDivisionError'),
    ('{{ messages[9].content }}', 'has no element 9'), ('{{ nosuch() }}', "'nosuch' is undefined")])
def test_a_chat_template_that_writes_nothing(template, says, tiny):
    tok = byte_tokenizer()
    tok.chat_template = template
    with pytest.raises(ValueError, match=says): generate(tiny[0], tok, ['x'], max_new_tokens=1, progress=False)
    with pytest.raises(ValueError, match=says): encode(tok, [([dict(role='user', content='a')], 'x')])

def test_tokens_that_the_model_does_not_have(tiny):
    tok, model = byte_tokenizer(), tiny[0]
    tok.add_tokens(['####'])
    ex, pad = encode(tok, ['#### ab', 'abc']), tok.pad_token_id
    for read in (example_logprobs, shared_logprobs, attribute):
        with pytest.raises(ValueError, match='a text has the token 259, and the model knows those below 259'): read(model, ex, pad)

def test_a_tokenizer_without_an_end_or_padding(tiny):
    tok = byte_tokenizer()
    tok.eos_token = tok.pad_token = None
    with pytest.raises(ValueError, match='no eos_token to put after a response'): encode(tok, ['ab'], eos=True)
    with pytest.raises(ValueError, match='pad_id is None'): response_logprobs(tiny[0], tok, ['ab', 'abc'], eos=False)

def spaced_tokenizer(scheme):
    "One token a character, with the mark of SentencePiece before a text: 'legacy' is Llama 2's, the others are schemes of `Metaspace`"
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ['<unk>', '<s>', '</s>']
    vocab = {t: i for i, t in enumerate(special + sorted({*map(chr, range(33, 127)), '▁', '\n'}))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token='<unk>'))
    if scheme == 'legacy': tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    else: tok.pre_tokenizer = pre_tokenizers.Metaspace('▁', prepend_scheme=scheme)
    tok.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>', pad_token='</s>', unk_token='<unk>')

@pytest.mark.parametrize('scheme', ['legacy', 'first', 'always', 'never'])
def test_a_response_gets_no_space_that_stands_in_no_text(scheme):
    tok = spaced_tokenizer(scheme)
    def read(p, r): return tok.convert_ids_to_tokens((e := encode(tok, [(p, r)])[0]).ids[e.start:])
    assert read('Answer:', '4') == ['4'] and read('Answer:', ' 4') == ['▁', '4']
    for p, r in (('a', 'b c'), ('a\n', 'b'), ('a ', 'b'), ('a</s>', 'b')):
        e, both = encode(tok, [(p, r)])[0], tok(p + r, add_special_tokens=False).input_ids
        assert e.ids == both or scheme == 'never' and e.ids[e.start:] == tok(r, add_special_tokens=False).input_ids

@pytest.mark.parametrize('scheme', ['legacy', 'first', 'always'])
def test_a_response_behind_a_first_token_and_a_prompt(scheme):
    "Llama 2 adds its first token to every text; prompt and response have it once"
    from tokenizers.processors import TemplateProcessing
    tok = spaced_tokenizer(scheme)
    tok._tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    e, = encode(tok, [('Answer:', '4 eggs')])
    assert e.ids == tok('Answer:4 eggs').input_ids and e.ids.count(1) == 1 and e.start == len(tok('Answer:').input_ids)

@pytest.mark.parametrize('before', ['', ' '])
@pytest.mark.parametrize('scheme', ['legacy', 'first', 'always'])
def test_an_answer_has_the_tokens_that_a_trainer_reads(scheme, before):
    "Llama 2's template puts a space before the answer, Zephyr's does not"
    tok = spaced_tokenizer(scheme)
    tok.chat_template = ("{% for m in messages %}{{ '[I]' + m['content'] + '[/I]' if m['role'] == 'user' else '" + before +
                         "' + m['content'] + ' ' + eos_token }}{% endfor %}")
    prompt, head = (q := [dict(role='user', content='2+2?')]), tok.apply_chat_template(q)['input_ids']
    for text in ('4 and more', 's', '/', '4\n', ' 4'):
        answer = [dict(role='assistant', content=text)]
        whole = tok.apply_chat_template(prompt + answer)['input_ids']
        for item in (dict(prompt=prompt, completion=answer), (written(tok, prompt), text)):
            e, = encode(tok, [item])
            assert e.ids == whole[:-2] and e.start == len(head)

@pytest.mark.parametrize('change, answer, said', [("m['content'] | trim", ' 4\n', '4'), ("m['content'] | upper", 'four', 'four')])
def test_an_answer_that_the_template_changes(change, answer, said):
    "White space at its ends is the template's business, its words are not"
    tok = spaced_tokenizer('legacy')
    tok.chat_template = "{% for m in messages %}{{ '[I]' + m['content'] + '[/I]' if m['role'] == 'user' else " + change + " }}{% endfor %}"
    e, = encode(tok, [dict(prompt=[dict(role='user', content='a')], completion=[dict(role='assistant', content=answer)])])
    assert tok.convert_ids_to_tokens(e.ids[e.start:]) == [*said]

def test_byte_level_tokens_stay_as_they_are():
    "Prompt and response one by one, as merges that cross the boundary would change them"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([p.question + '\n' + p.solution for p in make_problems(40, seed=1)],
                             BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=['<e>'],
                                        show_progress=False))
    merged = PreTrainedTokenizerFast(tokenizer_object=made, eos_token='<e>', pad_token='<e>')
    for tok in (merged, byte_tokenizer()):
        ids = lambda text: tok(text, add_special_tokens=False).input_ids
        for p in ('2+2=', ' 2+2= ', 'How many\n', '\nTom has 1', 'How m'):
            for r in ('4', ' 4 apples', '\nTherefore', '2 eggs ', 'any\n'):
                e, = encode(tok, [(p, r)], eos=True)
                assert e.ids == ids(p) + ids(r) + [tok.eos_token_id] and e.start == len(ids(p))
    assert merged('How many').input_ids != merged('How m').input_ids + merged('any').input_ids       # so the test can fail

def test_a_chat_gets_no_first_token_that_its_template_leaves_out():
    from tokenizers.processors import TemplateProcessing
    tok = byte_tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<|endoftext|> $A', special_tokens=[('<|endoftext|>', 0)])
    tok.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    asked = [dict(role='user', content=f'Two?\n\n{INSTRUCTION}')]
    theirs = tok.apply_chat_template(asked)['input_ids']
    for item in (dict(prompt=asked, completion=[dict(role='assistant', content='2')]), (format_prompt(tok, 'Two?'), '2')):
        e, = encode(tok, [item])
        assert e.ids[:e.start] == theirs
    assert text_ids(tok, format_prompt(tok, 'Two?')) == theirs and text_ids(tok, 'Two?')[0] == 0

def test_a_response_ends_as_its_chat_template_ends_a_turn(tiny):
    "Gemma and Phi end a turn otherwise than a text"
    tok = byte_tokenizer()
    tok.eos_token = '<|endoftext|>'
    chat, end = dict(prompt=[dict(role='user', content='Two?')], completion=[dict(role='assistant', content='2')]), 2
    asked = (written(tok, chat['prompt']), '2')
    whole = tok.apply_chat_template(chat['prompt'] + chat['completion'])['input_ids']
    for item in (chat, asked): assert (e := encode(tok, [item], eos=True)[0]).ids == whole[:len(e.ids)] and e.ids[-1] == end
    assert encode(tok, [('Two?', '2')], eos=True)[0].ids[-1] == 0 and end in stop_ids(tiny[0], tok)
    tok.chat_template = None
    assert turn_end(tok) == 0

def test_a_file_without_token_ids_is_no_file_with_them(tiny, tmp_path):
    how = dict(max_new_tokens=3, progress=False)
    want = generate(*tiny, ['a', 'b'], ids=True, **how)
    generate(*tiny, ['a'], path=tmp_path/'r.jsonl', **how)
    assert generate(*tiny, ['a', 'b'], path=tmp_path/'r.jsonl', ids=True, **how) == want
    assert len(read_jsonl(tmp_path/'r.jsonl')) == 2 and generate(*tiny, ['a', 'b'], path=tmp_path/'r.jsonl', ids=True, **how) == want

def test_a_file_notes_no_intervention(tiny, tmp_path):
    model, tok = tiny
    s = NeuronSet(torch.tensor([0]), torch.tensor([3]), torch.ones(1), torch.ones(1), dict(model=model_signature(model)))
    with ablate(model, s):
        with pytest.raises(ValueError, match='an intervention is on, which .*r.jsonl would not note: leave path out'):
            generate(model, tok, ['a'], path=tmp_path/'r.jsonl', max_new_tokens=2, progress=False)
        generate(model, tok, ['a'], max_new_tokens=2, progress=False)
    generate(model, tok, ['a'], path=tmp_path/'r.jsonl', max_new_tokens=2, progress=False)
