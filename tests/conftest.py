"Shared by all tests: the repository's folder, data where there is some, and quiet libraries."
import gc, gzip, json, os
from pathlib import Path
import pytest

os.environ.update(HF_HUB_DISABLE_TELEMETRY='1', TQDM_DISABLE='1', TOKENIZERS_PARALLELISM='false')
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):    # files beside each other share the cores
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(workers))))
ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted(f for f in (ROOT/'nbs').rglob('[0-9]*.ipynb') if 'paper' not in f.parts and '.ipynb_checkpoints' not in f.parts)
def of(path): return '/'.join(path.relative_to(ROOT/'nbs').with_suffix('').parts)                # the name of a notebook in a report

def answers_in(folder, name='*'):
    "Rows of a folder `results/samples`, or of one arm and seed, packed or not"
    files = sorted(folder.glob(f'{name}.jsonl*'))
    assert files, f'{folder} has no {name}'
    return [json.loads(l) for f in files for l in (gzip.open if f.suffix == '.gz' else open)(f, 'rt', encoding='utf-8')]

@pytest.fixture(scope='module', autouse=True)
def little_to_collect():
    "accelerate and statsmodels collect garbage in each call, which takes long among all that a test process holds"
    gc.collect(); gc.freeze()

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def data_dir():
    "A folder with gsm8k/*.jsonl and svamp/SVAMP.json"
    d = Path(os.environ.get('YFPO_DATA_DIR') or ROOT.parent/'shared'/'data')
    if not (d/'gsm8k'/'train.jsonl').exists(): pytest.skip('no GSM8K files: set YFPO_DATA_DIR to a folder with gsm8k/train.jsonl')
    return d

@pytest.fixture(scope='session')
def tiny():
    from yfpo.lm.models import load_model
    return load_model('tiny')
