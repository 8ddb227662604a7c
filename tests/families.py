"Small random models of every family of `FAMILIES`, and of what a row covers beside its defaults: a new row needs nothing here"
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from yfpo.beyond import families
from yfpo.beyond.families import SIZES as SMALL, small_config
from yfpo.lm.families import FAMILIES

VARIANTS = {'gpt_neox one after the other': ('gpt_neox', dict(use_parallel_residual=False)),
            'stablelm parallel': ('stablelm', dict(use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True)),
            'cohere with norms': ('cohere', dict(use_qk_norm=True)), 'glm4 with biases': ('glm4', dict(attention_bias=True)),
            'granite with biases': ('granite', dict(attention_bias=True, mlp_bias=True)),
            'gemma4 that shares keys': ('gemma4_text', dict(num_kv_shared_layers=1, hidden_size_per_layer_input=24)),
            'gemma4 with keys as values': ('gemma4_text', dict(attention_k_eq_v=True, hidden_size_per_layer_input=0)),
            'qwen3.5 with biases': ('qwen3_5_text', dict(attention_bias=True))}

def parted(family): return VARIANTS.get(family, (family, {}))

def row(family): return FAMILIES[parted(family)[0]]

def of_family(family, attn=None, seed=1, **sizes):
    "A small random model of the real class; of a family, or of one of `VARIANTS`"
    family, more = parted(family)
    torch.manual_seed(seed)
    config = small_config(family, **more, **sizes)
    return AutoModelForCausalLM.from_config(config, **(dict(attn_implementation=attn) if attn else {})).eval()

def capped(family): # which sdpa cannot do
    return getattr(AutoConfig.for_model(parted(family)[0]), 'attn_logit_softcapping', None) is not None

def random_model(family, attn='sdpa', seed=1, **sizes):
    "One whose norm gains and biases are random too"
    name, more = parted(family)
    return families.random_model(name, 'eager' if capped(family) else attn, seed, **more, **sizes)
