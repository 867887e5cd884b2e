"""Each measurement is one run of MLflow: evaluations, influence and costs."""

from __future__ import annotations

import shutil

import pytest
from lm_eval_tasks import write_choices
from mlflow import MlflowClient
from mlflow.entities import Run
from one_evaluation import evaluate_model

from orchestrator.cluster.work import CPU
from orchestrator.evaluation.decode_timing import MeasurementSettings
from orchestrator.pipelines import benchmarking
from orchestrator.pipelines.benchmarking import plan_benchmark, run_benchmark
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.influence import plan_influence, run_influence
from orchestrator.settings import EvaluationSettings, InfluenceSettings, Settings
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import open_workspace


@pytest.mark.slow
def test_each_measurement_is_one_run(tmp_path, tiny_tokens, save_tiny, monkeypatch):
    context = Context(workspace := open_workspace(tmp_path / "workspace"))
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    model = save_tiny(workspace.runs / "run", initializer_std=0.3)
    place = {"workspace": workspace, "progress": None}
    tasks = write_choices(tmp_path / "tasks", "first", ["a b", "c d", "e f"])
    suite = EvaluationSettings(suite="first", include_path=str(tasks))
    conditions = MeasurementSettings(batch_sizes=(1,), contexts=(4,), new_tokens=3, repetitions=2)
    settings = Settings(influence=InfluenceSettings(num_tokens=512))
    ends = []
    for _ in range(2):
        evaluation = evaluate_model(model, suite, context)
        plan = plan_influence(settings, model=model, **place)
        table = run_influence(plan, context, executor=CPU).table
        ends.append(now_ms())
    timing = plan_benchmark(models=[model], conditions=conditions, **place)
    run_benchmark(timing, context)
    repeated_ms = now_ms()
    costs = run_benchmark(timing, context)

    client = MlflowClient(workspace.tracking_uri)
    runs: dict[str, list[Run]] = {}
    for run in client.search_runs([str(context.tracking.open_experiment())]):
        runs.setdefault(run.data.tags["iiet.kind"], []).append(run)
    assert {kind: len(runs_of_kind) for kind, runs_of_kind in runs.items()} == {
        "evaluation": 1, "influence": 1, "benchmark": 4,
    }, "the benchmark has the schedules of the influence"  # fmt: skip

    for run in (*runs["evaluation"], *runs["influence"]):
        # What is found again keeps its times.
        assert run.info.start_time < run.info.end_time <= ends[0]

    (run,) = runs["evaluation"]
    assert run.data.metrics["quality/accuracy"] == pytest.approx(evaluation.accuracy)
    assert run.data.params["schedule"] == "2,1"
    assert run.inputs is not None
    [dataset_input] = run.inputs.dataset_inputs
    assert (dataset_input.dataset.name, dataset_input.tags[0].value) == (
        ", ".join(evaluation.results),
        "evaluation",
    )

    # The influence of each layer is a curve over its corrections.
    (run,) = runs["influence"]

    def curve(name: str) -> dict[int, float]:
        history = client.get_metric_history(run.info.run_id, name)
        return {point.step: point.value for point in history}

    assert curve("influence/layer_01") == dict(enumerate(table.value_rows[0], start=1))
    assert curve("residual/layer_01") == dict(enumerate(table.residual_rows[0], start=1))
    assert curve("layer_influence") == dict(enumerate(table.layer_values, start=1))
    assert curve("contraction") == {1: table.contractions[0]}
    names = {file.path for file in client.list_artifacts(run.info.run_id, "influence")}
    assert names == {"influence/influence-cosine.json", "influence/influence-cosine.png"}

    # Times are measured anew by each call.
    assert all(run.info.start_time >= repeated_ms for run in runs["benchmark"])
    by_schedule = {run.data.params["schedule"]: run for run in runs["benchmark"]}
    assert by_schedule.keys() >= {"2,1", "0,0"}
    name = "cost/batch_1_context_4/decode_ms"
    assert by_schedule["2,1"].data.metrics[name] == pytest.approx(costs.costs[0].decode_ms)

    # Those of another machine are others.
    monkeypatch.setattr(benchmarking, "timing_environment", lambda: {"cpu": "another one"})
    run_benchmark(timing, context)
    found = client.search_runs(
        [str(context.tracking.open_experiment())], "tags.`iiet.kind` = 'benchmark'"
    )
    assert len(found) == 2 * 4
