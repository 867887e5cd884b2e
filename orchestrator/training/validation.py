"""Loss and accuracy of a model on held-out batches, computed by all workers together.

Each worker takes every n-th batch. If the last round has too few batches, the remaining workers run
a batch without counting it: all workers must run a sharded model together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.loss_metrics import cross_entropy_and_accuracy
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule
from orchestrator.training.distributed import World, autocast, mean_over_workers
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC

_SUMS = ("loss", "targets", "right", "answers")


@torch.no_grad()
def validation_metrics(
    decoder: Decoder,
    batches: Sequence[Batch],
    schedule: IterationSchedule,
    *,
    precision: str,
    world: World,
    source_names: Sequence[str] = (),
) -> dict[str, float]:
    """Return loss and accuracy on held-out batches, by name of the metric.

    Batches and result are the same on every worker. The decoder's mode (training or evaluation) is
    restored afterwards.

    Args:
        source_names: The sources of a mixture, whose batches are of one source each; without names
            there are no numbers by source.

    Returns:
        `validation/loss`: the mean per target in nats, NaN without targets; `validation/accuracy`:
        of the targets that are no text, if there are any; of a mixture also both of each source,
        such as `validation/loss_python` and `validation/accuracy_phop_6`.
    """
    names = [f"_{name}" for name in source_names] or [""]
    sums = {what + name: 0.0 for name in names for what in _SUMS}
    was_training = decoder.training
    decoder.eval()
    for first in range(0, len(batches), world.size):
        number = first + world.rank
        batch = batches[min(number, len(batches) - 1)]
        num_targets = batch.num_targets
        name = names[int(batch.sources[0, 0]) if source_names and batch.sources is not None else 0]
        batch = batch.to(world.device)
        with autocast(precision, world):
            loss_of = batch_cross_entropy if batch.is_text else cross_entropy_and_accuracy
            finish = partial(loss_of, batch=batch)
            found = decoder(batch.input_ids, schedule=schedule, finish=finish)
        if number < len(batches):
            loss, *accuracies = found if isinstance(found, tuple) else (found,)
            sums["loss" + name] += loss.item() * num_targets
            sums["targets" + name] += num_targets
            for accuracy in accuracies:
                sums["right" + name] += accuracy.item() * num_targets
                sums["answers" + name] += num_targets
    decoder.train(was_training)
    sums = mean_over_workers(sums, world)
    total = {what: sum(sums[what + name] for name in names) for what in _SUMS}
    metrics = {VALIDATION_METRIC: math.nan}
    for name in dict.fromkeys(["", *names]):
        metrics |= _means(total | sums, name)
    return metrics


def _means(sums: Mapping[str, float], name: str) -> dict[str, float]:
    means = {}
    if sums["targets" + name]:
        means[VALIDATION_METRIC + name] = sums["loss" + name] / sums["targets" + name]
    if sums["answers" + name]:
        means[ACCURACY_METRIC + name] = sums["right" + name] / sums["answers" + name]
    return means
