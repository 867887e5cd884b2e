"""The validation loss of a model in training, computed by all workers together.

Each worker takes every n-th batch. If the last round has too few batches, the remaining workers run
a batch without counting it: all workers must run a sharded model together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.training.distributed import World, autocast, mean_over_workers


@torch.no_grad()
def validation_loss(
    decoder: Decoder,
    batches: Sequence[Batch],
    schedule: IterationSchedule,
    *,
    precision: str,
    world: World,
) -> float:
    """Return the mean loss per target in nats, the same on all workers; 0 without targets.

    The batches are the same on every worker. The decoder's mode (training or evaluation) is
    restored afterwards.
    """
    total = count = 0.0
    was_training = decoder.training
    decoder.eval()
    for first in range(0, len(batches), world.size):
        number = first + world.rank
        batch = batches[min(number, len(batches) - 1)]
        num_targets = batch.num_targets
        batch = batch.to(world.device)
        with autocast(precision, world):
            finish = partial(batch_cross_entropy, batch=batch)
            loss = decoder(batch.input_ids, schedule=schedule, finish=finish)
        if number < len(batches):
            total += loss.item() * num_targets
            count += num_targets
    decoder.train(was_training)
    sums = mean_over_workers({"total": total, "count": count}, world)
    return sums["total"] / (sums["count"] or 1.0)
