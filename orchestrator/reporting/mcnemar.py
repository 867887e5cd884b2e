"""McNemar's exact test: do two models differ on the same items, each right or wrong?

Items that both get right, or both wrong, say nothing. If the models are equally good, each of the
other `n = b + c` items is as likely to favor one as the other, so `b` is binomial with p = 1/2:

    p-value = min(1, 2 P(X <= min(b, c))),   X ~ Binomial(n, 1/2)

Source: McNemar 1947, Psychometrika 12; Holm 1979, Scandinavian Journal of Statistics 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class McNemar:
    """The items that only one of two models gets right."""

    only_first: int
    """Right under the first model, wrong under the second: `b`."""
    only_second: int
    """The reverse: `c`."""

    @property
    def p_value(self) -> float:
        """Probability of a difference at least this large between equally good models."""
        num_items = self.only_first + self.only_second
        # Logarithms, as the binomial coefficients of many items exceed a float.
        log_total = math.lgamma(num_items + 1) - num_items * math.log(2)
        tail = math.fsum(
            math.exp(log_total - math.lgamma(k + 1) - math.lgamma(num_items - k + 1))
            for k in range(min(self.only_first, self.only_second) + 1)
        )
        return min(1.0, 2 * tail)

    def __add__(self, other: McNemar) -> McNemar:
        """Return the counts over the items of both."""
        return McNemar(self.only_first + other.only_first, self.only_second + other.only_second)


def count_discordant(values: NDArray[np.float64]) -> McNemar | None:
    """Return the counts for (2, items) of values; None if one is neither 0 nor 1."""
    if not np.isin(values, (0, 1)).all():
        return None
    first, second = values.astype(bool)
    return McNemar(int((first & ~second).sum()), int((second & ~first).sum()))


def adjust_by_holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values that hold for all tests together: the chance of any false alarm is bounded.

    `p'_(i) = max over j <= i of min(1, (n - j + 1) p_(j))` for the sorted p-values `p_(1..n)`.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[name] = largest
    return adjusted
