"""Choose the tokens of each training step, as an `iiet.Batch`: index arithmetic without state.

An epoch visits each window of one context length once, in its own order and from its own offset.
The order is a keyed permutation that computes any element directly, so the step number is the whole
position. A step's global batch does not depend on the number of workers: each takes its slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iiet.batch import Batch
from orchestrator.workspace.errors import UserError

_FEISTEL_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class BatchPlan:
    """The windows of every step; `seed` chooses the order.

    Raises:
        UserError: If there are fewer tokens than one sequence.
    """

    num_tokens: int
    """Length of the flat token array."""
    context_length: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_text_length(self.num_tokens, self.context_length, "training")

    @property
    def num_windows(self) -> int:
        """Sequences of one epoch."""
        return max(1, (self.num_tokens - self.context_length + 1) // self.context_length)

    def starts(
        self, step: int, *, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> np.ndarray:
        """Return the starts of one worker's sequences, int64.

        The shares of the workers differ by at most one sequence.

        Args:
            step: Counts from 0.
            global_batch: Sequences of all workers together, at least one for each.
            rank: Number of this worker, from 0.
            world_size: Number of workers.
        """
        assert global_batch >= world_size
        first, end = (global_batch * number // world_size for number in (rank, rank + 1))
        positions = step * global_batch + np.arange(first, end, dtype=np.int64)
        starts = np.empty_like(positions)
        epochs = positions // self.num_windows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = _mix(self.seed * 0x9E3779B97F4A7C15 + int(epoch) + 1)
            windows = permute(positions[chosen] % self.num_windows, self.num_windows, key)
            starts[chosen] = windows * self.context_length + self._offset(key)
        return starts

    def batch(
        self,
        step: int,
        tokens: np.ndarray,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Return one worker's batch, int64, (its sequences, context_length)."""
        assert len(tokens) == self.num_tokens
        starts = self.starts(step, global_batch=global_batch, rank=rank, world_size=world_size)
        return Batch.of_text(_gather(tokens, starts, self.context_length))

    def _offset(self, key: int) -> int:
        slack = self.num_tokens - self.num_windows * self.context_length
        return _mix(key) % (min(slack, self.context_length - 1) + 1)


def check_even_split(global_batch: int, num_workers: int, *, section: str = "training") -> None:
    """Raise a `UserError`, about settings of `section`, if workers cannot share a batch evenly."""
    if global_batch % num_workers or global_batch < 1:
        raise UserError(
            f"a step has {global_batch} sequences, which {num_workers} workers cannot share "
            f"evenly; change {section}.num_tokens_per_step, or the number of workers"
        )


def validation_batches(
    tokens: np.ndarray, *, context_length: int, num_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """Yield fixed sequences, spread evenly over the tokens, int64, (<= batch_size, context_length).

    Args:
        num_tokens: At most this many tokens in all, rounded down to whole sequences.

    Raises:
        UserError: If there are fewer tokens than one sequence.
    """
    check_text_length(len(tokens), context_length, "validation")
    available = len(tokens) // context_length
    wanted = min(max(1, num_tokens // context_length), available)
    starts = np.arange(wanted, dtype=np.int64) * available // wanted * context_length
    for first in range(0, wanted, batch_size):
        yield Batch.of_text(_gather(tokens, starts[first : first + batch_size], context_length))


def check_text_length(num_tokens: int, context_length: int, split: str) -> None:
    """Raise a `UserError` if the text of a split has fewer tokens than one sequence."""
    if num_tokens < context_length:
        raise UserError(
            f"the {split} text has {num_tokens} tokens, fewer than one sequence of "
            f"{context_length}; give more text or set a smaller model.context_length"
        )


def _gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    rows = starts[:, None] + np.arange(length, dtype=np.int64)
    return torch.from_numpy(tokens[rows].astype(np.int64))


def permute(values: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of `values`, int64, under the permutation of range(size) of a `key`."""
    # A Feistel network over the next power of four; images outside the range are permuted again.
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(_mix(key + number)) for number in range(1, _FEISTEL_ROUNDS + 1)]
    images = values.astype(np.uint64)
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        left, right = images[outside] >> np.uint64(half), images[outside] & low
        for round_key in keys:
            left, right = right, left ^ (_mix_array(right ^ round_key) & low)
        images[outside] = left << np.uint64(half) | right
        outside = images >= np.uint64(size)
    return images.astype(np.int64)


def _mix(value: int) -> int:
    # splitmix64's finalizer: every bit of the input changes about half of the output's.
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ values >> np.uint64(31)
    return mixed
