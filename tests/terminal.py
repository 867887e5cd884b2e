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
    """Yield our end of a terminal and the program's; an assertion if the program reads from it."""
    our_end, program_end = pty.openpty()
    try:
        mode = termios.tcgetattr(program_end)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(program_end, termios.TCSANOW, mode)
        os.write(our_end, TYPED)
        yield our_end, program_end
        (num_left,) = struct.unpack("i", fcntl.ioctl(program_end, termios.FIONREAD, bytes(4)))
        assert num_left == len(TYPED), "the program asked for something"
    finally:
        os.close(our_end)
        os.close(program_end)


def run_in_terminal(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """Run a command whose three streams are a terminal; return its exit code and its output."""
    printed = b""
    with unanswered() as (our_end, program_end):
        started = subprocess.Popen(
            command,
            stdin=program_end,
            stdout=program_end,
            stderr=program_end,
            cwd=folder,
            env=environment,
        )
        has_ended = False
        while not has_ended or select.select([our_end], [], [], 0)[0]:
            has_ended = started.poll() is not None
            if select.select([our_end], [], [], 0.05)[0]:
                printed += os.read(our_end, 65536)
    return started.returncode, printed.decode()
