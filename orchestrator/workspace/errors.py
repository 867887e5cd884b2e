"""Error types, short quotes of values in messages, and masks for secrets.

A user's mistake is a `UserError`: one sentence that names what was received, what is allowed and
what to do next. Errors are shown and stored, so passwords, keys and tokens in them are masked.
They occur in addresses, such as `http://USER:PASSWORD@host` or `s3://bucket?secret=...`, and in
environment variables such as `HF_TOKEN`, which libraries repeat in their errors. Typed addresses
may be invalid (a key may contain a slash), so plain text is searched, and rather too much is
masked than too little.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MASK = "***"
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "APIKEY")
"""An environment variable is a secret if its name contains one of these."""
MAX_QUOTE_CHARACTERS = 200
_SHORTEST_SECRET = 8  # characters; shorter values are words such as `true`

# Everything up to the last @ of the host part, or of the whole word if a password may contain a
# slash; `host:8080/` is not a user with a password. The limit of 1,000 characters per password
# keeps the search fast: without it, a word of many addresses would take hours.
_USER = re.compile(r"(?<=://)(?:[^\s/?#]*|[^\s/?#:@]*:(?!\d{1,5}[/?#])\S{0,1000})@")
_SECRET_NAMES = (
    "key|pass|passwd|password|pwd|secret|token|credential|credentials|sig|signature|sas|apikey|auth"
)
_QUERY = re.compile(
    rf"([?&;](?:[\w.-]*[_.-])?(?:{_SECRET_NAMES})=)[^\s&;#'\"]+", flags=re.IGNORECASE
)
_ASSIGNMENT = re.compile(
    rf"(?<!\w)((?:[A-Z0-9]+_)*(?:{'|'.join(SECRET_WORDS)})(?:_[A-Z0-9]+)*=)[^\s,;'\"\]]+"
)


def mask_secrets(text: str) -> str:
    """Return a text with `***` instead of secrets.

    Secrets are users, passwords and keys of addresses, values assigned to names such as `HF_TOKEN`,
    and the values of such environment variables of this process.
    """
    secrets = {value for name, value in os.environ.items() if is_secret_name(name)}
    # Longest first, because one secret may begin with another.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, MASK)
    text = _USER.sub(f"{MASK}@", text)
    for pattern in (_QUERY, _ASSIGNMENT):
        text = pattern.sub(rf"\g<1>{MASK}", text)
    return text


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret, not a path."""
    parts = name.upper().split("_")
    return not set(SECRET_WORDS).isdisjoint(parts) and parts[-1] not in ("PATH", "FILE", "DIR")


def has_secret(address: str) -> bool:
    """Return whether an address holds a password or a key; a user name alone does not count."""
    user = _USER.search(address)
    return bool(user and ":" in user[0].rstrip("@")) or _QUERY.search(address) is not None


def strip_credentials(address: str) -> str:
    """Return an address without user and password, and with masked keys, as a public link."""
    return _QUERY.sub(rf"\g<1>{MASK}", _USER.sub("", address))


class _MaskedError(Exception):
    def __init__(self, text: str = "") -> None:
        super().__init__(mask_secrets(text))


class UserError(_MaskedError, ValueError):
    """A mistake that the user can fix; its text says how. Exit code 2."""


class DamagedFile(UserError):
    """A stored file is missing or is not what was written; its text names it. Exit code 1.

    It is a `UserError`, so that code which skips unusable files also skips damaged ones.
    """


class DeviceError(UserError):
    """A setting that a worker's device does not allow; other workers may not notice."""


class RunFailed(_MaskedError, RuntimeError):
    """A failure that is not the user's mistake, such as a worker that died. Exit code 1."""


class Interrupted(_MaskedError):
    """A stop by Ctrl-C or SIGTERM; its text says what is saved. Exit code 130.

    A function makes the text when it is shown: workers may save until Ray has ended.
    """

    def __init__(self, text: str | Callable[[], str] = "") -> None:
        super().__init__("" if callable(text) else text)
        self._late_text = text if callable(text) else None

    def __str__(self) -> str:
        return mask_secrets(self._late_text()) if self._late_text else super().__str__()


def joint_error(errors: Mapping[str, Exception]) -> Exception:
    """Return the error of the one job that failed, or one error that has those of several.

    Args:
        errors: Name of the job -> its error; at least one.
    """
    if len(errors) == 1:
        [error] = errors.values()
        return error
    reasons = (
        f"{name}: {first_line(error, with_type=not isinstance(error, UserError | RunFailed))}"
        for name, error in errors.items()
    )
    are_mistakes = all(isinstance(error, UserError) for error in errors.values())
    error_type = UserError if are_mistakes else RunFailed
    joint = error_type(f"{len(errors)} trainings failed; {'; '.join(reasons)}")
    joint.__cause__ = ExceptionGroup("the trainings' errors", [*errors.values()])
    return joint


def shortened(text: str) -> str:
    """Return a text without secrets, cut in the middle to fit a message."""
    text = mask_secrets(text)  # Before the cut, as half an address is not recognized.
    if len(text) <= MAX_QUOTE_CHARACTERS:
        return text
    half = MAX_QUOTE_CHARACTERS // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"


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
    type_name = type(error).__name__
    lines = mask_secrets(str(error)).strip().splitlines()
    if not lines:
        return type_name
    return f"{type_name}: {lines[0]}" if with_type else lines[0]


def first_problem(error: ValidationError) -> str:
    """Return the first field that pydantic found to be wrong, and why."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return shortened(f"{place}: {first['msg']}" if place else first["msg"])


def out_of_memory_text(error: BaseException) -> str:
    """Return PyTorch's out-of-memory message without the allocator's statistics."""
    # "... Tried to allocate 2 GiB. GPU 0 has ... of which 1 GiB is free. Including non-PyTorch
    # memory, ...": what follows the free memory is the allocator's.
    before_statistics, end, _ = first_line(error).partition(" is free")
    return before_statistics + end


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, means a full disk or quota.

    The text is searched, because safetensors, sqlite and others raise their own error types.
    """
    texts = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
    if any(text in str(error) for text in texts):
        return True
    origin = error.__cause__ or error.__context__
    return origin is not None and is_disk_full(origin)


def path_error_message(error: OSError) -> str | None:
    """Return a sentence for an unusable file or folder; None for any other error."""
    problems = ("EEXIST", "EISDIR", "ENOTDIR", "ELOOP", "ENAMETOOLONG", "EACCES", "EPERM", "EROFS")
    if error.filename is None or errno.errorcode.get(error.errno or 0) not in problems:
        return None
    return (
        f"cannot use {shortened(os.fsdecode(error.filename))} ({error.strerror}); fix it or move "
        "it away, then run the command again"
    )
