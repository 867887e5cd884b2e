"""There is one logged model for each key, with the metrics and data of all its runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from orchestrator.records.measurement import TrackedModel
from orchestrator.tracking import TrackedRun, Tracking, open_tracking
from orchestrator.workspace.layout import Workspace

TOKENS, TASKS = ("tokens", "0123456789abcdef"), ("held-out tasks", "fedcba9876543210")


def model_of(key: str, **datasets: tuple[str, str] | None) -> TrackedModel:
    params = {"method": "iiet", "schedule": "1,0"}
    return TrackedModel(key=key, name=f"model {key}", params=params, datasets=datasets)


def client(tracking: Tracking) -> MlflowClient:
    return tracking.store.connect()


def logged(tracking: Tracking, key: str) -> list[LoggedModel]:
    experiment = str(tracking.store.experiment_id)
    found = client(tracking).search_logged_models([experiment])
    return [model for model in found if model.tags["iiet.key"] == key]


def linked(model: LoggedModel) -> list[tuple[Any, ...]]:
    points = [(p.key, p.value, p.dataset_name, p.dataset_digest) for p in model.metrics or ()]
    return sorted(points, key=str)


def measured(tracking: Tracking, key: str, **values: float) -> TrackedRun:
    run = tracking.run(key, name=key, kind="trial")
    run.log_metrics({name.replace("_", "/", 1): value for name, value in values.items()})
    return run


def folder_of(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_model_has_the_metrics_and_data_of_all_its_runs_once(tracking: Tracking) -> None:
    first = measured(tracking, "first", quality_loss=2.5, cost_nfe=4, quality_bad=math.nan)
    second = measured(tracking, "second", quality_accuracy=0.5, cost_nfe=4)
    datasets = {"quality/loss": TOKENS, "quality/accuracy": TASKS, "cost/nfe": None}
    model = TrackedModel(
        key="shared weights", name="iiet-1.3b 1,0", params={"checkpoint": "runs/x"},
        datasets={**datasets, "quality/bad": TOKENS, "not/measured": None},
    )  # fmt: skip
    for _ in range(2):  # Publishing again adds nothing.
        for run in (first, second):
            run.log_model(model)
            run.finish()
        (found,) = logged(tracking, "shared weights")
        assert linked(found) == [
            ("cost/nfe", 4.0, None, None),
            ("cost/nfe", 4.0, None, None),
            ("quality/accuracy", 0.5, *TASKS),
            ("quality/loss", 2.5, *TOKENS),
        ]
    assert {point.run_id for point in found.metrics or ()} == {first.run_id, second.run_id}
    assert found.source_run_id == first.run_id
    assert (found.name, found.status) == ("iiet-1_3b 1,0", "READY")
    assert found.params == {"checkpoint": "runs/x"}
    for run in (first, second):
        assert run.run_id is not None
        history = client(tracking).get_metric_history(run.run_id, "cost/nfe")
        assert [point.value for point in history] == [4.0], "the run has no second point"
        outputs = client(tracking).get_run(run.run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [found.model_id]


def test_a_metric_that_is_measured_later_is_added(tracking: Tracking) -> None:
    run = measured(tracking, "later", quality_loss=2.5)
    model = model_of("later", **{"quality/loss": TOKENS, "cost/ms": None})
    run.log_model(model)
    run.log_metrics({"cost/ms": 1.5})
    run.log_model(model)
    run.finish()
    (found,) = logged(tracking, "later")
    assert linked(found) == [("cost/ms", 1.5, None, None), ("quality/loss", 2.5, *TOKENS)]


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own types while it is imported.
def test_a_model_whose_files_are_in_the_workspace_says_so(tracking: Tracking) -> None:
    run = measured(tracking, "external", cost_nfe=4)
    run.log_model(model_of("external"))
    run.finish()
    (found,) = logged(tracking, "external")
    with pytest.raises(MlflowException, match="artifacts are external"):
        mlflow.pyfunc.load_model(found.artifact_location)


def test_a_model_is_logged_once_its_server_is_back(
    workspace: Workspace, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as down:
        down.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        down.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        dead = open_tracking(workspace, warn=lambda text: None)
        run = measured(dead, "dead", quality_loss=2.5)
        run.log_model(model_of("dead", **{"quality/loss": TOKENS}))
        run.finish()
    records = tracking.outbox.records()
    assert [record["operation"] for record in records] == ["update", "update", "model", "update"]
    assert tracking.sync() == 4
    tracking.outbox.add(records)  # As if the process had been killed before it noted the delivery.
    tracking.sync()
    (found,) = logged(tracking, "dead")
    assert linked(found) == [("quality/loss", 2.5, *TOKENS)]


def test_two_processes_keep_one_model(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    run = measured(tracking, "raced", cost_nfe=4)
    assert run.run_id is not None
    store, others = client(tracking), []
    create = store.create_logged_model

    def create_after_another(*given: Any, **more: Any) -> LoggedModel:
        others.append(create(*given, **more))
        return create(*given, **more)

    monkeypatch.setattr(store, "create_logged_model", create_after_another)
    run.log_model(model_of("raced", **{"cost/nfe": None}))
    run.finish()
    assert [model.model_id for model in logged(tracking, "raced")] == [others[0].model_id]


def test_a_model_has_one_version_for_each_key_and_aliases_move(
    tracking: Tracking, tmp_path: Path
) -> None:
    run = tracking.run("models", name="m", kind="sweep")
    small, large = folder_of(tmp_path / "small", size="small"), folder_of(tmp_path / "large")
    run.register("front", small, model=model_of("s"), alias="knee", tags={"sweep": "a"})
    run.register("front", large, model=model_of("l"), alias="best", note="the full model")
    run.register("front", small, model=model_of("s"), alias="best", tags={"sweep": "a", "x": "1"})
    run.finish()
    store = client(tracking)
    assert len(store.search_model_versions("name = 'front'")) == 2
    best = store.get_model_version_by_alias("front", "best")
    assert best.version == store.get_model_version_by_alias("front", "knee").version
    assert best.tags == {"iiet.key": "s", "sweep": "a", "x": "1"}
    place = Path(best.source.removeprefix("file://"))
    assert json.loads((place / "config.json").read_text()) == {"size": "small"}


def test_registering_an_operation_of_an_older_outbox_works(
    tracking: Tracking, tmp_path: Path
) -> None:
    run = tracking.run("older", name="m", kind="sweep")
    folder = folder_of(tmp_path / "model")
    run.write("register", model="toy", key="k", folder=folder, alias="best", note="of a sweep")
    run.finish()
    version = client(tracking).get_model_version_by_alias("toy", "best")
    assert (version.run_id, version.description) == (run.run_id, "of a sweep")


@pytest.mark.parametrize("corrections", [[2, 1], None])
def test_the_signature_names_what_a_model_takes_and_returns(
    tracking: Tracking, tmp_path: Path, corrections: list[int] | None
) -> None:
    key = f"signed {corrections}"
    run = tracking.run(key, name="m", kind="sweep")
    folder = folder_of(tmp_path / "model", corrections=corrections)
    run.register("signed", folder, model=model_of(key), alias="best", example="Once")
    run.finish()
    found = client(tracking).get_model_version_by_alias("signed", "best")
    source = found.source.removeprefix("file://")
    model = mlflow.models.Model.load(source)
    params = {spec.name: spec.default for spec in model.signature.params}
    assert params["output"] == "text"
    assert {"schedule", "draft"} <= params.keys() or corrections is None
    assert not {"schedule", "draft"} & params.keys() or corrections is not None
    assert model.signature.outputs.input_names() == ["text", "logprob"]
    assert model.load_input_example(source) == ["Once"]
    assert json.loads(str(model.get_serving_input(source))) == {"inputs": ["Once"]}
    requirements = Path(source, "requirements.txt").read_text()
    assert "transformers==" in requirements
    assert "+" not in requirements
