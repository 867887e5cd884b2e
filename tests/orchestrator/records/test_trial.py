"""A trial result survives JSON, and gives MLflow finite numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sample_trials import sample_trial

from orchestrator.records.trial import Trial
from orchestrator.workspace.errors import UserError


def a_trial() -> Trial:
    return sample_trial(
        key="0123",
        role="trial",
        method="iiet",
        schedule=(2, 1, 0),
        label="threshold 0.004",
        threshold_above=0.003,
        threshold_up_to=0.004,
        cost={"evaluations": 6, "relative_flops": 0.5},
        quality={"accuracy": 0.42, "accuracy_stderr": 0.01, "lastword/acc": 0.3},
        train={"steps": 150},
    )


def test_a_json_round_trip_changes_nothing() -> None:
    trial = a_trial()
    assert Trial.model_validate(json.loads(json.dumps(trial.model_dump(mode="json")))) == trial


def test_metrics_hold_every_number_and_params_every_layer() -> None:
    metrics, params = a_trial().metrics(), a_trial().params()
    assert metrics["cost/evaluations"] == 6.0
    assert metrics["quality/lastword/acc"] == 0.3
    assert set(metrics) == {
        "cost/evaluations",
        "cost/relative_flops",
        "quality/accuracy",
        "quality/accuracy_stderr",
        "quality/lastword/acc",
        "train/steps",
    }
    assert params["schedule"] == "2,1,0"
    assert [params[f"r_{layer:02d}"] for layer in (1, 2, 3)] == ["2", "1", "0"]
    assert params["threshold"] == "0.004"
    assert params["threshold_range"] == "0.003 to 0.004"


@pytest.mark.parametrize(
    ("above", "up_to", "text", "threshold"),
    [
        (0.003, 0.004, "0.003 to 0.004", "0.004"),
        (-math.inf, 0.0003, "<=0.0003", "0.0003"),
        (None, 0.0003, "<=0.0003", "0.0003"),
        (0.0266, math.inf, ">0.027", "inf"),
        (None, None, "", None),
    ],
)
def test_an_unbounded_threshold_range_survives_strict_json(
    above: float | None, up_to: float | None, text: str, threshold: str | None
) -> None:
    trial = sample_trial(
        key="k", role="trial", method="iiet", threshold_above=above, threshold_up_to=up_to
    )
    again = Trial.model_validate(
        json.loads(json.dumps(trial.model_dump(mode="json"), allow_nan=False))
    )
    assert again.threshold_text == trial.threshold_text == text
    assert again.params().get("threshold") == threshold


def test_value_is_none_if_not_measured() -> None:
    trial = sample_trial(key="k", role="baseline", method="vanilla", quality={"accuracy": math.nan})
    assert trial.value("quality/accuracy") is None
    assert trial.value("cost/evaluations") is None
    assert trial.value("nonsense") is None
    assert trial.schedule_text == ""


def test_a_stored_trial_names_the_first_wrong_field(tmp_path: Path) -> None:
    stored = {**a_trial().model_dump(mode="json"), "colour": "blue"}
    with pytest.raises(UserError, match=r"x.json is damaged \(colour: Extra inputs"):
        Trial.parse(stored, tmp_path / "x.json")
    del stored["colour"], stored["model"]["dim"]
    with pytest.raises(UserError, match=r"damaged \(model: .*missing key 'dim'.*; delete it"):
        Trial.parse(stored, tmp_path / "x.json")


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'trial', 'teacher' or 'baseline'.*'student'"):
        sample_trial(role="student")


def test_perplexity_is_exp_of_the_loss() -> None:
    trial = sample_trial(key="0", role="trial", method="iiet", quality={"validation_loss": 2.0})
    assert trial.value("quality/perplexity") == pytest.approx(math.exp(2.0))
    assert trial.metrics()["quality/perplexity"] == pytest.approx(math.exp(2.0))
    assert trial.model_dump(mode="json")["numbers"] == {"quality/validation_loss": 2.0}
    huge = sample_trial(key="0", role="trial", method="iiet", quality={"validation_loss": 1e9})
    assert huge.value("quality/perplexity") is None
