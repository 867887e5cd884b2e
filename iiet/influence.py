"""Influence: how much each correction of each layer matters, measured on a calibration set.

In: a decoder and batches of tokens. Out: for each layer and correction its influence, with its
standard error over batches, and its residual, whose decline says how well the iteration contracts;
and for each layer its block influence, by which whole layers can be dropped.
What counts as influence is a metric's business (`iiet.influence_metrics`).

Evaluations are compared as the decoder makes them, so only the last output is kept in memory beside
the pass itself. Means over batches are made by `math.fsum`, so they do not depend on the order.
Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.influence_metrics import INFLUENCE_METRICS, BatchInfluence, MeasuredBatch
from iiet.pruning import InfluenceTable, Rows

__all__ = ["influence_table"]


BatchLike = Batch | Tensor


def influence_table(
    decoder: Decoder,
    batches: BatchLike | Iterable[BatchLike],
    *,
    metric: str = "cosine",
    progress: Callable[[int], None] | None = None,
) -> InfluenceTable:
    """Measure the influence of every correction of a decoder.

    With `y(i)` the output of a layer's evaluation i (0 is the prediction), as means over tokens:

        cosine     1 - cos(y(i-1), y(i))
        relative   |y(i) - y(i-1)| / |y(i)|
        loss       rise of the loss when the layer stops after i-1 corrections, all else full

    The block influence of a layer is `1 - cos(h_{l-1}, h_l)` with each metric. `loss` also measures
    the accuracy that is lost, unless the batches are text.

    Args:
        decoder: measured under its own iteration schedule, in the precision of the surrounding
            autocast; the comparisons themselves are made in float64, a sequence at a time.
        batches: the calibration set; text may be its tokens, (batch, time). Or a single batch.
        metric: a key of `iiet.INFLUENCE_METRICS`.
        progress: called after each batch with the number of batches done.

    Returns:
        The table, with one row per layer; rows are empty where a method makes no corrections.

    Raises:
        ValueError: an unknown or broken metric; no batches, or one with nothing to measure; the
            decoder's method repeats the stack.
    """
    if metric not in INFLUENCE_METRICS:
        raise ValueError(f"metric must be one of {tuple(INFLUENCE_METRICS)}, got {metric!r}")
    if decoder.method.repeats_stack:
        raise ValueError(
            f"method {decoder.config.method!r} repeats the whole stack, so no layer has "
            "corrections of its own whose influence could be measured"
        )
    if isinstance(batches, Batch) or (isinstance(batches, Tensor) and batches.ndim == 2):
        batches = [batches]
    measured: list[tuple[MeasuredBatch, BatchInfluence]] = []
    for done, batch in enumerate(batches, start=1):
        measured.append(_measure(decoder, batch, metric))
        if progress is not None:
            progress(done)
    if not measured:
        raise ValueError("no batch was measured; the influence needs at least one")
    counts = [batch.num_tokens for batch, _ in measured]
    values, errors = _means_and_errors([found.values for _, found in measured], counts)
    residuals, _ = _means_and_errors([batch.residuals for batch, _ in measured], counts)
    (layers,), _ = _means_and_errors([(batch.layer_values,) for batch, _ in measured], counts)
    # In a mixture, some batches are text, which has no accuracy: its targets are not answers.
    answers = [each for each in measured if not each[0].batch.is_text]
    lost, _ = _means_and_errors(
        [found.accuracy_lost for _, found in answers], [batch.num_tokens for batch, _ in answers]
    )
    return InfluenceTable(metric, values, errors, sum(counts), residuals, layers, lost)


@torch.no_grad()
def _measure(decoder: Decoder, given: BatchLike, name: str) -> tuple[MeasuredBatch, BatchInfluence]:
    metric = INFLUENCE_METRICS[name]()
    batch = (given if isinstance(given, Batch) else Batch.of_text(given)).to(decoder.device)
    measured = MeasuredBatch(decoder, batch, needs_targets=metric.needs_targets)
    if measured.num_tokens == 0:
        shape = tuple(batch.input_ids.shape)
        raise ValueError(f"a batch of shape {shape} holds nothing to measure")
    found = metric.measure(measured)
    if tuple(map(len, found.values)) != tuple(decoder.schedule):
        raise ValueError(
            f"the influence metric {name!r} must return a value for each correction of "
            f"the schedule {decoder.schedule}, got {found.values!r}"
        )
    if not measured.layer_values:
        measured.run()
    return measured, found


def _means_and_errors(of_batches: Sequence[Rows], counts: Sequence[int]) -> tuple[Rows, Rows]:
    """Average the batches' rows by their tokens, and estimate how far each mean may be off."""
    total, num_batches = sum(counts), len(counts)

    def mean_and_error(cells: Sequence[float]) -> tuple[float, float]:
        mean = math.fsum(m * n for m, n in zip(cells, counts, strict=True)) / total
        if num_batches == 1:
            return mean, math.nan
        squares = math.fsum((n * (m - mean)) ** 2 for m, n in zip(cells, counts, strict=True))
        return mean, math.sqrt(squares * num_batches / (num_batches - 1)) / total

    table = [
        list(map(mean_and_error, zip(*rows, strict=True))) for rows in zip(*of_batches, strict=True)
    ]
    means, errors = (tuple(tuple(cell[i] for cell in row) for row in table) for i in (0, 1))
    return means, errors
