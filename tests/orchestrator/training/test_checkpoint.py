from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from iiet.config import ModelConfig, preset
from iiet.decoder import Decoder
from iiet.methods import METHODS
from orchestrator.models.folder import (
    TRAINING_STATE,
    check_checkpoint,
    load_provenance,
    newest_checkpoint,
    resolve_checkpoint,
    weights_key,
)
from orchestrator.models.open import load_model
from orchestrator.training.checkpoint import load_training_state, prune_checkpoints, save_checkpoint
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import find_checkpoints


@pytest.fixture
def decoder(tiny_model: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_dict(tiny_model))


@pytest.fixture
def run(tmp_path: Path, decoder: Decoder) -> Path:
    for step in (5, 10, 100):
        save(tmp_path, step, decoder)
    return tmp_path


def save(folder: Path, step: int, decoder: Decoder) -> Path:
    tokenizer = folder / "tokenizer-source.json"
    tokenizer.write_text("{}")
    return save_checkpoint(
        folder,
        step,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state={"step": step, "moments": torch.ones(2)},
        tokenizer_path=tokenizer,
        provenance={"tokens": "abc"},
    )


def test_a_saved_checkpoint_loads_unchanged(run: Path, decoder: Decoder) -> None:
    folder = find_checkpoints(run)[-1]
    loaded = load_model(folder)
    assert loaded.config == decoder.config
    assert not loaded.training
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(Decoder.load(folder).state_dict()[name], tensor)
    assert load_training_state(folder)["step"] == 100
    mapped = load_training_state(folder, mapped=True)["moments"]
    assert torch.equal(mapped, torch.ones(2))
    assert load_provenance(folder)["tokens"] == "abc"


class RunsCode:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_training_state_runs_no_code(run: Path, tmp_path: Path, mapped: bool) -> None:
    folder, made = find_checkpoints(run)[-1], tmp_path / "made"
    torch.save({"step": 100, "moments": RunsCode(made)}, folder / TRAINING_STATE)
    with pytest.raises(UserError, match=f"{TRAINING_STATE} holds objects .* could run code"):
        load_training_state(folder, mapped=mapped)
    assert not made.exists()
    torch.load(folder / TRAINING_STATE, weights_only=False)
    assert made.exists(), "the file would have run it"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ties", [True, False])
def test_frozen_weights_are_memory_mapped_and_give_the_same_logits(
    tmp_path: Path, method: str, ties: bool
) -> None:
    config = preset("tiny", method=method, num_layers=2, tie_embeddings=ties)
    folder = save(tmp_path, 1, Decoder(config))
    plain, frozen = load_model(folder), load_model(folder, frozen=True)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(frozen(tokens), plain(tokens))
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    weights = folder / "model.safetensors"
    assert all(is_mapped(tensor, weights) for tensor in frozen.state_dict().values())
    assert not any(is_mapped(tensor, weights) for tensor in plain.state_dict().values())
    for parameter in frozen.parameters():
        parameter.zero_()
    check_checkpoint(folder)  # Whoever writes by mistake writes into pages of its own.


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Return whether a tensor's first byte lies in a mapping of a file; Linux only."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return True
    return False


def test_checkpoints_are_found_oldest_first_by_step(run: Path) -> None:
    (run / "step_x").mkdir()
    assert [p.name for p in find_checkpoints(run)] == [
        "step_00000005", "step_00000010", "step_00000100",
    ]  # fmt: skip


def test_equal_weights_have_an_equal_key(run: Path, decoder: Decoder) -> None:
    first, second, _ = find_checkpoints(run)
    assert weights_key(first) == weights_key(second)
    with torch.no_grad():
        decoder.norm.weight[0] += 1
    assert weights_key(save(run, 11, decoder)) != weights_key(first)


def test_a_run_without_an_intact_checkpoint_has_no_newest_one(run: Path) -> None:
    for folder in find_checkpoints(run):
        (folder / "model.safetensors").unlink()
    assert newest_checkpoint(run) is None
    assert newest_checkpoint(run / "nowhere") is None


def test_a_crash_while_writing_leaves_the_old_state(
    run: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space"):
        save(run, 200, decoder)
    newest = newest_checkpoint(run)
    assert newest is not None
    assert newest.name == "step_00000100"
    prune_checkpoints(run, 2)
    assert not list(run.glob(".*.iiet-temporary"))


def test_pruning_keeps_the_newest_checkpoints(run: Path) -> None:
    prune_checkpoints(run, 2)
    assert [p.name for p in find_checkpoints(run)] == ["step_00000010", "step_00000100"]
    prune_checkpoints(run, 5)
    assert len(find_checkpoints(run)) == 2


def test_a_path_may_be_a_run_or_a_checkpoint(run: Path) -> None:
    newest = find_checkpoints(run)[-1]
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(find_checkpoints(run)[0]) == find_checkpoints(run)[0]


@pytest.mark.parametrize("name", ["missing", "step_00000007", "empty"])
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        resolve_checkpoint(tmp_path / name)


def test_weights_of_another_shape_are_refused(run: Path) -> None:
    folder = find_checkpoints(run)[-1]
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    with pytest.raises(UserError, match=r"does not fit config.json: size mismatch for embedding"):
        load_model(folder, check=False)
