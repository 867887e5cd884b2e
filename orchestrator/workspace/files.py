"""Atomic files with checksums, and clear errors for damaged ones.

A file is written to a temporary name, flushed and renamed, and then its folder is flushed: after a
crash a reader finds the old content or the new one, and the new one once the writer has returned. A
damaged file is a `UserError` that names the file and the remedy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.read_only import check_may_write

T = TypeVar("T")

_CHECKSUM_KEY = "sha256_of_content"
DELETE_AND_RERUN = "delete it and run the command again"
INVALID_VALUE_ERRORS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""Errors of code that reads a missing value, or one of another type than was written."""
MAX_INDENTED_CHARACTERS = 1_000_000
"""Longer JSON is written in one line, ten times as fast and in less memory."""


def expand_user(path: Path | str) -> Path:
    """Return a path with `~` expanded; a `UserError` if `~NAME` is not a user of this machine."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def resolve_path(path: Path | str) -> Path:
    """Return the absolute path; a `UserError` if its links form a loop, or no user is `~NAME`."""
    path = expand_user(path)
    try:
        return path.resolve()
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a loop of links.
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def is_folder(path: Path | str) -> bool:
    """Return whether a typed path is a folder; False for a text that cannot be a path."""
    try:
        return expand_user(path).is_dir()
    except (OSError, ValueError):
        return False


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; it becomes `path` when the block ends without an error.

    Then the content is on disk, and so is the name. After an error nothing is left behind.
    """
    check_may_write(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; an object gets a checksum of its content."""
    if isinstance(value, Mapping):
        # A flipped bit can turn a number into another one and leave valid JSON.
        value = {**value, _CHECKSUM_KEY: _checksum(value)}
    write_text(path, json_text(value) + "\n")


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """Return JSON with a line for each entry, or in one line if it is very long."""
    text = json.dumps(value, allow_nan=allow_nan)
    if len(text) > MAX_INDENTED_CHARACTERS:
        return text
    return json.dumps(value, allow_nan=allow_nan, indent=2)


def read_json(path: Path, *, remedy: str = DELETE_AND_RERUN) -> Any:
    """Read JSON; None if the file is missing. An object's checksum is verified and removed.

    Raises:
        UserError: If the file is damaged; tells the user the `remedy`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error, remedy) from None
    if value is None:  # What is returned for a missing file is never written.
        raise _damaged(path, "it holds null", remedy)
    if isinstance(value, dict) and _CHECKSUM_KEY in value:
        written = value.pop(_CHECKSUM_KEY)
        if written != _checksum(value):
            raise _damaged(path, "its content is not what was written", remedy)
    return value


def read_json_object(path: Path, *, remedy: str = DELETE_AND_RERUN) -> dict[str, Any] | None:
    """Read a JSON object like `read_json`; a `UserError` also if the file holds something else."""
    value = read_json(path, remedy=remedy)
    if value is not None and not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object", remedy)
    return value


@contextmanager
def damage_as_user_error(path: Path, *, remedy: str = DELETE_AND_RERUN) -> Iterator[None]:
    """Convert errors of a block that reads a file's values to a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        raise (error if str(path) in str(error) else UserError(f"{path}: {error}")) from None
    except INVALID_VALUE_ERRORS as error:
        raise _damaged(path, error, remedy) from None


def read_cached(
    path: Path, parse: Callable[[dict[str, Any]], T | None], note: Callable[[str], None]
) -> T | None:
    """Read a stored measurement; None if it is missing or damaged, so that it is measured again.

    Args:
        parse: Builds the result from the file's JSON object; None if it holds something else.
        note: Called with a sentence if the file is damaged.
    """
    remedy = "it is measured again"
    try:
        found = read_json_object(path, remedy=remedy)
        with damage_as_user_error(path, remedy=remedy):
            return None if found is None else parse(found)
    except UserError as error:
        note(str(error))
        return None


def _damaged(path: Path, problem: Exception | str, remedy: str) -> UserError:
    existing = (parent for parent in reversed(path.parents) if os.path.lexists(parent))
    blocker = next((parent for parent in existing if not is_folder(parent)), None)
    if isinstance(problem, OSError) and blocker is not None:
        return UserError(
            f"cannot use {blocker}: it is not a folder ({problem.strerror}); fix it or move it "
            "away, then run the command again"
        )
    match problem:
        case RecursionError():
            reason = "it is nested too deep"
        case UnicodeDecodeError():
            reason = f"it is not UTF-8 text at byte {problem.start}"
        case IsADirectoryError():
            reason = "it is a folder"
        case OSError():
            reason = problem.strerror or type(problem).__name__
        case KeyError():
            reason = f"it has no {shortened(str(problem))}"
        case _:
            reason = shortened(" ".join(str(problem).split()))
    return UserError(f"{path} is damaged ({reason}); {remedy}")


def _checksum(value: Mapping[str, Any]) -> str:
    # Floats survive JSON exactly, so the parsed value gives the same text.
    text = json.dumps(value, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
