"Our prompts, examples, stops, extractions and verdicts against lm-evaluation-harness itself, on local files."
import copy, os, random
from pathlib import Path
import pytest
from conftest import ROOT
from yfpo.data.sources import load_problems
from yfpo.data.templates import make_problems
from yfpo.data.files import write_jsonl
from yfpo.beyond.protocols import PROTOCOLS, cut_at, protocol, protocol_correct, protocol_extract, protocol_prompts, protocol_rows

lm_eval = pytest.importorskip('lm_eval')
DATA = os.environ.get('YFPO_DATA_DIR')

def sets():
    "(train, test) in GSM8K's form: the real one where it lies here, else our templates"
    if DATA: return load_problems('gsm8k/train', DATA)[:400], load_problems('gsm8k/test', DATA)[:60]
    return make_problems(80, seed=5), make_problems(40, seed=6)

@pytest.fixture(scope='module', params=list(PROTOCOLS))
def task(request, tmp_path_factory):
    "One of the harness's tasks on local files, its requests built as `simple_evaluate` builds them"
    from lm_eval.tasks import TaskManager
    folder, name, (train, test) = tmp_path_factory.mktemp('task'), request.param, sets()
    files = {k: write_jsonl(folder/f'{k}.jsonl', [dict(question=p.question, answer=p.solution) for p in ps])
             for k, ps in (('train', train), ('test', test))}
    own = next(Path(lm_eval.__file__).parent.glob(f'tasks/gsm8k/{name.replace("_", "-")}.yaml'))
    (folder/'task.yaml').write_text(f'include: {own}\ntask: {name}_here\ndataset_path: json\ndataset_name: null\n'
                                    f'dataset_kwargs: {{data_files: {{train: {files["train"]}, test: {files["test"]}}}}}\n')
    made = next(iter(TaskManager(include_path=str(folder), include_defaults=False).load([f'{name}_here'])['tasks'].values()))
    made.set_fewshot_seed(1234)
    made.build_all_requests(limit=None, rank=0, world_size=1)
    return name, made, train, test

def test_every_prompt_and_stop(task):
    name, theirs, train, test = task
    theirs_by_doc = {i.doc_id: i.args for i in theirs.instances}
    ours = protocol_prompts(name, test, train)
    assert len(theirs_by_doc) == len(ours)
    for i, text in enumerate(ours): assert theirs_by_doc[i][0] == text, i
    assert tuple(theirs_by_doc[0][1]['until']) == protocol(name).stop and not theirs_by_doc[0][1]['do_sample']

def answers(test, seed=0):
    "Answers that are right, wrong, or trouble, one for each question"
    g, out = random.Random(seed), []
    for p in test:
        n = p.answer
        out.append(g.choice([
            p.solution, f'The answer is {n}.', f'The answer is {n} dollars.', f'the answer is {n}', f'#### {n}', f'#### {n}.', f'####{n}',
            f'{n}...', f'So ${n}.00', f'#### ${n}', f'The answer is ${n}.', f'It is {n} and then #### 3\n#### {n}', 'no number', '', '...',
            '-', f'-{n}', f'#### -{n}', f'{n},000', f'#### {n},', f'The answer is {n}.5.', f'The answer is {n}\n', f'Question: what? {n}',
            f'= {n} eggs.\n\nSo 7, {n}', '$', '#### ']))
    return out

@pytest.mark.parametrize('seed', range(6))
def test_every_verdict_on_the_same_answers(task, seed):
    name, theirs, _, test = task
    said = answers(test, seed)
    for i in theirs.instances: i.resps, i.filtered_resps = [said[i.doc_id]], {}
    theirs.apply_filters()
    for i in theirs.instances:
        got, text = i.filtered_resps, said[i.doc_id]
        ours, mine = protocol_extract(name, text), protocol_correct(name, text, test[i.doc_id].solution)
        for key, rule in (('strict-match', 'strict'), ('flexible-extract', 'flexible')):
            assert got[key] == ours[rule], (said[i.doc_id], rule)
            verdict = theirs.process_results(i.doc, [got[key]])['exact_match']
            assert bool(verdict) == mine[rule], (said[i.doc_id], got[key], test[i.doc_id].answer)

def with_bos(tok):
    "The same tokenizer, giving every text a token at its beginning, as Llama's, Mistral's and Gemma's do"
    from tokenizers.processors import TemplateProcessing
    tok = copy.deepcopy(tok)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=f'{tok.bos_token} $A',
                                                              special_tokens=[(tok.bos_token, tok.bos_token_id)])
    return tok

@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('which', ['tiny', 'embedded'])
def test_token_ids_are_the_harness_s(bos, which, tiny):
    "Token by token, of plain texts and of chats, with a tokenizer that begins a text and with one that does not"
    from lm_eval.models.huggingface import HFLM
    from yfpo.lm.decoding import text_ids
    from yfpo.lm.models import load_model
    from yfpo.lm.responses import encode
    model, tok = tiny if which == 'tiny' else load_model()
    if bos: tok = with_bos(tok)
    lm = HFLM(pretrained=model, tokenizer=tok, batch_size=1, max_length=512)
    chat = tok.apply_chat_template([dict(role='user', content='2+2?')], tokenize=False, add_generation_prompt=True)
    for text in (protocol_prompts('gsm8k_cot', make_problems(1, seed=1))[0], 'Q: 2+2?', ' ', 'é½ 12', '', f'{tok.bos_token}already', chat):
        assert text_ids(tok, text) == lm.tok_encode(text), text
    assert text_ids(tok, chat) == tok.apply_chat_template([dict(role='user', content='2+2?')], return_dict=False,
                                                          add_generation_prompt=True)
    for context, answer in (('Question: 2+2?\nAnswer:', ' 4'), ('12', '34 and more')):
        e, (a, b) = encode(tok, [(context, answer)])[0], (lm.tok_encode(context), tok(answer, add_special_tokens=False).input_ids)
        assert e.ids == a + b and e.start == len(a)
    assert encode(tok, ['2+2=4'])[0].ids == lm.tok_encode('2+2=4') and encode(tok, ['2+2=4'])[0].start == 1

@pytest.mark.parametrize('bos', [False, True])
def test_a_model_through_both(task, tiny, bos):
    "The same model and questions through the harness's own loop: the same answers, the same score"
    from lm_eval.models.huggingface import HFLM
    name, theirs, train, test = task
    model, tok = tiny[0], with_bos(tiny[1]) if bos else tiny[1]
    requests = [i for i in theirs.instances if i.doc_id < 6]
    for i in requests: i.args[1]['max_gen_toks'] = 6
    lm = HFLM(pretrained=model, tokenizer=tok, batch_size=3, max_length=8192)
    ours = protocol_rows(model, tok, name, test[:6], train, max_new_tokens=6, batch_size=3)
    for i, text in zip(requests, lm.generate_until(requests, disable_tqdm=True)):
        assert text.strip() == ours[i.doc_id]['text'], i.doc_id

def test_the_harness_on_a_saved_model(tiny, tmp_path):
    "`harness_scores` on local files: the harness's own run of a saved model, our answers to the letter, our scores"
    from yfpo.beyond.protocols import harness_scores
    model, tok = tiny
    model.save_pretrained(tmp_path/'model'); tok.save_pretrained(tmp_path/'model')
    train, test = sets()
    for k, ps in (('train', train), ('test', test)):
        write_jsonl(tmp_path/'gsm8k'/f'{k}.jsonl', [dict(question=p.question, answer=p.solution) for p in ps])
    got = harness_scores(tmp_path/'model', ('gsm8k_cot', 'gsm8k_cot_zeroshot'), limit=5, batch_size=5, data_dir=tmp_path, max_new_tokens=8,
                         max_length=8192)
    for name, scores in got.items():
        ours = protocol_rows(model, tok, name, test[:5], train, max_new_tokens=8, batch_size=5)
        assert [a.strip() for a in scores['answers']] == [r['text'] for r in ours], name
        for key, rule in (('strict-match', 'strict'), ('flexible-extract', 'flexible')):
            assert scores[f'exact_match,{key}'] == sum(r[f'correct_{rule}'] for r in ours)/5
    with pytest.raises(FileNotFoundError, match='data_dir must hold'): harness_scores(tmp_path/'model', data_dir=tmp_path/'nothing')

def test_cutting_and_bad_input():
    assert cut_at('abc Q: d', ('Q:', '</s>')) == 'abc ' and cut_at('abc', ('Q:',)) == 'abc'
    with pytest.raises(ValueError, match='unknown'): protocol('gsm9k')
    with pytest.raises(ValueError, match='give train='): protocol_prompts('gsm8k', make_problems(1), make_problems(3))
    with pytest.raises(ValueError, match='no questions'): protocol_rows(None, None, 'gsm8k', [])
