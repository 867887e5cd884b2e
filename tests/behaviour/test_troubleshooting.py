"""Each command of docs/troubleshooting.md is run, and prints the text that the page quotes."""

from __future__ import annotations

import errno
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import FENCE, ROOT

from orchestrator import cli

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))
GIB = 2**30


def block_of(entry: str, language: str) -> str:
    """Return the only block of a language in an entry, or an empty text."""
    found = [block for _, name, block in FENCE.findall(ENTRIES[entry]) if name == language]
    assert len(found) <= 1
    return found[0] if found else ""


COMMANDS = {entry: line for entry in ENTRIES if (line := block_of(entry, "bash").strip())}


def assert_printed(entry: str, output: str) -> None:
    """Compare without spaces, because terminals break lines; `…` stands for any text."""
    parts = re.split("…", "".join(block_of(entry, "text").split()))
    assert any(len(part) > 10 for part in parts)
    assert re.search(".*?".join(map(re.escape, parts)), "".join(output.split())), output


def without_space(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full when tokens are written."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orchestrator.pipelines.training.prepare", fail)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


PREPARED: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "The workspace is of another version": lambda folder, _: write(
        folder / "iiet-workspace/workspace.json", '{"recipe_version": 1}'
    ),
    "A file of the workspace is damaged": lambda folder, _: write(
        folder / "iiet-workspace/runs/broken/step_00000010/config.json", "{"
    ),
    "The disk is full": without_space,
    "A folder has no text": lambda folder, _: (folder / "my-texts").mkdir(),
    "The field with the text has another name": lambda folder, _: write(
        folder / "articles.jsonl", json.dumps({"title": "A", "body": "B"}) + "\n"
    ),
    "There is too little text": lambda folder, _: write(folder / "short.txt", "Only this. " * 20),
    "The hub is not reachable": lambda _, patch: patch.setenv("HF_HUB_OFFLINE", "1"),
    "A model does not fit into memory": lambda _, patch: patch.setattr(
        "orchestrator.planning.machine.free_memory", lambda: 4 * GIB
    ),
    "MLflow does not answer": lambda _, patch: patch.setenv(
        "MLFLOW_TRACKING_URI", "http://127.0.0.1:1"
    ),
}
"""What makes a command fail, where an empty folder does not."""
WAITS = {"Ray does not answer", "MLflow does not answer"}
OWN_PROCESS = {"Ray does not answer"}
"""A process of the tests may have joined a Ray already."""


@pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, marks=[pytest.mark.slow] * (entry in WAITS)) for entry in COMMANDS],
)
def test_a_command_prints_the_text(
    entry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if entry.startswith("No GPU") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    for variable in ("IIET_WORKSPACE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    PREPARED.get(entry, lambda *_: None)(tmp_path, monkeypatch)
    words = shlex.split(COMMANDS[entry])[1:]
    if entry in OWN_PROCESS:
        command = [sys.executable, "-m", "orchestrator.cli", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        code, printed = ended.returncode, ended.stderr
    else:
        code = cli.main(words)
        printed = capsys.readouterr().err
    assert code == (1 if entry in ("The disk is full", "MLflow does not answer") else 2)
    assert_printed(entry, printed)
