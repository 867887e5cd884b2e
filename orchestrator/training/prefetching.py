"""Gather the next step's batch in a background thread while this step runs.

The thread reads the memory map, so a step does not wait for the disk, and pins the batch if it goes
to a GPU, so that it is copied without blocking. A batch depends on its step only: a run that
resumes gets the same batches, whatever was gathered ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from iiet.batch import Batch


class BatchPrefetcher:
    """Returns the batches that `gather` makes; close it to end its thread."""

    def __init__(self, gather: Callable[[int], Batch], *, num_steps: int, pin: bool) -> None:
        """Make no batch yet; no step from `num_steps` on is gathered ahead.

        Args:
            pin: Whether to move batches to pinned memory, which GPUs read without blocking.
        """
        self._gather, self._num_steps, self._pin = gather, num_steps, pin
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """Return a step's batch, on the CPU, and start to gather the following one.

        An error of the thread is raised here, in the step that needs the batch.
        """
        ahead, self._next = self._next, None
        is_ready = ahead is not None and ahead[0] == step
        batch = ahead[1].result() if ahead and is_ready else self._make(step)
        if step + 1 < self._num_steps:
            self._next = step + 1, self._pool.submit(self._make, step + 1)
        return batch

    def close(self) -> None:
        """Wait for the thread to end; a batch that nobody asked for is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _make(self, step: int) -> Batch:
        batch = self._gather(step)
        return batch.pinned() if self._pin else batch
