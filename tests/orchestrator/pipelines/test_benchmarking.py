"""A benchmark chooses schedules, writes its file, and tracks one run per model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_tracking import untracked

from iiet.model.schedule import IterationSchedule
from orchestrator.cluster.work import CPU
from orchestrator.evaluation.decode_timing import MeasurementSettings
from orchestrator.models.open import by_label, open_model, open_models
from orchestrator.pipelines.benchmarking import (
    family_of,
    plan_benchmark,
    run_benchmark,
    usual_contexts,
)
from orchestrator.pipelines.influence import plan_influence, run_influence
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.render import shortest_schedule
from orchestrator.workspace.layout import Workspace

CONDITIONS = MeasurementSettings(batch_sizes=(1,), contexts=(4,), new_tokens=3, repetitions=2)


def test_the_family_is_uniform_or_that_of_the_influence_or_of_elastic_weights(
    tmp_path, tiny_tokens, save_tiny
):
    def family(checkpoint: Path) -> list[str]:
        return [*by_label(family_of(open_model(checkpoint)))]

    checkpoint = save_tiny(tmp_path / "run", initializer_std=0.3)
    assert family(checkpoint) == ["r=2,1", "r=1", "r=0"]
    vanilla = save_tiny(tmp_path / "plain", method="vanilla", schedule=None)
    assert family_of(open_model(vanilla)) == [open_model(vanilla)]
    assert [*by_label([open_model(checkpoint), open_model(vanilla)])] == ["run", "plain"]

    settings = Settings(influence=InfluenceSettings(num_tokens=64))
    shutil.copytree(tiny_tokens, tmp_path / "workspace" / "tokens" / tiny_tokens.name)
    plan = plan_influence(settings, workspace=tmp_path / "workspace", model=checkpoint)
    run_influence(plan, untracked(Workspace(tmp_path / "workspace")), executor=CPU)
    labels = family(checkpoint)
    assert (labels[0], labels[-1]) == ("r=2,1", "r=0")
    assert len(labels) == 4, "three corrections: each is dropped by a threshold of its own"

    elastic = save_tiny(tmp_path / "elastic", provenance={"elastic": ["2,0", "0,0"]})
    assert family(elastic) == ["r=2,1", "r=2,0", "r=0"]


def test_no_two_labels_are_alike_and_all_is_written_with_its_conditions(
    tmp_path, save_tiny, workspace
):
    def labels(*paths: Path, schedules: Sequence[str] = ()) -> list[str]:
        return [*by_label(open_models(paths, workspace, schedules))]

    run, namesake, plain = (save_tiny(tmp_path / name) for name in ("a/run", "b/run", "plain"))
    later_step = save_tiny(tmp_path / "a/run", step=2)
    assert labels(run, later_step) == ["run/step_00000001", "run/step_00000002"]
    assert labels(run, namesake) == ["run/step_00000001", "run/step_00000001 (2)"]
    assert labels(run, plain, later_step) == ["run/step_00000001", "plain", "run/step_00000002"]
    assert labels(run.parent, later_step) == ["run", "run (2)"]
    assert labels(run, schedules=["1", "1,1", "0"]) == ["run r=1", "run r=1 (2)", "run r=0"]
    assert labels(run, later_step, schedules=["1", "0"]) == [
        "run/step_00000001 r=1", "run/step_00000001 r=0",
        "run/step_00000002 r=1", "run/step_00000002 r=0",
    ]  # fmt: skip
    models = [run, later_step, namesake, namesake]
    plan = plan_benchmark(workspace=workspace, models=models, conditions=CONDITIONS)
    benchmark = run_benchmark(plan, untracked(workspace))
    assert [cost.model for cost in benchmark.costs] == labels(*models)
    written = json.loads(benchmark.path.read_text())
    assert [cost["model"] for cost in written["costs"]] == labels(*models)
    assert written["conditions"]["num_threads"] == 1
    assert (written["device"], written["dtype"]) == (benchmark.device, "float32")
    assert written["machine"]["torch"]
    table = benchmark.to_pandas()
    assert table["model"].tolist() == labels(*models)
    assert table["decoding_share"].iloc[0] == 1.0


@pytest.mark.parametrize(
    ("schedule", "text"),
    [((3, 3, 3), "3"), ((2, 1, 0), "2,1,0"), ((2, 2, 2, 2, 0, 0), "2*4,0*2"), ((1, 1, 0), "1,1,0")],
)
def test_typed_schedules_can_be_typed_again(schedule, text):
    assert shortest_schedule(schedule) == text
    parsed = IterationSchedule.parse(text, num_layers=len(schedule))
    assert parsed == IterationSchedule(schedule)


def test_usual_contexts_fit(tmp_path, save_tiny):
    small = [open_model(save_tiny(tmp_path / "run"))]
    assert usual_contexts(small, new_tokens=8) == (8,)
    assert usual_contexts(small, new_tokens=12) == (4,)
    conditions = plan_benchmark(workspace=tmp_path, models=[small[0].path]).conditions
    assert (conditions.contexts, conditions.new_tokens) == ((8,), 8)
    large = save_tiny(tmp_path / "large", context_length=256)
    assert usual_contexts([open_model(large)], new_tokens=32) == (32, 128)
