"The objective as tensors: naive oracles, exact facts at weight 0, gradients, refusals"
import ast, math
from pathlib import Path
import pytest, torch
from yfpo.loss import OBJECTIVES, add_linear, add_logistic, dpo_loss, objective

B = 7
def draw(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, generator=g, dtype=dtype) * 3 - 40 for _ in range(4)] + [torch.randn(B, generator=g, dtype=dtype) * 2]

def slow_dpo(pw, pl, rw, rl, beta):
    return [-math.log(1 / (1 + math.exp(-beta * ((a - c) - (b - d))))) for a, b, c, d in zip(*(t.tolist() for t in (pw, pl, rw, rl)))]

@pytest.mark.parametrize('beta', [0.01, 0.1, 1.])
def test_dpo_against_scalar_arithmetic(beta):
    *logps, _ = draw(1, torch.float64)
    assert dpo_loss(*logps, beta).tolist() == pytest.approx(slow_dpo(*logps, beta), rel=1e-9)

def test_dpo_at_step_one_is_log_two():
    w, l = draw()[:2]
    assert torch.allclose(dpo_loss(w, l, w, l, 0.3), torch.full((B,), math.log(2)), atol=1e-7)

def test_neuron_terms_against_scalar_arithmetic():
    *logps, phi = draw(2, torch.float64)
    dpo = dpo_loss(*logps)
    assert add_linear(dpo, phi, 0.3).tolist() == pytest.approx([d - 0.3*p for d, p in zip(dpo.tolist(), phi.tolist())])
    slow = [d + 0.3*math.log(1 + math.exp(-(2*p - 0.5))) for d, p in zip(dpo.tolist(), phi.tolist())]
    assert add_logistic(dpo, phi, 0.3, kappa=2., margin=0.5).tolist() == pytest.approx(slow)

@pytest.mark.parametrize('name', OBJECTIVES)
def test_weight_zero_is_dpo_bit_for_bit(name):
    *logps, phi = draw(3)
    phi[0], phi[1] = float('inf'), float('nan')
    dpo = dpo_loss(*logps)
    assert torch.equal(objective(name)(dpo, phi, 0.), dpo) and torch.equal(objective(name)(dpo, phi, 0), dpo)

@pytest.mark.parametrize('name', OBJECTIVES)
def test_gradcheck(name):
    x = [t.requires_grad_() for t in draw(4, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: objective(name)(dpo_loss(*a[:4]), a[4], 0.3), x)

@pytest.mark.parametrize('name', OBJECTIVES)
def test_descent_raises_the_margin_and_a_detached_margin_does_nothing(name):
    *logps, phi = draw(5, torch.float64)
    phi.requires_grad_()
    objective(name)(dpo_loss(*logps), phi, 0.3).sum().backward()
    assert (phi.grad < 0).all()                               # a step against the gradient raises every margin
    assert not objective(name)(dpo_loss(*logps), phi.detach(), 0.3).requires_grad

def test_logistic_is_bounded_and_linear_is_not():
    far, dpo = torch.tensor([1e4]), torch.zeros(1)
    assert add_logistic(dpo, far, 0.1).item() == 0. and add_linear(dpo, far, 0.1).item() == pytest.approx(-1000.)
    assert torch.isfinite(add_logistic(dpo, -far, 0.1)).all()

@pytest.mark.parametrize('weight', [-0.1, float('nan'), float('inf'), '0.1', True, None])
@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_bad_weight_is_refused(name, weight):
    with pytest.raises(ValueError, match='weight is .*give'): objective(name)(torch.zeros(2), torch.zeros(2), weight)

def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'add-linear'"): objective('add_liner')

def test_loss_imports_torch_and_the_standard_library_only():
    import yfpo.loss, sys
    tree = ast.parse(Path(yfpo.loss.__file__).read_text())
    names = {a.name.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split('.')[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
    assert names <= {'torch'} | set(sys.stdlib_module_names)
