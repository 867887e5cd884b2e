"""The training loop of the studies that train decoders without the program's commands."""

from __future__ import annotations

import torch

from iiet.decoder import Decoder
from orchestrator.data.store import PreparedData
from orchestrator.settings import TrainingSettings
from orchestrator.training.objective import make_objective, make_optimizer, set_learning_rate
from orchestrator.training.schedules import learning_rate_at


def train_decoder(
    decoder: Decoder,
    data: PreparedData,
    recipe: TrainingSettings,
    *,
    context_length: int,
    num_sequences: int,
    data_seed: int,
    teacher: Decoder | None = None,
) -> None:
    """Train a decoder under its own schedule, by cross-entropy or also from a teacher.

    Args:
        decoder: Is trained in place.
        data: Prepared data.
        recipe: Steps, rates and clipping; sequences and their order are those of the arguments.
        context_length: Tokens of a sequence.
        num_sequences: Sequences of a step.
        data_seed: Seed of the order of the data.
        teacher: Frozen model whose answers are learned, too.
    """
    optimizer = make_optimizer(decoder, recipe)
    objective = make_objective(lambda _: decoder.schedule, teacher)
    for step in range(recipe.num_steps):
        batch = data.batch(
            step, context_length=context_length, seed=data_seed, global_batch=num_sequences
        )
        set_learning_rate(optimizer, learning_rate_at(step, recipe))
        loss, _ = objective(decoder, batch, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
