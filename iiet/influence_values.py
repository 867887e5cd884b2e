"""A measured influence table: one value per correction, with its standard error.

Layers may make different numbers of corrections, so there are two forms. Rows, one per layer and of
different lengths, are stored, printed and turned into schedules. Arrays, (layers, corrections) with
NaN where a layer makes no such correction, are for computing. Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iiet.influence_metrics import INFLUENCE_METRICS, Rows
from iiet.pruning import suffix_maxima
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceTable", "Rows"]


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of each correction, its standard error, and how well the iteration converged.

    Unpacks into two arrays: `values, errors = table`.
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
    without a schedule have rows, too. Tables from before version 0.2 have none."""
    layer_values: tuple[float, ...] = ()
    """Block influence of each layer, the mean of `1 - cos(h_{l-1}, h_l)` over tokens: by how much
    the whole layer turns the hidden state. Tables of earlier versions have none."""
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
    def errors(self) -> Tensor:
        """The standard errors as an array, (layers, corrections), float64."""
        return _padded(self.error_rows)

    @property
    def residuals(self) -> Tensor:
        """The residuals as an array, (layers, corrections), float64."""
        return _padded(self.residual_rows)

    @property
    def contractions(self) -> tuple[float, ...]:
        """The contraction factor of each layer: the ratio of one correction's residual to that of
        the correction before, as a geometric mean. Below 1 the iteration contracts; NaN where a
        layer makes fewer than two corrections.
        """
        return tuple(map(_contraction, self.residual_rows))

    def rows(self) -> Rows:
        """Return the values, as `iiet.pruning` takes them."""
        return self.value_rows

    def worths(self) -> Rows:
        """Return what each correction adds if those before it are kept.

        The sum over its corrections is what a schedule is worth.

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

    def suffix_maxima(self) -> Rows:
        """Return `M[l, i] = max_{k>=i} I[l, k]`, on which thresholds act."""
        return tuple(suffix_maxima(row) for row in self.value_rows)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, self.errors))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.values.numpy()
        return array if dtype is None else array.astype(dtype)

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
            residual_rows=_rows_of(table.get("residuals", ())),
            layer_values=tuple(map(float, table.get("layers", ()))),
            accuracy_lost_rows=_rows_of(table.get("accuracy_lost", ())),
        )


def _contraction(residuals: Sequence[float]) -> float:
    if len(residuals) < 2 or residuals[0] <= 0:
        return math.nan
    return float((residuals[-1] / residuals[0]) ** (1 / (len(residuals) - 1)))


def _padded(rows: Rows) -> Tensor:
    width = max(map(len, rows), default=0)
    padded = [(*row, *[math.nan] * (width - len(row))) for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def _rows_of(rows: Iterable[Iterable[Any]]) -> Rows:
    """Read rows of plain JSON, where None stands for NaN."""
    return tuple(tuple(math.nan if x is None else float(x) for x in row) for row in rows)
