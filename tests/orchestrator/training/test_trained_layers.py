"""Frozen parts of a model that starts as its source: what changes, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from iiet import ModelConfig
from orchestrator.models.load import load_model
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob, job_parameters
from orchestrator.settings import ElasticSettings, resolve_settings
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.job import job_key, pretraining_job
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

LAYERS = {"num_layers": 4, "schedule": [0, 2, 0, 1]}
IDENTITY = {"start": "identity"}


@pytest.fixture
def make(tiny_job, tiny_model, save_tiny, tmp_path):
    """A function that makes a job of two steps from a plain model: which layers it trains, and
    whether the head is the embeddings."""

    def job(trained: str, *, tied: bool = True, **recipe: Any) -> TrainingJob:
        sizes = {**LAYERS, "tie_embeddings": tied}
        plain = {**sizes, "method": "vanilla", "schedule": None}
        source = save_tiny(tmp_path / f"source {trained} {tied}", **plain)
        model = ModelConfig.from_dict({**tiny_model, **sizes, "method_options": IDENTITY})
        options = {"num_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, **recipe}
        job_of_source: TrainingJob = tiny_job(
            f"run {trained}", trained_layers=trained, iterate_from_fraction=0.0, **options
        )
        return job_of_source.model_copy(update={"model": model, "initial_folder": str(source)})

    return job


def changed(job: TrainingJob) -> set[str]:
    """Train a job; return the names of the weights that are not those at the start."""
    outcome = run_job(job)
    after = load_model(Path(str(outcome.checkpoint))).state_dict()
    before = load_model(Path(str(job.initial_folder))).state_dict()
    fresh = {name: torch.zeros_like(weight) for name, weight in after.items()}
    for name, weight in fresh.items():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        if ".mix." in name:
            weight[-1] = 1.0
    started = fresh | before
    return {name for name, weight in after.items() if not torch.equal(weight, started[name])}


@pytest.mark.parametrize(("trained", "tied"), [("corrected", True), ("added", False)])
def test_only_the_trained_part_changes_and_has_an_optimizer_state(trained, tied, make):
    job = make(trained, tied=tied)
    names = changed(job)
    of_layers = {name.split(".")[2] for name in names if ".layers." in name}
    assert of_layers == {"1", "2", "3"}
    assert not any(
        "embed_tokens" in n or n in ("model.norm.weight", "lm_head.weight") for n in names
    )
    fields = {name.split(".")[2] for name in names if "self_attn" in name or "mlp" in name}
    assert fields == ({"1", "3"} if trained == "corrected" else set())
    folder = job.folder / "step_00000002"
    moments = load_training_state(folder)["optimizer"]["state"]
    shapes = sorted(tuple(moment["exp_avg"].shape) for moment in moments.values())
    decoder = load_model(folder)
    added = decoder.method_parameters()
    expected = [
        tuple(weight.shape)
        for name, weight in decoder.named_parameters()
        if ".layers." in name
        and name.split(".")[2] in ("1", "2", "3")
        and (name in added or (trained == "corrected" and name.split(".")[2] in ("1", "3")))
        and not (name.split(".")[2] == "2" and name.endswith(("damping", "inner")))
        and "layers.2.correction_norm" not in name
    ]
    assert shapes == sorted(expected)


def test_elastic_training_leaves_the_frozen_part_alone(make):
    elastic = ElasticSettings(schedules=("0,1,0,0", "0"), num_drawn=2)
    names = changed(make("added", elastic=elastic, num_steps=3))
    assert names
    assert not any("self_attn" in name or "mlp" in name for name in names)


def test_flops_memory_disk_and_key_follow(make):
    jobs = {trained: make(trained) for trained in ("all", "corrected", "added")}
    flops = [Estimate.of(job).flops for job in jobs.values()]
    memory = [Estimate.of(job).worker_memory for job in jobs.values()]
    disk = [Estimate.of(job).checkpoint_bytes for job in jobs.values()]
    for costs in (flops, disk, [m["AdamW"] for m in memory], [m["gradients"] for m in memory]):
        assert costs[0] > costs[1] > costs[2] > 0
    outcome = run_job(jobs["added"])
    assert outcome.training_flops == pytest.approx(flops[2])
    assert len({job_key(job) for job in jobs.values()}) == 3
    assert job_parameters(jobs["added"])["trained_layers"] == "added"
    assert "trained_layers" not in job_parameters(jobs["all"])


@pytest.mark.parametrize(
    ("assignments", "name"),
    [
        (["model.corrections=1"], "method_options"),
        (["model.method=vanilla"], "model.corrections"),
        (["model.method=vanilla", "training.trained_layers=[7]"], "trained_layers"),
        (["model.method_options={start: identity}", "model.corrections=0"], "model.corrections"),
    ],
)
def test_models_that_do_not_start_as_their_source_train_all_layers(assignments, name, tmp_path):
    settings = resolve_settings({}, ["training.trained_layers=corrected", *assignments])
    with pytest.raises(UserError, match=name):
        pretraining_job(settings, Workspace(tmp_path), None)
    with pytest.raises(UserError, match=r"distillation\.training\.trained_layers"):
        resolve_settings({}, ["distillation.training.trained_layers=added"])
