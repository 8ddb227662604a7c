"Problems drawn from GSM-Symbolic's templates: sound ones, their parts apart, and the package's other games untouched."
import importlib.util, random, sys
import pytest
from yfpo.data import symbolic
from yfpo.data.answers import extract_number, is_correct
from yfpo.data.sources import DRAWN_SETS, load_problems
from yfpo.data.symbolic import gsm_templates, symbolic_problems

real = pytest.mark.skipif(importlib.util.find_spec('reasoning_gym') is None, reason='needs reasoning-gym')

TEMPLATE = '''
def generate_{k}(rng, difficulty=1.):
    n = rng.randint(1, {most})
    return dict(question=f'How many are {{n}} and {k}?', answer=str(n + {k} + {wrong}),
                metadata=dict(answer_cot=f'There are {{n}} + {k} = {{n + {k}}}.\\n#### {{n + {k}}}'))
'''

@pytest.fixture
def package(tmp_path, monkeypatch):
    "A stand-in for the package, whose own code must not run"
    def make(numbers=(0, 1, 2, 3), sound=None, most=1000, wrong=0):
        folder = tmp_path/'reasoning_gym'/'arithmetic'/'gsm_symbolic'
        folder.mkdir(parents=True)
        for d in (folder, folder.parent, folder.parent.parent): (d/'__init__.py').write_text('raise AssertionError("imported")')
        (folder/'gsm_symbolic.py').write_text(f'raise AssertionError("imported")\ntasks_ok = {list(numbers if sound is None else sound)}\n')
        (folder/'generators_00_49.py').write_text('from reasoning_gym.utils import number\n' +
                                                  ''.join(TEMPLATE.format(k=k, most=most, wrong=wrong) for k in numbers))
        (folder/'generators_50_99.py').write_text('')
        (folder.parent.parent/'utils.py').write_text('number = int')
        return tmp_path
    for k in [k for k in sys.modules if k.partition('.')[0] == 'reasoning_gym']: monkeypatch.delitem(sys.modules, k)
    monkeypatch.syspath_prepend(str(tmp_path))
    gsm_templates.cache_clear()
    yield make
    gsm_templates.cache_clear()

def test_parts_share_no_template_and_a_seed_repeats(package):
    package()
    test, dev = symbolic_problems(30, seed=3), symbolic_problems(30, seed=3, part='dev')
    assert {p.meta['template'] for p in test} == {1, 3} and {p.meta['template'] for p in dev} == {0, 2}
    assert len({p.question for p in test}) == 30 and [p.id for p in symbolic_problems(30, seed=3)] == [p.id for p in test]
    assert [p.question for p in symbolic_problems(10, seed=3)] == [p.question for p in test[:10]]
    assert [p.question for p in symbolic_problems(30, seed=4)] != [p.question for p in test]
    assert load_problems('gsm-drawn', n=5, seed=3) == test[:5] and load_problems('gsm-drawn-dev', n=5, seed=3) == dev[:5]
    assert {*DRAWN_SETS} == {'gsm-drawn', 'gsm-drawn-dev'} and len(load_problems('gsm-drawn')) == 200

def test_nothing_of_the_package_stays_behind(package, monkeypatch):
    package()
    monkeypatch.setitem(sys.modules, 'reasoning_gym', own := importlib.util.module_from_spec(importlib.util.find_spec('reasoning_gym')))
    gsm_templates()
    assert [k for k in sys.modules if k.partition('.')[0] == 'reasoning_gym'] == ['reasoning_gym'] and sys.modules['reasoning_gym'] is own

def test_only_sound_templates(package):
    package(sound=(1, 2))
    assert [*gsm_templates()] == [1, 2]

def test_an_answer_that_its_solution_does_not_give_is_refused(package):
    package(wrong=1)
    with pytest.raises(ValueError, match=r'template 1 of reasoning_gym says \d+ and its solution ends in \d+: install another version'):
        symbolic_problems(2)

def test_too_few_different_problems(package):
    package(most=3)
    with pytest.raises(ValueError, match='gave 6 different problems, not 7; ask for fewer'): symbolic_problems(7)

@pytest.mark.parametrize('given,says', [(dict(n=0), 'n is 0'), (dict(n=2, part='train'), "part 'train' is unknown; use dev or test")])
def test_what_is_refused(package, given, says):
    package()
    with pytest.raises(ValueError, match=says): symbolic_problems(**given)

def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(symbolic.importlib.util, 'find_spec', lambda name: None)
    for k in [k for k in sys.modules if k.partition('.')[0] == 'reasoning_gym']: monkeypatch.delitem(sys.modules, k)
    gsm_templates.cache_clear()
    with pytest.raises(FileNotFoundError, match='run `pip install --no-deps reasoning-gym`'): symbolic_problems(1)

@real
def test_every_sound_template_gives_what_it_says():
    gsm_templates.cache_clear()
    assert len(gsm_templates()) == 85
    for part in ('test', 'dev'):
        for p in symbolic_problems(400, seed=7, part=part):
            assert is_correct(p.solution, p.answer) and extract_number(p.solution) == p.answer, p
