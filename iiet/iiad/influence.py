"""Influence: how much each correction, and each whole layer, matters, on a calibration set.

In: a decoder and batches of tokens. Out: for each layer and correction its influence, with its
standard error over batches, and its residual, whose decline says how well the iteration contracts;
and for each layer the influence of the whole of it, by which layers can be left out.

A *metric* says what makes a correction or a layer matter. It gets a batch and the decoder, and
returns one value per layer and correction, or per layer. `cosine` and `relative` compare
consecutive evaluations of a layer as the decoder makes them, or where corrections are damped what
they leave, and a layer's input and output, in one forward pass that keeps only the last output.
`loss` ends layers early, one correction at a time, and leaves layers out: one forward pass for
each. Other packages add metrics by entry points of the group `iiet.influence_metrics`.

Means over batches are made by `math.fsum`, so they do not depend on the order.
Source: this project.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import compress, count
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from iiet.decoder import Decoder
from iiet.extensions import ExtensionTable
from iiet.iiad.left_out import decoder_of_kept_layers
from iiet.iiad.pruning import InfluenceTable, LeavingRound, Rows, num_passes_one_at_a_time
from iiet.methods import Evaluation
from iiet.model import facts
from iiet.model.batch import Batch
from iiet.model.facts import MetricFacts, metric_facts_of
from iiet.model.losses import cross_entropy_and_accuracy
from iiet.model.schedule import IterationSchedule

__all__ = [
    "INFLUENCE_METRICS",
    "BatchInfluence",
    "Comparison",
    "InfluenceMetric",
    "LayerInfluence",
    "MeasuredBatch",
    "influence_table",
    "leave_out_one_at_a_time",
]

Compare = Callable[[Tensor, Tensor], Tensor]
"""Two outputs of evaluations, (time, dim) in float64 -> a number per position, (time,)."""


class BatchInfluence(NamedTuple):
    """What a metric finds in one batch."""

    values: Rows
    """Influence per layer and correction, as means over the positions that count."""
    accuracy_lost: Rows = ()
    """What stopping a layer before each correction costs in accuracy; empty if not measured."""


class LayerInfluence(NamedTuple):
    """What a metric finds of whole layers in one batch."""

    values: tuple[float, ...]
    """Influence of each layer, as means over the positions that count."""
    accuracy_lost: tuple[float, ...] = ()
    """What leaving each layer out costs in accuracy; empty if not measured."""


class MeasuredBatch:
    """A batch, and the decoder that is measured on it under its own iteration schedule.

    `without_layer` returns the decoder without a layer, the first being 0. `on_pass` is called
    after each forward pass.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: Batch,
        *,
        needs_targets: bool,
        without_layer: Callable[[int], Decoder],
        on_pass: Callable[[], None],
    ) -> None:
        self.decoder = decoder
        self.batch = batch
        self._without_layer = without_layer
        self._on_pass = on_pass
        counted = batch.counted if needs_targets else batch.teacher_mask
        self.counted = torch.ones_like(batch.targets).bool() if counted is None else counted
        """Positions that the means run over, (batch, time) of bool."""
        self.num_tokens = int(self.counted.sum())
        """How many these are."""
        self.residuals: Rows = ()
        """Relative residual of each correction, after `run`."""
        self.layer_values: tuple[float, ...] = ()
        """Of each layer the mean of `compare` of its input and output, after `run` with one."""

    def run(self, compare: Compare | None = None) -> tuple[Tensor, Rows]:
        """Run the layers under the full schedule, in one forward pass.

        Logits are not computed: they would need more memory than everything else.

        Args:
            compare: Called for each sequence with the outputs of two consecutive evaluations of a
                layer, or its estimates at two levels, or a layer's input and output, (time, dim) in
                float64; returns a number for each position, (time,).

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
            if compare is not None:
                layers.append(self.mean(compare, before, after))
            before = after
        self.residuals = _numbers(residuals)
        [self.layer_values] = _numbers([layers])
        self._on_pass()
        return before, _numbers(values)

    @cached_property
    def full_means(self) -> tuple[float, float]:
        """Loss and accuracy under the full schedule, over all targets: one forward pass."""
        return self.means(self.decoder.logits(self.run()[0]))

    def means_under(self, schedule: IterationSchedule) -> tuple[float, float]:
        """Return loss and accuracy under another schedule: one forward pass."""
        means = self.means(self.decoder(self.batch.input_ids, schedule=schedule))
        self._on_pass()
        return means

    def means_without(self, layer: int) -> tuple[float, float]:
        """Return loss and accuracy without a layer, the first being 0: one forward pass."""
        input_ids = self.batch.input_ids
        if self.decoder.config.num_layers == 1:  # No model is without layers, but its logits are.
            means = self.means(self.decoder.logits(self.decoder.model.embed_tokens(input_ids)))
        else:
            means = self.means(self._without_layer(layer)(input_ids))
        self._on_pass()
        return means

    def means(self, logits: Tensor) -> tuple[float, float]:
        """Return loss and accuracy, over all targets; each sequence has its own number of them."""
        sequences = replace(self.batch, target_count=None).split(1)
        counts = [sequence.num_targets for sequence in sequences]
        losses: list[float] = []
        accuracies: list[float] = []
        # In float64, because rises are small beside the loss; by sequence, to spare memory.
        for sequence_logits, sequence in zip(logits, sequences, strict=True):
            means = cross_entropy_and_accuracy(sequence_logits[None].double(), sequence)
            losses.append(means[0].item())
            accuracies.append(means[1].item())
        return _weighted_mean(losses, counts), _weighted_mean(accuracies, counts)

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
        """Measure the corrections on one batch; called without gradients.

        The values of all batches are averaged, weighted by the positions that count.
        """

    def measure_layers(self, measured: MeasuredBatch) -> LayerInfluence:
        """Measure whole layers on one batch, perhaps after `measure`; as that.

        Raises:
            ValueError: the metric says nothing of whole layers.
        """
        num_layers = measured.decoder.config.num_layers
        raise ValueError(
            f"the influence metric {type(self).__name__} measures corrections alone, none of the "
            f"{num_layers} whole layers"
        )


class Comparison(InfluenceMetric):
    """Base of the metrics that compare consecutive evaluations of a layer, and its input with its
    output: one forward pass."""

    @abstractmethod
    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        """Compare two outputs of a layer, (time, dim) in float64; return (time,)."""

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        return BatchInfluence(measured.run(self.compare)[1])

    def measure_layers(self, measured: MeasuredBatch) -> LayerInfluence:
        if not measured.layer_values:  # `measure` has not run the layers.
            measured.run(self.compare)
        return LayerInfluence(measured.layer_values)


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
    """Rise of the loss when a layer stops before the correction, or without it; all other layers
    full."""

    facts = metric_facts_of("loss")

    def measure(self, measured: MeasuredBatch) -> BatchInfluence:
        full = measured.decoder.schedule
        full_loss, full_accuracy = measured.full_means
        loss_rises: list[tuple[float, ...]] = []
        accuracies_lost: list[tuple[float, ...]] = []
        for layer, num_corrections in enumerate(full):
            stopped = [
                measured.means_under(full.with_layer(layer, kept))
                for kept in range(num_corrections)
            ]
            loss_rises.append(tuple(loss - full_loss for loss, _ in stopped))
            accuracies_lost.append(tuple(full_accuracy - accuracy for _, accuracy in stopped))
        return BatchInfluence(tuple(loss_rises), tuple(accuracies_lost))

    def measure_layers(self, measured: MeasuredBatch) -> LayerInfluence:
        full_loss, full_accuracy = measured.full_means
        smaller = [
            measured.means_without(layer) for layer in range(measured.decoder.config.num_layers)
        ]
        return LayerInfluence(
            tuple(loss - full_loss for loss, _ in smaller),
            tuple(full_accuracy - accuracy for _, accuracy in smaller),
        )


INFLUENCE_METRICS: ExtensionTable[type[InfluenceMetric]] = facts.INFLUENCE_METRICS
"""All influence metrics by name."""


BatchLike = Batch | Tensor


def influence_table(
    decoder: Decoder,
    batches: BatchLike | Iterable[BatchLike],
    *,
    metric: str = "cosine",
    whole_layers: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> InfluenceTable:
    """Measure the influence of every correction of a decoder, and of whole layers.

    With `y(i)` the output of a layer's evaluation i (0 is the prediction), or where corrections are
    damped the estimate that the layer has after it, as means over tokens:

        cosine     1 - cos(y(i-1), y(i));         of the layer: 1 - cos(h_{l-1}, h_l)
        relative   |y(i) - y(i-1)| / |y(i)|;      of the layer: |h_l - h_{l-1}| / |h_l|
        loss       rise of the loss when the layer stops after i-1 corrections, all else full;
                   of the layer: when it is left out (`iiet.iiad.left_out`)

    `loss` also measures the accuracy that is lost, unless the batches are text.

    Args:
        decoder: measured under its own iteration schedule, in the precision of the surrounding
            autocast; the comparisons themselves are made in float64, a sequence at a time.
        batches: the calibration set; text may be its tokens, (batch, time). Or a single batch.
        metric: a key of `iiet.INFLUENCE_METRICS`.
        whole_layers: whether to measure whole layers, too: for `loss` a pass without each layer.
            None: where this takes no further pass, and where the model makes no corrections.
        progress: called after each forward pass with the number of passes done, in all of
            `iiet.iiad.pruning.num_passes` of each batch.

    Returns:
        The table, with one row per layer; rows are empty where a method makes no corrections.

    Raises:
        ValueError: an unknown or broken metric, or one that measures no whole layers; no batches,
            or one with nothing to measure; the decoder's method repeats the stack.
    """
    chosen = _metric_for(decoder, metric)
    if whole_layers is None:
        has_own_layers = type(chosen).measure_layers is not InfluenceMetric.measure_layers
        is_plain = decoder.schedule.num_corrections == 0
        whole_layers = isinstance(chosen, Comparison) or (is_plain and has_own_layers)
    if isinstance(batches, Batch) or (isinstance(batches, Tensor) and batches.ndim == 2):
        batches = [batches]
    without_layer = _smaller_decoders(decoder)
    on_pass = _pass_counter(progress)
    measured: list[tuple[MeasuredBatch, BatchInfluence]] = []
    of_layers: list[LayerInfluence] = []
    for batch_like in batches:
        batch = _measured_batch(decoder, batch_like, chosen, without_layer, on_pass)
        measured.append((batch, _measure(batch, chosen, metric)))
        if whole_layers:
            of_layers.append(_measure_layers(batch, chosen))
    if not measured:
        raise ValueError("no batch was measured; the influence needs at least one")
    counts = [batch.num_tokens for batch, _ in measured]
    values, errors = _means_and_errors([influence.values for _, influence in measured], counts)
    residuals, _ = _means_and_errors([batch.residuals for batch, _ in measured], counts)
    layer_values, layer_errors = _means_and_errors_of_layers(of_layers, counts)
    # In a mixture, some batches are text, which has no accuracy: its targets are not answers.
    has_answers = [not batch.batch.is_text for batch, _ in measured]
    counts_of_answers = [*compress(counts, has_answers)]
    accuracy_lost, _ = _means_and_errors(
        [influence.accuracy_lost for _, influence in compress(measured, has_answers)],
        counts_of_answers,
    )
    layer_accuracy_lost, _ = _means_and_errors(
        [(influence.accuracy_lost,) for influence in compress(of_layers, has_answers)],
        counts_of_answers,
    )
    return InfluenceTable(
        metric=metric,
        value_rows=values,
        error_rows=errors,
        num_tokens=sum(counts),
        residual_rows=residuals,
        layer_values=layer_values,
        layer_errors=layer_errors,
        accuracy_lost_rows=accuracy_lost,
        layer_accuracy_lost=next(iter(layer_accuracy_lost), ()),
    )


def leave_out_one_at_a_time(
    decoder: Decoder,
    batches: Sequence[BatchLike],
    *,
    metric: str = "loss",
    num_leaving: int,
    rounds: Sequence[LeavingRound] = (),
    progress: Callable[[int], None] | None = None,
) -> Iterator[LeavingRound]:
    """Leave layers out one after the other, each time that of least influence, measured again.

    What a layer's leaving adds depends on which others are gone: of two layers of which either may
    go, perhaps not both may. `iiet.iiad.pruning.table_of_rounds` makes a table of the rounds.

    Args:
        decoder: with all layers, under its own iteration schedule.
        batches: the calibration set, read in each round.
        metric: as in `influence_table`.
        num_leaving: how many layers leave, at most all but one.
        rounds: those that were made already, of the same decoder, batches and metric.
        progress: called after each forward pass with the number of passes done in all rounds, those
            made already included; in all `num_passes_one_at_a_time` of each batch.

    Yields:
        Each further round, when it is made.

    Raises:
        ValueError: as `influence_table`, or no layer would stay.
    """
    chosen = _metric_for(decoder, metric)
    num_layers = decoder.config.num_layers
    if not 0 <= num_leaving < num_layers:
        raise ValueError(
            f"num_leaving must be an integer from 0 to {num_layers - 1}, as at least one of "
            f"{num_layers} layers stays, got {num_leaving}"
        )
    num_before = len(batches) * num_passes_one_at_a_time(metric, num_layers, len(rounds))
    on_pass = _pass_counter(progress, num_before)
    schedule = decoder.schedule.leaving_out(leaving.layer for leaving in rounds)
    for _ in range(len(rounds), num_leaving):
        smaller = decoder_of_kept_layers(decoder, schedule)
        without_layer = _smaller_decoders(smaller)
        of_layers: list[LayerInfluence] = []
        counts: list[int] = []
        for batch in batches:
            measured = _measured_batch(smaller, batch, chosen, without_layer, on_pass)
            of_layers.append(_measure_layers(measured, chosen))
            counts.append(measured.num_tokens)
        values, errors = _means_and_errors_of_layers(of_layers, counts)
        kept_layers = schedule.kept_layers
        by_layer = dict(zip(kept_layers, zip(values, errors, strict=True), strict=True))
        rows = [by_layer.get(layer, (math.nan, math.nan)) for layer in range(num_layers)]
        leaving = LeavingRound(*zip(*rows, strict=True))
        yield leaving
        schedule = schedule.leaving_out([leaving.layer])


def _metric_for(decoder: Decoder, name: str) -> InfluenceMetric:
    if name not in INFLUENCE_METRICS:
        raise ValueError(f"metric must be one of {tuple(INFLUENCE_METRICS)}, got {name!r}")
    if decoder.method.facts.repeats_stack:
        raise ValueError(
            f"method {decoder.config.method!r} repeats the whole stack, so no layer has "
            "corrections of its own whose influence could be measured"
        )
    return INFLUENCE_METRICS[name]()


def _smaller_decoders(decoder: Decoder) -> Callable[[int], Decoder]:
    """Return a function that makes the decoder without a layer, once for all batches."""

    @cache
    def without_layer(layer: int) -> Decoder:
        return decoder_of_kept_layers(decoder, decoder.schedule.leaving_out([layer]))

    return without_layer


def _pass_counter(
    progress: Callable[[int], None] | None, num_before: int = 0
) -> Callable[[], None]:
    """Return a function that counts forward passes, and says after each how many were made."""
    numbers = count(num_before + 1)

    def on_pass() -> None:
        number = next(numbers)
        if progress is not None:
            progress(number)

    return on_pass


def _measured_batch(
    decoder: Decoder,
    batch_or_ids: BatchLike,
    metric: InfluenceMetric,
    without_layer: Callable[[int], Decoder],
    on_pass: Callable[[], None],
) -> MeasuredBatch:
    batch = batch_or_ids if isinstance(batch_or_ids, Batch) else Batch.of_text(batch_or_ids)
    measured = MeasuredBatch(
        decoder,
        batch.to(decoder.device),
        needs_targets=metric.facts.needs_targets,
        without_layer=without_layer,
        on_pass=on_pass,
    )
    if measured.num_tokens == 0:
        shape = tuple(batch.input_ids.shape)
        raise ValueError(f"a batch of shape {shape} holds nothing to measure")
    return measured


@torch.no_grad()
def _measure(measured: MeasuredBatch, metric: InfluenceMetric, name: str) -> BatchInfluence:
    influence = metric.measure(measured)
    schedule = measured.decoder.schedule
    if tuple(map(len, influence.values)) != tuple(schedule):
        raise ValueError(
            f"the influence metric {name!r} must return a value for each correction of "
            f"the schedule {schedule}, got {influence.values!r}"
        )
    if not measured.residuals:  # The metric itself did not run the layers.
        measured.run()
    return influence


@torch.no_grad()
def _measure_layers(measured: MeasuredBatch, metric: InfluenceMetric) -> LayerInfluence:
    influence = metric.measure_layers(measured)
    num_layers = measured.decoder.config.num_layers
    if len(influence.values) != num_layers:
        raise ValueError(
            f"the influence metric {type(metric).__name__} must return a value for each of "
            f"{num_layers} layers, got {influence.values!r}"
        )
    return influence


def _means_and_errors_of_layers(
    of_batches: Sequence[LayerInfluence], counts: Sequence[int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Average the batches' values of each layer; no batches give none."""
    if not of_batches:
        return (), ()
    (values,), (errors,) = _means_and_errors(
        [(influence.values,) for influence in of_batches], counts
    )
    return values, errors


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
