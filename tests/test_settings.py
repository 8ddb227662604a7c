"A setting has one home, a field of a dataclass: functions take it by name, help tells it, and a mistyped one is refused."
import importlib, inspect
from dataclasses import MISSING, fields, is_dataclass
import pytest
from fastcore.docments import docments
from test_imports import ORDER
from yfpo.beyond.methods import NeuronReward
from yfpo.beyond.protocols import protocol_rows
from yfpo.data.pairs import PairSettings, pairs_from_corruption, pairs_from_samples
from yfpo.data.templates import make_problems
from yfpo.beyond.votes import Repeated, sample_rows
from yfpo.evaluate import Evaluation, evaluate_model
from yfpo.lm.decoding import completions
from yfpo.lm.responses import generate
from yfpo.lm.sampling import Decoding, Sampling

def own(module): return [x for x in vars(module).values() if getattr(x, '__module__', '') == module.__name__]

LIBRARY = [x for m in ORDER for x in own(importlib.import_module(f'yfpo.{m}'))]
HOMES = [x for x in LIBRARY if isinstance(x, type) and is_dataclass(x) and '__delwrap__' in vars(x)]
TAKERS = [f for x in LIBRARY for f in (x, getattr(x, '__init__', None))
          if inspect.isfunction(f) and is_dataclass(getattr(f, '__delwrap__', None))]

def test_they_are_found(): assert {Decoding, Sampling, Evaluation, Repeated, PairSettings} <= {*HOMES} and len(TAKERS) >= 7

@pytest.mark.parametrize('cls', HOMES, ids=lambda c: c.__name__)
def test_every_field_is_documented(cls):
    said = docments(cls)
    for f in fields(cls):
        assert said[f.name], f'write beside {f.name} what it means'
        start = f.name if f.default is MISSING else f'{f.name}={f.default!r}'
        assert f'\n{start}: {said[f.name]}' in cls.__doc__

@pytest.mark.parametrize('f', TAKERS, ids=lambda f: f.__qualname__)
def test_help_shows_every_setting_with_its_default(f):
    shown, home = inspect.signature(f).parameters, {x.name: x for x in fields(f.__delwrap__)}
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD] and set(shown) & set(home)
    for k in set(shown) & set(home):
        assert shown[k].default == home[k].default, k
        assert f'\n{k}={home[k].default!r}: ' in f.__doc__, k

@pytest.mark.parametrize('f, mistyped, near', [
    (generate, 'temprature', 'temperature'), (generate, 'pth', 'path'), (generate, 'max_tokens', 'max_new_tokens'),
    (evaluate_model, 'max_new_token', 'max_new_tokens'), (evaluate_model, 'nll_modl', 'nll_model'), (sample_rows, 'temp', 'temperature'),
    (protocol_rows, 'batchsize', 'batch_size'), (pairs_from_samples, 'caps', 'cap'), (pairs_from_corruption, 'sed', 'seed')])
def test_a_mistyped_setting_is_refused_with_its_nearest_name(f, mistyped, near):
    needed = [p for p in inspect.signature(f).parameters.values() if p.default is p.empty]
    with pytest.raises(ValueError, match=f"^{f.__name__} has no setting '{mistyped}': did you mean '{near}'\\?$"):
        f(*[None]*len(needed), **{mistyped: 1})

def test_completions_refuses_it_when_its_first_batch_is_asked_for():
    made = completions(None, None, [], topp=.5)
    with pytest.raises(ValueError, match="completions has no setting 'topp': did you mean 'top_p'"): next(made)

def test_a_class_is_named_and_checks_its_settings():
    for wrong, says in ((dict(clipp=1.), "NeuronReward has no setting 'clipp': did you mean 'clip'"), (dict(clip=0), 'clip is 0: give'),
                        (dict(batch_size=0), 'batch_size is 0')):
        with pytest.raises(ValueError, match=says): NeuronReward(None, None, None, [], **wrong)

@pytest.mark.parametrize('f, hidden', [(evaluate_model, 'temperature'), (evaluate_model, 'n'), (sample_rows, 'ids'),
                                       (protocol_rows, 'stop')])
def test_what_a_function_does_not_take_it_does_not_show_and_refuses(f, hidden):
    assert hidden in {x.name for x in fields(f.__delwrap__)} - set(inspect.signature(f).parameters)
    needed = [p for p in inspect.signature(f).parameters.values() if p.default is p.empty]
    with pytest.raises(ValueError, match=f"has no setting '{hidden}'"): f(*[None]*len(needed), **{hidden: 1})

def test_settings_reach_the_responses(tiny):
    ps = make_problems(2, seed=3)
    assert [{r['n_tokens'] for r in generate(*tiny, ps, max_new_tokens=k, progress=False)} for k in (2, 6)] == [{2}, {6}]
    drawn = [generate(*tiny, ps, n=3, temperature=t, max_new_tokens=6, seed=1, ids=True, progress=False) for t in (.01, 2.)]
    assert len({r['text'] for r in drawn[0]}) < len({r['text'] for r in drawn[1]}) and all(len(r['ids']) for r in drawn[0])
