"""Shared memory for Ray's object store.

In a container it is often too small: Docker's default is 64 MB. Ray then puts the store on the
disk and says so in a log only, and NCCL, which needs shared memory too, fails later.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from orchestrator.terminal.render import format_bytes
from orchestrator.workspace.errors import UserError

OBJECT_STORE_BYTES = 128 * 2**20
"""Object store of a Ray that a command starts: data does not travel through it; its own minimum is
75 MB."""
SHARED_MEMORY = Path("/dev/shm")
SLOW_STORAGE_SWITCH = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Variable that lets Ray, and these checks, accept an object store on a disk."""


def check_shared_memory(needed: int, available: int | None, place: str = "this machine") -> None:
    """Refuse an object store that does not fit into shared memory.

    Args:
        needed: Bytes of the object store.
        available: Bytes of shared memory; None if the system has none.

    Raises:
        UserError: If it does not fit.
    """
    if available is None or needed <= available or os.environ.get(SLOW_STORAGE_SWITCH):
        return
    raise UserError(
        f"Ray's object store takes {format_bytes(needed)}, and {SHARED_MEMORY} of {place} has "
        f"{format_bytes(available)}; start the container with --shm-size=1g or more (Kubernetes: "
        f"an emptyDir with medium Memory), or set {SLOW_STORAGE_SWITCH}=1 to put it on the disk"
    )


def total_shared_memory() -> int | None:
    """Return the size of this machine's shared memory in bytes; None on systems without it."""
    return psutil.disk_usage(str(SHARED_MEMORY)).total if SHARED_MEMORY.is_dir() else None


def free_shared_memory() -> int | None:
    """Return its free bytes; None on systems without it."""
    return psutil.disk_usage(str(SHARED_MEMORY)).free if SHARED_MEMORY.is_dir() else None
