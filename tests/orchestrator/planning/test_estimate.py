"""Estimates equal hand counts and the figures of a real run; trials get the GPUs that they need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from iiet.cost import training_flops_per_token
from iiet.hf.weights import WEIGHTS
from iiet.model.config import preset
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import TRAINING_STATE
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate, note_saving
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import DONE_NAME


def test_a_step_is_shared_by_workers_and_passes_and_so_is_a_snapshot():
    recipe = TrainingSettings(
        num_steps=30000, num_tokens_per_step=524288, num_sequences_per_pass=12
    )
    estimate = Estimate(config=preset("340m"), recipe=recipe, devices=Devices(num_workers=8))
    assert (estimate.num_tokens, estimate.sequences_per_worker) == (15_728_640_000, 32)
    assert (estimate.num_passes, estimate.sequences_per_pass) == (3, 12)
    assert sum(estimate.stages.values()) == 30000
    alone = Estimate(config=preset("tiny"), recipe=TrainingSettings(num_tokens_per_step=1024))
    shared, on_gpus, uneven = (
        replace(alone, devices=devices)
        for devices in (Devices(num_workers=2), Devices(on_gpus=True), Devices(num_workers=3))
    )
    name = "a copy for the checkpoint"
    assert alone.worker_memory[name] == alone.checkpoint_bytes == 2 * shared.worker_memory[name]
    sharded = replace(alone, devices=Devices(num_workers=4, parallel="fsdp"))
    assert sharded.worker_memory[name] == 2 * (alone.checkpoint_bytes // 4)
    # While shards are written, their rows are on the disk beside the whole weights, which are a
    # third of a checkpoint.
    rows = sharded.bytes_in_writing - alone.bytes_in_writing
    assert rows == alone.checkpoint_bytes // 3
    assert sum(alone.worker_memory.values()) == alone.worker_bytes
    assert name not in on_gpus.worker_memory
    with refused(UserError, "8 sequences", "3 workers", "num_tokens_per_step=1152"):
        assert uneven.worker_bytes


def test_shorter_sequences_take_less_memory_and_fewer_flops():
    config = preset("tiny")
    recipe = TrainingSettings(num_tokens_per_step=1024)
    usual = Estimate(config=config, recipe=recipe, teacher=config)
    lengths = (config.context_length, config.context_length // 4)
    same, short = (
        replace(usual, recipe=recipe.model_copy(update={"sequence_length": length}))
        for length in lengths
    )
    assert (same.flops, same.worker_memory) == (usual.flops, usual.worker_memory)
    assert short.sequences_per_worker == 4 * usual.sequences_per_worker
    assert short.num_tokens == usual.num_tokens
    assert short.flops < usual.flops, "attention sees fewer tokens"
    assert short.teacher_flops < usual.teacher_flops
    least = replace(usual, recipe=recipe.model_copy(update={"num_tokens_per_step": lengths[0]}))
    one_short_sequence = {"num_tokens_per_step": lengths[1], "sequence_length": lengths[1]}
    shortest = replace(usual, recipe=recipe.model_copy(update=one_short_sequence))
    assert shortest.worker_bytes < least.worker_bytes
    assert shortest.worker_memory["activations"] < 0.5 * least.worker_memory["activations"]
    too_long = replace(usual, recipe=recipe.model_copy(update={"sequence_length": 2 * lengths[0]}))
    with pytest.raises(UserError, match=r"training\.sequence_length=256"):
        assert too_long.sequences_per_worker


def test_each_stage_of_a_two_stage_training_is_counted_under_its_schedule():
    config = preset("tiny", schedule=2)
    recipe = TrainingSettings(num_steps=10, num_tokens_per_step=1024, iterate_from_fraction=0.6)
    estimate = Estimate(config=config, recipe=recipe)
    none = IterationSchedule.none(6)
    assert {str(schedule): n for schedule, n in estimate.stages.items()} == {
        "0,0,0,0,0,0": 6,
        "2,2,2,2,2,2": 4,
    }
    # Six layers of width 128, SwiGLU of width 352, 2,048 entries, 128 tokens; the backward pass
    # costs two forward ones. The mix of the layers' estimates adds less than a percent.
    field = 2 * (4 * 128 * 128 + 3 * 128 * 352) + 4 * 128 * (128 + 1) / 2
    head = 2 * 128 * 2048
    by_hand = 3 * 1024 * (6 * (6 * field + head) + 4 * (18 * field + head))
    assert by_hand < estimate.flops < 1.01 * by_hand
    # The memory is that of the costliest stage.
    full = Estimate(config=config, recipe=recipe.model_copy(update={"iterate_from_fraction": 0.0}))
    assert estimate.worker_memory == full.worker_memory
    # Only the steps that are left count.
    from_start = replace(estimate, teacher=config)
    half = replace(from_start, steps_done=5)
    assert (half.num_tokens, half.num_teacher_tokens) == (5 * 1024, 5 * 1024)
    assert from_start.flops - half.flops == pytest.approx(
        5 * 1024 * training_flops_per_token(config, none)
    )
    assert half.worker_memory == from_start.worker_memory


def test_the_bytes_of_checkpoints_equal_those_of_a_run(tmp_path, tiny_tokens, tiny_model):
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
    estimate = Estimate(config=job.model, recipe=recipe)
    folder = Path(str(outcome.checkpoint))
    written = sum((folder / name).stat().st_size for name in (WEIGHTS, TRAINING_STATE))
    assert estimate.checkpoint_bytes == pytest.approx(written, rel=0.05)
    most_bytes = estimate.new_checkpoint_bytes + estimate.bytes_in_writing
    assert most_bytes == 3 * estimate.checkpoint_bytes
    finished = Estimate.of(job)
    assert (finished.steps_done, finished.flops) == (6, 0)
    left_to_write = finished.new_checkpoint_bytes
    assert left_to_write < 0.1 * finished.checkpoint_bytes, "new ones replace the two"


def test_all_kept_checkpoints_are_counted():
    def checkpoints_on_disk(**recipe: object) -> float:
        values = {"num_steps": 1000, "num_checkpoints_kept": 2, **recipe}
        settings = TrainingSettings.model_validate(values)
        estimate = Estimate(config=preset("tiny"), recipe=settings)
        most_bytes = estimate.new_checkpoint_bytes + estimate.bytes_in_writing
        return most_bytes / estimate.checkpoint_bytes

    assert checkpoints_on_disk() == 3
    assert checkpoints_on_disk(decay="wsd") == 4, "the one before the decay stays"
    assert checkpoints_on_disk(checkpoint_every_steps=1000) == 1
    assert checkpoints_on_disk(checkpoint_every_steps=1000, checkpoint_every_minutes=1) == 3


def test_a_request_to_stop_says_how_much_is_saved(tiny_job):
    notes: list[str] = []
    jobs = [tiny_job("a"), tiny_job("b")]
    note_saving(jobs, notes.append)
    assert notes[-1].startswith("saving 238 KiB;"), "12 bytes for each of 10,146 parameters"
    for job in jobs:
        job.folder.mkdir(exist_ok=True)
        (job.folder / DONE_NAME).touch()
    note_saving(jobs, notes.append)
    assert len(notes) == 1, "nothing is saved"


def test_a_run_measures_its_checkpoints_and_their_uploads(tiny_job, tmp_path):
    job = tiny_job(num_steps=4, checkpoint_every_steps=2)
    job = job.model_copy(update={"storage": str(tmp_path / "store")})
    run_job(job)
    for name in ("checkpoint", "uploaded"):
        saved = [r["seconds"] for r in read_journal(job.folder)[0] if r.get("name") == name]
        assert len(saved) == 2
        assert min(saved) > 0.0
