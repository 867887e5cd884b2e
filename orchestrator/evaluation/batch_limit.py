"""The size of an evaluation's batches, halved when a GPU runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from orchestrator.workspace.errors import DeviceError, out_of_memory_text

T = TypeVar("T")


class BatchLimit:
    """The largest size of a batch, in some unit; smaller after a batch that did not fit.

    Args:
        size: The limit at first.
        unit: What is counted, for messages.
        note: Called with a sentence when the limit is halved.
    """

    def __init__(self, size: int, unit: str, note: Callable[[str], None] | None = None) -> None:
        self.size = size
        self.was_halved = False
        self._unit, self._note = unit, note

    def run(self, work: Callable[[], T], *, size: int, can_split: bool) -> T | None:
        """Return the result of work on a batch; None if it is to be split, because it did not fit.

        Args:
            size: The batch's size.
            can_split: Whether it can be split.

        Raises:
            DeviceError: If a batch that cannot be split does not fit.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            if not can_split:
                raise DeviceError(
                    f"the evaluation of one sequence ran out of memory "
                    f"({out_of_memory_text(error)}); use a GPU with more memory, or --set "
                    "evaluation.precision=bf16"
                ) from None
        # Not in the handler: there, the error still holds the tensors of the batch.
        self.size, self.was_halved = max(1, size // 2), True
        torch.cuda.empty_cache()
        if self._note:
            self._note(
                f"a batch of the evaluation ran out of memory; from here on, it has at most "
                f"{self.size:,} {self._unit}"
            )
        return None
