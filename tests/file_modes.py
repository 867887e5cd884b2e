"""Let the modes of files bind root, too: it may write everywhere, and CI runs as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION_3 = 0x20080522
_IGNORES_MODES = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextmanager
def only_readable(folder: Path) -> Iterator[None]:
    """Make a folder with all its content read-only until the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # Effective, permitted, inheritable; then the higher bits.
    capabilities = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    fewer_capabilities = (ctypes.c_uint32 * 6)(*capabilities)
    fewer_capabilities[0] &= ~_IGNORES_MODES
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(modes[path] & ~0o222)
    assert libc.capset(header, fewer_capabilities) == 0
    try:
        assert not os.access(folder, os.W_OK, effective_ids=True)
        yield
    finally:
        libc.capset(header, capabilities)
        for path in paths:
            path.chmod(modes[path])
