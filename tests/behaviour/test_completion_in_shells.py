"""Tab completes a model's name in bash, zsh and fish, with the script that the command shows."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHELLS = {
    "bash": ("--norc", "--noprofile", "-i"),
    "zsh": ("-f", "-i"),
    "fish": ("--no-config", "-i"),
}
BEFORE = {"zsh": "autoload -Uz compinit; compinit -u -D; "}
MAX_SECONDS = 120.0


class Terminal:
    """What an interactive shell shows, and where it reads."""

    def __init__(self, end: int) -> None:
        self._end = end
        self._shown = b""

    def type(self, text: str) -> None:
        self._shown = b""
        os.write(self._end, text.encode())

    def shows(self, text: str) -> bool:
        """Read until a text is shown; False if it is not within `MAX_SECONDS`."""
        last = time.monotonic() + MAX_SECONDS
        while text.encode() not in self._shown and time.monotonic() < last:
            if select.select([self._end], [], [], 0.5)[0]:
                self._shown += os.read(self._end, 4096)
        return text.encode() in self._shown


@contextmanager
def interactive(shell: str, environment: dict[str, str], folder: Path) -> Iterator[Terminal]:
    """Start a shell on a terminal of its own; end it afterwards."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", "--wait", shell, *SHELLS[shell]]
    started = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder
    )
    os.close(theirs)
    try:
        yield Terminal(ours)
    finally:
        os.close(ours)  # The shell gets a hang-up.
        started.wait(MAX_SECONDS)


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_a_run(shell: str, tmp_path: Path) -> None:
    for program in (shell, "setsid"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    (tmp_path / "runs" / "my-run" / "step_00000005").mkdir(parents=True)
    scripts = sysconfig.get_path("scripts")
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "IIET_WORKSPACE": str(tmp_path),
        "TERM": "dumb",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    script = subprocess.run(
        ["iiet-orch", "--show-completion", shell],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (tmp_path / "completion").write_text(script)
    with interactive(shell, environment, tmp_path) as terminal:
        # The quotes keep the word apart from the echo of what is typed.
        terminal.type(f"{BEFORE.get(shell, '')}source ./completion; echo rea''dy\n")
        assert terminal.shows("ready")
        terminal.type("iiet-orch influence my-r\t")
        assert terminal.shows("my-run")
