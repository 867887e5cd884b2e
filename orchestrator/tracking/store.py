"""MLflow's store, and what can be done to a run in it. The only file that imports MLflow.

Each operation is a function of plain values that can be repeated without harm: that is what lets
the outbox deliver it later. Database and experiment are made once, under a file lock, because four
processes that meet a new sqlite file at the same time crash; an explicit artifact folder keeps
`./mlruns` out of the current directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.journal import read_journal
from orchestrator.tracking.identity import RunIdentity
from orchestrator.tracking.links import as_query
from orchestrator.workspace import Workspace

# MLflow reads these while it is imported or at its first request; a value that is already set wins.
QUIET_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
for _name, _value in QUIET_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402 - the environment comes first
from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

EXPERIMENT_NAME = "iiet-orch"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
KEY_TAG, KIND_TAG, OFFSET_TAG = "iiet.key", "iiet.kind", "iiet.mirrored_bytes"
PARENT_TAG = "mlflow.parentRunId"
TABLES_TAG = "mlflow.loggedArtifacts"

# Limits of MLflow 3: one request takes so many, and longer texts are refused.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
MAX_TAG_CHARACTERS = 8000
MAX_PARAM_CHARACTERS = 6000

FAILURES = (MlflowException, SQLAlchemyError, OSError)
"""What MLflow's client raises when a store cannot be reached or does not take something."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


class Store:
    """One experiment in one store; methods raise what MLflow raises (`FAILURES`)."""

    def __init__(self, workspace: Workspace) -> None:
        """Name the store; nothing is opened before `connect`."""
        self.uri = workspace.tracking_uri
        self.experiment_name = os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT_NAME
        self.experiment_id: str | None = None
        self._artifacts = workspace.artifacts
        self._lock = FileLock(str(workspace.root / ".tracking.lock"))
        self._client: MlflowClient | None = None

    @property
    def is_remote(self) -> bool:
        """Whether the store is a server, which may be away, and not a database of our own."""
        return self.uri.startswith(("http://", "https://", "databricks"))

    def connect(self) -> MlflowClient:
        """Return the client, after making database and experiment if they are missing."""
        if self._client is None:
            client = MlflowClient(tracking_uri=self.uri)
            with self._lock:
                found = client.get_experiment_by_name(self.experiment_name)
                self.experiment_id = found.experiment_id if found else self._new_experiment(client)
            self._client = client
        return self._client

    def run_id(self, identity: RunIdentity | str) -> str:
        """Return the id of the run with this identity, made if it is missing; an id stands for
        itself."""
        if isinstance(identity, str):
            return identity
        client = self.connect()
        wanted = {KEY_TAG: identity.key, KIND_TAG: identity.kind}
        if identity.parent:
            wanted[PARENT_TAG] = self.run_id(identity.parent)
        query = as_query(wanted)
        with self._lock:
            for found in client.search_runs([str(self.experiment_id)], query, max_results=1):
                return str(found.info.run_id)
            tags = wanted | {"mlflow.source.name": "iiet-orch", "mlflow.source.type": "LOCAL"}
            created = client.create_run(str(self.experiment_id), run_name=identity.name, tags=tags)
        return str(created.info.run_id)

    def perform(self, operation: str, run_id: str, arguments: Mapping[str, Any]) -> None:
        """Do one of `OPERATIONS` to a run."""
        OPERATIONS[operation](self.connect(), run_id, **arguments)

    def newest(self, kind: str, limit: int) -> list[Run]:
        """Return the newest runs of a kind, newest first."""
        client = self.connect()
        found = client.search_runs(
            [str(self.experiment_id)],
            as_query({KIND_TAG: kind}),
            max_results=limit,
            order_by=["attributes.start_time DESC"],
        )
        return list(found)

    def tag_experiment(self, name: str, value: str) -> None:
        """Set a tag of the experiment."""
        self.connect().set_experiment_tag(str(self.experiment_id), name, value)

    def _new_experiment(self, client: MlflowClient) -> str:
        location = None if self.is_remote else self._artifacts.as_uri()
        # Without the tag, MLflow opens the experiment on its pages for language-model applications.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(
            client.create_experiment(self.experiment_name, artifact_location=location, tags=tags)
        )


def is_refusal(error: Exception) -> bool:
    """Tell whether the store understood and refused, so that trying again is no use."""
    missing_file = isinstance(error, FileNotFoundError)
    return missing_file or getattr(error, "error_code", None) in _REFUSALS


def first_line(error: Exception) -> str:
    """Return the error's text, short enough for one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _describe(
    client: MlflowClient, run_id: str, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    run = client.get_run(run_id)
    if run.info.status in ("KILLED", "FAILED"):
        client.update_run(run_id, status="RUNNING")
    new = [
        Param(_legal(name), value[:MAX_PARAM_CHARACTERS])
        for name, value in params.items()
        if _legal(name) not in run.data.params
    ]
    run_tags = [RunTag(name, value[:MAX_TAG_CHARACTERS]) for name, value in tags.items()]
    client.log_batch(run_id, tags=run_tags)
    for batch in _batches(new, PARAMS_PER_BATCH):
        client.log_batch(run_id, params=batch)


def _mirror(client: MlflowClient, run_id: str, folder: str) -> None:
    offset = int(client.get_run(run_id).data.tags.get(OFFSET_TAG, 0))
    records, end = read_journal(Path(folder), offset)
    metrics = [
        Metric(_legal(name), value, record["time"], record["step"])
        for record in records
        if record.get("kind") == "metrics"
        for name, value in record["values"].items()
    ]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)
    if end != offset:
        client.set_tag(run_id, OFFSET_TAG, str(end))


def _metrics(
    client: MlflowClient, run_id: str, values: Mapping[str, float], step: int, time_ms: int
) -> None:
    metrics = [Metric(_legal(name), value, time_ms, step) for name, value in values.items()]
    for batch in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch)


def _artifact(client: MlflowClient, run_id: str, path: str, folder: str | None) -> None:
    if Path(path).is_dir():
        client.log_artifacts(run_id, path, folder)
    else:
        client.log_artifact(run_id, path, folder)


def _table(
    client: MlflowClient,
    run_id: str,
    columns: Sequence[str],
    data: Sequence[Sequence[Any]],
    name: str,
) -> None:
    # MLflow's own `log_table` appends to an older file; a report written again must replace it.
    client.log_text(run_id, json.dumps({"columns": columns, "data": data}), name)
    tables = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*tables, entry]))


def _finish(client: MlflowClient, run_id: str, status: str, time_ms: int) -> None:
    if client.get_run(run_id).info.status != status:
        client.set_terminated(run_id, status, end_time=time_ms)


OPERATIONS: dict[str, Callable[..., None]] = {
    "describe": _describe,
    "mirror": _mirror,
    "metrics": _metrics,
    "artifact": _artifact,
    "table": _table,
    "finish": _finish,
}


def _legal(name: str) -> str:
    # MLflow allows letters, digits, `_ - . : /` and space in names; lm-eval has `acc,none`.
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in name)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
