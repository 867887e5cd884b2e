"""Influence metrics: what makes a correction matter. Cosine, relative change, and rise of the loss.

A metric gets a batch and the decoder, and returns one value per layer and correction. Two of the
metrics compare consecutive evaluations of a layer and cost one forward pass. The third, `loss`,
ends layers early, one correction at a time: one forward pass per correction. Other packages add
metrics by entry points of the group `iiet.influence_metrics`. Source: this project.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iiet import extensions
from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.extensions import ExtensionTable
from iiet.facts import LossRiseFacts, MetricFacts
from iiet.losses import cross_entropy_and_accuracy
from iiet.methods import Evaluation
from iiet.pruning import Rows

__all__ = [
    "INFLUENCE_METRICS",
    "BatchInfluence",
    "Comparison",
    "InfluenceMetric",
    "MeasuredBatch",
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
        self.decoder, self.batch = decoder, batch
        counted = batch.counted if needs_targets else batch.taught
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
                output = seen.output if seen.left_here is None else seen.left_here()
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
        self.residuals, (self.layer_values,) = _numbers(residuals), _numbers([layers])
        return before, _numbers(values)

    def mean(self, measure: Compare, a: Tensor, b: Tensor) -> Tensor:
        """Average a measure of two tensors, (batch, time, dim), over the positions that count."""
        # In float64, because float32 keeps few digits of a cosine's distance from one; by sequence,
        # to spare memory.
        sums = [
            torch.where(counted, measure(one.double(), other.double()), 0.0).sum()
            for one, other, counted in zip(a, b, self.counted, strict=True)
        ]
        return torch.stack(sums).sum() / self.num_tokens


class InfluenceMetric(MetricFacts, ABC):
    """Base of all metrics."""

    @abstractmethod
    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        """Measure one batch; called without gradients.

        The values of all batches are averaged, weighted by the positions that count.
        """


class Comparison(InfluenceMetric):
    """Base of the metrics that compare consecutive evaluations of a layer: one forward pass."""

    @abstractmethod
    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        """Compare two outputs of a layer's field, (time, dim) in float64; return (time,)."""

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        return BatchInfluence(measured.run(self.compare)[1])


class Cosine(Comparison):
    """`1 - cos(y(i-1), y(i))` of consecutive outputs y of a layer's field."""

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return _cosine_distance(before, after)


class Relative(Comparison):
    """`|y(i) - y(i-1)| / |y(i)|` of consecutive outputs y of a layer's field."""

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return _relative_size(after - before, after)


class LossRise(LossRiseFacts, InfluenceMetric):
    """Rise of the loss when a layer stops before the correction, all other layers full."""

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        decoder, batch, full = measured.decoder, measured.batch, measured.decoder.schedule
        sequences = replace(batch, target_count=None).split(1)
        counts = [sequence.num_targets for sequence in sequences]

        def loss_and_accuracy(logits: Tensor) -> tuple[float, ...]:
            # In float64, because rises are small beside the loss; by sequence, to spare memory.
            found = [
                cross_entropy_and_accuracy(ours[None].double(), sequence)
                for ours, sequence in zip(logits, sequences, strict=True)
            ]
            return tuple(
                math.fsum(n * each.item() for n, each in zip(counts, means, strict=True))
                / sum(counts)
                for means in zip(*found, strict=True)
            )

        full_loss, full_accuracy = loss_and_accuracy(decoder.logits(measured.run()[0]))
        rises, lost = [], []
        for layer, count in enumerate(full):
            stopped = [
                loss_and_accuracy(decoder(batch.input_ids, schedule=full.with_layer(layer, kept)))
                for kept in range(count)
            ]
            rises.append(tuple(loss - full_loss for loss, _ in stopped))
            lost.append(tuple(full_accuracy - accuracy for _, accuracy in stopped))
        return BatchInfluence(tuple(rises), tuple(lost))


INFLUENCE_METRICS: ExtensionTable[type[InfluenceMetric]] = extensions.INFLUENCE_METRICS
"""All influence metrics by name."""


def _cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    # Half the squared distance of the directions is 1 - cos, and never rounds to below zero.
    turn = functional.normalize(after, dim=-1) - functional.normalize(before, dim=-1)
    return turn.square().sum(-1) / 2


def _relative_size(part: Tensor, whole: Tensor) -> Tensor:
    ratio: Tensor = part.square().sum(-1) / whole.square().sum(-1)
    return ratio.sqrt()


def _numbers(rows: Sequence[Sequence[Tensor]]) -> Rows:
    """Read tensors of one number each, in one copy from the device."""
    numbers = iter(torch.stack([n for row in rows for n in row]).tolist() if any(rows) else ())
    return tuple(tuple(next(numbers) for _ in row) for row in rows)
