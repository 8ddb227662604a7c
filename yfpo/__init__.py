"""YFPO, step by step: find a capability's neurons with AttnLRP, reward their activation margin beside DPO, and ask whether it helped.

The method is on the top floor, in the paper's order: `yfpo.relevance`, `neurons`, `reward`, `loss`, `trainer`, `interventions`, `evaluate`.
`yfpo.data` holds what is asked and preferred, `yfpo.lm` the language model as a tool, `yfpo.beyond` what goes further than the paper,
`yfpo.lab` the experiments. Each module is made from the notebook of its name. The names of `__all__` can be imported from here:

    from yfpo import YFPOConfig, YFPOTrainer, load_model, select_neurons
"""
__version__ = "0.1.0"

_HOME = dict(load_model='lm.models', save_model='lm.models', generate='lm.responses', select_neurons='neurons', layer_matched='neurons',
             NeuronSet='neurons', attribute='relevance', attnlrp='relevance', fit_stats='reward', NeuronReader='reward',
             YFPOConfig='trainer', YFPOTrainer='trainer', ablate='interventions', delta_nll='interventions',
             neuron_cards='beyond.cards', make_problems='data.templates', audit='lab.audit', effect='lab.effect')
__all__ = [*_HOME]

def __getattr__(name):
    "Import a name from its room when it is first asked for, so that `import yfpo` takes no time"
    if name not in _HOME: raise AttributeError(f"module 'yfpo' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'yfpo.{_HOME[name]}'), name)

def __dir__(): return sorted([*globals(), *_HOME])
