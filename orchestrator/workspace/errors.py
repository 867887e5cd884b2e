"""Error types, and short quotes of values in messages.

A user's mistake is a `UserError`: one sentence that names what was received, what is allowed and
what to do next. Errors are shown and stored, so passwords in their texts are masked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator.workspace.credentials import mask_secrets

if TYPE_CHECKING:
    from pydantic import ValidationError


class _MaskedError(Exception):
    def __init__(self, text: str = "") -> None:
        super().__init__(mask_secrets(text))


class UserError(_MaskedError, ValueError):
    """A mistake that the user can fix; its text says how. Exit code 2."""


class DeviceError(UserError):
    """A setting that the device of one worker does not allow; its other workers may not notice."""


class Interrupted(_MaskedError):
    """A stop by Ctrl-C or SIGTERM; its text says what is saved. Exit code 130.

    A function makes the text when it is shown: workers may save until Ray has ended.
    """

    def __init__(self, text: str | Callable[[], str] = "") -> None:
        super().__init__("" if callable(text) else text)
        self._late_text = text if callable(text) else None

    def __str__(self) -> str:
        return mask_secrets(self._late_text()) if self._late_text else super().__str__()


class RunFailed(_MaskedError, RuntimeError):
    """A failure that is not the user's mistake, such as a worker that died. Exit code 1."""


MAX_QUOTE_CHARACTERS = 200


def quoted(value: object) -> str:
    """Return the `repr` of a value, shortened for a message."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # An integer of 5,000 digits, or a list in itself.
        return f"a value too long to show ({type(value).__name__})"


def first_line(error: BaseException, *, with_type: bool = False) -> str:
    """Return the first line of an error's text without secrets, or its type if it has no text.

    Args:
        with_type: Put the type before the text.
    """
    name, lines = type(error).__name__, mask_secrets(str(error)).strip().splitlines()
    if not lines:
        return name
    return f"{name}: {lines[0]}" if with_type else lines[0]


def out_of_memory_text(error: BaseException) -> str:
    """Return the facts of PyTorch's out-of-memory error, without the allocator's statistics."""
    seen, is_free, _ = first_line(error).partition(" is free")
    return seen + is_free


def shortened(text: str) -> str:
    """Return a text without secrets, cut in the middle to fit a message."""
    text = mask_secrets(text)  # Before the cut: half an address is not recognized.
    if len(text) <= MAX_QUOTE_CHARACTERS:
        return text
    half = MAX_QUOTE_CHARACTERS // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"


_DISK_FULL = (
    os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full"
)  # fmt: skip


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one that it came from, says that a disk or a quota is full.

    Its text tells, because safetensors, sqlite and others raise errors of their own.
    """
    origin = error.__cause__ or error.__context__
    is_said = any(text in str(error) for text in _DISK_FULL)
    return is_said or (origin is not None and is_disk_full(origin))


def first_problem(error: ValidationError) -> str:
    """Return the first field that pydantic found to be wrong, and why."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return shortened(f"{place}: {first['msg']}" if place else first["msg"])


_PATH_PROBLEMS = {
    errno.EEXIST: "it exists and has another type",
    errno.EISDIR: "it is a folder, but a file is needed",
    errno.ENOTDIR: "a part of it is a file, but a folder is needed",
    errno.ELOOP: "its links form a loop",
    errno.ENAMETOOLONG: "it is too long for this file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "its file system is read-only",
}


def path_error_message(error: OSError) -> str | None:
    """Return a sentence for an unusable file or folder; None for any other error."""
    problem = _PATH_PROBLEMS.get(error.errno or 0)
    if problem is None or error.filename is None:
        return None
    return (
        f"cannot use {shortened(os.fsdecode(error.filename))}: {problem}; fix it or move it away, "
        "then run the command again"
    )
