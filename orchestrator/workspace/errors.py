"""The one error type that stands for a user's mistake.

Everything that a user can put right (a misspelt setting, a missing file, too few GPUs) is raised as
a `UserError` with a sentence that names what was received, what is allowed and what to do next. The
command line prints that sentence and exits with code 2; nothing else is caught there, so that a
defect of ours keeps its traceback in the log. `Interrupted` stands for a stop that the user asked
for: it says what is saved, the same command goes on from there, the exit code is 130.

Errors are shown, logged and stored, and many quote an address that a user or a library has written:
their texts never hold its password (`orchestrator.workspace.credentials`).
"""

from __future__ import annotations

import errno
import os

from orchestrator.workspace.credentials import mask_secrets


class UserError(ValueError):
    """A mistake that the user can put right; its text says how. Exit code 2."""

    def __init__(self, text: str = "") -> None:
        super().__init__(mask_secrets(text))


class Interrupted(Exception):
    """A stop asked for by the user (Ctrl-C, SIGTERM); says what is saved. Exit code 130."""

    def __init__(self, text: str = "") -> None:
        super().__init__(mask_secrets(text))


class RunFailed(RuntimeError):
    """A failure that is not the user's mistake, such as a worker that died. Exit code 1."""

    def __init__(self, text: str = "") -> None:
        super().__init__(mask_secrets(text))


MAX_QUOTE_CHARACTERS = 200
"""Characters of a value that a message shows at most."""


def quoted(value: object) -> str:
    """Return how Python writes a value, cut to what a message may show."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # An integer of 5,000 digits, or what holds itself.
        return f"a value too long to show ({type(value).__name__})"


def shortened(text: str) -> str:
    """Return a text, cut in the middle where it is longer than a message may show."""
    text = mask_secrets(text)  # First: half an address is no address any more.
    if len(text) <= MAX_QUOTE_CHARACTERS:
        return text
    half = MAX_QUOTE_CHARACTERS // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"


_WAYS_OF_A_PATH = {
    errno.EEXIST: "it is there already, and of another kind",
    errno.EISDIR: "it is a folder where a file should be",
    errno.ENOTDIR: "a part of it is a file where a folder should be",
    errno.ELOOP: "its links lead to themselves",
    errno.ENAMETOOLONG: "it is longer than this machine's names may be",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.EROFS: "its file system is read-only",
}


def path_error_message(error: OSError) -> str | None:
    """Return a sentence on a file or folder that is not what it should be; None where the error is
    another one."""
    reason = _WAYS_OF_A_PATH.get(error.errno or 0)
    if reason is None or error.filename is None:
        return None
    return (
        f"cannot use {shortened(os.fsdecode(error.filename))}: {reason}; put it right, or move it "
        "away, and run the command again"
    )
