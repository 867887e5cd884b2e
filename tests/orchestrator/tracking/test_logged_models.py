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

from orchestrator.records.tracked_run import RegisteredModel, TrackedModel, TrackedRun
from orchestrator.tracking.tracker import Tracking, open_tracking

TOKENS = ("tokens", "0123456789abcdef")
TASKS = ("held-out tasks", "fedcba9876543210")


def model_of(key: str, **datasets: tuple[str, str] | None) -> TrackedModel:
    params = {"method": "iiet", "schedule": "1,0"}
    return TrackedModel(key=key, name=f"model {key}", params=params, datasets=datasets)


def client(tracking: Tracking) -> MlflowClient:
    return tracking.store.connect()


def logged(tracking: Tracking, key: str) -> list[LoggedModel]:
    experiment = str(tracking.store.experiment_id)
    models = client(tracking).search_logged_models([experiment])
    return [model for model in models if model.tags["iiet.key"] == key]


def metric_points(model: LoggedModel) -> list[tuple[Any, ...]]:
    points = [(p.key, p.value, p.dataset_name, p.dataset_digest) for p in model.metrics or ()]
    return sorted(points, key=str)


def show(tracking: Tracking, key: str, model: TrackedModel, **values: float) -> str | None:
    """Publish a run with a model, and return its id."""
    points = [(name.replace("_", "/", 1), float(value), 0) for name, value in values.items()]
    run = TrackedRun(key=key, name=key, kind="trial", points=points, model=model)
    tracking.publish(run)
    return tracking.run_id(run)


def register(
    tracking: Tracking, name: str, folder: Path, *, key: str, alias: str, **details: Any
) -> None:
    run = TrackedRun(key="models", name="m", kind="sweep")
    tracking.publish(run)
    tracking.register(
        RegisteredModel(
            name=name,
            alias=alias,
            run=run.identity,
            model=model_of(key),
            folder=str(folder),
            **details,
        )
    )


def folder_of(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_model_has_the_metrics_and_data_of_all_its_runs_once(tracking, workspace):
    datasets = {"quality/loss": TOKENS, "quality/accuracy": TASKS, "cost/nfe": None}
    model = TrackedModel(
        key="shared weights", name="iiet-1.3b 1,0", params={"checkpoint": "runs/x"},
        datasets={**datasets, "quality/bad": TOKENS, "not/measured": None},
    )  # fmt: skip
    for tracker in (tracking, tracking, open_tracking(workspace, warn=pytest.fail)):
        first = show(tracker, "first", model, quality_loss=2.5, cost_nfe=4, quality_bad=math.nan)
        second = show(tracker, "second", model, quality_accuracy=0.5, cost_nfe=4)
        (logged_model,) = logged(tracking, "shared weights")
        assert metric_points(logged_model) == [
            ("cost/nfe", 4.0, None, None),
            ("cost/nfe", 4.0, None, None),
            ("quality/accuracy", 0.5, *TASKS),
            ("quality/loss", 2.5, *TOKENS),
        ]
    assert {point.run_id for point in logged_model.metrics or ()} == {first, second}
    assert logged_model.source_run_id == first
    assert (logged_model.name, logged_model.status) == ("iiet-1_3b 1,0", "READY")
    assert logged_model.params == {"checkpoint": "runs/x"}
    for run_id in (first, second):
        assert run_id is not None
        history = client(tracking).get_metric_history(run_id, "cost/nfe")
        assert [point.value for point in history] == [4.0], "the run has no second point"
        outputs = client(tracking).get_run(run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [logged_model.model_id]


def test_the_source_of_a_sweeps_model_is_its_training_though_it_was_measured_before(tracking):
    model = model_of("of a sweep", **{"quality/accuracy": TASKS})
    measured = model.model_copy(update={"is_of_sweep": True})
    show(tracking, "evaluation", measured, quality_accuracy=0.5)
    assert logged(tracking, "of a sweep") == []
    trained = show(tracking, "training", model, quality_accuracy=0.4)
    again = show(tracking, "evaluation", measured, quality_accuracy=0.6)
    (logged_model,) = logged(tracking, "of a sweep")
    assert logged_model.source_run_id == trained
    assert {point.run_id for point in logged_model.metrics or ()} == {trained, again}


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own types while it is imported.
def test_what_is_measured_later_or_again_is_added_to_a_model_in_the_workspace(tracking):
    model = model_of("later", **{"quality/loss": TOKENS, "cost/ms": None})
    show(tracking, "later", model, quality_loss=2.5)
    show(tracking, "later", model, quality_loss=2.5, cost_ms=1.5)
    (logged_model,) = logged(tracking, "later")
    assert metric_points(logged_model) == [
        ("cost/ms", 1.5, None, None),
        ("quality/loss", 2.5, *TOKENS),
    ]
    run_id = show(tracking, "later", model, quality_loss=2.0, cost_ms=1.5)
    assert run_id is not None
    (logged_model,) = logged(tracking, "later")
    assert ("quality/loss", 2.0, *TOKENS) in metric_points(logged_model)
    assert client(tracking).get_run(run_id).data.metrics["quality/loss"] == 2.0
    history = client(tracking).get_metric_history(run_id, "quality/loss")
    assert [point.value for point in history] == [2.5, 2.0]
    with pytest.raises(MlflowException, match="artifacts are external"):
        mlflow.pyfunc.load_model(logged_model.artifact_location)


def test_a_model_has_one_version_for_each_key_and_aliases_move(tracking, tmp_path):
    small = folder_of(tmp_path / "small", size="small")
    large = folder_of(tmp_path / "large")
    register(tracking, "front", small, key="s", alias="knee", tags={"sweep": "a"})
    register(tracking, "front", large, key="l", alias="best", note="the full model")
    register(tracking, "front", small, key="s", alias="best", tags={"sweep": "a", "x": "1"})
    store = client(tracking)
    assert len(store.search_model_versions("name = 'front'")) == 2
    best = store.get_model_version_by_alias("front", "best")
    assert best.version == store.get_model_version_by_alias("front", "knee").version
    assert best.tags == {"iiet.key": "s", "sweep": "a", "x": "1"}
    place = Path(best.source.removeprefix("file://"))
    assert json.loads((place / "config.json").read_text()) == {"size": "small"}


def test_what_is_registered_is_the_folder_as_it_is_and_none_of_its_code_runs(tracking, tmp_path):
    folder = folder_of(tmp_path / "exported", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    register(tracking, "stored", folder, key="own code", alias="best")
    source = client(tracking).get_model_version_by_alias("stored", "best").source
    place = Path(source.removeprefix("file://"))
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert files == {"config.json", "code.py", "MLmodel"}
    assert not (tmp_path / "ran").exists()
    assert "isExternal" not in (place / "MLmodel").read_text(), "MLflow itself holds the files"
