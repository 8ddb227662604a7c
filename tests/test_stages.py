"What a stage refuses before it begins: parameters that contradict each other, and files of earlier stages that are cut or edited."
import json, re, shutil
from dataclasses import asdict
import pytest
from conftest import ROOT
from yfpo.data.templates import make_problems
from yfpo.data.files import read_jsonl, write_jsonl
from yfpo.lab.publish import run_here

CPU = ROOT/'nbs'/'paper'/'results'/'first-look'

def stage(name, run, **params): return run_here(ROOT/'nbs'/'paper'/'stages'/f'{name}.ipynb', run_dir=str(run), **params)

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
    (tmp_path/'sft'/'model').mkdir(parents=True)
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
    (lambda rows: rows[:-1], 'lacks 1 of the 8 questions, or some of their samples; make it again with `yfpo run smoke --force')])
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
    assert ':g}' not in (ROOT/'nbs'/'paper'/'stages'/f'{name}.ipynb').read_text()

def test_a_recipe_that_is_not_there_leaves_no_gap_among_the_experiments():
    with pytest.raises(FileNotFoundError, match='results/nosuch is missing; make it with `yfpo run nosuch`'):
        run_here(ROOT/'nbs'/'paper'/'experiments.ipynb', real='nosuch')

@pytest.fixture(scope='module')
def selected(tmp_path_factory, tiny):
    "A run whose neurons were chosen from relevances that were drawn"
    import torch
    from yfpo.lm.models import save_model
    from yfpo.neurons import contrast_set, model_signature
    from yfpo.relevance import Relevance
    run, (net, tokenizer), g = tmp_path_factory.mktemp('run'), tiny, torch.Generator().manual_seed(0)
    shape = tuple(model_signature(net)[k] for k in ('layers', 'width'))
    cap, gen = (Relevance(*(torch.randn(*s, generator=g) for s in (shape, (2, *shape), shape, shape)), n=4) for _ in range(2))
    save_model(net, tokenizer, run/'sft'/'model')
    cap.save(run/'neurons'/'capability.safetensors'); gen.save(run/'neurons'/'general.safetensors')
    s = contrast_set(cap, gen, net, k=.1, universal=.001, per_layer=.2)
    s.save(run/'neurons'/'selected')
    for name, ps in (('dev', make_problems(4, seed=3)), ('select', make_problems(4, seed=4)), ('test-templates', make_problems(3, seed=5))):
        write_jsonl(run/'problems'/f'{name}.jsonl', [asdict(p) for p in ps])
    for name in ('train', 'dev'): write_jsonl(run/'pairs'/f'{name}.jsonl', [])
    return run

def test_mathematics_is_contrasted_with_chat_too(selected, tmp_path):
    "The set is another one, says so, and the causal study scores solutions, prose and chat answers"
    import pandas as pd
    from yfpo.neurons import NeuronSet
    run = shutil.copytree(selected, tmp_path/'run')
    sets = {}
    for contrast in ('prose', 'chat'):
        stage('neurons', run, contrast=contrast, n_general=8)
        assert json.loads((run/'results'/'neurons.json').read_text())['contrast'] == contrast
        sets[contrast] = NeuronSet.load(run/'neurons'/'selected')
    assert sets['prose'] != sets['chat']
    stage('causal', run, n_texts=2, n_draws=1, fractions=[.1])
    df = pd.read_csv(run/'results'/'ablation.csv')
    assert set(df.text) == {'math', 'general', 'chat'} and (df.groupby(['set', 'draw', 'mode', 'fraction']).text.nunique() == 3).all()
    assert (df.n == 2).all()
    refused("contrast.* 'chats'.* did you mean 'chat'", 'neurons', run, contrast='chats')
    refused('^only 48 of 60 different chat answers are there; ask for fewer$', 'neurons', run, contrast='chat', n_general=60)

def meta(change):
    def f(run):
        path = run/'neurons'/'selected'/'neurons.json'
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return f

def cut(name): return lambda run: (run/'neurons'/name).write_bytes((run/'neurons'/name).read_bytes()[:100])

@pytest.mark.parametrize('edit,says', [
    (meta(lambda m: {k: v for k, v in m.items() if k != 'k'}), 'names None as its k, where a share is needed: select the neurons again'),
    (meta(lambda m: {k: v for k, v in m.items() if k != 'universal'}), 'names None as its universal'),
    (meta(lambda m: {k: v for k, v in m.items() if k != 'per_layer'}), 'names None as its per_layer'),
    (meta(lambda m: {**m, 'k': 'x'}), "names 'x' as its k"),
    (meta(lambda m: {**m, 'k': .2}), 'is not the one that its relevances and settings give'),
    (cut('capability.safetensors'), 'capability.safetensors is cut or damaged'),
    (lambda run: (run/'neurons'/'capability.safetensors').unlink(), 'capability.safetensors is missing; make it with `yfpo run smoke'),
    (lambda run: (run/'neurons'/'general.safetensors').unlink(), 'is not the one that its relevances')])
def test_neurons_that_do_not_say_how_they_were_chosen(selected, tmp_path, edit, says):
    run = shutil.copytree(selected, tmp_path/'run')
    edit(run)
    refused(says, 'causal', run, n_texts=1, n_draws=1)

@pytest.mark.parametrize('name,params,says', [
    ('browse', dict(arms_read=['yfp']), "arms_read names 'yfp', which was not trained: there are sft, dpo, dpo-diluted, yfpo, "),
    ('browse', dict(arms_read=['base']), "arms_read names 'base'"), ('browse', dict(arms_read=['../x']), "arms_read names '../x'"),
    ('selectors', dict(methods=['gradient']), 'methods lacks attnlrp, which the controls and the curves need: name it there'),
    ('selectors', dict(methods=['attnlrp'], curve_methods=['wanda']), 'methods lacks wanda'),
    ('faithfulness', dict(methods=['gradient']), 'methods lacks attnlrp, by which the relevant neurons are drawn'),
    ('faithfulness', dict(n_neurons=100000), r'n_neurons is 100000, but the model has \d+: give at most that'),
    ('stability', dict(n_other=3, sizes=[2]), 'sizes and n_other ask for 6 held-out problems, but there are 4: lower one of them'),
    ('stability', dict(sizes=[5], n_other=1), 'ask for 5 selection problems, but there are 4'),
    ('bench_scaling', dict(widths=[33]), 'widths has 33, but the models have four heads of an even size: give multiples of 8')])
def test_settings_that_contradict_each_other(selected, name, params, says): refused(says, name, selected, **params)

@pytest.mark.parametrize('change,says', [(lambda rows: rows[:1], 'lacks 2 of the 3 questions'),
                                         (lambda rows: [{k: v for k, v in r.items() if k != 'text'} for r in rows], 'its text is missing')])
def test_answers_that_are_cut_are_not_browsed(selected, tmp_path, tiny, change, says):
    from yfpo.neurons import NeuronSet
    from yfpo.lm.responses import encode
    from yfpo.reward import fit_examples
    run, (net, tok) = shutil.copytree(selected, tmp_path/'run'), tiny
    stats, _ = fit_examples(net, encode(tok, ['a b c d', 'e f g h']), tok.pad_token_id, NeuronSet.load(run/'neurons'/'selected'))
    stats.save(run/'evaluate'/'reference')
    rows = [dict(id=p['id'], sample=0, text='#### 4', n_tokens=3, finished=True) for p in read_jsonl(run/'problems'/'test-templates.jsonl')]
    write_jsonl(run/'evaluate'/'sft-seed0'/'templates.jsonl', change(rows))
    refused(f'templates.jsonl.*{says}', 'browse', run, arms_read=['sft'])
    assert not (run/'results'/'questions.jsonl').exists()

@pytest.mark.parametrize('dtypes', [['bfloat16'], ['bfloat16', 'float32']])
def test_the_summary_takes_a_type_that_was_timed(tmp_path, dtypes):
    "float32 where there is one, else the first"
    bench = ROOT/'nbs'/'paper'/'results'/'bench'
    for name in ('step', 'relevance', 'generation', 'scaling', 'losses'):
        text = (bench/f'bench_{name}.json').read_text()
        own = json.loads(text if 'float32' in dtypes else text.replace('float32', 'bfloat16'))
        write_jsonl(tmp_path/'results'/f'bench_{name}.json', [{**own, 'dtypes': dtypes}])
    made = stage('bench_summary', tmp_path, starts=1, drawn='bench')['summary']
    ratios = json.loads((tmp_path/'results'/'bench_step.json').read_text())['ratios']['other']
    assert made['step_ratio_fp32'] == ratios[f"step_ratio_{'float32' if 'float32' in dtypes else 'bfloat16'}"]

@pytest.mark.parametrize('broken,fails', [('', set()), ('rule', {'T3 value half'}),
                                          ('loss', {'weight 0 is DPO: losses', 'weight 0 is DPO: weights', 'shared prompts: losses'})])
def test_the_device_stage_sees_what_does_not_hold(tmp_path, monkeypatch, broken, fails):
    from yfpo import relevance
    from yfpo.trainer import YFPOTrainer
    if broken == 'rule': monkeypatch.setitem(relevance.FACTORS, 'value', 1)
    if broken == 'loss': monkeypatch.setattr(YFPOTrainer, 'compute_loss', lambda self, *a, f=YFPOTrainer.compute_loss,
                                             **k: 1.01*f(self, *a, **k))
    rows = stage('device', tmp_path, dtypes=['float32'])['rows']
    assert {r['check'] for r in rows if not r['holds']} == fails and len(rows) == 11
    assert (tmp_path/'results'/'device.csv').exists() and {r['limit'] for r in rows} == {0., 1e-4, 2e-5}

def test_the_explorer_of_a_run(selected, tmp_path):
    run = shutil.copytree(selected, tmp_path/'run')
    stage('explorer', run, n_questions=1, max_new_tokens=4)
    text = (run/'results'/'explorer.html').read_text()
    assert text.count('<article class="card">') == 4 and '"four times"' in text and 'Neurons turned down and up: smoke' in text
    (run/'neurons'/'selected'/'neurons.safetensors').unlink()
    refused('neurons', 'explorer', run)

def test_knowledge_is_asked_where_a_recipe_wants_it(selected, tmp_path):
    "Each arm's own rows, the same questions for all; none is asked by default"
    import pandas as pd
    from yfpo.data.pairs import pairs_from_corruption
    run = shutil.copytree(selected, tmp_path/'run')
    write_jsonl(run/'pairs'/'dev.jsonl', pairs_from_corruption(make_problems(3, seed=6))[0])
    for n in (0, 5):
        stage('evaluate', run, max_new_tokens=2, n_nll=1, n_prose=1, n_choices=1, n_knowledge=n)
        own = {arm: [r for r in read_jsonl(run/'results'/'samples'/f'{arm}-seed0.jsonl') if r['set'] == 'knowledge']
               for arm in ('base', 'sft')}
        assert [r['id'] for r in own['base']] == [r['id'] for r in own['sft']] and len(own['sft']) == n
    main = pd.read_csv(run/'results'/'eval'/'sft-seed0.csv')
    assert set(main.metric[main.set == 'knowledge']) == {'knowledge', 'knowledge_norm', 'knowledge_margin'}
    refused('holds 120 questions: ask for 1 to that many', 'evaluate', run, max_new_tokens=2, n_knowledge=121)
