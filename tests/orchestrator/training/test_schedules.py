"""The iteration schedule of each step: all corrections at once, or over a ramp."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from iiet.config import ModelConfig
from iiet.cost import training_flops_per_token
from iiet.schedule import IterationSchedule
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import job_key
from orchestrator.training.schedules import schedule_by_step
from orchestrator.training.trainer import run_job
from orchestrator.workspace.journal import read_journal


def stages(corrections: tuple[int, ...], **recipe: Any) -> list[tuple[tuple[int, ...], int]]:
    settings = TrainingSettings(num_steps=100, **recipe)
    schedule_at = schedule_by_step(IterationSchedule(corrections), settings)
    schedules = [schedule_at(step).corrections for step in range(100)]
    return [(schedule, len(list(steps))) for schedule, steps in groupby(schedules)]


def test_without_a_ramp_all_corrections_come_at_once() -> None:
    assert stages((3, 1), iterate_from_fraction=0.75) == [((0, 0), 75), ((3, 1), 25)]
    assert stages((3, 1), iterate_from_fraction=0.0) == [((3, 1), 100)]


def test_a_ramp_adds_one_correction_after_the_other() -> None:
    found = stages((3, 1, 2), iterate_from_fraction=0.25, iterate_ramp_fraction=0.6)
    assert found == [((0, 0, 0), 25), ((1, 1, 1), 20), ((2, 1, 2), 20), ((3, 1, 2), 35)]


def test_a_ramp_to_the_end_trains_the_full_schedule_too() -> None:
    found = stages((2, 2), iterate_from_fraction=0.5, iterate_ramp_fraction=0.5)
    assert found == [((0, 0), 50), ((1, 1), 25), ((2, 2), 25)]


def test_a_model_without_corrections_has_one_stage() -> None:
    assert stages((0, 0), iterate_ramp_fraction=0.2) == [((0, 0), 100)]


def test_flops_follow_the_schedule_of_each_step_and_the_key_depends_on_the_ramp(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    recipe = {
        "num_steps": 4,
        "num_tokens_per_step": 32,
        "num_validation_tokens": 32,
        "iterate_from_fraction": 0.25,
    }
    job = TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model={**tiny_model, "schedule": [2, 1]},
        recipe=TrainingSettings(**recipe, iterate_ramp_fraction=0.5),
    )
    outcome = run_job(job)
    config = ModelConfig.from_dict(tiny_model)
    costs = [
        training_flops_per_token(config, IterationSchedule(schedule))
        for schedule in ((0, 0), (1, 1), (2, 1), (2, 1))
    ]
    assert outcome.training_flops == pytest.approx(32 * sum(costs))
    logged = [r["values"]["train/flops"] for r in read_journal(job.folder)[0]
              if "train/flops" in r.get("values", {})]  # fmt: skip
    assert logged == pytest.approx([32 * sum(costs[:n]) for n in (1, 2, 3, 4)])
    plain = TrainingJob(**{**vars(job), "recipe": TrainingSettings(**recipe)})
    assert job_key(plain) != job_key(job)
