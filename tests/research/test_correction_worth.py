"""The worth of a correction: recovered from synthetic laws, refused where it cannot be known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from correction_worth import SATURATED_ACCURACY, MeasuredModel, correction_worth

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
    """Return vanilla models whose losses follow a law."""
    noise = np.random.default_rng(1)
    return [
        MeasuredModel(
            num_layers=depth, losses=tuple(law(depth) + spread * noise.standard_normal(seeds))
        )
        for depth in depths
    ]


def at_depth(law: Callable[[float], float], depth: float, **values: object) -> MeasuredModel:
    """Return a model of two layers that is as good as vanilla of a depth."""
    usual = {"num_layers": 2, "evaluations_per_layer": 4.0, "losses": (law(depth),)}
    return MeasuredModel(**{**usual, **values})


@pytest.mark.parametrize("phi", [-0.4, 0.0, 0.46, 1.0])
def test_phi_is_recovered_exactly_from_a_logarithmic_law_and_closely_from_another(phi):
    for evaluations in (2.0, 4.0):
        depth = 2 * evaluations**phi
        model = at_depth(logarithmic, depth, evaluations_per_layer=evaluations)
        worth = correction_worth(model, curve(logarithmic))
        assert worth.phi == pytest.approx(phi, abs=1e-9)
        assert worth.equivalent_layers == pytest.approx(depth)
        assert worth.interval is None, "one seed has no spread"
        assert not worth.refusal
    many = (1, 2, 3, 4, 5, 6, 8)
    phis = [
        correction_worth(at_depth(power, 2 * 4**0.46), curve(power, depths)).phi or math.nan
        for depths in (DEPTHS, many)
    ]
    errors = [abs(value - 0.46) for value in phis]
    assert errors[1] < errors[0] < 0.05
    for trained in DEPTHS:
        worth = correction_worth(at_depth(power, trained), curve(power))
        assert worth.equivalent_layers == pytest.approx(trained)


def test_the_interval_covers_the_truth_and_grows_with_the_spread_of_the_seeds():
    noise = np.random.default_rng(0)
    widths = []
    for spread in (0.005, 0.02):
        losses = tuple(logarithmic(2 * 4**0.5) + spread * noise.standard_normal(3))
        model = at_depth(logarithmic, 1, losses=losses)
        worth = correction_worth(model, curve(logarithmic, spread=spread, seeds=3))
        assert worth == correction_worth(model, curve(logarithmic, spread=spread, seeds=3))
        assert worth.interval.low < 0.5 < worth.interval.high
        assert (worth.interval.value, worth.is_open) == (worth.phi, (False, False))
        widths.append(worth.interval.high - worth.interval.low)
    assert widths[1] > 2 * widths[0]
    best = logarithmic(8)
    model = at_depth(logarithmic, 1, losses=(best + 0.06, best + 0.02, best - 0.05))
    beyond = correction_worth(model, curve(logarithmic))
    assert beyond.is_open == (False, True)
    assert beyond.interval.high == pytest.approx(1.0), "phi of 8 layers"


def test_the_first_depth_that_reaches_a_loss_counts():
    losses = {1: 3.0, 2: 2.0, 4: 2.5, 8: 1.0}
    vanilla = [MeasuredModel(num_layers=d, losses=(loss,)) for d, loss in losses.items()]
    # At 2.25 not again between 4 and 8.
    for loss, layers in ((2.25, 2**0.75), (1.75, 4 * 2**0.5)):
        worth = correction_worth(at_depth(power, 1, losses=(loss,)), vanilla)
        assert worth.equivalent_layers == pytest.approx(layers)


def flat(depth: float) -> float:
    return 2.0 - 1e-4 * math.log(depth)


SATURATED = [*curve(power)[:2], *(replace(model, accuracy=0.999) for model in curve(power)[2:])]
ALIKE = [
    MeasuredModel(num_layers=2, losses=(1.00, 1.02, 0.98)),
    MeasuredModel(num_layers=4, losses=(0.99, 1.01, 0.97)),
]


@pytest.mark.parametrize(
    ("vanilla", "model", "words"),
    [
        (curve(power, (2, 2)), at_depth(power, 2), "at least two depths"),
        ([], at_depth(power, 2), "at least two depths"),
        (curve(power, (2, 8)), at_depth(power, 1.9), r"shallowest vanilla model \(2 layers\)"),
        (curve(power, (1, 4)), at_depth(power, 4.1), r"best has 4 layers\)"),
        (curve(power), at_depth(power, 3, accuracy=SATURATED_ACCURACY), "98.00% is saturated"),
        (SATURATED, at_depth(power, 3, accuracy=0.9), "saturated .* worth between 2 and 4"),
        (curve(flat, spread=1e-3, seeds=3), at_depth(flat, 3), "."),
        (ALIKE, at_depth(flat, 1, losses=(0.995,)), "with 2 and with 4 layers, which differ by"),
        (curve(power), at_depth(power, 3, evaluations_per_layer=1.0), "each layer once"),
    ],
)
def test_what_cannot_be_known_is_refused(vanilla, model, words):
    worth = correction_worth(model, vanilla)
    assert worth.phi is worth.interval is None
    assert (worth.equivalent_layers is None) == (words != "each layer once")
    assert re.search(words, worth.refusal)


def test_spread_and_saturation_that_bracket_nothing_are_no_obstacle():
    only_deepest = [*curve(power)[:3], SATURATED[3]]
    assert correction_worth(at_depth(power, 3, accuracy=0.9), only_deepest).phi is not None
    quiet = correction_worth(at_depth(flat, 3), curve(flat, spread=1e-7, seeds=3))
    assert quiet.phi == pytest.approx(math.log(1.5) / math.log(4), abs=0.01)
