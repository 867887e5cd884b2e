"""Operations on one run, which the outbox may deliver later, or twice after a crash."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.tracking.client import Dataset, DatasetInput, Metric, MlflowClient, Param, RunTag
from orchestrator.tracking.flavor import write_flavor
from orchestrator.workspace.journal import read_journal

OFFSET_TAG = "iiet.mirrored_bytes"
TABLES_TAG = "mlflow.loggedArtifacts"
VERSION_TAG = "iiet.key"
MODEL_FOLDER = "model"

# Limits of MLflow 3: larger requests and longer texts are refused.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
MAX_TAG_CHARACTERS = 8000
MAX_PARAM_CHARACTERS = 6000


def _describe(
    client: MlflowClient, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    run = client.get_run(run_id)
    if run.info.status in ("KILLED", "FAILED"):
        client.update_run(run_id, status="RUNNING")
    new = [
        Param(_valid_name(name), value[:MAX_PARAM_CHARACTERS])
        for name, value in params.items()
        if _valid_name(name) not in run.data.params
    ]
    run_tags = [RunTag(name, value[:MAX_TAG_CHARACTERS]) for name, value in tags.items()]
    client.log_batch(run_id, tags=run_tags)
    for batch in _batches(new, PARAMS_PER_BATCH):
        client.log_batch(run_id, params=batch)


def _log_journal(client: MlflowClient, run_id: str, folder: str) -> None:
    offset = int(client.get_run(run_id).data.tags.get(OFFSET_TAG, 0))
    records, end = read_journal(Path(folder), offset)
    metrics = [
        Metric(_valid_name(name), value, record["time"], record["step"])
        for record in records
        if record.get("kind") == "metrics"
        for name, value in record["values"].items()
    ]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)
    if end != offset:
        client.set_tag(run_id, OFFSET_TAG, str(end))


def _log_metrics(
    client: MlflowClient, run_id: str, values: Mapping[str, float], step: int, time_ms: int
) -> None:
    # MLflow adds a point even if step and value equal those of the last one.
    last = {point.key: point for point in client.get_run(run_id).data._metric_objs}

    def is_stored(name: str, value: float) -> bool:
        point = last.get(name)
        if point is not None and point.step != step:
            # The run holds only the last point of a curve; this step may be an earlier one.
            history = client.get_metric_history(run_id, name)
            same_step = [earlier for earlier in history if earlier.step == step]
            point = max(same_step, key=lambda earlier: earlier.timestamp, default=None)
        return point is not None and _is_same(point.value, value)

    named = {_valid_name(name): value for name, value in values.items()}
    metrics = [
        Metric(name, value, time_ms, step)
        for name, value in named.items()
        if not is_stored(name, value)
    ]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _is_same(stored: float, value: float) -> bool:
    if math.isnan(value):
        return math.isnan(stored)
    largest = sys.float_info.max  # MLflow stores infinity as this.
    return stored in (value, min(max(value, -largest), largest))


def _log_artifact(client: MlflowClient, run_id: str, path: str, folder: str | None) -> None:
    if Path(path).is_dir():
        client.log_artifacts(run_id, path, folder)
    else:
        client.log_artifact(run_id, path, folder)


def _log_table(
    client: MlflowClient,
    run_id: str,
    columns: Sequence[str],
    data: Sequence[Sequence[Any]],
    name: str,
) -> None:
    # MLflow's own `log_table` appends to an existing table; a new report must replace it.
    client.log_text(run_id, json.dumps({"columns": columns, "data": data}), name)
    tables = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*tables, entry]))


def _log_dataset(client: MlflowClient, run_id: str, name: str, digest: str, profile: str) -> None:
    dataset = Dataset(name=name, digest=digest, source_type="local", source=digest, profile=profile)
    client.log_inputs(run_id, datasets=[DatasetInput(dataset=dataset, tags=[])])


def _register(
    client: MlflowClient, run_id: str, model: str, key: str, folder: str, alias: str, note: str
) -> None:
    if not client.search_registered_models(f"name = '{model}'"):
        client.create_registered_model(model)
    versions = client.search_model_versions(f"name = '{model}'")
    same = [v for v in versions if v.tags.get(VERSION_TAG) == key and v.run_id == run_id]
    path = f"{MODEL_FOLDER}-{key}"
    if not same:
        client.log_artifacts(run_id, folder, path)
        with TemporaryDirectory() as flavor:
            write_flavor(Path(flavor))
            client.log_artifacts(run_id, flavor, path)
        source = f"{client.get_run(run_id).info.artifact_uri}/{path}"
        same = [
            client.create_model_version(
                model, source, run_id, tags={VERSION_TAG: key}, description=note
            )
        ]
    client.set_registered_model_alias(model, alias, same[0].version)


def _finish(client: MlflowClient, run_id: str, status: str, time_ms: int) -> None:
    if client.get_run(run_id).info.status != status:
        client.set_terminated(run_id, status, end_time=time_ms)


# Outboxes on disk contain these names.
OPERATIONS: dict[str, Callable[..., None]] = {
    "describe": _describe,
    "mirror": _log_journal,
    "metrics": _log_metrics,
    "artifact": _log_artifact,
    "table": _log_table,
    "dataset": _log_dataset,
    "register": _register,
    "finish": _finish,
}


def _valid_name(name: str) -> str:
    # MLflow allows letters, digits, `_ - . : /` and space in names; lm-eval has `acc,none`.
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in name)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
