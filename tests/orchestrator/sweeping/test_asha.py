"""Of one model's learning rates the best goes on at every rung."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweeping.asha import AshaRule, asha_decision

HALVING = AshaRule(first_rung=0.25)

CURVES = st.lists(st.lists(st.floats(1.0, 9.0), min_size=8, max_size=8), min_size=1, max_size=7)


@given(CURVES, st.integers(2, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_best_at_a_rung_goes_on_whoever_came_first(
    losses: list[list[float]], reduction_factor: int, gap: int, seed: int
) -> None:
    """Plays a sweep of 8 steps in a random order, with a look every `gap` steps."""
    curves: dict[str, dict[int, float]] = {f"rate {n}": {} for n in range(len(losses))}
    order, ended, reached = random.Random(seed), set(), dict.fromkeys(curves, 0)
    while waiting := [name for name in curves if name not in ended and reached[name] + gap <= 8]:
        label = order.choice(waiting)
        step = reached[label] = reached[label] + gap
        own = curves[label][step] = losses[int(label[5:])][step - 1]
        competitors = {name: curve for name, curve in curves.items() if name != label}
        stop = asha_decision(curves[label], 8, competitors, AshaRule(0.25, reduction_factor))
        if stop:
            ended.add(label)
            rungs = [2 * reduction_factor**n for n in range(3)]
            assert [rung for rung in rungs if step - gap < rung <= step]
            assert own > min(competitors[stop.competitor].values()), "the best of a rung goes on"
    assert len(ended) < len(curves), "one is trained to its end"


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_the_best_goes_on_where_one_look_passes_two_rungs(names: tuple[str, str]) -> None:
    curves = {"a": {4: 5.0, 6: 1.0}, "b": {4: 2.0, 6: 1.9}}
    competitors = {name: curves[name] for name in names}
    assert asha_decision({4: 1.5}, 8, competitors, HALVING) is None
    stop = asha_decision({4: 2.5}, 8, competitors, HALVING)
    assert stop is not None
    assert "its validation loss is 2.500, b had 2.000" in stop.text


def test_a_loss_that_is_no_number_is_neither_ended_nor_a_winner() -> None:
    assert asha_decision({2: math.nan}, 8, {"a": {2: 1.0}}, HALVING) is None
    assert asha_decision({2: math.nan}, 8, {}, HALVING) is None
    assert asha_decision({2: 3.0}, 8, {"a": {2: math.nan}}, HALVING) is None


def test_of_four_rates_two_pass_the_first_rung_and_one_the_second() -> None:
    curves = {str(n): {step: n + 1 / step for step in range(1, 5)} for n in (1, 2, 3, 4)}

    def ended_at(step: int) -> list[str]:
        seen = {name: {s: loss for s, loss in c.items() if s <= step} for name, c in curves.items()}
        return [
            name
            for name, curve in seen.items()
            if asha_decision(
                curve,
                8,
                {n: c for n, c in seen.items() if n != name},
                HALVING,
            )
        ]

    assert ended_at(1) == []
    assert ended_at(2) == ["3", "4"]
    assert ended_at(3) == [], "between the rungs nobody is compared"
    del curves["3"], curves["4"]
    assert ended_at(4) == ["2"]


def test_who_is_alone_or_at_the_end_goes_on() -> None:
    curve = {2: 5.0, 4: 4.0, 8: 3.0}
    assert asha_decision(curve, 8, {}, HALVING) is None
    assert asha_decision(curve, 8, {"better": {2: 1.0, 4: 1.0, 8: 1.0}}, HALVING) is None
    assert asha_decision({}, 8, {"better": {2: 1.0}}, HALVING) is None
    stop = asha_decision({2: 5.0}, 8, {"worse": {2: 6.0}, "better": {2: 1.0, 4: 0.5}}, HALVING)
    assert stop is not None
    assert stop.competitor == "better"
    assert "its validation loss is 5.000, better had 1.000" in stop.text


@pytest.mark.parametrize("competitor", [{2: 1.0}, {2: 1.0, 4: 0.5}, {4: 1.0}])
def test_a_competitor_that_was_validated_at_other_steps_is_compared_where_it_reached_the_rung(
    competitor: dict[int, float],
) -> None:
    stop = asha_decision({3: 5.0}, 8, {"better": competitor}, HALVING)
    late = asha_decision({7: 5.0}, 8, {"better": competitor}, HALVING)
    assert stop is not None
    assert late is not None
    assert "better had 1.000" in stop.text
