"""An imported model is a checkpoint like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.exporting import export
from orchestrator.data.model_tokens import tokens_folder_of
from orchestrator.data.store import open_tokens
from orchestrator.models.folder import tokenizer_file
from orchestrator.models.loading import load_model
from orchestrator.models.lookup import resolve_checkpoint, resolve_model
from orchestrator.pipelines.models import import_model
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def tokenizer(tiny_tokens: Path) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path


@pytest.fixture
def decoder(tiny_model: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_dict(tiny_model)).eval()


def test_an_imported_model_is_the_same_model(
    decoder: Decoder, tokenizer: Path, workspace: Workspace, tmp_path: Path
) -> None:
    folder = export(decoder, tmp_path / "my model", tokenizer)
    checkpoint = import_model(folder, workspace=workspace)
    assert checkpoint.parent == workspace.runs / "my-model"
    assert resolve_checkpoint(checkpoint.parent) == checkpoint
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_model(checkpoint)(tokens), decoder(tokens))


def test_importing_again_finds_it_and_another_model_needs_another_name(
    decoder: Decoder, tokenizer: Path, workspace: Workspace, tmp_path: Path
) -> None:
    folder = export(decoder, tmp_path / "model", tokenizer)
    first = import_model(folder, workspace=workspace)
    assert import_model(folder, workspace=workspace) == first
    with torch.no_grad():
        decoder.norm.weight.mul_(2)
    export(decoder, folder, tokenizer)
    with pytest.raises(UserError, match="--name"):
        import_model(folder, workspace=workspace)
    assert import_model(folder, workspace=workspace, name="other") != first


def test_an_imported_model_is_the_newest_also_when_it_is_found_again(
    decoder: Decoder, tokenizer: Path, workspace: Workspace, tmp_path: Path
) -> None:
    folder = export(decoder, tmp_path / "model", tokenizer)
    first = import_model(folder, workspace=workspace, name="first")
    second = import_model(folder, workspace=workspace, name="second")
    assert resolve_model(workspace, None) == second
    import_model(folder, workspace=workspace, name="first")
    assert resolve_model(workspace, None) == first


def test_tokens_are_those_of_its_tokenizer(
    decoder: Decoder, tokenizer: Path, tiny_tokens: Path, workspace: Workspace, tmp_path: Path
) -> None:
    folder = export(decoder, tmp_path / "model", tokenizer)
    checkpoint = import_model(folder, workspace=workspace, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"prepare --set data\.tokenizer="):
        tokens_folder_of(checkpoint, workspace)
    workspace.tokens.mkdir()
    (workspace.tokens / tiny_tokens.name).symlink_to(tiny_tokens)
    assert tokens_folder_of(checkpoint, workspace).resolve() == tiny_tokens.resolve()


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_without_a_tokenizer_it_says_what_is_missing(
    decoder: Decoder, workspace: Workspace, tmp_path: Path
) -> None:
    folder = export(decoder, tmp_path / "model")
    notes = Notes()
    checkpoint = import_model(folder, workspace=workspace, progress=notes)
    assert "--tokenizer FILE" in notes.notes[0]
    assert load_model(checkpoint).config == decoder.config
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        tokenizer_file(checkpoint)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(
    tiny_model: dict[str, Any], tokenizer: Path, workspace: Workspace, tmp_path: Path
) -> None:
    small = Decoder(ModelConfig.from_dict({**tiny_model, "vocab_size": 200}))
    folder = export(small, tmp_path / "model")
    with pytest.raises(UserError, match="the model only 200"):
        import_model(folder, workspace=workspace, tokenizer=tokenizer)
    assert not workspace.runs.exists()


@pytest.mark.parametrize("of_run", [True, False])
def test_a_checkpoint_of_another_workspace_is_imported(
    of_run: bool, save_tiny: Callable[..., Path], workspace: Workspace, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "elsewhere" / "a-run")
    checkpoint = import_model(folder.parent if of_run else folder, workspace=workspace)
    assert checkpoint.parent == workspace.runs / "a-run"
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(tokens), load_model(folder)(tokens))


def test_a_damaged_checkpoint_is_not_imported(
    save_tiny: Callable[..., Path], workspace: Workspace, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "a-run")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged: tokenizer\.json"):
        import_model(folder, workspace=workspace)
    assert not list(workspace.runs.glob("*"))
