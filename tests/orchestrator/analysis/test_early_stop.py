"""No trial that would have won is stopped, as long as its loss falls ever more slowly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.analysis.early_stop import judge, optimistic_bound

STEPS = st.lists(st.integers(1, 20), min_size=3, max_size=12)
FALLS = st.lists(st.floats(0.0, 0.1), min_size=12, max_size=12)


def convex_curve(gaps: list[int], falls: list[float]) -> dict[int, float]:
    """Return a loss that falls ever more slowly, seen at uneven steps."""
    step, loss, curve = 0, 5.0, {0: 5.0}
    for gap, fall in zip(gaps, sorted(falls, reverse=True), strict=False):
        step, loss = step + gap, loss - fall * gap
        curve[step] = loss
    return curve


@given(STEPS, FALLS, st.integers(2, 12))
def test_the_bound_lies_under_the_end_of_a_convex_curve(
    gaps: list[int], falls: list[float], seen: int
) -> None:
    curve = convex_curve(gaps, falls)
    so_far = dict(list(curve.items())[:seen])
    bound = optimistic_bound(so_far, max(curve))
    assert bound is not None
    assert bound <= curve[max(curve)] + 1e-9


@given(STEPS, FALLS, st.floats(0.0, 1.0))
def test_a_trial_on_the_way_to_beating_its_rival_is_never_stopped(
    gaps: list[int], falls: list[float], grace: float
) -> None:
    curve = convex_curve(gaps, falls)
    points = list(curve.items())
    rivals = {"rival": curve[max(curve)] + 1e-6}
    for seen in range(1, len(points) + 1):
        assert judge(dict(points[:seen]), max(curve), rivals, grace_fraction=grace) is None


def test_a_trial_that_stands_still_above_its_rival_is_stopped_after_the_grace() -> None:
    flat = {10: 3.0, 20: 2.9, 30: 2.9, 40: 2.9, 50: 2.9}
    rivals = {"worse": 3.5, "better": 2.5}
    verdict = judge(flat, 100, rivals, grace_fraction=0.5)
    assert verdict is not None
    assert (verdict.step, verdict.rival, verdict.bound) == (50, "better", 2.9)
    assert verdict.share_saved == pytest.approx(0.5)
    assert "step 50 of 100" in verdict.text
    assert judge(flat, 100, rivals, grace_fraction=0.51) is None
    assert judge(flat, 100, {"worse": 3.5}, grace_fraction=0.5) is None
    assert judge(flat, 100, {}, grace_fraction=0.5) is None
    assert judge(flat, 50, rivals, grace_fraction=0.5) is None, "it is at its end anyway"


def test_one_loss_is_no_fall() -> None:
    assert optimistic_bound({10: 3.0}, 100) is None
    assert optimistic_bound({}, 100) is None


def test_a_loss_that_rises_is_granted_its_best() -> None:
    assert optimistic_bound({10: 3.0, 20: 3.4}, 100) == 3.0
