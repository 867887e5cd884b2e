"""A model is one for MLflow, whichever run trained or measured it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_trials import sample_trial

from iiet.config import preset
from orchestrator.data.mixture import describe_data
from orchestrator.models.config import model_family
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import TrialSuite
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import evaluated_model, job_model, trial_model


def test_a_trained_and_a_measured_model_are_one(
    tiny_job: Callable[..., TrainingJob], tiny_tokens: Path
) -> None:
    job = tiny_job(num_steps=1, seed=5)
    assert job_model(job) is None
    checkpoint = str(run_job(job).checkpoint)
    trained = job_model(job)
    assert trained is not None
    name, digest, _ = describe_data(tiny_tokens)
    assert trained.datasets["validation/loss"] == (name, digest)
    assert (trained.name, trained.params["seed"]) == ("iiet-2x16 2,1", "5")
    suite = TrialSuite(tokens_folder=str(tiny_tokens), tasks=("copy", "sort"))
    cost, quality = {"evaluations": 5}, {"validation_loss": 2.0, "copy/acc": 0.5}
    teacher, pruned = (
        sample_trial(
            schedule=schedule, cost=cost, quality=quality, checkpoint=checkpoint, suite=suite
        )
        for schedule in ((2, 1), (1, 0))
    )
    measured, other = trial_model(teacher), trial_model(pruned)
    assert measured is not None
    assert other is not None
    assert measured.key == trained.key != other.key
    evaluated = evaluated_model(Path(checkpoint), job.model, {"quality/accuracy": ("copy", "1")})
    assert evaluated is not None
    assert evaluated.key == trained.key
    assert evaluated.datasets == {"quality/accuracy": ("copy", "1")}
    assert measured.datasets == {
        "cost/evaluations": None,
        "quality/validation_loss": (name, digest),
        "quality/perplexity": (name, digest),
        "quality/copy/acc": ("copy, sort", suite.key),
    }
    shutil.rmtree(checkpoint)
    assert trial_model(teacher) is None
    assert trial_model(sample_trial(checkpoint=None)) is None


@pytest.mark.parametrize(
    ("name", "changed", "family"),
    [
        ("tiny", {}, "iiet-tiny"),
        ("tiny", {"vocab_size": 500, "context_length": 64}, "iiet-tiny"),
        ("1.3b", {"method": "vanilla"}, "vanilla-1.3b"),
        ("tiny", {"method": "vanilla", "num_layers": 8}, "vanilla-8x128"),
        ("tiny", {"ffn_dim": 256}, "iiet-6x128"),
    ],
)
def test_a_model_is_named_by_method_and_size(
    name: str, changed: dict[str, object], family: str
) -> None:
    assert model_family(preset(name, **changed)) == family
