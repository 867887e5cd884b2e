"""What a correction is worth: recovered from synthetic laws, refused where it cannot be known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from correction_worth import (
    SATURATED_ACCURACY,
    MeasuredModel,
    correction_worth,
)

DEPTHS = (1, 2, 4, 8)


def logarithmic(depth: float) -> float:
    return 3.0 - 0.4 * math.log(depth)


def power(depth: float) -> float:
    return 2.0 + 1.5 * depth**-0.7


def curve(
    law: Callable[[float], float],
    depths: tuple[int, ...] = DEPTHS,
    spread: float = 0.0,
    seeds: int = 1,
) -> list[MeasuredModel]:
    rng = np.random.default_rng(1)
    return [
        MeasuredModel(
            num_layers=depth, losses=tuple(law(depth) + spread * rng.standard_normal(seeds))
        )
        for depth in depths
    ]


def at_depth(law: Callable[[float], float], depth: float, **values: object) -> MeasuredModel:
    usual = {"num_layers": 2, "evaluations_per_layer": 4.0, "losses": (law(depth),)}
    return MeasuredModel(**{**usual, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("phi", [-0.4, 0.0, 0.46, 1.0])
@pytest.mark.parametrize("evaluations", [2.0, 4.0])
def test_phi_of_a_loss_linear_in_the_logarithm_of_depth_is_exact(
    phi: float, evaluations: float
) -> None:
    depth = 2 * evaluations**phi
    model = at_depth(logarithmic, depth, evaluations_per_layer=evaluations)
    worth = correction_worth(model, curve(logarithmic))
    assert worth.phi == pytest.approx(phi, abs=1e-9)
    assert worth.equivalent_layers == pytest.approx(depth)
    assert worth.interval is None, "one seed has no spread"
    assert not worth.refusal


def test_a_curve_between_the_depths_costs_little_accuracy() -> None:
    found = [
        correction_worth(at_depth(power, 2 * 4**0.46), curve(power, depths)).phi or math.nan
        for depths in ((1, 2, 4, 8), (1, 2, 3, 4, 5, 6, 8))
    ]
    errors = [abs(phi - 0.46) for phi in found]
    assert errors[1] < errors[0] < 0.05


def test_a_trained_depth_is_its_own_equivalent() -> None:
    for depth in DEPTHS:
        worth = correction_worth(at_depth(power, depth), curve(power))
        assert worth.equivalent_layers == pytest.approx(depth)


def test_the_interval_covers_the_truth_and_grows_with_the_spread_of_the_seeds() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for spread in (0.005, 0.02):
        losses = tuple(logarithmic(2 * 4**0.5) + spread * rng.standard_normal(3))
        model = at_depth(logarithmic, 1, losses=losses)
        worth = correction_worth(model, curve(logarithmic, spread=spread, seeds=3))
        assert worth.interval is not None
        assert worth.interval.value == worth.phi
        assert worth.interval.low < 0.5 < worth.interval.high
        assert worth.is_open == (False, False)
        widths.append(worth.interval.high - worth.interval.low)
        again = correction_worth(model, curve(logarithmic, spread=spread, seeds=3))
        assert again == worth
    assert widths[1] > 2 * widths[0]


def test_an_interval_beyond_the_depths_is_open() -> None:
    best = logarithmic(8)
    model = at_depth(logarithmic, 1, losses=(best + 0.06, best + 0.02, best - 0.05))
    worth = correction_worth(model, curve(logarithmic))
    assert worth.interval is not None
    assert worth.is_open == (False, True)
    assert worth.interval.high == pytest.approx(1.0), "phi of 8 layers"


def test_the_first_depth_that_reaches_a_loss_counts() -> None:
    losses = {1: 3.0, 2: 2.0, 4: 2.5, 8: 1.0}
    vanilla = [MeasuredModel(num_layers=d, losses=(loss,)) for d, loss in losses.items()]

    def layers(loss: float) -> float | None:
        return correction_worth(at_depth(power, 1, losses=(loss,)), vanilla).equivalent_layers

    assert layers(2.25) == pytest.approx(2**0.75), "not again between 4 and 8"
    assert layers(1.75) == pytest.approx(4 * 2**0.5)


def test_a_model_without_corrections_has_a_depth_and_no_phi() -> None:
    worth = correction_worth(at_depth(power, 3, evaluations_per_layer=1.0), curve(power))
    assert worth.equivalent_layers == pytest.approx(3, rel=0.1)
    assert worth.phi is None
    assert "each layer once" in worth.refusal


def saturated(model: MeasuredModel, accuracy: float) -> MeasuredModel:
    return MeasuredModel(
        num_layers=model.num_layers,
        evaluations_per_layer=model.evaluations_per_layer,
        losses=model.losses,
        accuracy=accuracy,
    )


@pytest.mark.parametrize(
    ("vanilla", "depth", "words"),
    [
        (curve(power, (2,)), 2, "at least two depths"),
        (curve(power, (2, 2)), 2, "at least two depths"),
        ([], 2, "at least two depths"),
        (curve(power, (2, 8)), 1.9, r"shallowest vanilla model \(2 layers\)"),
        (curve(power, (1, 4)), 4.1, r"best has 4 layers\)"),
    ],
)
def test_depths_that_do_not_bracket_the_loss_are_refused(
    vanilla: list[MeasuredModel], depth: float, words: str
) -> None:
    worth = correction_worth(at_depth(power, depth), vanilla)
    assert worth.phi is worth.equivalent_layers is worth.interval is None
    assert re.search(words, worth.refusal)


def test_a_saturated_accuracy_is_refused() -> None:
    vanilla = curve(power)
    model = at_depth(power, 3, accuracy=SATURATED_ACCURACY)
    assert "its accuracy of 98.00% is saturated" in correction_worth(model, vanilla).refusal
    model = at_depth(power, 3, accuracy=0.9)
    deep = [*vanilla[:2], saturated(vanilla[2], 0.999), saturated(vanilla[3], 0.9999)]
    found = correction_worth(model, deep).refusal
    assert (
        "vanilla with 4 layers is saturated (accuracy 99.90%), so it is worth between 2 and 4"
        in (found)
    )
    only_deepest = [*vanilla[:3], saturated(vanilla[3], 0.9999)]
    assert correction_worth(model, only_deepest).phi is not None, "8 layers bracket nothing here"


def test_depths_that_differ_by_less_than_their_seeds_are_refused() -> None:
    def flat(depth: float) -> float:
        return 2.0 - 1e-4 * math.log(depth)

    model = at_depth(flat, 3)
    noisy = correction_worth(model, curve(flat, spread=1e-3, seeds=3))
    assert noisy.phi is None
    quiet = correction_worth(model, curve(flat, spread=1e-7, seeds=3))
    assert quiet.phi == pytest.approx(math.log(1.5) / math.log(4), abs=0.01)


def test_the_refusal_of_alike_depths_names_them() -> None:
    alike = [
        MeasuredModel(num_layers=2, losses=(1.00, 1.02, 0.98)),
        MeasuredModel(num_layers=4, losses=(0.99, 1.01, 0.97)),
    ]
    model = MeasuredModel(num_layers=2, evaluations_per_layer=2.0, losses=(0.995,))
    found = correction_worth(model, alike).refusal
    assert "between those of vanilla with 2 and with 4 layers, which differ by less" in found
