"""`doctor` finds real faults, names a remedy for each, and says so by its exit code."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import cli
from orchestrator.workspace.files import write_json
from orchestrator.workspace.layout import WORKSPACE_FILE_NAME, open_workspace


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def _broken(root: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Run the command and return what is broken; its exit code must say the same."""
    code = cli.main(["doctor", "--json", "--workspace", str(root)])
    findings = json.loads(capsys.readouterr().out)["findings"]
    broken = [finding for finding in findings if finding["state"] == "broken"]
    assert code == (1 if broken else 0)
    assert {"python", "libraries", "pytorch", "memory", "disk"} <= {f["check"] for f in findings}
    return broken


def test_nothing_is_broken_here_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_workspace(tmp_path / "space").root
    before = sorted(root.rglob("*"))
    assert _broken(root, capsys) == []
    assert _broken(tmp_path / "none", capsys) == []
    assert sorted(root.rglob("*")) == before
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["doctor", "--workspace", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "! hugging face hub: HF_HUB_OFFLINE is set" in printed


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RAY_ADDRESS", "127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("RAY_ADDRESS", "nonsense", "RAY_ADDRESS"),
        ("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1", "no MLflow server answers"),
    ],
)
def test_what_does_not_answer_is_broken(
    variable: str, value: str, words: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    [finding] = _broken(tmp_path / "space", capsys)
    assert words in finding["text"]
    assert finding["remedy"]
    assert "secret" not in str(finding)


def test_a_damaged_database_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = open_workspace(tmp_path / "space")
    space.database.write_bytes(b"this is no database" * 100)
    [finding] = _broken(space.root, capsys)
    assert (finding["check"], "mlflow.db" in finding["text"]) == ("mlflow", True)


def test_a_workspace_of_another_version_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "space" / WORKSPACE_FILE_NAME, {"recipe_version": 1})
    [finding] = _broken(tmp_path / "space", capsys)
    assert "another version" in finding["text"]


def test_a_package_of_the_same_name_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path("orchestrator/__init__.py")
    other.parent.mkdir()
    other.touch()
    [finding] = _broken(tmp_path / "space", capsys)
    assert str(other.resolve()) in finding["text"]
    cli.main(["doctor", "--workspace", str(tmp_path / "space")])
    assert "✓ import path" not in capsys.readouterr().out


def test_a_library_outside_its_range_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ["torch<1", "no-such-library>=2", "not-for-us; extra == 'dev'", "numpy>=1"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    torch, missing = _broken(tmp_path / "space", capsys)
    assert torch["remedy"] == "pip install 'torch<1'"
    assert missing["text"] == "no-such-library not installed, wanted >=2"


def test_gpus_without_the_extra_are_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # Importing it fails as if it were missing.
    assert cli.main(["doctor", "--json", "--workspace", str(tmp_path / "space")]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    [note] = [f for f in findings if f["check"] == "gpus" and f["state"] == "note"]
    assert note["remedy"] == "pip install 'iiet-orch[gpu]'"
