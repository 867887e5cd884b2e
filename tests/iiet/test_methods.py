"""Methods as numerical mathematics: orders, limits and fixed points, on fields with a solution."""

import pytest
import torch

from iiet.methods.base import LayerCall
from iiet.methods.explicit import ExplicitRK2, ExplicitRK4, GatedRK2, runge_kutta_stages
from iiet.methods.implicit_euler import ImplicitEuler, MovingAverageRungeKutta, fixed_point
from iiet.mix import start

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
    options = method.Options()
    field = FieldOf(function)
    return method(field, 0, dim=DIM, layer_norm_eps=1e-5, options=options).double()


def advanced(layer, hidden, num_corrections=0):
    state = layer.start(hidden, 1)
    return layer(hidden, state, LayerCall(num_corrections, None)).hidden


@torch.no_grad()
def growth(layer, z):
    """One layer on `x' = z x`, whose field with the residual inside is `F(x) = x + z x`."""
    layer.field.function = lambda x: x + z * x
    return float(advanced(layer, torch.ones(1, 1, DIM, dtype=torch.float64))[0, 0, 0])


@pytest.mark.parametrize("method", [ExplicitRK2, ExplicitRK4])
def test_fixed_coefficients_sum_to_one(method):
    assert sum(method.coefficients) == pytest.approx(1.0, abs=1e-15)


def test_an_open_gate_is_the_fixed_method():
    gated = layer_of(GatedRK2, None)
    torch.nn.init.zeros_(gated.gate.weight)
    torch.nn.init.zeros_(gated.gate.bias)
    assert growth(gated, 0.3) == pytest.approx(growth(layer_of(ExplicitRK2, None), 0.3), abs=1e-15)


def test_the_gate_chooses_between_the_stages():
    """A gate at one takes the first stage alone, Euler; at zero the second."""
    gated = layer_of(GatedRK2, None)
    torch.nn.init.zeros_(gated.gate.weight)
    z = 0.3
    for bias, expected in ((50.0, 1 + z), (-50.0, 1 + z * (1 + z))):
        torch.nn.init.constant_(gated.gate.bias, bias)
        assert growth(gated, z) == pytest.approx(expected, abs=1e-12)


def test_stages_are_evaluated_where_the_formulas_say():
    points = []

    def stage(number, point):
        points.append(float(point))
        return torch.tensor(10.0 ** (number + 1), dtype=torch.float64)

    runge_kutta_stages(stage, torch.tensor(1.0, dtype=torch.float64), 4)
    assert points == [1.0, 1.0 + 10 / 2, 1.0 + 100 / 2, 1.0 + 1000]
    points.clear()
    runge_kutta_stages(stage, torch.tensor(1.0, dtype=torch.float64), 2)
    assert points == [1.0, 11.0]


@pytest.mark.parametrize(
    ("order", "expected"),
    [(2, [0.3 * 0.7, 0.3]), (4, [0.3 * 0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3])],
)
def test_moving_average_coefficients(order, expected):
    predictor = MovingAverageRungeKutta(order, DIM, 1e-5)
    assert predictor.coefficients(order).tolist() == pytest.approx(
        [0.5**power for power in range(order, 0, -1)]
    )
    torch.nn.init.constant_(predictor.alpha, 0.3)
    assert predictor.coefficients(order).tolist() == pytest.approx(expected)
    assert predictor.coefficients(1).tolist() == pytest.approx([0.3])


def test_the_solver_applies_the_map_as_often_as_asked():
    guess = torch.tensor(0.0)
    values = [float(fixed_point(lambda x: x / 2 + 1, lambda: guess, n)) for n in range(4)]
    assert values == [0.0, 1.0, 1.5, 1.75]
    assert fixed_point(lambda x: x / 0, lambda: guess, 0) is guess


@pytest.mark.parametrize("damping", [0.5, torch.tensor([0.5])])
def test_damping_makes_a_diverging_iteration_converge(damping):
    """`g(x) = 4 - 3 x` diverges from its fixed point 1; a damping of 1/4 reaches it at once."""

    def solved(num_steps, **options):
        found = fixed_point(lambda x: 4 - 3 * x, lambda: torch.tensor([2.0]), num_steps, **options)
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
        layer(embeddings, start(embeddings, 1), call)
        return float(seen[-1].residual.norm())

    residuals = [residual(r) for r in (1, 2, 4, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-2 * residuals[0]


def test_a_layer_alone_in_its_model_starts_from_the_mean_of_embeddings_and_estimate():
    layer = layer_of(ImplicitEuler, torch.sin)
    embeddings = torch.randn(1, 3, DIM, dtype=torch.float64)
    seen = []
    call = LayerCall(1, None, observe=seen.append)
    hidden, _ = layer(embeddings, start(embeddings, 1), call)
    guess = torch.nn.functional.layer_norm(embeddings.sin(), (DIM,))
    torch.testing.assert_close(seen[1].input, (embeddings + guess) / 2)
    torch.testing.assert_close(hidden, (embeddings + seen[1].estimate) / 2)
    torch.testing.assert_close(seen[1].residual, seen[1].estimate - seen[0].estimate)
    assert seen[0].residual is None
