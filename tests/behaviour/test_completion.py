"""The version, and the completion of commands and options in shells."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import iiet
from orchestrator import cli

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_there_is_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    version = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"iiet-orch {version}\n"
    assert iiet.__version__ == version


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("iiet-orch swe", {"sweep-threshold", "sweep-iterations", "sweep"}),
        ("iiet-orch pretrain --continu", {"--continue"}),
        ("iiet-orch generate --kv ", {"exact", "last"}),
        ("iiet-orch jobs st", {"stop"}),
    ],
)
def test_a_shell_completes(
    typed: str,
    offered: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_IIET_ORCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    cli.main([])
    assert set(capsys.readouterr().out.split()) == offered


def test_completion_can_be_shown_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert cli.main(["--show-completion", "bash"]) == 0
    assert "complete -o default -F" in capsys.readouterr().out
