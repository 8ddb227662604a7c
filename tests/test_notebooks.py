"Every library notebook runs from top to bottom in a kernel of its own."
import subprocess, sys
from pathlib import Path
import pytest
from conftest import ROOT

@pytest.mark.parametrize('path', [*sorted((ROOT/'nbs').glob('[0-9]*.ipynb')), ROOT/'nbs'/'index.ipynb'], ids=lambda p: p.stem)
def test_runs(path):
    r = subprocess.run([Path(sys.executable).parent/'nbdev-test', str(path), '--n-workers', '0'], cwd=ROOT, capture_output=True, text=True,
                       timeout=600)
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
