"""Choose the sequences of each training step: index arithmetic without state.

Sequences are numbered through all steps, so the step number is the whole position of a run. A
step's global batch does not depend on the number of workers: each takes its slice. An epoch of a
text visits each window of one context length once, in its own order and from its own offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from iiet.batch import Batch
from orchestrator.data.keyed_random import mix, permute
from orchestrator.workspace.errors import UserError


@dataclass(frozen=True)
class WindowOrder:
    """The windows of a text in the order of training; `seed` chooses it.

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

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """Return where the sequences with these numbers (from 0) start, int64."""
        starts = np.empty_like(positions)
        epochs = positions // self.num_windows
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = mix(self.seed * 0x9E3779B97F4A7C15 + int(epoch) + 1)
            windows = permute(positions[chosen] % self.num_windows, self.num_windows, key)
            starts[chosen] = windows * self.context_length + self._offset(key)
        return starts

    def _offset(self, key: int) -> int:
        slack = self.num_tokens - self.num_windows * self.context_length
        return mix(key) % (min(slack, self.context_length - 1) + 1)


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
    first, end = (global_batch * number // world_size for number in (rank, rank + 1))
    return step * global_batch + np.arange(first, end, dtype=np.int64)


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
        yield Batch.of_text(gather(tokens, starts[first : first + batch_size], context_length))


def check_text_length(num_tokens: int, context_length: int, split: str) -> None:
    """Raise a `UserError` if the text of a split has fewer tokens than one sequence."""
    if num_tokens < context_length:
        raise UserError(
            f"the {split} text has {num_tokens} tokens, fewer than one sequence of "
            f"{context_length}; give more text or set a smaller model.context_length"
        )


def gather(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Return the sequences that start there, int64, (starts, length)."""
    rows = starts[:, None] + np.arange(length, dtype=np.int64)
    return torch.from_numpy(tokens[rows].astype(np.int64))
