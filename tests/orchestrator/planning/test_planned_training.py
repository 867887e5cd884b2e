"""Estimates equal hand counts and the figures of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iiet.config import preset
from iiet.cost import training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.weights import WEIGHTS
from orchestrator.planning.planned_training import PlannedTraining, planned_training
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import TRAINING_STATE
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import UserError


def test_batches_passes_and_tokens() -> None:
    recipe = TrainingSettings(
        num_steps=30000, num_tokens_per_step=524288, num_sequences_per_pass=12
    )
    estimate = PlannedTraining(config=preset("340m"), recipe=recipe, num_workers=8)
    assert estimate.num_tokens == 15_728_640_000
    assert estimate.sequences_per_worker == 32
    assert (estimate.num_passes, estimate.sequences_per_pass) == (3, 12)
    assert sum(estimate.stages.values()) == 30000


def test_each_stage_of_a_two_stage_training_is_counted_under_its_schedule() -> None:
    config = preset("tiny", schedule=2)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=1024, iterate_from_fraction=0.6)
    estimate = PlannedTraining(config=config, recipe=recipe)
    none = IterationSchedule.none(6)
    assert {str(schedule): n for schedule, n in estimate.stages.items()} == {
        "0,0,0,0,0,0": 6,
        "2,2,2,2,2,2": 4,
    }
    per_token = 6 * training_flops_per_token(config, none) + 4 * training_flops_per_token(config)
    assert estimate.flops == pytest.approx(1024 * per_token)
    # The memory is that of the costliest stage.
    full = PlannedTraining(
        config=config, recipe=recipe.model_copy(update={"iterate_from_fraction": 0.0})
    )
    assert estimate.memory == full.memory


def test_a_batch_that_cannot_be_divided_is_refused_with_one_that_can() -> None:
    recipe = TrainingSettings(num_tokens_per_step=128 * 9)
    training = PlannedTraining(config=preset("tiny"), recipe=recipe, num_workers=8)
    with pytest.raises(UserError, match=r"9 sequences.*8 workers.*num_tokens_per_step=2048"):
        assert training.worker_bytes


def test_flops_and_checkpoint_bytes_equal_those_of_a_run(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    recipe = TrainingSettings(
        num_steps=6,
        num_tokens_per_step=64,
        num_validation_tokens=64,
        checkpoint_every_steps=1,
        num_checkpoints_kept=2,
        iterate_from_fraction=0.5,
    )
    job = TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder=str(tiny_tokens),
        model={**tiny_model, "dim": 64, "ffn_dim": 128},
        recipe=recipe,
    )
    outcome = run_job(job)
    estimate = PlannedTraining(config=job.model, recipe=recipe)
    assert estimate.flops == pytest.approx(outcome.training_flops)
    assert estimate.num_tokens == outcome.num_tokens
    folder = Path(str(outcome.checkpoint))
    written = sum((folder / name).stat().st_size for name in (WEIGHTS, TRAINING_STATE))
    assert estimate.checkpoint_bytes == pytest.approx(written, rel=0.05)
    assert estimate.new_bytes() + estimate.bytes_in_writing() == 3 * estimate.checkpoint_bytes
    finished = planned_training(job)
    assert (finished.steps_done, finished.flops) == (6, 0)
    assert finished.new_bytes() < 0.1 * finished.checkpoint_bytes, "new ones replace the two"


def test_workers_share_one_checkpoint_snapshot() -> None:
    config, recipe = preset("tiny"), TrainingSettings(num_tokens_per_step=1024)
    alone = PlannedTraining(config=config, recipe=recipe)
    shared = PlannedTraining(config=config, recipe=recipe, num_workers=2)
    name = "a copy for the checkpoint"
    assert alone.worker_memory[name] == alone.checkpoint_bytes == 2 * shared.worker_memory[name]
    assert sum(alone.worker_memory.values()) == alone.worker_bytes
    on_gpus = PlannedTraining(config=config, recipe=recipe, on_gpus=True)
    assert name not in on_gpus.worker_memory


def test_all_kept_checkpoints_are_counted() -> None:
    def kept(**recipe: object) -> float:
        values = {"num_steps": 1000, "num_checkpoints_kept": 2, **recipe}
        own = TrainingSettings.model_validate(values)
        estimate = PlannedTraining(config=preset("tiny"), recipe=own)
        return (estimate.new_bytes() + estimate.bytes_in_writing()) / estimate.checkpoint_bytes

    assert kept() == 3
    assert kept(keep_best=True) == 4
    assert kept(decay="wsd") == 4, "the one before the decay stays"
    assert kept(decay="wsd") == 4, "the one before the decay stays"
    assert kept(checkpoint_every_steps=1000) == 1
    assert kept(checkpoint_every_steps=1000, checkpoint_every_minutes=1) == 3


def test_only_the_steps_that_are_left_count() -> None:
    config = preset("tiny", schedule=2)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=1024, iterate_from_fraction=0.6)
    whole = PlannedTraining(config=config, recipe=recipe, teacher=config)
    half = PlannedTraining(config=config, recipe=recipe, teacher=config, steps_done=5)
    assert (half.num_tokens, half.num_teacher_tokens) == (5 * 1024, 5 * 1024)
    none = training_flops_per_token(config, IterationSchedule.none(6))
    assert whole.flops - half.flops == pytest.approx(5 * 1024 * none)
    assert half.memory == whole.memory
