"""Model folders from elsewhere give the same numbers here, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from iiet.config import preset
from iiet.decoder import Decoder
from iiet.exporting import export
from iiet.schedule import IterationSchedule
from orchestrator.models.loading import load_model, model_folder_key
from orchestrator.workspace.errors import UserError

FIXTURES = Path(__file__).parents[2] / "fixtures"


def published_folder(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write a reference case as a model folder; return all its tensors."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text((FIXTURES / f"{name}.json").read_text())
    weights = {
        key.removeprefix("weight."): value
        for key, value in tensors.items()
        if key.startswith("weight.")
    }
    save_file(weights, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("name", ["iiet_r3", "iiet_schedule_201", "pcformer_rk2", "vanilla"])
def test_published_folders_give_the_published_logits(name: str, tmp_path: Path) -> None:
    tensors = published_folder(tmp_path / name, name)
    decoder = load_model(tmp_path / name)
    with torch.no_grad():
        logits = decoder(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    assert not decoder.training


def llama_folder(folder: Path, **options: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(folder, **options)
    return llama


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "5KB"}])
def test_a_llama_folder_becomes_a_vanilla_model(shards: dict[str, str], tmp_path: Path) -> None:
    llama = llama_folder(tmp_path / "llama", **shards)
    assert (len(list((tmp_path / "llama").glob("*.safetensors"))) > 1) == bool(shards)
    decoder = load_model(tmp_path / "llama")
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), llama(tokens).logits, rtol=0, atol=1e-5)
    assert decoder.config.method == "vanilla"


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    decoder = load_model(tmp_path / "half")
    assert decoder.embedding.weight.dtype == torch.float32


def exported(folder: Path) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(preset("tiny", vocab_size=50, schedule=[2, 0, 1, 0, 0, 1])).eval()
    export(decoder, folder)
    return decoder


def test_an_exported_folder_gives_the_same_model(tmp_path: Path) -> None:
    decoder = exported(tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert loaded.config == decoder.config
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in decoder.state_dict().items())
    cheaper = load_model(tmp_path / "out", schedule=IterationSchedule((1, 0, 0, 0, 0, 0)))
    assert tuple(cheaper.schedule) == (1, 0, 0, 0, 0, 0)
    with pytest.raises(UserError, match="out: "):
        load_model(tmp_path / "out", schedule=IterationSchedule((1, 0)))


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    exported(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    weights = load_file(file)
    del weights["norm.weight"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"norm\.weight"):
        load_model(tmp_path / "out")


def spoil(folder: Path, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if name == "no config":
        (folder / "config.json").unlink()
    elif name == "no weights":
        (folder / "model.safetensors").unlink()
    elif name == "cut off":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif name == "no number":
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] = float("nan")
        save_file(weights, folder / "model.safetensors")
    elif name == "outside":
        (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
        index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "twice":
        weights = load_file(folder / "model.safetensors")
        save_file(
            {"model.norm.weight": weights["model.norm.weight"] + 1}, folder / "old.safetensors"
        )
    elif name == "other model":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    elif name == "sliding window":
        (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 128}))
    else:
        (folder / "config.json").write_text("[1, 2")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no config", "is not a model folder"),
        ("no weights", "has no safetensors"),
        ("cut off", "cannot read"),
        ("no number", "model.norm.weight has 1 values that are NaN"),
        ("outside", r"names a file outside its folder: '\.\./secret\.safetensors'"),
        ("twice", r"model\.norm\.weight in several files, the last of which is old\.safetensors"),
        ("other model", "'gpt2'"),
        ("sliding window", "sliding_window 128"),
        ("broken config", "cannot read"),
    ],
)
def test_unreadable_folders_are_errors(damage: str, words: str, tmp_path: Path) -> None:
    llama_folder(tmp_path / "llama")
    spoil(tmp_path / "llama", damage)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "llama")


def test_the_key_depends_on_the_content(tmp_path: Path) -> None:
    llama_folder(tmp_path / "one")
    llama_folder(tmp_path / "two")
    assert model_folder_key(tmp_path / "one") == model_folder_key(tmp_path / "two")
    spoil(tmp_path / "two", "no number")
    assert model_folder_key(tmp_path / "one") != model_folder_key(tmp_path / "two")
