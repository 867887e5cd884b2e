"""A pseudo-terminal into which nobody types: a question finds the end of the input and fails."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

END_OF_INPUT = b"\x04"
"""What Ctrl-D sends."""


@contextmanager
def unanswered() -> Iterator[TextIO]:
    """Yield a terminal's input for `sys.stdin` of this process."""
    ours, theirs = pty.openpty()
    os.write(ours, 64 * END_OF_INPUT)
    with os.fdopen(theirs) as typed:
        yield typed
    os.close(ours)


def run_in_terminal(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a command whose three streams are a terminal; return its exit code and its output."""
    ours, theirs = pty.openpty()
    os.write(ours, 64 * END_OF_INPUT)
    started = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # The other end is closed.
            break
        if not part:
            break
        printed += part
    os.close(ours)
    return started.wait(), printed.decode()
