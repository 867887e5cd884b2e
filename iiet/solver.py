"""Fixed-point iteration, written once: a callable and a guess in, the value and all iterates out.

The implicit step `e = g(e)` is solved by applying g a fixed number of times. There is no stopping
rule: the number of applications is the cost, and cost is planned before anything runs. Whoever
wants to know how an iteration converged reads the record instead of writing the loop again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Iteration", "iterate"]


class Iteration(NamedTuple):
    """What an iteration arrived at, and how."""

    value: Tensor
    """The last iterate."""
    iterates: tuple[Tensor, ...]
    """The guess and the result of each correction: one more than there were corrections."""


def iterate(step: Callable[[Tensor], Tensor], guess: Tensor, num_corrections: int) -> Iteration:
    """Apply `step` to `guess`, `num_corrections` times.

    Args:
        step: the map whose fixed point is sought.
        guess: where to start; the value itself when there are no corrections.
        num_corrections: how often to apply the map, at least 0.
    """
    iterates = [guess]
    for _ in range(num_corrections):
        iterates.append(step(iterates[-1]))
    return Iteration(iterates[-1], tuple(iterates))
