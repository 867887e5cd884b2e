"""The Python of docs/ runs as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import Any

import pytest
import torch
from documented import ROOT, blocks
from fake_runs import end_trials, trained
from small_size import SMALL
from terminal import run_in_terminal

import orchestrator
from iiet import Decoder, preset
from orchestrator.models.load import load_model
from orchestrator.pipelines.models import export_checkpoint
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import Settings, read_settings

PYTHON_PAGE = ROOT / "docs" / "python.md"
HIDDEN = 'import sys; sys.modules["iiet"] = sys.modules["orchestrator"] = None'
"""Any import of them fails from here on."""


@pytest.mark.slow
def test_a_model_is_trained_pruned_distilled_and_saved_in_a_few_lines(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    script = blocks(PYTHON_PAGE, "python")[0]
    exec(script, names)
    student = names["student"]
    input_ids = names["input_ids"]
    assert student.schedule.num_evaluations <= 6
    assert student.loss(input_ids) < 0.7 * names["model"].loss(input_ids), "it learned on"
    assert names["tokens"].shape == (1, 48)
    assert "influence (cosine, 1024 tokens)" in capsys.readouterr().out


def test_the_python_of_models_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks(PYTHON_PAGE, "python")[1], names)
    assert names["tokens"].shape == (1, 24)
    assert (tmp_path / "my-decoder" / "model.safetensors").is_file()
    assert names["cheaper"].schedule.num_corrections == 0
    exec(blocks(PYTHON_PAGE, "python")[2], names)
    assert names["smaller"].config.num_layers == 4
    assert names["smaller"].schedule.num_corrections == 0


def loading() -> str:
    """Return the tutorial's lines up to the loaded model."""
    (tutorial,) = blocks(ROOT / "docs" / "tutorial.md", "python")
    return tutorial.partition("inputs = ")[0]


def drafts() -> str:
    (tutorial,) = blocks(ROOT / "docs" / "tutorial.md", "python")
    return tutorial + blocks(ROOT / "docs" / "speculation.md", "python")[1]


@pytest.mark.parametrize(
    ("snippet", "expected"),
    [
        pytest.param(loading, "", marks=pytest.mark.slow),
        pytest.param(drafts, "The function", marks=pytest.mark.long),
    ],
)
def test_python_for_exported_models_asks_nothing(snippet, expected, save_tiny, tmp_path):
    """The Python runs in a terminal into which nobody types, and does not know this package."""
    checkpoint = save_tiny(
        tmp_path / "run", num_layers=3, schedule=[2, 1, 1], context_length=128, initializer_std=0.3
    )
    decoder = load_model(checkpoint)
    card = ModelCard(name="tiny", config=decoder.config)
    export_checkpoint(checkpoint, tmp_path / "my-model", decoder=decoder, card=card)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", f"{HIDDEN}\n{snippet()}"]
    code, printed = run_in_terminal(command, tmp_path, environment)
    assert code == 0, printed
    assert re.search(expected, printed)


def test_python_that_drafts_runs():
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "dim": 8, "ffn_dim": 16, "num_heads": 2, "num_layers": 2}
    decoder, small_decoder = (
        Decoder(preset("tiny", **sizes, schedule=r)).eval().requires_grad_(False) for r in (2, 0)
    )
    names = {"decoder": decoder, "small_decoder": small_decoder, "ids": torch.ones(1, 4).long()}
    exec(blocks(ROOT / "docs" / "speculation.md", "python")[0], names)
    assert names["tokens"].shape == (1, 104)


@pytest.mark.slow
def test_the_commands_in_python_run(tmp_path, monkeypatch, small_sweep, terminal):
    monkeypatch.setattr("sys.stdin", terminal)
    end_trials(monkeypatch, trained)

    def read_small(name: str, changes: list[str] | None = None) -> Settings:
        return read_settings(name, [*SMALL, *(changes or [])])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IIET_WORKSPACE", "elsewhere")  # The page sets it.
    monkeypatch.setattr(orchestrator, "read_settings", read_small)
    shutil.copytree(small_sweep, "my-workspace")  # Its models are found again; students are added.
    names: dict[str, object] = {}
    exec(blocks(PYTHON_PAGE, "python")[3], names)
    assert len(names["found"].evaluations) == 2
    exec(blocks(PYTHON_PAGE, "python")[4], names)
    assert names["text"]
    assert (tmp_path / "my-export" / "config.json").is_file()
    assert not names["result"].failures
    assert [*tmp_path.glob("my-workspace/sweeps/*/front.html")]
