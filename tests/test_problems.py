"Problems: extraction against hand-made answers and lm-evaluation-harness's filters, loaders on good and bad files, splits"
import json, os, re, statistics
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from yfpo.data.problems import Problem, check_disjoint, gold_problem, masked_text, read_problems, split_problems
from yfpo.data.files import read_numbers
from yfpo.data.sources import OTHER_SETS, equation_solution, load_gsm8k, load_other, load_problems, load_svamp
from yfpo.data.templates import (agreement_texts, all_templates, chat_to_judge, chat_to_select, general_texts, make_ood, make_problems)
from yfpo.data.answers import (ANSWER_RULES, annotations_hold, calc, extract_flexible, extract_number, extract_strict, is_correct,
                               normalise_answer, parse_annotations, show_number, strip_annotations, to_number)
from yfpo.data.files import atomic_write, read_jsonl, write_jsonl

DATA = Path(os.environ.get('YFPO_DATA_DIR') or Path(__file__).resolve().parents[2]/'shared'/'data')
real = pytest.mark.skipif(not (DATA/'gsm8k'/'train.jsonl').is_file(),
                          reason=f'no GSM8K in {DATA}; set YFPO_DATA_DIR to a folder with gsm8k/ and svamp/')
GOLD = 'Ada has 3 + 4 = <<3+4=7>>7 pens.\n#### 7'

@pytest.mark.parametrize('text,strict,flexible,number', [
    ('#### 72', '72', '72', '72'),
    ('a\n#### 1,000.', '1,000.', '1,000.', '1000'),
    ('#### -5', '-5', '-5', '-5'),
    ('#### 3\n#### 4', '3', '4', '3'),
    ('It makes 18 eggs...', None, '...', '18'),
    ('It costs $18.00', None, '$18.00', '18'),
    ('#### $18', None, '$18', '18'),
    ('so 10-5 = 5', None, '5', '5'),
    ('It is −4 degrees', None, '4', '-4'),
    ('about 1, 2 or 3', None, '3', '3'),
    ('50%', None, '50', '50'),
    ('x = .5', None, '.5', '0.5'),
    ('#### ...', '...', '...', None),
    ('no number here', None, None, None)])
def test_extraction(text, strict, flexible, number):
    assert (extract_strict(text), extract_flexible(text), extract_number(text)) == (strict, flexible, number)

REPLIES = [                # reply, strict, flexible, numeric, gold, whether math-verify finds the gold
    ('#### 72', '72', '72', '72', '72', True),
    ('#### 1,072.', '1,072.', '1,072.', '1072', '1072', True),
    ('#### -5', '-5', '-5', '-5', '-5', True),
    ('#### $18', None, '$18', '18', '18', True),
    ('####18', None, '18', '18', '18', True),
    ('#### **18**', None, '18', '18', '18', True),
    ('#### \\$18', None, '$18', '18', '18', True),
    ('#### \\(18\\)', None, '18', '18', '18', True),
    ('#### = 18', None, '18', '18', '18', True),
    ('#### 18 dollars', '18', '18', '18', '18', False),
    ('#### 18.00', '18.00', '18.00', '18', '18', True),
    ('#### 1/2', '1', '2', '0.5', '0.5', True),
    ('#### 3 1/2', '3', '2', '3.5', '3.5', False),
    ('#### 1e3', '1', '3', '1000', '1000', False),
    ('#### 1.5e3', '1.5', '3', '1500', '1500', False),
    ('#### 2.5 million', '2.5', '2.5', '2500000', '2500000', False),
    ('#### 1 234', '1', '234', None, '1234', False),
    ('#### 10\u202f000', '10', '000', '10000', '10000', False),
    ('#### 1,00,000', '1,00,000', '1,00,000', '100000', '100000', False),
    ('#### 1,5', '1,5', '1,5', None, '1.5', False),
    ('#### 3,50', '3,50', '3,50', None, '3.5', False),
    ('#### 5:30', '5', '30', None, '5.5', False),
    ('#### 3*2=6', '3', '6', '6', '6', True),
    ('#### 18\nI checked it 3 times.', '18', '3', '18', '18', True),
    ('#### $18\nI checked it 3 times.', None, '3', '18', '18', True),
    ('#### **18** of 20', None, '20', '18', '18', False),
    ('#### 5 #### 6', '5', '6', '5', '5', False),
    ('#### ...', '...', '...', None, '1', False),
    ('####', None, None, None, '1', False),
    ('#### -\xa05', None, '5', '-5', '-5', False),
    ('#### –3', None, '3', '-3', '-3', True),
    ('#### 12/25/2020', '12', '2020', None, '12', False),
    ('#### Step 1: add\nIt is 7.', None, '7.', '7', '7', True),
    ('The answer is \\boxed{1{,}234}.', None, '234', '1234', '1234', True),
    ('so \\boxed{18} in 3 steps', None, '3', '18', '18', True),
    ('\\boxed{\\frac{1}{2}}', None, '2', '0.5', '0.5', True),
    ('\\boxed{\\text{18 dollars}}', None, '18', '18', '18', False),
    ('\\boxed{x = 5}', None, '5', '5', '5', True),
    ('\\boxed{3, 4}', None, '4', None, '4', False),
    ('\\boxed{7} or rather \\boxed{8}', None, '8', '8', '8', False),
    ('It is \\frac{3}{4}.', None, '4', '0.75', '0.75', True),
    ('It is \\dfrac12.', None, '12.', '0.5', '0.5', True),
    ('It is -\\frac{1}{2}.', None, '2', '-0.5', '-0.5', True),
    ('It is 3\\frac{1}{2}.', None, '2', '3.5', '3.5', False),
    ('It is 1\\,234.', None, ',234.', '1234', '1234', False),
    ('That is 1,\\!234.', None, '234.', '1234', '1234', True),
    ('It costs $18.00', None, '$18.00', '18', '18', True),
    ('It costs $1,234.50.', None, '$1,234.50.', '1234.5', '1234.5', True),
    ('18 eggs...', None, '...', '18', '18', True),
    ('so 10-5 = 5', None, '5', '5', '5', True),
    ('10-5', None, '-5', '5', '5', True),
    ('It is −4 degrees', None, '4', '-4', '-4', True),
    ('It fell to –3.', None, '3.', '-3', '-3', True),
    ('about 1, 2 or 3', None, '3', '3', '3', True),
    ('1,2,3', None, '1,2,3', None, '3', False),
    ('50%', None, '50', '50', '50', True),
    ('x = .5', None, '.5', '0.5', '0.5', True),
    ('3½ cups', None, '3', '3.5', '3.5', False),
    ('¾', None, None, '0.75', '0.75', True),
    ('10²', None, '10', None, '100', True),
    ('2^10', None, '10', None, '1024', True),
    ('1e3', None, '3', '1000', '1000', False),
    ('2 x 10^3', None, '3', '2000', '2000', False),
    ('6.02 \\times 10^{2}', None, '2', '602', '602', False),
    ('3 million', None, '3', '3000000', '3000000', False),
    ('5k', None, '5', None, '5000', False),
    ('v1.2.3', None, '1.2.3', None, '3', False),
    ('at 5:30', None, '30', None, '5', True),
    ('0x1F', None, '1', None, '31', False),
    ('1_000', None, '000', None, '1000', False),
    ("5'10", None, '10', None, '5', True),
    ('no number', None, None, None, '1', False),
    ('', None, None, None, '1', False),
    ('£20', None, '20', '20', '20', True),
    ('€1,5', None, '1,5', None, '1.5', True),
    ('7.', None, '7.', '7', '7', True),
    ('(8)', None, '8', '8', '8', False),
    ('It is 12.', None, '12.', '12', '12', True),
    ('5 1/2', None, '2', '5.5', '5.5', False),
    ('1 200 + 300 = 500', None, '500', '500', '500', True),
    ('-$5', None, '-$5', '-5', '-5', False),
    ('$-5', None, '-5', '-5', '-5', True),
    ('12 345', None, '345', None, '12345', True),
    ('1.000.000', None, '1.000.000', None, '1000000', False)]

def test_sixty_replies_under_all_rules():
    "The numeric rule reads a number whole or not at all; strict and flexible stay to the letter, oddities included"
    assert len(REPLIES) >= 60
    for text, strict, flexible, number, gold, math in REPLIES:
        assert (extract_strict(text), extract_flexible(text), extract_number(text)) == (strict, flexible, number), text
        assert is_correct(text, gold) == (number == gold), text
        assert is_correct(text, gold, 'math') == math, text
    assert extract_number('9'*5000) is None and extract_number('#### ' + '9'*5000) is None and to_number('1e999999999') is None

@pytest.mark.parametrize('gold,value', [('1/2', '0.5'), ('1e3', '1000'), ('$1,234.50', '1234.5'), ('1/3', '1/3'), ('-7', '-7'),
    ('3 1/2', '3.5'), ('2.5 million', '2500000'), ('10\u202f000', '10000'), ('1,00,000', '100000'), ('18.', '18'), ('.5', '0.5')])
def test_golds_are_read_whole(tmp_path, gold, value):
    write_jsonl(tmp_path/'train.jsonl', [dict(question='How many?', answer=f'So it is.\n#### {gold}')])
    assert load_gsm8k('train', tmp_path)[0].answer == value

@pytest.mark.parametrize('gold', ['10 000', '5:30', '1 or 2', '1,5', '3,50', '3*2=6', '5 #### 6', '9'*5000, '1e999', '50%',
                                  '1.000.000', '12/25/2020', '18 dollars', 'eighteen', '1/0', '- ', '10²', '5k'])
def test_golds_that_are_not_one_number_are_refused(tmp_path, gold):
    write_jsonl(tmp_path/'train.jsonl', [dict(question='a', answer='#### 1'), dict(question='How many?', answer=f'So it is.\n#### {gold}')])
    with pytest.raises(ValueError, match='row 2: .*####') as e: load_gsm8k('train', tmp_path)
    assert len(str(e.value)) < 300 and '\n' not in str(e.value)

@real
def test_the_official_golds_are_what_they_were():
    "On the official files the new reader gives what lm-evaluation-harness's strict pattern gives"
    for p in load_gsm8k('train', DATA) + load_gsm8k('test', DATA):
        assert to_number(p.answer) == Fraction(extract_strict(p.solution.rpartition('\n')[2]).replace(',', '').rstrip('.'))

plainly = st.tuples(st.integers(-10**9, 10**9), st.integers(0, 3))

@settings(max_examples=1500, deadline=None)
@given(plainly, st.sampled_from(['{}', '{} apples', 'It is {}.', '#### {}', '#### **{}**', 'so \\boxed{{{}}}, 7 times', 'a = 5, b = {}']),
       st.sampled_from(['plain', 'commas', 'dollar', 'thin', 'latex', 'dash']))
def test_a_number_is_found_however_it_is_written(number, frame, how):
    n, places = number
    x = Fraction(n, 10**places)
    digits = f'{abs(n)//10**places:,}' + (f'.{abs(n) % 10**places:0{places}d}' if places else '')
    said = dict(plain=digits.replace(',', ''), commas=digits, dollar='$' + digits, thin=digits.replace(',', '\u202f'),
                latex=digits.replace(',', '{,}'), dash=digits)[how]
    minus = '' if n >= 0 else '–' if how == 'dash' else '-'
    assert to_number(extract_number(frame.format(minus + said))) == x

@settings(max_examples=1500, deadline=None)
@given(st.text(alphabet='0123456789.,:/ -–$#*\\{}()=eEkx^½\u202f\nab', max_size=40))
def test_never_a_part_of_a_number(text):
    "What is read is a run of characters that touches no other digit, comma, point, colon or stroke with a digit behind it"
    from yfpo.data.answers import _stated, plain_text
    m, plain = _stated(plain_text(text)), plain_text(text)
    assert extract_number(text) is None or show_number(to_number(extract_number(text))) or '/' in extract_number(text)
    if m is None or extract_number(text) is None: return
    assert not re.match(r'\d|[.,:/]\d', m.string[m.end():]) and not re.search(r'\d[.,:/]?$', m.string[:m.start()])

@settings(max_examples=1500, deadline=None)
@given(st.text(max_size=60))
def test_parsers_answer_or_refuse(text):
    "Any text has an answer or none; annotations and expressions are read or refused by a ValueError"
    assert extract_number(text) is None or to_number(extract_number(text)) is not None
    extract_flexible(text), extract_strict(text)
    for f in (calc, parse_annotations, annotations_hold, lambda t: annotations_hold(f'<<{t}>>'), equation_solution):
        try: f(text)
        except ValueError as e: assert str(e)

@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode('utf-8', 'surrogatepass')),
                 st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3) |
                              st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=8).map(lambda x: json.dumps(x).encode())))
def test_jsonl_is_read_or_refused(tmp_path, content):
    (tmp_path/'x.jsonl').write_bytes(content)
    try: rows = read_jsonl(tmp_path/'x.jsonl')
    except ValueError as e: assert 'x.jsonl' in str(e) and len(str(e)) < 500
    else: assert all(isinstance(r, dict) for r in rows); write_jsonl(tmp_path/'y.jsonl', rows)

@pytest.mark.parametrize('line,says', [('{"a": 1, "a": 2}', "the key 'a' stands twice"), ('['*10**5, 'nested too deep'),
    ('{"a": ' + '['*10**5, 'nested too deep'), (r'{"a": "\ud800"}', 'surrogate'), ('{"a": ' + '9'*5000 + '}', 'thousands of digits'),
    ('[1]', 'not list'), ('{"a": 1', 'not valid JSON')])
def test_jsonl_says_which_line(tmp_path, line, says):
    (tmp_path/'x.jsonl').write_text('{"a": 0}\n' + line + '\n')
    with pytest.raises(ValueError, match=f'x.jsonl, line 2.*{re.escape(says)}'): read_jsonl(tmp_path/'x.jsonl')

@pytest.mark.parametrize('change,says', [(dict(Body=None), 'Body is None'), (dict(Equation=7), 'Equation is 7'),
                                         (dict(Question=['a']), 'Question is'), (dict(Answer=None), 'not a number'),
                                         (dict(Answer='5:30'), 'not a number')])
def test_svamp_rows_of_wrong_types(tmp_path, change, says):
    row = dict(ID='chal-1', Body='There are 3 pens.', Question='How many?', Equation='3', Answer=3.0, Type='x')
    (tmp_path/'SVAMP.json').write_text(json.dumps([row, dict(row, **change)]))
    with pytest.raises(ValueError, match=f'row 2: .*{says}'): load_svamp(tmp_path)
    for whole in ('7', '"x"', '{"a": 1}', '[1, 2]', 'null', '[[]]'):
        (tmp_path/'SVAMP.json').write_text(whole)
        with pytest.raises(ValueError, match='SVAMP.json'): load_svamp(tmp_path)

def harness(text, pattern, which):
    "RegexFilter of lm-evaluation-harness, restated as an oracle"
    found = re.findall(pattern, text)
    if not found: return '[invalid]'
    m = found[which]
    return ([x for x in m if x] or ['[invalid]'])[0].strip() if isinstance(m, tuple) else m.strip()

@pytest.mark.parametrize('text', ['#### 72', 'It is $1,234.50.', '3 of 4 is 75%', 'A: 7', '####72', '#### 5\n\nQuestion: 6', '-', '-7',
                                  '1-2', '12.', 'a 0 b'])
def test_extraction_equals_the_harness(text):
    assert (extract_strict(text) or '[invalid]') == harness(text, r'#### (\-?[0-9\.\,]+)', 0)
    assert (extract_flexible(text) or '[invalid]') == harness(text, r'(-?[$0-9.,]{2,})|(-?[0-9]+)', -1)

def test_rules():
    assert all(is_correct('#### 1,000', '1000', r) for r in ('strict', 'flexible', 'numeric'))
    assert [is_correct('It is $18.00', '18', r) for r in ('strict', 'flexible', 'numeric')] == [False, False, True]
    assert not is_correct('', '18') and not is_correct('#### 19', '18')
    with pytest.raises(ValueError, match="'loose' is unknown"): is_correct('1', '1', 'loose')
    with pytest.raises(ValueError, match='not a number'): is_correct('1', 'one')

def test_numbers():
    assert to_number('1,000') == 1000 and to_number('...') is None and to_number('') is None
    for x in (Fraction(1, 8), Fraction(-7, 20), Fraction(1000), Fraction(1, 100), Fraction(-3)): assert to_number(show_number(x)) == x
    assert show_number(Fraction(1, 3)) is None

@pytest.mark.parametrize('bad', ['2**3', '__import__("os").system("true")', 'a+1', '1/0', '', '(1', '1 if 1 else 2', '1j', 'True', '"3"',
                                 '[1]', '9'*600])
def test_calc_refuses(bad):
    with pytest.raises(ValueError): calc(bad)

def test_annotations():
    assert calc('0.1+0.2') == Fraction(3, 10) and calc('560//10') == 56 and calc('-(2+3)*08') == -40
    assert parse_annotations(GOLD)[0][:2] == ('3+4', '7') and strip_annotations(GOLD) == 'Ada has 3 + 4 = 7 pens.\n#### 7'
    with pytest.raises(ValueError, match='not a calculator annotation'): parse_annotations('<<3>>')

def test_templates():
    ts = all_templates()
    assert len(ts) >= 24 and {t.steps for t in ts} == {1, 2, 3, 4} and {t.difficulty for t in ts} == {1, 2, 3}
    ops = ''.join(''.join(t.lines) for t in ts)
    assert all(o in ops for o in '+-*/')
    for t in ts:
        ps = make_problems(15, seed=4, templates=t.name)
        assert len({p.question for p in ps}) == 15
        for p in ps:
            assert p.answer.isdigit() and annotations_hold(p.solution) and p.solution.endswith(f'#### {p.answer}')
            assert all(is_correct(p.solution, p.answer, r) for r in ('strict', 'flexible', 'numeric'))
            assert not re.search(r'[{}\[\]~|]', p.question + p.solution) and len(parse_annotations(p.solution)) == t.steps
            for a in parse_annotations(p.solution): assert p.solution[a.end:].startswith(a.value)

def test_make_problems():
    assert make_problems(30, seed=1) == make_problems(60, seed=1)[:30] and make_problems(30, seed=1) != make_problems(30, seed=2)
    assert {p.meta['difficulty'] for p in make_problems(50, difficulty=2)} == {2}
    assert {p.meta['steps'] for p in make_problems(50, steps=[1, 4])} == {1, 4}
    with pytest.raises(ValueError, match='no template has'): make_problems(3, steps=9)

def test_load_gsm8k(tmp_path):
    for name in ('train.jsonl', 'gsm8k/test.jsonl'): write_jsonl(tmp_path/name, [dict(question='How many pens?', answer=GOLD)])
    for split in ('train', 'test'):
        p, = load_gsm8k(split, tmp_path)
        assert (p.answer, p.source, p.id) == ('7', f'gsm8k/{split}', f'gsm8k-{split}-0')
    assert load_problems('gsm8k/train', data_dir=str(tmp_path)) == load_gsm8k('train', tmp_path)
    with pytest.raises(ValueError, match='has 1 problems, 5 were asked for'): load_problems('gsm8k/train', tmp_path, n=5)

@pytest.mark.parametrize('text,message', [
    ('{"question": "a", "answer": "#### 1"}\n{"question": "b", "ans', r'train\.jsonl, line 2: not valid JSON'),
    ('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "It is 2."}',
     r'train\.jsonl, row 2: the gold answer does not end in a "#### number" line'),
    ('{"question": "a", "answer": "#### ..."}', r'row 1: .* is not one number'),
    ('{"question": "a"}', r'row 1: the answer is missing or empty'),
    ('{"question": "", "answer": "#### 1"}', r'row 1: the question is missing or empty'),
    ('[1]', r'line 1: a JSON object was expected'),
    ('', 'is empty')])
def test_bad_gsm8k(tmp_path, text, message):
    (tmp_path/'train.jsonl').write_text(text)
    with pytest.raises(ValueError, match=message): load_gsm8k('train', tmp_path)

def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist; make that folder and put gsm8k/train.jsonl in it'):
        load_gsm8k('train', tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='has no gsm8k/test.jsonl or test.jsonl; put the official file there'):
        load_gsm8k('test', tmp_path)
    with pytest.raises(FileNotFoundError, match='SVAMP.json'): load_svamp(tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'"): load_gsm8k('dev', tmp_path)
    with pytest.raises(ValueError, match='no problems are called'): load_problems('gsm', tmp_path)

def test_load_svamp(tmp_path):
    row = dict(ID='chal-1', Body='Each pack costs 76 dollars. If there is a discount of 25 dollars', Question='How much is a pack?',
               Equation='( 76.0 - 25.0 )', Answer=51.0, Type='Subtraction')
    (tmp_path/'SVAMP.json').write_text(json.dumps([row]))
    p, = load_svamp(tmp_path)
    assert (p.answer, p.solution) == ('51', '76 - 25 = <<76-25=51>>51\n#### 51') and p.question.endswith('25 dollars, how much is a pack?')
    for bad,message in ((dict(row, Answer='many'), 'not a number'), ({k: row[k] for k in row if k != 'Equation'}, 'Equation is missing'),
                        (dict(row, Equation='f(2)'), 'cannot calculate')):
        (tmp_path/'SVAMP.json').write_text(json.dumps([bad]))
        with pytest.raises(ValueError, match=message): load_svamp(tmp_path)
    assert equation_solution('( 60.0 * ( 55.0 / 15.0 ) )').endswith('#### 220') and equation_solution('7.0') == '<<7=7>>7\n#### 7'

def test_splits():
    ps = make_problems(400, seed=0)
    a = split_problems(ps, dict(select=50, train=200, dev=30, test=-1), seed=1)
    assert a == split_problems(ps, dict(select=50, train=200, dev=30, test=-1), seed=1) and list(a) == ['select', 'train', 'dev', 'test']
    assert check_disjoint(a) | dict(test=0) == dict(select=50, train=200, dev=30, test=0)
    masks = [{masked_text(p.question) for p in x} for x in a.values()]
    assert not any(masks[i] & masks[j] for i in range(4) for j in range(i))
    with pytest.raises(ValueError, match='share the question'): check_disjoint(dict(train=ps[:2], test=ps[1:3]))
    with pytest.raises(ValueError, match='too few'): split_problems(ps[:10], dict(train=20))
    with pytest.raises(ValueError, match='would be empty'): split_problems(ps, dict(train=0))
    twins = [Problem(str(i), f'Ada has {i:,} pens and  buys {i+1}.', GOLD, '7', 'x') for i in range(995, 1005)]
    with pytest.raises(ValueError, match='too few'): split_problems(twins, dict(train=5, test=5))

def test_general_texts():
    ts = general_texts(200, seed=1)
    assert ts == general_texts(200, seed=1) and len(set(ts)) == 200
    assert all(60 <= len(t.split()) <= 150 for t in ts) and not re.search(r'\d', ''.join(ts))

COUNTING = set("""zero one ones two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty
    hundred thousand million first second third fourth half halves quarter twice once double triple dozen dozens pair pairs couple
    single both plus
    minus sum total times number numbers count counts many amount equal equals add adds divide multiply percent""".split())

def test_chat_answers_hold_no_mathematics():
    "No digit, no number word and no sign of a calculation, in questions and in answers"
    rows = chat_to_select(48) + chat_to_judge(48)
    for r in rows:
        (asked,), (said,) = r['prompt'], r['completion']
        assert (asked['role'], said['role']) == ('user', 'assistant')
        text = f"{asked['content']} {said['content']}"
        assert not re.search(r'[\d+*/=%$#<>]', text) and not COUNTING & set(re.findall('[a-z]+', text.lower())), text
        assert 25 <= len(said['content'].split()) <= 70 and 2 <= len(re.findall(r'[.!?](?=\s|$)', said['content'])) <= 5, text
    for k in ('prompt', 'completion'): assert len({r[k][0]['content'] for r in rows}) == 96, 'no two are alike, in either half'

@pytest.mark.parametrize('draw', [chat_to_select, chat_to_judge])
def test_a_seed_says_which_chat_answers_come(draw):
    assert draw(48, seed=1)[:20] == draw(20, seed=1) != draw(20, seed=2)
    assert sorted(map(str, draw(48, seed=1))) == sorted(map(str, draw(48, seed=2)))
    with pytest.raises(ValueError, match='^only 48 of 49 different chat answers are there; ask for fewer$'): draw(49)
    draw(1)[0]['prompt'][0]['content'] = 'changed'; assert draw(1)[0]['prompt'][0]['content'] != 'changed'

def test_a_chat_answer_is_long_enough_to_be_cut_to_a_solution(tiny):
    "Three in four solutions are no longer than the shortest answer, and the median answer has at most 2.5 times their median of words"
    answers = [r['completion'][0]['content'] for r in chat_to_select(48) + chat_to_judge(48)]
    solutions = [strip_annotations(p.solution) for p in make_problems(200, seed=1)]
    for size in (lambda t: len(t.split()), lambda t: len(tiny[1](t).input_ids)):
        assert sorted(map(size, solutions))[150] <= min(map(size, answers)), size
    words = [statistics.median(len(t.split()) for t in ts) for ts in (answers, solutions)]
    assert words[1] < words[0] <= 2.5*words[1]

def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    for path in (tmp_path/'pipe', '/dev/null'):
        with pytest.raises(ValueError, match='which no file may replace'):
            with atomic_write(path) as tmp: tmp.write_text('1')

def test_atomic_write(tmp_path):
    path = tmp_path/'deep'/'a.json'
    with atomic_write(path) as tmp: tmp.write_text('1'); assert tmp.parent == path.parent and tmp.suffix == '.json'
    with pytest.raises(RuntimeError):
        with atomic_write(path) as tmp: tmp.write_text('2'); raise RuntimeError
    assert path.read_text() == '1' and [p.name for p in path.parent.iterdir()] == ['a.json']
    with pytest.raises(FileNotFoundError, match='does not exist'): read_jsonl(tmp_path/'no.jsonl')

@real
def test_real_data():
    train,test,svamp = load_gsm8k('train', DATA),load_gsm8k('test', DATA),load_svamp(DATA)
    assert (len(train), len(test), len(svamp)) == (7473, 1319, 1000)
    for p in train + test + svamp:
        assert annotations_hold(p.solution) and all(is_correct(p.solution, p.answer, r) for r in ('strict', 'flexible', 'numeric')), p.id
    assert check_disjoint(dict(train=train, test=test)) == dict(train=7473, test=1319)
    assert [p.id for p in svamp if not p.meta['agrees']] == ['svamp-chal-680']

# --- sets made elsewhere, and our own out of distribution ---

ROWS = {
    'mawps': ([dict(input='Tom has 3 pens and 4 pens . How many ?', target=7.0)], '7'),
    'gsm-hard': ([dict(input='A robe takes 2287720 bolts. How many?', code='', target=3431580.0)], '3431580'),
    'gsm-plus': ([dict(question='2+2?', solution='It is 4.\n#### 4', answer='4', perturbation_type='x', seed_question='1+1?'),
                  dict(question='How?', solution='', answer='None', perturbation_type='critical thinking', seed_question='1+1?')], '4'),
    'gsm-symbolic-p2': ([dict(question='Half of 65?', answer='65/2 = 32.5\n#### 32.5', original_id=473, canary='GUID')], '32.5'),
    'math-500': ([dict(problem='$1+1$?', solution='', answer='2', subject='Algebra', level=1),
                  dict(problem='?', solution='', answer='\\frac{1}{2}', subject='Algebra', level=2),
                  dict(problem='?', solution='', answer='\\frac{\\sqrt3}{2}', subject='Algebra', level=2)], '2')}

@pytest.mark.parametrize('name', ROWS)
def test_a_set_made_elsewhere(tmp_path, name):
    rows, answer = ROWS[name]
    for f in OTHER_SETS[name].files: write_jsonl(tmp_path/f, rows)
    said = []
    got = load_other(name, tmp_path, say=said.append)
    assert got[0].answer == answer and is_correct(got[0].solution, answer, 'strict') and len({p.id for p in got}) == len(got)
    assert OTHER_SETS[name].licence in said[0] and got[0].meta['licence'] == OTHER_SETS[name].licence
    assert f'{len(got)} of {len(rows)*len(OTHER_SETS[name].files)}' in said[0]
    assert load_problems(name, tmp_path, 1, 0)[0] in got

def test_math_500_under_the_math_rule(tmp_path):
    for f in OTHER_SETS['math-500'].files: write_jsonl(tmp_path/f, ROWS['math-500'][0])
    numbers, all_ = (load_other('math-500', tmp_path, say=lambda t: None, rule=r) for r in ('numeric', 'math'))
    assert [p.answer for p in numbers] == ['2', '0.5'] and [p.answer for p in all_] == ['2', '0.5', r'\frac{\sqrt3}{2}']
    assert all(is_correct(p.solution, p.answer, 'math') for p in all_) and is_correct('It is $\\sqrt{3}/2$.', all_[2].answer, 'math')
    from yfpo.evaluate import score_answers
    rows = score_answers([dict(text='#### 1', answer=all_[2].answer)], rules=('math',))
    assert rows == [dict(text='#### 1', answer=all_[2].answer, correct_math=False)]
    with pytest.raises(ValueError, match='rule .loose'): load_other('math-500', tmp_path, rule='loose')

@pytest.mark.parametrize('name,break_,says', [
    ('gsm-plus', lambda f: f.write_text('{"question": "2+2?"}\n'), 'row 1: not a row of gsm-plus'),
    ('gsm-plus', lambda f: f.write_text('{"question": \n'), 'gsmplus_testmini.jsonl'),
    ('gsm-plus', lambda f: f.unlink(), 'put the official file there'),
    ('math-500', lambda f: write_jsonl(f, [dict(ROWS['math-500'][0][1], answer='x^2')]), 'no problem with an answer that is one number'),
    ('mawps', lambda f: f.write_text(''), 'no problem')])
def test_a_broken_file_of_another_set(tmp_path, name, break_, says):
    for f in OTHER_SETS[name].files: write_jsonl(tmp_path/f, ROWS[name][0])
    for f in OTHER_SETS[name].files: break_(tmp_path/f)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(says)): load_other(name, tmp_path, say=lambda t: None)

def test_asdiv_is_xml(tmp_path):
    one = '<Problem ID="n{i}"><Body>B.</Body><Question>Q?</Question><Answer>{a}</Answer><Formula>{f}</Formula></Problem>'
    cases = [('9 (apples)', '7+2=9'), ('1/2', '1/2=1/2'), ('5', 'x=5'), ('yes', '')]
    (tmp_path/'ASDiv.xml').write_text('<M>' + ''.join(one.format(i=i, a=a, f=f) for i, (a, f) in enumerate(cases)) + '</M>')
    got = load_other('asdiv', tmp_path, say=lambda t: None)
    assert [(p.id, p.answer) for p in got] == [('asdiv-0', '9'), ('asdiv-1', '0.5'), ('asdiv-2', '5')]
    assert '<<7+2=9>>' in got[0].solution and got[2].solution == '#### 5'
    (tmp_path/'ASDiv.xml').write_text('<M><Problem>')
    with pytest.raises(ValueError, match='not valid XML'): load_other('asdiv', tmp_path)

def test_out_of_distribution_shares_no_wording_with_training():
    ood, train = make_ood(120, seed=3), make_problems(400, seed=3)
    assert not {masked_text(p.question) for p in ood} & {masked_text(p.question) for p in train}
    large = [p for p in ood if p.meta['template'].endswith('-large')]
    assert len(large) == 60 and {p.meta['difficulty'] for p in large} == {1, 2, 3} and len({p.id for p in ood}) == 120
    size = lambda ps: sum(max(float(x) for x in re.findall(r'\d+', p.question)) for p in ps)/len(ps)
    assert size(large) > 5*size([p for p in ood if p not in large])
    assert load_problems('templates-ood', n=5, seed=3) == make_ood(5, 3)

# ---- problems between stages

GOOD = dict(id='a-1', question='How many?', solution='2+2=<<2+2=4>>4\n#### 4', answer='4', source='demo')

def test_problems_are_read_back_as_they_were_written(tmp_path):
    ps = load_problems('templates', n=20) + load_problems('templates-ood', n=6)
    assert read_problems(write_jsonl(tmp_path/'p.jsonl', map(asdict, ps))) == ps

@pytest.mark.parametrize('rows, said', [
    ([dict(GOOD, answer='5')], "row 1: the answer is '5' and the solution ends in '4'; they must agree"),
    ([GOOD, dict(GOOD, id=7)], 'row 2: id is 7, but must be text'),
    ([GOOD, GOOD], "row 2: the id 'a-1' is that of row 1"),
    ([{k: v for k, v in GOOD.items() if k != 'source'}], "row 1 lacks the key 'source'"),
    ([dict(GOOD, questoin='x')], "row 1 has an unknown key 'questoin'"),
    ([dict(GOOD, meta=[1])], r'row 1: meta is \[1\], but must be an object'),
    ([dict(GOOD, question=' ')], "row 1: question is ' ', but must be text"),
    ([dict(GOOD, answer=None)], 'row 1: answer is None, but must be text'),
    ([dict(GOOD, solution='#### four')], "row 1: 'four' after \"####\" is not one number")])
def test_problems_that_were_edited_by_hand_are_refused_with_their_row(tmp_path, rows, said):
    with pytest.raises(ValueError, match=f'p.jsonl, {said}'): read_problems(write_jsonl(tmp_path/'p.jsonl', rows))

def test_an_empty_file_of_problems_is_named(tmp_path):
    (tmp_path/'p.jsonl').write_text('')
    with pytest.raises(ValueError, match='p.jsonl is empty'): read_problems(tmp_path/'p.jsonl')

ROW = dict(ID='chal-1', Body='Ada has 3 pens.', Question='How many?', Equation='( 3.0 + 0.0 )', Answer=3.0)

@pytest.mark.parametrize('rows, said', [
    ([ROW, ROW], "row 2: the id 'svamp-chal-1' is that of row 1"), ([dict(ROW, ID=None)], 'row 1: the ID is None; give each row its own'),
    ([dict(ROW, Equation='( 3.0 / 0.0 )')], r"row 1: the Equation '\( 3.0 / 0.0 \)' cannot be calculated"),
    ([dict(ROW, Equation='3 +')], 'row 1: the Equation .* cannot be calculated')])
def test_svamp_rows_that_cannot_be_are_named(tmp_path, rows, said):
    (tmp_path/'SVAMP.json').write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=f'SVAMP.json, {said}'): load_svamp(tmp_path)

@pytest.mark.parametrize('args, said', [((None,), 'the name of the problems is None'), (('templates', None, -3), 'n is -3'),
                                        (('templates', None, 2.5), 'n is 2.5'), (('svamp', '.', True), 'n is True')])
def test_what_is_no_name_or_number_of_problems(args, said):
    with pytest.raises(ValueError, match=said): load_problems(*args)

def test_a_split_says_how_many_wordings_there_are():
    ps = [Problem(f'a-{i}', f'Ada has {i} pens. How many?', f'#### {i}', str(i), 'demo') for i in range(40)]
    with pytest.raises(ValueError, match='40 problems in 1 wordings are too few'): split_problems(ps, dict(a=20, b=20))

# ---- replies as people and models write them: the whole value, or no answer

@pytest.mark.parametrize('text, value', [
    *[(t, None) for t in ('#### 0,500', '= 0,125', r'$\frac123$', r'$\frac{1.5}{2}$', r'$\frac{1,000}{4}$', r'#### \frac{7{,}000}{2}',
                          '1/(2)', '(-1)/2', 'x/2', '5//2', r'\boxed{\sqrt{2}}', r'\boxed{2\pi}', r'\boxed{\frac{\pi}{2}}', r'\boxed{x^2}',
                          r'\boxed{3x}', r'\boxed{5!}', '#### √4', '#### 10-15', '#### 3 to 5', '#### 5 or 6', '#### 1, 234', '#### 2+3',
                          '#### 5*3', '#### 2-1/2', '#### 1__000', '#### 5h30', '#### 5 hours 30 minutes', '#### 5 ft 6 in',
                          '#### 2024-01-02', '#### 0.(3)', '#### 1.5 K', '#### 5M',
                          '#### 5 bn', '$5B', '5 mil', '5 hundredths', '5´000x', '#### 12-46')],
    *[(t, v) for t, v in ((r'$\frac{-1}{2}$', '-0.5'), (r'$\cfrac{1}{2}$', '0.5'), (r'#### \frac{-1}{2}', '-0.5'), ('7 / 2', '3.5'),
                          ('#### 7/{2}', '3.5'), ('7⁄8', '0.875'), ('#### 3.5 Million', '3500000'), ('3.5million', '3500000'),
                          ('2 millions', '2000000'), ('3 crore', '30000000'), ('3.5 lakh', '350000'), (r'#### 1.5 \cdot 10^3', '1500'),
                          ('#### 1.5·10³', '1500'), ('#### 5×10³', '5000'), ('1\u2007234', '1234'), ('1\u3000234', '1234'),
                          ('5\u200b6', '56'), ('12\u200d34', '1234'), (r'\boxed{- 5}', '-5'), ('The answer is $- 5$.', '-5'),
                          ('The area is 12 cm^2.', '12'), ('12 cm^3', '12'), ('5 m2', '5'), (r'\boxed{12\text{ cm}^2}', None),
                          ('#### 18 eggs, and I checked it 3 times', '18'), ('It costs $5/day', '5'), ('He drives 60 km/h.', '60'),
                          ('#### 15 = 5 x 3', None), ('#### 5 X 3', None), ('#### 5x$3', None), ('#### 15 = 5 ⋅ 3', None),
                          ('#### 5 x 10^3', '5000'),
                          ('#### 18 boxes 3', '18'), ('#### 5 x', '5'),
                          ('#### 5 6', '5'), ('#### **18** and 3', '18'), (r'\boxed{x = 5}', '5'), (r'\boxed{5\%}', '5'))]])
def test_replies_are_read_whole_or_not_at_all(text, value):
    assert extract_number(text) == value

def test_long_runs_of_spaces_take_no_time():
    from time import perf_counter
    start = perf_counter()
    for space in (' ', '\u00a0'): assert extract_number('####' + space*200_000) is None
    assert perf_counter() - start < 2

@pytest.mark.parametrize('gold', ['0,500', r'\frac123', '00,000', '0,05,000', r'\frac{1.5}{2}', '10-15'])
def test_golds_of_two_meanings_are_no_numbers(gold):
    assert to_number(gold) is None

def test_calculations_are_exact_or_refused():
    assert calc('9007199254740993.0') == 9007199254740993 and calc('0.12345678901234567890') == Fraction('0.1234567890123456789')
    assert calc('1e-400') == Fraction(1, 10**400)
    for bad, says in (('1_000', 'without _'), ('1/0', 'divides by zero'), ('1e99999', 'too large')):
        with pytest.raises(ValueError, match=says): calc(bad)
    for text in ('<<5+6=1,1>>', '<<100+0=1,00>>'):
        with pytest.raises(ValueError, match='cannot calculate'): annotations_hold(text)
    assert annotations_hold('<<500+500=1,000>>')

@pytest.mark.parametrize('gold', ['', ' '])
def test_a_gold_that_math_verify_cannot_read(gold):
    with pytest.raises(ValueError, match='nothing that math-verify reads'): is_correct('5', gold, 'math')

# ---- what is no text, no path, no number

@pytest.mark.parametrize('given', [None, 5, b'5', ['5'], '\ud800 5'])
@pytest.mark.parametrize('call', [extract_number, extract_strict, calc, parse_annotations, normalise_answer, lambda x: is_correct(x, '5'),
                                  *(lambda x, r=r: is_correct('5', x, r) for r in ANSWER_RULES)])
def test_what_is_no_text_is_said(call, given):
    with pytest.raises(ValueError, match='no text: give a text|surrogate pair, which is no character'): call(given)

@pytest.mark.parametrize('given, says', [('~nosuchuser/x', "'~nosuchuser/x' names a user who is not on this machine"),
    (1.5, '1.5 is no path'), (5, '5 is no path'), (b'x', "b'x' is no path"), (['x'], r"\['x'\] is no path"),
    ('a\0b', 'has a character that no path has'),
    ('\ud800', 'has a character that no path has'), ('x'*300, 'has a name that is too long')])
@pytest.mark.parametrize('call', [read_jsonl, lambda p: write_jsonl(p, []), lambda p: load_gsm8k('train', p)])
def test_what_is_no_path_is_said(call, given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says): call(given)
    assert not list(tmp_path.iterdir())

def test_a_place_that_takes_no_file_is_said(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('mine')
    for path, says in ((tmp_path, 'is a folder: give the path of a file in it'), ('/proc/x/y', 'cannot be written'),
                       (tmp_path/'file'/'in', 'cannot be written .File exists.: give another path')):
        with pytest.raises(OSError, match=says): write_jsonl(path, [])
    monkeypatch.setenv('HOME', str(tmp_path))
    assert write_jsonl('~/x.jsonl', [dict(a=1)]) == tmp_path/'x.jsonl' and read_jsonl('~/x.jsonl') == [dict(a=1)]

@pytest.mark.parametrize('n', [-1, 1.5, 'x', None, True])
@pytest.mark.parametrize('make', [make_problems, make_ood, general_texts, agreement_texts, chat_to_select, chat_to_judge])
def test_a_number_that_cannot_be_made_is_said(make, n):
    with pytest.raises(ValueError, match=f'n is {n!r}: ask for a whole number'): make(n)

@pytest.mark.parametrize('row, says', [({'step': 'x'}, "step is 'x', but must be a number"), ({'loss': 1.}, 'row 2 has no step'),
    ({'step': None}, 'row 2 has no step'), ({'step': 1, 'loss': [1]}, r'loss is \[1\]'), ({'step': 1, 'loss': True}, 'loss is True')])
def test_a_log_holds_numbers(row, says, tmp_path):
    good = [dict(step=1, loss=.5, kl=None), dict(step=2)]
    assert read_numbers(write_jsonl(tmp_path/'good', good)) == good
    with pytest.raises(ValueError, match=says): read_numbers(write_jsonl(tmp_path/'x.jsonl', [good[0], row]))

@pytest.mark.parametrize('call, says', [
    (lambda: make_problems(2, difficulty='1'), "no template has difficulty='1'; see"),
    (lambda: make_problems(2, steps='1'), "steps='1'; see"),
    (lambda: make_ood(2, difficulty='1'), "no template has difficulty='1'; there are"),
    (lambda: gold_problem('q', 5, 'i', 's'), 'i: the answer is 5 and no text; write it as text'),
    (lambda: gold_problem(None, '#### 5', 'i', 's'), 'the question is missing or empty'),
    (lambda: gold_problem('q', '\ud800 #### 5', 'i', 's'), 'the answer holds half of a surrogate pair')])
def test_what_was_given_is_shown(call, says):
    with pytest.raises(ValueError, match=says): call()

@pytest.mark.parametrize('equation', ['( 1.0 / 3.0 )', '( 2.0 / 1.0 )'])
def test_an_answer_that_never_ends_in_decimals(equation, tmp_path):
    row = dict(ID='1', Body='A.', Question='How?', Equation=equation, Answer='1/3', Type='x')
    (tmp_path/'SVAMP.json').write_text(json.dumps([row]))
    with pytest.raises(ValueError, match="SVAMP.json, row 1: the answer '1/3' is not a decimal number"): load_svamp(tmp_path)

@pytest.mark.parametrize('name, file, row, says', [
    ('gsm-hard', 'gsmhardv2.jsonl', 'null', 'line 1: a JSON object was expected, not NoneType'),
    ('gsm-hard', 'gsmhardv2.jsonl', '{"input": "x", "target": []}', r'row 1: the answer is \[\]'),
    ('gsm-symbolic', 'GSM_symbolic.jsonl', '{"question": "q", "answer": "5", "solution": null, "original_id": 3}',
     'row 1: the solution is None'),
    ('gsm-plus', 'gsmplus_testmini.jsonl',
     '{"question": "q", "solution": ["####"], "answer": "5", "perturbation_type": "", "seed_question": ""}',
     r"row 1: the solution is \['####'\]")])
def test_a_part_of_another_kind_in_another_set(name, file, row, says, tmp_path):
    (tmp_path/file).write_text(row + '\n')
    with pytest.raises(ValueError, match=says): load_other(name, tmp_path, say=lambda t: None)
