"""The README and the pages that it leads to are correct: commands and files exist, Python runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import typer
from documented import PAGES, ROOT, blocks
from small_size import SMALL

import orchestrator
from orchestrator import cli
from orchestrator.settings import Settings, read_settings
from orchestrator.settings.shipped import shipped_sweeps

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
PYTHON_PAGE = ROOT / "docs" / "python.md"
COMMANDS = typer.main.get_command(cli.app.app).commands  # type: ignore[attr-defined]
GLOSSARY = (
    *("correction", "schedule", "NFE", "influence", "threshold family", "teacher", "student"),
    *("elastic", "front", "knee", "draft"),
)


@pytest.mark.parametrize("text", [README, COMMANDS_PAGE], ids=["README.md", "commands.md"])
def test_every_command_is_named(text: str) -> None:
    assert set(re.findall(r"`iiet-orch ([a-z][a-z-]+)", text)) == set(COMMANDS)


def test_the_first_pages_are_short_and_define_the_words() -> None:
    assert len(README.splitlines()) <= 200
    for word in GLOSSARY:
        assert re.search(rf"^\| {word} \| [A-Z].*\.", README, flags=re.MULTILINE), word


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", README))
    assert linked == {page.name for page in PAGES[1:]} - {"index.md"}


def test_the_python_of_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks(PYTHON_PAGE, "python")[0], names)
    assert names["tokens"].shape == (1, 24)  # type: ignore[attr-defined]
    assert (tmp_path / "my-decoder" / "model.safetensors").is_file()
    assert names["cheaper"].schedule.num_corrections == 0  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_commands_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_sweep: Path, ray_session: None
) -> None:
    def read_small(name: str, changes: list[str] | None = None) -> Settings:
        return read_settings(name, [*SMALL, *(changes or [])])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(orchestrator, "read_settings", read_small)
    shutil.copytree(small_sweep, "my-workspace")  # Its models are found again; students are added.
    names: dict[str, object] = {}
    exec(blocks(PYTHON_PAGE, "python")[1], names)
    assert len(names["found"].evaluations) == 2  # type: ignore[attr-defined]
    assert not names["result"].failures  # type: ignore[attr-defined]
    assert [*tmp_path.glob("my-workspace/sweeps/*/front.html")]
    # The README's lines: the same sweep in the same workspace, with fewer schedules.
    exec(blocks(ROOT / "README.md", "python")[1], names)
    assert not names["result"].failures  # type: ignore[attr-defined]


def test_shipped_sweeps_are_named_and_valid() -> None:
    listed = re.search(r"or a shipped one by name: ([a-z0-9, -]+) \|", COMMANDS_PAGE)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_placeholder_is_left(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not [word for word in ("TODO", "TBD", "@@") if word in text]
