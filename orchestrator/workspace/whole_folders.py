"""Folders that are whole or absent, and whose files are verified once.

A new folder is filled under a temporary name and renamed; a folder is renamed before it is deleted.
What a crash leaves in between has a hidden name, and the next writer in that parent deletes it.
Size and time of each verified file are stored, so the next process does not read it again.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import flush_to_disk, read_json_object, write_json
from orchestrator.workspace.locks import lock_descriptor
from orchestrator.workspace.provenance import file_digest
from orchestrator.workspace.read_only import check_may_write, is_read_only

VERIFIED_NAME = ".verified.json"
"""File in a folder: name -> size, time and digest of each file when it was last read."""
_TEMPORARY, _UNLOCKED, _LOCK = ".iiet-temporary", ".iiet-unlocked", "lock"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends without an error.

    An existing folder of that name is replaced at the end; after an error, it is unchanged. The
    writer fills it within a temporary folder, and locks a file there, so that others delete that
    folder only after this process has ended.
    """
    check_may_write(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    delete_leftovers(folder.parent)
    # Locked before it gets the name that others look for.
    temporary = _temporary_name(folder).with_suffix(_UNLOCKED)
    temporary.mkdir()
    try:
        # A file that is open for writing: network file systems lock nothing else.
        lock = os.open(temporary / _LOCK, os.O_RDWR | os.O_CREAT)
        try:
            with suppress(OSError):  # Then nobody else can lock it either, and it stays.
                lock_descriptor(lock)
            temporary = temporary.rename(temporary.with_suffix(_TEMPORARY))
            filling = temporary / folder.name
            filling.mkdir()
            yield filling
            for path in (*filling.rglob("*"), filling):
                flush_to_disk(path)
            replace_folder(filling, folder)
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(source: Path, folder: Path) -> None:
    """Rename `source` to `folder`, on disk too, and delete what had that name before.

    Raises:
        OSError: If it cannot be renamed; the earlier folder is then in place.
    """
    replaced: list[Path] = []
    while True:
        try:
            source.rename(folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if replaced:
                    replaced[-1].rename(folder)
                raise
        with suppress(FileNotFoundError):  # Another process replaced it at the same moment.
            replaced.append(folder.rename(_temporary_name(folder)))
    flush_to_disk(folder.parent)
    for earlier in replaced:
        shutil.rmtree(earlier, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder; for readers it is gone at once."""
    check_may_write(folder)
    deleted = folder.rename(_temporary_name(folder))
    flush_to_disk(folder.parent)  # A crash must not bring back the name of half a folder.
    shutil.rmtree(deleted, ignore_errors=True)


def delete_leftovers(parent: Path) -> None:
    """Delete what killed processes left half-written or half-deleted in a folder."""
    for leftover in leftovers(parent):
        shutil.rmtree(leftover, ignore_errors=True)


def leftovers(parent: Path, *, below: bool = False) -> Iterator[Path]:
    """Yield what killed processes left in a folder, each while it is locked.

    What was renamed to be deleted has no lock.

    Args:
        below: Look into the folders below, too.
    """
    pattern = f".*{_TEMPORARY}"
    for leftover in parent.rglob(pattern) if below else parent.glob(pattern):
        with suppress(OSError), ExitStack() as stack:
            if leftover.is_symlink():
                continue
            with suppress(FileNotFoundError):
                lock = os.open(leftover / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
                stack.callback(os.close, lock)
                lock_descriptor(lock)
            yield leftover


def checksums_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """Return name -> SHA-256 of a folder's files, all of them when no names are given."""
    wanted = sorted(path.name for path in folder.iterdir()) if names is None else names
    return {name: file_digest(folder / name) for name in wanted}


def mark_verified(folder: Path, checksums: Mapping[str, str]) -> None:
    """Record that files have these checksums now, so that the next reader need not read them."""
    stamps = {name: _stamp(folder / name, digest) for name, digest in checksums.items()}
    write_json(folder / VERIFIED_NAME, _verified(folder) | stamps)


def damaged_file(
    folder: Path,
    checksums: Mapping[str, str],
    *,
    names: Iterable[str] | None = None,
    always: bool = False,
) -> str | None:
    """Return the first file that is missing or damaged as `NAME is ...`, or None.

    Args:
        checksums: Name -> SHA-256 as it was written.
        names: The files to verify (default: all that have a checksum).
        always: Read also files that have not changed since they were last verified.

    A `read_only` block compares sizes only.
    """
    verified = _verified(folder)
    read: dict[str, str] = {}
    for name in checksums if names is None else names:
        path, digest = folder / name, checksums.get(name)
        if not path.is_file():
            return f"{name} is missing"
        if path.parent != folder or digest is None:
            return f"{name} is not what was written"
        stamp = verified.get(name)
        if is_read_only():
            if stamp and stamp[2] == digest and stamp[0] != path.stat().st_size:
                return f"{name} was changed after writing"
        elif always or stamp != _stamp(path, digest):
            if file_digest(path) != digest:
                return f"{name} was changed after writing"
            read[name] = digest
    if read:
        with suppress(OSError):  # A read-only folder is verified each time.
            mark_verified(folder, read)
    return None


def _stamp(path: Path, digest: str) -> list[int | str]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, digest]


def _verified(folder: Path) -> dict[str, list[int | str]]:
    try:
        return read_json_object(folder / VERIFIED_NAME) or {}
    except UserError:
        return {}


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}{_TEMPORARY}")
