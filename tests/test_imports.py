"Who may import whom, read from the generated modules."
import ast, subprocess, sys
import pytest
from conftest import ROOT

ORDER = ('machine progress pace warm loss problems models decoding responses packing pairs relevance attributors neurons interventions '
         'cards reward trainer dynamic monitors methods evaluate protocols statistics report figures page site run launch').split()

def imports(module):
    "(yfpo modules, top-level packages imported when the module loads, all packages)"
    tree = ast.parse((ROOT/'yfpo'/f'{module}.py').read_text())
    own, top, every = set(), set(), set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom): names = [node.module or '']
        for n in names:
            if isinstance(node, ast.ImportFrom) and (node.level or n.startswith('yfpo')): own.add(n.removeprefix('yfpo.'))
            else: every.add(n.split('.')[0]); top |= {n.split('.')[0]} if node in tree.body else set()
    return own, top, every

@pytest.mark.parametrize('module', ORDER)
def test_arrows_point_down(module):
    own, _, _ = imports(module)
    assert not [m for m in own if m and ORDER.index(m) >= ORDER.index(module)]     # '' is the package itself, asked for its version

@pytest.mark.parametrize('package,doors', [('lxt', ['relevance']), ('trl', ['trainer', 'methods'])])
def test_one_door(package, doors):
    assert [m for m in ORDER if package in (ROOT/'yfpo'/f'{m}.py').read_text() and package in imports(m)[2]
            | ({'lxt'} if "import_module('lxt')" in (ROOT/'yfpo'/f'{m}.py').read_text() else set())] == doors

def test_relevance_and_trainer_never_meet():
    assert 'trainer' not in imports('relevance')[0] and 'relevance' not in imports('trainer')[0]

def test_loss_imports_torch_only():
    own, _, every = imports('loss')
    assert not own and 'torch' in every and not every - {'torch'} - set(sys.stdlib_module_names)

def test_neurons_and_loss_know_no_tokenizer_library():
    for m in ('neurons', 'loss'): assert not imports(m)[2] & {'transformers', 'tokenizers'}

def loaded(code):
    "Names of heavy packages loaded by `code` in a fresh interpreter"
    heavy = ('torch', 'transformers', 'trl', 'pandas', 'matplotlib', 'papermill', 'datasets')
    r = subprocess.run([sys.executable, '-c', f'{code}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])'], capture_output=True,
                       text=True, check=True)
    return ast.literal_eval(r.stdout.strip().splitlines()[-1])

@pytest.mark.parametrize('module', ['yfpo', 'yfpo.run', 'yfpo.machine', 'yfpo.progress', 'yfpo.problems', 'yfpo.report', 'yfpo.figures'])
def test_start_up_is_light(module): assert loaded(f'import {module}') == []
