"Questions of plain knowledge: the list, its readers, both scores by a second way and by lm-evaluation-harness, and a run that asks them"
import json, re, subprocess, sys
from collections import Counter
from pathlib import Path
import pytest, torch
from conftest import ROOT
from yfpo.beyond.knowledge import chance, knowledge_questions, knowledge_rows
from yfpo.data.files import write_jsonl
from yfpo.data.templates import read_texts
from yfpo.evaluate import summarise

ROWS = read_texts('knowledge.jsonl')

def test_the_list():
    "Balanced letters and topics, no mathematics, nothing twice, and no rule of thumb that finds the right choice"
    asked, own = knowledge_questions(), [r['choices']['text'] for r in ROWS]
    assert len(asked) >= 100 and {len(q['choices']) for q in asked} == {4} and chance(asked) == .25
    assert set(Counter(r['answerKey'] for r in ROWS).values()) == {len(ROWS)//4}
    assert set(Counter(r['topic'] for r in ROWS).values()) == {len(ROWS)//12} and len({r['topic'] for r in ROWS[:12]}) == 12
    assert len({r['id'] for r in ROWS}) == len({r['question'] for r in ROWS}) == len(ROWS)
    assert all(len({t.lower() for t in texts}) == 4 and all(t == t.strip() for t in texts) for texts in own)
    words = ' '.join(t for r in ROWS for t in (r['question'], *r['choices']['text'])).lower()
    assert not re.search(r'\d|\b(plus|minus|times|sum|twice|half|number|count|how (many|much))\b', words)
    for best in (max, min):
        found = sum(best(q['choices'], key=len) == q['choices'][q['right']] for q in asked)
        assert found < .4*len(asked), best
    said = [q for q in asked if q['choices'][q['right']].lower() in q['question'].lower()]
    assert not said, said

ARC = dict(id='Mercury_1', question='Which is a metal?', choices=dict(text=['wood', 'iron', 'wool'], label=['1', '2', '3']), answerKey='2')

def test_a_file_in_the_form_of_arc(tmp_path):
    five = dict(ARC, id='x', choices=dict(text=list('abcde'), label=list('ABCDE')), answerKey='E')
    got = knowledge_questions(path=write_jsonl(tmp_path/'arc.jsonl', [ARC, five]))
    assert got == [dict(id='Mercury_1', question='Which is a metal?', choices=['wood', 'iron', 'wool'], right=1),
                   dict(id='x', question='Which is a metal?', choices=list('abcde'), right=4)]
    assert chance(got) == pytest.approx((1/3 + 1/5)/2) and knowledge_questions(1, tmp_path/'arc.jsonl') == got[:1]
    with pytest.raises(ValueError, match='arc.jsonl holds 2 questions'): knowledge_questions(3, tmp_path/'arc.jsonl')
    (tmp_path/'none.jsonl').write_text('')
    with pytest.raises(ValueError, match='none.jsonl holds 0 questions'): knowledge_questions(path=tmp_path/'none.jsonl')

@pytest.mark.parametrize('row,says', [
    (dict(ARC, question=' '), 'no text as its question'), (dict(ARC, choices=['a', 'b']), 'no choices with text and label'),
    (dict(ARC, choices=dict(text=['a', 3], label=['1', '2'])), 'no choices with text and label'),
    (dict(ARC, choices=dict(text=['a', 'a'], label=['1', '2'])), 'no two different choices'),
    (dict(ARC, choices=dict(text=['a'], label=['2'])), 'no two different choices'),
    (dict(ARC, choices=dict(text=['a', 'b'], label=['2'])), 'other numbers of texts and labels'),
    (dict(ARC, answerKey='4'), 'an answerKey that is none of its labels')])
def test_rows_that_are_no_question(tmp_path, row, says):
    with pytest.raises(ValueError, match=f'own.jsonl, row 2 has {says}.*: give question, choices'):
        knowledge_questions(path=write_jsonl(tmp_path/'own.jsonl', [ARC, row]))

def test_both_scores_by_a_second_way(tiny):
    model, tok = tiny
    asked = knowledge_questions(8)
    def logp(prompt, text):
        ids = tok(prompt, add_special_tokens=False).input_ids; whole = ids + tok(text, add_special_tokens=False).input_ids
        with torch.no_grad(): lp = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        return sum(lp[t-1, whole[t]].item() for t in range(len(ids), len(whole)))
    rows = knowledge_rows(model, tok, asked, arm='a', seed=3)
    for r, q in zip(rows, asked, strict=True):
        own = [logp(f"Question: {q['question']}\nAnswer:", f' {c}') for c in q['choices']]
        norm, k = [s/len(c) for s, c in zip(own, q['choices'])], q['right']
        assert r['knows_margin'] == pytest.approx(own[k] - max(own[:k] + own[k+1:]), abs=1e-3)
        assert r['knows'] == (max(own) == own[k]) and r['knows_norm'] == (max(norm) == norm[k])
        assert (r['id'], r['arm'], r['seed'], r['set']) == (q['id'], 'a', 3, 'knowledge')
    assert {r['knows'] for r in rows} == {True, False} and any(r['knows'] != r['knows_norm'] for r in rows)
    main = {r['metric']: r['value'] for r in summarise(rows)}
    assert main == dict(knowledge=sum(r['knows'] for r in rows)/8, knowledge_norm=sum(r['knows_norm'] for r in rows)/8,
                        knowledge_margin=pytest.approx(sum(r['knows_margin'] for r in rows)/8))

def test_a_tie_is_wrong(tiny, monkeypatch):
    monkeypatch.setattr('yfpo.lm.packing.shared_logprobs', lambda m, ex, *a: [torch.zeros(1) for _ in ex])
    assert not any(r['knows'] or r['knows_norm'] for r in knowledge_rows(*tiny, knowledge_questions(3)))

def command():
    "The command that the page of protocols shows"
    cells = json.loads((ROOT/'nbs'/'beyond'/'07_protocols.ipynb').read_text())['cells']
    text = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown' and 'lm_eval run' in ''.join(c['source']))
    return text.split('```')[1].replace('\\\n', ' ').split()

def test_the_harness_from_a_shell(tiny, tmp_path):
    "The command on the page, on a saved model and a local file: both of the harness's scores are ours"
    pytest.importorskip('lm_eval')
    from yfpo.beyond.protocols import save_task
    model, tok = tiny
    model.save_pretrained(tmp_path/'MODEL'); tok.save_pretrained(tmp_path/'MODEL'); (tmp_path/'tasks').mkdir()
    assert save_task(tmp_path/'tasks', 'arc_easy', test=write_jsonl(tmp_path/'q.jsonl', ROWS)) == 'arc_easy_here'
    words = command()
    assert words[:2] == ['lm_eval', 'run'] and '--limit' in words
    words = [w.replace('pretrained=MODEL', 'pretrained=MODEL,max_length=1024') for w in words]
    got = subprocess.run([sys.executable, '-m', 'lm_eval', *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    found, = (json.loads(f.read_text())['results']['arc_easy_here'] for f in (tmp_path/'scores').rglob('results_*.json'))
    n = int(words[words.index('--limit') + 1])
    rows = knowledge_rows(model, tok, knowledge_questions(n))
    assert found['acc,none'] == pytest.approx(sum(r['knows'] for r in rows)/n)
    assert found['acc_norm,none'] == pytest.approx(sum(r['knows_norm'] for r in rows)/n)

def test_a_task_needs_its_files(tmp_path):
    pytest.importorskip('lm_eval')
    from yfpo.beyond.protocols import save_task
    with pytest.raises(FileNotFoundError, match='in the form of the set of arc_easy'): save_task(tmp_path, 'arc_easy', test=tmp_path/'no')
    with pytest.raises(ValueError, match="no task 'arc'"): save_task(tmp_path, 'arc', test=tmp_path/'no.jsonl')

def test_it_stands_in_the_table_of_what_should_not_change(tmp_path):
    "Samples of three arms become rows of the comparison, a line of the table, and its caption names chance and ceiling"
    import pandas as pd
    from test_stages import CPU, stage
    from yfpo.lab.report import TABLE_OF
    from yfpo.lab.tables import harm_table
    results = tmp_path/'results'
    for f in sorted((CPU/'samples').glob('*.jsonl')):
        rows = [json.loads(l) for l in f.read_text().splitlines()]
        arm, seed = rows[0]['arm'], rows[0]['seed']
        right = [i % 8 != 0 or arm == 'sft' for i in range(40)]
        write_jsonl(results/'samples'/f.name, rows + [dict(arm=arm, seed=seed, set='knowledge', id=f'q{i}', knows=x, knows_norm=x,
                                                           knows_margin=1. if x else -1.) for i, x in enumerate(right)])
    declared = json.loads((CPU/'manifest.json').read_text())['stages']['compare']['params']
    stage('compare', tmp_path, **{k: v for k, v in declared.items() if k in ('family', 'outcome', 'test')}, n_boot=50)
    df = pd.read_csv(results/'contrasts.csv')
    own = df[(df.set == 'knowledge') & (df.metric == 'knowledge') & (df.contrast == 'dpo - sft')]
    assert len(own) and (own.delta == -.125).all() and own.p_equivalent.notna().all()
    shown = harm_table(df, dict(nll_text=.05, choice_accuracy=.05, knowledge=.05))
    line = shown[(shown.probe == 'plain knowledge') & (shown.contrast == 'DPO minus SFT')]
    assert line.measure.tolist() == ['right answer, points'] and line.n.iloc[0] == '40'
    assert line.difference.iloc[0].startswith('**-12.5** [')
    (results/'manifest.json').write_text((CPU/'manifest.json').read_text())
    make = TABLE_OF['main'][0]
    assert 'guessing answers 25 %, and the ceiling is 100 %' in make(results)['harm'][1]
    assert 'guessing' not in make(CPU)['harm'][1]
