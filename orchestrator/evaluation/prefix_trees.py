"""Rows of a scoring pass: sequences that begin alike share the tokens of their beginning.

The choices of a question have the same context, and often begin with the same words. Their tokens
form a prefix tree, which one row holds in depth-first order: each token once, at the position that
it has in its sequences. A token sees its ancestors only, so its hidden state is that of a pass over
its sequence alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

Tokens = tuple[int, ...]

MAX_SHARED_TOKENS = 2048
"""Tokens of a row with several sequences: the memory of its mask grows with their square."""


class Segment(NamedTuple):
    """A part of a continuation that fits into one forward pass, after as much context as fits."""

    context: Tokens
    continuation: Tokens

    @property
    def inputs(self) -> Tokens:
        """The tokens that a model reads: the last one is only predicted."""
        return (*self.context, *self.continuation)[:-1]


class PrefixTree:
    """A row of tokens that one or several segments share."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.predicting: list[list[int]] = []
        """For each segment, the columns whose successors are the tokens of its continuation."""
        self.tokens: list[int] = []
        self.depths: list[int] = []
        """For each column, its position in its sequences."""
        self._path: list[int] = []  # Columns of the last sequence.
        self._last: Tokens = ()
        self._num_wasted = 0  # Keys that queries look at in vain.

    @property
    def is_branched(self) -> bool:
        """Whether it holds more than one sequence and its beginnings."""
        return len(self.tokens) > len(self._path)

    def takes(self, inputs: Tokens, *, max_tokens: int, keys_per_token: int) -> bool:
        """Return whether inputs should share this row: that saves more than the longer row costs.

        The kernel computes all pairs of query and key, and the mask drops those of different
        branches. So a row is full when it has wasted as much as the beginning costs in a new row.
        """
        shared = self._num_shared(inputs)
        size = len(self.tokens) + len(inputs) - shared
        wasted = self._num_wasted_with(inputs, shared)
        return size <= max_tokens and wasted <= shared * keys_per_token

    def add(self, inputs: Tokens, segments: Iterable[Segment]) -> None:
        """Add the segments of these inputs; in a row of several, inputs come in their order."""
        shared = self._num_shared(inputs)
        self._num_wasted = self._num_wasted_with(inputs, shared)
        first = len(self.tokens)
        self._path = [*self._path[:shared], *range(first, first + len(inputs) - shared)]
        self.tokens += inputs[shared:]
        self.depths += range(shared, len(inputs))
        self._last = inputs
        for segment in segments:
            self.segments.append(segment)
            self.predicting.append(self._path[len(segment.context) - 1 :])

    def ends(self) -> list[int]:
        """Return for each column where its descendants end; they begin at the next column."""
        ends = [len(self.tokens)] * len(self.tokens)
        path: list[int] = []
        for column, depth in enumerate(self.depths):
            for ended in path[depth:]:
                ends[ended] = column
            path[depth:] = [column]
        return ends

    def _num_shared(self, inputs: Tokens) -> int:
        """Count the tokens at the beginning that the last sequence has, too."""
        for count, (one, other) in enumerate(zip(self._last, inputs, strict=False)):
            if one != other:
                return count
        return min(len(self._last), len(inputs))

    def _num_wasted_with(self, inputs: Tokens, shared: int) -> int:
        return self._num_wasted + (len(inputs) - shared) * (len(self.tokens) - shared)


def prefix_trees(
    segments: Iterable[Segment], *, max_tokens: int, keys_per_token: int
) -> list[PrefixTree]:
    """Return rows that hold all segments, the longest first; those without branches come first.

    Args:
        max_tokens: Most tokens of a row with several sequences.
        keys_per_token: Number of keys that a query can look at in the time of one token's other
            arithmetic.
    """
    trees: list[PrefixTree] = []
    max_tokens = min(max_tokens, MAX_SHARED_TOKENS)
    # Choices of one token each have the same inputs.
    by_inputs: defaultdict[Tokens, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_inputs[segment.inputs].append(segment)
    for inputs in sorted(by_inputs):
        if not (
            trees and trees[-1].takes(inputs, max_tokens=max_tokens, keys_per_token=keys_per_token)
        ):
            trees.append(PrefixTree())
        trees[-1].add(inputs, by_inputs[inputs])
    return sorted(trees, key=lambda tree: (tree.is_branched, -len(tree.tokens)))
