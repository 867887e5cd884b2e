"""Atomic files and folders, checksums that detect damage, and temporary folders.

A file is written to a temporary name, flushed and renamed, and then its folder is flushed. So after
a crash a reader finds the old or the new content; after the writer has returned, the new one. A
folder is filled under a temporary name and renamed; before a deletion it is renamed, too. Leftovers
of a crash have hidden names: folders are deleted by the next writer in the same parent, files
(`.NAME.PROCESS.tmp`) by `iiet-orch clean`. A damaged file raises a `DamagedFile` that names it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.workspace.errors import DamagedFile, UserError, path_error_message, shortened
from orchestrator.workspace.locks import lock_descriptor
from orchestrator.workspace.provenance import file_digest

INVALID_VALUE_ERRORS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""Errors of code that reads a value which is missing or has a wrong type."""
MAX_INDENTED_CHARACTERS = 1_000_000
"""Longer JSON is written in one line, which is ten times as fast and needs less memory."""
VERIFIED_NAME = ".verified.json"
"""File in a folder: name -> size, time and digest of each file when it was last read."""
SCRATCH_NAME = "ray"
"""Prefix of scratch folders; short because paths of sockets are limited."""
_TEMPORARY = ".iiet-temporary"
"""Suffix of temporary folders, which the next writer deletes unless they are locked."""
_UNLOCKED = ".iiet-unlocked"
"""Suffix of a temporary folder until it is locked."""
_LOCK = "lock"
_SHORT_PARENT = Path("/tmp")


def expand_user(path: Path | str) -> Path:
    """Return a path with `~` expanded; a `UserError` if `~NAME` is not a user of this machine."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def resolve_path(path: Path | str) -> Path:
    """Return the absolute path; a `UserError` if its links form a loop, or no user is `~NAME`."""
    try:
        return expand_user(path).resolve()
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a loop of links.
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


# Files


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes `path` when the block ends without an error.

    Content and name are then on disk. After an error nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException as error:  # Also of Ctrl-C.
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and str(error.filename) == str(temporary):
            error.filename = str(path)  # Users know this name, not the temporary one.
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, see `new_file`."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """Return JSON with a line for each entry, or in one line if it is very long."""
    text = json.dumps(value, allow_nan=allow_nan)
    if len(text) > MAX_INDENTED_CHARACTERS:
        return text
    return json.dumps(value, allow_nan=allow_nan, indent=2)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing.

    Raises:
        DamagedFile: If the file holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        sentence = path_error_message(error)
        raise (UserError(sentence) if sentence else damaged(path, error)) from None
    except (ValueError, RecursionError) as error:  # RecursionError: 100,000 opening brackets.
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object")
    return value


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Convert errors of a block that reads a file's values to a `DamagedFile` that names it."""
    try:
        yield
    except UserError as error:
        raise (error if str(path) in str(error) else UserError(f"{path}: {error}")) from None
    except INVALID_VALUE_ERRORS as error:
        raise damaged(path, error) from None


def damaged(path: Path, problem: Exception | str) -> DamagedFile:
    """Return the error of a damaged file or folder, and what to do."""
    reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
    return DamagedFile(
        f"{path} is damaged ({shortened(' '.join(reason.split()))}); restore it from a backup, or "
        "delete it, and run the command again"
    )


# Folders


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when the block ends without an error.

    An existing folder of that name is replaced at the end; after an error, it is unchanged.
    """
    unfinished = UnfinishedFolder(folder)
    try:
        yield unfinished.path
        unfinished.finish()
    finally:
        unfinished.close()


class UnfinishedFolder:
    """An unfinished folder of `new_folder`, for code that begins and finishes it in different
    functions."""

    def __init__(self, folder: Path) -> None:
        """Make an empty folder that is to become `folder`."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        delete_leftovers(folder.parent)
        self._folder = folder
        self._temporary, self._lock = _make_locked(folder)
        self.path = self._temporary / folder.name
        """Where to write."""
        try:
            self.path.mkdir()
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Flush what was written, and give the folder its name; it replaces an existing one."""
        for path in (*self.path.rglob("*"), self.path):
            flush_to_disk(path)
        replace_folder(self.path, self._folder)

    def close(self) -> None:
        """Release the lock, and delete what is not finished; call it once, and last."""
        # Closed before the deletion, because NFS keeps an open file and its folder.
        os.close(self._lock)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _make_locked(folder: Path, mode: int = 0o777) -> tuple[Path, int]:
    """Make a temporary folder for `folder`; return it with the descriptor that holds its lock.

    Other processes delete the folder only if its lock is free, after the end of this process.
    """
    # The folder is locked before it gets the name that other processes look for.
    unlocked = _temporary_name(folder).with_suffix(_UNLOCKED)
    unlocked.mkdir(mode)
    try:
        # The lock is a file that is open for writing, as network file systems require.
        lock = os.open(unlocked / _LOCK, os.O_RDWR | os.O_CREAT)
        # Without locks in the file system, other processes cannot lock the folder either.
        with suppress(OSError):
            lock_descriptor(lock)
        return unlocked.rename(unlocked.with_suffix(_TEMPORARY)), lock
    except BaseException:
        shutil.rmtree(unlocked, ignore_errors=True)
        raise


def replace_folder(source: Path, folder: Path) -> None:
    """Rename `source` to `folder` durably, and delete an earlier folder of that name.

    Raises:
        OSError: If it cannot be renamed; then the earlier folder is unchanged.
    """
    # A folder cannot be renamed to an existing name. So the earlier folder is moved away first,
    # repeatedly if other processes write the same name meanwhile.
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
    deleted = folder.rename(_temporary_name(folder))
    flush_to_disk(folder.parent)  # After a crash, a half-deleted folder must not reappear.
    shutil.rmtree(deleted, ignore_errors=True)


def delete_leftovers(parent: Path) -> None:
    """Delete what killed processes left half-written or half-deleted in a folder."""
    for leftover in leftovers(parent):
        shutil.rmtree(leftover, ignore_errors=True)


def leftovers(parent: Path, *, below: bool = False) -> Iterator[Path]:
    """Yield the folders that killed processes left in a folder; each is locked until the next one.

    Args:
        below: Also search the folders below.
    """
    pattern = f".*{_TEMPORARY}"
    for leftover in parent.rglob(pattern) if below else parent.glob(pattern):
        # An OSError means that the folder is in use, or belongs to another user.
        with suppress(OSError), ExitStack() as stack:
            # In a shared /tmp, a link could name a folder of somebody else's choice.
            if leftover.is_symlink():
                continue
            # A folder that was renamed to be deleted has no file to lock.
            with suppress(FileNotFoundError):
                lock = os.open(leftover / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
                stack.callback(os.close, lock)
                lock_descriptor(lock)
            yield leftover


def _temporary_name(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_TEMPORARY}")


@dataclass(frozen=True)
class ScratchFolder:
    """A temporary folder of this process outside the workspace; only this user may enter it."""

    folder: Path
    lock: int
    """Descriptor that holds its lock; child processes do not inherit it."""

    def delete(self) -> None:
        """Delete the folder with its content."""
        with suppress(OSError):
            os.close(self.lock)
        shutil.rmtree(self.folder, ignore_errors=True)


def make_scratch_folder(*, longest_path: int | None = None) -> ScratchFolder:
    """Make a temporary folder for this process, and delete those of killed ones.

    Args:
        longest_path: Characters; if the folder's path would be longer, it is made in `/tmp`.
    """
    parent = Path(tempfile.gettempdir())
    if longest_path and len(str(_temporary_name(parent / SCRATCH_NAME))) > longest_path:
        parent = _SHORT_PARENT
    delete_leftovers(parent)
    return ScratchFolder(*_make_locked(parent / SCRATCH_NAME, mode=0o700))


def abandoned_folders() -> Iterator[Path]:
    """Yield the scratch folders of processes that have ended, each while it is locked."""
    for parent in {Path(tempfile.gettempdir()), _SHORT_PARENT}:
        yield from leftovers(parent)


# Checksums of a folder's files. Size and time of each verified file are stored, so that the next
# process need not read it again.


def checksums_of(
    folder: Path,
    names: Iterable[str] | None = None,
    *,
    known: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return name -> SHA-256 of a folder's files, all of them when no names are given.

    The files count as verified, so that the next reader need not read them.

    Args:
        known: Name -> SHA-256 of files that were hashed while they were written.
    """
    if names is None:
        names = sorted(path.name for path in folder.iterdir())
    hashed = known or {}
    checksums = {name: hashed.get(name) or file_digest(folder / name) for name in names}
    _mark_verified(folder, checksums)
    return checksums


def damaged_file(
    folder: Path,
    checksums: Mapping[str, str],
    *,
    names: Iterable[str] | None = None,
    always: bool = False,
    remember: bool = False,
) -> str | None:
    """Return the first file that is missing or damaged as `NAME is ...`, or None.

    Args:
        checksums: Name -> SHA-256 as it was written.
        names: The files to verify (default: all that have a checksum).
        always: Also read files that have not changed since they were last verified.
        remember: Store that the files are intact, so that the next process need not read them.
    """
    stored_stamps = _verified_stamps(folder)
    newly_verified: dict[str, str] = {}
    for name in checksums if names is None else names:
        path = folder / name
        digest = checksums.get(name)
        if not path.is_file():
            return f"{name} is missing"
        if path.parent != folder or digest is None:  # A name such as `../other/file`.
            return f"{name} is not what was written"
        stamp = _stamp(path, digest)
        if always or stamp not in (stored_stamps.get(name), _STAMPS_OF_THIS_PROCESS.get(path)):
            if file_digest(path) != digest:
                return f"{name} was changed after writing"
            _STAMPS_OF_THIS_PROCESS[path] = stamp
        if stamp != stored_stamps.get(name):
            newly_verified[name] = digest
    if newly_verified and remember:
        with suppress(OSError):  # A read-only folder is verified each time.
            _mark_verified(folder, newly_verified)
    return None


_Stamp = list[int | str]
"""Size, time and digest of a file when it was verified; a list, as JSON has it."""
_STAMPS_OF_THIS_PROCESS: dict[Path, _Stamp] = {}
"""Stamps of the files that this process has verified. A plan stores nothing, so it needs these."""


def _mark_verified(folder: Path, checksums: Mapping[str, str]) -> None:
    stamps = {name: _stamp(folder / name, digest) for name, digest in checksums.items()}
    write_json(folder / VERIFIED_NAME, _verified_stamps(folder) | stamps)


def _stamp(path: Path, digest: str) -> _Stamp:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, digest]


def _verified_stamps(folder: Path) -> dict[str, _Stamp]:
    with suppress(UserError):  # Without a readable list, all files are verified again.
        return read_json(folder / VERIFIED_NAME) or {}
    return {}
