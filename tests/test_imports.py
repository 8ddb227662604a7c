"Who may import whom, read from the generated modules: arrows go one way only, from the floor that uses to the floor that is used."
import ast, subprocess, sys
import pytest
from conftest import ROOT

# A module may use those before it in its line, and the lines above.
FLOORS = [('data', 'data.extras data.checks data.files data.pages data.answers data.problems data.templates data.symbolic '
           'data.sources data.pairs'),
          ('lm', 'lm.progress lm.sampling lm.machine lm.models lm.decoding lm.responses lm.averages lm.packing lm.rows lm.training '
           'lm.tables lm.mixers lm.experts lm.families lm.sets'),
          ('loss', 'loss'), ('relevance', 'relevance'), ('neurons', 'neurons'), ('reward', 'reward'), ('interventions', 'interventions'),
          ('trainer', 'trainer'), ('evaluate', 'evaluate'),
          ('beyond', 'beyond.identities beyond.attributors beyond.cards beyond.dynamic beyond.monitors beyond.methods beyond.protocols '
           'beyond.controls beyond.effects beyond.votes beyond.dose beyond.explorer beyond.knowledge beyond.command '
           'beyond.families'),
          ('lab', 'lab.arms lab.recipes lab.stages lab.keys lab.warm lab.step lab.pace lab.forecast lab.workflow lab.gate lab.launch '
                  'lab.statistics lab.results lab.wording lab.tables lab.costs lab.findings lab.verdict lab.report lab.figures '
                  'lab.page lab.publish lab.bench '
                  'lab.readme lab.schema lab.bundle lab.audit lab.effect lab.cli')]
ORDER = ' '.join(modules for _, modules in FLOORS).split()

def path(module): return ROOT/'yfpo'/f"{module.replace('.', '/')}.py"

def resolved(node, room):
    "What `from x import y` names, seen from a module in `room`: yfpo modules without the package's name, others with `/` in front"
    name = node.module or ''
    if not node.level: return name.removeprefix('yfpo').lstrip('.') if name.split('.')[0] == 'yfpo' else f"/{name.split('.')[0]}"
    return '.'.join(x for x in ([room] if room and node.level == 1 else []) + [name] if x)

def imports(module):
    "(yfpo modules, top-level packages imported when the module loads, all packages)"
    tree, room = ast.parse(path(module).read_text()), module.rpartition('.')[0]
    own, top, every = set(), set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [a.name.removeprefix('yfpo.') if a.name.startswith('yfpo.') else f"/{a.name.split('.')[0]}"
                                                  for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = [resolved(node, room)]
        own |= {n for n in names if not n.startswith('/')}
        every |= {n[1:] for n in names if n.startswith('/')}
        top |= {n[1:] for n in names if n.startswith('/') and node in tree.body}
    return own, top, every

def test_every_module_has_its_place():
    there = {'.'.join(f.relative_to(ROOT/'yfpo').with_suffix('').parts) for f in (ROOT/'yfpo').rglob('*.py') if not f.name.startswith('_')}
    assert there == set(ORDER)

@pytest.mark.parametrize('module', ORDER)
def test_arrows_point_down(module):
    own, _, _ = imports(module)
    assert not [m for m in own if m and ORDER.index(m) >= ORDER.index(module)]     # '' is the package itself, asked for its version

@pytest.mark.parametrize('package,doors', [('lxt', ['beyond.identities']),
                                           ('trl', ['lm.training', 'trainer', 'beyond.methods', 'beyond.command'])])
def test_one_door(package, doors): assert [m for m in ORDER if package in imports(m)[2]] == doors

def test_relevance_and_trainer_never_meet():
    assert 'trainer' not in imports('relevance')[0] and 'relevance' not in imports('trainer')[0]

def test_loss_needs_torch_and_the_checks_only():
    own, _, every = imports('loss')
    assert own == {'data.checks'} and 'torch' in every and not every - {'torch'} - set(sys.stdlib_module_names)

def test_neurons_and_loss_know_no_tokenizer_library():
    for m in ('neurons', 'loss'): assert not imports(m)[2] & {'transformers', 'tokenizers'}

def loaded(code):
    "Names of heavy packages loaded by `code` in a fresh interpreter"
    heavy = ('torch', 'transformers', 'trl', 'pandas', 'matplotlib', 'papermill', 'datasets')
    r = subprocess.run([sys.executable, '-c', f'{code}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])'], capture_output=True,
                       text=True, check=True)
    return ast.literal_eval(r.stdout.strip().splitlines()[-1])

@pytest.mark.parametrize('module', ['yfpo', 'yfpo.data.checks', 'yfpo.data.sources', 'yfpo.lm.machine', 'yfpo.lm.progress',
                                    'yfpo.lm.sampling', 'yfpo.evaluate', 'yfpo.lab.cli', 'yfpo.lab.report', 'yfpo.lab.verdict',
                                    'yfpo.lab.figures'])
def test_start_up_is_light(module): assert loaded(f'import {module}') == []

def test_the_main_names_come_from_the_package_itself():
    import yfpo
    assert all(getattr(yfpo, n).__name__ == n for n in yfpo.__all__) and set(yfpo.__all__) <= set(dir(yfpo)) and 'notebook' in yfpo.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"): yfpo.nosuch
