"""Exclusive locks between processes; the system releases the locks of a process that has ended.

A lock is a file that stays. Who takes it writes its process and host into it, which count only
while the lock is held. The folder must be on a file system that supports locks.
"""

from __future__ import annotations

import fcntl
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.workspace.errors import UserError

POLL_SECONDS = 0.1
LOOK_SECONDS = 0.001
"""Pause before a lock is tried again that another process has only looked at."""


@contextmanager
def lock_file(
    path: Path, *, seconds: float | None = None, should_stop: Callable[[], bool] | None = None
) -> Iterator[bool]:
    """Hold the lock of a file in the block; yields whether it was acquired.

    Args:
        path: The lock file; it is made with its folder if it is missing.
        seconds: Longest wait for another process that holds it (default: until it is free).
        should_stop: Called every `POLL_SECONDS`; True ends the wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_ours = False
        while not is_ours:
            try:
                lock_descriptor(descriptor)
                is_ours = True
                write_holder(descriptor)
            except BlockingIOError:
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0.0 or (should_stop and should_stop()):
                    break
                time.sleep(min(POLL_SECONDS, seconds_left))
        yield is_ours
    finally:
        os.close(descriptor)


def lock_descriptor(descriptor: int) -> None:
    """Lock a file, open for writing as network file systems need it, until its descriptor closes.

    A process that only looks, by `is_locked`, is waited for.

    Raises:
        OSError: If another process has locked it, or its file system has no locks.
    """
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        # Who looks holds a shared lock for microseconds. Beside that, another shared one can be
        # had; beside an exclusive one, this raises.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(LOOK_SECONDS)


def write_holder(descriptor: int) -> None:
    """Write who holds a lock into its file, for `lock_holder`."""
    with suppress(OSError):  # The disk is full: the lock is held all the same.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # A shared lock: NFS gives an exclusive one only for a file that is open for writing.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds a lock; None if none of this machine is known to."""
    holder = _read_holder(path)
    if holder and is_locked(path) and holder[1] == socket.gethostname():
        return holder[0]
    return None


def _read_holder(path: Path) -> tuple[int, str] | None:
    """Return the process and the host that a lock's file names; they may have ended."""
    with suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        process, host = file.readline().split()
        return int(process), host
    return None


@contextmanager
def refuse_second(path: Path, work: str) -> Iterator[None]:
    """Hold the lock of a file in the block; work that another process does is refused.

    Args:
        path: The lock file; it is made with its folder if it is missing.
        work: What the lock stands for, as the subject of the error's sentence.

    Raises:
        UserError: If another process holds the lock; names it and its host.
    """
    with lock_file(path, seconds=0.0) as is_ours:
        if not is_ours:
            holder = _read_holder(path)
            place = f"process {holder[0]} on {holder[1]}" if holder else "another process"
            raise UserError(
                f"{work} runs already, in {place}; wait until it has ended, or stop it and run the "
                "same command again"
            )
        yield
