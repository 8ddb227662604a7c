"Committed results: the main result has its form, and every table and figure comes out of the results files byte for byte."
import importlib, json, re, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from conftest import ROOT, answers_in
from yfpo.lab.publish import run_here
from yfpo.lab.recipes import read_recipe

ALL = sorted(p.parent.name for p in (ROOT/'nbs'/'paper'/'results').glob('*/manifest.json'))
RECIPES = [r for r in ALL if (ROOT/'nbs'/'paper'/'results'/r/'main.csv').exists()]     # bench trains nothing

def test_the_recipes_are_there(): assert {'first-look', 'which-neurons', 'gsm8k-cpu'} <= set(RECIPES)

@pytest.mark.parametrize('recipe', RECIPES)
def test_main_result_and_manifest(recipe):
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    main, manifest = pd.read_csv(folder/'main.csv'), json.loads((folder/'manifest.json').read_text())
    assert list(main.columns) == ['arm', 'seed', 'set', 'n', 'metric', 'value', 'low', 'high']
    assert set(main.arm) == {'base', 'sft', *manifest['arms']} and main.value.notna().all()
    assert {'dpo', 'yfpo', 'yfpo-random'} <= set(manifest['arms'])
    assert manifest['recipe'] == recipe and manifest['git'] and not manifest['git_dirty'] and manifest['versions']['torch']
    assert sum(f.stat().st_size for f in folder.rglob('*') if f.is_file() and f.name != 'report.html') < 8e6
    text = ''.join(f.read_text() for f in folder.rglob('*') if f.suffix in ('.json', '.csv', '.md', '.tex'))
    assert str(ROOT) not in text and '/tmp/' not in text

def test_tolerances_come_from_two_kinds_of_processor():
    "agreement.json is of the committed numbers, of two number formats, and each limit has room for half as much again as was seen"
    from yfpo.lab.publish import _maker, tolerances
    two, limits = json.loads((ROOT/'nbs'/'paper'/'agreement.json').read_text())['first-look'], tolerances()
    assert two['committed']['numbers'] == _maker(ROOT/'nbs'/'paper'/'results'/'first-look')['numbers'] != two['rerun']['numbers']
    assert [two[k]['chosen']['training'].split(':')[0] for k in ('committed', 'rerun')] == ['bfloat16', 'float32']
    assert {(r['file'], r['metric']) for r in two['rows']} <= {(f, m) for f in limits for m in limits[f]}
    assert all(1.5*r['largest'] <= limits[r['file']][r['metric']] for r in two['rows']) and any(r['largest'] for r in two['rows'])

@pytest.mark.parametrize('recipe', RECIPES)
def test_main_csv_follows_from_the_answers(recipe):
    "The intervals of main.csv once more, from the per-question files"
    from yfpo.evaluate import summarise
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    rows = answers_in(folder/'samples')
    key = ['arm', 'seed', 'set', 'metric']
    new, old = pd.DataFrame(summarise(rows)).set_index(key), pd.read_csv(folder/'main.csv').set_index(key)
    pd.testing.assert_frame_equal(new.loc[old.index, old.columns], old, rtol=1e-5, check_dtype=False)

@pytest.mark.parametrize('recipe', ALL)
def test_tables_and_figures_come_out_byte_for_byte(recipe, tmp_path):
    folder, copy = ROOT/'nbs'/'paper'/'results'/recipe, tmp_path/recipe
    shutil.copytree(folder, copy)
    before = {f: f.read_bytes() for d in ('tables', 'figures') if (copy/d).exists() for f in (copy/d).iterdir()}
    for f in before: f.unlink()
    r = subprocess.run([Path(sys.executable).parent/'yfpo', 'report', recipe, '--results', copy], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert len(before) > {'bench': 2, 'limits': 4, 'neurons': 8, 'which-share': 8, 'right-or-wrong': 8}.get(recipe, 10)
    assert [f.name for f in before if not f.exists() or f.read_bytes() != before[f]] == []

NAMES = [('figures', 'yfpo.lab.figures', 'FIGURE_OF'), ('tables', 'yfpo.lab.report', 'TABLE_OF')]

@pytest.mark.parametrize('notebook,module,names', NAMES)
def test_every_table_and_figure_has_its_section(notebook, module, names):
    "A heading and a few sentences before the one cell that draws it, in the order of the table of names"
    cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads((ROOT/'nbs'/'paper'/f'{notebook}.ipynb').read_text())['cells']]
    drawn = [(cells[i - 1], m[1]) for i, (kind, s) in enumerate(cells) if kind == 'code' and (m := re.match(r"draw\('([\w-]+)'", s))]
    assert [n for _, n in drawn] == list(getattr(importlib.import_module(module), names))
    assert all(kind == 'markdown' and re.match(r'## .+\n\n\w', s) for (kind, s), _ in drawn)

@pytest.mark.parametrize('notebook,only,there', [
    ('figures', '', ['breakage', 'method', 'neurons']), ('figures', 'method breakage', ['breakage', 'method']), ('tables', '', ['hacks']),
    ('tables', 'hacks', ['hacks'])])
def test_what_the_results_are_there_for_is_drawn(notebook, only, there, tmp_path):
    "The recipe `limits` trains no arms; what it has no results of is said in a line each"
    folder = shutil.copytree(ROOT/'nbs'/'paper'/'results'/'limits', tmp_path/'limits', ignore=shutil.ignore_patterns(notebook))
    names = run_here(ROOT/'nbs'/'paper'/f'{notebook}.ipynb', recipe='limits', results_dir=str(folder), only=only)
    assert sorted({f.stem for f in (folder/notebook).iterdir()}) == there
    if not only: assert names['draw']({'figures': 'training', 'tables': 'main'}[notebook]).data.startswith('*Not drawn: `limits` has no')

@pytest.mark.parametrize('notebook,only,says', [
    ('figures', 'training', 'is missing: make it with `yfpo run limits --until train`'),
    ('tables', 'main', 'main.csv is missing: make it with `yfpo run limits --until compare`'),
    ('tables', 'hack', "only names 'hack': did you mean 'hacks'\\?"), ('figures', 'x', "only names 'x': there are method, ")])
def test_what_is_asked_for_by_name_must_be_there(notebook, only, says, tmp_path):
    folder = shutil.copytree(ROOT/'nbs'/'paper'/'results'/'limits', tmp_path/'limits')
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        run_here(ROOT/'nbs'/'paper'/f'{notebook}.ipynb', recipe='limits', results_dir=str(folder), only=only)

@pytest.mark.parametrize('recipe,seeds', [('first-look', 2), ('which-neurons', 8), ('gsm8k', 3), ('gsm8k-cpu', 3)])
def test_seeds_are_paired_and_the_family_was_declared(recipe, seeds):
    "Every arm has every seed; what the recipe declared is what is corrected, and the numbers follow from the per-question files"
    from yfpo.lab.recipes import read_recipe
    from yfpo.lab.statistics import FAMILY, crossed, over_seeds
    folder, declared = ROOT/'nbs'/'paper'/'results'/recipe, read_recipe(recipe).stages['compare']
    main, table = pd.read_csv(folder/'main.csv'), pd.read_csv(folder/'contrasts.csv')
    trained = main[~main.arm.isin(['base', 'sft'])].groupby('arm').seed.nunique()
    assert (trained >= seeds).all() and json.loads((folder/'manifest.json').read_text())['seeds'] == list(range(trained.max()))
    own = table[table.family]
    family = declared.get('family', list(FAMILY))
    assert own.contrast.tolist() == family and (own.seed == 'all').all()
    assert (own.set == declared['outcome'][0]).all() and (own.metric == declared['outcome'][1]).all()
    assert own.contrast[own.primary].tolist() == family[:1]
    rows = answers_in(folder/'samples')
    arms = {c: c.split(' - ') for c in own.contrast}
    for r in own.itertuples():
        key = dict(accuracy_numeric='correct_numeric').get(r.metric, r.metric)
        values = [{s: {x['id']: float(x[key]) for x in rows if (x['arm'], x['seed'], x['set']) == (a, s, r.set)
                       and key in x} for s in range(seeds)} for a in arms[r.contrast]]
        d = [[values[0][s][q] - values[1][s][q] for q in values[0][s]] for s in range(seeds)]
        again = dict(over_seeds=over_seeds, crossed=crossed)[declared.get('test', 'over_seeds')](d, share=key != r.metric)
        assert [again[k] for k in ('delta', 'low', 'high', 'p', 'mde')] == pytest.approx([r.delta, r.low, r.high, r.p, r.mde], rel=1e-4)
        assert r.boot_low <= r.delta <= r.boot_high and r.p_holm >= r.p and r.n == len(d[0])
    assert {'prose', 'agreement'} <= set(table[table.p_equivalent.notna()].set)

@pytest.mark.parametrize('recipe', ['first-look', 'which-neurons', 'gsm8k-cpu'])
def test_the_test_questions_were_opened_once_and_last(recipe):
    "By the manifest: beside the check for overlaps, evaluation and the page alone opened them, once, an arm's after its training"
    m = json.loads((ROOT/'nbs'/'paper'/'results'/recipe/'manifest.json').read_text())
    steps, evaluated = m['stages'], {l for l in m['stages'] if l.startswith('evaluate-')}
    assert set(m['tests']) == {f"test-{s.split('/')[0]}.jsonl" for s in steps['problems']['params']['test_sets']}
    for name, t in m['tests'].items():
        others = {l for l in steps if l.startswith('pairs') or l == 'browse'}                # pairs compares questions
        assert len(t['sha256']) == 64 and set(t['opened_by']) == evaluated | others, name
        assert t['opened_by'][0].startswith('pairs') and ('browse' not in others or t['opened_by'][-1] == 'browse')
    assert all(steps[l]['runs'] == 1 for l in steps if l in evaluated or l.startswith(('neurons', 'pairs', 'sft')))
    for l in (l for l in evaluated if not l.startswith('evaluate-reference')):
        before = [t for t in steps if t.startswith('train-') and t.endswith(l.removeprefix('evaluate'))]        # one, or one an arm
        assert before and all(steps[t]['finished'] <= steps[l]['finished'] for t in before)
    assert 'select.jsonl' in steps['neurons']['reads'] and not any(f.startswith('test-') for f in steps['compare']['reads'])

def test_a_rerun_of_itself_is_the_same(tmp_path):
    "Every metric of the committed recipes has a tolerance, and a number that moved too far is seen"
    from yfpo.lab.publish import agreement_text
    for recipe in ('first-look', 'which-neurons', 'gsm8k-cpu'):
        folder = ROOT/'nbs'/'paper'/'results'/recipe
        text, same = agreement_text(recipe, folder)
        assert same and 'all are equal' in text
    main = pd.read_csv(folder/'main.csv')
    main.loc[main.metric == 'nll_gold', 'value'] += .04
    for f in ('main.csv', 'contrasts.csv'): shutil.copyfile(folder/f, tmp_path/f)
    main.to_csv(tmp_path/'main.csv', index=False)
    text, same = agreement_text(recipe, tmp_path)
    assert not same and 'off by 0.04 where 0.035 is allowed' in text

@pytest.mark.parametrize('recipe', ['neurons', 'gsm8k-cpu'])
def test_selector_card_is_whole(recipe):
    "Every selector has both ablations, its rank among at least 20 draws, and what pairs and problems say"
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    card = pd.read_csv(folder/'selectors.csv')
    own = card[card['mode'].notna()]
    assert {'attnlrp-contrast', 'gradient-contrast', 'wanda-contrast', 'lape', 'mathneuro', 'value-probe', 'bottom'} <= set(own.selector)
    more = {'relp-top', 'atp-top', 'cp-lrp-contrast', 'logprob-contrast', 'mean-abs-contrast'}
    assert recipe != 'gsm8k-cpu' or more <= set(own.selector)
    assert (own.groupby('selector')['mode'].nunique() == 2).all() and card.pair_accuracy.between(0, 1).all()
    ranked = own[(own['mode'] == 'zero') & ~own.selector.isin(['bottom', 'norm-matched', 'activation-matched'])]
    assert (ranked.draws >= 20).all() and (ranked.p - (1 + ranked.reached)/(1 + ranked.draws)).abs().max() < 1e-5
    assert {.0005, .001, .0025, .005, .01, .02, .05} == set(pd.read_csv(folder/'selector_curves.csv').fraction)

@pytest.mark.parametrize('recipe', RECIPES)
def test_the_audit_has_its_draws_and_the_cards_their_neurons(recipe):
    from yfpo.reward import KINDS_OF_READING
    folder = ROOT/'nbs'/'paper'/'results'/recipe
    audit = pd.read_csv(folder/'audit.csv')
    counts = audit[audit.kind != 'baseline'].groupby(['readout', 'kind']).size().unstack()
    assert len(counts) == (6 if recipe == 'gsm8k-cpu' else len(KINDS_OF_READING))            # that run is older
    assert (counts['layer-matched'] >= 20).all() and (counts['random'] >= 20).all() and (counts['selected'] == 1).all()
    if 'cards' not in read_recipe(recipe).stages: return
    page = (folder/'cards.html').read_text()
    assert page.count('class="card"') >= 8 and '<script' not in page and 'http' not in page.replace('http-equiv', '')

def test_the_follow_up_ended_by_its_rule():
    "The smallest dose that lifts the rewarded margin by 0.25 spreads: by the logs, none; plan.md has their numbers"
    plan, logs = (ROOT/'nbs'/'paper'/'plan.md').read_text(), ROOT/'nbs'/'paper'/'pilots'
    def late(name, key):
        df = pd.read_csv(logs/f'strong-{name}.csv')
        return df[df.step > 16][key].mean()
    above = {d: late(f'yfpo-{d}', 'neurons/margins') - late('dpo', 'neurons/margins') for d in ('0.5', '2', '8')}
    assert all(x < .25 for x in above.values())
    assert 'by {:.2f} spreads at dose 0.5, by {:.2f} at dose 2 and by {:.2f} at dose 8'.format(*above.values()) in plan
    assert f"fell from {late('dpo', 'rewards/margins'):.2f} to {late('yfpo-8', 'rewards/margins'):.2f}" in plan

def test_the_dose_of_gsm8k_follows_from_its_rule():
    "None of the three doses lifts the rewarded margin by 0.25 spreads, so it is 2; plan.md has the numbers of the logs"
    plan, logs = (ROOT/'nbs'/'paper'/'plan.md').read_text(), ROOT/'nbs'/'paper'/'pilots'
    def late(name):
        df = pd.read_csv(logs/f'gsm8k-{name}.csv')
        assert len(df) == 26
        return df[df.step > 13]['neurons/margins'].mean()
    above = {d: late(f'yfpo-{d}') - late('dpo') for d in ('0.5', '2', '8')}
    assert all(x < .25 for x in above.values()) and read_recipe('gsm8k').shared['dose'] == 2.
    assert 'by {:.3f} spreads at dose 0.5, by {:.3f} at dose 2 and by {:.3f} at dose 8'.format(*above.values()) in plan

def test_the_pilot_of_the_second_follow_up():
    "Its dev accuracies and changes of held-out margins are those that plan.md tells"
    plan, logs = (ROOT/'nbs'/'paper'/'plan.md').read_text(), ROOT/'nbs'/'paper'/'pilots'
    gate = {r['learning_rate']: r for r in json.loads((logs/'hold.json').read_text())['gate']}
    assert (f"DPO answers {100*gate[3e-5]['accuracy']:.1f} % of the dev questions at 3e-5, the warm start {100*gate[0]['accuracy']:.1f} %, "
            f"and {100*gate[1e-4]['accuracy']:.1f} % at 1e-4") in plan
    assert f"rises from {gate[0]['nll']:.3f} to {gate[3e-5]['nll']:.3f} at 3e-5" in plan
    shut = {r['learning_rate']: r for r in json.loads((logs/'hold.json').read_text())['shut gate']['rows']}
    assert (f"DPO at 3e-5 answers {100*shut[3e-5]['accuracy']:.1f} % of the dev questions and the warm start "
            f"{100*shut[0]['accuracy']:.1f} %") in plan
    low = {r['learning_rate']: r for r in json.loads((logs/'hold.json').read_text())['second gate']['rows']}
    assert (f"DPO answers {100*low[1e-5]['accuracy']:.1f} % of the dev questions at 1e-5 and {100*low[2e-5]['accuracy']:.1f} % at 2e-5, "
            f"the warm start {100*low[0]['accuracy']:.1f} %") in plan
    by = pd.read_csv(logs/'hold-effect.csv').pivot_table(index=['run', 'pair'], columns='phase', values='neuron_margin')
    moved = (by.after - by.before).groupby('run').mean()
    assert len(by) == 2*101 and f"by {moved['yfpo-2']:.2f} spreads and DPO by {moved['dpo']:.2f}".replace('-', '\u2212') in plan
    clipped = {a: (pd.read_csv(logs/f'hold-{a}.csv').grad_norm > 23.8).mean() for a in ('yfpo-2', 'dpo')}
    assert abs(clipped['yfpo-2'] - 1/3) < .02 and abs(clipped['dpo'] - 1/30) < .02

def test_the_studies_are_whole():
    "Every arm of every study is there, measured on the same items as its base, and the figures' files are finite"
    folder = ROOT/'nbs'/'paper'/'results'/'what-training-does'
    manifest = json.loads((folder/'manifest.json').read_text())
    assert not manifest['git_dirty'] and {'grid', 'overoptimisation', 'dynamic', 'zoo', 'parts'} <= set(manifest['stages'])
    grid = pd.read_csv(folder/'grid.csv')
    assert {'add-linear', 'add-logistic', 'yoked', 'offset', 'reweight'} <= set(grid.objective) and grid.nll.notna().all()
    for name, base in (('grid', grid.objective == 'dpo'), ('dynamic', None), ('parts', None)):
        rows = pd.read_csv(folder/f'{name}.csv')
        first = rows[base].iloc[0] if base is not None else rows.iloc[0]
        assert first.nll_d == 0 and first.phi_d == 0 and (rows.nll_low <= rows.nll_d).all() and (rows.nll_d <= rows.nll_high).all()
    assert set(pd.read_csv(folder/'dynamic.csv').arm) == {'dpo', 'static', 'dynamic', 'random', 'oracle'}
    assert set(pd.read_csv(folder/'zoo.csv').method) == {'sft', 'simpo', 'cpo', 'orpo', 'kto', 'grpo'}
    sweep = pd.read_csv(folder/'overoptimisation.csv')
    assert sweep.weight.min() == 0 and sweep.weight.max() >= 100 and sweep.kl_per_token.notna().all()
    assert sum(f.stat().st_size for f in folder.rglob('*') if f.is_file()) < 5e6

def test_the_limits_are_whole():
    "Every trick under every read-out, before and after; three arms at every learning rate, all compared with the untrained model"
    folder = ROOT/'nbs'/'paper'/'results'/'limits'
    hacks, breakage = pd.read_csv(folder/'hacks.csv'), pd.read_csv(folder/'breakage.csv')
    assert not json.loads((folder/'manifest.json').read_text())['git_dirty']
    assert set(hacks.trick) == {'digits shuffled', 'calculation repeated', 'weights rescaled'} and hacks.readout.nunique() == 6
    assert (hacks.groupby(['readout', 'trick']).model.nunique() == 2).all() and (hacks.low <= hacks.gain).all()
    own = hacks[(hacks.trick == 'weights rescaled') & (hacks.readout != 'paper-literal')]
    assert own.gain.abs().max() < 1e-4, 'no default read-out is moved by the rescaling'
    trained = breakage[breakage.learning_rate > 0]
    assert set(trained.arm) == {'dpo', 'yfpo', 'yfpo-random'} and (trained.groupby('arm').learning_rate.nunique() >= 3).all()
    assert breakage.iloc[0].arm == 'reference' and breakage.iloc[0].nll_d == 0 and (trained.nll_low <= trained.nll_d).all()

def test_the_benchmark_says_what_was_asked_of_it():
    folder = ROOT/'nbs'/'paper'/'results'/'bench'
    s = json.loads((folder/'summary.json').read_text())
    for k in ('step_ratio_fp32', 'step_ratio_best', 'reward_overhead', 'relevance_ratio', 'relevance_vs_lxt_loop', 'generation_ratio'):
        assert s[k]['low'] <= s[k]['median'] <= s[k]['high'] and s[k]['rounds'] >= 2, k
    assert 0 < s['peak_memory_ratio']['ratio'] and s['hardware']['cores'] and s['versions']['lm_eval']
    assert s['loss_difference']['worst'] < 1e-4 and s['loss_difference']['moved'] > 1e-3 and len(s['loss_difference']['batches']) >= 5
    assert s['generation_identical']['same'] >= .95*s['generation_identical']['of']
    assert abs(s['exponents']['neurons in the set']['median']) < .1, 'what a step costs does not grow with the set'
    assert not json.loads((folder/'manifest.json').read_text())['git_dirty']

def test_many_answers_are_packed_and_read_as_before(tmp_path):
    "Beyond a megabyte; the same answers give the same bytes; a torn file is refused"
    from yfpo.evaluate import read_samples
    from yfpo.lab.publish import pack_answers
    from yfpo.lab.results import read_results
    source = ROOT/'nbs'/'paper'/'results'/'first-look'/'samples'
    for name in ('one', 'other'): shutil.copytree(source, tmp_path/name/'samples')
    pack_answers(tmp_path/'one'/'samples')
    assert {f.suffix for f in (tmp_path/'one'/'samples').iterdir()} == {'.jsonl'}, 'they are few'
    for name in ('one', 'other'): pack_answers(tmp_path/name/'samples', beyond=1e4)
    packed, other = (sorted((tmp_path/name/'samples').iterdir()) for name in ('one', 'other'))
    assert [f.read_bytes() for f in packed] == [f.read_bytes() for f in other] and {f.suffix for f in packed} == {'.gz'}
    assert read_results(tmp_path/'one', 'answers') == read_samples(tmp_path/'one'/'samples') == read_samples(source) == answers_in(source)
    packed[0].write_bytes(packed[0].read_bytes()[:-9])
    for torn in (packed[0].read_bytes()[:-9], b'{}'):
        packed[0].write_bytes(torn)
        with pytest.raises(ValueError, match='seed0.jsonl.gz is not a whole gzip file; make it'): read_samples(tmp_path/'one'/'samples')
