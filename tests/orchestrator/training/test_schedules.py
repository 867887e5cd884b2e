"""Learning rate, iteration schedule and drawn members are functions of the step."""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import groupby
from typing import Any

import pytest

from iiet.model.config import DistillationConfig, preset
from iiet.model.schedule import IterationSchedule
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.training.schedules import (
    drawn_by_step,
    flops_per_token_by_step,
    largest_step,
    learning_rate_at,
    schedule_by_step,
    stages_of,
)

RATE = {"num_steps": 100, "warmup_steps": 10, "learning_rate": 1.0,
        "final_learning_rate_fraction": 0.1}  # fmt: skip
NESTED = ("3,1", "3,0", "1,0", "0,0")


def rates(**changes: Any) -> list[float]:
    recipe = TrainingSettings(**{**RATE, **changes})
    return [learning_rate_at(step, recipe) for step in range(recipe.num_steps)]


@pytest.mark.parametrize("decay", ["cosine", "wsd", "constant"])
def test_the_rate_rises_linearly_to_the_peak_and_then_only_falls(decay):
    values = rates(decay=decay)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(1.0 if decay == "constant" else 0.1)


def test_each_decay_has_its_shape_and_short_runs_have_a_rate():
    assert rates(warmup_steps=0, num_steps=101)[50] == pytest.approx(0.55)
    values = rates(decay="wsd", decay_fraction=0.3)
    assert values[10:70] == [1.0] * 60
    assert values[71] < 1.0
    assert set(rates(decay="constant")[10:]) == {1.0}
    assert rates(warmup_steps=0)[0] == 1.0
    assert rates(num_steps=1, warmup_steps=0) == [1.0]
    assert rates(num_steps=1, warmup_steps=10) == [pytest.approx(0.1)]


@pytest.mark.parametrize(
    ("corrections", "from_fraction", "ramp_fraction", "stages"),
    [
        ((3, 1), 0.75, 0.0, [((0, 0), 75), ((3, 1), 25)]),
        ((3, 1), 0.0, 0.0, [((3, 1), 100)]),
        ((3, 1, 2), 0.25, 0.6, [((0, 0, 0), 25), ((1, 1, 1), 20), ((2, 1, 2), 20),
                                ((3, 1, 2), 35)]),
        ((2, 2), 0.5, 0.5, [((0, 0), 50), ((1, 1), 25), ((2, 2), 25)]),
        ((0, 0), 0.0, 0.2, [((0, 0), 100)]),
    ],
)  # fmt: skip
def test_corrections_come_at_once_or_over_a_ramp(corrections, from_fraction, ramp_fraction, stages):
    recipe = TrainingSettings(
        num_steps=100, iterate_from_fraction=from_fraction, iterate_ramp_fraction=ramp_fraction
    )
    schedule_at = schedule_by_step(IterationSchedule(corrections), recipe)
    schedules = [schedule_at(step).corrections for step in range(100)]
    assert [(schedule, len(list(steps))) for schedule, steps in groupby(schedules)] == stages
    # The rest of a training that has done 10 steps.
    steps_of_stages = stages_of(IterationSchedule(corrections), recipe, range(10, 100))
    schedule_of_step = {
        step: schedule.corrections for schedule, steps in steps_of_stages.items() for step in steps
    }
    assert list(schedule_of_step) == list(range(10, 100))
    assert list(schedule_of_step.values()) == schedules[10:]


def drawn(
    *corrections: int, elastic: ElasticSettings | None = None, **recipe: Any
) -> list[tuple[tuple[int, ...], ...]]:
    """Return the members of each of 400 steps; the first 100 make no corrections."""
    settings = TrainingSettings(
        **{"num_steps": 400, "iterate_from_fraction": 0.25, **recipe},
        elastic=elastic or ElasticSettings(num_drawn=2),
    )
    drawn_at = drawn_by_step(IterationSchedule(corrections), settings)
    return [tuple(member.corrections for member in drawn_at(step)) for step in range(400)]


def test_members_are_drawn_from_seed_and_step_alone():
    two_members = ElasticSettings(schedules=NESTED, num_drawn=2)
    by_step = drawn(3, 3, elastic=two_members)
    assert by_step[:100] == [()] * 100
    assert all(len(set(members)) == 2 for members in by_step[100:])
    assert by_step == drawn(3, 3, elastic=two_members) != drawn(3, 3, elastic=two_members, seed=1)
    # More draws leave the first ones as they are; the order of the family does not matter.
    three_members = ElasticSettings(schedules=NESTED, num_drawn=3)
    assert [members[:2] for members in drawn(3, 3, elastic=three_members)] == by_step
    backwards = ElasticSettings(schedules=NESTED[::-1], num_drawn=2)
    assert drawn(3, 3, elastic=backwards) == by_step


def test_members_are_drawn_in_proportion_to_what_they_leave_out():
    family = ElasticSettings(schedules=NESTED, num_drawn=1)
    recipe = TrainingSettings(num_steps=8000, iterate_from_fraction=0.0, elastic=family)
    drawn_at = drawn_by_step(IterationSchedule((3, 3)), recipe)
    counts = Counter(member.corrections for step in range(8000) for member in drawn_at(step))
    # The four leave out 2, 3, 5 and 6 of 6 corrections; 8,000 draws vary by up to 45.
    expected = {(3, 1): 1000, (3, 0): 1500, (1, 0): 2500, (0, 0): 3000}
    assert counts == {member: pytest.approx(count, abs=180) for member, count in expected.items()}


def test_a_family_follows_from_the_schedule_of_the_step():
    by_step = drawn(3, 1)[100:]
    assert {member for members in by_step for member in members} == {(0, 0), (1, 1), (2, 1)}
    small_family = drawn(1, 1, elastic=ElasticSettings(num_drawn=5))
    assert small_family[100:] == [((0, 0),)] * 300  # Below 1,1 there is no other schedule.
    family = ElasticSettings(schedules=NESTED, num_drawn=9)
    ramp = drawn(3, 3, elastic=family, iterate_from_fraction=0, iterate_ramp_fraction=0.75)
    assert {frozenset(members) for members in ramp[:100]} == {frozenset({(1, 0), (0, 0)})}
    below = {frozenset({(2, 1), (2, 0), (1, 0), (0, 0)})}
    assert {frozenset(members) for members in ramp[100:200]} == below
    no_weight = drawn(3, 1, elastic=ElasticSettings(weight=0))
    assert drawn(0, 0) == no_weight == [()] * 400


@pytest.mark.parametrize(
    ("recipe", "teacher_from", "start", "expected"),
    [
        ({"iterate_from_fraction": 0.0}, None, 0, 0),
        ({"iterate_from_fraction": 0.5}, None, 0, 50),
        ({"iterate_from_fraction": 0.5}, None, 60, 60),
        ({"iterate_from_fraction": 0.2, "iterate_ramp_fraction": 0.4}, None, 0, 40),
        ({"iterate_from_fraction": 0.2}, 70, 0, 70),
        ({"iterate_from_fraction": 0.0}, 70, 0, 70),
    ],
)
def test_the_largest_step_has_all_corrections_and_the_teacher(
    recipe, teacher_from, start, expected
):
    config = preset("tiny", schedule=2)
    job = TrainingJob(
        run_folder="",
        tokens_folder="",
        model=config,
        recipe=TrainingSettings(num_steps=100, **recipe),
        objective="pretrain" if teacher_from is None else "distill",
        distillation=None if teacher_from is None else DistillationConfig(start_step=teacher_from),
    )
    flops = flops_per_token_by_step(job, None if teacher_from is None else config)
    assert largest_step(job, flops, start) == expected
