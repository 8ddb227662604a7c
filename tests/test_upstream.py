"Upstream moves: what we touch beyond public APIs, lxt under these transformers, and an adapter that plain PEFT reads back"
import ast, copy, functools, inspect, re, sys
from importlib.metadata import version
from pkgutil import resolve_name
import pytest, torch
from conftest import ROOT

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')

MODELING = 'transformers.models.llama.modeling_llama'
QWEN = 'transformers.models.qwen3_5.modeling_qwen3_5'
MIXTRAL = 'transformers.models.mixtral.modeling_mixtral'
# where it lives: {name: what it is for}; `()` marks an object of `made`, the rest is imported
TOUCHED = {
    'transformers.AttentionInterface': dict(_global_mapping='give one model its own attention function, and take it out again'),
    'transformers.masking_utils.AttentionMaskInterface': dict(_global_mapping='give that function the masks of the one it stands in for'),
    'torch.Tensor': dict(_version='hash the weights of a model again only if they changed'),
    'transformers.LlamaConfig': dict(_attn_implementation='know which attention function a model has, and so which masks it takes'),
    'transformers.DynamicLayer': dict(
        is_initialized='know whether a cache layer with room has its first tokens', lazy_initialization='give that layer dtype and device',
        batch_select_indices='drop the rows that are done from the cache', keys='hand attention the part of the cache that is filled',
        values='hand attention the part of the cache that is filled'),
    'transformers.DynamicCache': dict(layers='take keys and values of a beginning that all prompts share'),
    'transformers.PreTrainedModel': dict(
        hf_quantizer='turn a model read from GGUF into an ordinary one', is_quantized='turn a model read from GGUF into an ordinary one',
        quantization_method='turn a model read from GGUF into an ordinary one',
        is_activation_checkpointing='undo what a trainer leaves on a model'),
    'transformers.Trainer': dict(
        _signature_columns='keep our columns in the batches', _remove_unused_columns='read a dataset as the trainer will see it',
        model_accepts_loss_kwargs='scale the neuron term as the loss is scaled', _prepare_inputs='make a batch in tests',
        current_gradient_accumulation_steps='scale the neuron term as the loss is scaled',
        _get_grad_norm='stop at a gradient that is not finite, before the optimiser moves',
        _train_batch_size='change the batch size in tests', _save='kill a run while it writes its model, in tests',
        _save_rng_state='kill a run while it writes its random state, in tests',
        _save_optimizer_and_scheduler='kill a run while it writes its optimizer, in tests'),
    'transformers.pytorch_utils': dict(Conv1D="tell GPT-2's transposed weights from others"),
    MODELING: dict(eager_attention_forward='wrap eager attention, which is in no registry'),
    f'{MODELING}.LlamaAttention': dict(layer_idx='find the shared keys and values of a layer',
                                       num_key_value_groups='repeat keys and values for capped attention'),
    f'{MODELING}.LlamaModel': dict(layers='find the blocks of a model', norm='find the norm before the output head'),
    f'{MODELING}.LlamaMLP': dict(gate_proj='split an MLP into gate and up', up_proj='split an MLP into gate and up',
                                 down_proj='read neurons at its input', act_fn='know the activation, and so its rule'),
    f'{MODELING}.LlamaRMSNorm': dict(variance_epsilon='hold the norm constant in a backward pass'),
    'transformers.activations': dict(ACT2FN="run the activation of Qwen 3.5's delta rule by the identity rule"),
    f'{QWEN}.Qwen3_5GatedDeltaNet': dict.fromkeys(
        ('in_proj_qkv', 'in_proj_z', 'in_proj_b', 'in_proj_a', 'out_proj', 'conv1d', 'A_log', 'dt_bias', 'norm', 'key_dim', 'value_dim',
         'head_k_dim', 'head_v_dim', 'num_k_heads', 'num_v_heads', 'activation', 'layer_idx'), 'run the delta rule with its shares'),
    f'{QWEN}.Qwen3_5DecoderLayer': dict(linear_attn='find layers with the delta rule',
                                         self_attn='find layers whose attention has a gate'),
    f'{MIXTRAL}.MixtralExperts': dict(gate_up_proj='compute the neurons of experts', down_proj='know what the neurons of experts write',
                                      act_fn='compute the neurons of experts'),
    f'{MIXTRAL}.MixtralSparseMoeBlock': dict(experts='find the experts of a layer'),
    'transformers.models.granitemoe.modeling_granitemoe.GraniteMoeDecoderLayer': dict(block_sparse_moe='find the MLP'),
    'transformers.models.lfm2.modeling_lfm2.Lfm2ShortConv': dict(in_proj='give the factors of a gated convolution their shares'),
    'transformers.models.lfm2.modeling_lfm2.Lfm2DecoderLayer': dict(conv='find the layers with a convolution', feed_forward='find the MLP'),
    'transformers.models.gemma4.modeling_gemma4.Gemma4TextDecoderLayer': dict(
        per_layer_input_gate='know the models with an input for each layer', act_fn='run the activation of that input by its rule'),
    'transformers.models.gemma4.modeling_gemma4.Gemma4TextModel': dict(per_layer_projection_norm='hold the inputs of each layer constant'),
    'transformers.Cache': dict(get_conv_state='go on from a prompt, in a layer with the delta rule',
                               get_recurrent_state='go on from a prompt, in a layer with the delta rule'),
    'transformers.cache_utils.LinearAttentionLayer': dict(
        recurrent_states='keep a state that a gradient needs',
        is_recurrent_states_initialized='have the next pass write its state elsewhere'),
    'trl.DPOTrainer': dict(
        _tag_names='tag the model card', _name='name the method on the model card', _paper='cite the paper on the model card',
        _set_signature_columns_if_needed='keep our columns in the batches',
        _prepare_dataset='count the pairs that are lost, and mark the tokens that are read',
        compute_ref_log_probs='share prompts in the reference pass', create_model_card='add our sections to the model card',
        _compute_loss="hold our list of losses against TRL's, in tests"),
    'trl.DPOTrainer()': dict(
        _metrics="log neuron metrics beside TRL's",
        precompute_ref_logps="have the loss take the reference's log-probabilities from the batch",
        aux_loss_enabled='leave a mixture of experts with an auxiliary loss alone', ref_model='read the reference',
        _tokenizer='write and read the texts of the pairs'),
    'trl.DPOTrainer().train_dataset': dict(prompt_ids='read neurons on the tokens of the pairs', chosen_ids='read neurons on the pairs',
                                           rejected_ids='read neurons on the tokens of the pairs'),
    'trl.DPOTrainer().data_collator()': dict(input_ids='pack a batch', attention_mask='pack a batch',
                                             completion_mask='know which tokens are the response'),
    'trl.trainer.utils.FusedCausalLMOutput': dict.fromkeys(
        ('log_probs', 'entropy', 'mean_logits', 'is_top1', 'log_sum_sq_probs', 'loss', 'aux_loss'),
        'answer in its place when prompts are shared'),
    'trl.trainer.utils': dict(_use_triton='score response tokens only, on a CPU too',
                              use_adapter='make a LoRA policy its own reference'),
    'trl.kernels.chunked_logprob': dict(TOKEN_CHUNK_SIZE='score tokens in small tiles on a CPU'),
    'trl.models.utils': dict(disable_gradient_checkpointing='read the reference of the anchor without checkpointing'),
    'trl.SFTTrainer': dict(_metrics="log the neuron term beside TRL's metrics"),
    'trl.KTOTrainer': dict(_metrics="log the neuron term beside TRL's metrics"),
    'trl.experimental.cpo.CPOTrainer': dict(concatenated_inputs='lay a batch out as CPO does', pad_token_id='pad as CPO does',
                                            store_metrics="log the neuron term beside CPO's metrics"),
    'trl.experimental.orpo.ORPOTrainer': dict(concatenated_inputs='lay a batch out as ORPO does', padding_value='pad as ORPO does',
                                              store_metrics="log the neuron term beside ORPO's metrics"),
    'peft.tuners.lora.Linear()': dict(
        base_layer='find the weights inside a LoRA layer', lora_B='multiply an adapter out', scaling='weigh an adapter',
        active_adapters='add the adapter to write norms', disable_adapters='leave the adapter out of write norms of the reference',
        merged='count an adapter once', lora_A='know which adapters a layer has'),
    'peft.LoraConfig': dict(is_prompt_learning='leave prompt learning unpacked', alora_invocation_tokens='leave activated LoRA unpacked'),
    'torch.nn.Module()': dict(_forward_hooks='see who else edits a model before prompts are shared',
                              _forward_pre_hooks='see who else edits a model before prompts are shared'),
    'gguf': dict(GGUFReader='parse a GGUF file once', get_tensor_name_map='make its table of names once'),
    'papermill.exceptions.PapermillExecutionError': dict(ename='say why a notebook failed', evalue='say why a notebook failed'),
    'lxt.efficient.patches()': dict(rms_norm_forward='compare our rules with those of lxt', gated_mlp_forward='compare our rules with lxt',
                                    wrap_attention_forward='compare our rules with those of lxt')}
# what we set from outside works only where upstream looks it up by that name at every call
LOOKED_UP = {
    'transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint': 'import GGUFReader',
    'transformers.modeling_gguf_pytorch_utils.get_gguf_hf_weights_map': 'get_tensor_name_map(',
    'trl.trainer.utils.add_fused_lm_head': '_use_triton(', 'trl.kernels.ChunkedLogProbFunction': 'range(0, N, TOKEN_CHUNK_SIZE)',
    f'{MIXTRAL}.MixtralSparseMoeBlock': 'self.experts(hidden_states, top_k_index, top_k_weights)',
    'trl.trainer.utils': 'num_experts = text_config.num_experts',
    'trl.DPOTrainer._compute_loss': 'if self.precompute_ref_logps:', 'trl.DPOTrainer.log': 'self._metrics[mode]',
    'trl.DPOTrainer.compute_ref_log_probs': 'fused_lm_head=True'}
OURS = {'_attnlrp'}                                            # set on models of others
PYTHON = {'_asdict', '_replace', '_abc_impl', '_exit', '_run_exitfuncs', '_actions', '_add_action'}     # of os, atexit, argparse and such
NAMES = {n for names in TOUCHED.values() for n in names}

def found(where):
    "The object at a dotted path, or None"
    pytest.importorskip(where.split('.')[0])
    try: return resolve_name(where)
    except (ImportError, AttributeError): return None

source = functools.cache(inspect.getsource)

def has(o, name):
    "Whether an object or class has `name`, be it as a key, as an attribute, or as one that its methods set"
    if isinstance(o, (dict, list)): return name in o
    if hasattr(o, name) or not inspect.isclass(o): return hasattr(o, name)
    return any(re.search(rf'[."\']{name}\b', source(c)) for c in o.__mro__ if c.__module__ != 'builtins')

@pytest.fixture(scope='module')
def made(tiny, tmp_path_factory):
    "Function of a path with `()` that gives the object, made by upstream alone: code of ours would stop at the first name it misses"
    def trainer():
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        args = DPOConfig(output_dir=str(tmp_path_factory.mktemp('dpo')), use_cpu=True, bf16=False, report_to='none')
        return DPOTrainer(model=copy.deepcopy(tiny[0]), ref_model=copy.deepcopy(tiny[0]), args=args, processing_class=tiny[1],
                          train_dataset=Dataset.from_list([dict(prompt='3 + 4 =', chosen=' 7', rejected=' 8')]))
    def lora(): return found('peft.get_peft_model')(copy.deepcopy(tiny[0]), found('peft.LoraConfig')(target_modules=['down_proj']))
    make_it = {'trl.DPOTrainer()': trainer, 'trl.DPOTrainer().train_dataset': lambda: get('trl.DPOTrainer()').train_dataset.column_names,
               'trl.DPOTrainer().data_collator()': lambda: (t := get('trl.DPOTrainer()')).data_collator([t.train_dataset[0]]),
               'peft.tuners.lora.Linear()': lambda: lora().get_base_model().model.layers[0].mlp.down_proj,
               'torch.nn.Module()': torch.nn.Module,
               'lxt.efficient.patches()': lambda: resolve_name('yfpo.beyond.identities').lxt_patches()}
    @functools.cache
    def get(where):
        pytest.importorskip(where.split('.')[0])
        try: return make_it[where]()
        except (ImportError, AttributeError): return None
    return get

@pytest.fixture(scope='module')
def trained(tiny, tmp_path_factory):
    "A LoRA run of two steps, and the folder it was saved in"
    from test_trainer import make
    lora = pytest.importorskip('peft').LoraConfig(r=4, target_modules=['q_proj', 'up_proj', 'down_proj'], task_type='CAUSAL_LM')
    folder = tmp_path_factory.mktemp('lora')
    t = make(tiny, folder/'run', neuron_weight=0.5, learning_rate=1e-2, max_steps=2, trainer_kw=dict(peft_config=lora))
    t.train()
    t.save_model(str(folder/'saved'))
    return t, folder/'saved'

def lines(where):
    "Source of a function or class, or '' where there is none"
    o = found(where)
    return '' if o is None else source(o)

# ---- names

@pytest.mark.parametrize('where, name', [(w, n) for w, names in TOUCHED.items() for n in names], ids=lambda x: x)
def test_upstream_still_has(where, name, made):
    package, o = where.split('.')[0], made(where) if '()' in where else found(where)
    assert o is not None and has(o, name), f'{package} {version(package)} has no `{where}.{name}`: we use it to {TOUCHED[where][name]}'

@pytest.mark.parametrize('where, line', LOOKED_UP.items(), ids=lambda x: x)
def test_upstream_still_looks_up_what_we_set(where, line):
    package = where.split('.')[0]
    assert line in lines(where), f'{package} {version(package)} has no `{line}` in `{where}`: what we set or pass there has no effect'

def sources(folder): return {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT/folder).rglob('*.py')) if p.name != '_modidx.py'}

def private(text):
    "Names with one underscore in attribute accesses, `getattr` and its kin, class bodies and imports"
    one, kin = re.compile(r'_(?!_)'), ('getattr', 'hasattr', 'setattr', 'delattr')
    for n in ast.walk(ast.parse(text)):
        new = []
        if isinstance(n, ast.Attribute): new = [n.attr]
        elif isinstance(n, ast.Call) and getattr(n.func, 'id', '') in kin: new = [getattr(a, 'value', None) for a in n.args[1:2]]
        elif isinstance(n, ast.ClassDef): new = [t.id for b in n.body if isinstance(b, ast.Assign) for t in b.targets if hasattr(t, 'id')]
        elif isinstance(n, ast.ImportFrom) and not n.level and not (n.module or '').startswith('yfpo'): new = [a.name for a in n.names]
        yield from (x for x in new if isinstance(x, str) and one.match(x))

def defined(text): return {n.name for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}

@pytest.mark.parametrize('folder', ['yfpo', 'tests'])
def test_every_private_name_is_in_the_table(folder):
    own = set().union(OURS, PYTHON, *(defined(s) for d in ('yfpo', folder) for s in sources(d).values()))
    lost = sorted({f'{f} uses `{n}`' for f, s in sources(folder).items() for n in private(s) if n not in own | NAMES})
    assert not lost, f'{"; ".join(lost)}: find a public way, or say in TOUCHED what it is for'

def test_no_name_in_the_table_is_out_of_use():
    text = '\n'.join(s for d in ('yfpo', 'tests') for f, s in sources(d).items() if f != 'tests/test_upstream.py')
    unused = [n for n in sorted(NAMES) if not re.search(rf'\b{n}\b', text)]
    assert not unused, f'{", ".join(unused)}: nothing uses it any more, drop it from TOUCHED'

def test_no_private_name_of_ours_hides_one_of_theirs():
    modules = [resolve_name(f'yfpo.{m}')
               for m in ('lm.decoding', 'lm.training', 'trainer', 'beyond.dynamic', 'beyond.methods', 'beyond.monitors')]
    classes = [c for m in modules for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]
    hidden = [f'{c.__name__}.{n}' for c in classes for n in vars(c) if re.match(r'_(?!_)', n) and n not in NAMES | PYTHON
              for b in c.__mro__ if not b.__module__.startswith(('yfpo', 'builtins')) and has(b, n)]
    assert not hidden, f'{", ".join(hidden)}: upstream has a name like this now, rename ours'

# ---- lxt

def test_lxt_patches_come_without_its_model_zoo():
    "The zoo imports what transformers has dropped; that the rules are ours is in test_relevance"
    from yfpo.beyond.identities import lxt_patches
    before = {m: sys.modules.pop(m) for m in [*sys.modules] if m.split('.')[0] == 'lxt'}
    try:
        p = lxt_patches()
        assert p.__name__ == 'lxt.efficient.patches' and all(callable(getattr(p, n)) for n in TOUCHED['lxt.efficient.patches()'])
        assert not {'lxt.efficient', 'lxt.efficient.models'} & {*sys.modules}
    finally:
        for m in [m for m in sys.modules if m.split('.')[0] == 'lxt']: del sys.modules[m]
        sys.modules.update(before)

def test_lxt_scope_leaves_nothing_behind(tiny):
    from yfpo.beyond.identities import lxt_attnlrp
    m, ids = copy.deepcopy(tiny[0]), torch.arange(3, 30)[None]
    def look(): return {n: sorted(x.__dict__) for n, x in m.named_modules()}, m.config.to_dict(), m.config._attn_implementation
    def gradient(): return torch.autograd.grad(m(input_ids=ids).logits.sum(), m.model.embed_tokens.weight)[0]
    before, plain = look(), gradient()
    with lxt_attnlrp(m): assert look() != before and not torch.allclose(gradient(), plain)
    assert look() == before and torch.equal(gradient(), plain)

# ---- LoRA

def test_plain_peft_reads_the_saved_adapter(tiny, trained):
    from peft import PeftModel
    from test_trainer import PAIRS
    from yfpo.neurons import NeuronSet
    t, folder = trained
    assert {'adapter_config.json', 'adapter_model.safetensors'} <= {p.name for p in folder.iterdir()}
    again = PeftModel.from_pretrained(copy.deepcopy(tiny[0]), folder).eval()
    ids = torch.tensor([tiny[1].apply_chat_template(PAIRS[0]['prompt'] + PAIRS[0]['chosen'])['input_ids']])
    with torch.no_grad(): ours, theirs, base = (m(input_ids=ids).logits for m in (t.model.eval(), again, tiny[0]))
    assert torch.equal(ours, theirs) and (theirs - base).abs().max() > 1e-2
    assert NeuronSet.load(folder/'neurons') == t.neurons
