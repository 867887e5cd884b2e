"""Work that needs one device, and what runs it: this process, or Ray elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from orchestrator.terminal.progress import Progress

T = TypeVar("T")
DeviceWork = Callable[[str, Progress], T]
"""Gets the name of a device and a progress display. Function and result can be pickled."""


class OnDevice(Protocol):
    """Runs work on some device; see `orchestrator.cluster.task`."""

    def __call__(self, work: DeviceWork[T], progress: Progress) -> T:
        """Return what the work returns, and raise what it raises.

        Raises:
            UserError: If there is no GPU although some are named.
            RunFailed: If the work's process died too often.
            Interrupted: After Ctrl-C or SIGTERM.
        """


def on_cpu(work: DeviceWork[T], progress: Progress) -> T:
    """Run work in this process, on the CPU."""
    return work("cpu", progress)
