"""Files that others read are replaced whole, and carry a checksum.

A file is written to a temporary name, flushed and renamed, so a reader finds the old content or the
new one. A damaged file is reported as a `UserError` that names the file and the remedy.
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

T = TypeVar("T")

_CHECKSUM_KEY = "sha256_of_content"
"""Key of a stored object's checksum: a flipped bit would be another number and valid JSON."""
_DELETE_AND_RERUN = "delete it and run the command again"


def expand_user(path: Path | str) -> Path:
    """Return a path that a user typed, `~` written out.

    Raises:
        UserError: If it names a user whom this machine does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def resolve_path(path: Path | str) -> Path:
    """Return the absolute path that a user means.

    Raises:
        UserError: If it can be none: its links lead to themselves, or its user is not known.
    """
    path = expand_user(path)
    try:
        return path.resolve()
    except (RuntimeError, OSError, ValueError) as error:  # The first: a link without an end.
        raise UserError(f"cannot use the path {shortened(str(path))}: {error}") from None


def is_folder(path: Path | str) -> bool:
    """Tell whether a path that a user typed is a folder; also of a text that can be no path."""
    try:
        return expand_user(path).is_dir()
    except (OSError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def delete_folder(folder: Path) -> None:
    """Delete a folder, at once for those that come to read it; a deletion that is cut off leaves
    `NAME.PID.tmp`.

    Raises:
        OSError: If it is not there, or may not be renamed.
    """
    doomed = folder.rename(folder.with_name(f"{folder.name}.{os.getpid()}.tmp"))
    shutil.rmtree(doomed, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as a whole file (see `write_text`); an object with a checksum of its content."""
    if isinstance(value, Mapping):
        value = {**value, _CHECKSUM_KEY: _checksum(value)}
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *, remedy: str = _DELETE_AND_RERUN) -> Any:
    """Read JSON; None if the file is missing. An object's checksum is compared and left out.

    Args:
        path: The file.
        remedy: What a user should do if it is damaged.

    Raises:
        UserError: If the file is damaged; names it, and says the remedy.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged_file_error(path, error, remedy=remedy) from None
    if isinstance(value, dict) and _CHECKSUM_KEY in value:
        written = value.pop(_CHECKSUM_KEY)
        if written != _checksum(value):
            raise damaged_file_error(path, "its content is not what was written", remedy=remedy)
    return value


def read_json_object(path: Path, *, remedy: str = _DELETE_AND_RERUN) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing.

    Raises:
        UserError: If the file is damaged, or holds something else; names it, and says the remedy.
    """
    value = read_json(path, remedy=remedy)
    if value is not None and not isinstance(value, dict):
        raise damaged_file_error(path, "it holds no object", remedy=remedy)
    return value


@contextmanager
def damage_as_user_error(path: Path, *, remedy: str = _DELETE_AND_RERUN) -> Iterator[None]:
    """Turn what goes wrong with a file's values into one sentence that names the file.

    Raises:
        UserError: If a value is missing or of another kind than was written.
    """
    try:
        yield
    except UserError as error:
        raise (error if str(path) in str(error) else UserError(f"{path}: {error}")) from None
    except INVALID_VALUE_ERRORS as error:
        raise damaged_file_error(path, error, remedy=remedy) from None


def read_cached(
    path: Path, parse: Callable[[dict[str, Any]], T | None], note: Callable[[str], None]
) -> T | None:
    """Read what was measured before; a damaged file costs nothing but measuring again.

    Args:
        path: A JSON object.
        parse: Makes the values of it; None where it holds something else.
        note: Called with a sentence if the file is damaged.

    Returns:
        The values; None where they have to be measured.
    """
    remedy = "it is measured again"
    try:
        found = read_json_object(path, remedy=remedy)
        with damage_as_user_error(path, remedy=remedy):
            return None if found is None else parse(found)
    except UserError as error:
        note(str(error))
        return None


INVALID_VALUE_ERRORS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip
"""What reading a value raises that is missing or of another kind than was written."""


def damaged_file_error(
    path: Path, problem: Exception | str, *, remedy: str = _DELETE_AND_RERUN
) -> UserError:
    """Return the error for a file that cannot be read: what is wrong with it, and the remedy."""
    in_the_way = next((p for p in reversed(path.parents) if _is_no_folder(p)), None)
    if isinstance(problem, OSError) and in_the_way is not None:
        return UserError(
            f"cannot use {in_the_way}: it is no folder ({problem.strerror}); put it right, or move "
            "it away, and run the command again"
        )
    if isinstance(problem, RecursionError):
        reason = "it is nested too deep"
    elif isinstance(problem, UnicodeDecodeError):
        reason = f"it is not UTF-8 text at byte {problem.start}"
    elif isinstance(problem, IsADirectoryError):
        reason = "it is a folder"
    elif isinstance(problem, OSError):
        reason = problem.strerror or type(problem).__name__
    elif isinstance(problem, KeyError):
        reason = f"it has no {shortened(str(problem))}"
    else:
        reason = shortened(" ".join(str(problem).split()))
    return UserError(f"{path} is damaged ({reason}); {remedy}")


def _is_no_folder(path: Path) -> bool:
    return os.path.lexists(path) and not is_folder(path)


def _checksum(value: Mapping[str, Any]) -> str:
    # What is read back gives the same text, for Python writes numbers so that they survive it.
    text = json.dumps(value, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
