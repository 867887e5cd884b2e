"""Runs end the same whatever interrupts them, and say clearly why they cannot go on."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from same_run import (
    crash,
    curve,
    damage,
    events,
    kill,
    recipe,
    same_run,
    state_of,
    steps_of,
    stop,
    workers,
)

from iiet.batch import Batch
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.training import trainer as trainer_module
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.job import finished_outcome, job_key
from orchestrator.training.trainer import Diverged, Trainer, run_job
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import DONE_NAME

RECIPE: dict[str, Any] = {
    "num_steps": 12,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every_steps": 5,
    "num_validation_tokens": 128,
    "checkpoint_every_steps": 4,
    "iterate_from_fraction": 0.5,
}

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tiny_job: MakeJob) -> MakeJob:
    def make(name: str = "run", *, changes: dict[str, Any] | None = None, **more: Any):
        job = tiny_job(name, **{**RECIPE, **(changes or {})})
        return TrainingJob(**{**dict(job), **more})

    return make


def test_the_loss_falls_and_is_reported_and_a_finished_job_returns_at_once(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(changes={"num_steps": 60, "iterate_from_fraction": 0.0})
    reported: list[int] = []
    outcome = run_job(job, report=lambda step, numbers: reported.append(step))
    assert (outcome.finished, outcome.step, outcome.num_tokens) == (True, 60, 60 * 64)
    losses = curve(job)
    assert list(losses) == list(range(1, 61))
    assert set(reported) == set(losses)
    assert sum(list(losses.values())[-5:]) < sum(list(losses.values())[:5]) - 1.0
    assert curve(job, "validation/loss")[60] == outcome.validation_loss
    names = [r["name"] for r in read_journal(job.folder)[0] if r["kind"] == "event"]
    assert (names[0], names[-1]) == ("started", "finished")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0

    (job.folder / DONE_NAME).unlink()  # As a kill before its last write leaves it.
    assert run_job(job) == outcome.model_copy(update={"train_seconds": outcome.train_seconds})
    monkeypatch.setattr(trainer_module, "Trainer", None)
    assert run_job(job) == finished_outcome(job) == outcome


@pytest.mark.parametrize("step", [0, 1, 4, 6, 11])
def test_a_stopped_run_resumes_bitwise(make_job: MakeJob, step: int) -> None:
    same_run(make_job(), stop(step))


@pytest.mark.slow
def test_interruptions_and_damage_change_nothing(make_job: MakeJob) -> None:
    job = same_run(make_job(), stop(3), crash(7), stop(2))
    assert [event["step"] for event in events(job, "resumed")] == [3, 4, 6]
    job = same_run(make_job(), stop(9), damage("model.safetensors"))
    assert "step_00000008 is used instead" in events(job, "damaged")[0]["text"]
    job = same_run(make_job(), stop(9), damage("training_state.pt"), crash(11))
    assert len(events(job, "damaged")) == 2
    # The end of a finished training is trained again, with the same bytes.
    same_run(make_job(), lambda job: run_job(job) and None, damage("model.safetensors", b""))
    # What memory a step takes is not part of the result's key.
    same_run(make_job(), recipe(activation_checkpointing=True))
    same_run(make_job(), recipe(num_sequences_per_pass=3), rel=1e-4)


PLACES = {
    "in a step": ("training.trainer", "learning_rate_at", "(6,"),
    "in the first file of a checkpoint": ("training.checkpoint", "write_folder", "step_00000008"),
    "in a write": ("workspace.files", "flush_to_disk", "step_00000008"),
    "before it has its name": ("workspace.files", "replace_folder", "step_00000008"),
    "before older ones are deleted": ("training.checkpoint", "prune_checkpoints", "run"),
    "in a deletion": ("training.checkpoint", "delete_folder", "step_00000004"),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_equals_a_whole_one(make_job: MakeJob, place: str) -> None:
    job = same_run(make_job(changes={"num_checkpoints_kept": 1}), kill(*PLACES[place]))
    assert steps_of(job) == [12]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_train_what_one_trains(make_job: MakeJob, parallel: str) -> None:
    same_run(make_job(), stop(3), workers(2, parallel), rel=1e-4)


def test_options_of_a_method_are_trained_saved_and_part_of_the_key(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    options = {"damping": 0.0, "learn_damping": True, "differentiated_corrections": 1}
    model = {**tiny_model, "method_options": options}
    changes = {"iterate_from_fraction": 0.0, "activation_checkpointing": True}
    job = make_job("damped", model=model, changes=changes)
    fixed = make_job(model={**tiny_model, "method_options": {"damping": 0.5}})
    usual = make_job(model={**tiny_model, "method_options": {"damping": 1.0}})
    assert len({job_key(each) for each in (make_job(), fixed, job)}) == 3
    assert job_key(usual) == job_key(make_job())
    decoder = load_model(Path(str(run_job(same_run(job, stop(5))).checkpoint)))
    assert decoder.config.to_dict()["method_options"] == options
    dampings = [p for name, p in decoder.named_parameters() if name.endswith("damping")]
    assert len(dampings) == 2
    assert all(damping.item() != 0 for damping in dampings)


def test_two_seeds_are_two_initial_models(make_job: MakeJob) -> None:
    still = {"num_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    outcomes = [run_job(make_job(str(n), changes={**still, "seed": n})) for n in (0, 1)]
    first, second = (load_model(Path(outcome.checkpoint or "")) for outcome in outcomes)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_bf16_losses_are_close_to_fp32(make_job: MakeJob) -> None:
    run_job(make_job("one"))
    run_job(make_job("bf16", changes={"precision": "bf16"}))
    assert curve(make_job("bf16")) == pytest.approx(curve(make_job("one")), abs=0.1)


# Bad steps


def spoil(monkeypatch: pytest.MonkeyPatch, *bad_steps: int, name: str = "loss") -> None:
    """Make the loss, or only the gradient, NaN at these steps, counted from 0."""
    objective = trainer_module.make_objective

    def spoiled(*arguments: Any) -> Any:
        inner = objective(*arguments)

        def compute(model: Any, batch: Any, step: int) -> Any:
            loss, parts = inner(model, batch, step)
            if step in bad_steps:
                if name == "loss":
                    loss = loss * math.nan
                else:
                    factor = 1e3 if name == "spike" else math.inf
                    loss.register_hook(lambda gradient: gradient * factor)
            return loss, parts

        return compute

    monkeypatch.setattr(trainer_module, "make_objective", spoiled)


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_divergence_names_step_checkpoint_and_settings(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil(monkeypatch, 6, name=name)
    section = "distillation.training"
    job, student = make_job(), make_job("student", section=section)
    with pytest.raises(Diverged) as caught:
        run_job(job)
    assert "step 7: loss" in str(caught.value)
    assert f"last good checkpoint is {job.folder / 'step_00000004'}; lower" in str(caught.value)
    assert "training.learning_rate=0.01 (or its own in sweep.learning_rates)" in str(caught.value)
    assert steps_of(job) == [4]
    assert events(job, "diverged")
    with pytest.raises(Diverged) as caught:
        run_job(student)
    for setting in ("learning_rate=0.01, ", "warmup_steps", "skip_bad_steps"):
        assert f" {section}.{setting}" in str(caught.value)
        assert f" training.{setting}" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_and_is_recorded(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil(monkeypatch, 3, 4, 8, name=name)
    saving = {"checkpoint_every_steps": 1, "num_checkpoints_kept": 9}
    job = make_job(changes={"skip_bad_steps": 2, "num_steps": 9, **saving})
    outcome = run_job(job)
    assert outcome.num_tokens == 9 * 64
    states = [
        state_of(outcome.model_copy(update={"checkpoint": str(job.folder / f"step_{n:08d}")}))
        for n in (3, 4, 5, 6)
    ]
    assert states[0] == states[1] == states[2] != states[3]
    assert [event["step"] for event in events(job, "skipped")] == [4, 5, 9]
    assert list(curve(job, "train/skipped_steps").values()) == [1, 2, 3]
    assert set(curve(job)) == {1, 2, 3, 6, 7, 8}
    same_run(job, stop(4))
    same_run(job, stop(5))


def test_too_many_bad_steps_end_a_run_that_a_higher_limit_resumes(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 4, 5, 6)

    def diverge(job: TrainingJob) -> None:
        changes = {"skip_bad_steps": 2, "checkpoint_every_steps": 1}
        few = job.model_copy(update={"recipe": job.recipe.model_copy(update=changes)})
        with pytest.raises(Diverged, match=r"step 7: loss nan, .*, after 2 skipped in a row"):
            run_job(few)

    same_run(make_job(changes={"skip_bad_steps": 3}), diverge)


def test_a_spike_is_a_bad_step_if_the_recipe_checks_for_it(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 20, name="spike")
    changes = {"num_steps": 24, "checkpoint_every_steps": 10}
    assert run_job(make_job("blind", changes=changes)).finished

    def spike(job: TrainingJob) -> None:
        impatient = job.recipe.model_copy(update={"skip_bad_steps": 0})
        with pytest.raises(Diverged, match=r"spiked .* times the usual norm\) at step 21: loss"):
            run_job(job.model_copy(update={"recipe": impatient}))

    # It resumes from step 20 with the saved norms, and skips the spike.
    changes |= {"spike_factor": 20.0, "skip_bad_steps": 1}
    job = same_run(make_job("watched", changes=changes), spike)
    assert [event["step"] for event in events(job, "skipped")] == [21]


def test_a_spike_is_measured_by_the_latest_norms(make_job: MakeJob) -> None:
    job = make_job(changes={"num_steps": 70, "spike_factor": 1e9, "validate_every_steps": 70})
    state = load_training_state(Path(run_job(job).checkpoint or ""))
    norms = list(curve(job, "train/gradient_norm").values())
    assert state["position"]["recent_norms"] == norms[-64:]


def test_a_folder_in_use_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "LOCK_SECONDS", 0.0)
    with pytest.raises(RunFailed, match="another process trained in"):
        run_job(make_job(), report=lambda *_: run_job(make_job()) and None)


def test_each_step_gets_its_batch_in_any_order_and_its_own_error() -> None:
    asked = list[int]()

    def gather(step: int) -> Batch:
        asked.append(step)
        if step == 3:
            raise OSError("the disk is gone")
        return Batch.of_text(torch.full((1, 4), step))

    with ThreadPoolExecutor(1) as pool:
        recipe = SimpleNamespace(num_steps=8)
        trainer: Any = SimpleNamespace(_ahead={}, _gather=gather, _pool=pool, recipe=recipe)
        # A resumed run starts anywhere; benchmarks ask for a step twice.
        for step in (0, 1, 1, 5, 6, 7, 2):
            assert int(Trainer.batch(trainer, step).input_ids[0, 0]) == step
        with pytest.raises(OSError, match="the disk is gone"):
            Trainer.batch(trainer, 3)
        assert int(Trainer.batch(trainer, 4).input_ids[0, 0]) == 4
    assert max(asked) == 7
    assert asked.count(6) == asked.count(7) == 1
