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
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from iiet.decoder import Decoder
from iiet.influence_values import InfluenceMetric, InfluenceTable, Rows, checked_metric
from iiet.losses import next_token_loss
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceAccumulator", "InfluenceMetric", "InfluenceTable", "influence_table"]


Batch = Tensor | Mapping[str, Tensor]
"""Tokens, (batch, time) of integers; or a mapping with these as `input_ids` and an `attention_mask`
of the same shape, false for padding, which then does not exist."""


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
    def add(self, decoder: Decoder, batch: Batch) -> None:
        """Measure one batch.

        Args:
            decoder: measured under its own iteration schedule.
            batch: tokens, and perhaps which of them are padding.

        Raises:
            ValueError: the batch has no two axes, or nothing to measure: no tokens, or none to
                predict with the metric `loss`.
        """
        input_ids, is_real = _tokens_of(batch, decoder.device)
        counted = is_real
        if self.metric == "loss":  # Tokens that are predicted, from one that is there.
            counted = is_real & is_real.roll(1, dims=1)
            counted[:, :1] = False
        num_tokens = int(counted.sum())
        if num_tokens == 0:
            raise ValueError(f"a batch of shape {tuple(input_ids.shape)} holds nothing to measure")
        if self.metric == "loss":
            rows = _rises_of_loss(decoder, input_ids, is_real, counted)
        else:
            rows = _comparisons(decoder, input_ids, is_real, _COMPARISONS[self.metric])
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
    batches: Iterable[Batch],
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
        batches: the calibration set, (batch, time) of integers each, or mappings that say what is
            padding; a lone tensor is one batch.
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


def _tokens_of(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of a batch, and which are real, both (batch, time) on the device."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    input_ids = batch["input_ids"] if isinstance(batch, Mapping) else batch
    mask = torch.ones_like(input_ids) if mask is None else mask
    if input_ids.ndim != 2 or mask.shape != input_ids.shape:
        raise ValueError(
            f"a batch is (batch, time), and its mask alike; got {tuple(input_ids.shape)} and "
            f"{tuple(mask.shape)}"
        )
    return input_ids.to(device), mask.to(device).bool()


def _comparisons(
    decoder: Decoder,
    input_ids: Tensor,
    is_real: Tensor,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Rows:
    """Compare consecutive evaluations of each layer, averaged over the batch's tokens."""
    outputs = decoder.evaluations(input_ids, attention_mask=is_real)
    rows: list[tuple[float, ...]] = []
    for layer, num_corrections in enumerate(decoder.schedule):
        row: list[float] = []
        for i in range(1, num_corrections + 1):
            # In float64: of a cosine near one, float32 leaves few digits of the difference.
            before, after = outputs[layer, i - 1].double(), outputs[layer, i].double()
            row.append(compare(before, after)[is_real].mean().item())
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


def _rises_of_loss(decoder: Decoder, input_ids: Tensor, is_real: Tensor, is_target: Tensor) -> Rows:
    """Measure the loss with each layer stopped before each of its corrections, against full."""
    counts: list[int] = is_target.sum(-1).tolist()

    def loss(schedule: IterationSchedule) -> float:
        logits = decoder(input_ids, schedule=schedule, attention_mask=is_real)
        # In float64, because rises are small beside the loss; by sequence, to spare memory.
        losses = [
            next_token_loss(ours[None].double(), tokens[None], mask=targets[None]).item()
            for ours, tokens, targets in zip(logits, input_ids, is_target, strict=True)
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
