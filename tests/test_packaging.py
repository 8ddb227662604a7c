"settings.ini is the one place for metadata; the wheel says the same and starts without torch."
import email, subprocess, sys, venv, zipfile
from configparser import ConfigParser
import pytest
from conftest import ROOT

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    r = subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '-o', str(out), str(ROOT)], capture_output=True,
                       text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return next(out.glob('*.whl'))

def test_metadata_is_settings_ini(wheel):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini')
    cfg = cfg['DEFAULT']
    with zipfile.ZipFile(wheel) as z:
        name = next(n for n in z.namelist() if n.endswith('METADATA'))
        meta = email.message_from_string(z.read(name).decode())
        points = z.read(name.replace('METADATA', 'entry_points.txt')).decode()
    assert meta['Summary'] == cfg['description'] and meta['Requires-Python'] == f">={cfg['min_python']}"
    required = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert sorted(required) == sorted(cfg['requirements'].split())
    assert set(meta.get_all('Provides-Extra')) == {'notebooks', 'peft', 'harness', 'math', 'dev'}
    assert 'yfpo = yfpo.lab.run:main' in points and 'yfpo = yfpo._modidx:d' in points

def test_wheel_alone(wheel, tmp_path):
    venv.create(tmp_path/'v', with_pip=False)
    python = tmp_path/'v'/'bin'/'python'
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '-q', '--no-deps', '--no-index', str(wheel)],
                   check=True, capture_output=True)
    r = subprocess.run([python, '-c',
                        'import time; t=time.time(); import yfpo, sys; print(time.time()-t, "torch" in sys.modules, yfpo.__version__)'],
                       capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert float(r[0]) < 0.5 and r[1:] == ['False', '0.1.0']
    r = subprocess.run([tmp_path/'v'/'bin'/'yfpo', '--help'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0 and 'report' in r.stdout
    r = subprocess.run([tmp_path/'v'/'bin'/'yfpo', 'list'], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 1 and 'clone' in r.stderr and 'Traceback' not in r.stderr

def test_make_help():
    r = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and all(t in r.stdout for t in ('reproduce', 'test', 'report', 'clean'))
