"Faults that users of TRL, PEFT and interpretability tools have reported, tried here: adapters, caches, stops."
import copy
from contextlib import nullcontext
import pytest, torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_trainer import PAIRS, config, make, run, tiny  # noqa: F401
from yfpo.beyond.families import random_model
from yfpo.interventions import patch_from
from yfpo.lm.decoding import _ending, completions
from yfpo.lm.models import byte_tokenizer, load_model, save_model
from yfpo.neurons import NeuronSet, capability_relevance, model_signature
from yfpo.trainer import YFPOTrainer

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
LORA = dict(r=4, target_modules=['q_proj', 'down_proj'], task_type='CAUSAL_LM')

def first_neurons(model):
    at = torch.arange(0, 48, 3)
    return NeuronSet(torch.zeros_like(at), at, torch.full((16,), 1/16), torch.ones(16), dict(model=model_signature(model)))

def woken(model):
    "With random numbers in what an adapter trains"
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.05*torch.randn(p.shape, generator=g))
    return model

def of(tiny, **how): return woken(get_peft_model(copy.deepcopy(tiny[0]), LoraConfig(**LORA, **how)))
def logits(model): return model.eval()(torch.arange(3, 20)[None]).logits.detach()

def test_a_checkpoint_is_not_the_beginning_of_its_own_training(tiny, tmp_path):
    "Its adapter would be taken for the reference"
    sft, how = of(tiny), dict(neuron_weight=.5, max_steps=4, save_strategy='steps', save_steps=2)
    run(tiny, tmp_path, model=copy.deepcopy(sft), **how)
    with pytest.raises(ValueError, match='is of a training with other weights'):
        run(tiny, tmp_path, model=load_model(str(tmp_path/'checkpoint-2'))[0], resume=str(tmp_path/'checkpoint-2'), **how)
    t = run(tiny, tmp_path, model=copy.deepcopy(sft), resume=str(tmp_path/'checkpoint-2'), **how)
    assert t.state.global_step == 4

def test_only_the_adapter_that_is_on_can_be_trained_or_saved(tiny, tmp_path):
    model = of(tiny)
    model.add_adapter('other', LoraConfig(**LORA))
    model.set_adapter('other')
    with pytest.raises(ValueError, match="of the adapters of model, other is on, and TRL trains 'default'"):
        make(tiny, tmp_path, model=model)
    with pytest.raises(ValueError, match="the adapters other are on"): save_model(model, tiny[1], tmp_path/'m')
    model.base_model.set_adapter(['default', 'other'])
    with pytest.raises(ValueError, match='default and other is on'): make(tiny, tmp_path, model=model)
    model.set_adapter('default')
    assert make(tiny, tmp_path, model=model)
    assert torch.equal(logits(load_model(str(save_model(model, tiny[1], tmp_path/'m')))[0]), logits(model))

@pytest.mark.parametrize('loaded', [True, False])
def test_biases_of_the_base_are_not_trained_without_a_reference(tiny, tmp_path, loaded):
    base = random_model('qwen2', vocab_size=259)
    def trainer(bias, **kw):
        how = LoraConfig(**LORA, bias=bias)
        model = get_peft_model(copy.deepcopy(base), how) if loaded else copy.deepcopy(base)
        return YFPOTrainer(model, args=config(tmp_path, neuron_weight=.5), train_dataset=PAIRS, processing_class=byte_tokenizer(),
                           neurons=first_neurons(base), **kw, **({} if loaded else dict(peft_config=how)))
    with pytest.raises(ValueError, match="trains biases of the base \\(bias='all'\\)"): trainer('all')
    assert trainer('none')

@pytest.mark.parametrize('tied', [True, False])
def test_an_adapter_of_single_tokens_comes_back(tied, tmp_path):
    base = random_model('qwen2', vocab_size=259, tie_word_embeddings=tied)
    model = woken(get_peft_model(base, LoraConfig(**LORA, trainable_token_indices=[3, 5])))
    again = load_model(str(save_model(model, byte_tokenizer(), tmp_path/'m')))[0]
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    with pytest.raises(ValueError, match='the model knows those below 259'):
        from yfpo.lm.decoding import check_tokens
        check_tokens(model, [[300]])

def test_adapters_beside_the_weights_are_refused_everywhere(tiny, tmp_path):
    from yfpo.lm.responses import response_logprobs
    model = get_peft_model(copy.deepcopy(tiny[0]), PrefixTuningConfig(num_virtual_tokens=4, task_type='CAUSAL_LM'))
    says = 'PrefixTuningConfig, which adds to the text that is read: use LoRA'
    for f in (lambda: make(tiny, tmp_path, model=model), lambda: save_model(model, tiny[1], tmp_path/'m'),
              lambda: response_logprobs(model, tiny[1], ['1 + 1 = 2'])):
        with pytest.raises(ValueError, match=says): f()

@pytest.mark.parametrize('how', [dict(num_beams=3), dict(prompt_lookup_num_tokens=3)], ids=['beams', 'prompt lookup'])
def test_a_donor_follows_when_rows_of_the_cache_change(how):
    m = random_model('llama', vocab_size=259)
    donor, at = copy.deepcopy(m), first_neurons(m)
    for layer in donor.model.layers: layer.mlp.gate_proj.weight.data *= 2
    ids = torch.arange(3, 11)[None].repeat(1, 2)
    def made(cached):
        with patch_from(m, donor, at): return m.generate(ids, do_sample=False, max_new_tokens=12, use_cache=cached, **(how if cached or
                                                         'num_beams' in how else {})).tolist()
    assert made(True) == made(False)

def test_a_cache_begun_outside_a_patch_is_refused():
    m = random_model('llama', vocab_size=259)
    donor, ids = copy.deepcopy(m), torch.arange(3, 11)[None]
    for layer in donor.model.layers: layer.mlp.gate_proj.weight.data *= 2
    begun = m(ids, use_cache=True).past_key_values
    with patch_from(m, donor, first_neurons(m)), pytest.raises(ValueError, match='begun outside `patch_from`'):
        m(ids[:, :1], past_key_values=begun)

def test_a_static_cache_is_refused_under_a_donor():
    m = random_model('llama', vocab_size=259)
    with patch_from(m, copy.deepcopy(m), first_neurons(m)), pytest.raises(ValueError, match='generate without a static one'):
        m.generate(torch.arange(3, 11)[None], do_sample=False, max_new_tokens=4, cache_implementation='static', disable_compile=True)

@pytest.mark.parametrize('family, full', [('gpt2', True), ('llama', False)])
def test_learned_positions_have_an_end(tiny, family, full):
    "GPT-2 stops with an IndexError past its last position; where positions are computed, writing goes on"
    m, tok = random_model(family, vocab_size=len(tiny[0].get_input_embeddings().weight), max_position_embeddings=16), tiny[1]
    def written(new): return [x for _, some in completions(m, tok, ['2 + 2 ='], max_new_tokens=new) for x in some]
    n = len(tok('2 + 2 =').input_ids)
    assert len(written(17 - n)) == 1
    with pytest.raises(ValueError, match=f'{n} tokens and max_new_tokens={18 - n} need 17 positions') if full else nullcontext():
        assert len(written(18 - n)) == 1

def test_relevance_says_that_it_needs_gradients(tiny):
    with torch.inference_mode(), pytest.raises(ValueError, match='leave torch.inference_mode'):
        capability_relevance(*tiny, [('2 + 2 =', ' 4')], [('The sea', ' is calm')])

def test_predict_says_what_it_takes(tiny, tmp_path):
    t = make(tiny, tmp_path, neuron_weight=.5, trainer_kw=dict(eval_dataset=PAIRS[:4]))
    with pytest.raises(ValueError, match='for pairs there are `evaluate` and `effect`'): t.predict(PAIRS[:4])
    assert t.predict(t.eval_dataset).metrics['test_loss'] == pytest.approx(t.evaluate()['eval_loss'])

@pytest.mark.parametrize('stop', ['😀', '答案：', 'ab'])
def test_a_stop_of_many_bytes_is_seen(tiny, stop):
    over = _ending(tiny[0], tiny[1], (stop,))
    ids = tiny[1]('xy' + stop, add_special_tokens=False).input_ids
    assert over(ids) and not any(over(ids[:n]) for n in range(1, len(ids)))
