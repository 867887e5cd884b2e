"""Words over the permutations of five things: the product so far is the answer at each position.

The group S5 is not solvable, so constant depth is not enough for long words (Barrington's theorem).
Source: Liu et al., 2022 (arXiv 2210.10749); Merrill et al., 2024 (arXiv 2404.08819).
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import ClassVar

import numpy as np

from orchestrator.data.depth.task import MAX_SEQUENCE_LENGTH, DepthTask, Sequences
from orchestrator.data.keyed_random import uniform_below
from orchestrator.workspace.errors import UserError

ELEMENTS = tuple(permutations(range(5)))


class PermutationWords(DepthTask):
    """`s5_16`: words of 16 permutations; a test asks for the product of all of them.

    Raises:
        UserError: If the word would be too long.
    """

    kind: ClassVar[str] = "s5"

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        if depth > MAX_SEQUENCE_LENGTH:
            raise UserError(f"{self.name} is a word of more than {MAX_SEQUENCE_LENGTH:,} symbols")

    @property
    def length(self) -> int:
        return self.depth

    @property
    def symbols(self) -> tuple[str, ...]:
        """Permutations in one-line notation: `<|21345|>` exchanges the first two things."""
        return tuple(f"<|{''.join(str(i + 1) for i in element)}|>" for element in ELEMENTS)

    @property
    def chance(self) -> float:
        """A product with a uniform factor is uniform."""
        return 1 / len(ELEMENTS)

    @property
    def num_random(self) -> int:
        return self.length

    def generate(self, bits: np.ndarray) -> Sequences:
        symbols = uniform_below(bits, len(ELEMENTS))
        answers = symbols.copy()
        for place in range(1, self.length):
            answers[:, place] = products()[answers[:, place - 1], symbols[:, place]]
        return Sequences(symbols, answers)


@cache
def products() -> np.ndarray:
    """Return the multiplication table, (120, 120): the first permutation, then the second."""
    number = {element: place for place, element in enumerate(ELEMENTS)}
    return np.array(
        [[number[tuple(second[i] for i in first)] for second in ELEMENTS] for first in ELEMENTS]
    )
