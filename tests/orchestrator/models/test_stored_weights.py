"""Weights are read and written tensor by tensor: no process holds all weights of a model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors, counted_reads
from plain_models import random_model
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from iiet.decoder import Decoder
from iiet.hf.weights import WEIGHTS
from iiet.model.config import ModelConfig
from orchestrator.models.load import load_model, open_weights
from orchestrator.pipelines import models
from orchestrator.pipelines.models import export, import_model
from orchestrator.workspace.errors import UserError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture
def llama(tmp_path) -> Path:
    """A published model of many layers, in bfloat16 and several files."""
    folder = tmp_path / "llama"
    sizes = {"vocab_size": 320, "num_hidden_layers": 12, "intermediate_size": 64}
    random_model("llama", **sizes).bfloat16().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def largest(folder: Path) -> int:
    """Return the bytes of the largest weight of a model as float32."""
    return max(tensor.nbytes for tensor in load_model(folder).state_dict().values())


def test_a_published_model_is_imported_and_exported_tensor_by_tensor(
    llama, workspace, tmp_path, monkeypatch
):
    total = sum(tensor.nbytes for tensor in load_model(llama).state_dict().values())
    bound = 3 * largest(llama)  # As it is stored, and converted.
    assert 4 * bound < total
    with LiveTensors(torch.nn.Module()) as live, counted_reads() as reads:
        checkpoint = import_model(llama, workspace=workspace)
    assert max(live.peak, reads.peak) <= bound
    assert reads.total >= total / 2, "bfloat16 takes half of float32"

    monkeypatch.setattr(models, "EXPORTED_FILE_BYTES", 40_000)
    with LiveTensors(torch.nn.Module()) as live, counted_reads() as reads:
        folder = export(checkpoint, workspace=workspace, measure=False, to=tmp_path / "out")
    assert live.peak <= total + bound, "the weights are mapped from their file, each once"
    assert reads.peak <= bound
    assert len(list(folder.glob("*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["iiet_schedule_201", "pcformer_rk2"])
def test_weights_of_the_published_naming_are_those_of_a_whole_model(name, tmp_path):
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    shutil.copy(FIXTURES / f"{name}.json", tmp_path / "config.json")
    weights = {n.partition(".")[2]: w for n, w in tensors.items() if n.startswith("weight.")}
    save_file(weights, tmp_path / WEIGHTS)
    loaded = load_model(tmp_path)
    config, lazy = open_weights(tmp_path)
    assert config == loaded.config
    expected = loaded.state_dict()
    assert lazy.keys() == expected.keys()
    for weight, tensor in lazy.items():
        assert tensor.shape == expected[weight].shape
        assert torch.equal(tensor[...], expected[weight]), weight
        if tensor.shape:
            assert torch.equal(tensor[1:3], expected[weight][1:3]), weight


def test_weights_that_do_not_fit_or_are_not_finite_are_named(
    llama, workspace, tiny_model, tmp_path
):
    Decoder(ModelConfig.from_dict(tiny_model)).save_pretrained(tmp_path)
    weights: dict[str, Any] = load_file(tmp_path / WEIGHTS)
    weights["other"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / WEIGHTS)
    with refused(UserError, "model.norm.weight", "other"):
        open_weights(tmp_path)
    (file,) = (
        path for path in llama.glob("*.safetensors") if "model.norm.weight" in load_file(path)
    )
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file)
    with refused(UserError, "model.norm.weight", "NaN"):
        import_model(llama, workspace=workspace)
    assert not list(workspace.runs.glob("*/step_*"))
    # Repaired, it is imported under the same name.
    weights["model.norm.weight"][3] = 1.0
    save_file(weights, file)
    assert import_model(llama, workspace=workspace).parent.parent == workspace.runs
