"""Distilled baselines cost what students cost, and fewer layers means the least important go."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from iiet.config import ModelConfig, preset
from iiet.cost import inference_cost
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from iiet.schedule import IterationSchedule
from orchestrator.settings import SweepSettings, resolve_settings
from orchestrator.sweeping.baselines import baselines_upper_bound, choose_distilled_baselines
from orchestrator.sweeping.trials import student_estimates
from orchestrator.workspace.errors import UserError

FULL = preset("tiny", schedule=2)  # 6 layers, 18 evaluations
STUDENTS = ("0", "1,0,0,1,0,0", "1", "2,2,1,1,1,1", "2")  # 6, 8, 12, 14, 18 evaluations
IMPORTANCE = (0.9, 0.1, 0.3, 0.2, 0.5, 0.4)


def chosen(
    *schedules: str, full: ModelConfig = FULL, layers: tuple[float, ...] = IMPORTANCE, **sweep: Any
) -> list[Any]:
    members = [
        FamilyMember(
            IterationSchedule.parse(schedule, num_layers=full.num_layers), math.nan, math.nan
        )
        for schedule in schedules
    ]
    rows = tuple((0.1,) * count for count in full.corrections)
    table = InfluenceTable("cosine", rows, rows, 64, rows, layers)
    settings = SweepSettings.model_validate({"num_distilled_baselines": 9, **sweep})
    return choose_distilled_baselines(settings, full, members, table)


def flops(config: ModelConfig) -> float:
    return inference_cost(config).decode_flops_per_token


def test_a_vanilla_model_has_as_many_layers_as_a_student_has_evaluations() -> None:
    found = chosen(*STUDENTS, distilled_baselines=["vanilla"])
    assert [baseline.label for baseline in found] == [
        f"vanilla, {count} layers, distilled" for count in (6, 8, 12, 14)
    ], "a student that saves nothing needs no baseline"
    for baseline, schedule in zip(found, STUDENTS, strict=False):
        assert (baseline.config.method, baseline.kept_layers) == ("vanilla", None)
        assert (
            replace(baseline.config, method="iiet", num_layers=6, schedule=FULL.schedule) == FULL
        ), "the same shape apart from the layers"
        corrections = IterationSchedule.parse(schedule, num_layers=6)
        student = replace(FULL, schedule=corrections)
        assert flops(baseline.config) == pytest.approx(flops(student), rel=0.02)
        assert flops(baseline.config) < flops(FULL)


def test_fewer_layers_are_the_most_important_ones_with_all_corrections() -> None:
    found = chosen(*STUDENTS, distilled_baselines=["fewer_layers"])
    assert {baseline.label: baseline.kept_layers for baseline in found} == {
        "2 of 6 layers": (0, 4),  # 6 evaluations
        "3 of 6 layers": (0, 4, 5),
        "4 of 6 layers": (0, 2, 4, 5),
        "5 of 6 layers": (0, 2, 3, 4, 5),
    }
    for baseline in found:
        assert baseline.config.schedule == IterationSchedule.parse(
            2, num_layers=baseline.config.num_layers
        )


def test_equal_ones_are_one_and_too_many_are_spread_over_cost() -> None:
    kinds = ["fewer_layers", "vanilla"]

    def labels(*schedules: str, most: int) -> list[str]:
        found = chosen(*schedules, distilled_baselines=kinds, num_distilled_baselines=most)
        return [b.label.removesuffix(", distilled") for b in found]

    assert labels("0", "0,0,0,0,0,1", most=9) == [
        "2 of 6 layers", "vanilla, 6 layers", "vanilla, 7 layers"
    ]  # fmt: skip
    assert labels(*STUDENTS, most=2) == [
        "2 of 6 layers", "5 of 6 layers", "vanilla, 6 layers", "vanilla, 14 layers"
    ]  # fmt: skip
    assert labels(*STUDENTS, most=3)[3:] == [
        "vanilla, 6 layers", "vanilla, 12 layers", "vanilla, 14 layers"
    ]  # fmt: skip
    assert labels(*STUDENTS, most=1) == ["4 of 6 layers", "vanilla, 12 layers"]
    assert labels("2", most=1) == ["5 of 6 layers", "vanilla, 18 layers"]
    assert chosen(*STUDENTS) == []


def test_a_single_layer_cannot_be_dropped() -> None:
    full = preset("tiny", num_layers=1, schedule=3)
    with pytest.raises(UserError, match="leave fewer_layers out"):
        chosen("0", full=full, layers=(0.5,), distilled_baselines=["fewer_layers"])
    (vanilla,) = chosen("0", full=full, layers=(0.5,), distilled_baselines=["vanilla"])
    assert vanilla.label == "vanilla, 1 layer, distilled"


def test_baselines_of_an_unmeasured_teacher_are_priced_at_most() -> None:
    kinds = "sweep.distilled_baselines=[vanilla, fewer_layers]"
    settings = resolve_settings(
        {}, [kinds, "sweep.seeds=[1, 2]", "sweep.distilled_vanilla_steps=500"]
    )
    models = baselines_upper_bound(settings, FULL)
    assert len(models) == 3 + 3
    known = chosen(*STUDENTS, distilled_baselines=["vanilla", "fewer_layers"])
    priciest = max(flops(config) for config, _ in models)
    assert priciest >= max(flops(baseline.config) for baseline in known)
    steps = {config.method: recipe.num_steps for config, recipe in models}
    assert steps == {"vanilla": 500, "iiet": settings.distillation.training.num_steps}
    trainings = student_estimates(settings, FULL, models)
    assert len(trainings) == 2 * len(models)
    assert all(training.teacher == FULL and training.cache for training in trainings)
    assert baselines_upper_bound(resolve_settings({}, []), FULL) == []
    with pytest.raises(UserError, match="leave fewer_layers out"):
        baselines_upper_bound(settings, preset("tiny", num_layers=1, schedule=3))
