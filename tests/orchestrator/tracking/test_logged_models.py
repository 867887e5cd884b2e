"""There is one logged model for each key, with the metrics and data of all its runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from transformers import PreTrainedTokenizerFast

from orchestrator.data.depth import symbol_tokenizer
from orchestrator.models.tokenizer import END_OF_TEXT
from orchestrator.records.tracked_run import RegisteredModel, TrackedModel, TrackedRun
from orchestrator.tracking import served_model
from orchestrator.tracking.tracker import Tracking, open_tracking

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


def show(tracking: Tracking, key: str, model: TrackedModel, **values: float) -> str | None:
    """Publish a run with a model, and return its id."""
    points = [(name.replace("_", "/", 1), float(value), 0) for name, value in values.items()]
    run = TrackedRun(key=key, name=key, kind="trial", points=points, model=model)
    tracking.publish(run)
    return tracking.run_id(run)


def register(
    tracking: Tracking, name: str, folder: Path, *, key: str, alias: str, **more: Any
) -> None:
    run = TrackedRun(key="models", name="m", kind="sweep")
    tracking.publish(run)
    tracking.register(
        RegisteredModel(
            name=name, alias=alias, run=run.place, model=model_of(key), folder=str(folder), **more
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
    for again in (tracking, tracking, open_tracking(workspace, warn=pytest.fail)):
        first = show(again, "first", model, quality_loss=2.5, cost_nfe=4, quality_bad=math.nan)
        second = show(again, "second", model, quality_accuracy=0.5, cost_nfe=4)
        (found,) = logged(tracking, "shared weights")
        assert linked(found) == [
            ("cost/nfe", 4.0, None, None),
            ("cost/nfe", 4.0, None, None),
            ("quality/accuracy", 0.5, *TASKS),
            ("quality/loss", 2.5, *TOKENS),
        ]
    assert {point.run_id for point in found.metrics or ()} == {first, second}
    assert found.source_run_id == first
    assert (found.name, found.status) == ("iiet-1_3b 1,0", "READY")
    assert found.params == {"checkpoint": "runs/x"}
    for run_id in (first, second):
        assert run_id is not None
        history = client(tracking).get_metric_history(run_id, "cost/nfe")
        assert [point.value for point in history] == [4.0], "the run has no second point"
        outputs = client(tracking).get_run(run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [found.model_id]


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own types while it is imported.
def test_what_is_measured_later_or_again_is_added_to_a_model_in_the_workspace(tracking):
    model = model_of("later", **{"quality/loss": TOKENS, "cost/ms": None})
    show(tracking, "later", model, quality_loss=2.5)
    show(tracking, "later", model, quality_loss=2.5, cost_ms=1.5)
    (found,) = logged(tracking, "later")
    assert linked(found) == [("cost/ms", 1.5, None, None), ("quality/loss", 2.5, *TOKENS)]
    run_id = show(tracking, "later", model, quality_loss=2.0, cost_ms=1.5)
    assert run_id is not None
    (found,) = logged(tracking, "later")
    assert ("quality/loss", 2.0, *TOKENS) in linked(found)
    assert client(tracking).get_run(run_id).data.metrics["quality/loss"] == 2.0
    history = client(tracking).get_metric_history(run_id, "quality/loss")
    assert [point.value for point in history] == [2.5, 2.0]
    with pytest.raises(MlflowException, match="artifacts are external"):
        mlflow.pyfunc.load_model(found.artifact_location)


def test_a_model_has_one_version_for_each_key_and_aliases_move(tracking, tmp_path):
    small, large = folder_of(tmp_path / "small", size="small"), folder_of(tmp_path / "large")
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


def test_the_signature_names_what_a_model_takes_and_returns(tracking, tmp_path):
    for key, corrections in (("iiet", [2, 1]), ("vanilla", None)):
        folder = folder_of(tmp_path / key, corrections=corrections)
        register(tracking, "signed", folder, key=key, alias="best", example="Once")
        found = client(tracking).get_model_version_by_alias("signed", "best")
        source = found.source.removeprefix("file://")
        model = mlflow.models.Model.load(source)
        params = {spec.name: spec.default for spec in model.signature.params}
        assert params["output"] == "text"
        assert sum(name in params for name in ("schedule", "draft")) == (2 if corrections else 0)
        assert model.signature.outputs.input_names() == ["text", "logprob"]
        assert model.load_input_example(source) == ["Once"]
        assert json.loads(str(model.get_serving_input(source))) == {"inputs": ["Once"]}
    requirements = Path(source, "requirements.txt").read_text()
    assert "transformers==" in requirements
    assert "+" not in requirements


CONSTANT = """
import pandas

class Model:
    def predict(self, model_input, params=None):
        return pandas.DataFrame({{"text": [{answer!r}] * len(model_input)}})

def _load_pyfunc(data_path):
    return Model()
"""


@pytest.mark.filterwarnings("ignore")  # MLflow warns of its own types while it is imported.
def test_two_models_in_one_process_share_no_module(tracking, tmp_path, monkeypatch):
    """They may have been registered by two versions of this package."""
    sources = []
    for answer in ("old", "new"):
        loader = tmp_path / f"{answer}.py"
        loader.write_text(CONSTANT.format(answer=answer))
        monkeypatch.setattr(served_model, "__file__", str(loader))
        register(tracking, answer, folder_of(tmp_path / answer), key=answer, alias="best")
        sources.append(client(tracking).get_model_version_by_alias(answer, "best").source)
    monkeypatch.setattr("sys.path", list(sys.path))
    loaded = [mlflow.pyfunc.load_model(source) for source in sources]
    answers = [model.predict(["a"], params={})["text"][0] for model in loaded]
    assert answers == ["old", "new"]


def test_a_text_outside_the_vocabulary_is_one_sentence():
    """Such as one for a model of a depth task, whose tokenizer knows its symbols only."""
    symbols = symbol_tokenizer(["s1 ", "s2 ", "s3 "])
    model = object.__new__(served_model.TextModel)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=symbols, eos_token=END_OF_TEXT)
    model.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=8))
    with pytest.raises(MlflowException) as caught:
        model.predict(["Once upon a time"], params={"output": "logprob"})
    assert str(caught.value) == (
        "the model's vocabulary has no tokens for 'Once upon a time'; it has 4 tokens, "
        "such as 's1 ', 's2 ', 's3 '"
    )
