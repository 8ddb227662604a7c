"What a stage refuses before it begins: parameters that contradict each other, and files of earlier stages that are cut or edited."
import json, re, shutil
from dataclasses import asdict
import pytest
from conftest import ROOT
from yfpo.problems import make_problems, read_jsonl, write_jsonl
from yfpo.run import run_here

CPU = ROOT/'nbs'/'paper'/'results'/'cpu'

def stage(name, run, **params): return run_here(ROOT/'nbs'/'paper'/f'stage_{name}.ipynb', run_dir=str(run), **params)

def refused(says, name, run, **params):
    with pytest.raises((ValueError, FileNotFoundError), match=says): stage(name, run, **params)

@pytest.mark.parametrize('params,says', [
    (dict(train_set='gsm8k/test', test_sets=['templates-ood']),
     "train_set is 'gsm8k/test', a test set: use templates or gsm8k/train"),
    (dict(train_set='templates-ood'), 'a test set'),
    (dict(test_sets=['gsm8k/test', 'gsm8k/train']), 'test_sets names gsm8k/train, which is for training: use gsm8k/test')])
def test_training_and_test_questions_stay_apart(tmp_path, params, says): refused(re.escape(says), 'problems', tmp_path, **params)

@pytest.mark.parametrize('family,says', [
    (['yfpo - dppo', 'yfpo - dpo'], "contrast 'yfpo - dppo' of the family is not among CONTRASTS: write one of yfpo - yfpo-random"),
    (['dpo - yfpo'], 'not among CONTRASTS'), (['sft - dpo'], 'not among CONTRASTS'), (['yfpo-dpo'], 'not among CONTRASTS'),
    (['yfpo - yfpo'], 'not among CONTRASTS'),
    (['yfpo-dynamic - yfpo'], 'names no two arms of this run .*: write one of yfpo - yfpo-random')])
def test_a_family_of_contrasts_that_are_none(tmp_path, family, says):
    shutil.copytree(CPU/'samples', tmp_path/'results'/'samples')
    refused(says, 'compare', tmp_path, family=family)
    assert [f.name for f in (tmp_path/'results').iterdir()] == ['samples'], 'nothing is written'

@pytest.mark.parametrize('row,key,value,says', [
    (None, 'correct_numeric', None, 'yfpo-seed0.jsonl, row 1 lacks the column correct_numeric: evaluate that arm again'),
    (3, 'correct_numeric', None, 'row 4 lacks the column correct_numeric'), (3, 'nll_gold', None, 'row 4 lacks the column nll_gold'),
    (0, 'arm', None, 'row 1 lacks the column arm'), (0, 'seed', None, 'row 1 lacks the column seed'),
    (0, 'text', None, 'row 1 lacks the column text'), (2, 'seed', 'x', "row 3: seed is 'x', but must be a whole number, 0 or more"),
    (2, 'correct_numeric', 'no', "row 3: correct_numeric is 'no', but must be true or false"),
    (2, 'nll_gold', float('nan'), 'row 3: nll_gold is nan, but must be a finite number'),
    (2, 'id', [1], r'row 3: id is \[1\], but must be text')])
def test_samples_that_were_edited(tmp_path, row, key, value, says):
    folder = shutil.copytree(CPU/'samples', tmp_path/'results'/'samples')
    rows = read_jsonl(folder/'yfpo-seed0.jsonl')
    for i, r in enumerate(rows):
        if row in (None, i): r.update({key: value}) if value is not None else r.pop(key, None)
    write_jsonl(folder/'yfpo-seed0.jsonl', rows)
    refused(says, 'compare', tmp_path)

def test_no_samples_at_all(tmp_path):
    (tmp_path/'results'/'samples').mkdir(parents=True)
    refused('holds no file of answers: run the `evaluate` stage first', 'compare', tmp_path)
    (tmp_path/'results'/'samples'/'yfpo-seed0.jsonl').write_text('')
    refused('yfpo-seed0.jsonl is empty', 'compare', tmp_path)

@pytest.fixture
def run(tmp_path):
    "Problems and the answers that the stage `responses` would have left"
    ps = make_problems(8, seed=3)
    for name, own in (('pairs', ps[:5]), ('dev', ps[5:])): write_jsonl(tmp_path/'problems'/f'{name}.jsonl', [asdict(p) for p in own])
    write_jsonl(tmp_path/'responses'/'responses.jsonl', [dict(id=p.id, sample=s, text='#### 4', n_tokens=3, finished=True)
                                                         for p in ps for s in (0, 1)])
    return tmp_path

@pytest.mark.parametrize('change,says', [
    (lambda rows: rows + rows[:1], 'it stands there twice'),
    (lambda rows: [{**rows[0], 'id': 'nosuch'}], 'its id is none of the questions'),
    (lambda rows: [{**rows[0], 'id': [1]}], 'its id is none of the questions'),
    (lambda rows: [{'id': rows[0]['id']}], 'its text is missing'),
    (lambda rows: [{**r, 'finished': 'no'} for r in rows],
     'row 1 .*: its finished is neither true nor false; make it again with `yfpo run smoke'),
    (lambda rows: [{**r, 'finished': None} for r in rows], 'its finished is neither'),
    (lambda rows: [{k: v for k, v in r.items() if k != 'finished'} for r in rows], 'its finished is neither'),
    (lambda rows: [{**r, 'sample': None} for r in rows], 'its sample is no whole number'),
    (lambda rows: [{**r, 'sample': '0'} for r in rows], 'its sample is no whole number'),
    (lambda rows: [{k: v for k, v in r.items() if k != 'sample'} for r in rows], 'its sample is no whole number'),
    (lambda rows: [{**r, 'sample': 0} for r in rows], 'it stands there twice'),
    (lambda rows: [], 'lacks 8 of the 8 questions'), (lambda rows: rows[:4], 'lacks 6 of the 8 questions'),
    (lambda rows: rows[:-1], 'lacks 1 of the 8 questions, or some of their samples; make it again with `yfpo run smoke --force responses`')])
def test_responses_that_are_cut_or_edited_make_no_pairs(run, change, says):
    f = run/'responses'/'responses.jsonl'
    write_jsonl(f, change(read_jsonl(f)))
    refused(f'responses.jsonl.*{says}', 'pairs', run)

def test_pairs_need_their_questions(run):
    (run/'problems'/'dev.jsonl').unlink()
    refused(r'dev.jsonl is missing; make it with `yfpo run smoke --until problems`', 'pairs', run)

@pytest.mark.parametrize('name', ['breakage', 'grid', 'overoptimisation', 'zoo'])
def test_parts_are_named_by_all_digits(name):
    "Two learning rates that differ in the seventh digit are two parts"
    assert ':g}' not in (ROOT/'nbs'/'paper'/f'stage_{name}.ipynb').read_text()

def test_a_recipe_that_is_not_there_leaves_no_gap_among_the_experiments():
    with pytest.raises(FileNotFoundError, match='results/nosuch is missing; make it with `yfpo run nosuch`'):
        run_here(ROOT/'nbs'/'paper'/'experiments.ipynb', hard='nosuch')
