"""A benchmark chooses schedules, writes its file, and tracks one run per model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tracking import untracked

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.data.store import open_tokens
from orchestrator.evaluation.cost_measurement import MeasurementSettings
from orchestrator.models.open import open_model, open_models, short_names
from orchestrator.pipelines.benchmarking import (
    family_of,
    plan_benchmark,
    run_benchmark,
    usual_contexts,
)
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.influence import plan_influence, run_influence
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.render import shortest_schedule
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.training.devices import on_cpu
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

CONDITIONS = MeasurementSettings(batch_sizes=(1,), contexts=(4,), new_tokens=3, repetitions=2)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


def saved(
    folder: Path,
    tokens: Path,
    model: dict[str, Any],
    *,
    step: int = 1,
    elastic: Sequence[str] = (),
    **changes: Any,
) -> Path:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict({**model, **changes}))
    return save_checkpoint(
        folder,
        step,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state={},
        tokenizer_path=open_tokens(tokens).tokenizer_path,
        provenance={"tokens": tokens.name, "elastic": list(elastic)},
    )


def test_without_an_influence_table_the_family_is_uniform(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    iiet = open_model(saved(tmp_path / "run", tiny_tokens, tiny_model))
    family = family_of(iiet)
    assert short_names(family) == ["r=2,1", "r=1", "r=0"]
    vanilla = saved(tmp_path / "plain", tiny_tokens, tiny_model, method="vanilla", schedule=None)
    assert family_of(open_model(vanilla)) == [open_model(vanilla)]
    assert short_names([iiet, open_model(vanilla)]) == ["run", "plain"]


def test_the_family_is_that_of_the_stored_influence(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    checkpoint = saved(tmp_path / "run", tiny_tokens, {**tiny_model, "initializer_std": 0.3})
    settings = Settings(influence=InfluenceSettings(num_tokens=64))
    shutil.copytree(tiny_tokens, tmp_path / "workspace" / "tokens" / tiny_tokens.name)
    plan = plan_influence(settings, workspace=tmp_path / "workspace", model=checkpoint)
    run_influence(plan, untracked(Workspace(tmp_path / "workspace")), on_device=on_cpu)
    schedules = [
        model.config.corrections for model in family_of(open_model(checkpoint)) if model.config
    ]
    assert schedules[0] == IterationSchedule((2, 1))
    assert schedules[-1] == IterationSchedule.none(2)
    assert len(schedules) == 4  # three corrections: each is dropped by a threshold of its own


def test_the_family_of_elastic_weights_is_what_they_learned(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]
) -> None:
    checkpoint = saved(tmp_path / "run", tiny_tokens, tiny_model, elastic=["2,0", "0,0"])
    assert short_names(family_of(open_model(checkpoint))) == ["r=2,1", "r=2,0", "r=0"]
    damaged = saved(tmp_path / "other", tiny_tokens, tiny_model, elastic=["2,0,0"])
    with pytest.raises(UserError, match=r"provenance.json: elastic: .* is for 3 layers"):
        family_of(open_model(damaged))


def test_no_two_labels_are_alike_and_none_is_dropped(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any], workspace: Workspace
) -> None:
    def folder(name: str, step: int = 1) -> Path:
        return saved(tmp_path / name, tiny_tokens, tiny_model, step=step)

    def labels(*paths: Path, schedules: Sequence[str] = ()) -> list[str]:
        return short_names(open_models(workspace, paths, schedules))

    first, second, other = folder("a/run"), folder("a/run", 2), folder("b/run")
    assert labels(first, second) == ["run/step_00000001", "run/step_00000002"]
    assert labels(first, other) == ["a/run/step_00000001", "b/run/step_00000001"]
    assert labels(first, folder("plain"), second) == [
        "run/step_00000001", "plain", "run/step_00000002",
    ]  # fmt: skip
    assert labels(first.parent, second) == ["run", "run (2)"]
    assert labels(first, schedules=["1", "1,1", "0"]) == ["run r=1", "run r=1 (2)", "run r=0"]
    assert labels(first, second, schedules=["1", "0"]) == [
        "run/step_00000001 r=1", "run/step_00000001 r=0",
        "run/step_00000002 r=1", "run/step_00000002 r=0",
    ]  # fmt: skip
    models = [first, second, other, other]
    plan = plan_benchmark(workspace=workspace, models=models, conditions=CONDITIONS)
    found = run_benchmark(plan, untracked(workspace))
    assert [cost.model for cost in found.costs] == labels(*models)
    assert len(found.costs) == 4


def test_what_was_measured_is_written_with_its_conditions(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any], workspace: Workspace
) -> None:
    model = saved(tmp_path / "run", tiny_tokens, tiny_model)
    plan = plan_benchmark(workspace=workspace, models=[model], conditions=CONDITIONS)
    found = run_benchmark(plan, untracked(workspace))
    written = json.loads(found.path.read_text())
    assert [cost["model"] for cost in written["costs"]] == ["r=2,1", "r=1", "r=0"]
    assert written["conditions"]["num_threads"] == 1
    assert (written["device"], written["dtype"]) == (found.device, "float32")
    assert written["machine"]["torch"]
    table = found.to_pandas()
    assert table["model"].tolist() == ["r=2,1", "r=1", "r=0"]
    assert table["decoding_share"].iloc[0] == 1.0


@pytest.mark.slow
def test_each_model_is_a_run_with_its_costs(
    tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any], workspace: Workspace
) -> None:
    import mlflow

    context = Context(workspace)
    model = saved(tmp_path / "run", tiny_tokens, tiny_model)
    plan = plan_benchmark(workspace=workspace, models=[model], conditions=CONDITIONS)
    found = run_benchmark(plan, context)
    client = mlflow.MlflowClient(workspace.tracking_uri)
    runs = client.search_runs([context.tracking.experiment_id])
    assert {run.data.params["schedule"] for run in runs} == {"2,1", "1,1", "0,0"}
    full = next(run for run in runs if run.data.params["schedule"] == "2,1")
    assert full.data.tags["iiet.kind"] == "benchmark"
    name = "cost/batch_1_context_4/decode_ms"
    assert full.data.metrics[name] == pytest.approx(found.costs[0].decode_ms)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [((3, 3, 3), "3"), ((2, 1, 0), "2,1,0"), ((2, 2, 2, 2, 0, 0), "2*4,0*2"), ((1, 1, 0), "1,1,0")],
)
def test_typed_schedules_can_be_typed_again(schedule: tuple[int, ...], text: str) -> None:
    assert shortest_schedule(schedule) == text
    parsed = IterationSchedule.parse(text, num_layers=len(schedule))
    assert parsed == IterationSchedule(schedule)


def test_usual_contexts_fit(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> None:
    small = [open_model(saved(tmp_path / "run", tiny_tokens, tiny_model))]
    assert usual_contexts(small, new_tokens=8) == (8,)
    assert usual_contexts(small, new_tokens=12) == (4,)
    large = saved(tmp_path / "large", tiny_tokens, {**tiny_model, "context_length": 256})
    assert usual_contexts([open_model(large)], new_tokens=32) == (32, 128)
