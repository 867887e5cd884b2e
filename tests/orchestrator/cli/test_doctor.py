"""`doctor` finds real faults, names a remedy for each, and says so by its exit code."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from file_modes import only_readable

from orchestrator import cli
from orchestrator.planning import machine
from orchestrator.settings.files import shipped_sweeps
from orchestrator.sweeping import shipped
from orchestrator.workspace.files import write_json
from orchestrator.workspace.layout import WORKSPACE_FILE_NAME, open_workspace
from orchestrator.workspace.processors import CPUINFO


@pytest.fixture(autouse=True)
def _free_memory_and_disk(monkeypatch) -> None:
    """Give the machine free memory and disk, whatever other programs leave of them."""
    set_free_bytes(monkeypatch, memory=64 << 30, disk=64 << 30)


def set_free_bytes(monkeypatch: pytest.MonkeyPatch, *, memory: int, disk: int) -> None:
    total = 64 << 30
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=memory, total=total)
    )
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=total, used=total - disk, free=disk)
    )
    monkeypatch.setattr(machine, "CONTROL_GROUPS", Path("/a-machine-without-containers"))


@pytest.fixture
def _without_prices(monkeypatch) -> None:
    """Price no shipped sweep, which takes most of the command's time."""
    monkeypatch.setattr(shipped, "price_shipped_sweeps", lambda _: [])


Answer = tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]
"""What is broken, and the shipped sweeps by name."""


def _doctor(root: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """Run the command; its exit code must say whether something is broken."""
    code = cli.main(["doctor", "--json", "--workspace", str(root)])
    answer = json.loads(capsys.readouterr().out)
    findings = answer["findings"]
    broken = [finding for finding in findings if finding["state"] == "broken"]
    assert code == (1 if broken else 0)
    assert {"versions", "memory and disk", "gpus", "ray"} <= {f["check"] for f in findings}
    return broken, {sweep["name"]: sweep for sweep in answer["sweeps"]}


def _broken(root: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    broken, _ = _doctor(root, capsys)
    return broken


@pytest.mark.usefixtures("_without_prices")
def test_in_a_workspace_nothing_is_broken_and_nothing_is_written(tmp_path, capsys):
    root = open_workspace(tmp_path / "space").root
    before = sorted(root.rglob("*"))
    assert _broken(root, capsys) == []
    assert sorted(root.rglob("*")) == before


def test_without_a_workspace_shipped_sweeps_are_priced_and_none_is_made(tmp_path, capsys):
    broken, sweeps = _doctor(tmp_path / "none", capsys)
    assert broken == []
    assert not (tmp_path / "none").exists()
    assert sweeps.keys() == shipped_sweeps().keys()
    demo = sweeps["demo"]
    paper = sweeps["paper-340m"]
    assert (demo["num_gpus"], demo["needs_hub"]) == (0, False)
    assert (paper["num_gpus"], paper["needs_hub"]) == (8, True)
    assert all(0 < sweep["hours"][0] <= sweep["hours"][1] for sweep in sweeps.values())
    assert demo["hours"][1] < 1 < paper["hours"][0]
    assert all(sweep["fits"] == (sweep["problem"] is None) for sweep in sweeps.values())


@pytest.mark.usefixtures("_without_prices")
def test_little_memory_and_a_full_disk_are_broken(tmp_path, capsys, monkeypatch):
    space = tmp_path / "space"
    set_free_bytes(monkeypatch, memory=1000 << 20, disk=2 << 30)
    [memory] = _broken(space, capsys)
    assert "of memory free" in memory["text"]
    assert "end other programs" in memory["remedy"]
    set_free_bytes(monkeypatch, memory=1 << 30, disk=2000 << 20)
    workspace, temporary_files = _broken(space, capsys)
    assert "free for the workspace" in workspace["text"]
    assert "free for the temporary files" in temporary_files["text"]
    assert "iiet-orch clean" in workspace["remedy"]


@pytest.mark.usefixtures("_without_prices")
def test_bf16_is_recommended_for_processors_that_have_it(tmp_path, capsys, monkeypatch):
    """A study has shown that it costs no quality (research/bf16.md)."""
    read_text = Path.read_text
    for flags, recommends in ("avx2 avx512_bf16", True), ("avx2", False):

        def read(path: Path, *arguments: Any, flags: str = flags, **named: Any) -> str:
            is_cpuinfo = path == CPUINFO
            return f"flags : {flags}" if is_cpuinfo else read_text(path, *arguments, **named)

        monkeypatch.setattr(Path, "read_text", read)
        assert cli.main(["doctor", "--workspace", str(tmp_path / "space")]) == 0
        printed = capsys.readouterr().out
        assert "✓ versions: Python" in printed
        assert ("training.precision=bf16" in printed) == recommends


@pytest.mark.usefixtures("_without_prices")
def test_what_is_wrong_is_broken_and_has_a_remedy(tmp_path, capsys, monkeypatch):
    for address, words in (
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("nonsense", "RAY_ADDRESS"),
    ):
        with monkeypatch.context() as context:
            context.setenv("RAY_ADDRESS", address)
            [finding] = _broken(tmp_path / "space", capsys)
        assert words in finding["text"]
        assert finding["remedy"]

    write_json(tmp_path / "old" / WORKSPACE_FILE_NAME, {"recipe_version": 1})
    [finding] = _broken(tmp_path / "old", capsys)
    assert "another version" in finding["text"]
    space = open_workspace(tmp_path / "space")
    with only_readable(space.root):
        for root in (space.root, space.root / "new" / "below"):
            [finding] = _broken(root, capsys)
            assert f"{space.root} cannot be written" in finding["text"]
    (space.runs / "iiet").mkdir(parents=True)
    (space.runs / "iiet" / "job.json").write_text("{")
    [finding] = _broken(space.root, capsys)
    assert ("job.json" in finding["text"], "delete it" in finding["remedy"]) == (True, True)

    requirements = ["torch<1", "no-such-library>=2", "not-for-us; extra == 'dev'", "numpy>=1"]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    torch, missing = _broken(tmp_path / "none", capsys)
    assert torch["remedy"] == "pip install 'torch<1'"
    assert missing["text"] == "no-such-library not installed, wanted >=2"
