"""Methods as numerical mathematics: limits and fixed points, on fields with a solution.

Orders of convergence are in `test_laws.py`, where stages lie in `test_plain_formulas.py`.
"""

import pytest
import torch

from iiet import METHODS, Decoder, preset
from iiet.methods.base import LayerCall
from iiet.methods.implicit_euler import fixed_point

DIM = 8


def layer_of(method, function=None):
    """Return the layer of a model of one layer, in float64; its field is a function of x."""
    config = preset("tiny", method=method, dim=DIM, num_heads=2, num_kv_heads=2, ffn_dim=4)
    layer = METHODS[method](config, 0).double()
    layer.field = lambda x, _context, _slot: function(x)
    return layer


@torch.no_grad()
def growth(layer, z):
    """Return what a layer makes of 1 on `x' = z x`; its field is `F(x) = x + z x`."""
    layer.field = lambda x, _context, _slot: x + z * x
    ones = torch.ones(1, 1, DIM, dtype=torch.float64)
    return float(layer(ones, layer.start(ones), LayerCall(0, None)).hidden[0, 0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_all_norms_have_the_epsilon_of_the_model(method):
    config = preset("tiny", method=method, rms_norm_eps=0.25, layer_norm_eps=0.125)
    norms = [module for module in Decoder(config).modules() if hasattr(module, "eps")]
    epsilons = {type(norm).__name__: norm.eps for norm in norms}
    assert epsilons.pop("RMSNorm") == 0.25
    assert set(epsilons.values()) <= {0.125}


def test_the_gate_chooses_between_the_stages():
    """A gate at one takes the first stage alone, Euler; at zero the second; an open one both."""
    gated = layer_of("ode_rk2_gated")
    torch.nn.init.zeros_(gated.gate.weight)
    z = 0.3
    for bias, expected in ((50.0, 1 + z), (-50.0, 1 + z * (1 + z)), (0.0, 1 + z + z**2 / 2)):
        torch.nn.init.constant_(gated.gate.bias, bias)
        assert growth(gated, z) == pytest.approx(expected, abs=1e-12)


def test_the_solver_applies_the_map_as_often_as_asked():
    guess = torch.tensor(0.0)
    values = [float(fixed_point(lambda x: x / 2 + 1, guess, n)) for n in range(4)]
    assert values == [0.0, 1.0, 1.5, 1.75]
    assert fixed_point(lambda x: x / 0, guess, 0) is guess


@pytest.mark.parametrize("damping", [0.5, torch.tensor([0.5])])
def test_damping_makes_a_diverging_iteration_converge(damping):
    """`g(x) = 4 - 3 x` diverges from its fixed point 1; a damping of 1/4 reaches it at once."""

    def solved(num_steps, **options):
        estimate = fixed_point(lambda x: 4 - 3 * x, torch.tensor([2.0]), num_steps, **options)
        return float(estimate)

    assert solved(1, damping=damping) == 0.0
    assert solved(8, damping=damping / 2) == 1.0
    assert solved(8) == 1.0 + 3.0**8


def test_corrections_converge_to_the_implicit_solution():
    """With a contracting field the estimate solves `e = N(F(prefix + a e))`, ever more closely."""
    torch.manual_seed(0)
    matrix = 0.1 * torch.randn(DIM, DIM, dtype=torch.float64)
    embeddings = torch.randn(1, 4, DIM, dtype=torch.float64)
    layer = layer_of("iiet", lambda x: embeddings + torch.tanh(x) @ matrix)

    @torch.no_grad()
    def residual(corrections):
        evaluations = []
        call = LayerCall(corrections + 1, None, observe=evaluations.append)
        layer(embeddings, layer.start(embeddings), call)
        return float(evaluations[-1].residual.norm())

    residuals = [residual(r) for r in (1, 2, 4, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-2 * residuals[0]
