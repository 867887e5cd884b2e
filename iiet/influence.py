"""Influence: how much each correction of each layer matters, measured on a calibration set.

In: a decoder and batches of tokens. Out: for each layer and correction its influence, with its
standard error over batches, and its residual, whose decline says how well the iteration contracts;
and for each layer its block influence, by which whole layers are dropped (`iiet.dropping`).
Two metrics compare consecutive evaluations of a layer and cost one forward per batch. The third,
`loss`, ends layers early, one correction at a time: it costs one forward per correction and
measures what pruning does to the loss.

Evaluations are compared as the decoder makes them, so only the last output is kept in memory beside
the pass itself. An accumulator holds a few hundred numbers per batch and sums them with
`math.fsum`, whose result does not depend on the order. So any number of workers, merged in any
order, give a bitwise equal table. Source: this project.
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
from iiet.loss_metrics import cross_entropy_and_accuracy
from iiet.methods import Evaluation
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceAccumulator", "InfluenceMetric", "InfluenceTable", "influence_table"]

BatchLike = Batch | Tensor | Mapping[str, Tensor]
"""A batch; or the tokens of text, (batch, time) of integers; or a mapping with these as `input_ids`
and an `attention_mask` of the same shape, false for padding, which is then ignored."""


@dataclass(frozen=True)
class _BatchMeans:
    """Means over one batch."""

    num_tokens: int
    values: Rows
    residuals: Rows
    layers: tuple[float, ...]
    accuracy_lost: Rows = ()


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
        """Measure one batch at the positions that count; for `loss`, at those with a target.

        Args:
            decoder: measured under its own iteration schedule.
            batch: tokens and targets, or text, perhaps with a mask of its padding.

        Raises:
            ValueError: the batch does not have two axes, or has nothing to measure: no tokens, or
                no targets for the metric `loss`; or the decoder's method repeats the stack.
        """
        if decoder.method.repeats_stack:
            raise ValueError(
                f"method {decoder.config.method!r} repeats the whole stack, so no layer has "
                "corrections of its own whose influence could be measured"
            )
        known, attention_mask = _as_batch(batch, decoder.device)
        counted = _counted(known, self.metric)
        num_tokens = int(counted.sum())
        if num_tokens == 0:
            shape = tuple(known.input_ids.shape)
            raise ValueError(f"a batch of shape {shape} holds nothing to measure")
        compare = _COMPARISONS.get(self.metric)
        observer = _Comparing(decoder.schedule, counted, num_tokens, compare)
        accuracy_lost: Rows = ()
        if compare is None:
            values, accuracy_lost = _costs_of_stopping(decoder, known, attention_mask, observer)
        else:  # Without logits, which would need more memory than everything else.
            observer.run(decoder, known.input_ids, attention_mask)
            values = _numbers(observer.values)
        residuals, (layers,) = _numbers(observer.residuals), _numbers([observer.layers])
        lost = () if known.is_text else accuracy_lost
        self.batches.append(_BatchMeans(num_tokens, values, residuals, layers, lost))

    def merge(self, other: InfluenceAccumulator) -> None:
        """Add the batches that another worker measured with the same decoder and metric.

        Raises:
            ValueError: the metrics or the schedules differ.
        """
        if other.metric != self.metric:
            raise ValueError(f"cannot merge influence {other.metric!r} into {self.metric!r}")
        shapes = {tuple(map(len, batch.values)) for batch in (*self.batches, *other.batches)}
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
        values, errors = _means_and_errors([batch.values for batch in self.batches], counts)
        residuals, _ = _means_and_errors([batch.residuals for batch in self.batches], counts)
        (layers,), _ = _means_and_errors([(batch.layers,) for batch in self.batches], counts)
        # In a mixture, some batches are text, which has no accuracy.
        answers = [batch for batch in self.batches if batch.accuracy_lost]
        lost, _ = _means_and_errors(
            [batch.accuracy_lost for batch in answers], [batch.num_tokens for batch in answers]
        )
        return InfluenceTable(self.metric, values, errors, sum(counts), residuals, layers, lost)


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

    The block influence of a layer is `1 - cos(h_{l-1}, h_l)` with each metric. `loss` also measures
    the accuracy that is lost, unless the batches are text.

    Args:
        decoder: measured under its own iteration schedule, in the precision of the surrounding
            autocast; the comparisons themselves are made in float64, a sequence at a time.
        batches: the calibration set, each item a `BatchLike`; a single tensor is one batch.
        metric: which of the three.
        progress: called after each batch with the number of batches done.

    Returns:
        The table, with one row per layer; rows are empty where a method makes no corrections.

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


def _as_batch(batch: BatchLike, device: torch.device) -> tuple[Batch, Tensor | None]:
    """Return the batch and its attention mask (None: no padding), both on the device."""
    if isinstance(batch, Batch):
        return batch.to(device), None
    attention_mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    text = Batch.of_text(batch["input_ids"] if isinstance(batch, Mapping) else batch).to(device)
    if attention_mask is None:
        return text, None
    # Padding does not count, neither as a position nor as the target of the one before it.
    is_real = attention_mask.to(device).bool()
    padded = replace(text, mask=is_real)
    targets = text.targets.masked_fill(~is_real.roll(-1, dims=1), NO_TARGET)
    return replace(padded, targets=targets), is_real


def _counted(batch: Batch, metric: InfluenceMetric) -> Tensor:
    """Return the positions that the means run over, (batch, time) of bool."""
    if metric != "loss":
        return torch.ones_like(batch.targets).bool() if batch.taught is None else batch.taught
    return batch.counted


class _Comparing:
    """Observer of a pass: compares each evaluation with the one before it, and keeps only means."""

    def __init__(
        self,
        schedule: IterationSchedule,
        counted: Tensor,
        num_tokens: int,
        compare: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        self.values: list[list[Tensor]] = [[] for _ in schedule]
        self.residuals: list[list[Tensor]] = [[] for _ in schedule]
        self.layers: list[Tensor] = []
        self._schedule, self._counted, self._num_tokens = schedule, counted, num_tokens
        self._compare = compare
        self._previous: Tensor | None = None

    def run(self, decoder: Decoder, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Run the decoder's layers under this observer; return the last hidden state."""
        before: Tensor = decoder.embedding(input_ids)
        for after in decoder.hidden_states(before, attention_mask=attention_mask, observe=self):
            self.layers.append(self._mean(_cosine_distance, before, after))
            before = after
        return before

    def __call__(self, seen: Evaluation) -> None:
        if self._compare is not None and 1 <= seen.k <= self._schedule[seen.layer]:
            assert self._previous is not None
            change = self._mean(self._compare, self._previous, seen.output)
            self.values[seen.layer].append(change)
        self._previous = seen.output
        if seen.residual is not None and seen.estimate is not None:
            size = self._mean(_relative_size, seen.residual, seen.estimate)
            self.residuals[seen.layer].append(size)

    def _mean(self, measure: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
        """Average a measure of two tensors, (batch, time, dim), over the positions that count."""
        # In float64, because float32 keeps few digits of a cosine's distance from one.
        sums = [
            torch.where(counted, measure(one.double(), other.double()), 0.0).sum()
            for one, other, counted in zip(a, b, self._counted, strict=True)
        ]
        return torch.stack(sums).sum() / self._num_tokens


def _cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    # Half the squared distance of the directions is 1 - cos, and never rounds to below zero.
    turn = functional.normalize(after, dim=-1) - functional.normalize(before, dim=-1)
    return turn.square().sum(-1) / 2


def _relative_change(before: Tensor, after: Tensor) -> Tensor:
    return _relative_size(after - before, after)


def _relative_size(part: Tensor, whole: Tensor) -> Tensor:
    ratio: Tensor = part.square().sum(-1) / whole.square().sum(-1)
    return ratio.sqrt()


_COMPARISONS = {"cosine": _cosine_distance, "relative": _relative_change}


def _costs_of_stopping(
    decoder: Decoder, batch: Batch, attention_mask: Tensor | None, observer: _Comparing
) -> tuple[Rows, Rows]:
    """Compare each layer stopped before each of its corrections with the full schedule.

    Returns:
        The rises of the loss, and the accuracies lost.
    """
    sequences = replace(batch, target_count=None).split(1)
    counts = [sequence.num_targets for sequence in sequences]

    def loss_and_accuracy(logits: Tensor) -> tuple[float, ...]:
        # In float64, because rises are small beside the loss; by sequence, to spare memory.
        found = [
            cross_entropy_and_accuracy(ours[None].double(), sequence)
            for ours, sequence in zip(logits, sequences, strict=True)
        ]
        return tuple(
            math.fsum(n * each.item() for n, each in zip(counts, means, strict=True)) / sum(counts)
            for means in zip(*found, strict=True)
        )

    def stopped(layer: int, corrections: int) -> tuple[float, ...]:
        schedule = full.with_layer(layer, corrections)
        return loss_and_accuracy(
            decoder(batch.input_ids, schedule=schedule, attention_mask=attention_mask)
        )

    full = decoder.schedule
    full_loss, full_accuracy = loss_and_accuracy(
        decoder.logits(observer.run(decoder, batch.input_ids, attention_mask))
    )
    measured = [[stopped(layer, i) for i in range(count)] for layer, count in enumerate(full)]
    return (
        tuple(tuple(loss - full_loss for loss, _ in row) for row in measured),
        tuple(tuple(full_accuracy - accuracy for _, accuracy in row) for row in measured),
    )


def _means_and_errors(of_batches: Sequence[Rows], counts: Sequence[int]) -> tuple[Rows, Rows]:
    """Average the batches' rows, and estimate how far each mean may be off."""
    cells = [
        [_mean_and_error(means, counts) for means in zip(*rows, strict=True)]
        for rows in zip(*of_batches, strict=True)
    ]
    return (
        tuple(tuple(mean for mean, _ in row) for row in cells),
        tuple(tuple(error for _, error in row) for row in cells),
    )


def _mean_and_error(means: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Weigh batch means by their tokens; the error is that of a weighted mean over batches."""
    total = sum(counts)
    mean = math.fsum(m * n for m, n in zip(means, counts, strict=True)) / total
    if len(means) == 1:
        return mean, math.nan
    squares = math.fsum((n * (m - mean)) ** 2 for m, n in zip(means, counts, strict=True))
    return mean, math.sqrt(squares * len(means) / (len(means) - 1)) / total


def _numbers(rows: Sequence[Sequence[Tensor]]) -> Rows:
    """Read tensors of one number each."""
    numbers = iter(torch.stack([n for row in rows for n in row]).tolist() if any(rows) else ())
    return tuple(tuple(next(numbers) for _ in row) for row in rows)
