"""Counts how often the host waits for the device, by PyTorch's own warnings.

In debug mode `warn`, PyTorch warns at each operation of its own that waits (`.item()`, a blocking
copy, `nonzero`). Waits inside libraries are not seen. Each warning names the line of Python that
caused it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_TEXT = "synchronizing CUDA operation"


class Synchronizations:
    """Counts warnings between calls of `end_step`."""

    def __init__(self, caught: list[warnings.WarningMessage]) -> None:
        self._caught = caught
        self._num_seen = 0
        self.by_step: list[int] = []
        """Number of waits of each step."""
        self.places: list[Counter[str]] = []
        """Where each step waited: file and line to number of times."""

    def end_step(self) -> None:
        """Count the warnings since the last call."""
        new = [w for w in self._caught[self._num_seen :] if _TEXT in str(w.message)]
        self._num_seen = len(self._caught)
        self.by_step.append(len(new))
        self.places.append(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in new))


@contextmanager
def counted_synchronizations() -> Iterator[Synchronizations]:
    """Count the waits for the GPU, if there is one, in a block."""
    is_gpu = torch.cuda.is_available()
    before = torch.cuda.get_sync_debug_mode() if is_gpu else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield Synchronizations(caught)
        finally:
            if is_gpu:
                torch.cuda.set_sync_debug_mode(before)
