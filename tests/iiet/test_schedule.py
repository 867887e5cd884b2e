"""Schedules: all written forms, validation, comparison."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from iiet.model.schedule import LEFT_OUT, IterationSchedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (3, (3, 3, 3, 3)),
        ("3", (3, 3, 3, 3)),
        ("2,2,1,1", (2, 2, 1, 1)),
        (" (2, 2, 1, 1) ", (2, 2, 1, 1)),
        ("[2,2,1,1]", (2, 2, 1, 1)),
        ("3*4", (3, 3, 3, 3)),
        ("0,2*2,1", (0, 2, 2, 1)),
        ("3,x,0,x", (3, LEFT_OUT, 0, LEFT_OUT)),
        ("( x * 2, 1*2 )", (LEFT_OUT, LEFT_OUT, 1, 1)),
        ([1, "x", np.int64(2), 0], (1, LEFT_OUT, 2, 0)),
        ([2, 2, 1, 1], (2, 2, 1, 1)),
        (IterationSchedule((2, 2, 1, 1)), (2, 2, 1, 1)),
        (np.int64(3), (3, 3, 3, 3)),
        (np.array([2, 2, 1, 1]), (2, 2, 1, 1)),
        (torch.tensor([2, 2, 1, 1]), (2, 2, 1, 1)),
    ],
)
def test_parse_reads_every_way_of_writing(text, expected):
    schedule = IterationSchedule.parse(text, num_layers=4)
    assert schedule.corrections == expected
    assert {type(count) for count in schedule} == {int}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0..1", (0, 1, 1)), ("1..0", (1, 1, 0)), ("0..3", (0, 2, 3)), ("2..2", (2, 2, 2))],
)
def test_a_ramp_rounds_half_up(text, expected):
    assert IterationSchedule.parse(text, num_layers=3).corrections == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "1,2", "3*3", "1.5", "-1", "1,,2,2", "x", "x*4", "X,1,1,1"),
        *([1, 2, 3, -1], 2.5, True),
    ],
)
def test_parse_refuses_and_names_what_it_got(text):
    with pytest.raises(ValueError, match=r"schedule|layer"):
        IterationSchedule.parse(text, num_layers=4)


@pytest.mark.parametrize("corrections", [(), (1, -2), (-1, -1), (1, 2.0), (True,), [1, 2], "12"])
def test_malformed_schedules_cannot_exist(corrections):
    with pytest.raises(ValueError, match="got"):
        IterationSchedule(corrections)


@given(st.lists(st.integers(LEFT_OUT, 5), min_size=1, max_size=24).filter(lambda r: max(r) >= 0))
def test_text_and_schedule_are_the_same_thing(corrections):
    schedule = IterationSchedule(tuple(corrections))
    for written in (
        str(schedule), schedule.with_repetitions(), json.loads(json.dumps(schedule.as_list())),
    ):  # fmt: skip
        assert IterationSchedule.parse(written, num_layers=len(schedule)) == schedule
    assert list(schedule) == corrections
    assert schedule.is_within(IterationSchedule.uniform(len(corrections), max(corrections)))
    assert hash(schedule) == hash(IterationSchedule(tuple(corrections)))
    kept = [count for count in corrections if count != LEFT_OUT]
    assert list(schedule.of_kept_layers()) == kept
    assert (schedule.num_layers, schedule.num_kept_layers) == (len(corrections), len(kept))
    assert schedule.num_evaluations == sum(1 + r for r in kept)
    assert schedule.num_corrections == sum(kept)
    assert schedule.max_corrections == max(kept)
    all_layers = sorted([*schedule.kept_layers, *schedule.left_out_layers])
    assert all_layers == list(range(len(corrections)))
    assert [corrections[layer] for layer in schedule.kept_layers] == kept
    full = IterationSchedule(tuple(max(0, count) for count in corrections))
    assert full.leaving_out(schedule.left_out_layers) == schedule


@given(st.lists(st.integers(LEFT_OUT, 3), min_size=1, max_size=4).filter(lambda r: max(r) >= 0))
def test_num_within_counts_the_schedules_within(corrections):
    schedule = IterationSchedule(tuple(corrections))
    ranges = [range(LEFT_OUT, count + 1) for count in corrections]
    within = [choice for choice in itertools.product(*ranges) if max(choice) >= 0]
    assert all(IterationSchedule(choice).is_within(schedule) for choice in within)
    for max_left_out in range(len(corrections) + 1):
        most = len(schedule.left_out_layers) + max_left_out
        expected = sum(choice.count(LEFT_OUT) <= most for choice in within)
        assert schedule.num_within(max_left_out) == expected


@pytest.mark.parametrize(
    ("text", "num_layers", "label"),
    [
        ("3,x,1", 3, "3,x,1"),
        ("0*8", 8, "0,0,0,0,0,0,0,0"),
        ("0*5,x,0*9,x,0,x,0*12", 30, "27 of 30 layers"),
        ("0*4,x*3,2*20,x,0*2", 30, "26 of 30 layers, 0*4,2*20,0*2"),
        ("2*30", 30, "2*30"),
    ],
)
def test_a_label_of_many_layers_says_how_many_are_kept(text, num_layers, label):
    assert IterationSchedule.parse(text, num_layers=num_layers).label() == label


def test_layers_that_do_not_exist_cannot_be_left_out():
    schedule = IterationSchedule((1, 2))
    assert schedule.leaving_out([0]) == (LEFT_OUT, 2)
    for layers in ([2], [-1], [0, 1]):
        with refused(ValueError, "layer"):
            schedule.leaving_out(layers)


@pytest.mark.parametrize(
    ("corrections", "text"),
    [
        ((2, 2, 1, 1, 1, 1), "2,2,1,1,1,1"),
        ((3,) * 8, "3,3,3,3,3,3,3,3"),
        ((0,) * 12 + (2,) * 6 + (0,) * 12, "0*12,2*6,0*12"),
        ((3,) * 4 + (1,) * 19 + (0,), "3*4,1*19,0"),
        ((3,) * 24, "3*24"),
    ],
)
def test_a_long_schedule_counts_repetitions(corrections, text):
    assert str(IterationSchedule(corrections)) == text


def test_a_schedule_equals_the_tuple_of_its_numbers():
    schedule = IterationSchedule((3, 0))
    assert schedule == (3, 0)
    assert [(3, 0)].index(schedule) == 0
    assert {schedule: "kept"}[3, 0] == "kept"
    assert schedule not in [(3, 1), (3,), "3,0", 3, None]


def test_is_within_is_a_partial_order():
    small = IterationSchedule((1, 0))
    large = IterationSchedule((0, 1))
    assert not small.is_within(large)
    assert not large.is_within(small)
    assert IterationSchedule.none(2).is_within(small)
    with refused(ValueError, "layers"):
        small.is_within(IterationSchedule((1, 1, 1)))
