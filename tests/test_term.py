"The neuron term and the table of the reference without a trainer; what help says; the rows against TRL's rule"
import ast, contextlib, inspect, json, math, pydoc, random, re
from dataclasses import fields
import pytest, torch
import torch.nn.functional as F
from accelerate import Accelerator
from trl import DPOConfig, extract_prompt
from yfpo.neurons import NeuronSet, model_signature, outside
from yfpo.lm.responses import collate, encode, hidden_states
from yfpo.reward import NeuronReader, RewardStats, fit_examples, join
from yfpo.lm.rows import without_prompt
from yfpo.trainer import PairTerm, ReferenceTable, Rewarded, Seen, YFPOConfig, YFPOTrainer, pair_rewards, train_yfpo
from yfpo.lm.training import BeganNote, SFTSettings, known_settings, train_sft
from conftest import ROOT

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
B, T, K, J = 3, 6, 5, 4
DOORS = dict(train_yfpo=(train_yfpo, YFPOConfig), train_sft=(train_sft, SFTSettings))

class Batch:
    "Three pairs of random numbers, and the formulas by hand"
    def __init__(self, tiny, folder, seed=0, **settings):
        g = torch.Generator().manual_seed(seed)
        def draw(*shape): return torch.randn(*shape, generator=g)
        flat, w = torch.randperm(128, generator=g)[:K], torch.rand(K, generator=g)
        self.neurons = NeuronSet(flat//64, flat % 64, w/w.sum(), torch.tensor([1., -1, 1, 1, -1]), dict(model=model_signature(tiny[0])))
        self.outside = outside(self.neurons, J)
        self.stats, self.others = (RewardStats(draw(n), draw(n).abs() + .5, torch.ones(n), scale=.7) for n in (K, J))
        self.args = YFPOConfig(str(folder), beta=.3, **settings)
        self.term = PairTerm(self.args, self.neurons, self.outside, self.stats, self.others, mean_weight=.9)
        self.a, self.ref_a = draw(2*B, T, K + J).requires_grad_(), draw(2*B, T, K + J)
        self.norms, self.ref_norms = draw(K + J).abs() + .5, draw(K + J).abs() + .5
        self.mask = torch.arange(T)[None] >= torch.tensor([1, 2, 3, 1, 4, 2])[:, None]
        self.r = draw(B, 2).requires_grad_()
        self.loss = -F.logsigmoid(self.r[:, 0] - self.r[:, 1]).mean()

    def phi(self, a, norms):
        "One response at a time"
        out = []
        for b in range(2*B):
            c = self.neurons.direction*a[b, self.mask[b], :K]*norms[:K]
            z = ((c - self.stats.mean)/self.stats.std).clamp(-3, 3)
            out.append((z*self.neurons.weight).sum(1).mean())
        return torch.stack(out).view(2, B).T

    def __call__(self, **kw):
        kw = {**dict(ref_phi=self.phi(self.ref_a, self.ref_norms)), **kw}
        return self.term(self.loss, Seen(self.a, self.norms), self.mask, dict(sum=self.r, mean=self.r/4), **kw)

    def margins(self):
        "Of the policy relative to the reference, and of the reference, in units of s"
        ref = self.phi(self.ref_a, self.ref_norms)
        rel = (self.phi(self.a, self.norms) - ref)/.7
        return rel[:, 0] - rel[:, 1], (ref[:, 0] - ref[:, 1])/.7

@pytest.mark.parametrize('objective, formula', [
    ('add-linear', lambda d, m, f: -F.logsigmoid(d) - .6*m), ('add-logistic', lambda d, m, f: -F.logsigmoid(d) - .6*F.logsigmoid(2*m - .4)),
    ('yoked', lambda d, m, f: -F.logsigmoid(d + .6*m)), ('offset', lambda d, m, f: -F.logsigmoid(d - .6*f)),
    ('reweight', lambda d, m, f: -F.logsigmoid(d)*2*torch.sigmoid(.6*f)/.9)])
def test_each_objective_is_its_formula(tiny, tmp_path, objective, formula):
    b = Batch(tiny, tmp_path, objective=objective, neuron_weight=.6, neuron_kappa=2., neuron_margin=.4)
    loss, _ = b()
    slow = formula(b.r[:, 0] - b.r[:, 1], *b.margins()).mean()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5) and loss.item() != pytest.approx(b.loss.item(), abs=1e-3)
    x = [b.r] + [b.a]*b.term.learns
    for p, q in zip(torch.autograd.grad(loss, x), torch.autograd.grad(slow, x)): assert torch.allclose(p, q, atol=1e-6) and p.any()

@pytest.mark.parametrize('objective', ['add-linear', 'yoked', 'offset', 'reweight'])
def test_weight_zero_gives_back_the_same_tensor(tiny, tmp_path, objective):
    b = Batch(tiny, tmp_path, objective=objective, neuron_weight=0.)
    loss, metrics = b()
    assert loss is b.loss and not any(v.requires_grad for v in metrics.values())
    assert torch.allclose(metrics['margins'], b.margins()[0], atol=1e-5) and metrics['share'].sum() == 0

def test_the_anchor_is_its_formula_and_pulls_the_neurons_outside_alone(tiny, tmp_path):
    b = Batch(tiny, tmp_path, neuron_weight=0., anchor_weight=.8)
    loss, _ = b(ref=Seen(b.ref_a, b.ref_norms))
    slow = 0.
    for i in range(2*B):
        c, ref = (b.outside.direction*a[i, b.mask[i], K:]*n[K:] for a, n in ((b.a, b.norms), (b.ref_a, b.ref_norms)))
        slow = slow + ((c - ref)/b.others.std).square().mean(1).mean()/(2*B)
    assert (loss - b.loss).item() == pytest.approx(.8*slow.item(), rel=1e-5)
    grad = torch.autograd.grad(loss, b.a)[0]
    assert not grad[..., :K].any() and grad[..., K:].abs().sum() > 0 and not grad[~b.mask].any()

@pytest.mark.parametrize('side', ['chosen', 'rejected'])
def test_the_gradient_goes_to_one_side(tiny, tmp_path, side):
    b = Batch(tiny, tmp_path, neuron_weight=1., grad_to=side)
    grad = torch.autograd.grad(b()[0], b.a)[0].abs().sum((1, 2)).view(2, B).sum(1)
    assert grad[('chosen', 'rejected').index(side)] > 0 == grad[1 - ('chosen', 'rejected').index(side)]

def test_the_reference_may_come_as_numbers_or_as_activations(tiny, tmp_path):
    b = Batch(tiny, tmp_path, neuron_weight=.5)
    (x, m), (y, n) = b(), b(ref_phi=None, ref=Seen(b.ref_a, b.ref_norms))
    assert x.item() == pytest.approx(y.item(), rel=1e-6) and all(torch.allclose(m[k], n[k], atol=1e-6) for k in m)

def test_activations_without_a_graph_are_refused_where_they_count(tiny, tmp_path):
    b = Batch(tiny, tmp_path, neuron_weight=.5)
    b.a = b.a.detach()
    with pytest.raises(ValueError, match='the activations have no gradient'): b()
    with torch.no_grad(): b()                                  # evaluation
    b.args.neuron_weight = 0.
    assert b()[0] is b.loss

def test_metrics_by_hand(tiny, tmp_path):
    b = Batch(tiny, tmp_path, neuron_weight=.5)
    _, m = b()
    margin, frozen = b.margins()
    d = (b.r[:, 0] - b.r[:, 1]).abs()
    c = (b.neurons.direction*b.a[..., :K]*b.norms[:K])[b.mask]
    size = (c.square().mean(0).sum()/(b.stats.mean.square() + b.stats.std.square()).sum()).sqrt()
    by_hand = dict(margins=margin, ref_margins=frozen, share=.5*margin.abs()/(.5*margin.abs() + d), accuracies=(margin > 0).float(),
                   loss=-F.logsigmoid(margin), size=size)
    for k, x in by_hand.items(): assert torch.allclose(m[k], x, atol=1e-5), k
    z = ((c - b.stats.mean)/b.stats.std).abs()
    assert m['clipped'].item() == pytest.approx((z >= 3).float().mean().item()) and 0 < m['clipped'] < 1

@pytest.mark.parametrize('ld_alpha', [None, .25])
def test_rewards_of_a_pair_by_hand(ld_alpha):
    "A token beyond the length of the shorter response counts ld_alpha"
    g = torch.Generator().manual_seed(0)
    logps, mask = [torch.randn(4, 7, generator=g) for _ in range(2)], torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0],
                                                                                    [0, 0, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]])
    for x in logps: x *= mask[:, 1:]
    out = pair_rewards(logps, dict(completion_mask=mask), .3, ld_alpha)
    for i in range(2):
        short = min(int(mask[i].sum()), int(mask[i + 2].sum()))
        for j, row in enumerate((i, i + 2)):
            on = mask[row, 1:].nonzero()[:, 0].tolist()
            r = sum((logps[0][row, t] - logps[1][row, t])*(1. if ld_alpha is None or n < short else ld_alpha) for n, t in enumerate(on))
            assert out['sum'][i, j].item() == pytest.approx(.3*r.item(), abs=1e-5)
            assert out['mean'][i, j].item() == pytest.approx(.3*r.item()/len(on), abs=1e-5)

# --- the table

def test_the_table_asks_once_and_makes_a_broken_file_again(tiny, tmp_path):
    table, asked = ReferenceTable(tiny[0], contextlib.nullcontext, Accelerator(cpu=True), tmp_path/'kept', 0), []
    def make(): asked.append(1); return dict(x=torch.arange(3.))
    for about in (('a',), ('a',), ('b', 1), ('a',)): assert table.kept(about, make)['x'].tolist() == [0, 1, 2]
    assert len(asked) == 2 == len(list((tmp_path/'kept').glob('*.safetensors')))
    for f in (tmp_path/'kept').glob('*.safetensors'): f.write_bytes(f.read_bytes()[:20])
    table.kept(('a',), make); table.kept(('a',), make)
    assert len(asked) == 3

def test_the_rewarded_set_is_exchanged_and_the_first_is_still_followed(tiny, tmp_path):
    "Without a trainer: read-outs and statistics of the reference follow the set, and the first margin is that of the first term"
    model, tok = tiny
    ex = encode(tok, [('3 + 4 =', ' 7 apples'), ('5 + 5 =', ' 10'), ('3 + 4 =', ' 8 pears'), ('5 + 5 =', ' 11 plums')])
    settings = YFPOConfig(str(tmp_path), neuron_weight=.5, n_outside=J)
    first, second = (Batch(tiny, tmp_path, seed=s).neurons for s in (0, 1))
    table = ReferenceTable(model, contextlib.nullcontext, Accelerator(cpu=True), tmp_path/'kept', tok.pad_token_id)
    table.texts['train_dataset'], r = ex, Rewarded(settings, table, 2, {tok.eos_token_id})
    r.choose(first)
    stats, phi = fit_examples(model, ex, tok.pad_token_id, first)
    assert not r.moved and r.sets == [first, r.term.outside] and torch.allclose(r.phi, phi, atol=1e-5)
    assert r.term.stats.scale == pytest.approx(stats.scale, rel=1e-5)
    r.choose(second)
    assert r.moved and r.term.neurons is second and r.start.term.neurons is r.sets[2] is first and not torch.allclose(r.phi, r.start.phi)
    batch = collate(ex, tok.pad_token_id)
    batch.update(completion_mask=batch['response_mask'].long(), ref_row=torch.arange(2))
    with NeuronReader(model, join(r.sets)) as reader: hidden_states(model, batch)
    seen = Seen(reader.activations(), reader.norms())
    loss, m = r(torch.tensor(1.), seen, dict(sum=torch.zeros(2, 2)), batch, ask=None)      # the table knows these pairs: nobody is asked
    assert loss.item() == pytest.approx(1 + .5*math.log(2), rel=1e-4)                      # the policy is the reference: margins are 0
    assert m['margins_start'].abs().max() < 1e-4 > m['margins'].abs().max()
    asked = r(torch.tensor(1.), seen, dict(sum=torch.zeros(2, 2)), {**batch, 'ref_row': None}, lambda: Seen(2*seen.a, seen.norms))[1]
    assert 'margins_start' not in asked and asked['margins'].abs().max() > 1e-2

# --- what help says

OWN = [f for f in fields(YFPOConfig) if f.name not in {x.name for x in fields(DPOConfig)}]

def test_help_tells_every_own_setting_with_its_meaning_and_default():
    head = pydoc.render_doc(YFPOConfig, renderer=pydoc.plaintext).split('Method resolution order')[0]
    text = ' '.join(re.sub(r'^ \|', '', head, flags=re.M).split())
    assert len(OWN) == 10
    for f in OWN:                                                    # a command-line parser rewrites f.type: ask the class
        kind = inspect.get_annotations(YFPOConfig)[f.name]
        assert f"{f.name}: {getattr(kind, '__name__', kind)} = {f.default!r} {f.metadata['help']}" in text, f.name

def test_help_tells_every_parameter_of_the_trainer():
    text, init = inspect.getdoc(YFPOTrainer), inspect.signature(YFPOTrainer.__init__).parameters
    for k in [*init][1:]: assert f'\n{k}: ' in text, k
    assert '(K,)' in text and '(pairs, 2)' in text and 'Initialize self' not in inspect.getdoc(YFPOTrainer.__init__)

def test_the_trainer_is_a_class_and_few_arguments_lead_to_it():
    text = (ROOT/'yfpo'/'trainer.py').read_text() + (ROOT/'yfpo'/'lm'/'training.py').read_text()
    assert 'YFPOTrainer.' not in text.replace('`YFPOTrainer.', '') and 'setattr(YFPOTrainer' not in text
    named = [p for p in inspect.signature(train_yfpo).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert len(named) <= 7

@pytest.mark.parametrize('key, near', [('neuron_wieght', 'neuron_weight'), ('epochs', 'num_train_epochs'), ('lr', 'lr_scheduler_type'),
                                       ('batch_size', 'per_device_train_batch_size'), ('max_len', 'max_length')])
def test_a_mistyped_setting_is_refused_with_its_nearest_name(tiny, tmp_path, key, near):
    with pytest.raises(ValueError, match=f"YFPOConfig has no setting '{key}': did you mean '{near}'"):
        train_yfpo(*tiny, [], None, tmp_path, **{key: 1})
    assert known_settings(YFPOConfig, {near: 1}) == {near: 1}

def test_the_order_of_the_pairs_follows_the_seed(tiny, tmp_path):
    from yfpo.lm.training import settings_for
    a, b = (settings_for(YFPOConfig, tiny[0], tmp_path, None, kw) for kw in (dict(seed=5), dict(seed=5, data_seed=3, logging_steps=9)))
    assert (a.seed, a.data_seed, a.logging_steps) == (5, 5, 1) and (b.seed, b.data_seed, b.logging_steps) == (5, 3, 9)
    assert settings_for(YFPOConfig, tiny[0], tmp_path, None, {}).learning_rate == YFPOConfig.learning_rate == DPOConfig.learning_rate

# --- rows and notes

def test_a_prompt_left_out_is_found_as_trl_finds_it():
    g = random.Random(0)
    def text(): return ''.join(g.choice('ab ') for _ in range(g.randrange(1, 6)))
    def talk(): return [dict(role='user', content=g.choice('xy')) for _ in range(g.randrange(1, 4))]
    seen = set()
    for make in (text, talk):
        for _ in range(300):
            head = make()
            row = dict(chosen=head + make(), rejected=head + make())
            assert without_prompt(row) == extract_prompt(row), row
            seen.add(len(without_prompt(row)['prompt']))
    assert len(seen) > 5

def test_rows_know_nothing_of_training():
    from test_imports import imports
    own, _, every = imports('lm.rows')
    assert 'trl' not in every and not own & {'neurons', 'reward', 'lm.training', 'trainer'}

def test_a_note_of_another_training_is_refused_and_none_is_taken(tmp_path):
    note = BeganNote(dict(weights='a', pairs='b'))
    note.check(tmp_path)                                       # of plain DPO, or of an older version
    (tmp_path/'began.json').write_text('{"weights": "a", "pairs": "b"}')
    note.check(tmp_path)
    (tmp_path/'began.json').write_text('{"weights": "a"}')
    with pytest.raises(ValueError, match='is of a training with other pairs: begin anew'): note.check(tmp_path)

# --- those that call it

CALLS = [(p.stem, ast.unparse(n), n) for p in sorted((ROOT/'nbs').rglob('*.ipynb')) if p.parent.name == 'stages' or 'launch' in p.stem
         for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'code' and 'train_' in ''.join(c['source'])
         for n in ast.walk(ast.parse(''.join(c['source']))) if isinstance(n, ast.Call) and getattr(n.func, 'id', '') in DOORS]

@pytest.mark.parametrize('where, text, call', CALLS, ids=[c[0] for c in CALLS])
def test_stages_name_settings_that_there_are(where, text, call):
    f, cls = DOORS[call.func.id]
    given = inspect.signature(f).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg}).arguments
    own, passed_on = known_settings(cls, given['settings']), any(k.arg is None for k in call.keywords)       # `**settings` of the caller
    assert passed_on or own.keys() >= {'learning_rate', 'num_train_epochs', 'seed', 'max_length'}, text

def test_the_stages_that_train_are_found(): assert len(CALLS) >= 8
