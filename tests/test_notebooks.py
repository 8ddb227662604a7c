"Every library notebook runs from top to bottom; one process runs them all, so what one leaves behind would show in the next."
import subprocess, sys
from pathlib import Path
import pytest
from conftest import LIBRARY, ROOT, of

@pytest.fixture(scope='session')
def said():
    r = subprocess.run([Path(sys.executable).parent/'nbdev-test', str(ROOT/'nbs'), '--n-workers', '0', '--do-print', '--file-re',
                        r'^([0-9]|index)', '--skip-file-re', '^([_.]|00_tour)', '--skip-folder-re', '^([_.]|paper)'], cwd=ROOT,
                       capture_output=True, text=True, timeout=1500)
    return r.stdout + r.stderr

OWN_TEST = ('00_tour',)                                        # run in test_tour

@pytest.mark.parametrize('path', [*(f for f in LIBRARY if f.stem not in OWN_TEST), ROOT/'nbs'/'index.ipynb'], ids=of)
def test_runs(path, said):
    own = said.partition(f'Starting {path}')[2].partition('Starting ')[0]
    assert f'- Completed {path}' in said, own[-3000:] or said[-3000:]
