"""A run reports its losses, is found again when it is finished, and ends or skips bad steps."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from read_tokens import noted_tokens
from refusals import refused
from same_run import curve, events, same_run, state_of, steps_of, stop, stop_at
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iiet.model.batch import Batch
from iiet.model.config import ModelConfig
from iiet.model.losses import next_token_loss
from iiet.model.schedule import IterationSchedule
from orchestrator.data.order import WindowOrder
from orchestrator.data.store import gather, open_tokens
from orchestrator.models.load import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings
from orchestrator.training import trainer as trainer_module
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.job import finished_outcome
from orchestrator.training.objective import VALIDATION_METRIC, validation_metrics
from orchestrator.training.trainer import Diverged, Trainer, run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import DONE_NAME

RECIPE: dict[str, Any] = {
    "num_steps": 9, "learning_rate": 1e-2, "warmup_steps": 2, "checkpoint_every_steps": 4,
    "iterate_from_fraction": 0.5,
}  # fmt: skip


def test_the_loss_falls_and_is_reported_and_a_finished_job_returns_at_once(make_job, monkeypatch):
    job = make_job(num_steps=12, learning_rate=2e-2, iterate_from_fraction=0.0)
    reported: list[int] = []
    outcome = run_job(job, report=lambda step, numbers: reported.append(step))
    assert (outcome.finished, outcome.step, outcome.num_tokens) == (True, 12, 12 * 64)
    losses = curve(job)
    assert list(losses) == list(range(1, 13))
    assert set(reported) == set(losses)
    assert sum(list(losses.values())[-3:]) < sum(list(losses.values())[:3]) - 1.0
    assert curve(job, "validation/loss")[12] == outcome.validation_loss
    names = [r["name"] for r in read_journal(job.folder)[0] if r["kind"] == "event"]
    assert (names[0], names[-1]) == ("started", "finished")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0

    (job.folder / DONE_NAME).unlink()  # A kill before the last write leaves the folder so.
    assert run_job(job) == outcome.model_copy(update={"train_seconds": outcome.train_seconds})
    monkeypatch.setattr(torch.optim, "AdamW", pytest.fail)
    assert run_job(job) == finished_outcome(job) == outcome


def test_a_record_is_the_mean_of_the_steps_since_the_one_before(make_job, monkeypatch):
    recipe = {"num_steps": 6, "validate_every_steps": 100, "checkpoint_every_steps": 100}
    each_step = make_job("each step", **recipe)
    run_job(each_step)
    monkeypatch.setattr(trainer_module, "NUM_RECORDED_POINTS", 2)
    every_three = make_job("every three", **recipe)
    assert not run_job(every_three, should_stop=stop_at(5)).finished
    run_job(every_three)  # Resumes in the middle of the steps from 4 to 6.
    for name in ("train/loss", "train/gradient_norm"):
        expected = list(curve(each_step, name).values())
        recorded = curve(every_three, name)
        assert list(recorded) == [3, 6]
        for step, value in recorded.items():
            assert value == pytest.approx(sum(expected[step - 3 : step]) / 3, rel=1e-6), step

    monkeypatch.setattr(trainer_module, "RECORD_EVERY_SECONDS", 0.0)
    slow = make_job("slow steps", **recipe)
    run_job(slow)
    assert curve(slow) == curve(each_step)


def test_one_slow_step_is_recorded_and_those_after_it_are_not(make_job, monkeypatch):
    monkeypatch.setattr(trainer_module, "NUM_RECORDED_POINTS", 2)
    monotonic = time.monotonic
    seconds_asleep = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + seconds_asleep[0])
    steps = itertools.count()

    def stop_never() -> bool:
        if next(steps) == 2:  # The machine is suspended.
            seconds_asleep[0] += trainer_module.RECORD_EVERY_SECONDS
        return False

    job = make_job(num_steps=12, validate_every_steps=100, checkpoint_every_steps=100)
    run_job(job, should_stop=stop_never)
    assert len(curve(job)) == 3
    assert list(curve(job))[-2:] == [6, 12]


def test_a_training_and_its_validation_read_sequences_of_the_length_that_is_set(make_job):
    job = make_job(iterate_from_fraction=0.0, sequence_length=8, seed=3, num_steps=3)
    with noted_tokens() as read:
        outcome = run_job(job)
    tokens = open_tokens(job.tokens_folder).train
    starts = WindowOrder(len(tokens), 8, seed=3).starts(np.arange(3 * 64 // 8))
    assert torch.equal(torch.cat(read.trained), gather(tokens, starts, 8))
    assert {batch.size(1) for batch in read.others} == {8}
    assert outcome.num_tokens == 3 * 64


def test_a_validation_makes_the_corrections_that_its_step_trains(make_job):
    job = make_job(num_steps=4, validate_every_steps=2, checkpoint_every_steps=2)
    run_job(job)
    tokens = open_tokens(job.tokens_folder)
    batches = [
        *tokens.validation_batches(
            context_length=job.sequence_length,
            num_tokens=job.recipe.num_validation_tokens,
            batch_size=8,
        )
    ]

    def losses(step: int) -> dict[str, float]:
        """Return the losses of a checkpoint's weights under both stages' schedules."""
        decoder = load_model(job.folder / f"step_{step:08d}")
        schedules = {"none": IterationSchedule.none(decoder.config.num_layers)}
        schedules["all"] = job.model.corrections
        return {
            name: validation_metrics(decoder, batches, schedule, precision="fp32", world=World())[
                VALIDATION_METRIC
            ]
            for name, schedule in schedules.items()
        }

    validated = curve(job, VALIDATION_METRIC)
    for step, stage in ((2, "none"), (4, "all")):
        expected = losses(step)
        assert expected["none"] != pytest.approx(expected["all"], rel=1e-5)
        assert validated[step] == pytest.approx(expected[stage], rel=1e-6)


def test_the_cheapest_loss_of_a_family_is_that_of_its_cheapest_schedule(make_job):
    family = ElasticSettings(schedules=("2,0", "1,0", "0,0"), num_drawn=1)
    job = make_job(num_steps=2, elastic=family, iterate_from_fraction=0.0)
    decoder = load_model(Path(run_job(job).checkpoint or ""))
    batches = open_tokens(job.tokens_folder).validation_batches(
        context_length=job.sequence_length,
        num_tokens=job.recipe.num_validation_tokens,
        batch_size=8,
    )
    without_corrections = decoder.with_schedule(0)
    with torch.no_grad():
        losses = [
            next_token_loss(without_corrections(batch.input_ids), batch.input_ids)
            for batch in batches
        ]
    expected = torch.stack(losses).mean().item()
    assert curve(job, "validation/cheapest_loss") == {2: pytest.approx(expected, rel=1e-5)}
    assert curve(job, VALIDATION_METRIC)[2] != pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_later_step_is_tried_before_the_first_one_and_changes_nothing(
    make_job, monkeypatch, optimizer
):
    recipe = {"num_steps": 4, "optimizer": optimizer, "clip_norm": 0.5}
    tried: list[int] = []
    compute_gradients = Trainer.compute_gradients

    def noted(trainer: Trainer, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        tried.append(step)
        return compute_gradients(trainer, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "compute_gradients", noted)
        outcome = run_job(make_job("tried", **recipe))
        assert tried == [2, 0, 1, 2, 3]
        tried.clear()
        run_job(make_job("at once", **{**recipe, "iterate_from_fraction": 0.0}))
        assert tried == [0, 1, 2, 3]
    monkeypatch.setattr(Trainer, "try_largest_step", lambda _: None)
    assert state_of(run_job(make_job("untried", **recipe))) == state_of(outcome)


def test_a_later_step_that_fails_ends_a_training_before_its_first(make_job, monkeypatch):
    job = make_job()

    def without_corrections_alone(trainer: Trainer, batch: Batch, step: int) -> None:
        assert not trainer.schedule_at(step).num_corrections, "no memory for corrections"

    monkeypatch.setattr(Trainer, "compute_gradients", without_corrections_alone)
    with pytest.raises(AssertionError, match="no memory for corrections"):
        run_job(job)
    assert steps_of(job) == []


def test_a_folder_in_use_is_refused(make_job, monkeypatch):
    monkeypatch.setattr(trainer_module, "LOCK_SECONDS", 0.0)
    with refused(RunFailed, "another process"):
        run_job(make_job(), report=lambda *_: run_job(make_job()) and None)


def test_the_flops_of_a_training_are_those_that_pytorch_counts(make_job, tiny_model):
    vanilla = ModelConfig.from_dict({**tiny_model, "method": "vanilla", "schedule": None})
    counted: list[float] = []
    planned: list[float] = []
    for num_steps in (2, 4):
        job = make_job(f"{num_steps} steps", num_steps=num_steps)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            outcome = run_job(job.model_copy(update={"model": vanilla}))
        counted.append(counter.get_total_flops())
        planned.append(outcome.training_flops)
    # Both have validated once. PyTorch counts the pairs of tokens that the causal mask hides, too:
    # in two steps of four sequences, forward and twice backward, for scores and weighted values.
    length = vanilla.context_length
    hidden_pairs = vanilla.num_layers * length * (length - 1) // 2
    of_hidden_pairs = 2 * 4 * 3 * 2 * 2 * vanilla.dim * hidden_pairs
    counted_in_two_steps = counted[1] - counted[0] - of_hidden_pairs
    assert counted_in_two_steps == pytest.approx(planned[1] - planned[0], rel=0.005)


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


@pytest.mark.parametrize(
    ("name", "section"), [("loss", "training"), ("gradient", "distillation.training")]
)
def test_divergence_names_step_checkpoint_and_settings(make_job, monkeypatch, name, section):
    spoil(monkeypatch, 6, name=name)
    job = make_job().model_copy(update={"section": section})
    with pytest.raises(Diverged, match="step 7: loss") as caught:
        run_job(job)
    text = str(caught.value)
    assert str(job.folder / "step_00000004") in text
    for setting in ("learning_rate (here 0.01", "warmup_steps", "skip_bad_steps"):
        assert f" {section}.{setting}" in text
    assert steps_of(job) == [4]
    assert [event["step"] for event in events(job, "diverged")] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_and_is_recorded(make_job, monkeypatch, name):
    spoil(monkeypatch, 3, 4, 8, name=name)
    job = make_job(skip_bad_steps=2, checkpoint_every_steps=1, num_checkpoints_kept=9)
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
    same_run(job, stop(4), stop(1))


def diverging(match: str, **changes: Any) -> Callable[[TrainingJob], None]:
    """Train with a recipe that skips fewer bad steps, so that the run ends."""

    def disturb(job: TrainingJob) -> None:
        recipe = job.recipe.model_copy(update=changes)
        with pytest.raises(Diverged, match=match):
            run_job(job.model_copy(update={"recipe": recipe}))

    return disturb


def test_too_many_bad_steps_end_a_run_that_a_higher_limit_resumes(make_job, monkeypatch):
    spoil(monkeypatch, 2, 4, 5, 6)
    words = r"step 7: loss nan, .*, after 2 skipped in a row"
    ended = diverging(words, skip_bad_steps=2, checkpoint_every_steps=1)
    same_run(make_job(skip_bad_steps=3), ended)


def test_a_spike_is_a_bad_step_if_the_recipe_checks_for_it(make_job, monkeypatch):
    monkeypatch.setattr(trainer_module, "SPIKE_WINDOW", 16)  # Four steps are enough to start.
    spoil(monkeypatch, 6, name="spike")
    assert run_job(make_job("blind", num_steps=7)).finished
    # The run resumes from step 4 with the saved norms, and skips the spike.
    spike = diverging(r"spiked .* times the usual norm\) at step 7: loss", skip_bad_steps=0)
    job = same_run(make_job("watched", num_steps=8, spike_factor=20.0, skip_bad_steps=1), spike)
    assert [event["step"] for event in events(job, "skipped")] == [7]


def test_a_spike_is_measured_by_the_latest_norms(make_job, monkeypatch):
    monkeypatch.setattr(trainer_module, "SPIKE_WINDOW", 4)
    job = make_job(num_steps=6, spike_factor=1e9)
    state = load_training_state(Path(run_job(job).checkpoint or ""))
    assert state["position"]["recent_norms"] == [*curve(job, "train/gradient_norm").values()][-4:]
