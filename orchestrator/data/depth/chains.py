"""Pointer chains: follow a pointer `depth` times, among several chains that are interleaved.

A sequence lists every pointer as a pair of symbols, in random order, and ends with one symbol, the
question. The chains are closed: each symbol is the first of one pair and the second of another, so
neither counts nor ends give the answer away. A chain is twice as long as the depth, so the way back
is no shorter.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from orchestrator.data.depth.task import (
    MAX_SEQUENCE_LENGTH,
    NO_ANSWER,
    DepthTask,
    Sequences,
    numbered_symbols,
)
from orchestrator.workspace.errors import UserError


class PointerChains(DepthTask):
    """`chain_8`: one question at the end of each sequence.

    Raises:
        UserError: If the sequence would be too long.
    """

    kind: ClassVar[str] = "chain"

    def __init__(self, depth: int, *, num_chains: int) -> None:
        super().__init__(depth)
        self.num_chains = num_chains
        if self.length > MAX_SEQUENCE_LENGTH:
            raise UserError(
                f"{self.name} with data.depth.num_chains={num_chains} has sequences of "
                f"{self.length:,} symbols, more than {MAX_SEQUENCE_LENGTH:,}"
            )

    @property
    def num_symbols(self) -> int:
        """Symbols of a sequence that differ: all of the alphabet."""
        return 2 * self.num_chains * self.depth

    @property
    def length(self) -> int:
        return 2 * self.num_symbols + 1

    @property
    def symbols(self) -> tuple[str, ...]:
        return numbered_symbols(self.num_symbols)

    @property
    def chance(self) -> float:
        """Any symbol but that of the question is equally likely."""
        return 1 / (self.num_symbols - 1)

    @property
    def num_random(self) -> int:
        return 2 * self.num_symbols

    def generate(self, bits: np.ndarray) -> Sequences:
        # In its row, each chain holds its symbols in the order of its pointers.
        chained = np.argsort(bits[:, : self.num_symbols], axis=1, kind="stable")
        chains = chained.reshape(len(bits), self.num_chains, 2 * self.depth)
        pairs = np.stack([chains, np.roll(chains, -1, axis=2)], axis=-1)
        pairs = pairs.reshape(len(bits), self.num_symbols, 2)
        order = np.argsort(bits[:, self.num_symbols :], axis=1, kind="stable")
        listed = np.take_along_axis(pairs, order[:, :, None], axis=1).reshape(
            len(bits), 2 * self.num_symbols
        )
        symbols = np.concatenate([listed, chained[:, :1]], axis=1)
        answers = np.full_like(symbols, NO_ANSWER)
        answers[:, -1] = chained[:, self.depth]
        return Sequences(symbols, answers)
