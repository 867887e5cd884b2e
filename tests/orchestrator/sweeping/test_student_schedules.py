"""Which schedules students have: nested families down to few layers, and controls at equal NFE."""

from __future__ import annotations

import pytest
from refusals import refused

from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.student_schedules import (
    choose_schedules,
    most_left_out,
    num_named,
    random_schedule,
    uniform_schedule,
)
from orchestrator.workspace.errors import UserError

SIX = ModelConfig(
    vocab_size=40, dim=8, num_layers=6, num_heads=1, ffn_dim=8, context_length=8, method="vanilla"
)
PLAIN = InfluenceTable(
    metric="loss",
    value_rows=((),) * 6,
    error_rows=((),) * 6,
    num_tokens=64,
    layer_values=(7.0, 0.1, 0.4, 0.2, 0.3, 2.0),
)
"""Layers 2, 4, 5, 3 matter least, in this order."""


def sweep(*assignments: str):
    return resolve_settings({}, [f"sweep.{text}" for text in assignments]).sweep


def chosen(table: InfluenceTable, max_left_out: int, *assignments: str) -> list[str]:
    settings = sweep(*assignments)
    students = choose_schedules(table, settings, max_left_out=max_left_out)
    return [str(student.schedule) for student in students]


@pytest.mark.parametrize(
    ("setting", "number"),
    [(None, 3), ("none", 0), ("all", 5), ("2", 2), ("0", 0)],
)
def test_a_plain_teacher_loses_half_of_its_layers_at_most_unless_the_setting_says_otherwise(
    setting, number
):
    settings = sweep() if setting is None else sweep(f"leave_out_layers={setting}")
    assert most_left_out(settings, SIX) == number
    with refused(UserError, "sweep.leave_out_layers=6", "6 layers"):
        most_left_out(sweep("leave_out_layers=6"), SIX)


def test_students_of_a_plain_teacher_leave_out_one_layer_more_each():
    assert chosen(PLAIN, 3) == ["0,x,0,0,0,0", "0,x,0,x,0,0", "0,x,0,x,x,0"]
    assert chosen(PLAIN, 3, "num_schedules=2") == ["0,x,0,0,0,0", "0,x,0,x,x,0"]
    assert chosen(PLAIN, 3, "thresholds=[0.25]") == ["0,x,0,x,0,0"]
    assert chosen(PLAIN, 3, "budgets=['80%']") == ["0,x,0,x,0,0"], "4 of 6 NFE are 67 %, 5 are 83 %"
    assert chosen(PLAIN, 3, "budgets=['50%', 5]") == ["0,x,0,0,0,0", "0,x,0,x,x,0"]
    assert chosen(PLAIN, 1) == ["0,x,0,0,0,0"], "a family of one member"
    knapsack = ("selection=knapsack", "budgets=['100%', 4]")
    assert chosen(PLAIN, 3, *knapsack) == ["0,x,0,x,0,0"], "the teacher itself is no student"
    for share in ("0%", "101%", "half"):
        with refused(UserError, "sweep.budgets", share):
            sweep(f"budgets=['{share}']")
    assert chosen(PLAIN, 5, "budgets=[1]") == ["0,x,x,x,x,x"]


def test_one_threshold_orders_corrections_and_layers():
    """A layer is left out where neither it nor any of its corrections matters."""
    table = InfluenceTable(
        metric="loss",
        value_rows=((0.5, 0.1), (0.3,), (0.9,)),
        error_rows=((0.0, 0.0), (0.0,), (0.0,)),
        num_tokens=64,
        layer_values=(0.2, 0.05, 0.4),
    )
    family = ["2,1,1", "1,1,1", "1,x,1", "x,x,1", "x,x,0"]
    assert chosen(table, 2, "num_schedules=9") == family
    # Two layers always stay with 1: the first one, whose correction matters, before the second.
    assert chosen(table, 1, "num_schedules=9") == ["2,1,1", "1,1,1", "1,x,1", "0,x,1", "0,x,0"]


def test_schedules_of_ones_own_stand_beside_those_of_influence_or_alone():
    own = "schedules=['0*4,x*2', '0,x,0,0,0,0']"
    assert chosen(PLAIN, 3, own) == [
        "0,x,0,0,0,0", "0,x,0,x,0,0", "0,0,0,0,x,x", "0,x,0,x,x,0"
    ]  # fmt: skip
    assert chosen(PLAIN, 3, own, "num_schedules=0") == ["0,x,0,0,0,0", "0,0,0,0,x,x"]
    with refused(UserError, "sweep.schedules", "1"):
        chosen(PLAIN, 3, "schedules=[1]")
    with refused(UserError, "sweep.schedules", "5 layers"):
        chosen(PLAIN, 3, "schedules=['0*5']")


def test_controls_have_the_evaluations_of_the_schedules_that_influence_chose():
    settings = sweep("num_schedules=2", "schedules=[uniform, reversed, 'random*3']")
    students = choose_schedules(PLAIN, settings, max_left_out=3)
    counts = [student.schedule.num_evaluations for student in students]
    assert set(counts) == {5, 3}
    labels = [student.label for student in students]
    assert len(set(labels)) == len(labels)
    assert num_named(settings, 2) == 2 * (1 + 1 + 3)
    kept = {student.choice: student.schedule.kept_layers for student in students}
    assert kept["uniform"] == (0, 3, 5)
    assert len({student.schedule for student in students}) == len(students)


@pytest.mark.parametrize("num_evaluations", range(1, 10))
def test_uniform_and_random_schedules_have_the_evaluations_asked_for(num_evaluations):
    full = IterationSchedule((2, 0, 1, 2))
    even = uniform_schedule(full, num_evaluations)
    drawn = random_schedule(full, num_evaluations, 3, seed=1)
    for schedule in (even, drawn):
        assert schedule.num_evaluations == num_evaluations
        assert schedule.is_within(full)
    assert drawn == random_schedule(full, num_evaluations, 3, seed=1)


def test_a_uniform_schedule_is_even():
    full = IterationSchedule.uniform(4, 3)
    assert str(uniform_schedule(full, 8)) == "1,1,1,1"
    assert str(uniform_schedule(full, 6)) == "1,0,0,1"
    assert str(uniform_schedule(full, 2)) == "0,x,x,0"


def test_a_random_schedule_leaves_out_no_more_layers_than_it_may():
    full = IterationSchedule.uniform(6, 3)
    for seed in range(20):
        assert len(random_schedule(full, 6, 2, seed=seed).left_out_layers) <= 2
