"""Temporary folders, each owned by one process and deleted after it, even if it is killed.

The owner locks a file in its folder until it ends, so the next process recognizes and deletes
abandoned folders. Process ids are reused, and differ between containers that share `/tmp`.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from orchestrator.workspace.locks import lock_descriptor

PREFIX = "iiet-orch-ray-"
OWNER_NAME = "owner"
_MARK = "Scratch files of iiet-orch; deleted when the process that locks this file has ended.\n"
_NUM_RANDOM_CHARACTERS = 8
_SHORT_PARENT = Path("/tmp")


@dataclass(frozen=True)
class ScratchFolder:
    """A temporary folder of this process."""

    folder: Path
    """Holds only the owner file at first; only this user may enter it."""
    owner_file: int
    """Descriptor that holds the lock; child processes do not inherit it."""

    def delete(self) -> None:
        """Delete the folder with its content."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self.owner_file)


def make_scratch_folder(*, longest_path: int | None = None) -> ScratchFolder:
    """Make a temporary folder for this process, and delete abandoned ones.

    Args:
        longest_path: Characters; if the folder's path would be longer, it is made in `/tmp`.
    """
    parent = Path(tempfile.gettempdir())
    if longest_path and len(str(parent / PREFIX)) + _NUM_RANDOM_CHARACTERS > longest_path:
        parent = _SHORT_PARENT
    delete_abandoned_folders(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Locked before it gets its name, so that no process sees it unlocked while this one lives.
    unnamed = folder / f"{OWNER_NAME}.new"
    owner_file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    lock_descriptor(owner_file)
    os.write(owner_file, _MARK.encode())
    unnamed.rename(folder / OWNER_NAME)
    return ScratchFolder(folder, owner_file)


def delete_abandoned_folders(parent: Path) -> None:
    """Delete this user's scratch folders whose owners have ended; follow no links."""
    for folder in abandoned_folders(parent):
        shutil.rmtree(folder, ignore_errors=True)


def abandoned_folders(*parents: Path) -> Iterator[Path]:
    """Yield this user's scratch folders whose owners have ended, each while it is locked.

    `parents`: where to look; all places where `make_scratch_folder` makes them, if there are none.
    """
    places = set(parents) or {Path(tempfile.gettempdir()), _SHORT_PARENT}
    for folder in chain.from_iterable(place.glob(f"{PREFIX}*") for place in places):
        with suppress(OSError):
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            owner_file = os.open(folder / OWNER_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                lock_descriptor(owner_file)
                if os.read(owner_file, 2 * len(_MARK)) == _MARK.encode():
                    yield folder
            finally:
                os.close(owner_file)
