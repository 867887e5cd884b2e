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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iiet.batch import Batch
from iiet.decoder import Decoder
from iiet.influence_metrics import INFLUENCE_METRICS, BatchInfluence, MeasuredBatch, Rows
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceTable", "influence_table"]


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of each correction, its error, and how well the iteration converged."""

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
        """Build a table from `to_dict`; the package of its metric need not be installed."""
        return cls(
            metric=str(table["metric"]),
            value_rows=_rows_of(table["values"]),
            error_rows=_rows_of(table["errors"]),
            num_tokens=int(table["num_tokens"]),
            residual_rows=_rows_of(table["residuals"]),
            layer_values=tuple(map(float, table["layers"])),
            accuracy_lost_rows=_rows_of(table["accuracy_lost"]),
        )


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows_of(rows: Iterable[Iterable[Any]]) -> Rows:
    """Read rows of plain JSON, where None stands for NaN."""
    return tuple(tuple(math.nan if x is None else float(x) for x in row) for row in rows)


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
