"Pairs: what is refused, corruptions read by an independent oracle, hygiene, files, the data card"
import json, os, re, statistics
from collections import Counter
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from yfpo.data.problems import Problem
from yfpo.data.sources import load_gsm8k
from yfpo.data.templates import make_problems
from yfpo.data.answers import calc, extract_strict, is_correct, to_number
from yfpo.data.pairs import (ERRORS, balance_lengths, check_no_test_overlap, clean_response, corrupt, filter_pairs, is_degenerate,
                        load_pairs, make_pair, pair_card,
                        pairs_from_corruption, pairs_from_samples, read_chain, refuse_test_solutions, response_text, save_pairs,
                        seeded_order, words_difference)

DATA = Path(os.environ.get('YFPO_DATA_DIR') or Path(__file__).resolve().parents[2]/'shared'/'data')
real = pytest.mark.skipif(not (DATA/'gsm8k'/'train.jsonl').is_file(),
                          reason=f'no GSM8K in {DATA}; set YFPO_DATA_DIR to a folder with gsm8k/ and svamp/')
P = Problem('q-0', 'Ada has 3 pens and buys 4 more. How many pens does she have?', 'She has 3 + 4 = <<3+4=7>>7 pens.\n#### 7', '7', 'demo')
RIGHT,WRONG = 'She has 3 + 4 = 7 pens.\n#### 7','She has 3 + 4 = 8 pens.\n#### 8'

@pytest.mark.parametrize('chosen,rejected,message', [
    (RIGHT, 'Seven.\n#### 7.00', 'both answers are right'), (WRONG, 'Nine.\n#### 9', 'both answers are wrong'),
    (WRONG, RIGHT, 'the rejected answer is the right one'),
    (RIGHT, RIGHT.upper(), 'both responses are the same'), (RIGHT, ' ', 'a response is empty'),
    (RIGHT, 'I do not know', 'a response has no answer'),
    (RIGHT, 'She has 8 pens.', 'only one response ends in ####'), (RIGHT, 'so 8\n'*4 + '#### 8', 'repeats itself')])
def test_refused(chosen, rejected, message):
    with pytest.raises(ValueError, match=f'q-0: .*{message}'): make_pair(P, chosen, rejected)

def test_make_pair():
    r = make_pair(P, P.solution, WRONG, error='slip', step=0)
    assert r['prompt'][0]['role'] == 'user' and P.question in r['prompt'][0]['content']
    assert r['chosen'] == [dict(role='assistant', content=RIGHT)] and r['rejected'] == [dict(role='assistant', content=WRONG)]
    assert (r['id'], r['question_id'], r['error'], r['source'], r['answer_chosen'], r['answer_rejected'],
            r['step']) == ('q-0-slip', 'q-0', 'slip', 'demo', '7', '8', 0)
    assert '<<3+4=7>>' in make_pair(P, P.solution, WRONG, keep_annotations=True)['chosen'][0]['content']

def test_samples():
    texts = [RIGHT, WRONG, WRONG, 'She has 9.\n#### 9', 'She has 10.\n#### 10', 'no idea', 'She']
    rows = [dict(id='q-0', sample=i, text=t, finished=i < 6) for i,t in enumerate(texts)]
    pairs,counts = pairs_from_samples([P], rows, seed=0)
    assert len(pairs) == 2 and len({r['id'] for r in pairs}) == 2 and pairs == pairs_from_samples([P], rows, seed=0)[0]
    assert counts['truncated response'] == 1 and counts['response without an answer'] == 1 and counts['over the cap per question'] == 1
    assert pairs_from_samples([P], rows[1:2]) == ([], {'responses': 1, 'questions': 1, 'question without both kinds': 1})
    rows_, counts = pairs_from_samples([P], rows[1:2], gold_chosen=True)
    assert len(rows_) == 1 and counts['question whose gold solution stands in'] == 1 and rows_[0]['error'] == 'sampled against gold'
    assert {r['error'] for r in pairs} == {'sampled'}, 'so the data card counts both kinds'
    assert 'question whose gold solution stands in' not in pairs_from_samples([P], rows, gold_chosen=True)[1]
    with pytest.raises(ValueError, match='not among the problems'): pairs_from_samples([P], [dict(id='other', text=RIGHT)])

def test_hygiene():
    r = make_pair(P, RIGHT, WRONG)
    others = [make_pair(P, RIGHT, f'She has {i}.\n#### {i}') for i in (9, 10)]
    kept,dropped = filter_pairs([r, r, *others], cap=2)
    assert len(kept) == 2 and dropped == {'repeated text': 1, 'over the cap per question': 1}
    assert is_degenerate('a b '*30) and is_degenerate('') and not is_degenerate(RIGHT)

def test_balance_lengths():
    pairs,_ = pairs_from_corruption(make_problems(300, seed=0), seed=0)
    matched = balance_lengths(pairs, seed=1, buckets=3)
    assert abs(statistics.mean(map(words_difference, matched))) <= 0.25 < abs(statistics.mean(map(words_difference, pairs)))
    assert matched == balance_lengths(pairs, seed=1, buckets=3) and balance_lengths([]) == []
    a,b = (make_pair(P, f'It is{" very"*n} clear.\n#### 7', 'It is clear.\n#### 8') for n in (3, 2))
    assert balance_lengths([a, dict(b, chosen=b['rejected'], rejected=b['chosen'])], buckets=1) == []       # no part of them is balanced

def test_one_pair_less_moves_no_other():
    "Samples differ by a rounding from one processor to the next; the training set must not be another one for that"
    pairs,_ = pairs_from_corruption(make_problems(60, seed=0), seed=0)
    order = seeded_order(pairs, 'train-0')
    ids = lambda rs: [r['id'] for r in rs]
    assert ids(order) != ids(pairs) and ids(seeded_order(pairs[::-1], 'train-0')) == ids(order)
    assert ids(seeded_order(pairs, 'train-1')) != ids(order)
    for gone in (0, 17, len(pairs)-1):
        assert ids(seeded_order(pairs[:gone] + pairs[gone+1:], 'train-0')) == [i for i in ids(order) if i != pairs[gone]['id']]

def visible_equations(text):
    "Every `a op b (op c) = d` in plain sight, as (left, right)"
    return re.findall(r'(?<![\d.*/+\-(])((?:\$?[\d,.]+\s*[-+*/]\s*)+\$?[\d,.]*\d)\s*=\s*\$?([\d,]*\.?\d+)', text)

def false_equations(text):
    clean = lambda s: re.sub(r'[$,]', '', s)
    return [(a, b) for a,b in visible_equations(text) if abs(calc(clean(a)) - to_number(b)) > 0.01]

@pytest.mark.parametrize('error', ERRORS)
def test_corruptions_are_consistent(error):
    made = 0
    for p in make_problems(150, seed=3):
        found = corrupt(p, error, seed=0)
        if not found: continue
        text,meta = found
        made += 1
        assert found == corrupt(p, error, seed=0) and not is_correct(text, p.answer)
        if '(' not in text:   # the naive reader knows no brackets
            assert len(false_equations(clean_response(text))) == (error == 'slip'), (p.solution, text)
        lines,gold = clean_response(text).split('\n'),clean_response(p.solution).split('\n')
        assert len(lines) == len(gold) - (error == 'dropped step')
        if error == 'wrong copy': assert lines[:-1] == gold[:-1]
        else:
            assert lines[:meta['step']] == gold[:meta['step']]
            assert re.search(r'= \$?([\d.,]+)', lines[-2])[1].rstrip('.') == extract_strict(text)
    assert made > 20

def test_propagation():
    solution = ('He makes 1,000 * 3 = $<<1000*3=3000>>3,000 a month.\nA year brings 3,000 x 12 = $<<3000*12=36000>>36,000.\n'
                'With the bonus that is 36,000 + 500.50 = $<<36000+500.50=36500.50>>36,500.50.\n#### 36,500.50')
    p = Problem('q', 'He is paid 1,000 dollars for each of three jobs a month, and a bonus of 500.50. How much a year?', solution,
                '36500.5', 'demo')
    chain = read_chain(solution)
    assert [n.link for n in chain.nums] == [None, None, 0, 0, None, 1, 1, None, 2, 2]
    seen = {corrupt(p, 'slip', seed=s)[0] for s in range(40)}
    wrong = next(t for t in seen if '= $<<1000*3=3010>>' in t)
    want = solution
    for a, b in (('=3000>>3,000', '=3010>>3,010'), ('3,000 x', '3,010 x'), ('<<3000*12=36000>>36,000', '<<3010*12=36120>>36,120'),
                 ('36,000 + 500.50 = $<<36000+500.50=36500.50>>36,500.50', '36,120 + 500.50 = $<<36120+500.50=36620.50>>36,620.50'),
                 ('#### 36,500.50', '#### 36,620.50')): want = want.replace(a, b)
    assert wrong == want

def test_no_chain():
    for s in ('It is 7.\n#### 7', '3+4=<<3+4=7>>7\n#### 8', '4-7=<<4-7=-3>>-3\n-3+5=<<-3+5=2>>2\n#### 2', '<<x>>\n#### 2'):
        assert read_chain(s) is None
    pairs,counts = pairs_from_corruption([Problem('q', 'How many?', 'It is 7.\n#### 7', '7', 'demo')])
    assert pairs == [] and counts == {'questions': 1, 'question without a consistent mistake': 1}
    with pytest.raises(ValueError, match="'typo' is unknown; use one of slip"): corrupt(P, 'typo')
    with pytest.raises(ValueError, match='per_question is 3'): pairs_from_corruption([P], per_question=3)

def test_balance():
    pairs,_ = pairs_from_corruption(make_problems(500, seed=0), seed=0)
    n = Counter(r['error'] for r in pairs)
    assert set(n) == set(ERRORS) and max(n.values()) - min(n.values()) <= 25
    assert len({r['question_id'] for r in pairs}) == len(pairs) == len({r['id'] for r in pairs})
    assert all('<<' not in response_text(r[k]) for r in pairs for k in ('chosen', 'rejected'))

def test_leakage(tmp_path):
    with pytest.raises(ValueError, match='leakage'): refuse_test_solutions('x/example_model_solutions.jsonl')
    with pytest.raises(ValueError, match='leakage'): load_pairs(tmp_path/'example_model_solutions.jsonl')
    test = Problem('t', P.question.replace('3', '30'), P.solution, '7', 'gsm8k/test')
    with pytest.raises(ValueError, match='test problem'): pairs_from_corruption([test])
    with pytest.raises(ValueError, match='1 of 1 questions are test questions'): pairs_from_samples([P], [], test_problems=[test])
    assert pairs_from_corruption([test], evaluation=True)[1]['questions'] == 1
    path = save_pairs(tmp_path/'p.jsonl', [dict(prompt=P.question, chosen=RIGHT, rejected=WRONG)])
    with pytest.raises(ValueError, match='leakage'): load_pairs(path, test_problems=[test])
    pair = make_pair(P, RIGHT, WRONG)
    del pair['question']
    with pytest.raises(ValueError, match='leakage'): check_no_test_overlap([pair], [test])

def written(path, rows):
    "A file of rows in ASCII, where half a character can be spelt"
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return path

@pytest.mark.parametrize('row,message', [
    (dict(prompt='2+2?', chosen='4'), 'no column rejected'), (dict(prompt='2+2?'), 'no column chosen or rejected'),
    (dict(prompt='2+2?', chosen='4', rejected='4'), 'chosen and rejected are equal'),
    (dict(prompt='2+2?', chosen='', rejected='4'), 'chosen is empty'),
    (dict(prompt='', chosen='4', rejected='5'), 'prompt is empty'),
    (dict(prompt='2+2?', chosen=[], rejected=[]), 'some of prompt|chosen is empty'),
    (dict(prompt='2+2?', chosen=4, rejected='5'), 'neither a text nor a list of messages'),
    (dict(prompt='2+2?', chosen=None, rejected='5'), 'neither a text'),
    (dict(prompt='2+2?', chosen=[dict(role='assistant', content='4')], rejected='5'), 'use one form in a row'),
    (dict(prompt='2+2?', chosen='4', rejected='5', id=None), 'id is None'),
    (dict(prompt='2+2?', chosen='4', rejected='5', id=7), 'id is 7'),
    (dict(prompt='2+2?', chosen='4', rejected='5', id=' '), "id is ' '"), (dict(prompt='2+2?', chosen='4', rejected='5', id=[1]), 'id is'),
    (dict(prompt='2+2?', chosen='4', rejected='5', question_id=3), 'question_id is 3'),
    (dict(prompt='2+2?', chosen='4', rejected='5', question={}), 'question is {}'),
    (dict(prompt='2+2?', chosen='4', rejected='5', error=1), 'error is 1'),
    (dict(prompt='2+2?', chosen='4', rejected='5', source=None), 'source is None'),
    (dict(prompt='2+2?', chosen='4\ud800', rejected='5'), 'half of a surrogate pair'),
    (dict(prompt=[dict(role=3, content='x')], chosen='4', rejected='5'), 'neither a text')])
def test_bad_pairs(tmp_path, row, message):
    with pytest.raises(ValueError, match=f'(row|line) 2: .*({message})'):
        load_pairs(written(tmp_path/'p.jsonl', [dict(prompt='1+1?', chosen='2', rejected='3'), row]))

def test_files(tmp_path):
    pairs,_ = pairs_from_corruption(make_problems(20), seed=0)
    assert load_pairs(save_pairs(tmp_path/'p.jsonl', pairs)) == pairs
    mine = load_pairs(save_pairs(tmp_path/'m.jsonl', [dict(prompt='1+1?', chosen='2', rejected=str(i)) for i in (3, 4)]))
    assert [(r['id'], r['question_id']) for r in mine] == [('pair-0', 'question-0'), ('pair-1', 'question-0')]
    (tmp_path/'e.jsonl').write_text('')
    with pytest.raises(ValueError, match='holds no pairs'): load_pairs(tmp_path/'e.jsonl')
    (tmp_path/'b.jsonl').write_text('{"prompt": ')
    with pytest.raises(ValueError, match=r'b\.jsonl, line 1'): load_pairs(tmp_path/'b.jsonl')

PAIR = dict(prompt='1+1?', chosen='It is 2.', rejected='It is 3.')

@pytest.mark.parametrize('rows,message', [
    ([dict(PAIR, id='a'), dict(PAIR, id='b', rejected='4'), dict(PAIR, id='a', rejected='5')], "rows 1 and 3: both have the id 'a'"),
    ([PAIR, dict(PAIR, id='pair-0', rejected='4')], "rows 1 and 2: both have the id 'pair-0'"),
    ([PAIR, dict(PAIR, prompt='2+2?'), dict(PAIR, chosen='it is  3.', rejected='It is 2.')],
    'rows 1 and 3: each prefers what the other rejects'),
    ([{k: [dict(role='user', content=v)] for k, v in PAIR.items()}, dict(PAIR, chosen='It is 3.', rejected='It is 2.')],
    'rows 1 and 2: each prefers')])
def test_rows_that_do_not_go_together(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message): load_pairs(written(tmp_path/'p.jsonl', rows))

def test_a_question_may_have_two_pairs(tmp_path):
    rows = [PAIR, dict(PAIR, rejected='It is 4.'), dict(PAIR, prompt='2+2?', chosen='It is 3.', rejected='It is 2.'),
        dict(PAIR, chosen='Two: 2.')]
    assert len(load_pairs(written(tmp_path/'p.jsonl', rows))) == 4

WORDS = st.sampled_from(['', ' ', 'It is 2.', 'It is 3.', 'x'*500, '\ud800', 'a\nb', 'pair-0', '####', '0']) | st.text(max_size=5)
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda x: st.lists(x, max_size=2) | st.dictionaries(WORDS, x, max_size=2),
                   max_leaves=4)
SIDE = WORDS | st.lists(st.fixed_dictionaries(dict(content=WORDS), optional=dict(role=st.sampled_from(['user', 'assistant', 3]))),
    max_size=2) | ANY
ROW = st.fixed_dictionaries(dict(prompt=SIDE, chosen=SIDE, rejected=SIDE),
    optional=dict(id=WORDS | ANY, question_id=ANY, question=WORDS | ANY, error=ANY))

@given(rows=st.lists(ROW | st.just(PAIR) | st.dictionaries(WORDS, ANY, max_size=2), max_size=3))
@settings(max_examples=1500, deadline=1000, suppress_health_check=list(HealthCheck))
def test_any_rows_are_pairs_or_one_sentence(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp()/'any.jsonl'
    try: pairs = load_pairs(written(path, rows), [P])
    except ValueError as e:
        said = str(e).replace(str(path), '')
        assert '\n' not in said and 10 < len(said) < 400, said
        return
    assert len(pairs) == len({r['id'] for r in pairs}) == len(rows) and load_pairs(save_pairs(path, pairs)) == pairs

def test_pair_card():
    from functools import partial
    from yfpo.lm.models import load_model
    from yfpo.lm.responses import response_logprobs
    pairs,_ = pairs_from_corruption(make_problems(12), seed=0)
    words = pair_card(pairs)
    assert words['n'] == words['questions'] == 12 and sum(words['by_error'].values()) == 12 and words['by_source'] == {'templates': 12}
    assert words['length_difference']['mean'] == pytest.approx(statistics.mean(map(words_difference, pairs)), abs=1e-4)
    model,tokenizer = load_model('tiny')
    card = pair_card(pairs, tokenizer, partial(response_logprobs, model, tokenizer))
    d = [float(response_logprobs(model, tokenizer, [dict(prompt=r['prompt'], completion=r['chosen'])])[0].sum()
               - response_logprobs(model, tokenizer, [dict(prompt=r['prompt'], completion=r['rejected'])])[0].sum()) for r in pairs]
    assert card['unit'] == 'tokens' and card['logprob_difference']['mean'] == pytest.approx(statistics.mean(d), abs=1e-2)
    assert card['logprob_difference']['share_chosen_preferred'] == pytest.approx(statistics.mean(x > 0 for x in d), abs=1e-4)
    json.dumps(card)
    with pytest.raises(ValueError, match='no pairs to describe'): pair_card([])

@real
def test_real_gsm8k():
    train,test = load_gsm8k('train', DATA),load_gsm8k('test', DATA)
    pairs,counts = pairs_from_corruption(train[:600], seed=0, test_problems=test)
    assert len(pairs) > 500 and set(Counter(r['error'] for r in pairs)) == set(ERRORS)
    for r in pairs:
        new = len(false_equations(response_text(r['rejected']))) - len(false_equations(response_text(r['chosen'])))
        assert new <= (r['error'] == 'slip'), (response_text(r['chosen']), response_text(r['rejected']))
    with pytest.raises(ValueError, match='leakage'): pairs_from_corruption(test[:5])
    rows = [json.loads(l)
            for l in open(DATA/'gsm8k'/'example_model_solutions.jsonl')] if (DATA/'gsm8k'/'example_model_solutions.jsonl').is_file() else []
    if rows:
        with pytest.raises(ValueError, match='leakage'): check_no_test_overlap([dict(question=r['question']) for r in rows[:50]], test)
