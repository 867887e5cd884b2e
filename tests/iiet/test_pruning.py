"""The family is nested and complete, and the knapsack is optimal."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from refusals import refused

from iiet.cost import inference_cost
from iiet.iiad.pruning import (
    InfluenceTable,
    LeavingRound,
    knapsack,
    most_important_layers,
    num_evaluations,
    schedule_at_threshold,
    schedule_family,
    spread_over_cost,
    table_of_rounds,
)
from iiet.model.config import preset
from iiet.model.schedule import LEFT_OUT, IterationSchedule

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


def table_of(data, influence, metric="cosine"):
    """Return a table with whole layers, few of whose values are distinct."""
    value = st.one_of(st.integers(-3, 6).map(float), st.floats(-1, 1))
    size = len(influence)
    layers = data.draw(st.lists(value, min_size=size, max_size=size))
    rows = tuple(map(tuple, influence))
    errors = tuple((0.0,) * len(row) for row in rows)
    return InfluenceTable(metric, rows, errors, 64, layer_values=tuple(layers))


@given(influences, st.data())
def test_a_family_goes_on_to_the_number_of_layers_that_may_be_left_out(influence, data):
    """The rule again, by hand: evaluation i stays while one from i on is large enough."""
    table = table_of(data, influence)
    num_layers = len(influence)
    max_left_out = data.draw(st.integers(0, num_layers - 1))
    threshold = data.draw(st.floats(-4, 7))
    family = schedule_family(table, max_left_out=max_left_out)
    assert family[0].schedule == table.schedule
    assert len(family[-1].schedule.left_out_layers) == max_left_out
    assert family[-1].schedule.num_corrections == 0
    assert len(family) <= 1 + max_left_out + sum(map(len, influence))
    for dearer, cheaper in itertools.pairwise(family):
        assert cheaper.schedule.is_within(dearer.schedule)
        assert cheaper.schedule != dearer.schedule
        assert dearer.threshold_up_to == cheaper.threshold_above
    evaluations = [[value, *row] for value, row in zip(table.layer_values, influence, strict=True)]
    rank = sorted(range(num_layers), key=lambda layer: (-max(evaluations[layer]), layer))
    for t in (threshold, *(m.threshold_up_to for m in family)):
        by_hand = []
        for layer, row in enumerate(evaluations):
            num_kept = max((i + 1 for i, value in enumerate(row) if value >= t), default=0)
            always_stays = layer in rank[: num_layers - max_left_out]
            by_hand.append(max(num_kept, always_stays) - 1)
        assert schedule_at_threshold(table, t, max_left_out=max_left_out) == tuple(by_hand)
        [holder] = [m for m in family if m.threshold_above < t <= m.threshold_up_to]
        assert holder.schedule == tuple(by_hand)


def test_a_plain_model_has_a_family_of_left_out_layers_alone():
    table = InfluenceTable("loss", ((),) * 4, ((),) * 4, 64, layer_values=(7.2, 0.1, 0.3, 0.1))
    assert [str(m.schedule) for m in schedule_family(table, max_left_out=3)] == [
        "0,0,0,0", "0,x,0,x", "0,x,x,x",
    ]  # fmt: skip
    # Of two equal layers the earlier one is more important.
    assert [str(m.schedule) for m in schedule_family(table, max_left_out=1)] == [
        "0,0,0,0", "0,0,0,x",
    ]  # fmt: skip
    assert most_important_layers([0.3, 0.5, 0.3, 0.9], 3) == (0, 1, 3)
    assert schedule_family(table, max_left_out=3).within(nfe=2) == (0, -1, 0, -1)
    for wrong in (4, -1, 1.5):
        with refused(ValueError, "max_left_out", wrong):
            schedule_family(table, max_left_out=wrong)
    without = replace(table, layer_values=())
    for influence in (without, [[0.1], [0.2]]):
        with refused(ValueError, "whole layers"):
            schedule_family(influence, max_left_out=1)


def test_layers_that_went_one_at_a_time_go_in_this_order_at_thresholds():
    nan = math.nan
    table = InfluenceTable("loss", ((),) * 4, ((),) * 4, 64, layer_values=(1.0, 2.0, 3.0, 4.0))
    rounds = [
        LeavingRound((3.0, 0.5, 0.6, 0.5), (0.1, 0.2, 0.3, 0.4)),
        LeavingRound((3.0, 0.2, 0.7, nan), (0.5, 0.6, 0.7, nan)),
    ]
    assert [leaving.layer for leaving in rounds] == [3, 1]
    again = LeavingRound.from_dict(json.loads(json.dumps(rounds[1].to_dict())))
    assert repr(again) == repr(rounds[1])
    ordered = table_of_rounds(table, rounds)
    assert ordered.layer_values == (3.0, math.nextafter(0.5, 1), 0.7, 0.5)
    assert ordered.layer_errors == (0.5, 0.6, 0.7, 0.4)
    assert [str(m.schedule) for m in schedule_family(ordered, max_left_out=3)] == [
        "0,0,0,0", "0,0,0,x", "0,x,0,x", "0,x,x,x",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="left"):
        LeavingRound((nan,), (nan,))


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


@settings(max_examples=examples(60))
@given(influences.filter(lambda rows: len(rows) < 5), st.data())
def test_knapsack_leaves_layers_out_as_trying_every_schedule_does(influence, data):
    """What a layer costs may depend on how many are kept before it, as the rows of a mix do."""
    table = table_of(data, influence, data.draw(st.sampled_from(["cosine", "loss"])))
    worths = table.evaluation_worths()
    price = st.sampled_from([0.1, 0.25, 1 / 3, 1.0, 3.5])
    prices = [[data.draw(price) for _ in row] for row in worths]
    per_place = data.draw(st.sampled_from([0.0, 0.5]))

    def total(rows, schedule):
        pairs = zip(rows, schedule, strict=True)
        return math.fsum(value for row, count in pairs for value in row[: count + 1])

    def cost(schedule):
        counts = schedule.of_kept_layers()
        places = sum(place * (1 + count) for place, count in enumerate(counts))
        return 2.0 + total(prices, schedule) + per_place * places

    max_left_out = data.draw(st.integers(1, max(1, len(worths) - 1)))
    if max_left_out >= len(worths):
        with refused(ValueError, "max_left_out"):
            knapsack(table, 5.0, cost=cost, max_left_out=max_left_out)
        return
    choices = itertools.product(*(range(LEFT_OUT, len(row)) for row in worths))
    costs = {
        IterationSchedule(choice): cost(IterationSchedule(choice))
        for choice in choices
        if choice.count(LEFT_OUT) <= max_left_out
    }
    max_cost = data.draw(st.floats(0, 60) | st.sampled_from(sorted({*costs.values()})))
    allowed = [schedule for schedule, schedule_cost in costs.items() if schedule_cost <= max_cost]
    if not allowed:
        with refused(ValueError, "predictions"):
            knapsack(table, max_cost, cost=cost, max_left_out=max_left_out)
        return
    best = knapsack(table, max_cost, cost=cost, max_left_out=max_left_out)
    assert best in allowed
    most = max(total(worths, schedule) for schedule in allowed)
    assert total(worths, best) == pytest.approx(most, abs=1e-12)


def test_the_flops_of_an_iterative_model_are_a_cost_of_the_knapsack():
    """The rows of the mix make a layer's FLOPs depend on how many are kept before it."""
    sizes = {"num_layers": 4, "dim": 8, "num_heads": 2, "ffn_dim": 12, "vocab_size": 20}
    config = preset("tiny", schedule="1,0,2,1", sliding_windows=(None, 3, 5, None), **sizes)
    rows = ((0.2,), (), (0.7, 0.1), (0.3,))
    table = InfluenceTable("cosine", rows, rows, 64, layer_values=(0.9, 0.4, 0.5, 0.3))

    def flops(schedule):
        return inference_cost(config, schedule, context_length=8).decode_flops_per_token

    choices = itertools.product(*(range(LEFT_OUT, count + 1) for count in config.corrections))
    allowed = [IterationSchedule(c) for c in choices if c.count(LEFT_OUT) <= 2]
    worths = table.evaluation_worths()

    def worth(schedule):
        pairs = zip(worths, schedule, strict=True)
        return sum(sum(map(Fraction, row[: count + 1])) for row, count in pairs)

    for budget in sorted({flops(schedule) for schedule in allowed})[::5]:
        affordable = [schedule for schedule in allowed if flops(schedule) <= budget]
        best = knapsack(table, budget, cost=flops, max_left_out=2)
        assert best in affordable
        assert worth(best) == max(map(worth, affordable))


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
