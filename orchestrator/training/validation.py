"""The validation loss of a model in training, shared by its workers.

Each takes every n-th batch. Where the last round has too few of them, the others run one of another
worker without counting it: a sharded model is whole only while all workers run it together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.losses import next_token_loss
from iiet.schedule import IterationSchedule
from orchestrator.training.parallel import World, autocast, mean_over_workers


@torch.no_grad()
def validation_loss(
    decoder: Decoder,
    batches: Sequence[Tensor],
    schedule: IterationSchedule,
    *,
    precision: str,
    world: World,
) -> float:
    """Return the mean next-token loss in nats, the same on all workers.

    Args:
        decoder: In training; it is again afterwards.
        batches: The same on every worker, each (sequences, time).
        schedule: Corrections to make.
        precision: Arithmetic, as in training.
        world: This worker's place.
    """
    total = count = 0.0
    decoder.eval()
    for first in range(0, len(batches), world.size):
        number = first + world.rank
        sequences = batches[min(number, len(batches) - 1)].to(world.device)
        with autocast(precision, world):
            loss = next_token_loss(decoder(sequences, schedule=schedule), sequences)
        if number < len(batches):
            total += loss.item() * len(sequences)
            count += len(sequences)
    decoder.train()
    sums = mean_over_workers({"total": total, "count": count}, world)
    return sums["total"] / sums["count"]
