"""Short-lived folders beside the system's temporary files, each owned by one process.

The owner keeps a lock on a file in its folder for as long as it lives. The system drops the lock of
a process that ends, however it ends. So a folder whose owner file nobody locks is left over, and
the next process deletes it. A process number would not do instead: numbers are used again, and they
mean nothing to another container that shares the folder of temporary files.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "iiet-orch-ray-"
OWNER_NAME = "owner"
_MARK = "Scratch files of iiet-orch; deleted when the process that locks this file has ended.\n"


@dataclass(frozen=True)
class ScratchFolder:
    """A temporary folder of this process."""

    folder: Path
    """Empty at first but for the owner file; only this user may enter it."""
    owner_file: int
    """Descriptor that holds the lock; processes that are started here do not inherit it."""

    def delete(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self.owner_file)


def make_scratch_folder(*, longest_path: int | None = None) -> ScratchFolder:
    """Make a temporary folder for this process, and delete those whose owners have ended.

    Args:
        longest_path: Most characters of its path; it lies in `/tmp` where the system's folder for
            temporary files has a longer name.
    """
    parent = Path(tempfile.gettempdir())
    if longest_path and len(str(parent / PREFIX)) + 8 > longest_path:  # 8 random characters follow
        parent = Path("/tmp")
    delete_abandoned_folders(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Locked before it gets its name, so that nobody ever sees it unlocked while this process lives.
    unnamed = folder / f"{OWNER_NAME}.new"
    owner_file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(owner_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(owner_file, _MARK.encode())
    unnamed.rename(folder / OWNER_NAME)
    return ScratchFolder(folder, owner_file)


def delete_abandoned_folders(parent: Path) -> None:
    """Delete scratch folders of this user whose owners have ended, and nothing else.

    A folder of that name without our owner file is somebody else's, and links are not followed.
    """
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if not _is_own_folder(folder):
                continue
            owner_file = os.open(folder / OWNER_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(owner_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.read(owner_file, 2 * len(_MARK)) == _MARK.encode():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner_file)


def _is_own_folder(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
