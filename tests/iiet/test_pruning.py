"""The family is nested and complete, and the knapsack is optimal."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from iiet.pruning import (
    InfluenceTable,
    knapsack,
    num_evaluations,
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
def test_within_takes_the_most_expensive_member_that_fits(influence, max_evaluations):
    family = schedule_family(influence)
    fitting = [m for m in family if m.schedule.num_evaluations <= max_evaluations]
    if fitting:
        best = max(fitting, key=lambda member: member.schedule.num_evaluations)
        assert family.within(nfe=max_evaluations) == best.schedule
    else:
        with pytest.raises(ValueError, match="cheapest"):
            family.within(nfe=max_evaluations)


@settings(max_examples=examples(80))
@given(influences, st.data())
def test_knapsack_equals_trying_every_schedule(score, data):
    """In evaluations, and under any cost that adds up, as FLOPs do."""
    # Tenths and thirds are no numbers of the machine: their sums are rounded.
    price = st.sampled_from([0.1, 0.25, 1 / 3, 1.0, 1.5, 3.5])
    prices = [[data.draw(price) for _ in row] for row in score]

    def total(rows, schedule):
        pairs = zip(rows, schedule, strict=True)
        return math.fsum(value for row, count in pairs for value in row[:count])

    cost = data.draw(
        st.sampled_from([num_evaluations, lambda schedule: 2.0 + total(prices, schedule)])
    )
    all_corrections = itertools.product(*(range(len(row) + 1) for row in score))
    costs = {schedule: cost(schedule) for schedule in map(IterationSchedule, all_corrections)}
    max_cost = data.draw(st.floats(0, 60) | st.sampled_from(sorted({*costs.values()})))
    allowed = [schedule for schedule, schedule_cost in costs.items() if schedule_cost <= max_cost]
    if not allowed:
        with pytest.raises(ValueError, match="predictions"):
            knapsack(score, max_cost, cost=cost)
        return
    best = knapsack(score, max_cost, cost=cost)
    assert best in allowed
    most = max(total(score, schedule) for schedule in allowed)
    assert total(score, best) == pytest.approx(most, abs=1e-12)


def test_a_family_and_an_influence_table_are_shown_as_small_tables():
    rows = ((0.25, 0.125), (0.5,))
    table = InfluenceTable("cosine", rows, rows, 64, layer_values=(0.75, 0.1))
    assert [line.split() for line in str(table).splitlines()[1:]] == [
        ["layer", "correction", "1", "correction", "2", "whole", "layer"],
        ["1", "0.25000", "0.12500", "0.75000"],
        ["2", "0.50000", "0.10000"],
    ]
    family = schedule_family(table)
    lines = str(family).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert [line.split(maxsplit=2) for line in lines[2:]] == [
        ["2,1", "5", "up to 0.125"],
        ["1,1", "4", "0.125 to 0.25"],
        ["0,1", "3", "0.25 to 0.5"],
        ["0,0", "2", "above 0.5"],
    ]
    for displayed in (family, table):
        assert displayed._repr_html_().count("<tr>") == str(displayed).count("\n")


def test_without_corrections_the_table_shows_whole_layers_alone():
    table = InfluenceTable("cosine", ((), ()), ((), ()), 64, layer_values=(0.75, 0.1))
    assert str(table).splitlines()[1:] == [
        "layer  whole layer",
        "    1      0.75000",
        "    2      0.10000",
    ]
    assert "all" in str(schedule_family(table))
