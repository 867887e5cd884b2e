"""The README is correct: its commands, options and files exist, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from small_size import SMALL

import orchestrator
from orchestrator import cli
from orchestrator.settings import Settings, read_settings
from orchestrator.settings.shipped import shipped_sweeps

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(cli.app.app).commands  # type: ignore[attr-defined]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _shell_lines() -> list[list[str]]:
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_command_in_the_readme_exists_and_every_command_is_in_it() -> None:
    named = set(re.findall(r"iiet-orch ([a-z][a-z-]+)", README))
    assert named == set(COMMANDS)


def test_the_options_of_shell_lines_exist() -> None:
    lines = [line for line in _shell_lines() if line[0] == "iiet-orch"]
    assert len(lines) >= 4
    for line in lines:
        known = {name for parameter in COMMANDS[line[1]].params for name in parameter.opts}
        used = {word for word in line[2:] if word.startswith("--")}
        assert used <= known, f"{shlex.join(line)}: unknown {used - known}"


def test_make_targets_in_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {line[1] for line in _shell_lines() if line[0] == "make"}
    assert {"demo", "test"} <= used <= targets


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) == 2
    names: dict[str, object] = {}
    exec(blocks[0], names)
    assert names["tokens"].shape == (1, 24)  # type: ignore[attr-defined]
    assert (tmp_path / "my-decoder" / "model.safetensors").is_file()
    assert names["cheaper"].schedule.num_corrections == 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_commands_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    def read_small(name: str, changes: list[str]) -> Settings:
        return read_settings(name, [*SMALL, *changes])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orchestrator, "read_settings", read_small)
    names: dict[str, object] = {}
    exec(_blocks("python")[1], names)
    assert len(names["found"].evaluations) == 2  # type: ignore[attr-defined]
    assert not names["result"].failures  # type: ignore[attr-defined]
    assert [*tmp_path.glob("my-workspace/sweeps/*/front.html")]


def test_links_and_folders_in_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `([a-z/]+)`", README, flags=re.MULTILINE):
        assert (ROOT / folder).exists(), folder


def test_shipped_sweeps_are_named_and_valid() -> None:
    listed = re.search(r"or a shipped one by name: ([a-z0-9, -]+) \|", README)
    assert listed
    sweeps = shipped_sweeps()
    assert set(listed[1].split(", ")) == set(sweeps)
    assert len(sweeps) == 8
    for path in sweeps.values():
        read_settings(path)


def test_the_toy_sweep_spells_out_the_defaults() -> None:
    assert read_settings(shipped_sweeps()["toy"]) == Settings()


def test_a_shipped_sweep_is_described_in_its_first_line() -> None:
    for path in shipped_sweeps().values():
        assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("word", ["TODO", "TBD", "@@"])
def test_no_placeholder_is_left(word: str) -> None:
    assert word not in README
