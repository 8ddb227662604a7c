"The gate: which setting of DPO wins, when there is none, and where clipping begins."
import json, math, shutil
from dataclasses import asdict
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from conftest import ROOT
from test_launch import ready                                  # noqa: F401, a fixture
from yfpo import trainer
from yfpo.data.files import write_jsonl
from yfpo.data.templates import make_problems
from yfpo.lab.figures import FIGURE_OF, draw_gate
from yfpo.lab.gate import Tried, best_setting, clip_norm, gated_settings, why_closed
from yfpo.lab.publish import run_here
from yfpo.lab.tables import gradient_limit
from yfpo.trainer import YFPOConfig

def tried(accuracy, nll=.1, rate=1e-5): return Tried(rate, .1, 0., accuracy, nll, 1.)

@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), min_size=1), st.integers(0, 10))
def test_the_rule_by_brute_force(rows, start):
    "The winner is open, nothing open beats it, and there is none only if nothing is open"
    found, start = [tried(a/10, l/10) for a, l in rows], tried(start/10)
    winner, open_ = best_setting(found, start), [t for t in found if t.accuracy >= start.accuracy]
    assert (winner is None) == (not open_)
    if winner: assert winner in open_ and all((t.accuracy, -t.nll) <= (winner.accuracy, -winner.nll) for t in open_)

@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5)), min_size=1), st.integers(0, 5))
def test_the_rule_by_likelihood_by_brute_force(rows, start):
    "Where few answers are right, the NLL opens the gate, and accuracy decides between equals only"
    found, start = [tried(a/10, l/10) for a, l in rows], tried(1., start/10)
    winner, open_ = best_setting(found, start, by='nll'), [t for t in found if t.nll <= start.nll]
    assert (winner is None) == (not open_)
    if winner: assert winner in open_ and all((-t.nll, t.accuracy) <= (-winner.nll, winner.accuracy) for t in open_)

def test_a_setting_whose_likelihood_is_lost_is_not_chosen():
    assert best_setting([tried(.9, math.nan), tried(.8)], tried(.5)) == tried(.8) and best_setting([tried(.9, math.inf)], tried(.5)) is None
    with pytest.raises(ValueError, match='no setting was tried'): best_setting([], tried(.5))
    assert best_setting([tried(.9, math.nan), tried(.1, .1)], tried(.5), by='nll') == tried(.1, .1)
    assert 'nan nats' in why_closed([tried(.9, math.nan)], tried(.5), by='nll')
    with pytest.raises(ValueError, match="by is 'loss'; use 'accuracy' or 'nll'"): best_setting([tried(.5)], tried(.5), by='loss')

@given(st.lists(st.floats(.1, 100), min_size=1, max_size=60), st.sampled_from([0., .1, .25, .5]))
def test_clipping_is_the_exception(norms, share):
    at = clip_norm(norms, share)
    assert at in norms and sum(x > at for x in norms) <= share*len(norms)
    lower = [x for x in norms if x < at]
    if lower: assert sum(x > max(lower) for x in norms) > share*len(norms), 'the next lower norm clips too many'

def test_norms_that_say_nothing_are_refused():
    for bad in ([], [1., math.nan]):
        with pytest.raises(ValueError, match='gradient norms'): clip_norm(bad)

@pytest.fixture
def stage(ready):
    "The stage's own cells on the tiny model"
    write_jsonl(ready/'problems'/'dev.jsonl', [asdict(p) for p in make_problems(4, seed=2)])
    def go(**kw):
        return run_here(ROOT/'nbs'/'paper'/'stages'/'gate.ipynb', **{**dict(run_dir=str(ready), precision='float32', learning_rates=[1e-4],
                                                                            train=dict(
            num_train_epochs=1., per_device_train_batch_size=2)), **kw})
    return ready, go

def test_the_stage_writes_what_the_arms_train_with(stage):
    run, go = stage
    names = go(likelihoods=[0., .5])
    chosen, found = json.loads((run/'gate'/'chosen.json').read_text()), names['found']
    best = best_setting(found, names['start'])
    assert chosen == best.chosen() and chosen['clip'] == best.clip and len(found) == 2
    assert [t.likelihood for t in found] == [0., .5] and all(0 < t.clip < 1e3 for t in found) and not list((run/'gate').glob('*/model'))
    log = run_here(ROOT/'nbs'/'paper'/'stages'/'train.ipynb', run_dir=str(run), arm='dpo', gated=True, precision='float32',
                   train=dict(num_train_epochs=1., per_device_train_batch_size=2))['log']
    assert max(r['learning_rate'] for r in log) <= chosen['learning_rate'] and max(r['grad_norm']
                                                                                   for r in log) < chosen['clip']*1.5

def test_the_neuron_term_has_room_before_clipping():
    "Two gradients at a right angle: the limit grows to the hypotenuse. A recipe's rate gives way to the gate's, its own limit does not"
    got = gated_settings(dict(num_train_epochs=2., learning_rate=1.), tried(.5).chosen(), dose=.75)
    assert got == dict(num_train_epochs=2., learning_rate=1e-5, beta=.1, max_grad_norm=1.25)
    assert gated_settings(dict(max_grad_norm=1e3), tried(.5).chosen(), dose=.75)['max_grad_norm'] == 1e3
    with pytest.raises(ValueError, match='is of another version: run the recipe again with `--until gate`'):
        gated_settings({}, dict(learning_rate=1e-5, max_grad_norm=1.25))

def test_the_stage_can_go_by_the_likelihood(stage, monkeypatch):
    "Accuracy falls to zero, the NLL improves: closed by the one, open by the other"
    run, go = stage
    rows = iter([(1., .3), (0., .2)])
    monkeypatch.setattr('yfpo.evaluate.evaluate_model', lambda *a, **k: [dict(zip(('correct_numeric', 'nll_gold'), next(rows)))])
    assert go(likelihoods=[0.], by='nll')['best'].nll == .2 and (run/'gate'/'chosen.json').exists()

def test_a_closed_gate_ends_with_a_sentence(stage, monkeypatch):
    run, go = stage
    right = iter([1., 0.])
    monkeypatch.setattr('yfpo.evaluate.evaluate_model', lambda *a, **k: [dict(correct_numeric=next(right), nll_gold=.1)])
    with pytest.raises(ValueError, match=r'closed: none of 1 settings .* \(100.0% of dev questions solved\), the best is 0.0% of'):
        go(likelihoods=[0.])
    assert not (run/'gate'/'chosen.json').exists() and len((run/'results'/'gate.csv').read_text().splitlines()) == 3
    assert '60.0%' in why_closed([tried(.5)], tried(.6))

def test_answers_of_two_warm_starts_count_together(stage, monkeypatch):
    "One start is spoilt and the other mended: open together, closed by the first alone; each has its pairs and an order of its own"
    run, go = stage
    for x in ('sft', 'pairs'): shutil.copytree(run/x, run/'warm1'/x)
    rows, seeds, train = iter([1., 0., 0., 1.]), [], trainer.train_yfpo
    monkeypatch.setattr('yfpo.evaluate.evaluate_model', lambda *a, **k: [dict(correct_numeric=next(rows), nll_gold=.1)])
    def noted(*args, seed, **kw): seeds.append((seed, Path(args[4]).parent.name)); return train(*args, seed=seed, **kw)
    monkeypatch.setattr(trainer, 'train_yfpo', noted)
    names = go(likelihoods=[0.], starts=2, seed=3)
    assert names['best'].accuracy == .5 == names['start'].accuracy
    assert seeds == [(3, '0.0001-0.1-0.0'), (4, '0.0001-0.1-0.0-warm1')]
    assert pd.read_csv(run/'results'/'gate.csv').n.tolist() == [8, 8]
    rows = iter([1., 0.])
    with pytest.raises(ValueError, match='the gate is closed'): go(likelihoods=[0.], seed=3)
    with pytest.raises(FileNotFoundError, match='warm2/sft/model is missing'): go(likelihoods=[0.], starts=3)

def test_steps_are_clipped_beyond_the_default_of_the_trainer():
    "Where a recipe says nothing of it, the table of doses takes the same limit"
    said = dict(stages={'train-dpo-seed0': dict(params=dict(train={}))})
    assert gradient_limit(said) == YFPOConfig('out').max_grad_norm

def test_behind_a_gate_the_limit_is_that_of_the_chosen_setting():
    "The norm that a tenth of DPO's steps exceed, and room for the neuron term at a right angle"
    said = dict(stages={'train-dpo-seed0': dict(params=dict(train={}, gated=True, dose=.75))})
    assert gradient_limit(said, pd.DataFrame(dict(clip=[8., 4.], chosen=[0, 1]))) == 4*1.25

def test_questions_that_several_warm_starts_answer_count_once(tmp_path):
    "The bars of the figure are those of 200 questions, and not of 600 answers"
    rows = pd.DataFrame(dict(learning_rate=[0, 1e-5], beta=[0, .1], likelihood=0., n=600, accuracy=[.6, .62], nll=.05, clip=0.,
                             chosen=[0, 1]))
    def bar(fig): return np.ptp(fig.axes[0].containers[0].lines[2][0].get_segments()[0][:, 1])
    one = bar(draw_gate(rows.assign(n=200)))
    assert bar(draw_gate(rows, starts=3)) == one > 1.5*bar(draw_gate(rows))
    known = json.loads((ROOT/'nbs'/'paper'/'results'/'which-neurons'/'manifest.json').read_text())
    for starts in (1, 3):
        known['stages']['gate']['params'] = dict(starts=starts) if starts > 1 else {}
        (tmp_path/'manifest.json').write_text(json.dumps(known))
        rows.assign(n=200*starts).to_csv(tmp_path/'gate.csv', index=False)
        assert bar(FIGURE_OF['gate'][0](tmp_path)) == one
