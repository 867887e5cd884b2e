"""The family is nested and complete, and the knapsack is optimal."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iiet.config import preset
from iiet.cost import inference_cost
from iiet.pruning import (
    knapsack,
    schedule_at_threshold,
    schedule_family,
    spread_over_cost,
)
from iiet.schedule import IterationSchedule

# Few distinct values, so that ties are common; negative ones occur with the loss metric.
influences = st.lists(
    st.lists(
        st.one_of(st.integers(-3, 6).map(float), st.floats(-1, 1)),
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)


@given(influences)
def test_the_family_runs_from_full_to_none_nested_and_small(influence):
    family = schedule_family(influence)
    assert family[0].schedule.corrections == tuple(len(row) for row in influence)
    assert family[-1].schedule.num_corrections == 0
    assert len(family) <= sum(len(row) for row in influence) + 1
    assert family[0].threshold_above == -math.inf
    assert family[-1].threshold_up_to == math.inf
    for dearer, cheaper in itertools.pairwise(family):
        assert cheaper.schedule.is_within(dearer.schedule)
        assert cheaper.schedule != dearer.schedule
        assert dearer.threshold_up_to == cheaper.threshold_above


@given(influences, st.floats(-4, 7))
def test_any_threshold_gives_the_member_whose_interval_holds_it(influence, threshold):
    # The definition again, without suffix maxima: keep up to the last one that is large enough.
    by_hand = tuple(
        max((i + 1 for i, value in enumerate(row) if value >= threshold), default=0)
        for row in influence
    )
    assert schedule_at_threshold(influence, threshold).corrections == by_hand
    holders = [
        member
        for member in schedule_family(influence)
        if member.threshold_above < threshold <= member.threshold_up_to
    ]
    assert [member.schedule.corrections for member in holders] == [by_hand]


@given(influences, st.integers(2, 8))
def test_spread_keeps_both_ends_and_repeats_nothing(influence, num_points):
    family = schedule_family(influence)
    chosen = spread_over_cost(family, num_points)
    assert len(chosen) == min(num_points, len(family))
    assert chosen[0] == family[0]
    assert chosen[-1] == family[-1]
    evaluations = [member.schedule.num_evaluations for member in chosen]
    assert evaluations == sorted(set(evaluations), reverse=True)


def test_spread_is_even_where_the_family_allows():
    family = schedule_family([[1.0 / (i + 1) for i in range(12)]])
    chosen = spread_over_cost(family, 4)
    assert [member.schedule.num_corrections for member in chosen] == [12, 8, 4, 0]
    squared = spread_over_cost(family, 3, cost=lambda schedule: schedule.num_corrections**2)
    assert [member.schedule.num_corrections for member in squared] == [12, 8, 0]
    with pytest.raises(ValueError, match="at least 2"):
        spread_over_cost(family, 1)


@given(influences, st.integers(0, 25))
def test_within_cost_takes_the_most_expensive_member_that_fits(influence, max_evaluations):
    family = schedule_family(influence)
    fitting = [m for m in family if m.schedule.num_evaluations <= max_evaluations]
    if fitting:
        best = max(fitting, key=lambda member: member.schedule.num_evaluations)
        assert family.within(max_evaluations) == best.schedule
    else:
        with pytest.raises(ValueError, match="cheapest"):
            family.within(max_evaluations)


@settings(max_examples=60)
@given(influences, st.integers(0, 25))
def test_knapsack_equals_trying_every_schedule(score, max_evaluations):
    allowed = [
        counts
        for counts in itertools.product(*(range(len(row) + 1) for row in score))
        if sum(counts) + len(score) <= max_evaluations
    ]
    if not allowed:
        with pytest.raises(ValueError, match="predictions"):
            knapsack(score, max_evaluations)
        return

    def worth(counts):
        kept = [v for row, count in zip(score, counts, strict=True) for v in row[:count]]
        return math.fsum(kept)

    best = knapsack(score, max_evaluations)
    assert best.corrections in allowed
    assert worth(best) == pytest.approx(max(map(worth, allowed)), abs=1e-12)


def test_knapsack_keeps_a_bad_correction_before_a_good_one_and_drops_useless_ones():
    # Layer 1 pays only at its third correction; layer 2 pays little at once.
    score = [[0.0, 0.0, 1.0], [0.4, -0.1]]
    assert knapsack(score, 3).corrections == (0, 1)
    assert knapsack(score, 5).corrections == (3, 0)
    assert knapsack(score, 99).corrections == (3, 1)


@settings(max_examples=40)
@given(influences, st.floats(0, 60, allow_nan=False), st.data())
def test_knapsack_of_any_cost_that_adds_up_equals_trying_every_schedule(score, max_cost, data):
    # Tenths and thirds are no numbers of the machine: their sums are rounded.
    price = st.sampled_from([0.1, 0.25, 1 / 3, 1.0, 1.5, 3.5])
    prices = [[data.draw(price) for _ in row] for row in score]

    def cost(schedule):
        kept = zip(prices, schedule, strict=True)
        return math.fsum([2.0, *(p for own, count in kept for p in own[:count])])

    def worth(schedule):
        kept = zip(score, schedule, strict=True)
        return math.fsum(v for row, count in kept for v in row[:count])

    every = itertools.product(*(range(len(row) + 1) for row in score))
    allowed = [s for s in map(IterationSchedule, every) if cost(s) <= max_cost]
    if not allowed:
        with pytest.raises(ValueError, match="predictions"):
            knapsack(score, max_cost, cost=cost)
        return
    best = knapsack(score, max_cost, cost=cost)
    assert best in allowed
    assert worth(best) == pytest.approx(max(map(worth, allowed)), abs=1e-12)


def test_knapsack_of_flops_stays_within_the_budget():
    # A late layer mixes more estimates: its correction costs more than an early one's.
    config = preset("tiny", method="iiet", schedule="1")

    def flops(schedule):
        return inference_cost(config, schedule).decode_flops_per_token

    first, last = IterationSchedule((1, 0, 0, 0, 0, 0)), IterationSchedule((0, 0, 0, 0, 0, 1))
    score = [[0.1], [0.0], [0.0], [0.0], [0.0], [0.2]]
    assert flops(first) < flops(last)
    assert knapsack(score, flops(first), cost=flops) == first
    assert knapsack(score, flops(last), cost=flops) == last
