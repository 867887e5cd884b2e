"""Estimates equal hand counts and the figures of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iiet.config import preset
from iiet.cost import training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.weights import WEIGHTS
from orchestrator.planning.training_estimate import estimate_training
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import TRAINING_STATE
from orchestrator.training.run import run_job
from orchestrator.workspace.errors import UserError


def test_batches_passes_and_tokens() -> None:
    recipe = TrainingSettings(
        num_steps=30000, num_tokens_per_step=524288, num_sequences_per_pass=12
    )
    estimate = estimate_training(preset("340m"), recipe, num_workers=8)
    assert estimate.num_tokens == 15_728_640_000
    assert estimate.sequences_per_worker == 32
    assert (estimate.num_passes, estimate.sequences_per_pass) == (3, 12)
    assert sum(stage.num_steps for stage in estimate.stages) == 30000


def test_each_stage_of_a_two_stage_training_is_counted_under_its_schedule() -> None:
    config = preset("tiny", schedule=2)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=1024, iterate_from_fraction=0.6)
    estimate = estimate_training(config, recipe)
    none = IterationSchedule.none(6)
    assert [(str(s.schedule), s.num_steps) for s in estimate.stages] == [
        ("0,0,0,0,0,0", 6),
        ("2,2,2,2,2,2", 4),
    ]
    per_token = 6 * training_flops_per_token(config, none) + 4 * training_flops_per_token(config)
    assert estimate.training_flops == pytest.approx(1024 * per_token)
    # The memory is that of the costliest stage.
    full = estimate_training(config, recipe.model_copy(update={"iterate_from_fraction": 0.0}))
    assert estimate.memory == full.memory


def test_hours_follow_from_the_rate_of_one_worker() -> None:
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=1024)
    alone = estimate_training(preset("tiny"), recipe)
    shared = estimate_training(preset("tiny"), recipe, num_workers=4)
    assert alone.hours(1e9) == pytest.approx(alone.training_flops / 1e9 / 3600)
    assert shared.hours(1e9) == pytest.approx(alone.hours(1e9) / 4)


def test_a_batch_that_cannot_be_divided_is_refused_with_one_that_can() -> None:
    recipe = TrainingSettings(num_tokens_per_step=128 * 9)
    with pytest.raises(UserError, match=r"9 sequences.*8 workers.*num_tokens_per_step=2048"):
        estimate_training(preset("tiny"), recipe, num_workers=8)


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
    estimate = estimate_training(job.model, recipe)
    assert estimate.training_flops == pytest.approx(outcome.training_flops)
    assert estimate.num_tokens == outcome.num_tokens
    folder = Path(str(outcome.checkpoint))
    written = sum((folder / name).stat().st_size for name in (WEIGHTS, TRAINING_STATE))
    assert estimate.checkpoint_bytes == pytest.approx(written, rel=0.05)
    assert estimate.disk_bytes == 3 * estimate.checkpoint_bytes


def test_workers_share_one_checkpoint_snapshot() -> None:
    config, recipe = preset("tiny"), TrainingSettings(num_tokens_per_step=1024)
    alone = estimate_training(config, recipe)
    shared = estimate_training(config, recipe, num_workers=2)
    assert alone.snapshot_bytes == alone.checkpoint_bytes == 2 * shared.snapshot_bytes
    assert estimate_training(config, recipe, on_gpus=True).snapshot_bytes == 0


def test_all_kept_checkpoints_are_counted() -> None:
    def kept(**recipe: object) -> float:
        values = {"num_steps": 1000, "num_checkpoints_kept": 2, **recipe}
        estimate = estimate_training(preset("tiny"), TrainingSettings.model_validate(values))
        return estimate.disk_bytes / estimate.checkpoint_bytes

    assert kept() == 3
    assert kept(keep_best=True) == 4
    assert kept(decay="wsd") == 4, "the one before the decay stays"
    assert kept(checkpoint_every_steps=1000) == 1
    assert kept(checkpoint_every_steps=1000, checkpoint_every_minutes=1) == 3
