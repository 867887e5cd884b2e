"""Escape sequences: none in a pipe, and no colours on a terminal where they are not wanted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import run_in_terminal

PROGRAM = """
import json, sys
from orchestrator.cli import main
for words in json.loads(sys.argv[1]):
    main(words)
"""
COMMANDS = [
    ["--help"],
    ["sweep-threshold", "--help"],
    ["pretrain", "--no-such-option"],
    ["no-such-command"],
    ["evaluate", "--device", "tpu"],
    ["config", "list"],
    ["status"],
    ["sweep", "demo", "--dry-run"],
    ["prepare", "--set", "data.source=files", "--set", "data.files=[text.txt]"],
]
"""Helps, errors, tables, a plan, and progress."""
COLOR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a terminal with colours, and a text in the working folder."""
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The square of {n} is {n * n}." for n in range(300))
    )
    (tmp_path / "iiet-workspace").mkdir()
    wishes = ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "IIET_WORKSPACE")
    kept = {name: value for name, value in os.environ.items() if name not in wishes}
    return {**kept, "TERM": "xterm-256color", "COLUMNS": "80"}


@pytest.mark.slow
def test_a_pipe_gets_no_escape_sequence(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, check=True)
    assert b"tokens: " in done.stdout
    assert b"no-such-option" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr


def _on_a_terminal(words: list[str], environment: dict[str, str], folder: Path) -> str:
    command = [sys.executable, "-c", PROGRAM, json.dumps([words])]
    return run_in_terminal(command, folder, environment)[1]


@pytest.mark.slow
def test_a_terminal_has_colors_unless_they_are_not_wanted(
    environment: dict[str, str], tmp_path: Path
) -> None:
    words = ["sweep-threshold", "--help"]
    assert COLOR.search(_on_a_terminal(words, environment, tmp_path))
    assert not COLOR.search(_on_a_terminal([*words, "--no-color"], environment, tmp_path))
    without = {**environment, "NO_COLOR": "1"}
    for command in (words, ["pretrain", "--no-such-option"]):
        printed = _on_a_terminal(command, without, tmp_path)
        assert "threshold" in printed or "No such option" in printed
        assert not COLOR.search(printed)
