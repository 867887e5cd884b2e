"""The version, and what a shell gets to offer for commands, options and their values."""

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
        ("iiet-orch config sh", {"show"}),
        ("iiet-orch influence ", {"empty", "my-run", "other"}),
        ("iiet-orch evaluate my-run o", {"other"}),
        ("iiet-orch generate my-run/", {"my-run/step_00000005", "my-run/step_00000010"}),
        ("iiet-orch pretrain --continue my", {"my-run"}),
        ("iiet-orch report wide ", {"narrow", "wide"}),
        ("iiet-orch pick n", {"narrow"}),
        ("iiet-orch pick --workspace nowhere ", set()),
    ],
)
def test_a_shell_completes(
    typed: str,
    offered: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    for folder in ("my-run/step_00000005", "my-run/step_00000010", "other/step_00000001", "empty"):
        (tmp_path / "runs" / folder).mkdir(parents=True)
    for name in ("narrow", "wide"):
        (tmp_path / "sweeps" / name).mkdir(parents=True)
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path))
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
