"""Schedules: all written forms, validation, comparison."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from iiet.schedule import IterationSchedule


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
    "text", ["", "a", "1,2", "3*3", "1.5", "-1", "1,,2,2", [1, 2, 3, -1], 2.5, True]
)
def test_parse_refuses_and_names_what_it_got(text):
    with pytest.raises(ValueError, match=r"schedule|layer"):
        IterationSchedule.parse(text, num_layers=4)


@pytest.mark.parametrize("corrections", [(), (1, -1), (1, 2.0), (True,), [1, 2], "12"])
def test_malformed_schedules_cannot_exist(corrections):
    with pytest.raises(ValueError, match="got"):
        IterationSchedule(corrections)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_text_and_schedule_are_the_same_thing(corrections):
    schedule = IterationSchedule(tuple(corrections))
    assert IterationSchedule.parse(str(schedule), num_layers=len(schedule)) == schedule
    assert schedule.num_evaluations == sum(1 + r for r in corrections)
    assert list(schedule) == corrections
    assert schedule.is_within(IterationSchedule.uniform(len(corrections), max(corrections)))
    assert hash(schedule) == hash(IterationSchedule(tuple(corrections)))


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
