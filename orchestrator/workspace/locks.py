"""Exclusive locks between processes; the system releases the locks of a process that has ended.

The folder must be on a file system that supports locks.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

POLL_SECONDS = 0.1


@contextmanager
def lock_file(
    path: Path,
    *,
    seconds: float | None = None,
    should_stop: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[bool]:
    """Hold the lock of a file in the block; yields whether it was acquired. The file stays.

    Args:
        path: The lock file; it is made with its folder if it is missing.
        seconds: Longest wait for another process that holds it (default: until it is free).
        should_stop: Called every `POLL_SECONDS`; True ends the wait.
        clock, sleep: Measure time and wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    deadline = math.inf if seconds is None else clock() + seconds
    while not lock.is_locked:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            left = deadline - clock()
            if left <= 0.0 or (should_stop and should_stop()):
                break
            sleep(min(POLL_SECONDS, left))
    try:
        yield lock.is_locked
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file; writes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock of a file; None if it is not known.

    Only Linux knows it, of the processes of this machine and container.
    """
    with suppress(OSError):
        inode = f":{path.stat().st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # Such as `1: FLOCK ADVISORY WRITE 4711 fe:01:123 0 EOF`.
            if words[1] == "FLOCK" and words[5].endswith(inode) and int(words[4]) > 0:
                return int(words[4])
    return None


def lock_descriptor(descriptor: int) -> None:
    """Lock a file, open for writing as network file systems need it, until its descriptor closes.

    Raises:
        OSError: If another process has locked it, or its file system has no locks.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
