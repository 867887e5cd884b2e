"""Methods as numerical mathematics: limits and fixed points, on fields with a solution.

Orders of convergence are in `test_laws.py`, where stages lie in `test_plain_formulas.py`.
"""

import pytest
import torch

from iiet.methods.base import LayerCall
from iiet.methods.explicit import GatedRK2
from iiet.methods.implicit_euler import ImplicitEuler, fixed_point

DIM = 8


class FieldOf(torch.nn.Module):
    """A field that is any given function of the hidden state."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, _context, _slot):
        return self.function(x)


def layer_of(method, function):
    """The first layer of a model of one layer, in float64."""
    options = method.facts.Options()
    field = FieldOf(function)
    return method(field, 0, dim=DIM, layer_norm_eps=1e-5, options=options).double()


@torch.no_grad()
def growth(layer, z):
    """One layer on `x' = z x`, whose field with the residual inside is `F(x) = x + z x`."""
    layer.field.function = lambda x: x + z * x
    ones = torch.ones(1, 1, DIM, dtype=torch.float64)
    return float(layer(ones, layer.start(ones), LayerCall(0, None)).hidden[0, 0, 0])


def test_the_gate_chooses_between_the_stages():
    """A gate at one takes the first stage alone, Euler; at zero the second; an open one both."""
    gated = layer_of(GatedRK2, None)
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
        found = fixed_point(lambda x: 4 - 3 * x, torch.tensor([2.0]), num_steps, **options)
        return float(found)

    assert solved(1, damping=damping) == 0.0
    assert solved(8, damping=damping / 2) == 1.0
    assert solved(8) == 1.0 + 3.0**8


def test_corrections_converge_to_the_implicit_solution():
    """With a contracting field the estimate solves `e = N(F(prefix + a e))`, ever more closely."""
    torch.manual_seed(0)
    matrix = 0.1 * torch.randn(DIM, DIM, dtype=torch.float64)
    embeddings = torch.randn(1, 4, DIM, dtype=torch.float64)
    layer = layer_of(ImplicitEuler, lambda x: embeddings + torch.tanh(x) @ matrix)

    @torch.no_grad()
    def residual(corrections):
        seen = []
        call = LayerCall(corrections + 1, None, observe=seen.append)
        layer(embeddings, layer.start(embeddings), call)
        return float(seen[-1].residual.norm())

    residuals = [residual(r) for r in (1, 2, 4, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-2 * residuals[0]
