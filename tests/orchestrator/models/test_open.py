"""Model folders of any kind give the same numbers here, or one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import random_model
from refusals import refused
from safetensors.torch import load_file, save_file

from iiet.decoder import Decoder
from iiet.exporting import export
from iiet.model.config import preset
from iiet.model.schedule import IterationSchedule
from orchestrator import cli
from orchestrator.models.folder import resolve_checkpoint
from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.pipelines.models import import_model
from orchestrator.workspace.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIXTURES = Path(__file__).parents[2] / "fixtures"


def test_a_published_folder_gives_the_published_logits(tmp_path):
    tensors = load_file(FIXTURES / "iiet_schedule_201.safetensors")
    shutil.copy(FIXTURES / "iiet_schedule_201.json", tmp_path / "config.json")
    weights = {n.partition(".")[2]: w for n, w in tensors.items() if n.startswith("weight.")}
    save_file(weights, tmp_path / WEIGHTS)
    decoder = load_model(tmp_path)
    with torch.no_grad():
        logits = decoder(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)
    assert not decoder.training


def write_llama_folder(folder: Path, max_shard_size: str = "1GB") -> None:
    random_model("llama").save_pretrained(folder, max_shard_size=max_shard_size)


def test_an_exported_folder_gives_the_same_model(tmp_path):
    torch.manual_seed(0)
    decoder = Decoder(preset("tiny", vocab_size=50, schedule=[2, 0, 1, 0, 0, 1])).eval()
    folder = export(decoder, tmp_path / "out")
    loaded = load_model(folder)
    assert loaded.config == decoder.config
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in decoder.state_dict().items())
    cheaper = load_model(folder, schedule=IterationSchedule((1, 0, 0, 0, 0, 0)))
    assert tuple(cheaper.schedule) == (1, 0, 0, 0, 0, 0)
    opened = open_model(folder, schedule="1,0,0,0,0,0")
    assert (opened.label, opened.schedule) == ("out r=1,0*5", cheaper.schedule)
    assert opened.key != open_model(folder).key
    with pytest.raises(UserError, match="out: "):
        load_model(folder, schedule=IterationSchedule((1, 0)))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.0.mix.inner")))
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.0\.mix\.inner"):
        load_model(folder)


def changed_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def with_nan(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / WEIGHTS)


def first_file(folder: Path) -> Path:
    [file] = folder.glob("model-00001-of-*.safetensors")
    return file


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a config that ends early": (lambda f: (f / "config.json").write_text("[1, 2"), "config.json"),
    "another type": (lambda f: changed_config(f, model_type="gpt2"), "'gpt2'"),
    "another attention": (lambda f: changed_config(f, sliding_window=128), "sliding_window 128"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "weights"),
    "weights that end early": (lambda f: cut_off(f / WEIGHTS), WEIGHTS),
    "weights that are no numbers": (with_nan, "model.norm.weight"),
    "no first file of several": (lambda f: first_file(f).unlink(), "model-00001-of"),
    "a first file of several that ends early": (
        lambda f: cut_off(first_file(f)),
        "model-00001-of",
    ),
    "files elsewhere": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}'),
        "weight_map",
    ),
}
"""What is wrong -> how it comes about, and what the message names."""


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_wrong_with_a_folder_is_named_and_nothing_is_imported(harm, tmp_path, workspace):
    folder = tmp_path / "llama"
    write_llama_folder(folder, max_shard_size="20KB" if "file" in harm else "1GB")
    do_harm, name = HARMS[harm]
    do_harm(folder)
    for read in (load_model, partial(import_model, workspace=workspace)):
        with refused(UserError, name):
            read(folder)
    assert not [*workspace.runs.glob("*/step_*")]


def test_a_llama_has_no_schedule_and_its_key_follows_its_files(tmp_path):
    folder = tmp_path / "llama"
    moved = tmp_path / "moved"
    write_llama_folder(folder)
    with pytest.raises(UserError, match="makes no corrections"):
        open_model(folder, schedule="1")
    before = open_model(folder).key
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("no part of the model")
    assert open_model(moved).key == before
    (moved / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    changed = open_model(moved).key
    with_nan(moved)
    assert before != changed != open_model(moved).key != before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}}, "'dynamic'"),
    ],
)
def test_a_folder_that_no_decoder_can_run_is_refused_with_the_reason_of_the_import(
    changes, reason, tmp_path, capfd
):
    """No command says that the import would help."""
    write_llama_folder(tmp_path / "model")
    changed_config(tmp_path / "model", **changes)
    where = ["--workspace", str(tmp_path / "space")]
    folder = str(tmp_path / "model")
    for command in (
        ["import", folder], ["generate", folder, "--prompt", "a"], ["influence", folder],
        ["distill", folder, "-r", "0"], ["export", folder], ["benchmark", folder],
    ):  # fmt: skip
        assert cli.main([*command, *where]) == 2, command
        printed = " ".join(capfd.readouterr().err.split())
        assert reason in printed
        assert "iiet-orch import" not in printed
        says_what_works = "`evaluate`" in printed and "`benchmark`" in printed
        assert says_what_works == (command[0] != "import")


def test_a_folder_that_a_decoder_can_run_is_imported_first(tmp_path):
    write_llama_folder(tmp_path / "model")
    with pytest.raises(UserError, match=f"`iiet-orch import {tmp_path / 'model'}`"):
        resolve_checkpoint(tmp_path / "model")
