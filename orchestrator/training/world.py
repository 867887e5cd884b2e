"""A worker: its rank and device, and what runs work on a device. Without torch, so that plans can
name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.terminal.progress import Progress

T = TypeVar("T")
DeviceWork = Callable[[str, Progress], T]
"""Work that needs one device: gets its name and a progress display. Function and result can be
pickled."""


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


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank and device of one worker. A process group exists if `size` > 1."""

    rank: int = 0
    """This worker's number, from 0."""
    size: int = 1
    """Number of workers."""
    device: str = "cpu"
    """This worker's device, such as `cpu` or `cuda:0`."""
    parallel: str = "ddp"
    """`ddp`: each worker has the whole model; `fsdp`: each worker has a shard of it."""
    shards: int | None = None
    """Workers that share one copy of the model, if not all; it divides `size`."""

    @property
    def is_first(self) -> bool:
        """Whether this worker writes files and takes decisions."""
        return self.rank == 0

    @property
    def is_gpu(self) -> bool:
        """Whether its device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def is_sharded(self) -> bool:
        """Whether the model is sharded over the workers."""
        return self.size > 1 and self.parallel == "fsdp"

    @property
    def num_shards(self) -> int:
        """Number of workers that share one copy of the model; 1 if each has all of it."""
        return self.shards or self.size if self.is_sharded else 1
