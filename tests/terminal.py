"""A pseudo-terminal with empty lines typed ahead: a question takes one of them, and that fails."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

TYPED = 64 * b"\n"


@contextmanager
def unanswered() -> Iterator[tuple[int, int]]:
    """Yield our end of a terminal and that of a program; an assertion if the program reads it."""
    ours, theirs = pty.openpty()
    try:
        mode = termios.tcgetattr(theirs)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, mode)
        os.write(ours, TYPED)
        yield ours, theirs
        (num_left,) = struct.unpack("i", fcntl.ioctl(theirs, termios.FIONREAD, bytes(4)))
        assert num_left == len(TYPED), "the program asked for something"
    finally:
        os.close(ours)
        os.close(theirs)


def run_in_terminal(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a command whose three streams are a terminal; return its exit code and its output."""
    printed = b""
    with unanswered() as (ours, theirs):
        started = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment
        )
        has_ended = False
        while not has_ended or select.select([ours], [], [], 0)[0]:
            has_ended = started.poll() is not None
            if select.select([ours], [], [], 0.05)[0]:
                printed += os.read(ours, 65536)
    return started.returncode, printed.decode()
