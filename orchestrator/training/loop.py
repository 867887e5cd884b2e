"""The training loop, for pretraining and distillation, one worker or several.

It knows neither Ray nor MLflow nor files: they come as `Hooks`. All its state is in the model, the
optimizer and a `Position`, so a run that saves and loads these three resumes bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from iiet.batch import Batch
from orchestrator.settings import TrainingSettings
from orchestrator.training.distributed import (
    World,
    autocast,
    clip_gradients,
    mean_over_workers,
    pass_of_several,
)
from orchestrator.training.learning_rate import learning_rate_at
from orchestrator.training.objective import (
    Objective,
    Passes,
    mean_by_source,
    single_pass,
)
from orchestrator.training.optimizer import set_learning_rate
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import VALIDATION_METRIC

NUM_RECORDED_POINTS = 250
"""Approximate number of training losses in the journal of a run of any length."""
SPIKE_WINDOW = 64
"""Steps whose median gradient norm defines a spike; a quarter of them is enough to start."""


class Diverged(RunFailed):
    """The loss or the gradient is not finite, or spiked; a retry would end the same way."""


@dataclass
class Position:
    """State of a run beside weights and optimizer; plain numbers that are saved as they are."""

    step: int = 0
    """Optimizer steps done; it determines the next batch and learning rate."""
    num_tokens: int = 0
    """Tokens trained on, by all workers together."""
    flops: float = 0.0
    """Training FLOPs, counted from shapes."""
    shared_flops: float = 0.0
    """Part of them that another run spent: on a shared first stage, or before it was continued."""
    seconds: float = 0.0
    """Time spent in steps, without validation and saving."""
    validation_loss: float = math.nan
    """Latest validation loss; NaN before the first."""
    validated_step: int = 0
    """Steps done at that validation."""
    num_skipped: int = 0
    """Steps without an update, because loss or gradient were bad."""
    num_skipped_in_row: int = 0
    """Number of the latest steps that were all skipped."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the latest steps, if the recipe checks for spikes."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Model, optimizer, loss and recipe of a run."""

    model: nn.Module
    """The decoder, replicated or sharded if there are several workers."""
    optimizer: torch.optim.Optimizer
    objective: Objective
    passes: Passes = single_pass
    """The losses whose sum is minimized: `objective`, and in elastic training those of members."""
    recipe: TrainingSettings
    world: World


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that the loop calls."""

    batch: Callable[[int], Batch]
    """Step -> this worker's share of the batch, on the CPU; the shares may differ in size."""
    flops_per_token: Callable[[int], float]
    """Step -> training FLOPs per token."""
    validate: Callable[[int], Mapping[str, float]]
    """Steps done -> validation metrics by name, the same on all workers."""
    report: Callable[[int, Mapping[str, float]], None]
    """(Steps done, metrics by name); called on every worker."""
    event: Callable[..., None]
    """(Name, details) of an unusual event; called on every worker."""
    throughput: Callable[[Position], Mapping[str, float]]
    """Position -> speed since the last call, and memory: metrics by name; called on every
    worker."""
    save: Callable[[Position], None]
    """Write a checkpoint; called on every worker."""
    should_stop: Callable[[], bool]
    """Whether a stop was requested on this worker."""
    should_save: Callable[[], bool]
    """Whether this worker wants a checkpoint now, in addition to those at the recipe's steps."""
    end_step: Callable[[], None]
    """Called after each step, on every worker."""


def train(setup: TrainingSetup, position: Position, hooks: Hooks) -> bool:
    """Train from `position` to the recipe's last step; update `position` in place.

    Returns:
        True after the last step, False if stopped before it. The state is saved in both cases.

    Raises:
        Diverged: If loss or gradient are bad (not finite, or a spike) in more consecutive steps
            than the recipe skips; the weights are those before the step.
    """
    recipe, world = setup.recipe, setup.world
    setup.model.train()
    while position.step < recipe.num_steps:
        started = time.perf_counter()
        batch = hooks.batch(position.step)
        loaded = time.perf_counter()
        agreed = mean_over_workers(
            {
                "stop": float(hooks.should_stop()),
                "save": float(hooks.should_save()),
                "targets": float(batch.num_targets),
                "positions": float(batch.num_positions),
                "tokens": float(batch.input_ids.numel()),
            },
            world,
        )
        if agreed["stop"] or agreed["save"]:
            hooks.save(position)
        if agreed["stop"]:
            return False

        started += time.perf_counter() - loaded
        batch = batch.counted_as(agreed["targets"], agreed["positions"])
        batch = batch.to(world.device, non_blocking=True)
        learning_rate = learning_rate_at(position.step, recipe)
        set_learning_rate(setup.optimizer, learning_rate)
        numbers = {
            **_compute_gradients(setup, batch, position.step),
            "learning_rate": learning_rate,
        }
        if _is_good(numbers, position, recipe):
            setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
        num_tokens = round(agreed["tokens"] * world.size)
        position.num_tokens += num_tokens
        position.flops += num_tokens * hooks.flops_per_token(position.step)
        position.seconds += time.perf_counter() - started
        position.step += 1
        is_last = position.step == recipe.num_steps
        if position.num_skipped_in_row:
            hooks.event("skipped", step=position.step, **numbers)
            hooks.report(position.step, {"train/skipped_steps": position.num_skipped})
        elif is_last or position.step % _record_every(recipe) == 0:
            numbers["tokens"] = position.num_tokens
            numbers["flops"] = position.flops
            named = {f"train/{name}": number for name, number in numbers.items()}
            hooks.report(position.step, {**named, **hooks.throughput(position)})
        if is_last or position.step % recipe.validate_every_steps == 0:
            metrics = hooks.validate(position.step)
            position.validation_loss = metrics[VALIDATION_METRIC]
            position.validated_step = position.step
            hooks.report(position.step, metrics)
        if is_last or position.step % recipe.checkpoint_every_steps == 0:
            hooks.save(position)
        hooks.end_step()
    return True


def _is_good(numbers: Mapping[str, float], position: Position, recipe: TrainingSettings) -> bool:
    # Whether to update the weights; if not, the step is counted as skipped.
    if problem := _problem(numbers, position.recent_norms, recipe.spike_factor):
        _count_skipped(position, numbers, problem, max_skipped=recipe.skip_bad_steps)
        return False
    position.num_skipped_in_row = 0
    if recipe.spike_factor:
        norms = [*position.recent_norms, numbers["gradient_norm"]]
        position.recent_norms = norms[-SPIKE_WINDOW:]
    return True


def _problem(
    numbers: Mapping[str, float], recent_norms: Sequence[float], spike_factor: float | None
) -> str:
    loss, norm = numbers["loss"], numbers["gradient_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "diverged"
    if spike_factor and len(recent_norms) >= SPIKE_WINDOW // 4:
        times = norm / median(recent_norms)
        if times > spike_factor:
            return f"spiked (its gradient has {times:.1f} times the usual norm)"
    return ""


def _count_skipped(
    position: Position, numbers: Mapping[str, float], problem: str, *, max_skipped: int
) -> None:
    if position.num_skipped_in_row >= max_skipped:
        skipped = position.num_skipped_in_row
        raise Diverged(
            f"training {problem} at step {position.step + 1}: loss {numbers['loss']:g}, "
            f"gradient norm {numbers['gradient_norm']:g}, "
            f"learning rate {numbers['learning_rate']:g}"
            + (f", after {skipped} skipped in a row" if skipped else "")
        )
    position.num_skipped += 1
    position.num_skipped_in_row += 1


def _compute_gradients(setup: TrainingSetup, batch: Batch, step: int) -> dict[str, float]:
    # Parts of a batch save memory. Each divides by its share of the targets of all workers, so the
    # gradients are those of a single pass up to rounding.
    parts_of_batch = batch.split(setup.recipe.num_sequences_per_pass or len(batch))
    passes = (
        (part, objective)
        for part in parts_of_batch
        for objective in setup.passes(setup.objective, step)
    )
    num_passes = len(parts_of_batch) * len(setup.passes(setup.objective, step))
    # They are added up on the device and read once: a step waits for a GPU only at its end.
    totals: dict[str, Tensor] = {}
    for number, (part, objective) in enumerate(passes, start=1):
        share = len(part) / len(batch)
        several = pass_of_several(setup.model, setup.world, is_last=number == num_passes)
        with several if num_passes > 1 else nullcontext():
            with autocast(setup.recipe.precision, setup.world):
                loss, parts = objective(setup.model, part, step)
            torch.autograd.backward(loss * share)
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + share * value.detach().double()
    norm = clip_gradients(setup.model, setup.recipe.clip_norm)
    return mean_by_source(mean_over_workers({**totals, "gradient_norm": norm}, setup.world))


def _record_every(recipe: TrainingSettings) -> int:
    return max(1, recipe.num_steps // NUM_RECORDED_POINTS)
