"""The commands in docs/scaling.md and docs/training.md exist, and print what the text says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from orchestrator import cli

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "scaling.md").read_text(encoding="utf-8")
LONG_RUNS = (DOCS / "training.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(cli.build_app()).commands  # type: ignore[attr-defined]
ROWS = re.findall(
    r"^\| `(iiet-orch pretrain --dry-run[^`]*)` \| (.*) \|$", TEXT, flags=re.MULTILINE
)
FIRST = re.compile(r"([\d.,]+( \w+)? to )?[\d.,]+ ?\w*")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def printed_cells(command: str, workspace: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command of the table and return the figures of its row."""
    assert cli.main([*shlex.split(command)[1:], "-w", str(workspace)]) == 0
    output = capsys.readouterr().out
    cells = []
    for name in ("parameters", "memory", "time", "a checkpoint"):
        (text,) = re.findall(rf"^  {name}  +(\S.*)$", output, flags=re.MULTILINE)
        found = FIRST.match(text)
        assert found
        cells.append(found[0].strip())
    return cells


def test_the_table_is_what_its_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Machines with a GPU of their own would plan for that one.
    monkeypatch.setattr("orchestrator.planning.estimate.installed_gpus", lambda: [])
    assert len(ROWS) == 10
    for command, row in ROWS:
        assert row.split(" | ") == printed_cells(command, tmp_path, capsys), command


def test_every_row_of_the_table_fits_on_an_h100(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.planning.machine.installed_gpus", lambda: [])
    for command, _ in ROWS:
        assert cli.main([*shlex.split(command)[1:], "-w", str(tmp_path)]) == 0
        assert re.search(r"on an H100 +it fits", capsys.readouterr().out), command


def test_the_commands_and_their_options_exist() -> None:
    in_blocks = [*blocks("bash", TEXT), *blocks("bash", LONG_RUNS)]
    text = "\n".join([*in_blocks, *(command for command, _ in ROWS)])
    found = re.findall(r"iiet-orch ([a-z-]+(?: [^\n#]*)?)", text)
    assert len(found) >= 14
    for line in found:
        unknown = unknown_options(shlex.split(line))
        assert not unknown, f"{line}: unknown {unknown}"


def unknown_options(words: list[str]) -> set[str]:
    """Return the options that the commands in a line do not have: `config list`, `submit pretrain`.

    Raises:
        KeyError: If the first word is no command.
    """
    known, commands = set(), {words[0]: COMMANDS[words[0]]}
    for word in words:
        if command := commands.get(word):
            known |= {option for parameter in command.params for option in parameter.opts}
            commands = getattr(command, "commands", COMMANDS)
    return {word for word in words if word.startswith("--")} - known


def test_an_unknown_option_is_found() -> None:
    assert not unknown_options(["submit", "--env", "A", "pretrain", "--gpus", "8"])
    assert unknown_options(["config", "list", "--gpus", "8"]) == {"--gpus"}


def test_named_test_files_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in re.findall(r"`(tests/[\w/.]+)`", TEXT):
        assert (root / path).exists(), path
