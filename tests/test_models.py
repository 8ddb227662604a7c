"A GGUF file is converted once, kept under the hash of its content, and read from there; what cannot be read says so in a sentence."
import shutil, subprocess, sys
import gguf, numpy as np, pytest, torch
from conftest import ROOT
from yfpo import models
from yfpo.models import byte_tokenizer, embedded_gguf, from_gguf, load_model, save_model, tiny_model

def rotated(w, heads):
    "Rows of a query or key projection in llama.cpp's order: its rotary pairs are neighbours, those of transformers half a head apart"
    return w.reshape(heads, 2, w.shape[0]//heads//2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

def write_gguf(path, model, pad=2, arch='llama', template=None, leave=(), eos=2):
    "A float32 GGUF file of a tiny Llama with the vocabulary of `byte_tokenizer`"
    c, tok, w = model.config, byte_tokenizer(), gguf.GGUFWriter(path, arch)
    w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size); w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size); w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(c.rope_parameters['rope_theta']); w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('default'); w.add_chat_template(template or tok.chat_template)
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
from yfpo import models
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
    program = 'import sys; from yfpo.models import load_model; print(load_model(sys.argv[1])[0].num_parameters())'
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
