"""The one training loop, told in the order in which things happen.

It takes an objective and knows neither Ray nor MLflow nor files: what it needs from outside
(batches, the record, checkpoints, whether to stop) comes as `Hooks`. Pretraining, distillation, one
worker or many: the same loop. All that grows while it runs is in the model, the optimizer and a
`Position`, so saving these three and loading them again continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from iiet.batch import Batch
from orchestrator.settings import TrainingSettings
from orchestrator.training.distributed import (
    World,
    autocast,
    clip_gradients,
    mean_over_workers,
    without_gradient_sync,
)
from orchestrator.training.learning_rate import learning_rate_at
from orchestrator.training.objective import Objective
from orchestrator.training.optimizer import set_learning_rate
from orchestrator.workspace.errors import RunFailed

NUM_RECORDED_POINTS = 250
"""A run records about this many points of its loss, however long it is."""
SPIKE_WINDOW = 64
"""A spike is held against the median gradient norm of so many steps; a quarter of them will do."""


class Diverged(RunFailed):
    """The loss or the gradient is no number any more, or spiked; trying again would end the same
    way."""


@dataclass
class Position:
    """Where a run stands, all but weights and optimizer. Plain numbers, so that it saves as it
    is."""

    step: int = 0
    """Optimizer steps done; it determines the next batch and learning rate."""
    num_tokens: int = 0
    """Tokens trained on, by all workers together."""
    flops: float = 0.0
    """Training FLOPs, counted from shapes."""
    shared_flops: float = 0.0
    """Those among them that another run had spent, on a first stage in common."""
    seconds: float = 0.0
    """Time spent in steps; validation and saving apart."""
    validation_loss: float = math.nan
    """Latest validation loss; not a number before the first."""
    validated_step: int = 0
    """Steps that were done then."""
    num_skipped: int = 0
    """Steps that left the weights alone, because their loss or gradient was bad."""
    num_skipped_in_row: int = 0
    """How many of them came one after the other just now."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the latest steps, where spikes are watched for."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What is trained, and how."""

    model: nn.Module
    """The decoder, replicated or sharded if there are several workers."""
    optimizer: torch.optim.Optimizer
    """Its optimizer."""
    objective: Objective
    """The loss."""
    recipe: TrainingSettings
    """Steps, rates, and when to look and save."""
    world: World
    """This worker among all."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop needs from outside."""

    batch: Callable[[int], Batch]
    """Step -> this worker's part of it, as many sequences on each worker, on the CPU."""
    flops_per_token: Callable[[int], float]
    """Step -> training FLOPs of one token in it."""
    validate: Callable[[int], float]
    """Steps done -> validation loss, the same on all workers."""
    report: Callable[[int, Mapping[str, float]], None]
    """Steps done, numbers by name; called on every worker."""
    event: Callable[..., None]
    """Name and details of something out of the ordinary; called on every worker."""
    throughput: Callable[[Position], Mapping[str, float]]
    """How fast it goes since the last call, and what it takes: numbers by name."""
    save: Callable[[Position], None]
    """Write a checkpoint; called on every worker."""
    should_stop: Callable[[], bool]
    """Whether this worker was asked to stop."""
    should_save: Callable[[], bool]
    """Whether this worker wants a checkpoint now, beside those at the recipe's steps."""


def train(trainee: TrainingSetup, position: Position, hooks: Hooks) -> bool:
    """Train from `position` to the recipe's last step, moving `position` along.

    Returns:
        True when the last step is done, False when stopped before it; the state is saved in both
        cases.

    Raises:
        Diverged: If loss or gradient are bad (not finite, or a spike) more often in a row than the
            recipe passes over; the weights are those before the step.
    """
    recipe, world = trainee.recipe, trainee.world
    trainee.model.train()
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
            },
            world,
        )
        if agreed["stop"] or agreed["save"]:
            hooks.save(position)
        if agreed["stop"]:
            return False

        started += time.perf_counter() - loaded
        batch = batch.counted_as(agreed["targets"], agreed["positions"]).to(world.device)
        learning_rate = learning_rate_at(position.step, recipe)
        set_learning_rate(trainee.optimizer, learning_rate)
        numbers = {
            **_compute_gradients(trainee, batch, position.step),
            "learning_rate": learning_rate,
        }
        if _is_good(numbers, position, recipe):
            trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
        num_tokens = batch.input_ids.numel() * world.size
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
            position.validation_loss = hooks.validate(position.step)
            position.validated_step = position.step
            hooks.report(position.step, {"validation/loss": position.validation_loss})
        if is_last or position.step % recipe.checkpoint_every_steps == 0:
            hooks.save(position)
    return True


def _is_good(numbers: Mapping[str, float], position: Position, recipe: TrainingSettings) -> bool:
    """Return whether to make a step, and count it as skipped if its loss or gradient are bad."""
    if trouble := _trouble(numbers, position.recent_norms, recipe.spike_factor):
        _pass_over(position, numbers, trouble, num_allowed=recipe.skip_bad_steps)
        return False
    position.num_skipped_in_row = 0
    if recipe.spike_factor:
        norms = [*position.recent_norms, numbers["gradient_norm"]]
        position.recent_norms = norms[-SPIKE_WINDOW:]
    return True


def _trouble(
    numbers: Mapping[str, float], recent_norms: Sequence[float], spike_factor: float | None
) -> str:
    """Say what is wrong with a step; empty if nothing is."""
    loss, norm = numbers["loss"], numbers["gradient_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "diverged"
    if spike_factor and len(recent_norms) >= SPIKE_WINDOW // 4:
        times = norm / median(recent_norms)
        if times > spike_factor:
            return f"spiked (its gradient has {times:.1f} times the usual norm)"
    return ""


def _pass_over(
    position: Position, numbers: Mapping[str, float], trouble: str, *, num_allowed: int
) -> None:
    if position.num_skipped_in_row >= num_allowed:
        skipped = position.num_skipped_in_row
        raise Diverged(
            f"training {trouble} at step {position.step + 1}: loss {numbers['loss']:g}, "
            f"gradient norm {numbers['gradient_norm']:g}, "
            f"learning rate {numbers['learning_rate']:g}"
            + (f", after {skipped} skipped in a row" if skipped else "")
        )
    position.num_skipped += 1
    position.num_skipped_in_row += 1


def _compute_gradients(trainee: TrainingSetup, batch: Batch, step: int) -> dict[str, float]:
    # In as many passes as memory asks for; the gradients are those of one pass up to rounding, as
    # each pass divides by its share of what counts in the passes of all workers.
    passes = batch.split(trainee.recipe.num_sequences_per_pass or len(batch))
    totals: dict[str, float] = {}
    for number, part in enumerate(passes, start=1):
        share = len(part) / len(batch)
        is_last = number == len(passes)
        with nullcontext() if is_last else without_gradient_sync(trainee.model, trainee.world):
            with autocast(trainee.recipe.precision, trainee.world):
                loss, parts = trainee.objective(trainee.model, part, step)
            torch.autograd.backward(loss * share)
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + share * value.item()
    norm = clip_gradients(trainee.model, trainee.recipe.clip_norm)
    return mean_over_workers({**totals, "gradient_norm": norm}, trainee.world)


def _record_every(recipe: TrainingSettings) -> int:
    return max(1, recipe.num_steps // NUM_RECORDED_POINTS)
