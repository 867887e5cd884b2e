"""Influence: how much each correction of each layer matters, measured on a calibration set.

In: a decoder and batches of tokens. Out: one number per layer and correction, with its standard
error over batches. Two metrics compare consecutive evaluations of a layer and cost one forward per
batch; the third removes one correction at a time and costs one forward per correction, but measures
what one really wants to know.

An accumulator keeps one row set per batch, a few hundred numbers, and sums them with `math.fsum`,
whose result does not depend on the order. So any number of workers, merged in any order, give the
same table to the last bit. Source: definitions of DESIGN's section 3; this project.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from iiet.batch import NO_TARGET, Batch
from iiet.decoder import Decoder
from iiet.influence_values import InfluenceMetric, InfluenceTable, Rows, checked_metric
from iiet.losses import batch_cross_entropy
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceAccumulator", "InfluenceMetric", "InfluenceTable", "influence_table"]


BatchLike = Batch | Tensor | Mapping[str, Tensor]
"""A batch; or the tokens of text, (batch, time) of integers; or a mapping with these as `input_ids`
and an `attention_mask` of the same shape, false for padding, which then does not exist."""


@dataclass(frozen=True)
class _BatchMeans:
    """What one batch contributes."""

    num_tokens: int
    rows: Rows


@dataclass
class InfluenceAccumulator:
    """Influence of the batches seen so far; those of several workers can be merged.

    Raises:
        ValueError: an unknown metric.
    """

    metric: InfluenceMetric
    """What to measure."""
    batches: list[_BatchMeans] = field(default_factory=list)
    """One entry per batch."""

    def __post_init__(self) -> None:
        checked_metric(self.metric)

    @torch.no_grad()
    def add(self, decoder: Decoder, batch: BatchLike) -> None:
        """Measure one batch at the positions that count; at those with a target for `loss`.

        Args:
            decoder: measured under its own iteration schedule.
            batch: its tokens and targets, or text, and perhaps which tokens are padding.

        Raises:
            ValueError: the batch has no two axes, or nothing to measure: no tokens, or none to
                predict with the metric `loss`.
        """
        chosen, attention_mask = _opened(batch, decoder.device)
        num_tokens = chosen.num_targets if self.metric == "loss" else chosen.num_positions
        if num_tokens == 0:
            shape = tuple(chosen.input_ids.shape)
            raise ValueError(f"a batch of shape {shape} holds nothing to measure")
        if self.metric == "loss":
            rows = _rises_of_loss(decoder, chosen, attention_mask)
        else:
            rows = _comparisons(decoder, chosen, attention_mask, _COMPARISONS[self.metric])
        self.batches.append(_BatchMeans(num_tokens, rows))

    def merge(self, other: InfluenceAccumulator) -> None:
        """Take over what another worker measured with the same decoder and metric.

        Raises:
            ValueError: the metrics or the schedules differ.
        """
        if other.metric != self.metric:
            raise ValueError(f"cannot merge influence {other.metric!r} into {self.metric!r}")
        shapes = {tuple(map(len, batch.rows)) for batch in (*self.batches, *other.batches)}
        if len(shapes) > 1:
            raise ValueError(f"cannot merge influence under different schedules: {sorted(shapes)}")
        self.batches.extend(other.batches)

    def table(self) -> InfluenceTable:
        """Compute the means over tokens, and their standard errors over batches.

        Raises:
            ValueError: no batch was added.
        """
        if not self.batches:
            raise ValueError("no batch was measured; the influence needs at least one")
        counts = [batch.num_tokens for batch in self.batches]
        values: list[tuple[float, ...]] = []
        errors: list[tuple[float, ...]] = []
        for layer in range(len(self.batches[0].rows)):
            cells = zip(*(batch.rows[layer] for batch in self.batches), strict=True)
            pairs = [_mean_and_error(means, counts) for means in cells]
            values.append(tuple(mean for mean, _ in pairs))
            errors.append(tuple(error for _, error in pairs))
        return InfluenceTable(self.metric, tuple(values), tuple(errors), sum(counts))


def influence_table(
    decoder: Decoder,
    batches: Iterable[BatchLike],
    *,
    metric: InfluenceMetric = "cosine",
    progress: Callable[[int], None] | None = None,
) -> InfluenceTable:
    """Measure the influence of every correction of a decoder.

    With `y(i)` the output of a layer's evaluation i (0 is the prediction), as means over tokens:

        cosine     1 - cos(y(i-1), y(i))
        relative   |y(i) - y(i-1)| / |y(i)|
        loss       rise of the loss when the layer stops after i-1 corrections, all else full

    Args:
        decoder: measured under its own iteration schedule, in the precision of the surrounding
            autocast; the comparisons themselves are made in float64.
        batches: the calibration set: batches, whose masks are obeyed, or text, (batch, time) of
            integers each, or mappings that say what is padding; a lone tensor is one batch.
        metric: which of the three.
        progress: called after each batch with the number of batches done.

    Returns:
        The table, with one row per layer; rows are empty where a method makes no corrections. It
        unpacks into two arrays of (layers, corrections), values and their standard errors, with NaN
        where a layer makes no such correction.

    Raises:
        ValueError: an unknown metric, or no batches.
    """
    accumulator = InfluenceAccumulator(metric)
    if isinstance(batches, Tensor) and batches.ndim == 2:
        batches = [batches]
    for done, batch in enumerate(batches, start=1):
        accumulator.add(decoder, batch)
        if progress is not None:
            progress(done)
    return accumulator.table()


def _opened(batch: BatchLike, device: torch.device) -> tuple[Batch, Tensor | None]:
    """Return a batch of any form, and which of its tokens are no padding, both on the device."""
    if isinstance(batch, Batch):
        return batch.to(device), None
    attention_mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    text = Batch.of_text(batch["input_ids"] if isinstance(batch, Mapping) else batch).to(device)
    if attention_mask is None:
        return text, None
    # Padding is no position, and no target of the one before it; the last one has none anyway.
    is_real = attention_mask.to(device).bool()
    padded = replace(text, mask=is_real)
    targets = text.targets.masked_fill(~is_real.roll(-1, dims=1), NO_TARGET)
    return replace(padded, targets=targets), is_real


def _comparisons(
    decoder: Decoder,
    batch: Batch,
    attention_mask: Tensor | None,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Rows:
    """Compare consecutive evaluations of each layer, averaged over the batch's positions."""
    outputs = decoder.evaluations(batch.input_ids, attention_mask=attention_mask)
    counted = slice(None) if batch.taught is None else batch.taught
    rows: list[tuple[float, ...]] = []
    for layer, num_corrections in enumerate(decoder.schedule):
        row: list[float] = []
        for i in range(1, num_corrections + 1):
            # In float64: of a cosine near one, float32 leaves few digits of the difference.
            before, after = outputs[layer, i - 1].double(), outputs[layer, i].double()
            row.append(compare(before, after)[counted].mean().item())
        rows.append(tuple(row))
    return tuple(rows)


def _cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    # Half the squared distance of the directions is 1 - cos, and never rounds to below zero.
    turn = functional.normalize(after, dim=-1) - functional.normalize(before, dim=-1)
    return turn.square().sum(-1) / 2


def _relative_change(before: Tensor, after: Tensor) -> Tensor:
    change: Tensor = (after - before).square().sum(-1) / after.square().sum(-1)
    return change.sqrt()


_COMPARISONS = {"cosine": _cosine_distance, "relative": _relative_change}


def _rises_of_loss(decoder: Decoder, batch: Batch, attention_mask: Tensor | None) -> Rows:
    """Measure the loss with each layer stopped before each of its corrections, against full."""
    sequences = replace(batch, target_count=None).split(1)
    counts = [sequence.num_targets for sequence in sequences]

    def loss(schedule: IterationSchedule) -> float:
        logits = decoder(batch.input_ids, schedule=schedule, attention_mask=attention_mask)
        # In float64, because rises are small beside the loss; by sequence, to spare memory.
        losses = [
            batch_cross_entropy(ours[None].double(), sequence).item()
            for ours, sequence in zip(logits, sequences, strict=True)
        ]
        return math.fsum(n * each for n, each in zip(counts, losses, strict=True)) / sum(counts)

    full = decoder.schedule
    full_loss = loss(full)
    return tuple(
        tuple(loss(full.with_layer(layer, i)) - full_loss for i in range(count))
        for layer, count in enumerate(full)
    )


def _mean_and_error(means: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Weigh batch means by their tokens; the error is that of a weighted mean over batches."""
    total = sum(counts)
    mean = math.fsum(m * n for m, n in zip(means, counts, strict=True)) / total
    if len(means) == 1:
        return mean, math.nan
    squares = math.fsum((n * (m - mean)) ** 2 for m, n in zip(means, counts, strict=True))
    return mean, math.sqrt(squares * len(means) / (len(means) - 1)) / total
