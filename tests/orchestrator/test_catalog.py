"""Which checkpoint a command means: an older one is never taken in silence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from orchestrator import cli
from orchestrator.analysis.subject import open_subjects
from orchestrator.catalog import find_teacher
from orchestrator.data.tokens import open_tokens
from orchestrator.errors import UserError
from orchestrator.training.checkpoint import checkpoint_name, find_checkpoints, save_checkpoint
from orchestrator.workspace import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "ws")


def save(run: Path, tokens: Path, model: dict[str, Any], *steps: int) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict(model))
    store = open_tokens(tokens)
    for step in steps:
        save_checkpoint(
            run,
            step,
            decoder=decoder,
            training_state={},
            tokenizer_path=store.tokenizer_path,
            provenance={"tokens": store.fingerprint},
        )
    return run


def damage_newest(run: Path) -> Path:
    newest = find_checkpoints(run)[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return newest


@pytest.fixture
def damaged(workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]) -> Path:
    """A run whose newest checkpoint is damaged."""
    run = save(workspace.runs / "full", tiny_tokens, tiny_model, 5, 10)
    damage_newest(run)
    return run


@pytest.mark.parametrize("with_path", [True, False])
@pytest.mark.parametrize(
    "command", ["sweep-threshold", "search", "influence", "distill", "export"]
)
def test_what_is_made_of_a_model_is_never_made_of_an_older_one(
    workspace: Workspace,
    damaged: Path,
    command: str,
    with_path: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [*(["1"] if command == "distill" else []), *([str(damaged)] if with_path else [])]
    before = sorted(workspace.root.glob("[!l]*/**"))
    code = cli.run([command, *arguments, "--workspace", str(workspace.root)])
    said = " ".join(capfd.readouterr().err.split())
    assert code == 2
    newest, older = damaged / checkpoint_name(10), damaged / checkpoint_name(5)
    assert f"{newest} is damaged: model.safetensors" in said
    assert f"The newest whole one is {older}" in said
    assert "give that path" in said
    assert sorted(workspace.root.glob("[!l]*/**")) == before, "nothing was written"


@pytest.mark.parametrize("with_path", [True, False])
def test_who_only_reads_a_model_is_warned(
    workspace: Workspace, damaged: Path, with_path: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    newest, older = damaged / checkpoint_name(10), damaged / checkpoint_name(5)
    said: list[str] = []
    paths = [damaged] if with_path else None
    (subject,) = open_subjects(workspace, paths, None, warn=said.append)
    assert subject.path == older
    assert len(said) == 1
    assert str(newest) in said[0]
    assert f"{older} is used instead" in said[0]
    arguments = ["generate", *map(str, paths or ()), "--workspace", str(workspace.root)]
    assert cli.run([*arguments, "--prompt", "abc", "-n", "1"]) == 0
    printed = capfd.readouterr()
    assert f"{older} is used instead" in " ".join(printed.err.split())
    assert "damaged" not in printed.out, "the text alone is on standard output"


def test_a_path_of_the_older_one_is_an_answer(workspace: Workspace, damaged: Path) -> None:
    older = damaged / checkpoint_name(5)
    (subject,) = open_subjects(workspace, [older], None)
    assert subject.path == older


def test_a_run_without_any_whole_checkpoint_does_not_give_way_to_an_older_run(
    workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    older = save(workspace.runs / "older", tiny_tokens, tiny_model, 5)
    newer = save(workspace.runs / "newer", tiny_tokens, tiny_model, 5)
    newest = damage_newest(newer)
    os.utime(older, (1, 1))
    with pytest.raises(UserError, match=f"{newest} is damaged.* {older}"):
        find_teacher(workspace)
    said: list[str] = []
    assert find_teacher(workspace, said.append) == older / checkpoint_name(5)
    assert len(said) == 1
    damage_newest(older)
    with pytest.raises(UserError, match=f"has no IIET checkpoint that is whole .*{newest}"):
        find_teacher(workspace)


def test_a_damaged_model_without_corrections_is_no_matter(
    workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    run = save(workspace.runs / "full", tiny_tokens, tiny_model, 5)
    vanilla = {**tiny_model, "method": "vanilla", "schedule": None}
    damage_newest(save(workspace.runs / "vanilla", tiny_tokens, vanilla, 5))
    os.utime(run, (1, 1))
    assert find_teacher(workspace) == run / checkpoint_name(5)
