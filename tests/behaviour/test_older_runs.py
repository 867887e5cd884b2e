"""Runs from before version 0.2: this version refuses to resume them and can import their models.

A checkpoint without its run's record, as in a remote storage, is resumed only if its optimizer has
the same parameters as now.

`tests/fixtures/older` holds two runs of two steps as version 0.1 left them, with a checkpoint after
each step; its tokens were those of `tiny_tokens`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.pipelines.importing import import_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import check_checkpoint, weights_key
from orchestrator.training.model_loading import load_model
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.names import DONE_NAME, JOB_NAME

RUNS = Path(__file__).parents[1] / "fixtures" / "older"
RECIPE = {
    "num_steps": 2,
    "num_tokens_per_step": 64,
    "num_validation_tokens": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "iterate_from_fraction": 0.0,
}

OlderJob = Callable[[str], TrainingJob]


@pytest.fixture
def older_job(tmp_path: Path, tiny_tokens: Path) -> OlderJob:
    """Makes the job of a finished older run, in a copy of its folder."""

    def make(method: str) -> TrainingJob:
        folder = tmp_path / f"run_{method}"
        shutil.copytree(RUNS / folder.name, folder)
        model = ModelConfig(
            method=method,
            vocab_size=300,
            dim=4,
            num_layers=2,
            num_heads=1,
            num_kv_heads=1,
            ffn_dim=8,
            context_length=16,
            schedule=IterationSchedule((2, 1)) if method == "iiet" else None,
        )
        return TrainingJob(
            run_folder=str(folder),
            tokens_folder=str(tiny_tokens),
            model=model.to_dict(),
            recipe=TrainingSettings(**RECIPE),
        )

    return make


def interrupted(job: TrainingJob) -> TrainingJob:
    """Return the job in its state after the first step."""
    shutil.rmtree(job.folder / "step_00000002")
    (job.folder / DONE_NAME).unlink()
    return job


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "journal.jsonl")
    }


@pytest.mark.parametrize("begun", [interrupted, lambda job: job])
@pytest.mark.parametrize("method", ["iiet", "vanilla"])
def test_an_older_run_is_refused_with_advice_and_left_unchanged(
    older_job: OlderJob, method: str, begun: Callable[[TrainingJob], TrainingJob]
) -> None:
    job = begun(older_job(method))
    before = files_of(job.folder)
    for _ in range(2):
        with pytest.raises(UserError, match=f"iiet-orch import {job.folder}`"):
            run_job(job)
    assert files_of(job.folder) == before


@pytest.mark.parametrize("method", ["iiet", "vanilla"])
def test_an_older_model_keeps_its_loss(older_job: OlderJob, method: str) -> None:
    """Resuming for zero steps measures the loss of the same weights with the current code."""
    job = older_job(method)
    known = read_json(job.folder / DONE_NAME)["validation_loss"]
    fresh = TrainingJob(
        run_folder=str(job.folder.with_name("fresh")),
        tokens_folder=job.tokens_folder,
        model=job.model,
        recipe=TrainingSettings(**{**RECIPE, "num_steps": 1, "learning_rate": 1e-30}),
        initial_folder=str(job.folder / "step_00000002"),
    )
    assert run_job(fresh).validation_loss == pytest.approx(known, abs=1e-5)


def test_moments_that_belong_to_other_parameters_are_refused(older_job: OlderJob) -> None:
    job = interrupted(older_job("iiet"))
    (job.folder / JOB_NAME).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"written before version 0\.2.*iiet-orch import"):
            run_job(job)
    check_checkpoint(job.folder / "step_00000001")


def test_moments_of_the_same_parameters_are_resumed(older_job: OlderJob) -> None:
    finished = load_model(RUNS / "run_vanilla" / "step_00000002").state_dict()
    job = interrupted(older_job("vanilla"))
    (job.folder / JOB_NAME).unlink()
    outcome = run_job(job)
    assert (outcome.finished, outcome.step) == (True, 2)
    resumed = load_model(job.folder / "step_00000002").state_dict()
    for name, tensor in finished.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_an_older_model_can_be_the_teacher_and_start_of_a_student(older_job: OlderJob) -> None:
    older = older_job("iiet")
    teacher = older.folder / "step_00000002"
    job = TrainingJob(
        run_folder=str(older.folder.with_name("student")),
        tokens_folder=older.tokens_folder,
        model=replace(older.model, schedule=IterationSchedule((1, 0))),
        recipe=older.recipe,
        objective="distill",
        teacher_folder=str(teacher),
        initial_folder=str(teacher),
    )
    outcome = run_job(job)
    assert outcome.finished
    student = load_model(Path(str(outcome.checkpoint))).state_dict()
    assert student.keys() == load_model(teacher).state_dict().keys()
    names = load_file(Path(str(outcome.checkpoint)) / "model.safetensors").keys()
    assert not any(name.startswith(("method.", "fields.")) for name in names)


def test_an_older_exported_model_is_imported(older_job: OlderJob, tmp_path: Path) -> None:
    """As version 0.1 wrote it: the same names with the prefix `decoder.`."""
    from iiet.huggingface import IIETConfig

    checkpoint = older_job("iiet").folder / "step_00000002"
    exported = tmp_path / "exported"
    decoder = load_model(checkpoint)
    IIETConfig.from_model_config(decoder.config).save_pretrained(exported)
    weights = load_file(checkpoint / "model.safetensors")
    save_file({f"decoder.{n}": w for n, w in weights.items()}, exported / "model.safetensors")
    shutil.copy(checkpoint / "tokenizer.json", exported)
    imported = import_model(exported, workspace=tmp_path / "workspace")
    assert weights_key(imported) != weights_key(checkpoint)
    ids = torch.arange(12).view(1, 12)
    assert torch.equal(load_model(imported)(ids), decoder(ids))
