"""Looped models of other projects are scored at a depth, and stand on one front with a looped model
that was trained here.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tracking import untracked
from lm_eval_tasks import write_task
from looped_models import write_looped
from safetensors.torch import load_file, save_file

from orchestrator import cli
from orchestrator.data.store import open_tokens
from orchestrator.evaluation import decode_timing
from orchestrator.models.folder import weights_key
from orchestrator.models.load import load_model
from orchestrator.models.loops import LoopedModel
from orchestrator.models.open import OpenedModel, by_label, open_model
from orchestrator.pipelines.evaluating import EvaluatePlan
from orchestrator.pipelines.loops import (
    DepthPlan,
    plan_depths,
    plan_loop_influence,
    run_depths,
    run_loop_influence,
)
from orchestrator.pipelines.models import export_checkpoint
from orchestrator.reporting.depths import DEPTHS_TITLE, depth_section
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import EvaluationSettings, Settings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

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
def workspace(tmp_path, tiny_tokens, monkeypatch) -> Workspace:
    for name in ("SWEEP_NEW_TOKENS", "SWEEP_REPETITIONS"):
        monkeypatch.setattr(decode_timing, name, 2)
    workspace = open_workspace(tmp_path / "workspace")
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    return workspace


@pytest.fixture
def tasks(tmp_path) -> Path:
    write_task(tmp_path / "tasks", "rolling", ROWS)
    return write_task(tmp_path / "tasks", "choices", ROWS)


@pytest.fixture
def tokenizer(tiny_tokens) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path


def front_of(models: list[OpenedModel], tasks: Path, workspace: Workspace) -> list[dict[str, Any]]:
    settings = EvaluationSettings(suite=SUITE, include_path=str(tasks), batch_size=4)
    evaluation = EvaluatePlan(
        settings=Settings(evaluation=settings),
        workspace=workspace,
        opened=by_label(models),
        trust_remote_code=True,
    )
    plan = DepthPlan(name="front", evaluation=evaluation)
    return run_depths(plan, untracked(workspace)).rows()


@pytest.mark.slow
def test_kinds_of_other_projects_and_of_this_one_stand_on_one_front(
    workspace, tasks, tokenizer, tmp_path, save_tiny
):
    ours = save_tiny(workspace.runs / "ours", method="looped", schedule=[0, 0], context_length=64)
    models = [open_model(ours, schedule="1")]
    # With code in its folder, and of transformers.
    kinds = {"ouro": 3, "inkling2_loop_text": 4}
    for kind, num_layers in kinds.items():
        folder = write_looped(tmp_path / kind, kind, tokenizer, num_hidden_layers=num_layers)
        models += [open_model(folder, schedule=depth) for depth in ("1", "2")]
    rows = front_of(models, tasks, workspace)
    assert [row["cost/evaluations"] for row in rows] == [3, 4, 4, 6, 6]
    assert {row["method"] for row in rows} == {"looped", *kinds}
    by_name = {row["name"]: row for row in rows}
    assert by_name["ouro depth=2"]["cost/kv_bytes_per_token"] == 4 * 6 * 64
    assert all(row["cost/flops_per_token"] > 0 < row["cost/decode_ms_per_token"] for row in rows)


@pytest.mark.slow
def test_an_exported_model_has_the_same_front_through_its_class(
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
    native = front_of([open_model(run, schedule=str(r)) for r in (0, 1, 2)], tasks, workspace)
    through_class = front_of(exported, tasks, workspace)
    shared = {"on_front", *(name for name in native[0] if name.startswith("cost/"))}
    # The bytes of weights are unknown for models of other projects, and times differ.
    shared -= {"cost/weight_bytes_per_token"}
    shared = {name for name in shared if "ms" not in name}
    assert shared >= {"cost/flops_per_token", "cost/prefill_flops_per_token", "cost/num_parameters"}
    # An exponential of a sum would magnify the last digit.
    shared |= {name for name in native[0] if name[:8] == "quality/" and "perplexity" not in name}
    assert len(shared) > 12
    for native_row, row_of_class in zip(native, through_class, strict=True):
        for name in shared:
            assert native_row[name] == pytest.approx(row_of_class[name], rel=1e-6), name


@pytest.mark.slow
def test_the_page_of_models_that_were_trained_here_shows_their_depth_curve(
    workspace, tasks, save_tiny
):
    save_tiny(workspace.runs / "ours", schedule=[2, 1], context_length=64)
    save_tiny(workspace.runs / "levels", method="pcformer", schedule=[2, 2], context_length=64)
    changes = [
        "sweep.kind=depth", "sweep.models=[ours, levels]", "sweep.depths=[0, 1, 2]",
        f"evaluation.suite={SUITE}", f"evaluation.include_path={tasks}",
    ]  # fmt: skip
    plan = plan_depths(resolve_settings({}, changes), workspace=workspace)
    report = run_depths(plan, untracked(workspace))
    assert {row["name"] for row in report.rows()} == {
        f"{name} r={depth}" for name in ("ours", "levels") for depth in range(3)
    }
    page = (report.folder / "front.html").read_text("utf-8")
    assert DEPTHS_TITLE in page
    section = depth_section(report.front)
    assert section is not None
    points = {tuple(row.cells[:3]) for row in section.tables[0].rows}
    assert points == {
        (name, str(depth), str(2 + 2 * depth)) for name in ("ours", "levels") for depth in range(3)
    }
    assert (report.folder / "depth-curve.png").stat().st_size > 1000
    for name in ("baseline_runs=[ours]", "seeds=[0, 1]"):
        settings = resolve_settings({}, [*changes, f"sweep.{name}"])
        with pytest.raises(UserError, match=rf"sweep\.{name.partition('=')[0]}"):
            plan_depths(settings, workspace=workspace)


@pytest.mark.slow
def test_commands_take_a_depth(workspace, tasks, tokenizer, tmp_path, save_tiny, capfd):
    folder = write_looped(tmp_path / "loops", "huginn_raven", tokenizer, state_init="normal")
    save_tiny(workspace.runs / "ours", method="looped", schedule=[1, 1], context_length=64)
    where = ["--workspace", str(workspace.root), "--quiet"]
    suite = ["--suite", SUITE, "--include-path", str(tasks)]
    depths = tmp_path / "depths.yaml"
    depths.write_text(
        f"sweep: {{kind: depth, models: [{folder}, ours], depths: [1, 3]}}\n"
        f"evaluation: {{suite: '{SUITE}', include_path: {tasks}}}\n"
    )
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

    planned = run("sweep", str(depths), "--dry-run", *trusted)
    assert {row["state"] for row in planned["tasks"]} == {"6 items to measure"}
    assert len(planned["tasks"]) == 4 * 2
    swept = run("sweep", str(depths), *trusted)
    assert len(swept["results"]) == 4
    [costs] = workspace.sweeps.glob("depth-*/times.json")
    written = costs.stat().st_mtime_ns
    row_of_sweep = run("sweep", str(depths), *trusted)
    assert row_of_sweep["results"] == swept["results"]
    assert costs.stat().st_mtime_ns == written, "times are not measured again"
    (evaluated,) = run("evaluate", str(folder), "-r", "3", *suite, *trusted)["models"]
    (row_of_sweep,) = [row for row in swept["results"] if row["name"] == "loops depth=3"]
    bits = "rolling/bits_per_byte"
    assert evaluated["quality"][bits] == pytest.approx(row_of_sweep[f"quality/{bits}"], rel=1e-11)
    assert "Quality by depth" in (costs.parent / "front.html").read_text("utf-8")
    axes = "--cost", "flops", "--quality", "accuracy"  # Few answers are right.
    assert len(run("report", costs.parent.name, *axes, *where)["front"]) > 1
    compared = run("evaluate", str(folder), "ours", "-r", "3", *suite, *trusted)
    names = {(difference["against"], difference["model"]) for difference in compared["differences"]}
    assert names == {("loops depth=3", "ours r=3")}

    timed = run("benchmark", str(folder), "ours", "-r1", "-r3", "--repetitions", "2",
                "--batch-sizes", "1", "--contexts", "8", "--new-tokens", "4", *trusted)  # fmt: skip
    assert [cost["model"] for cost in timed["costs"]] == [
        "loops depth=1", "loops depth=3", "ours r=1", "ours r=3",
    ]  # fmt: skip
    assert all(cost["decode_ms"] > 0 < cost["peak_bytes"] for cost in timed["costs"])
    shares = {cost["model"]: cost["shares"]["decoding"]["predicted"] for cost in timed["costs"]}
    assert shares["loops depth=1"]["evaluations"] == 4 / 8

    measured = run(
        "influence", str(folder), "-r", "4", "--set", "influence.num_tokens=512", *trusted
    )
    assert [row["loop"] for row in measured["loops"]] == [2, 3, 4]
    assert all(0 <= row["changed_tokens"] <= 1 for row in measured["loops"])
    assert all(row["turned"] > 0 < row["step"] for row in measured["loops"])


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "growing_loop"), [(0.5, None), (2.0, 3)])
def test_influence_says_where_steps_stop_shrinking(
    factor, growing_loop, workspace, tokenizer, tmp_path
):
    folder = write_looped(tmp_path / "loops", "huginn_raven", tokenizer)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "core_block" in name:  # The layers change nothing.
            weight.zero_()
    # A loop adds the same to `factor` of the state, so each step is `factor` times the last.
    weights["adapter.weight"].copy_(torch.cat([factor * torch.eye(32), torch.eye(32)], 1))
    weights["adapter.bias"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = Settings().model_copy(
        update={"influence": Settings().influence.model_copy(update={"num_tokens": 256})}
    )
    plan = plan_loop_influence(
        settings, workspace=workspace, model=folder, schedule="5", trust_remote_code=True
    )
    influence = run_loop_influence(plan, untracked(workspace))
    steps = [row["step"] for row in influence.loops]
    assert [b / a for a, b in pairwise(steps)] == pytest.approx([factor] * 3, rel=1e-4)
    assert all(row["turned"] == pytest.approx(0, abs=1e-6) for row in influence.loops)
    assert len(influence.notes) == (growing_loop is not None)
    if growing_loop is not None:
        assert f"do not shrink from loop {growing_loop} on" in influence.notes[0]
