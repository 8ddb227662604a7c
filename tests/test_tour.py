"The tour is short, shows a picture soon, and does what it says."
import ast, base64, os, re
import nbformat, papermill, pytest
from conftest import ROOT

PATH = ROOT/'nbs'/'00_tour.ipynb'

@pytest.fixture(scope='module')
def tour(): return nbformat.read(PATH, 4)

def code(nb): return [c for c in nb.cells if c.cell_type == 'code']
def pictures(cell): return [o.data['image/png'] for o in cell.get('outputs', ()) if 'image/png' in o.get('data', {})]

def test_it_is_short(tour):
    lines = [[l for l in c.source.splitlines() if l.strip()] for c in code(tour)]
    assert len(tour.cells) <= 45 and sum(map(len, lines)) <= 150
    assert max(map(len, lines)) <= 13 and max(len(l) for cell in lines for l in cell) <= 140

def test_prose_is_short(tour):
    words = {c.id: len(re.sub(r'\$.*?\$', ' x ', c.source, flags=re.S).split()) for c in tour.cells if c.cell_type == 'markdown'}
    assert not {k: n for k, n in words.items() if n > 45 and k != tour.cells[0].id}

def test_a_reader_may_copy_every_name(tour):
    nodes = [n for c in code(tour) for n in ast.walk(ast.parse(c.source))]
    names = [a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    assert 'select_neurons' in names or 'contrast_set' in names
    assert not [n for n in names if n.startswith('_') or n == '*'], names
    assert not [n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr.startswith('_')]

def test_every_import_is_used(tour):
    nodes = [n for c in code(tour) for n in ast.walk(ast.parse(c.source))]
    given = {(a.asname or a.name).split('.')[0] for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert not given - {n.id for n in nodes if isinstance(n, ast.Name)}

def test_it_exports_nothing(tour): assert not [c for c in tour.cells if re.search(r'^#\|\s*(default_exp|export)', c.source, re.M)]

def test_a_picture_comes_soon(tour):
    assert any(pictures(c) for c in tour.cells[:10])
    assert 4 <= sum(len(pictures(c)) for c in tour.cells)

def test_what_is_stored_is_small_and_quiet(tour):
    assert sum(len(base64.b64decode(p)) for c in code(tour) for p in pictures(c)) < 400_000
    assert not [o for c in code(tour) for o in c.outputs if o.output_type in ('stream', 'error')]

def values(nb):
    "What cells show as dicts, put together"
    out = {}
    for o in (o for c in code(nb) for o in c.outputs if o.output_type == 'execute_result'):
        try: v = ast.literal_eval(o.data['text/plain'])
        except (ValueError, SyntaxError): continue
        out |= v if isinstance(v, dict) else {}
    return out

@pytest.fixture(scope='module')
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tour')
    with pytest.MonkeyPatch.context() as m:                        # for this kernel alone, which has all cores as a reader's has
        m.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]))
        m.setenv('OMP_NUM_THREADS', str(os.cpu_count() or 1))
        return papermill.execute_notebook(str(PATH), str(folder/'tour.ipynb'), cwd=str(folder), kernel_name='python3', progress_bar=False)

def test_the_chosen_neurons_matter_for_arithmetic(said):
    rise = values(said)
    assert rise['arithmetic']['chosen'] > 3*max(rise['arithmetic']['random_most'], 0) and rise['arithmetic']['chosen'] > .5
    assert rise['arithmetic']['chosen'] > 3*rise['general text']['chosen']
    assert rise['arithmetic']['random_mean'] <= rise['arithmetic']['random_most']

def test_the_loss_on_the_page_is_the_packages(said):
    v = values(said)
    assert v['equal'] is True and v['ours'] == pytest.approx(v['theirs'], abs=1e-6)
    assert v['first_step'] == pytest.approx(1.3862944, abs=1e-6)

def test_three_arms_of_twenty_steps(said):
    v = values(said)
    assert v['steps'] == {'YFPO': 20, 'random neurons': 20, 'DPO': 20}
    assert set(v['neuron_margin']) == set(v['steps']) and v['neuron_margin']['YFPO'] > v['neuron_margin']['DPO']

def test_it_runs_without_noise(said, tour):
    assert not [o.text for c in code(said) for o in c.outputs if o.output_type == 'stream']
    assert len(pictures_of(said)) == len(pictures_of(tour))

def pictures_of(nb): return [p for c in code(nb) for p in pictures(c)]
