"Small random models of every family of `FAMILIES`: a new row of that table needs nothing here"
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from yfpo.relevance import FAMILIES

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, sliding_window=9, initializer_range=.15, pad_token_id=0, bos_token_id=1, eos_token_id=2)

def small_config(family, **sizes):
    "Of the small sizes those that the family's configuration has; a window only where it has one by default"
    own = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **{k: v for k, v in {**SMALL, **sizes}.items() if hasattr(own, k) and
                                           (k != 'sliding_window' or own.sliding_window)})

def of_family(family, attn=None, seed=1, **sizes):
    "A small random model of the real class"
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(small_config(family, **sizes), **(dict(attn_implementation=attn) if attn else {})).eval()

def capped(family): return getattr(AutoConfig.for_model(family), 'attn_logit_softcapping', None) is not None   # which sdpa cannot do

def random_model(family, attn='sdpa', seed=1, **sizes):
    "One whose norm gains and biases are random too"
    m, centre = of_family(family, 'eager' if capped(family) else attn, seed, **sizes), 0. if FAMILIES[family].norm == 'rms+1' else 1.
    for name, p in m.named_parameters():
        gain = name.endswith('weight') and ('norm' in name or '.ln_' in name)
        if gain or name.endswith('bias'): torch.nn.init.normal_(p, centre if gain else 0., .3)
    return m
