"""Commands find a model by path, by name, or the newest; they never use an older one silently."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator import cli
from orchestrator.data.store import open_tokens
from orchestrator.models.evaluated_model import open_models
from orchestrator.models.lookup import (
    find_model_folder,
    parse_schedule,
    resolve_model,
    resolve_teacher,
)
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import (
    Workspace,
    checkpoint_name,
    find_checkpoints,
    open_workspace,
)


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
            config=decoder.config,
            weights=decoder.state_dict(),
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
@pytest.mark.parametrize("command", ["sweep-threshold", "influence", "distill", "export"])
def test_commands_that_store_results_refuse_an_older_checkpoint(
    workspace: Workspace,
    damaged: Path,
    command: str,
    with_path: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        *(["-r", "1"] if command == "distill" else []),
        *([str(damaged)] if with_path else []),
    ]
    before = sorted(workspace.root.glob("[!l]*/**"))
    code = cli.main([command, *arguments, "--workspace", str(workspace.root)])
    printed = " ".join(capfd.readouterr().err.split())
    assert code == 2
    newest, older = damaged / checkpoint_name(10), damaged / checkpoint_name(5)
    assert f"{newest} is damaged: model.safetensors" in printed
    assert f"The newest intact one is {older}" in printed
    assert "give that path" in printed
    assert sorted(workspace.root.glob("[!l]*/**")) == before, "nothing was written"


@pytest.mark.parametrize("with_path", [True, False])
def test_commands_that_only_read_warn_about_an_older_checkpoint(
    workspace: Workspace,
    damaged: Path,
    with_path: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As outside of tests: a command sends this file to its log.
    monkeypatch.setattr(sys, "stderr", os.fdopen(2, "w", closefd=False))
    newest, older = damaged / checkpoint_name(10), damaged / checkpoint_name(5)
    warnings: list[str] = []
    paths = [damaged] if with_path else None
    (model,) = open_models(workspace, paths, None, warn=warnings.append)
    assert model.path == older
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    assert f"{older} is used instead" in warnings[0]
    arguments = ["generate", *map(str, paths or ()), "--workspace", str(workspace.root)]
    assert cli.main([*arguments, "--prompt", "abc", "-n", "1"]) == 0
    printed = capfd.readouterr()
    assert f"{older} is used instead" in " ".join(printed.err.split())
    assert "damaged" not in printed.out, "the text alone is on standard output"


def test_the_path_of_the_older_checkpoint_is_accepted(workspace: Workspace, damaged: Path) -> None:
    older = damaged / checkpoint_name(5)
    (model,) = open_models(workspace, [older], None)
    assert model.path == older


def test_a_run_without_an_intact_checkpoint_is_not_replaced_by_an_older_run(
    workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    older = save(workspace.runs / "older", tiny_tokens, tiny_model, 5)
    newer = save(workspace.runs / "newer", tiny_tokens, tiny_model, 5)
    newest = damage_newest(newer)
    os.utime(older, (1, 1))
    with pytest.raises(UserError, match=f"{newest} is damaged.* {older}"):
        resolve_teacher(workspace, None)
    warnings: list[str] = []
    assert resolve_teacher(workspace, None, warnings.append) == older / checkpoint_name(5)
    assert len(warnings) == 1
    damage_newest(older)
    with pytest.raises(UserError, match=f"has no intact checkpoint .*{newest}"):
        resolve_teacher(workspace, None)


def test_a_damaged_model_without_corrections_is_ignored(
    workspace: Workspace, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    run = save(workspace.runs / "full", tiny_tokens, tiny_model, 5)
    vanilla = {**tiny_model, "method": "vanilla", "schedule": None}
    damage_newest(save(workspace.runs / "vanilla", tiny_tokens, vanilla, 5))
    os.utime(run, (1, 1))
    assert resolve_teacher(workspace, None) == run / checkpoint_name(5)


@pytest.fixture
def save_run(workspace: Workspace, tiny_model: dict[str, Any], tiny_tokens: Path) -> Any:
    """Write a run's checkpoint; each one is newer than those before."""
    ages = iter(range(1, 100))

    def write(name: str, *, method: str = "iiet", imported: bool = False) -> Path:
        schedule = tiny_model["schedule"] if method == "iiet" else None
        config = ModelConfig.from_dict({**tiny_model, "method": method, "schedule": schedule})
        checkpoint = save_checkpoint(
            workspace.runs / name,
            1,
            config=Decoder(config).config,
            weights=Decoder(config).state_dict(),
            training_state={},
            tokenizer_path=open_tokens(tiny_tokens).tokenizer_path,
            provenance={"imported": {"from": name}} if imported else {},
        )
        age = next(ages)
        os.utime(workspace.runs / name, (age, age))
        return checkpoint

    return write


def test_a_run_is_found_by_name_and_by_its_path_inside_the_workspace(
    workspace: Workspace, save_run: Any
) -> None:
    checkpoint = save_run("teacher")
    for typed in ("teacher", "runs/teacher", "runs/teacher/step_00000001", str(checkpoint)):
        assert resolve_model(workspace, Path(typed)) == checkpoint
        assert resolve_teacher(workspace, Path(typed)) == checkpoint
        assert [model.path for model in open_models(workspace, [Path(typed)], None)] == [checkpoint]


def test_an_unknown_name_lists_the_runs(workspace: Workspace, save_run: Any) -> None:
    with pytest.raises(UserError, match="has no runs yet"):
        find_model_folder(workspace, Path("teacher"))
    save_run("one")
    save_run("two")
    with pytest.raises(UserError, match=r"no folder teacher.* its runs are one, two"):
        resolve_model(workspace, Path("teacher"))


def test_an_unknown_name_lists_a_limited_number_of_runs(workspace: Workspace) -> None:
    for number in range(30):
        folder = workspace.runs / f"run{number:02}"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    with pytest.raises(UserError, match=r"its newest runs are run10, .*, run29$"):
        find_model_folder(workspace, Path("teacher"))


def test_the_source_folder_of_an_imported_model_does_not_hide_its_run(
    workspace: Workspace, save_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_run("llama", method="vanilla", imported=True)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    assert resolve_model(workspace, Path("llama")) == checkpoint
    # What can read both takes the nearer one.
    assert find_model_folder(workspace, Path("llama"), model_folders=True) == tmp_path / "llama"


def test_a_schedule_for_a_model_without_corrections_is_refused(
    workspace: Workspace, save_run: Any
) -> None:
    plain = save_run("plain", method="vanilla")
    with pytest.raises(UserError, match=r"^--schedule: method 'vanilla' makes no corrections, got"):
        parse_schedule("2", plain)
    assert parse_schedule("0", plain) == IterationSchedule((0, 0))


def test_the_newest_model_may_be_an_imported_one(workspace: Workspace, save_run: Any) -> None:
    teacher = save_run("teacher")
    save_run("baseline", method="vanilla")
    assert resolve_model(workspace, None) == teacher
    llama = save_run("llama", method="vanilla", imported=True)
    assert resolve_model(workspace, None) == llama
    # What needs corrections passes over a model without them.
    assert resolve_teacher(workspace, None) == teacher


def test_a_workspace_without_corrections_lists_its_other_models(
    workspace: Workspace, save_run: Any
) -> None:
    with pytest.raises(UserError, match="no IIET checkpoint"):
        resolve_model(workspace, None)
    plain = save_run("plain", method="vanilla")
    assert resolve_model(workspace, None) == plain
    with pytest.raises(UserError, match=r"with corrections, only plain \(vanilla\); .*pretrain"):
        resolve_teacher(workspace, None)
