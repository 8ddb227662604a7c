"What is generated equals what is committed, and the experiment notebooks are fit for papermill."
import ast, importlib, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from conftest import LIBRARY, ROOT, of
from yfpo.lab.readme import readme_text
from yfpo.lab.recipes import read_recipe
from yfpo.lab.stages import TYPES, notebook_parameters, plan

BIN = Path(sys.executable).parent
PAPER = sorted(f for f in (ROOT/'nbs'/'paper').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)

def files(folder): return {str(f.relative_to(folder)): f.read_bytes() for d in ('nbs', 'yfpo')
                           for f in sorted((folder/d).rglob('*')) if f.suffix in ('.ipynb', '.py')}

@pytest.mark.parametrize('command', ['nbdev-clean', 'nbdev-export'])
def test_a_no_op(command, tmp_path):
    copy = tmp_path/'yfpo-copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', '__pycache__', '*.egg-info'))
    before = files(copy)
    r = subprocess.run([BIN/command], cwd=copy, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert [f for f, b in files(copy).items() if before.get(f) != b] == [], f'run {command} and commit what it changes'

def test_no_line_over_140_columns():
    lines = [(f.name, i, l) for d in ('yfpo', 'tests') for f in sorted((ROOT/d).rglob('*.py')) if f.name != '_modidx.py'
             for i, l in enumerate(f.read_text().split('\n'), 1)]
    lines += [(f.name, i, l) for f in LIBRARY + PAPER for c in json.loads(f.read_text())['cells'] if c['cell_type'] == 'code'
              for i, l in enumerate(''.join(c['source']).split('\n'), 1)]
    assert [x for x in lines if len(x[2]) > 140] == []

def functions(tree, where):
    "(name with module and class, node) of every function, inner ones too"
    for n in ast.iter_child_nodes(tree):
        named = isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        name = f'{where}.{n.name}' if named else where
        if named and not isinstance(n, ast.ClassDef): yield name, n.args
        yield from functions(n, name)

def n_arguments(a): return len(a.posonlyargs + a.args + a.kwonlyargs) + (a.vararg is not None) + (a.kwarg is not None)

def test_a_function_of_eight_arguments_is_a_configuration_without_a_name():
    found = [(name, n_arguments(a)) for f in sorted((ROOT/'yfpo').rglob('*.py'))
             for name, a in functions(ast.parse(f.read_text()), '.'.join(f.relative_to(ROOT/'yfpo').with_suffix('').parts))]
    many = {name: n for name, n in found if n > 7}
    assert len(found) > 1000 and many == {}, 'give its settings a dataclass, as `Sampling`'

@pytest.mark.parametrize('path', LIBRARY + PAPER, ids=of)
def test_stored_outputs_are_clean(path):
    outputs = [o for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])]
    assert outputs or path.parent.name == 'stages', 'run the notebook and commit what it shows'
    assert 'widget-view' not in json.dumps(outputs), 'a progress bar is no output'
    assert not path.parent.name == 'stages' or not re.search('smoke|NOT A RESULT', json.dumps(outputs)), 'numbers of a smoke run'
    assert [o for o in outputs if o['output_type'] == 'error' or o.get('name') == 'stderr'] == []
    assert not re.search(r'(?<![\w.])/(home|root|tmp|Users|work|mnt)/', json.dumps(outputs)), 'a path of one machine'

@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_imports_stand_in_cells_of_their_own(path):
    "nbdev's documentation runs the cells that import, and of the others only those that are exported"
    for c in json.loads(path.read_text())['cells']:
        if c['cell_type'] != 'code' or '#| export' in (code := ''.join(c['source'])): continue
        tree, kinds = ast.parse(re.sub(r'^[%!].*', '', code, flags=re.M)), (ast.Import, ast.ImportFrom)
        if not any(isinstance(n, kinds) for n in ast.walk(tree)): continue
        odd = [n.lineno for n in tree.body if not isinstance(n, (*kinds, ast.Expr))]
        assert odd == [], f'move the imports of {c["id"]} to a cell above'

def test_the_schema_is_of_these_recipes_and_settings():
    from yfpo.lab.schema import recipe_schema
    from yfpo.lab.stages import schema_path
    assert json.loads(schema_path().read_text()) == json.loads(json.dumps(recipe_schema())), 'run `yfpo schema`'
    for f in (ROOT/'nbs'/'paper'/'recipes').glob('*.yaml'): 
        assert f.read_text().startswith('# yaml-language-server: $schema=recipe.schema.json'), f

@pytest.mark.parametrize('recipe', sorted(f.stem for f in (ROOT/'nbs'/'paper'/'recipes').glob('*.yaml')))
def test_the_schema_accepts_the_recipes(recipe):
    jsonschema = pytest.importorskip('jsonschema')
    from yfpo.lab.recipes import read_yaml
    from yfpo.lab.stages import schema_path
    text = (ROOT/'nbs'/'paper'/'recipes'/f'{recipe}.yaml').read_text()
    schema, found = json.loads(schema_path().read_text()), read_yaml(text, recipe)
    jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError): jsonschema.validate({**found, 'sedes': [0]}, schema)

def test_readme_is_the_index():
    assert (ROOT/'README.md').read_text() == readme_text(), 'run `yfpo readme`'

@pytest.mark.parametrize('path', PAPER, ids=lambda p: p.stem)
def test_paper_notebook(path):
    nb = json.loads(path.read_text())
    assert nb['metadata']['kernelspec'] == dict(display_name='python3', language='python', name='python3')
    code = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']
    assert not [c for c in code if '#| export' in c or 'nbdev_export' in c]
    known = notebook_parameters(path)
    rest = '\n'.join(c for c, cell in zip(code, [c for c in nb['cells'] if c['cell_type'] == 'code'])
                     if 'parameters' not in cell['metadata'].get('tags', []))
    assert [k for k in known if not re.search(rf'\b{k}\b', rest)] == [], 'declared and never used'
    assert all(h for _, _, h in known.values()) and 'recipe' in known and known.keys() & {'run_dir', 'results_dir'}
    assert ''.join(nb['cells'][0]['source']).startswith('# ') and '\n> ' in ''.join(nb['cells'][0]['source'])

@pytest.mark.parametrize('path', PAPER, ids=lambda p: p.stem)
def test_papermill_reads_the_same_parameters(path):
    papermill = pytest.importorskip('papermill')
    seen = papermill.inspect_notebook(str(path))
    ours = {k: (t, h) for k, (t, _, h) in notebook_parameters(path).items()}
    assert {k: (v['inferred_type_name'], v['help']) for k, v in seen.items()} == ours
    assert {v['inferred_type_name'] for v in seen.values()} <= TYPES.keys()

@pytest.mark.parametrize('path', LIBRARY, ids=of)
def test_library_notebook_form(path):
    assert path.stat().st_size < 400_000
    nb = json.loads(path.read_text())
    head = ''.join(nb['cells'][0]['source'])
    assert re.match(r'# \w+\n\n> .+\n\n\S', head), 'title, subtitle, why'
    assert sum('#| default_exp' in ''.join(c['source']) for c in nb['cells']) == (path.stem != '00_tour'), 'the tour exports nothing'
    assert any(c.get('outputs') for c in nb['cells']), 'no stored output'
    assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error']

@pytest.mark.parametrize('recipe', sorted(f.stem for f in (ROOT/'nbs'/'paper'/'recipes').glob('*.yaml')))
def test_recipe_is_valid(recipe, tmp_path):
    steps = plan(read_recipe(recipe), run_dir=str(tmp_path))
    few = {'bench': 5, 'what-training-does': 10, 'limits': 7, 'neurons': 9, 'which-share': 9, 'right-or-wrong': 9}
    assert read_recipe(recipe).name == recipe and len(steps) > few.get(recipe, 15)

def test_what_is_called_tried_has_a_test():
    "Each row of the support page names one that exists, or says why there is none"
    rows = [[c.strip() for c in r.split('|')[1:4]] for r in (ROOT/'nbs'/'paper'/'support.md').read_text().split('\n') if r.startswith('| ')]
    rows = [r for r in rows if r[0] != 'what']
    assert len(rows) > 15
    for what, said, test in rows:
        if not test: assert said.startswith('not tried') or what == 'Python 3.11', what; continue
        file, name = test.strip('`').split('::')
        assert f'def {name}(' in (ROOT/'tests'/file).read_text(), test

@pytest.mark.parametrize('notebook, head, table, apart', [
    ('03_reward', '| name | what differs |', 'yfpo.reward:READOUTS', {'standardised'}),
    ('01_relevance', '| seed |', 'yfpo.relevance:SEEDS', set()),
    ('00_arms', '| arm | isolates |', 'yfpo.lab.arms:ARMS', {'dpo', 'yfpo', 'yfpo-literal', 'yfpo-dynamic'})])
def test_a_table_in_prose_has_every_row_of_its_table_in_code(notebook, head, table, apart):
    "Of `apart`, the text around the table speaks"
    module, name = table.split(':')
    known = {*getattr(importlib.import_module(module), name)}
    path, = [f for f in LIBRARY if f.stem == notebook]
    text, = [t for c in json.loads(path.read_text())['cells'] for t in [''.join(c['source'])] if c['cell_type'] == 'markdown' and head in t]
    rows = text[text.index(head):].split('\n\n')[0].split('\n')[2:]
    assert {re.match(r'\| `([\w-]+)` \|', r)[1] for r in rows} == known - apart

def test_contributing_is_short_and_names_what_there_is():
    "Every module, table and test in its map is there, and the whole is read in two minutes"
    text = (ROOT/'CONTRIBUTING.md').read_text()
    assert len(text.split()) <= 400
    rows = [r.split('|')[2:4] for r in text.split('\n') if r.startswith('| a')]
    assert len(rows) > 8
    for change, test in rows:
        assert [t for t in re.findall(r'test_\w+\.py', test) if not (ROOT/'tests'/t).exists()] == []
        books = [ROOT/'nbs'/f'{n}.ipynb' for n in re.findall(r'`((?:\w+/)?\d\d_\w+)`', change)]
        code = ''.join(f.read_text() for f in books)
        assert [n for n in re.findall(r'`([A-Z_]{4,})`', change) if f'{n} = ' not in code and f'{n}.update' not in code] == [], change
