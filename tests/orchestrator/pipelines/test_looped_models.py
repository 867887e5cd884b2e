"""Looped models of other projects are measured at a depth, side by side with a looped model that
was trained here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_tracking import untracked
from lm_eval_tasks import write_task
from looped_models import write_looped

from orchestrator import cli
from orchestrator.evaluation.decode_timing import cost_of, load_side_by_side
from orchestrator.models.folder import weights_key
from orchestrator.models.load import load_model
from orchestrator.models.loops import LoopedModel
from orchestrator.models.open import OpenedModel, by_label, open_model
from orchestrator.pipelines.evaluating import EvaluatePlan, run_evaluate
from orchestrator.pipelines.models import export_checkpoint
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.workspace.layout import Workspace

ROWS = [
    {"context": f"a {word} and the {word} had", "endings": [f"{word} gone", "end", "fed a dog"],
     "label": number % 3, "text": f"{word} and a {word} had a bag"}
    for number, word in enumerate(("bag", "fog", "hen", "pig", "cab", "deed"))
]  # fmt: skip
SUITE = "choices,rolling"


class Exported(LoopedModel):
    """A looped model that was trained here and exported: the stack runs `1 + r` times."""

    settings = ("corrections",)

    @property
    def default_depth(self):
        return (1 + max(self.config["corrections"]),)

    @property
    def num_layers(self):
        return self.number("num_layers")

    def changes(self, depth):
        num_runs = self.layer_runs(depth)
        return {
            "corrections": [depth[0] - 1] * self.num_layers,
            "num_hidden_layers": num_runs,  # Slots of the cache.
            "layer_types": ["full_attention"] * num_runs,
        }


@pytest.fixture
def workspace(workspace, tiny_tokens) -> Workspace:
    """A workspace with tokens."""
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    return workspace


@pytest.fixture
def tasks(tmp_path) -> Path:
    write_task(tmp_path / "tasks", "rolling", ROWS)
    return write_task(tmp_path / "tasks", "choices", ROWS)


def measure(models: list[OpenedModel], tasks: Path, workspace: Workspace) -> list[dict[str, float]]:
    """Return the costs and qualities of models."""
    settings = EvaluationSettings(suite=SUITE, include_path=str(tasks), batch_size=4)
    plan = EvaluatePlan(
        settings=Settings(evaluation=settings),
        workspace=workspace,
        opened=by_label(models),
        trust_remote_code=True,
    )
    evaluations = run_evaluate(plan, untracked(workspace)).evaluations
    decoders = load_side_by_side(plan.opened, "cpu", trust_remote_code=True)
    return [
        {**vars(cost_of(decoders[label])()), **evaluations[label].quality()}
        for label in plan.opened
    ]


@pytest.mark.slow
def test_an_exported_model_measures_the_same_through_its_class(
    workspace, tasks, tmp_path, save_tiny
):
    run = save_tiny(
        workspace.runs / "ours", method="looped", schedule=[1, 1], context_length=64,
        initializer_std=0.3,
    )  # fmt: skip
    card = ModelCard(
        name="tiny", config=load_model(run).config, provenance={"weights": weights_key(run)}
    )
    folder = export_checkpoint(run, tmp_path / "exported", decoder=load_model(run), card=card)
    loops = Exported(json.loads((folder / "config.json").read_text()))
    assert loops.default_depth == (2,)
    exported = [
        replace(
            open_model(folder),
            config=None,
            loops=loops,
            depth=(depth,),
            schedule_label=f"depth={depth}",
        )
        for depth in (1, 2, 3)
    ]  # fmt: skip
    native = measure([open_model(run, schedule=str(r)) for r in (0, 1, 2)], tasks, workspace)
    through_class = measure(exported, tasks, workspace)
    # The bytes of weights are unknown for models of other projects. An exponential of a sum would
    # magnify the last digit.
    left_out = {"weight_bytes_per_token"} | {name for name in native[0] if "perplexity" in name}
    shared = native[0].keys() - left_out
    assert shared >= {"decode_flops_per_token", "kv_bytes_per_token", "accuracy", "bits_per_byte"}
    for native_numbers, numbers_of_class in zip(native, through_class, strict=True):
        for name in shared:
            assert native_numbers[name] == pytest.approx(numbers_of_class[name], rel=1e-6), name


@pytest.mark.slow
def test_commands_take_a_depth(workspace, tasks, tokenizer_path, tmp_path, save_tiny, capfd):
    # With code in its folder, and of transformers.
    folder = write_looped(tmp_path / "loops", "huginn_raven", tokenizer_path, state_init="normal")
    other = write_looped(
        tmp_path / "other", "inkling2_loop_text", tokenizer_path, num_hidden_layers=4
    )
    save_tiny(workspace.runs / "ours", method="looped", schedule=[1, 1], context_length=64)
    where = ["--workspace", str(workspace.root), "--quiet"]
    suite = ["--suite", SUITE, "--include-path", str(tasks)]
    trusted = ["--trust-remote-code", *where]

    def run(*command: str) -> Any:
        assert cli.main([*command, "--json"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    for depth, sentence in (("0", "each 1 or more"), ("2,3", "mean_recurrence, each 1 or more")):
        assert cli.main(["evaluate", str(folder), "-r", depth, *suite, *trusted]) == 2
        assert sentence in " ".join(capfd.readouterr().err.split())
    assert cli.main(["evaluate", str(folder), "-r", "2", *suite, *where]) == 2
    assert "--trust-remote-code" in capfd.readouterr().err
    assert cli.main(["generate", str(folder), "--prompt", "a", *where]) == 2
    assert str(folder) in " ".join(capfd.readouterr().err.split())

    models = [str(folder), str(other), "ours"]
    depths = ["-r", "1", "-r", "3"]
    planned = run("evaluate", *models, *depths, *suite, "--dry-run", *trusted)
    assert {row["state"] for row in planned["tasks"]} == {"6 items to measure"}
    assert len(planned["tasks"]) == 6 * 2
    evaluated = run("evaluate", *models, *depths, *suite, *trusted)
    assert {model["name"]: model["evaluations"] for model in evaluated["models"]} == {
        "loops depth=1": 4, "loops depth=3": 8,
        "other depth=1": 4, "other depth=3": 8,
        "ours r=1": 4, "ours r=3": 8,
    }  # fmt: skip
    assert {row["against"] for row in evaluated["differences"]} == {"loops depth=1"}
    # A depth that was measured is found again, and stands in the table with its cost.
    planned = run("evaluate", str(folder), "-r", "3", *suite, "--dry-run", *trusted)
    assert {row["state"] for row in planned["tasks"]} == {"6 items, stored"}
    assert cli.main(["evaluate", str(folder), *depths, *suite, *trusted]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["cost", "NFE", "4", "8"] in lines

    timed = run("benchmark", str(folder), "ours", "-r1", "-r3", "--repetitions", "2",
                "--batch-sizes", "1", "--contexts", "8", "--new-tokens", "4", *trusted)  # fmt: skip
    assert [cost["model"] for cost in timed["costs"]] == [
        "loops depth=1", "loops depth=3", "ours r=1", "ours r=3",
    ]  # fmt: skip
    assert all(cost["decode_ms"] > 0 < cost["peak_bytes"] for cost in timed["costs"])
    shares = {cost["model"]: cost["shares"]["decoding"]["predicted"] for cost in timed["costs"]}
    assert shares["loops depth=1"]["evaluations"] == 4 / 8
