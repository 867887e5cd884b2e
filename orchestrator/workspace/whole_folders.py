"""Folders that are whole or absent, and whose files are verified once.

`new_folder` fills a folder under a temporary name, flushes it to disk and renames it, so a crash
leaves nothing under the final name. `damaged_file` compares files with their checksums; it stores
size and time of what it read, so an unchanged file is not read again by the next process.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json_object, write_json
from orchestrator.workspace.provenance import file_digest

VERIFIED_NAME = ".verified.json"
"""File in a folder: name -> size, time and digest of each file when it was last read."""
_FILLING, _UNLOCKED = ".filling", ".unlocked"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends without an error.

    An existing folder of that name is replaced at the end. After an error, nothing is left. What a
    killed process left is deleted by the next one that writes the same folder: the writer holds a
    lock on its temporary folder, which the system drops when the process ends.

    Raises:
        OSError: If the disk is full or the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(folder)
    # Locked before it gets the name that others look for.
    made = folder.with_name(f"{_prefix(folder)}{secrets.token_hex(8)}{_UNLOCKED}")
    made.mkdir()
    lock = os.open(made, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems lock no folders.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        filling = made.rename(made.with_name(made.name.removesuffix(_UNLOCKED) + _FILLING))
        try:
            yield filling
            for path in (*filling.rglob("*"), filling):
                flush_to_disk(path)
            replace_folder(filling, folder)
        except BaseException:
            shutil.rmtree(filling, ignore_errors=True)
            raise
        flush_to_disk(folder.parent)
    finally:
        os.close(lock)


def replace_folder(source: Path, folder: Path) -> None:
    """Rename `source` to `folder`, and delete what had that name before.

    Raises:
        OSError: If it cannot be renamed; the earlier folder is then in place.
    """
    doomed = source.with_name(f"{_prefix(folder)}{os.getpid()}{_FILLING}")
    had_one = folder.exists()
    if had_one:
        folder.rename(doomed)
    try:
        source.rename(folder)
    except OSError:
        if had_one:
            doomed.rename(folder)
        raise
    shutil.rmtree(doomed, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Raises:
        OSError: If they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksums_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return name -> SHA-256 of a folder's files, all of them when no names are given."""
    wanted = sorted(path.name for path in folder.iterdir()) if names is None else names
    return {name: file_digest(folder / name) for name in wanted}


def damaged_file(
    folder: Path,
    checksums: Mapping[str, str],
    *,
    names: Iterable[str] | None = None,
    always: bool = False,
) -> str | None:
    """Return which file is missing or is not what was written, as `NAME is ...`; None if all are.

    Args:
        folder: The folder.
        checksums: Name -> SHA-256 as it was written.
        names: The files to verify; all that have a checksum when unset.
        always: Read every file, also those that have not changed since they were last verified.
    """
    verified = _verified(folder)
    read: dict[str, list[int | str]] = {}
    for name in checksums if names is None else names:
        path, digest = folder / name, checksums.get(name)
        try:
            stat = path.stat()
        except OSError:
            return f"{name} is missing"
        stamp: list[int | str] = [stat.st_size, stat.st_mtime_ns, str(digest)]
        if always or verified.get(name) != stamp:
            if path.parent != folder or not path.is_file() or file_digest(path) != digest:
                return f"{name} is not what was written"
            read[name] = stamp
    if read:
        with suppress(OSError):  # A read-only folder is verified each time.
            write_json(folder / VERIFIED_NAME, verified | read)
    return None


def _verified(folder: Path) -> dict[str, list[int | str]]:
    try:
        return read_json_object(folder / VERIFIED_NAME) or {}
    except UserError:
        return {}


def _prefix(folder: Path) -> str:
    return f".{folder.name}."


def _delete_leftovers(folder: Path) -> None:
    for leftover in folder.parent.glob(f"{_prefix(folder)}*{_FILLING}"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)
