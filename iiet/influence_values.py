"""What a measurement of the influence comes to: a value for every correction, and how sure it is.

Layers may make different numbers of corrections, so there are two forms. Rows, one per layer and as
long as it is, are what is stored, printed and turned into schedules; arrays of (layers,
corrections), with NaN where a layer makes no such correction, are for computing. Source: this
project.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from iiet.pruning import suffix_maxima
from iiet.schedule import IterationSchedule

__all__ = ["InfluenceMetric", "InfluenceTable", "Rows", "checked_metric"]

InfluenceMetric = Literal["cosine", "relative", "loss"]

Rows = tuple[tuple[float, ...], ...]
"""One row per layer, one number per correction; rows differ in length as the layers do."""


@dataclass(frozen=True)
class InfluenceTable:
    """The influence of each correction, and how sure it is.

    Unpacks into both arrays: `values, errors = table`.
    """

    metric: InfluenceMetric
    """What was measured."""
    value_rows: Rows
    """Influence per layer and correction; larger matters more. `loss` may be negative."""
    error_rows: Rows
    """Standard error of each value over batches; NaN when there was one batch only."""
    num_tokens: int
    """Tokens that the means run over (for `loss`, those that were predicted)."""

    @property
    def schedule(self) -> IterationSchedule:
        """The iteration schedule under which this was measured."""
        return IterationSchedule(tuple(len(row) for row in self.value_rows))

    @property
    def values(self) -> Tensor:
        """The influence as an array, (layers, corrections), float64."""
        return self._padded(self.value_rows)

    @property
    def errors(self) -> Tensor:
        """The standard errors as an array, (layers, corrections), float64."""
        return self._padded(self.error_rows)

    def rows(self) -> Rows:
        """Return the values, as `iiet.pruning` takes them."""
        return self.value_rows

    def worths(self) -> Rows:
        """Return what keeping each correction adds when those before it are kept.

        Sums of these say what a schedule keeps. `cosine` and `relative` compare a correction with
        the one before it, so they are that already; `loss` compares stopping before it with the
        full layer, so its corrections are worth the difference to stopping one later.
        """
        if self.metric != "loss":
            return self.value_rows
        return tuple(
            tuple(now - later for now, later in zip(row, (*row[1:], 0.0), strict=True))
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

    def _padded(self, rows: Rows) -> Tensor:
        width = self.schedule.max_corrections
        padded = [(*row, *[math.nan] * (width - len(row))) for row in rows]
        return torch.tensor(padded, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; an unknown error becomes None."""
        errors = [[None if math.isnan(e) else e for e in row] for row in self.error_rows]
        return {
            "metric": self.metric,
            "values": [list(row) for row in self.value_rows],
            "errors": errors,
            "num_tokens": self.num_tokens,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> InfluenceTable:
        """Build a table from plain values; the inverse of `to_dict`."""
        errors = [[math.nan if e is None else float(e) for e in row] for row in table["errors"]]
        return cls(
            metric=checked_metric(table["metric"]),
            value_rows=tuple(tuple(float(value) for value in row) for row in table["values"]),
            error_rows=tuple(map(tuple, errors)),
            num_tokens=int(table["num_tokens"]),
        )


def checked_metric(metric: Any) -> InfluenceMetric:
    """Return the name of a metric.

    Raises:
        ValueError: it is none.
    """
    if metric not in get_args(InfluenceMetric):
        raise ValueError(f"metric must be one of {get_args(InfluenceMetric)}, got {metric!r}")
    checked: InfluenceMetric = metric
    return checked
