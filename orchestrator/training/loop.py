"""The one training loop, told in the order in which things happen.

It takes an objective and knows neither Ray nor MLflow nor files: what it needs from outside
(batches, the record, checkpoints, whether to stop) comes as `Hooks`. Pretraining, distillation, one
worker or many: the same loop. All that grows while it runs is in the model, the optimizer and a
`Position`, so saving these three and loading them again continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.errors import StageFailed
from orchestrator.settings import TrainingSettings
from orchestrator.training.learning_rate import learning_rate_at
from orchestrator.training.objective import Objective
from orchestrator.training.optimizer import set_learning_rate
from orchestrator.training.parallel import (
    World,
    any_worker,
    autocast,
    mean_over_workers,
    without_averaging,
)

NUM_RECORDED_POINTS = 250
"""A run records about this many points of its loss, however long it is."""


class Diverged(StageFailed):
    """The loss or the gradient is no number any more; trying again would end the same way."""


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
    seconds: float = 0.0
    """Time spent in steps; validation and saving apart."""
    validation_loss: float = math.nan
    """Latest validation loss; not a number before the first."""


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained, and how."""

    model: nn.Module
    """The decoder, replicated if there are several workers."""
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

    batch: Callable[[int], Tensor]
    """Step -> this worker's sequences of it, (sequences, time), on its device."""
    flops_per_token: Callable[[int], float]
    """Step -> training FLOPs of one token in it."""
    validate: Callable[[int], float]
    """Steps done -> validation loss, the same on all workers."""
    report: Callable[[int, Mapping[str, float]], None]
    """Steps done, numbers by name; called on every worker."""
    save: Callable[[Position], None]
    """Write a checkpoint; called on every worker."""
    should_stop: Callable[[], bool]
    """Whether this worker was asked to stop."""


def train(trainee: Trainee, position: Position, hooks: Hooks) -> bool:
    """Train from `position` to the recipe's last step, moving `position` along.

    Returns:
        True when the last step is done, False when stopped before it; the state is saved in both
        cases.

    Raises:
        Diverged: If loss or gradient are not finite; the weights are those before the step.
    """
    recipe, world = trainee.recipe, trainee.world
    trainee.model.train()
    while position.step < recipe.num_steps:
        if any_worker(hooks.should_stop(), world):
            hooks.save(position)
            return False

        started = time.perf_counter()
        step = position.step
        learning_rate = learning_rate_at(step, recipe)
        set_learning_rate(trainee.optimizer, learning_rate)
        input_ids = hooks.batch(step)
        losses = _accumulate_gradients(trainee, input_ids, step)
        norm = nn.utils.clip_grad_norm_(trainee.model.parameters(), recipe.clip_norm).item()
        losses = mean_over_workers(losses, world)
        if not (math.isfinite(losses["loss"]) and math.isfinite(norm)):
            raise Diverged(
                f"training diverged at step {step + 1}: loss {losses['loss']:g}, "
                f"gradient norm {norm:g}, learning rate {learning_rate:g}"
            )
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)

        seconds = time.perf_counter() - started
        num_tokens = input_ids.numel() * world.size
        position.step += 1
        position.num_tokens += num_tokens
        position.flops += num_tokens * hooks.flops_per_token(step)
        position.seconds += seconds
        is_last = position.step == recipe.num_steps
        if is_last or position.step % _record_every(recipe) == 0:
            numbers = {f"train/{name}": value for name, value in losses.items()}
            numbers["train/learning_rate"] = learning_rate
            numbers["train/gradient_norm"] = norm
            numbers["train/tokens_per_second"] = num_tokens / seconds
            numbers["train/tokens"] = position.num_tokens
            numbers["train/flops"] = position.flops
            hooks.report(position.step, numbers)
        if is_last or position.step % recipe.validate_every_steps == 0:
            position.validation_loss = hooks.validate(position.step)
            hooks.report(position.step, {"validation/loss": position.validation_loss})
        if is_last or position.step % recipe.checkpoint_every_steps == 0:
            hooks.save(position)
    return True


def _accumulate_gradients(trainee: Trainee, input_ids: Tensor, step: int) -> dict[str, float]:
    # In as many passes as memory asks for; the gradients are those of one pass up to rounding.
    passes = torch.split(input_ids, trainee.recipe.num_sequences_per_pass or len(input_ids))
    totals: dict[str, float] = {}
    for number, sequences in enumerate(passes, start=1):
        share = len(sequences) / len(input_ids)
        is_last = number == len(passes)
        with nullcontext() if is_last else without_averaging(trainee.model):
            with autocast(trainee.recipe.precision, trainee.world):
                loss, parts = trainee.objective(trainee.model, sequences, step)
            torch.autograd.backward(loss * share)
        for name, value in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0.0) + share * value.item()
    return totals


def _record_every(recipe: TrainingSettings) -> int:
    return max(1, recipe.num_steps // NUM_RECORDED_POINTS)
