"""The README and the pages that it leads to are correct: commands and files exist, Python runs."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import pytest
import torch
import typer
from documented import PAGES, ROOT, blocks
from small_size import SMALL
from terminal import run_in_terminal

import orchestrator
from iiet import Decoder, preset
from orchestrator import cli
from orchestrator.models.open import load_model
from orchestrator.pipelines.models import export_checkpoint
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import Settings, read_settings
from orchestrator.settings.files import shipped_sweeps

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
PYTHON_PAGE = ROOT / "docs" / "python.md"
COMMANDS = typer.main.get_command(cli.build_app()).commands  # type: ignore[attr-defined]
HIDDEN = 'import sys; sys.modules["iiet"] = sys.modules["orchestrator"] = None'
"""Any import of them fails from here on."""
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
def test_python_for_exported_models_asks_nothing(
    save_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In a terminal into which nobody types, by a Python that does not know this package."""
    checkpoint = save_tiny(
        tmp_path / "run", num_layers=3, schedule=[2, 1, 1], context_length=128, initializer_std=0.3
    )
    decoder = load_model(checkpoint)
    card = ModelCard(name="tiny", config=decoder.config)
    export_checkpoint(checkpoint, tmp_path / "my-model", decoder=decoder, card=card)
    (tutorial,) = blocks(ROOT / "docs" / "tutorial.md", "python")
    drafts = tutorial + blocks(ROOT / "docs" / "speculation.md", "python")[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    # Each in a process of its own: what was trusted once is not asked for again.
    for snippet, expected in (
        (blocks(ROOT / "README.md", "python")[0], ""),
        (drafts, "The function"),
    ):
        command = [sys.executable, "-c", f"{HIDDEN}\n{snippet}"]
        code, printed = run_in_terminal(command, tmp_path, environment)
        assert code == 0, printed
        assert re.search(expected, printed)


def test_a_question_in_a_terminal_fails(tmp_path: Path) -> None:
    program = "print('asked:'); answer = {}; print('ends')"
    for answer, is_question in (("input()", True), ("''", False)):
        command = [sys.executable, "-c", program.format(answer)]
        asked = pytest.raises(AssertionError, match="asked for something")
        with asked if is_question else nullcontext():
            assert run_in_terminal(command, tmp_path, os.environ) == (0, "asked:\r\nends\r\n")


def test_python_that_drafts_runs() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "dim": 8, "ffn_dim": 16, "num_heads": 2, "num_layers": 2}
    decoder, small_decoder = (
        Decoder(preset("tiny", **sizes, schedule=r)).eval().requires_grad_(False) for r in (2, 0)
    )
    names = {"decoder": decoder, "small_decoder": small_decoder, "ids": torch.ones(1, 4).long()}
    exec(blocks(ROOT / "docs" / "speculation.md", "python")[0], names)
    assert names["tokens"].shape == (1, 104)  # type: ignore[attr-defined]


def test_all_python_of_the_pages_is_run_by_a_test() -> None:
    """The package of extending.md by test_extending_doc.py, models.md by the test of that name."""
    found = {page.name: len(blocks(page, "python")) for page in PAGES}
    run = {"README.md": 2, "tutorial.md": 1, "python.md": 2, "speculation.md": 2}
    run |= {"extending.md": 5, "models.md": 1}
    assert {name: count for name, count in found.items() if count} == run


def test_commands_without_a_function_are_named() -> None:
    (listed,) = re.findall(r"but for (`.*?`)\. It takes", PYTHON_PAGE.read_text(), flags=re.DOTALL)
    other_names = {"influence": "measure_influence", "import": "import_model"}
    functions = (other_names.get(name, name.partition("-")[0]) for name in COMMANDS)
    without = {
        name for name, f in zip(COMMANDS, functions, strict=True) if f not in dir(orchestrator)
    }
    assert set(re.findall("`(.*?)`", listed)) == without
    assert "quickstart` | everything, from a generated task" in COMMANDS_PAGE


@pytest.mark.slow
def test_the_commands_in_python_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_sweep: Path,
    ray_session: None,
    terminal: TextIO,
) -> None:
    monkeypatch.setattr("sys.stdin", terminal)

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
