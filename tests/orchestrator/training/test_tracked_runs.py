"""MLflow has one model for the same weights and schedule, trained and measured by any run."""

from __future__ import annotations

import shutil

from sample_trials import sample_trial

from orchestrator.data.mixture import describe_data
from orchestrator.records.evaluation import Suite
from orchestrator.training.tracked_runs import job_model, tracked_model, trial_model
from orchestrator.training.trainer import run_job


def test_a_trained_and_a_measured_model_are_one(tiny_job, tiny_tokens):
    job = tiny_job(num_steps=1, seed=5)
    assert job_model(job) is None
    checkpoint = str(run_job(job).checkpoint)
    trained = job_model(job)
    assert trained is not None
    name, digest, _ = describe_data(tiny_tokens)
    assert trained.datasets["validation/loss"] == (name, digest)
    assert (trained.name, trained.params["seed"]) == ("iiet-2x16 2,1", "5")
    suite = Suite(tokens_folder=str(tiny_tokens), tasks=("copy", "sort"))
    cost = {"evaluations": 5}
    quality = {"validation_loss": 2.0, "copy/acc": 0.5}
    teacher, pruned = (
        sample_trial(
            schedule=schedule, cost=cost, quality=quality, checkpoint=checkpoint, suite=suite
        )
        for schedule in ((2, 1), (1, 0))
    )
    measured = trial_model(teacher)
    measured_pruned = trial_model(pruned)
    assert measured is not None
    assert measured_pruned is not None
    assert measured.key == trained.key != measured_pruned.key
    evaluated = tracked_model(checkpoint, job.model, {"quality/accuracy": ("copy", "1")})
    assert evaluated is not None
    assert evaluated.key == trained.key
    assert evaluated.datasets == {"quality/accuracy": ("copy", "1")}
    assert measured.datasets == {
        "cost/evaluations": None,
        "quality/validation_loss": (name, digest),
        "quality/perplexity": (name, digest),
        "quality/copy/acc": ("copy, sort", suite.key),
    }
    names = []
    for role, label in (("trial", "0,0"), ("baseline", "r = 0"), ("teacher", "teacher")):
        alike = sample_trial(schedule=(0, 0), checkpoint=checkpoint, role=role, label=label)
        model = trial_model(alike)
        assert model is not None
        names.append(model.name)
    family, _, _ = measured_pruned.name.partition(" ")
    expected = (f"{family} 0,0", f"{family} 0,0, r = 0", f"{family} 0,0, teacher")
    assert tuple(names) == expected
    vanilla = {"method": "vanilla", "schedule": (0, 0), "checkpoint": checkpoint}
    model = trial_model(sample_trial(**vanilla, role="baseline", label="vanilla"))
    assert model is not None
    assert model.name == f"vanilla{family.removeprefix('iiet')}"
    shutil.rmtree(checkpoint)
    assert trial_model(teacher) is None
    assert trial_model(sample_trial(checkpoint=None)) is None
