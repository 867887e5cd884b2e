"""Choose the source of each sequence, so that every source has its share, at random places.

Sequences are taken in blocks. A block holds a whole number of each source's sequences, in an order
that a key permutes; so source and number of any sequence follow from its position alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orchestrator.data.keyed_random import mix, permute

BLOCK_LENGTH = 1000
"""Shares are rounded to a thousandth. Changing it changes which sequences runs are trained on."""


@dataclass(frozen=True)
class SourceOrder:
    """The sources of an endless series of sequences."""

    counts: tuple[int, ...]
    """Sequences of each source in one block."""

    @classmethod
    def of_shares(cls, shares: Sequence[float]) -> SourceOrder:
        """Return the order for shares that sum to 1; rounded, each source keeps at least one."""
        ends = np.cumsum(shares) / sum(shares)
        edges = [0, *(round(float(end) * BLOCK_LENGTH) for end in ends)]
        counts = [max(1, end - start) for start, end in pairwise(edges)]
        return cls(tuple(counts))

    def split(self, positions: np.ndarray, key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for each source which of the positions are its, and their numbers within it.

        Args:
            positions: Numbers of sequences, int64.
            key: Chooses the order.

        Yields:
            A mask of the positions, and the numbers of the source's sequences there, int64.
        """
        length = sum(self.counts)
        blocks = positions // length
        places = np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            places[chosen] = permute(positions[chosen] % length, length, mix(key + int(block)))
        first = 0
        for count in self.counts:
            own = (places >= first) & (places < first + count)
            yield own, blocks[own] * count + places[own] - first
            first += count
