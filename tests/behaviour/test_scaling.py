"""The commands in the table of docs/scaling.md print what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestrator import cli

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\| `(iiet-orch pretrain --dry-run[^`]*)` \| (.*) \|$", TEXT, flags=re.MULTILINE
)
FIRST = re.compile(r"([\d.,]+( \w+)? to )?[\d.,]+ ?\w*")


def test_the_table_is_what_its_commands_print_and_every_row_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("estimate", "machine"):  # Machines with a GPU would plan for that one.
        monkeypatch.setattr(f"orchestrator.planning.{module}.installed_gpus", lambda: [])
    assert len(ROWS) == 10
    for command, row in ROWS:
        assert cli.main([*shlex.split(command)[1:], "-w", str(tmp_path)]) == 0
        output = capsys.readouterr().out
        cells = []
        for name in ("parameters", "memory", "time", "a checkpoint"):
            (text,) = re.findall(rf"^  {name}  +(\S.*)$", output, flags=re.MULTILINE)
            found = FIRST.match(text)
            assert found
            cells.append(found[0].strip())
        assert row.split(" | ") == cells, command
        assert re.search(r"on an H100 +it fits", output), command


def test_named_test_files_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"`(tests/[\w/.]+)`", TEXT):
        assert (root / path).exists(), path
