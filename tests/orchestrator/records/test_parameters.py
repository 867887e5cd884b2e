"""A run has the parameters that apply to it, under the names that other runs have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sample_trials import sample_trial

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from orchestrator.records.training import (
    TrainingJob,
    job_parameters,
    model_parameters,
    schedule_parameters,
    shared_parameters,
)
from orchestrator.settings import ElasticSettings, TrainingSettings

IIET = sample_trial(schedule=(2, 1)).model
VANILLA = sample_trial(method="vanilla", schedule=(0, 0)).model


def parameters(
    model: ModelConfig, /, *, recipe: TrainingSettings | None = None, **job: object
) -> dict[str, str]:
    made: dict[str, Any] = {
        "run_folder": "",
        "tokens_folder": "",
        "recipe": recipe or TrainingSettings(),
        **job,
    }
    return job_parameters(TrainingJob(model=model, **made))


def test_a_method_without_corrections_has_no_schedule_and_no_stages() -> None:
    iiet, vanilla = parameters(IIET), parameters(VANILLA)
    assert set(iiet) - set(vanilla) == {"schedule", "r_01", "r_02", "iterate_from_fraction"}
    assert set(vanilla) <= set(iiet)
    assert "iterate_from_fraction" not in parameters(replace(IIET, schedule=VANILLA.corrections))


def test_one_thing_has_one_name_whoever_is_trained() -> None:
    student = parameters(
        IIET,
        objective="distill",
        teacher_folder="runs/t/step_1",
        initial_folder="runs/t/step_1",
        provenance={"teacher": "0123"},
        recipe=TrainingSettings(learning_rate=5e-4),
    )
    teacher = parameters(IIET)
    assert (teacher["learning_rate"], student["learning_rate"]) == ("0.002", "0.0005")
    loss = {"kl_weight", "temperature", "divergence", "teacher"}
    assert set(student) - set(teacher) == loss
    assert student["teacher"] == "runs/t/step_1"


def test_what_is_off_is_no_parameter() -> None:
    plain = parameters(IIET)
    assert not any("elastic" in name or name in ("spike_factor", "kl_weight") for name in plain)
    assert not {"compile", "checkpoint_every_steps", "num_sequences_per_pass"} & set(plain)
    off = DistillationConfig(kl_weight=0.0, hidden_weight=0.5)
    hidden = parameters(IIET, objective="distill", teacher_folder="t", distillation=off)
    assert hidden["hidden_weight"] == "0.5"
    assert "divergence" not in hidden
    on = TrainingSettings(elastic=ElasticSettings(schedules=("1,1", 0)), skip_bad_steps=3)
    elastic = parameters(IIET, recipe=on)
    assert elastic["elastic.schedules"] == "1,1 0"
    assert elastic["skip_bad_steps"] == "3"


@pytest.mark.parametrize(
    ("decay", "names"),
    [
        ("constant", set()),
        ("cosine", {"final_learning_rate_fraction"}),
        ("wsd", {"final_learning_rate_fraction", "decay_fraction"}),
    ],
)
def test_a_decay_has_its_own_options(decay: str, names: set[str]) -> None:
    found = parameters(VANILLA, recipe=TrainingSettings(decay=decay))
    assert {n for n in found if "fraction" in n} == names


def test_options_of_a_method_are_those_that_were_chosen() -> None:
    given = {**IIET.to_dict(), "method_options": {"damping": 0.5}}
    damped = ModelConfig.from_dict(given)
    changed = model_parameters(damped).items() - model_parameters(IIET).items()
    assert changed == {("option.damping", "0.5")}


def test_a_measured_model_has_method_and_corrections() -> None:
    assert schedule_parameters(VANILLA) == {"method": "vanilla"}
    assert schedule_parameters(IIET) == {
        "method": "iiet", "schedule": "2,1", "r_01": "2", "r_02": "1",
    }  # fmt: skip


def test_what_all_runs_share_is_what_each_has_with_one_value() -> None:
    runs = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    assert shared_parameters(runs) == {"a": "1"}
    assert shared_parameters([]) == {}
