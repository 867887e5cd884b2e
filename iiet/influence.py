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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iiet.batch import NO_TARGET, Batch
from iiet.decoder import Decoder
from iiet.influence_metrics import INFLUENCE_METRICS, MeasuredBatch, Rows
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceTable", "influence_table"]


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of each correction, its standard error, and how well the iteration converged.

    Unpacks into two arrays, (layers, corrections), with NaN where a layer makes no such correction:
    `values, errors = table`.
    """

    metric: str
    """What was measured: a key of `iiet.INFLUENCE_METRICS`."""
    value_rows: Rows
    """Influence per layer and correction; larger matters more. `loss` may be negative."""
    error_rows: Rows
    """Standard error of each value over batches; NaN when there was one batch only."""
    num_tokens: int
    """Tokens that the means run over (for `loss`: those with a target)."""
    residual_rows: Rows = ()
    """Relative residual of each correction, the mean of `|g(e) - e| / |g(e)|` over tokens: `e` is
    the estimate that it starts from, `g(e)` its normalized output. Methods that correct
    without a schedule have rows, too."""
    layer_values: tuple[float, ...] = ()
    """Block influence of each layer, the mean of `1 - cos(h_{l-1}, h_l)` over tokens: by how much
    the whole layer turns the hidden state."""
    accuracy_lost_rows: Rows = ()
    """With `loss`, what stopping a layer before each correction costs in accuracy, the share of
    targets that get the largest logit. Text has none: its targets are not answers."""

    @property
    def schedule(self) -> IterationSchedule:
        """The iteration schedule under which this was measured."""
        return IterationSchedule(tuple(len(row) for row in self.value_rows))

    @property
    def values(self) -> Tensor:
        """The influence as an array, (layers, corrections), float64."""
        return _padded(self.value_rows)

    @property
    def contractions(self) -> tuple[float, ...]:
        """The contraction factor of each layer: the ratio of one correction's residual to that of
        the correction before, as a geometric mean. Below 1 the iteration contracts; NaN where a
        layer makes fewer than two corrections.
        """
        return tuple(
            (row[-1] / row[0]) ** (1 / (len(row) - 1)) if len(row) > 1 and row[0] > 0 else math.nan
            for row in self.residual_rows
        )

    def rows(self) -> Rows:
        """Return the values, as `iiet.pruning` takes them."""
        return self.value_rows

    def worths(self) -> Rows:
        """Return what each correction adds if those before it are kept; may be summed.

        Most metrics compare a correction with the evaluation before it, so these are the values
        themselves. `loss` compares stopping before a correction with the full layer, so a
        correction's worth is the difference to stopping one correction later.
        """
        if not INFLUENCE_METRICS[self.metric].is_of_stopping:
            return self.value_rows
        return tuple(
            tuple(now - later for now, later in zip(row, (*row, 0.0)[1:], strict=True))
            for row in self.value_rows
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, _padded(self.error_rows)))

    def __str__(self) -> str:
        """Return a table: a line per layer, with the influence of each correction."""
        most = max(map(len, self.value_rows), default=0)
        head = "".join(f"{f'correction {i + 1}':>14}" for i in range(most))
        lines = [f"influence ({self.metric}, {self.num_tokens} tokens)", f"layer{head}"]
        for layer, row in enumerate(self.value_rows, start=1):
            lines.append(f"{layer:>5}" + "".join(f"{value:>14.5f}" for value in row))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an unknown error or contraction factor becomes None."""
        return {
            "metric": self.metric,
            "values": [list(row) for row in self.value_rows],
            "errors": [[_finite(error) for error in row] for row in self.error_rows],
            "num_tokens": self.num_tokens,
            "residuals": [list(row) for row in self.residual_rows],
            "contractions": [_finite(factor) for factor in self.contractions],
            "layers": list(self.layer_values),
            "accuracy_lost": [list(row) for row in self.accuracy_lost_rows],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> InfluenceTable:
        """Build a table from plain values; the inverse of `to_dict`.

        The package of its metric need not be installed.
        """
        if not isinstance(table["metric"], str):
            raise TypeError(f"metric must be a text, got {table['metric']!r}")
        return cls(
            metric=table["metric"],
            value_rows=_rows_of(table["values"]),
            error_rows=_rows_of(table["errors"]),
            num_tokens=int(table["num_tokens"]),
            residual_rows=_rows_of(table["residuals"]),
            layer_values=tuple(map(float, table["layers"])),
            accuracy_lost_rows=_rows_of(table["accuracy_lost"]),
        )


def _padded(rows: Rows) -> Tensor:
    width = max(map(len, rows), default=0)
    padded = [(*row, *[math.nan] * (width - len(row))) for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows_of(rows: Iterable[Iterable[Any]]) -> Rows:
    """Read rows of plain JSON, where None stands for NaN."""
    return tuple(tuple(math.nan if x is None else float(x) for x in row) for row in rows)


BatchLike = Batch | Tensor | Mapping[str, Tensor]
"""A batch; or the tokens of text, (batch, time) of integers; or a mapping with these as `input_ids`
and an `attention_mask` of the same shape, false for padding, which is then ignored."""


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
        batches: the calibration set, each item a `BatchLike`; or a single one.
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
    if isinstance(batches, Batch | Mapping) or (isinstance(batches, Tensor) and batches.ndim == 2):
        batches = [batches]
    means: list[_BatchMeans] = []
    for done, batch in enumerate(batches, start=1):
        means.append(_measure(decoder, batch, metric))
        if progress is not None:
            progress(done)
    if not means:
        raise ValueError("no batch was measured; the influence needs at least one")
    counts = [each.num_tokens for each in means]
    values, errors = _means_and_errors([each.values for each in means], counts)
    residuals, _ = _means_and_errors([each.residuals for each in means], counts)
    (layers,), _ = _means_and_errors([(each.layers,) for each in means], counts)
    # In a mixture, some batches are text, which has no accuracy.
    answers = [each for each in means if each.accuracy_lost]
    lost, _ = _means_and_errors(
        [each.accuracy_lost for each in answers], [each.num_tokens for each in answers]
    )
    return InfluenceTable(metric, values, errors, sum(counts), residuals, layers, lost)


class _BatchMeans(NamedTuple):
    num_tokens: int
    values: Rows
    residuals: Rows
    layers: tuple[float, ...]
    accuracy_lost: Rows


@torch.no_grad()
def _measure(decoder: Decoder, given: BatchLike, name: str) -> _BatchMeans:
    batch, attention_mask = _as_batch(given, decoder.device)
    metric = INFLUENCE_METRICS[name]()
    counted = batch.counted if metric.needs_targets else batch.taught
    if counted is None:
        counted = torch.ones_like(batch.targets).bool()
    measured = MeasuredBatch(decoder, batch, attention_mask, counted)
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
    lost = () if batch.is_text else found.accuracy_lost
    num_tokens, residuals = measured.num_tokens, measured.residuals
    return _BatchMeans(num_tokens, found.values, residuals, measured.layer_values, lost)


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
    targets = text.targets.masked_fill(~is_real.roll(-1, dims=1), NO_TARGET)
    return replace(text, mask=is_real, targets=targets), is_real


def _means_and_errors(of_batches: Sequence[Rows], counts: Sequence[int]) -> tuple[Rows, Rows]:
    """Average the batches' rows by their tokens, and estimate how far each mean may be off."""
    total = sum(counts)

    def mean(cells: Sequence[float]) -> float:
        return math.fsum(m * n for m, n in zip(cells, counts, strict=True)) / total

    def error(cells: Sequence[float]) -> float:
        """Of a weighted mean over batches."""
        if len(cells) == 1:
            return math.nan
        middle = mean(cells)
        squares = math.fsum((n * (m - middle)) ** 2 for m, n in zip(cells, counts, strict=True))
        return math.sqrt(squares * len(cells) / (len(cells) - 1)) / total

    table = [list(zip(*rows, strict=True)) for rows in zip(*of_batches, strict=True)]
    means, errors = (tuple(tuple(map(measure, row)) for row in table) for measure in (mean, error))
    return means, errors
