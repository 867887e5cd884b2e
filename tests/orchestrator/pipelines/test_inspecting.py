"""`inspect` describes models of every kind, without running them or writing anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from looped_models import write_looped
from plain_models import config_of, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from iiet.cost import inference_cost
from iiet.iiad.pruning import InfluenceTable
from orchestrator import cli
from orchestrator.models.folder import TOKENIZER, load_config
from orchestrator.records.influence import StoredInfluence, influence_path
from orchestrator.workspace.layout import Workspace

Inspect = Callable[..., dict[str, Any]]


@pytest.fixture
def inspect(workspace: Workspace, capfd) -> Inspect:
    """A function that inspects a model, and returns the JSON."""

    def answer(*arguments: object) -> dict[str, Any]:
        command = ["inspect", *map(str, arguments), "--json", "--workspace", str(workspace.root)]
        assert cli.main(command) == 0
        return json.loads(capfd.readouterr().out)

    return answer


def files_in(workspace: Workspace) -> set[Path]:
    files = {path for path in workspace.root.rglob("*") if path.is_file()}
    return {path for path in files if path.parent != workspace.logs}


def test_a_run_has_its_costs_its_layers_and_the_price_of_a_training(
    workspace, trained_run, tiny_tokens, inspect, capfd
):
    shutil.copytree(trained_run, workspace.runs / "teacher")
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    checkpoint = workspace.runs / "teacher" / "step_00000002"
    config = load_config(checkpoint)
    before = files_in(workspace)
    description = inspect("teacher")
    cost = inference_cost(config)
    assert (description["kind"], description["is_native"], description["reason"]) == (
        "iiet",
        True,
        "",
    )
    assert description["schedule"] == "2,1"
    assert description["evaluations_per_token"] == cost.evaluations_per_token == 5
    assert description["flops_per_token"] == cost.forward_flops_per_token
    assert description["kv_bytes_per_token"] == cost.kv_bytes_per_token
    assert description["num_parameters"] == cost.num_parameters
    assert description["retrofit"]["num_tokens"] > 0
    assert description["retrofit_problems"] == {"this machine": None}
    assert description["layer_influence"] == []
    # Another schedule costs something else.
    assert inspect("teacher", "-r", "0")["evaluations_per_token"] == 2
    assert files_in(workspace) == before

    # What is measured of its layers is shown.
    table = InfluenceTable(
        metric="cosine",
        value_rows=((0.1, 0.0), (0.3,)),
        error_rows=((0.0, 0.0), (0.0,)),
        num_tokens=64,
        layer_values=(0.2, 0.8),
    )
    StoredInfluence(key="any", table=table).write(influence_path(checkpoint, "cosine"))
    description = inspect("teacher")
    assert description["layer_influence"] == [0.2, 0.8]
    assert description["corrections_influence"] == [[0.1, 0.0], [0.3]]
    assert cli.main(["inspect", "teacher", "--workspace", str(workspace.root)]) == 0
    shown = capfd.readouterr().out
    for text in ("each whole layer", "0.2", "0.8", "most influence: 2, 1", "keys and values"):
        assert text in shown


def test_a_student_that_leaves_layers_out_says_which_it_keeps(workspace, save_tiny, inspect):
    student = {"method": "vanilla", "schedule": None, "num_layers": 3}
    folder = save_tiny(workspace.runs / "student", provenance={"kept_layers": [0, 2, 5]}, **student)
    assert inspect(folder)["kept_layers"] == [1, 3, 6]
    whole = save_tiny(workspace.runs / "whole", **student)
    assert inspect(whole)["kept_layers"] == []
    assert inspect(whole, "-r", "0,x,0")["kept_layers"] == [1, 3]


@pytest.mark.parametrize("case", ["llama3", "qwen3", "smollm3 windows"])
def test_a_plain_model_of_transformers_is_read_natively(case, tmp_path, inspect):
    random_model(case).save_pretrained(tmp_path / "model")
    description = inspect(tmp_path / "model")
    assert (description["kind"], description["is_native"], description["schedule"]) == (
        "vanilla",
        True,
        None,
    )
    values = config_of(case)
    assert description["sizes"]["layers"] == values.num_hidden_layers
    assert description["sizes"]["key/value heads"] == values.num_key_value_heads
    assert ("beyond a plain Llama" in description["sizes"]) == (case != "llama")
    assert description["retrofit"]["num_tokens"] > 0
    # With these settings no training can start from the model.
    description = inspect(tmp_path / "model", "--set", "model.dim=1000")
    assert description["retrofit"] is None
    assert "model.dim" in description["retrofit_problems"]["this machine"]


def test_of_a_model_that_only_transformers_runs_it_says_what_is_missing(
    workspace, tmp_path, inspect, capfd
):
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model.save_pretrained(tmp_path / "gpt")
    description = inspect(tmp_path / "gpt")
    assert (description["kind"], description["is_native"]) == ("gpt2", False)
    assert "gpt2" in description["reason"]
    expected = {"layers": 3, "width": 16, "heads": 2, "vocabulary": 40, "context": 32}
    assert description["sizes"] == expected
    assert description["num_parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (description["flops_per_token"], description["retrofit"]) == (None, None)
    where = ["--workspace", str(workspace.root)]
    assert cli.main(["inspect", str(tmp_path / "gpt"), *where]) == 0
    assert "FLOPs" not in capfd.readouterr().out


def test_a_looped_model_has_the_evaluations_of_its_depth(tmp_path, inspect, tiny_tokens):
    write_looped(tmp_path / "loops", "ouro", tiny_tokens / TOKENIZER)
    default_depth = inspect(tmp_path / "loops")
    twice = inspect(tmp_path / "loops", "-r", "2")
    once = inspect(tmp_path / "loops", "-r", "1")
    assert not default_depth["is_native"]
    assert twice["evaluations_per_token"] == 2 * once["evaluations_per_token"]
    assert twice["kv_bytes_per_token"] == 2 * once["kv_bytes_per_token"]


def test_what_is_no_model_or_no_schedule_of_it_is_refused(tmp_path, inspect, capfd, workspace):
    random_model("llama").save_pretrained(tmp_path / "model")
    for arguments in (["missing"], [str(tmp_path / "model"), "-r", "2"]):
        command = ["inspect", *arguments, "--workspace", str(workspace.root)]
        assert cli.main(command) == 2
        assert arguments[0] in "".join(capfd.readouterr().err.split())
