"""Influence: how much each correction of each layer matters, measured on a calibration set.

In: a decoder and batches of tokens. Out: for each layer and correction its influence, with its
standard error over batches, and its residual, whose decline says how well the iteration contracts;
and for each layer its block influence, by which whole layers can be dropped.

A *metric* says what makes a correction matter. It gets a batch and the decoder, and returns one
value per layer and correction. `cosine` and `relative` compare consecutive evaluations of a layer
as the decoder makes them, or where corrections are damped what they leave, in one forward pass that
keeps only the last output. `loss` ends layers early, one correction at a time: one forward pass per
correction. Other packages add metrics by entry points of the group `iiet.influence_metrics`.

Means over batches are made by `math.fsum`, so they do not depend on the order.
Source: this project.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iiet import facts
from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.extensions import ExtensionTable
from iiet.facts import MetricFacts, metric_facts_of
from iiet.losses import cross_entropy_and_accuracy
from iiet.methods import Evaluation
from iiet.pruning import InfluenceTable, Rows

__all__ = [
    "INFLUENCE_METRICS",
    "BatchInfluence",
    "Comparison",
    "InfluenceMetric",
    "MeasuredBatch",
    "influence_table",
]

Compare = Callable[[Tensor, Tensor], Tensor]
"""Two outputs of evaluations, (time, dim) in float64 -> a number per position, (time,)."""


class BatchInfluence(NamedTuple):
    """What a metric finds in one batch."""

    values: Rows
    """Influence per layer and correction, as means over the positions that count."""
    accuracy_lost: Rows = ()
    """What stopping a layer before each correction costs in accuracy; empty if not measured."""


class MeasuredBatch:
    """A batch, and the decoder that is measured on it under its own iteration schedule."""

    def __init__(self, decoder: Decoder, batch: Batch, *, needs_targets: bool) -> None:
        self.decoder = decoder
        self.batch = batch
        counted = batch.counted if needs_targets else batch.teacher_mask
        self.counted = torch.ones_like(batch.targets).bool() if counted is None else counted
        """Positions that the means run over, (batch, time) of bool."""
        self.num_tokens = int(self.counted.sum())
        """How many these are."""
        self.residuals: Rows = ()
        """Relative residual of each correction, after `run`."""
        self.layer_values: tuple[float, ...] = ()
        """Block influence of each layer, after `run`."""

    def run(self, compare: Compare | None = None) -> tuple[Tensor, Rows]:
        """Run the layers under the full schedule.

        Logits are not computed: they would need more memory than everything else.

        Args:
            compare: Called for each sequence with the outputs of two consecutive evaluations of a
                layer, or its estimates at two levels, (time, dim) in float64; returns a number for
                each position, (time,).

        Returns:
            The last hidden state, (batch, time, dim); and for each layer and correction the mean of
            `compare` over the positions that count.
        """
        schedule = self.decoder.schedule
        values: list[list[Tensor]] = [[] for _ in schedule]
        residuals: list[list[Tensor]] = [[] for _ in schedule]
        layers: list[Tensor] = []
        previous: Tensor | None = None  # The last output is all that is kept.

        def observe(seen: Evaluation) -> None:
            nonlocal previous
            if compare is not None and schedule[seen.layer] > 0:
                output = seen.output if seen.output_if_last is None else seen.output_if_last()
                if seen.k > 0:
                    assert previous is not None
                    values[seen.layer].append(self.mean(compare, previous, output))
                previous = output
            if seen.residual is not None and seen.estimate is not None:
                size = self.mean(_relative_size, seen.residual, seen.estimate)
                residuals[seen.layer].append(size)

        before: Tensor = self.decoder.model.embed_tokens(self.batch.input_ids)
        for after in self.decoder.hidden_states(before, observe=observe):
            layers.append(self.mean(_cosine_distance, before, after))
            before = after
        self.residuals = _numbers(residuals)
        [self.layer_values] = _numbers([layers])
        return before, _numbers(values)

    def mean(self, measure: Compare, a: Tensor, b: Tensor) -> Tensor:
        """Average a measure of two tensors, (batch, time, dim), over the positions that count."""
        # In float64, because float32 keeps few digits of a cosine's distance from one; by sequence,
        # to spare memory.
        sums = [
            torch.where(counted, measure(sequence_a.double(), sequence_b.double()), 0.0).sum()
            for sequence_a, sequence_b, counted in zip(a, b, self.counted, strict=True)
        ]
        return torch.stack(sums).sum() / self.num_tokens


class InfluenceMetric(ABC):
    """Base of all metrics."""

    facts: ClassVar[MetricFacts] = MetricFacts()
    """What is known of the metric beside its formula."""

    @abstractmethod
    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        """Measure one batch; called without gradients.

        The values of all batches are averaged, weighted by the positions that count.
        """


class Comparison(InfluenceMetric):
    """Base of the metrics that compare consecutive evaluations of a layer: one forward pass."""

    @abstractmethod
    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        """Compare two outputs of a layer, (time, dim) in float64; return (time,)."""

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        return BatchInfluence(measured.run(self.compare)[1])


class Cosine(Comparison):
    """`1 - cos(y(i-1), y(i))` of consecutive outputs y of a layer."""

    facts = metric_facts_of("cosine")

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return _cosine_distance(before, after)


class Relative(Comparison):
    """`|y(i) - y(i-1)| / |y(i)|` of consecutive outputs y of a layer."""

    facts = metric_facts_of("relative")

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return _relative_size(after - before, after)


class LossRise(InfluenceMetric):
    """Rise of the loss when a layer stops before the correction, all other layers full."""

    facts = metric_facts_of("loss")

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        decoder = measured.decoder
        batch = measured.batch
        full = measured.decoder.schedule
        sequences = replace(batch, target_count=None).split(1)
        counts = [sequence.num_targets for sequence in sequences]

        def loss_and_accuracy(logits: Tensor) -> tuple[float, float]:
            """Return the means over all targets, of which each sequence has its own number."""
            losses: list[float] = []
            accuracies: list[float] = []
            # In float64, because rises are small beside the loss; by sequence, to spare memory.
            for sequence_logits, sequence in zip(logits, sequences, strict=True):
                means = cross_entropy_and_accuracy(sequence_logits[None].double(), sequence)
                losses.append(means[0].item())
                accuracies.append(means[1].item())
            return _weighted_mean(losses, counts), _weighted_mean(accuracies, counts)

        full_loss, full_accuracy = loss_and_accuracy(decoder.logits(measured.run()[0]))
        loss_rises: list[tuple[float, ...]] = []
        accuracies_lost: list[tuple[float, ...]] = []
        for layer, num_corrections in enumerate(full):
            stopped = [
                loss_and_accuracy(decoder(batch.input_ids, schedule=full.with_layer(layer, kept)))
                for kept in range(num_corrections)
            ]
            loss_rises.append(tuple(loss - full_loss for loss, _ in stopped))
            accuracies_lost.append(tuple(full_accuracy - accuracy for _, accuracy in stopped))
        return BatchInfluence(tuple(loss_rises), tuple(accuracies_lost))


INFLUENCE_METRICS: ExtensionTable[type[InfluenceMetric]] = facts.INFLUENCE_METRICS
"""All influence metrics by name."""


BatchLike = Batch | Tensor


def influence_table(
    decoder: Decoder,
    batches: BatchLike | Iterable[BatchLike],
    *,
    metric: str = "cosine",
    progress: Callable[[int], None] | None = None,
) -> InfluenceTable:
    """Measure the influence of every correction of a decoder.

    With `y(i)` the output of a layer's evaluation i (0 is the prediction), or where corrections are
    damped the estimate that the layer has after it, as means over tokens:

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
    if decoder.method.facts.repeats_stack:
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
    values, errors = _means_and_errors([influence.values for _, influence in measured], counts)
    residuals, _ = _means_and_errors([batch.residuals for batch, _ in measured], counts)
    [layer_values], _ = _means_and_errors([(batch.layer_values,) for batch, _ in measured], counts)
    # In a mixture, some batches are text, which has no accuracy: its targets are not answers.
    of_answers = [(batch, influence) for batch, influence in measured if not batch.batch.is_text]
    accuracy_lost, _ = _means_and_errors(
        [influence.accuracy_lost for _, influence in of_answers],
        [batch.num_tokens for batch, _ in of_answers],
    )
    return InfluenceTable(
        metric=metric,
        value_rows=values,
        error_rows=errors,
        num_tokens=sum(counts),
        residual_rows=residuals,
        layer_values=layer_values,
        accuracy_lost_rows=accuracy_lost,
    )


@torch.no_grad()
def _measure(
    decoder: Decoder, batch_or_ids: BatchLike, name: str
) -> tuple[MeasuredBatch, BatchInfluence]:
    metric = INFLUENCE_METRICS[name]()
    batch = batch_or_ids if isinstance(batch_or_ids, Batch) else Batch.of_text(batch_or_ids)
    batch = batch.to(decoder.device)
    measured = MeasuredBatch(decoder, batch, needs_targets=metric.facts.needs_targets)
    if measured.num_tokens == 0:
        shape = tuple(batch.input_ids.shape)
        raise ValueError(f"a batch of shape {shape} holds nothing to measure")
    influence = metric.measure(measured)
    if tuple(map(len, influence.values)) != tuple(decoder.schedule):
        raise ValueError(
            f"the influence metric {name!r} must return a value for each correction of "
            f"the schedule {decoder.schedule}, got {influence.values!r}"
        )
    if not measured.layer_values:  # The metric itself did not run the layers.
        measured.run()
    return measured, influence


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(m * n for m, n in zip(values, weights, strict=True)) / sum(weights)


def _means_and_errors(of_batches: Sequence[Rows], counts: Sequence[int]) -> tuple[Rows, Rows]:
    """Average the batches' rows by their tokens, and estimate how far each mean may be off."""
    num_batches = len(counts)
    means: list[tuple[float, ...]] = []
    errors: list[tuple[float, ...]] = []
    for rows in zip(*of_batches, strict=True):  # The batches' rows of one layer.
        row_means: list[float] = []
        row_errors: list[float] = []
        for cells in zip(*rows, strict=True):  # The batches' values of one correction.
            mean = _weighted_mean(cells, counts)
            error = math.nan
            if num_batches > 1:
                deviations = (n * (m - mean) for m, n in zip(cells, counts, strict=True))
                squares = math.fsum(deviation**2 for deviation in deviations)
                error = math.sqrt(squares * num_batches / (num_batches - 1)) / sum(counts)
            row_means.append(mean)
            row_errors.append(error)
        means.append(tuple(row_means))
        errors.append(tuple(row_errors))
    return tuple(means), tuple(errors)


def _cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    # Half the squared distance of the directions is 1 - cos, and never rounds to below zero.
    turn = functional.normalize(after, dim=-1) - functional.normalize(before, dim=-1)
    return turn.square().sum(-1) / 2


def _relative_size(part: Tensor, whole: Tensor) -> Tensor:
    ratio: Tensor = part.square().sum(-1) / whole.square().sum(-1)
    return ratio.sqrt()


def _numbers(rows: Sequence[Sequence[Tensor]]) -> Rows:
    """Read tensors of one number each, in one copy from the device."""
    tensors = [number for row in rows for number in row]
    numbers = iter(torch.stack(tensors).tolist() if tensors else ())
    return tuple(tuple(next(numbers) for _ in row) for row in rows)
