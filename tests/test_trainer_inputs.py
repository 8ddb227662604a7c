"What comes into the trainer from outside: rows, settings, models, caches, folders and checkpoints of another make"
import copy, hashlib, json, shutil
import pandas as pd, pytest, torch
from datasets import Dataset, DatasetDict
from transformers import LlamaModel
from yfpo.beyond.dose import fit_dose
from yfpo.lm.models import byte_tokenizer, load_model, save_model, tiny_model
from yfpo.reward import RewardStats
from yfpo.lm.rows import completion_dataset, preference_dataset
from yfpo.trainer import YFPOConfig, YFPOTrainer, _began
from yfpo.lm.training import BeganNote, complete_checkpoint, train_sft
from test_trainer import PAIRS, batch_of, config, equal_weights, make, run, some_neurons, tiny  # noqa: F401

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
TEXT = [dict(prompt=f'{a} + 1 = ', chosen=f'it is {a + 1}.', rejected=f'it is {a}, or so.') for a in range(5)]
SFT = [dict(prompt=r['prompt'], completion=r['chosen']) for r in TEXT]

# --- rows

@pytest.mark.parametrize('rows, words', [
    (None, 'there is no train_dataset'), ('hello', "train_dataset is 'hello'"), (dict(a=[1], b=[2]), 'is a dict of a, b: give one'),
    (DatasetDict(train=Dataset.from_list(TEXT)), 'is a DatasetDict of train: give one of its sets'), (iter(TEXT), 'is a stream'),
    ([TEXT[0], None], 'row 1 of train_dataset is of type NoneType: give a dict'), ([('a', 'b', 'c')], 'row 0 .* is of type tuple'),
    ({'x', 'y'}, 'give a list of dicts or a Dataset'), (3, 'train_dataset is 3')])
def test_what_is_no_table_is_named(rows, words):
    for f in (preference_dataset, lambda r: completion_dataset(r, 'train_dataset')):
        with pytest.raises(ValueError, match=words): f(rows)

def test_a_data_frame_is_a_table():
    assert preference_dataset(pd.DataFrame(TEXT)).to_list() == TEXT and completion_dataset(pd.DataFrame(SFT)).to_list() == SFT

def said(**answer): return dict(PAIRS[0], chosen=[dict(dict(role='assistant', content='x'), **answer)])

@pytest.mark.parametrize('row, words', [
    (said(content={'a': 1}), r"chosen of row 1 .* whose content is \{'a': 1\}: give text"), (said(content=3), 'whose content is 3'),
    (said(content=b'x'), "whose content is b'x'"), (said(content=['x', 'y']), 'give text, or a list of text parts'),
    (said(content=[dict(type='text', text=5)]), "a part of type 'text' that is no text"),
    (said(role=None), 'chosen of row 1 .* role is None'),
    (said(role='robot'), 'row 1 .* empty chosen response: it has messages of role robot alone'),
    (said(content='half \ud800'), 'chosen of row 1 .* half of a surrogate pair at place 5'),
    (dict(PAIRS[0], prompt=[dict(role='user', content=None)]), "prompt of row 1 .* role 'user' without content"),
    (dict(PAIRS[0], id=7), "the id of row 1 .* is 7 and that of row 0 is 'a'"),
    (dict(PAIRS[0], chat_template_kwargs='x'), "chat_template_kwargs of row 1 .* is 'x': give a dict"),
    (dict(PAIRS[0], chat_template_kwargs=dict(tokenize=False)), "sets 'tokenize', which TRL sets itself"),
    (dict(PAIRS[0], tools='{not json'), 'tools of row 1 .* no JSON')])
def test_messages_that_cannot_be_read_are_named(row, words):
    with pytest.raises(ValueError, match=words): preference_dataset([dict(PAIRS[1], id='a'), dict(dict(id='b'), **row)])

def test_a_prompt_in_another_form_is_not_read_twice():
    "A system message more or less, a name, white space: the responses say the prompt again, so it is refused; a text gets a warning"
    (q,), (c,), (r,) = (PAIRS[0][k] for k in ('prompt', 'chosen', 'rejected'))
    system = dict(role='system', content='Be brief.')
    for p, head in (([system, q], [q]), ([dict(q, content=q['content'] + '\n')], [q]), ([q], [dict(q, name='Ada')]), ([q], [system, q])):
        with pytest.raises(ValueError, match='row 0 .* does not begin as the prompt does: give the prompt once'):
            preference_dataset([dict(prompt=p, chosen=[*head, c], rejected=[q, r])])
    with pytest.warns(UserWarning, match='both responses of 1 pairs .* row 1 the first: it is read twice'):
        preference_dataset([TEXT[0], dict(TEXT[1], **{k: TEXT[1]['prompt'] + TEXT[1][k] for k in ('chosen', 'rejected')})])

# --- settings

SETTINGS = [(dict(bf16='no'), "bf16 is 'no': give True or False"), (dict(fp16='no'), "fp16 is 'no'"), (dict(max_steps=0), 'max_steps is 0'),
            (dict(activation_checkpointing='no'), "activation_checkpointing is 'no'"), (dict(max_steps=-5), 'max_steps is -5'),
            (dict(max_steps=True), 'max_steps is True'), (dict(max_steps='3'), "max_steps is '3'"), (dict(max_steps=2.5), 'steps is 2.5'),
            (dict(dataloader_drop_last='x'), "dataloader_drop_last is 'x'"), (dict(max_grad_norm='x'), "max_grad_norm is 'x'"),
            (dict(max_grad_norm=None), 'max_grad_norm is None'), (dict(warmup_steps='x'), "warmup_steps is 'x'"),
            (dict(seed='x'), "seed is 'x'"), (dict(seed=-1), 'seed is -1'), (dict(adam_beta2=1.), 'adam_beta2 is 1'),
            (dict(seed=2**32), r'seed is 4294967296: give less than 2\*\*32')]

@pytest.mark.parametrize('kw, words', [
    *SETTINGS, (dict(loss_weights=1.), 'loss_weights is 1.0: give a list'), (dict(output_dir=3), 'output_dir is 3'),
    (dict(pad_to_multiple_of=0), 'pad_to_multiple_of is 0'), (dict(readout=['x']), 'readout .* is unknown')])
def test_settings_that_mean_nothing_are_refused_at_once(tmp_path, kw, words):
    with pytest.raises(ValueError, match=words): YFPOConfig(**{**dict(output_dir=str(tmp_path), use_cpu=True), **kw})

@pytest.mark.parametrize('kw, words', [x for x in SETTINGS if not {'bf16', 'seed'} & {*x[0]}])
def test_sft_refuses_them_too(tiny, tmp_path, kw, words):
    with pytest.raises(ValueError, match=words): train_sft(tiny[0], tiny[1], SFT, tmp_path, **kw)

def test_a_file_is_no_folder(tiny, tmp_path):
    (tmp_path/'x').write_text('')
    with pytest.raises(ValueError, match='output_dir .* is a file'): config(tmp_path/'x')
    with pytest.raises(ValueError, match='reference_dir is .*, but .*/x is a file'): config(tmp_path, reference_dir=str(tmp_path/'x'/'y'))
    with pytest.raises(FileExistsError, match='/x is a file: give a folder'): make(tiny, tmp_path/'o').save_model(str(tmp_path/'x'))

# --- models

def frozen(): return tiny_model().requires_grad_(False)

@pytest.mark.parametrize('model, words', [
    (lambda: load_model('tiny'), 'model is a tuple and no model that writes text'), (lambda: tiny_model().config, 'model is a LlamaConfig'),
    (lambda: LlamaModel(tiny_model().config), 'model is a LlamaModel'), (frozen, 'no weight of the model can be trained'),
    (lambda: 3, 'model is a int and no model that writes text')])
def test_what_cannot_be_trained_is_refused(tiny, tmp_path, model, words):
    with pytest.raises(ValueError, match=words): make(tiny, tmp_path, model=model())

def test_a_tuple_of_adapters_a_tokenizer_and_neurons_of_another_kind(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    with pytest.raises(ValueError, match="no adapter called 'default', which TRL trains, but mine"):
        make(tiny, tmp_path, model=get_peft_model(tiny_model(), LoraConfig(task_type='CAUSAL_LM'), adapter_name='mine'))
    args = dict(model=tiny_model(), args=config(tmp_path), train_dataset=PAIRS)
    with pytest.raises(ValueError, match='there is no processing_class'): YFPOTrainer(**args, neurons=some_neurons(tiny[0]))
    for x in ([1, 2], True):
        with pytest.raises(ValueError, match='neurons is a .*, but must be a NeuronSet'):
            YFPOTrainer(**args, processing_class=tiny[1], neurons=x)
    with pytest.raises(ValueError, match='ref_model must be a loaded model'): make(tiny, tmp_path, trainer_kw=dict(ref_model='tiny'))
    with pytest.raises(ValueError, match='no weight of the model can be trained'): train_sft(frozen(), tiny[1], SFT, tmp_path)

def test_tokens_that_the_model_does_not_have(tiny, tmp_path):
    tok = byte_tokenizer()
    tok.add_tokens(['####'])
    with pytest.raises(ValueError, match='writes token 259 in train_dataset, and the model has 259'):
        YFPOTrainer(model=tiny_model(), args=config(tmp_path), train_dataset=PAIRS, processing_class=tok, neurons=some_neurons(tiny[0]))
    with pytest.raises(ValueError, match='writes token 259 in the rows'):
        train_sft(tiny_model(), tok, [dict(SFT[0], completion='#### 1')], tmp_path)

def test_templates_and_batches_with_which_nothing_is_taught(tiny, tmp_path):
    for template, words in (("{% for m in messages %}{{ m['role'] }}{% endfor %}", 'in all pairs of train_dataset: does the chat template'),
                            ("{{ raise_exception('no roles') }}", 'the chat template cannot write train_dataset: no roles')):
        tok = copy.deepcopy(tiny[1])
        tok.chat_template = template
        with pytest.raises(ValueError, match=words): make((tiny[0], tok), tmp_path)
    with pytest.raises(ValueError, match='dataloader_drop_last leaves no batch: there are 6 pairs and 64'):
        make(tiny, tmp_path, per_device_train_batch_size=64, dataloader_drop_last=True)

# --- caches

def test_given_statistics_count_in_a_shared_folder(tiny, tmp_path):
    s, seen = make(tiny, tmp_path/'a').reward_stats, []
    for slope in (0., .5):
        stats = RewardStats(s.mean, s.std, s.wnorm, s.scale, slope)
        for folder in ('shared', f'own{slope}'):
            t = make(tiny, tmp_path/'b', readout='length-residual', reference_dir=str(tmp_path/folder), trainer_kw=dict(reward_stats=stats))
            seen.append(t.ref_phi)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])

def test_settings_of_the_model_count_in_a_shared_folder(tiny, tmp_path):
    other = tiny_model()
    other.model.rotary_emb.inv_freq *= .1
    other.config.rope_parameters['rope_theta'] = 5.
    kw = dict(neuron_weight=.5, reference_dir=str(tmp_path/'shared'))
    make(tiny, tmp_path/'a', **kw)
    shared, own = (make(tiny, tmp_path/f'b{d is None}', model=copy.deepcopy(other), neuron_weight=.5, reference_dir=d)
                   for d in (kw['reference_dir'], None))
    assert torch.equal(shared.ref_phi, own.ref_phi) and torch.equal(shared.ref_logps, own.ref_logps)

def test_rows_of_another_trainer_are_read_anew(tiny, tmp_path):
    "Their numbers of rows lead into the other one's table of the reference"
    one, two = make(tiny, tmp_path/'a', neuron_weight=.5), make(tiny, tmp_path/'b', PAIRS[::-1], neuron_weight=.5)
    got, right = two.evaluate(one.train_dataset.select([0])), two.evaluate(PAIRS[:1])
    for k in ('eval_loss', 'eval_rewards/chosen', 'eval_neurons/chosen'): assert got[k] == pytest.approx(right[k], abs=1e-6), k
    again = make(tiny, tmp_path/'c', one.train_dataset, neuron_weight=.5)
    assert torch.allclose(again.ref_phi, one.ref_phi, atol=1e-6)
    with pytest.raises(ValueError, match="the eval_dataset 'b' is unknown"): two.evaluate('b')

# --- folders

def test_a_folder_holds_the_model_that_was_saved_last(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    lora = get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM'))
    make(tiny, tmp_path/'a', model=lora).save_model(str(tmp_path/'x'))
    full = make(tiny, tmp_path/'b', model=tiny_model(seed=3), trainer_kw={})
    full.save_model(str(tmp_path/'x'))
    back = load_model(tmp_path/'x')[0]
    assert not hasattr(back, 'peft_config') and torch.equal(back.model.embed_tokens.weight, full.model.model.embed_tokens.weight)
    assert (tmp_path/'x'/'neurons').is_dir()
    YFPOTrainer(model=tiny_model(), args=config(tmp_path/'c', neuron_weight=0.), train_dataset=PAIRS,
                processing_class=tiny[1]).save_model(str(tmp_path/'x'))
    assert not (tmp_path/'x'/'neurons').exists() and not (tmp_path/'x'/'reward').exists()

def test_an_adapter_of_a_named_base_over_one_that_kept_its_own(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model
    base, tok = load_model('tiny')
    for model in (tiny_model(seed=5), base):                   # the first has no name, so its weights are kept
        lora = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type='CAUSAL_LM'))
        save_model(lora, tok, tmp_path/'x')
        make(tiny, tmp_path/'o', model=lora).save_model(str(tmp_path/'y'))
    x = torch.tensor([[1, 5, 9, 70]])
    for folder in ('x', 'y'): assert torch.allclose(load_model(tmp_path/folder)[0](x).logits, lora.eval()(x).logits, atol=1e-5)

def test_a_home_folder_is_meant(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    make(tiny, tmp_path/'o', reference_dir='~/ref').save_model('~/model')
    assert (tmp_path/'ref').is_dir() and not (tmp_path/'~').exists()
    YFPOTrainer.from_folder('~/model', config(tmp_path/'p'), PAIRS, tiny[1])

# --- checkpoints

@pytest.fixture(scope='module')
def stopped(tiny, tmp_path_factory):
    "A run of 4 steps that kept its second and fourth"
    folder = tmp_path_factory.mktemp('run')
    run(tiny, folder, neuron_weight=.5, save_strategy='steps', save_steps=2, max_steps=4)
    return folder

@pytest.mark.parametrize('change, words', [
    (dict(model=lambda: tiny_model(seed=1)), 'other weights'), (dict(neuron_weight=.1), 'other settings'),
    (dict(rows=PAIRS[::-1]), 'other pairs'), (dict(objective='yoked', rows=PAIRS[:4]), 'other pairs and settings')])
def test_a_checkpoint_of_another_training_is_refused(tiny, stopped, change, words):
    kw = {**dict(neuron_weight=.5, max_steps=4), **change}
    if 'model' in kw: kw['model'] = kw['model']()
    t = make(tiny, stopped, **kw)
    with pytest.raises(ValueError, match=f'checkpoint-4 is of a training with {words}: begin anew'): t.train(resume_from_checkpoint=True)

def test_a_model_that_was_trained_in_part_is_no_reference(tiny, tmp_path):
    "A cell that is run again on the model that the stopped run has moved"
    model = copy.deepcopy(tiny[0])
    kw = dict(neuron_weight=.5, save_strategy='steps', save_steps=2)
    make(tiny, tmp_path, model=model, max_steps=2, **kw).train()
    with pytest.raises(ValueError, match='of a training with other weights'):
        make(tiny, tmp_path, model=model, max_steps=4, **kw).train(resume_from_checkpoint=True)

@pytest.mark.parametrize('name, how', [('model.safetensors', 'cut'), ('optimizer.pt', 'cut'), ('rng_state.pth', 'cut'),
                                       ('scheduler.pt', 'gone'), ('optimizer.pt', 'gone'), ('trainer_state.json', 'cut')])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tiny, stopped, tmp_path, name, how):
    folder = tmp_path/'run'
    shutil.copytree(stopped, folder)
    at = folder/'checkpoint-4'/name
    at.write_bytes(at.read_bytes()[:at.stat().st_size//2]) if how == 'cut' else at.unlink()
    assert complete_checkpoint(folder) == str(folder/'checkpoint-2')
    t = make(tiny, folder, neuron_weight=.5, max_steps=4)
    with pytest.raises(ValueError, match='checkpoint-4 is no whole checkpoint'): t.train(resume_from_checkpoint=str(folder/'checkpoint-4'))
    t.train(resume_from_checkpoint=True)
    assert equal_weights(t, run(tiny, tmp_path/'straight', neuron_weight=.5, max_steps=4))

def test_checkpoints_that_cannot_be_gone_on_from(tiny, stopped, tmp_path):
    t = make(tiny, stopped, neuron_weight=.5)
    with pytest.raises(ValueError, match='resume_from_checkpoint is 2'): t.train(resume_from_checkpoint=2)
    t = make(tiny, stopped, neuron_weight=.5, sync_ref_model=True)
    with pytest.raises(ValueError, match='a reference that moves is not in a checkpoint'): t.train(resume_from_checkpoint=True)

# --- supervised fine-tuning

@pytest.mark.parametrize('kw', [dict(loss_type='dft'), dict(label_smoothing_factor=.5)])
def test_sft_packs_only_the_loss_it_knows(tiny, tmp_path, kw, monkeypatch):
    import yfpo.lm.training as module
    def first(**kw):
        return train_sft(copy.deepcopy(tiny[0]), tiny[1], SFT[:2], tmp_path, per_device_train_batch_size=2, max_steps=1, **kw)[0]['loss']
    ours = first(**kw)
    monkeypatch.setattr(module, 'packs', lambda *args: False)  # TRL's own way
    assert ours == first(**kw) != first()

def test_sft_says_what_it_leaves_out_and_begins_where_nothing_is(tiny, tmp_path):
    long = dict(prompt='x'*500, completion='y')
    with pytest.warns(UserWarning, match='1 of 6 rows are left out: their prompts fill max_length=64'):
        train_sft(copy.deepcopy(tiny[0]), tiny[1], [*SFT, long], tmp_path, max_length=64, max_steps=1)
    with pytest.raises(ValueError, match='no row has a token of its completion within max_length=64'):
        train_sft(copy.deepcopy(tiny[0]), tiny[1], [long], tmp_path, max_length=64)
    assert train_sft(copy.deepcopy(tiny[0]), tiny[1], SFT, tmp_path/'new', max_steps=1, resume_from_checkpoint=True)

def test_a_column_of_another_name_changes_no_completion(tiny, tmp_path):
    def loss(rows): return train_sft(copy.deepcopy(tiny[0]), tiny[1], rows, tmp_path, max_steps=1)[0]['loss']
    assert loss(Dataset.from_list([dict(r, text='other') for r in SFT])) == loss(SFT)

def test_statistics_of_another_set_or_read_out_are_refused(tiny, tmp_path):
    stats = make(tiny, tmp_path/'a').reward_stats
    assert make(tiny, tmp_path/'b', trainer_kw=dict(reward_stats=stats), neuron_weight=.5).reward_stats.scale == stats.scale
    with pytest.raises(ValueError, match='contribution'):
        make(tiny, tmp_path/'c', trainer_kw=dict(reward_stats=stats), neuron_weight=.5, readout='contribution')
    with pytest.raises(ValueError, match='neurons'):
        YFPOTrainer(model=tiny_model(), args=config(tmp_path/'d', neuron_weight=.5), train_dataset=PAIRS, processing_class=tiny[1],
                    neurons=some_neurons(tiny[0], seed=1), reward_stats=stats)

# ---- what is read of the reference, and what a training begins with

def test_the_reference_is_read_without_dropout(tiny, tmp_path):
    "Also where the trainer leaves dropout on; the mode comes back"
    ref = copy.deepcopy(tiny[0])
    ref.config.attention_dropout = .5
    for layer in ref.model.layers: layer.self_attn.attention_dropout = .5
    noisy, calm = (make(tiny, tmp_path/str(on), disable_dropout=False, trainer_kw=dict(ref_model=copy.deepcopy(ref).train(on)))
                   for on in (True, False))
    assert noisy.ref_model.training and torch.allclose(noisy.ref_phi, calm.ref_phi, atol=1e-5)

def test_what_a_training_begins_with_names_all_of_the_term(tiny, tmp_path):
    "And a note of an older run, which did not name them, stays valid where they have their defaults"
    def began(**kw): return _began(config(tmp_path, **kw), 'w', some_neurons(tiny[0]), 'p')
    def note(**kw): return repr(began(**kw))
    changed = [dict(grad_to='chosen'), dict(neuron_kappa=2.), dict(neuron_margin=2.), dict(label_smoothing=.1), dict(ld_alpha=.5),
               dict(loss_type=['sigmoid', 'sft'], loss_weights=[1., .5])]
    assert len({note(), *(note(**c) for c in changed)}) == 1 + len(changed)
    loss = [getattr(config(tmp_path), k) for k in ('objective', 'neuron_weight', 'readout', 'beta', 'loss_type', 'anchor_weight')]
    old = dict(began(label_smoothing=.1), settings=hashlib.sha256(repr(loss).encode()).hexdigest()[:16])
    del old['options']
    (tmp_path/'began.json').write_text(json.dumps(old))
    BeganNote(began(label_smoothing=.1)).check(tmp_path)
    (tmp_path/'began.json').write_text(json.dumps(began(label_smoothing=.1)))
    with pytest.raises(ValueError, match='with other options'): BeganNote(began()).check(tmp_path)

@pytest.mark.parametrize('objective', ['add-logistic', 'reweight'])
def test_a_weight_set_later_is_the_weight_given(tiny, tmp_path, objective):
    "In the loss, in what divides it, and in what checkpoints are compared by"
    given, later = (make(tiny, tmp_path, neuron_weight=w, objective=objective) for w in (.7, .1))
    assert later.began.note != given.began.note
    later.set_weight(.7)
    assert later.began.note == given.began.note and later.term.mean_weight == given.term.mean_weight
    assert later.compute_loss(later.model, batch_of(later)).item() == given.compute_loss(given.model, batch_of(given)).item()

def test_a_weight_that_cannot_be_set_leaves_the_old_one(tiny, tmp_path):
    t = make(tiny, tmp_path, neuron_weight=.5)
    noted = dict(t.began.note)
    for wrong, said in ((-1., 'neuron_weight is -1.0'), (float('nan'), 'neuron_weight is nan'), ('much', "neuron_weight is 'much'")):
        with pytest.raises(ValueError, match=said): t.set_weight(wrong)
    assert t.args.neuron_weight == .5 and t.began.note == noted
    with pytest.raises(ValueError, match='there is no neuron term'):
        YFPOTrainer(copy.deepcopy(tiny[0]), args=config(tmp_path, neuron_weight=0.), train_dataset=PAIRS,
                    processing_class=tiny[1]).set_weight(1.)

def test_a_dose_leaves_weight_and_note(tiny, tmp_path):
    t = make(tiny, tmp_path, neuron_weight=.5)
    noted = dict(t.began.note)
    weight = fit_dose(t, .5, 1).weight
    assert t.args.neuron_weight == .5 and t.began.note == noted
    t.set_weight(weight)
    assert t.began.note['settings'] != noted['settings']

def test_no_trained_weight_before_the_neurons_is_said(tiny, tmp_path):
    model = copy.deepcopy(tiny[0]).requires_grad_(False)
    model.model.layers[1].mlp.down_proj.requires_grad_(True)
    with pytest.raises(ValueError, match='no trained weight lies before these neurons'): run(tiny, tmp_path, model=model, neuron_weight=.5)
