"""Dry runs: a block in which the workspace is only read.

Inside it `open_workspace` makes no folder, checksums leave no stamp, and files that were not
verified before are not read for it. A function that would write all the same fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_is_read_only = ContextVar("is_read_only", default=False)


@contextmanager
def read_only() -> Iterator[None]:
    """Only read the workspace until the block, or the decorated function, ends."""
    token = _is_read_only.set(True)
    try:
        yield
    finally:
        _is_read_only.reset(token)


def is_read_only() -> bool:
    """Return whether a `read_only` block runs."""
    return _is_read_only.get()


def check_may_write(path: Path) -> None:
    """Fail if a `read_only` block runs; for functions that write in the workspace."""
    assert not is_read_only(), f"a dry run would write {path}"
