"""Methods as numerical mathematics: orders, limits and fixed points, on fields one can solve."""

import math

import pytest
import torch

from iiet import METHODS, Decoder, IterationSchedule, ModelConfig
from iiet.methods.explicit_runge_kutta import ExplicitRK2, ExplicitRK4, GatedRK2
from iiet.methods.implicit_euler import ImplicitEuler
from iiet.methods.runge_kutta import MovingAverageRungeKutta, runge_kutta_stages
from iiet.solver import iterate

DIM = 8


@torch.no_grad()
def growth(method, z):
    """One layer on `x' = z x`, whose field with the residual inside is `F(x) = x + z x`."""
    start = torch.ones(1, 1, DIM, dtype=torch.float64)
    advanced, estimate = method.double().advance(0, lambda x: x + z * x, start, (), 0)
    assert estimate is None
    return float(advanced[0, 0, 0])


@pytest.mark.parametrize(("method", "order"), [("vanilla", 1), ("ode_rk2", 2), ("ode_rk4", 4)])
def test_order_of_convergence(method, order):
    """Halving the step divides the error of one step by `2^(order + 1)`."""
    stepper = METHODS[method](1, DIM, 1e-5)
    errors = [abs(growth(stepper, z) - math.exp(z)) for z in (0.02, 0.01)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.05)


@pytest.mark.parametrize("method", [ExplicitRK2, ExplicitRK4])
def test_fixed_coefficients_sum_to_one(method):
    assert sum(method.coefficients) == pytest.approx(1.0, abs=1e-15)


def test_an_open_gate_is_the_fixed_method():
    gated = GatedRK2(1, DIM, 1e-5)
    torch.nn.init.zeros_(gated.gates[0].weight)
    torch.nn.init.zeros_(gated.gates[0].bias)
    assert growth(gated, 0.3) == pytest.approx(growth(ExplicitRK2(1, DIM, 1e-5), 0.3), abs=1e-15)


def test_the_gate_chooses_between_the_stages():
    """A gate at one takes the first stage alone, Euler; at zero the second."""
    gated = GatedRK2(1, DIM, 1e-5)
    torch.nn.init.zeros_(gated.gates[0].weight)
    z = 0.3
    for bias, expected in ((50.0, 1 + z), (-50.0, 1 + z * (1 + z))):
        torch.nn.init.constant_(gated.gates[0].bias, bias)
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
    assert predictor.coefficients().tolist() == pytest.approx(
        [0.5**power for power in range(order, 0, -1)]
    )
    torch.nn.init.constant_(predictor.alpha, 0.3)
    assert predictor.coefficients().tolist() == pytest.approx(expected)


def test_iterate_returns_the_value_and_every_iterate():
    half = iterate(lambda x: x / 2 + 1, torch.tensor(0.0), 3)
    assert [float(x) for x in half.iterates] == [0.0, 1.0, 1.5, 1.75]
    assert half.value is half.iterates[-1]
    guess = torch.tensor(5.0)
    assert iterate(lambda x: x / 0, guess, 0) == (guess, (guess,))


def test_corrections_converge_to_the_implicit_solution():
    """With a contracting field the estimate solves `e = N(F(prefix + a e))`, ever more closely."""
    torch.manual_seed(0)
    method = ImplicitEuler(1, DIM, 1e-5).double()
    matrix = 0.1 * torch.randn(DIM, DIM, dtype=torch.float64)
    embeddings = torch.randn(1, 4, DIM, dtype=torch.float64)

    def field(x):
        return embeddings + torch.tanh(x) @ matrix

    @torch.no_grad()
    def residual(corrections):
        _, e = method.advance(0, field, embeddings, (embeddings,), corrections)
        a, norm = method.mix.inner, method.mix.correction_norms[0]
        return float((norm(field(a[1, 0] * embeddings + a[1, 1] * e)) - e).norm())

    residuals = [residual(r) for r in (1, 2, 4, 8)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-2 * residuals[0]


def test_without_corrections_and_mix_iiet_is_the_normalized_vanilla_model():
    """With rows of C that pick the layer's own estimate, `h_l = P_l(F_l(h_{l-1}))`."""
    sizes = {"vocab_size": 19, "dim": DIM, "num_layers": 3, "num_heads": 2, "num_kv_heads": 2}
    sizes |= {"ffn_dim": 12, "context_length": 8}
    torch.manual_seed(0)
    iiet = Decoder(ModelConfig(method="iiet", schedule=IterationSchedule.none(3), **sizes)).double()
    vanilla = Decoder(ModelConfig(method="vanilla", **sizes)).double()
    shared = {name: w for name, w in iiet.state_dict().items() if not name.startswith("method.")}
    vanilla.load_state_dict(shared)
    with torch.no_grad():
        iiet.method.mix.outer.copy_(torch.eye(4))
        for norm, field in zip(iiet.method.mix.prediction_norms, vanilla.fields, strict=True):
            norm.weight.normal_()
            field.register_forward_hook(lambda _module, _x, y, norm=norm: norm(y))
    tokens = torch.randint(19, (2, 7))
    torch.testing.assert_close(iiet(tokens), vanilla(tokens), rtol=0, atol=1e-12)


def test_a_layer_alone_in_its_model_starts_from_the_mean_of_embeddings_and_estimate():
    method = ImplicitEuler(1, DIM, 1e-5).double()
    embeddings = torch.randn(1, 3, DIM, dtype=torch.float64)
    points = []

    def field(x):
        points.append(x)
        return x.sin()

    hidden, estimate = method.advance(0, field, embeddings, (embeddings,), 1)
    guess = torch.nn.functional.layer_norm(embeddings.sin(), (DIM,))
    torch.testing.assert_close(points[1], (embeddings + guess) / 2)
    torch.testing.assert_close(hidden, (embeddings + estimate) / 2)
