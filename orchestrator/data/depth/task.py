"""A depth task: sequences of symbols, and the answers that a model must give at some positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np

NO_ANSWER = -1
MAX_SEQUENCE_LENGTH = 100_000
"""A longer one is a typing error and would only fill the memory."""


class Sequences(NamedTuple):
    """Generated sequences and their answers, both int64, (sequences, length)."""

    symbols: np.ndarray
    """Numbers of symbols, each an index of the task's `symbols`."""
    answers: np.ndarray
    """Number of the symbol to predict at each position, or `NO_ANSWER`."""


class DepthTask(ABC):
    """A kind of task at one depth: the number of serial steps from the question to the answer.

    Args:
        depth: At least 1.
    """

    kind: ClassVar[str]

    def __init__(self, depth: int) -> None:
        self.depth = depth

    @property
    def name(self) -> str:
        """Name with the depth, such as `phop_6`."""
        return f"{self.kind}_{self.depth}"

    @property
    @abstractmethod
    def length(self) -> int:
        """Symbols of a sequence."""

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """The texts of the symbols."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess that does not read the sequence, but knows which answers occur."""

    @property
    @abstractmethod
    def num_random(self) -> int:
        """Random numbers that one sequence takes."""

    @abstractmethod
    def generate(self, bits: np.ndarray) -> Sequences:
        """Make one sequence of each row of random numbers, uint64, (sequences, num_random)."""

    def asked_positions(
        self,
        answers: np.ndarray,
        bits: np.ndarray,  # noqa: ARG002 - for tasks that ask at a random position
    ) -> np.ndarray:
        """Return the position of each sequence at which a test asks, or `NO_ANSWER` for none.

        Args:
            answers: As in `Sequences`.
            bits: One random number per sequence, uint64.
        """
        return np.full(len(answers), answers.shape[1] - 1)


def numbered_symbols(count: int) -> tuple[str, ...]:
    """Return the texts of the symbols that several kinds of tasks share."""
    return tuple(f"<|{number}|>" for number in range(count))
