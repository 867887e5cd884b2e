"""p-hop induction: repeat the step of an induction head p times.

One hop leads from a position to the one after the latest earlier occurrence of its symbol. The
answer at a position is the symbol p hops away; a position whose hops leave the sequence has none.
Source: Sanford, Hsu and Telgarsky, 2024 (arXiv 2402.09268).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from orchestrator.data.depth.task import NO_ANSWER, DepthTask, Sequences, numbered_symbols
from orchestrator.data.keyed_random import uniform_below
from orchestrator.workspace.errors import UserError


class PHopInduction(DepthTask):
    """`phop_6`: independent, uniform symbols; every position with an answer counts.

    Raises:
        UserError: If the hops of a sequence's last position do not usually fit into it.
    """

    kind: ClassVar[str] = "phop"

    def __init__(self, depth: int, *, num_symbols: int, length: int) -> None:
        super().__init__(depth)
        # One hop goes back by about as many positions as there are symbols.
        if length < depth * num_symbols:
            raise UserError(
                f"data.depth.length={length} is too short for {self.name}: {depth} hops over "
                f"{num_symbols} symbols take about {depth * num_symbols} positions; set a larger "
                "length, fewer symbols or a smaller depth"
            )
        self.num_symbols = num_symbols
        self._length = length

    @property
    def length(self) -> int:
        return self._length

    @property
    def symbols(self) -> tuple[str, ...]:
        return numbered_symbols(self.num_symbols)

    @property
    def chance(self) -> float:
        """All symbols are equally frequent answers."""
        return 1 / self.num_symbols

    @property
    def num_random(self) -> int:
        return self.length

    def generate(self, bits: np.ndarray) -> Sequences:
        symbols = uniform_below(bits, self.num_symbols)
        hop = after_previous_occurrence(symbols, self.num_symbols)
        reached = np.broadcast_to(np.arange(self.length), symbols.shape)
        for _ in range(self.depth):
            reached = np.where(reached >= 0, take(hop, reached), NO_ANSWER)
        return Sequences(symbols, np.where(reached >= 0, take(symbols, reached), NO_ANSWER))

    def asked_positions(self, answers: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Return a random position of those with an answer, so that tests ask as training does."""
        has_answer = answers != NO_ANSWER
        counts = has_answer.sum(axis=1)
        # The n-th answer stands where n answers lie before it.
        wanted = uniform_below(bits, 1 << 32) * counts >> 32
        position = ((has_answer.cumsum(axis=1) - 1 == wanted[:, None]) & has_answer).argmax(axis=1)
        return np.where(counts > 0, position, NO_ANSWER)


def after_previous_occurrence(symbols: np.ndarray, num_symbols: int) -> np.ndarray:
    """Return for each position the one after its symbol's previous occurrence, or `NO_ANSWER`."""
    hop = np.full_like(symbols, NO_ANSWER)
    places = np.arange(symbols.shape[1])
    for symbol in range(num_symbols):
        here = symbols == symbol
        latest = np.maximum.accumulate(np.where(here, places, NO_ANSWER), axis=1)
        previous = np.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=NO_ANSWER)
        hop[here] = np.where(previous[here] >= 0, previous[here] + 1, NO_ANSWER)
    return hop


def take(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the values at positions of the same row; any value where a position is negative."""
    return np.take_along_axis(values, np.maximum(positions, 0), axis=1)
