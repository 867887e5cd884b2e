"""Cheaper schedules that are drawn in each step and trained beside the full one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.batch import Batch
from iiet.config import ModelConfig
from iiet.cost import training_flops_per_token
from iiet.decoder import Decoder
from iiet.losses import next_token_loss
from iiet.schedule import IterationSchedule
from orchestrator.planning.planned_training import PlannedTraining
from orchestrator.records.training import TrainingJob
from orchestrator.settings import Settings, TrainingSettings, resolve_settings
from orchestrator.sweeping.model_plans import ModelVariant, settings_of
from orchestrator.training.distributed import World
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.job import job_key, key_fields
from orchestrator.training.loop import TrainingSetup, _compute_gradients
from orchestrator.training.objective import drawn_objectives, make_objective
from orchestrator.training.pretraining_job import pretraining_job
from orchestrator.training.run import run_job
from orchestrator.training.schedules import drawn_by_step
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.journal import read_journal

RECIPE: dict[str, Any] = {
    "num_steps": 8,
    "num_tokens_per_step": 32,
    "num_validation_tokens": 32,
    "iterate_from_fraction": 0.25,
    "drawn_schedules": 2,
}


def drawn(*corrections: int, **recipe: Any) -> list[tuple[tuple[int, ...], ...]]:
    """Return what is drawn in each step."""
    settings = TrainingSettings(**{**RECIPE, "num_steps": 400, **recipe})
    drawn_at = drawn_by_step(IterationSchedule(corrections), settings)
    return [tuple(one.corrections for one in drawn_at(step)) for step in range(400)]


def test_numbers_below_the_largest_are_drawn_alike_and_alone_from_seed_and_step() -> None:
    found = drawn(3, 1)
    assert found[:100] == [()] * 100  # The first stage has no corrections.
    counts = Counter(one for step in found[100:] for one in step)
    assert counts.keys() == {(0, 0), (1, 1), (2, 1)}
    assert min(counts.values()) > 150
    assert found == drawn(3, 1)
    assert found != drawn(3, 1, seed=1)
    # A step draws the same in a longer training, and more draws leave the first ones alone.
    assert drawn(3, 1, num_steps=800, iterate_from_fraction=0.125) == found
    assert [one[:2] for one in drawn(3, 1, drawn_schedules=3)] == found


def test_without_corrections_or_draws_nothing_is_drawn() -> None:
    assert drawn(0, 0) == drawn(3, 1, drawn_schedules=0) == [()] * 400


@pytest.mark.parametrize("per_pass", [None, 1])
def test_the_loss_of_a_step_is_the_mean_over_its_schedules(
    tiny_model: dict[str, Any], per_pass: int | None
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "schedule": [2, 2]})).double()
    tokens = torch.randint(decoder.config.vocab_size, (2, 16))
    cheaper = [IterationSchedule((0, 0)), IterationSchedule((1, 1))]
    setup = TrainingSetup(
        model=decoder,
        optimizer=torch.optim.SGD(decoder.parameters()),
        objective=make_objective(lambda _: decoder.schedule),
        drawn_objectives=drawn_objectives(lambda _: tuple(cheaper)),
        recipe=TrainingSettings(num_sequences_per_pass=per_pass, clip_norm=1e9),
        world=World(),
    )
    batch = Batch.of_text(tokens)
    batch = batch.counted_as(batch.num_targets, batch.num_positions)
    numbers = _compute_gradients(setup, batch, 0)
    found = [parameter.grad for parameter in decoder.parameters()]
    losses = [
        next_token_loss(decoder(tokens, schedule=schedule), tokens)
        for schedule in (*cheaper, decoder.schedule)
    ]
    mean = torch.stack(losses).mean()
    assert numbers["loss"] == pytest.approx(mean.item(), rel=1e-9)
    expected = list(torch.autograd.grad(mean, list(decoder.parameters())))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)


def test_a_resumed_run_equals_one_from_the_start_and_its_flops_are_planned(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    def job(name: str, **changes: Any) -> TrainingJob:
        return TrainingJob(
            run_folder=str(tmp_path / name),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, "schedule": [2, 2]},
            recipe=TrainingSettings(**{**RECIPE, **changes}),
        )

    whole, split = job("whole"), job("split")
    outcome = run_job(whole)
    steps = iter(range(99))
    assert not run_job(split, should_stop=lambda: next(steps) == 5).finished
    again = run_job(split)
    assert again.validation_loss == outcome.validation_loss
    assert again.training_flops == outcome.training_flops
    curves = [
        {r["step"]: r["values"]["train/loss"] for r in read_journal(one.folder)[0]
         if "train/loss" in r.get("values", {})}
        for one in (whole, split)
    ]  # fmt: skip
    assert curves[0] == curves[1]
    # The number of evaluations is that of the draws.
    drawn_at = drawn_by_step(whole.model.corrections, whole.recipe)
    trained = [IterationSchedule.none(2)] * 2 + [whole.model.corrections] * 6
    trained += [schedule for step in range(8) for schedule in drawn_at(step)]
    assert len(trained) == 2 + 6 * 3
    flops = 32 * sum(training_flops_per_token(whole.model, one) for one in trained)
    assert outcome.training_flops == pytest.approx(flops)
    assert PlannedTraining(config=whole.model, recipe=whole.recipe).flops == pytest.approx(flops)

    plain = job("plain", drawn_schedules=0)
    assert job_key(plain) != job_key(whole)
    assert "drawn_schedules" not in key_fields(plain)["recipe"]
    # Nothing is drawn in the first stage, so both may share it.
    stages = [
        first_stage_of(one.model_copy(update={"first_stages": str(tmp_path)}))
        for one in (plain, whole)
    ]
    assert stages[0] == stages[1] is not None


@pytest.mark.parametrize("model", ["model.method=vanilla", "model.corrections=0"])
def test_a_model_without_corrections_is_refused(model: str, tmp_path: Path) -> None:
    settings = resolve_settings({}, [model, "training.drawn_schedules=1"])
    with pytest.raises(UserError, match="drawn_schedules=1 draws schedules of fewer corrections"):
        pretraining_job(settings, Workspace(tmp_path), None)


@pytest.mark.parametrize(
    ("method", "corrections", "expected"),
    [("vanilla", None, 0), ("iiet", 0, 0), ("iiet", 2, 1), ("looped", "2", 1)],
)
def test_models_of_a_sweep_without_corrections_draw_none(
    method: str, corrections: int | str | None, expected: int
) -> None:
    settings: Settings = resolve_settings({}, ["training.drawn_schedules=1"])
    variant = ModelVariant(method=method, corrections=corrections)
    assert settings_of(settings, variant).training.drawn_schedules == expected


def test_students_are_trained_under_one_schedule() -> None:
    words = r"^settings: distillation.training: a student is trained .* trained from scratch$"
    with pytest.raises(UserError, match=words):
        resolve_settings({}, ["distillation.training.drawn_schedules=1"])
