"""Choose the sequences of each training step by arithmetic on their positions, without state.

Sequences are numbered through all steps, so the step number is all that a resumed run needs. A
step's global batch does not depend on the number of workers: each takes its slice. Random numbers
and permutations follow from a key, without earlier elements, memory, or a library whose versions
could differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from orchestrator.workspace.errors import UserError

BLOCK_LENGTH = 1000
"""Shares are rounded to a thousandth. A change of this number changes the order of the data."""
_FEISTEL_ROUNDS = 6
_MASK = (1 << 64) - 1
# Odd numbers: multiples of one, modulo 2^64, differ for all positions.
_GOLDEN = 0x9E3779B97F4A7C15
_ODD = 0xD1B54A32D192ED03


# Random numbers


def random_bits(key: int, positions: np.ndarray, num: int) -> np.ndarray:
    """Return `num` random numbers for each of n positions, uint64, (n, num).

    The numbers of a position depend on nothing but the key and that position.
    """
    with np.errstate(over="ignore"):  # The sums are modulo 2^64.
        starts = mix_array(positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(key)))
        steps = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(_ODD)
        return mix_array(starts[:, None] + steps)


def uniform_below(bits: np.ndarray, limit: int) -> np.ndarray:
    """Map random uint64 to integers from 0 to `limit` - 1, int64; `limit` is at most 2^32."""
    return ((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of `values`, int64, under the permutation of range(size) of a `key`."""
    # A Feistel network over the next power of four; images outside the range are permuted again.
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    round_keys = [np.uint64(mix(key + number)) for number in range(1, _FEISTEL_ROUNDS + 1)]
    images = values.astype(np.uint64)
    is_outside = np.ones(images.shape, dtype=bool)
    while is_outside.any():
        high = images[is_outside] >> np.uint64(half_bits)
        low = images[is_outside] & half_mask
        for round_key in round_keys:
            high, low = low, high ^ (mix_array(low ^ round_key) & half_mask)
        images[is_outside] = high << np.uint64(half_bits) | low
        is_outside = images >= np.uint64(size)
    return images.astype(np.int64)


def mix(value: int) -> int:
    """Return a hash of 64 bits: every bit of `value` changes about half of it (splitmix64)."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def mix_array(values: np.ndarray) -> np.ndarray:
    """Return `mix` of each value, uint64."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed


# Sequences of a step


def positions_of_step(
    step: int, *, global_batch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the numbers of one worker's sequences in a step, int64.

    The shares of the workers differ by at most one sequence.

    Args:
        step: Counts from 0.
        global_batch: Sequences of all workers together, at least one for each.
        rank: Number of this worker, from 0.
        world_size: Number of workers.
    """
    assert global_batch >= world_size
    first = global_batch * rank // world_size
    end = global_batch * (rank + 1) // world_size
    return step * global_batch + np.arange(first, end, dtype=np.int64)


def check_even_split(global_batch: int, num_workers: int, *, section: str = "training") -> None:
    """Raise a `UserError`, about settings of `section`, if workers cannot share a batch evenly."""
    if global_batch % num_workers or global_batch < 1:
        raise UserError(
            f"a step has {global_batch} sequences, which {num_workers} workers cannot share "
            f"evenly; change {section}.num_tokens_per_step, or the number of workers"
        )


@dataclass(frozen=True)
class WindowOrder:
    """The windows of a text in the order of training; `seed` chooses it.

    An epoch visits each window of one context length once, in its own order and from its own
    offset.
    """

    num_tokens: int
    """Length of the flat token array, at least one window."""
    context_length: int
    seed: int = 0

    @property
    def num_windows(self) -> int:
        """Sequences of one epoch."""
        return max(1, (self.num_tokens - self.context_length + 1) // self.context_length)

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Return where the sequences with these numbers (from 0) start, int64."""
        starts = np.empty_like(positions)
        epochs = positions // self.num_windows
        # Tokens that are left after the last window: an epoch may start later by up to so many.
        slack = self.num_tokens - self.num_windows * self.context_length
        for epoch in np.unique(epochs):
            is_in_epoch = epochs == epoch
            key = mix(self.seed * _GOLDEN + int(epoch) + 1)
            windows = permute(positions[is_in_epoch] % self.num_windows, self.num_windows, key)
            offset = mix(key) % (min(slack, self.context_length - 1) + 1)
            starts[is_in_epoch] = windows * self.context_length + offset
        return starts


@dataclass(frozen=True)
class ComponentOrder:
    """Which component each sequence of a mixture belongs to, at random and at its share.

    Sequences are taken in blocks. A block holds a whole number of each component's sequences, in
    an order that a key permutes. So the position of a sequence determines its component and its
    number there.
    """

    counts: tuple[int, ...]
    """Sequences of each component in one block."""

    @classmethod
    def of_shares(cls, shares: Sequence[float]) -> ComponentOrder:
        """Return the order for shares; each component has at least one sequence in a block."""
        # Cumulative sums are rounded, so that the counts sum to the length of a block.
        ends = np.cumsum(shares) / sum(shares)
        edges = [0, *(round(float(end) * BLOCK_LENGTH) for end in ends)]
        counts = [max(1, end - start) for start, end in pairwise(edges)]
        return cls(tuple(counts))

    def split(self, positions: np.ndarray, key: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Split positions by component.

        Args:
            positions: Numbers of sequences, int64.
            key: Chooses the order.

        Yields:
            For each component a mask of its positions, and the numbers of its sequences there,
            int64.
        """
        length = sum(self.counts)
        blocks = positions // length
        permuted_positions = np.empty_like(positions)
        for block in np.unique(blocks):
            is_in_block = blocks == block
            permuted = permute(positions[is_in_block] % length, length, mix(key + int(block)))
            permuted_positions[is_in_block] = permuted
        # The first component has the first positions of a permuted block, and so on.
        first = 0
        for count in self.counts:
            is_own = (permuted_positions >= first) & (permuted_positions < first + count)
            yield is_own, blocks[is_own] * count + permuted_positions[is_own] - first
            first += count
