"""Checks of the message of a user's mistake: it names the setting and the value.

Its sentence is free to change. `UserError` ends a command with exit code 2, see
`tests/behaviour/test_command_line.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(
    error: type[BaseException], *names: object
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error whose message has all of these, in any order."""
    with pytest.raises(error) as caught:
        yield caught
    assert_names(str(caught.value), *names)


def assert_names(text: str, *names: object) -> None:
    """Check that a text has all of these, in any order."""
    missing = [name for name in map(str, names) if name not in text]
    assert not missing, f"{missing} missing in: {text}"
