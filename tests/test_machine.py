"What suits one machine is asked or measured, never written into a recipe; a run says how long it takes; kernels start as copies."
import json, os, re, socket, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock
import pytest, torch
from conftest import ROOT
from yfpo.lm import machine
from yfpo.lab.pace import Ticking, in_words, makespan, scaled
from yfpo.lm.progress import read_progress, track
from yfpo.lab.forecast import cost_text, estimate_text
from yfpo.lab.recipes import read_recipe

RECIPES = sorted(f.stem for f in (ROOT/'nbs'/'paper'/'recipes').glob('*.yaml'))

@pytest.mark.parametrize('recipe', [r for r in RECIPES if r != 'bench'])             # bench compares formats, so it names them
def test_no_recipe_names_what_suits_one_machine(recipe):
    text = (ROOT/'nbs'/'paper'/'recipes'/f'{recipe}.yaml').read_text()
    assert not re.search(r'bfloat16|float16|float32|precision|dtype|^jobs', text, re.M)
    for stage in ('responses', 'evaluate'): assert not (read_recipe(recipe).stages.get(stage) or {}).get('batch_size')

@pytest.mark.parametrize('path', sorted((ROOT/'nbs'/'paper'/'stages').glob('*.ipynb')), ids=lambda p: p.stem)
def test_a_stage_takes_the_faster_format_by_default(path):
    cell = next(c for c in json.loads(path.read_text())['cells'] if 'parameters' in c['metadata'].get('tags', []))
    for kind, default in re.findall(r"^(precision|dtype):str = '(\w+)'", ''.join(cell['source']), re.M): assert default == 'auto', kind

@pytest.fixture
def processor(monkeypatch):
    "Function that gives the machine another processor, by the flags of its /proc/cpuinfo"
    for k in machine.LIMITS: monkeypatch.delenv(k, raising=False)
    return lambda flags: monkeypatch.setattr(machine, '_cpuinfo', lambda: f'model name : Some\nflags : {flags}\n')

@pytest.mark.parametrize('flags,there', [('avx avx2', []), ('avx2 avx512f avx512_bf16', ['avx512_bf16']),
                                         ('avx512_bf16 amx_bf16 amx_tile', ['amx_bf16', 'avx512_bf16']), ('asimd bf16', ['bf16'])])
def test_instructions_are_read_and_can_be_forbidden(processor, monkeypatch, flags, there):
    processor(flags)
    assert machine.bfloat16_instructions() == there
    assert (machine.bfloat16_pays(576)[0] is False) or there
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    assert machine.bfloat16_instructions() == [] and machine.bfloat16_pays(576) == (False, 'the processor has no bfloat16 instructions')
    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX512_CORE_BF16')
    assert 'amx_bf16' not in machine.bfloat16_instructions()

def test_where_instructions_leave_doubt_a_product_is_timed_once_a_run(processor, monkeypatch, tmp_path):
    processor('avx512_bf16')
    monkeypatch.setenv('YFPO_RUN', str(tmp_path))
    gains = iter([.4, 3.])
    monkeypatch.setattr(machine, '_gain', lambda width: next(gains))
    assert [machine.bfloat16_pays(576)[0] for _ in range(2)] == [False, False]
    assert list(json.loads((tmp_path/'machine.json').read_text()).values()) == [.4]
    monkeypatch.delenv('YFPO_RUN')
    assert machine.bfloat16_pays(576)[0] and 'AVX' not in machine.bfloat16_pays(32)[1]

def test_a_choice_is_noted_with_its_reason(processor, monkeypatch, tmp_path):
    processor('amx_bf16')
    monkeypatch.setenv('YFPO_NOTES', str(tmp_path/'notes'))
    assert machine.number_format('auto', 576, use='writing') == 'bfloat16' and machine.number_format('float32', 576) == 'float32'
    assert [json.loads(l) for l in (tmp_path/'notes').read_text().splitlines()] == [{'writing': 'bfloat16: the processor has AMX'},
                                                                                   {'reading': 'float32: as asked'}]

def test_load_model_takes_auto(processor):
    from yfpo.lm.models import load_model
    assert load_model('tiny', dtype='auto')[0].dtype == torch.float32
    with pytest.raises(ValueError, match="or 'auto'"): load_model('tiny', dtype='half')

@pytest.mark.parametrize('f', [machine.decode_batch, machine.read_batch, machine.lanes])
def test_sizes_below_zero_are_refused(f):
    with pytest.raises(ValueError, match='at least 1, or 0'): f(-1, *([1] if f is machine.decode_batch else []))

def test_as_many_answers_as_fit(monkeypatch):
    monkeypatch.setattr(machine, 'free_memory', lambda: 8*2**30)
    assert [machine.decode_batch(0, b) for b in (1, 7*2**20, 2**30, 2**40)] == [256, 256, 2, 1] and machine.decode_batch(5, 2**40) == 5

def test_batches_of_any_size_give_the_same_answers(tiny):
    from yfpo.data.templates import make_problems
    from yfpo.lm.responses import generate
    ps = make_problems(5, seed=3)
    texts = [[r['text'] for r in generate(*tiny, ps, max_new_tokens=6, batch_size=b, progress=False)] for b in (0, 2)]
    assert texts[0] == texts[1]

# --- how long

@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_has_a_cost(recipe):
    r = read_recipe(recipe)
    text = estimate_text(r) if r.cost else cost_text(r)
    assert ('in all' in text or 'the time is not known' in text) and len(text.splitlines()) > 3

def test_the_schedule_against_a_slow_simulation():
    import random
    for seed in range(20):
        rng = random.Random(seed)
        steps = [dict(label=i, needs=[j for j in range(i) if rng.random() < .3]) for i in range(8)]
        seconds = {s['label']: rng.randint(1, 5) for s in steps}
        for jobs in (1, 2, 3):
            left, done, running, clock = list(steps), set(), {}, 0
            while left or running:                              # second by second
                for s in list(left):
                    if len(running) < jobs and set(s['needs']) <= done: running[s['label']] = seconds[s['label']]; left.remove(s)
                clock += 1
                running = {l: t - 1 for l, t in running.items()}
                done |= {l for l, t in running.items() if not t}
                running = {l: t for l, t in running.items() if t}
            assert makespan(steps, seconds, jobs) == clock, (seed, jobs)

def test_only_what_exceeds_the_start_scales(): assert scaled(13, 2.) == 23 and scaled(2, 9.) == 2 and in_words(100) == '2 min'

def test_an_hour_has_sixty_minutes(): assert [in_words(x) for x in (5400, 7169, 7199, 7200)] == [
    '1 h 30 min', '1 h 59 min', '2 h 0 min', '2 h 0 min']

def test_a_board_says_what_runs_and_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv('YFPO_PROGRESS', str(tmp_path/'a'))
    bar, said, steps = track(total=8, desc='yfpo', unit='steps'), [], [dict(label='a', needs=[]), dict(label='b', needs=['a'])]
    with Ticking(steps, dict(a=60., b=60.), 1, lambda x, **kw: said.append(x), every=.3, file_of=lambda l: tmp_path/l) as board:
        board.starts('a', '[1/2] a')
        for _ in range(8): bar.update()
        time.sleep(.7)
        board.ends('a', '[1/2] a ... 1 s')
    assert said[0] == '[1/2] a ...' and said[-1] == '[1/2] a ... 1 s'
    assert re.fullmatch(r'    a: yfpo 8 of 8 steps, \d s \| about \d+ (s|min) left', said[1]), said

def test_progress_of_a_broken_file_is_nothing(tmp_path):
    (tmp_path/'p').write_text('{"what": "sc')
    assert read_progress(tmp_path/'p') == ('', 0.)

def test_steps_beside_each_other_measure_once(tmp_path, monkeypatch):
    monkeypatch.setenv('YFPO_RUN', str(tmp_path))
    made = []
    def make(): made.append(len(made)); time.sleep(.2); return made[-1]
    with ThreadPoolExecutor(3) as pool: assert [*pool.map(lambda _: machine.measured('x', make), range(3))] == [0, 0, 0]

# --- kernels that start as copies

def test_copies_share_nothing_and_end_with_the_template(tmp_path):
    import nbformat
    from yfpo.lab.warm import KernelTemplate
    def run(t, name, code):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)],
                                      metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
        nbformat.write(nb, tmp_path/f'{name}.ipynb')
        spec = dict(notebook=str(tmp_path/f'{name}.ipynb'), out=str(tmp_path/f'{name}-out.ipynb'), params={}, cwd=str(tmp_path))
        return t.run(spec, {}, tmp_path/f'{name}.log', tmp_path)
    t = KernelTemplate(['papermill', 'ipykernel.kernelapp', 'colorsys'])
    try:
        assert run(t, 'a', "import colorsys; colorsys.mine = 1; open('pid', 'w').write(str(__import__('os').getpid()))") == 0
        assert run(t, 'b', "import colorsys; assert not hasattr(colorsys, 'mine')") == 0
        assert run(t, 'c', 'import os; os._exit(3)') != 0
        assert run(t, 'd', 'import os; from ipykernel.kernelapp import IPKernelApp as app\n'
                   'assert app.instance().parent_handle == os.getppid(), "it ends with the template where the system has no prctl"') == 0
    finally: t.close()
    assert t.process.poll() is not None and not Path(f"/proc/{(tmp_path/'pid').read_text()}").exists()

def test_a_template_that_cannot_import_says_so(tmp_path):
    from yfpo.lab.warm import KernelTemplate
    t = KernelTemplate(['no_such_module'])
    with pytest.raises(ValueError, match='could not import'): t.run({}, {}, tmp_path/'log', tmp_path)
    t.close()

def test_one_request_that_fails_leaves_the_template_to_the_others(tmp_path, monkeypatch):
    "A client that is killed while it speaks, and a system that has no process left"
    from yfpo.lab.warm import _fork
    monkeypatch.setattr(os, 'fork', mock.Mock(side_effect=BlockingIOError(11, 'Resource temporarily unavailable')))
    with socket.socket(socket.AF_UNIX) as door:
        monkeypatch.chdir(tmp_path); door.bind('door'); door.listen()              # a short path
        whole = json.dumps(dict(env=dict(YFPO_LOG=str(tmp_path/'log')))).encode() + b'\n'
        for said, code in ((b'{"env": {', b''), (whole, b'{"code": 1}\n')):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(door.getsockname())
                client.sendall(said); client.shutdown(socket.SHUT_WR)
                _fork(door, {})
                assert client.makefile('rb').read() == code
    assert 'Resource temporarily unavailable' in (tmp_path/'log').read_text()

# --- the warm start shares what its batch begins with

def test_a_packed_warm_start_is_trls(tiny, tmp_path, monkeypatch):
    import copy
    from trl import SFTTrainer
    from yfpo.lm import training as T
    from yfpo.data.templates import make_problems
    from yfpo.data.answers import strip_annotations
    from yfpo.data.problems import prompt_messages
    rows = [dict(prompt=prompt_messages(p.question), completion=[dict(role='assistant', content=strip_annotations(p.solution))])
            for p in make_problems(12, seed=5)]
    made = []
    for cls in (T.PackedSFTTrainer, SFTTrainer):
        monkeypatch.setattr(T, 'PackedSFTTrainer', cls)
        model = copy.deepcopy(tiny[0])
        made.append((T.train_sft(model, tiny[1], rows, tmp_path, learning_rate=1e-3, per_device_train_batch_size=4), model))
    (a, x), (b, y) = made
    assert [r['loss'] for r in a] == pytest.approx([r['loss'] for r in b], abs=1e-5) and len(a) == 3
    assert all(r['learning_rate'] > 0 for r in a), 'every step moves the model'
    for p, q in zip(x.parameters(), y.parameters()): assert torch.allclose(p, q, atol=2e-4)

def test_a_container_grants_fewer_cores_and_less_memory_than_the_machine_has(monkeypatch):
    from yfpo.lm import machine
    texts = {'/sys/fs/cgroup/cpu.max': '150000 100000', '/sys/fs/cgroup/memory.max': str(2**30)}
    read = Path.read_text
    monkeypatch.setattr(Path, 'read_text', lambda self, *a, **k: texts.get(str(self)) or read(self, *a, **k))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    assert (machine.cores_here(), machine.hardware()['memory_gib']) == (2, 1.0)
    texts['/sys/fs/cgroup/cpu.max'] = 'max 100000'
    assert machine.cores_here() == 64
