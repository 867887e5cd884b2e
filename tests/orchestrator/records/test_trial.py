"""A trial survives its file, also where the workspace moved, and gives MLflow names and numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from refusals import refused
from sample_trials import sample_trial

from iiet.model.config import DistillationConfig, ModelConfig
from orchestrator.records.evaluation import EvaluationKeys
from orchestrator.records.training import (
    TrainingJob,
    job_parameters,
    model_parameters,
    schedule_parameters,
    shared_parameters,
)
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.workspace.errors import DamagedFile
from orchestrator.workspace.layout import open_workspace

IIET = sample_trial(schedule=(2, 1)).model
VANILLA = sample_trial(method="vanilla", schedule=(0, 0)).model


def again(trial: Trial) -> Trial:
    """Return a trial from its strict JSON."""
    text = json.dumps(trial.model_dump(mode="json"), allow_nan=False)
    return Trial.model_validate(json.loads(text))


def test_a_finished_trial_has_what_was_measured_and_the_names_of_this_sweep(tmp_path):
    planned = sample_trial(label="here", threshold_up_to=0.3, folder=str(tmp_path))
    assert planned.result() is None
    measured = {
        "numbers": {"quality/accuracy": 0.5},
        "evaluation": EvaluationKeys(tasks={"a": "key"}),
        "checkpoint": str(tmp_path / "step_00000002"),
    }
    elsewhere = planned.model_copy(update={"label": "there", "threshold_up_to": 0.2, **measured})
    elsewhere.write(planned.result_path)
    assert planned.result() == planned.model_copy(update=measured)


def test_numbers_and_parameters_have_their_tracked_names():
    quality = {"accuracy": 0.42, "accuracy_stderr": 0.01, "lastword/acc": 0.3, "other": math.nan}
    trial = sample_trial(
        schedule=(2, 1, 0), threshold_above=0.003, threshold_up_to=0.004, quality=quality,
        cost={"evaluations": 6, "relative_flops": 0.5}, train={"steps": 150},
    )  # fmt: skip
    assert again(trial) == trial
    assert trial.metrics() == {
        "cost/evaluations": 6.0, "cost/relative_flops": 0.5, "quality/accuracy": 0.42,
        "quality/accuracy_stderr": 0.01, "quality/lastword/acc": 0.3, "train/steps": 150.0,
    }  # fmt: skip
    assert (trial.value("quality/other"), trial.value("nonsense")) == (None, None)
    params = trial.params()
    assert params["schedule"] == "2,1,0"
    assert [params[f"r_{layer:02d}"] for layer in (1, 2, 3)] == ["2", "1", "0"]
    assert (params["threshold"], params["threshold_range"]) == ("0.004", "0.003 to 0.004")
    lossy = sample_trial(quality={"validation_loss": 2.0})
    assert lossy.metrics()["quality/perplexity"] == lossy.value("quality/perplexity") == math.exp(2)
    assert lossy.model_dump(mode="json")["numbers"] == {"quality/validation_loss": 2.0}
    for loss in (17.5, 1e9):  # A perplexity of 4e7 says nothing.
        assert sample_trial(quality={"validation_loss": loss}).value("quality/perplexity") is None


@pytest.mark.parametrize(
    ("above", "up_to", "text", "threshold"),
    [
        (-math.inf, 0.0003, "<=0.0003", "0.0003"),
        (0.0266, math.inf, ">0.027", "inf"),
        (None, None, "", None),
    ],
)
def test_an_unbounded_threshold_range_survives_strict_json(above, up_to, text, threshold):
    trial = again(sample_trial(threshold_above=above, threshold_up_to=up_to))
    assert trial.threshold_text == text
    assert trial.params().get("threshold") == threshold


def test_a_file_that_is_no_such_record_is_named(tmp_path):
    path = tmp_path / "x.json"
    sample_trial().write(path)
    stored = json.loads(path.read_text())
    for text, field in (
        ('{"key": "x"', ""),
        ('{"key": "x"}', "role"),
        (json.dumps(stored | {"colour": "blue"}), "colour"),
        (json.dumps(stored | {"seed": "x"}), "seed"),
    ):
        path.write_text(text)
        with refused(DamagedFile, "x.json", field):
            Trial.read(path)
    with refused(ValueError, "'trial', 'teacher', 'baseline'", "'student'"):
        sample_trial(role="student")


def test_paths_of_nested_records_follow_the_workspace(tmp_path):
    root = open_workspace(tmp_path / "old").root
    trial = sample_trial(key="t", folder=f"{root}/trials/t", checkpoint="/elsewhere/step_1")
    plan = SweepTrials(
        key="k", name="n", kind="threshold", tokens_folder=f"{root}/tokens/f",
        teacher=f"{root}/runs/teacher/step_2", num_requested=1, trials=(trial,),
    )  # fmt: skip
    path = root / "sweeps" / "n" / "plan.json"
    plan.write(path)
    assert str(root) not in path.read_text()
    assert SweepTrials.read(path) == plan
    moved = root.rename(tmp_path / "new")
    moved_plan = SweepTrials.read(moved / "sweeps" / "n" / "plan.json")
    assert (moved_plan.tokens_folder, moved_plan.trials[0].folder) == (
        f"{moved}/tokens/f", f"{moved}/trials/t",
    )  # fmt: skip
    assert moved_plan.trials[0].checkpoint == "/elsewhere/step_1"
    trial.write(tmp_path / "trial.json")  # Outside of a workspace, paths stay absolute.
    assert Trial.read(tmp_path / "trial.json") == trial


# Parameters


def parameters(model: ModelConfig, /, **job: Any) -> dict[str, str]:
    values = {"run_folder": "", "tokens_folder": "", "recipe": TrainingSettings(), **job}
    return job_parameters(TrainingJob(model=model, **values))


def test_a_run_has_the_parameters_that_apply_to_it():
    iiet = parameters(IIET)
    vanilla = parameters(VANILLA)
    assert iiet.keys() - vanilla.keys() == {"schedule", "r_01", "r_02", "iterate_from_fraction"}
    assert vanilla.keys() <= iiet.keys()
    assert "iterate_from_fraction" not in parameters(replace(IIET, schedule=VANILLA.corrections))
    # One thing has one name, whoever is trained.
    folders = dict.fromkeys(("teacher_folder", "initial_folder"), "runs/t/step_1")
    student = parameters(
        IIET, objective="distill", provenance={"teacher": "0123"},
        recipe=TrainingSettings(learning_rate=5e-4), **folders,
    )  # fmt: skip
    assert (iiet["learning_rate"], student["learning_rate"]) == ("0.002", "0.0005")
    loss = {"kl_weight", "temperature", "divergence", "teacher"}
    assert student.keys() - iiet.keys() == loss
    assert student["teacher"] == "runs/t/step_1"
    # What is off, or changes no result, is no parameter.
    assert not any("elastic" in name or name in ("spike_factor", "kl_weight") for name in iiet)
    assert not {"compile", "checkpoint_every_steps", "num_sequences_per_pass"} & iiet.keys()
    off = DistillationConfig(kl_weight=0.0, hidden_weight=0.5)
    hidden = parameters(IIET, objective="distill", distillation=off, **folders)
    assert hidden["hidden_weight"] == "0.5"
    assert "divergence" not in hidden
    on = TrainingSettings(elastic=ElasticSettings(schedules=("1,1", 0)), skip_bad_steps=3)
    elastic = parameters(IIET, recipe=on)
    assert (elastic["elastic.schedules"], elastic["skip_bad_steps"]) == ("1,1 0", "3")
    by_muon = parameters(IIET, recipe=TrainingSettings(optimizer="muon"))
    of_muon = {"optimizer", "muon_rate_factor", "muon_momentum"}
    assert by_muon.keys() - iiet.keys() == of_muon
    for decay, names in (
        ("constant", set()),
        ("cosine", {"final_learning_rate_fraction"}),
        ("wsd", {"final_learning_rate_fraction", "decay_fraction"}),
    ):
        recorded = parameters(VANILLA, recipe=TrainingSettings(decay=decay))
        assert {name for name in recorded if "fraction" in name} == names


def test_a_model_has_its_method_and_the_options_that_were_chosen():
    damped = ModelConfig.from_dict({**IIET.to_dict(), "method_options": {"damping": 0.5}})
    changed = model_parameters(damped).items() - model_parameters(IIET).items()
    assert changed == {("option.damping", "0.5")}
    assert schedule_parameters(VANILLA) == {"method": "vanilla"}
    expected = {"method": "iiet", "schedule": "2,1", "r_01": "2", "r_02": "1"}
    assert schedule_parameters(IIET) == expected
    runs = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}]
    assert (shared_parameters(runs), shared_parameters([])) == ({"a": "1"}, {})
