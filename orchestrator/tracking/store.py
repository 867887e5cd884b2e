"""MLflow's store: one experiment and its runs, found by their identity.

The database and the experiment are created once, under a file lock: several processes that create
the same sqlite file crash. Each run is searched for once in a process, a sweep's run together with
those nested in it; then the process knows what the run holds, and sends only what is new.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.tracking.client import Metric, MlflowClient, MlflowException, Run
from orchestrator.tracking.context_tags import context_tags
from orchestrator.tracking.relocation import ARTIFACTS_TAG, relocate_artifacts
from orchestrator.workspace.errors import strip_credentials
from orchestrator.workspace.layout import Workspace
from orchestrator.workspace.locks import lock_file

EXPERIMENT_NAME = "iiet-orch"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
SQLITE = "sqlite:///"
SQLITE_HEAD = b"SQLite format 3\0"
"""First bytes of every sqlite file that is not empty."""
KEY_TAG, KIND_TAG = "iiet.key", "iiet.kind"
ROOT_TAG = "iiet.root_key"
"""Key of the sweep, for a run that is nested in one; else the run's own key."""
PARENT_TAG = "mlflow.parentRunId"
REASON_TAG = "iiet.reason"
"""Tag that says why a run ended without a result."""
NOTE_TAG = "mlflow.note.content"
"""Tag with the description at the top of a page, in Markdown."""
MAX_RUNS_FOUND = 50_000  # MLflow's own limit.

FAILURES = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
"""Errors of MLflow's client if a store cannot be reached or refuses a value."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


class RunIdentity(BaseModel):
    """The values that a run is found by; the outbox stores them for runs that do not exist yet.

    A trial of two sweeps has one key and two runs, one under each parent.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    """Content key, or the name of a sweep."""
    kind: str
    """The tag `iiet.kind`: pretrain, influence, sweep, trial, teacher, baseline."""
    name: str
    """Name in the user interface; not used to find the run."""
    parent: RunIdentity | None = None
    started_ms: int | None = None
    """When it started, in ms; now when unset. Only used to create the run."""

    @property
    def root_key(self) -> str:
        """The tag `iiet.root_key`."""
        return self.parent.root_key if self.parent else self.key


@dataclass
class StoredRun:
    """What a run in the store holds; whoever changes the run also changes this."""

    id: str
    experiment_id: str
    artifact_uri: str
    status: str
    started_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, Metric]
    """The last point of each."""
    datasets: set[str]
    """Digests of the data that it read."""

    @classmethod
    def of(cls, run: Run) -> StoredRun:
        """Return the state of a run that MLflow returned."""
        return cls(
            id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            artifact_uri=run.info.artifact_uri,
            status=run.info.status,
            started_ms=run.info.start_time or 0,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            metrics={point.key: point for point in run.data._metric_objs},
            datasets={each.dataset.digest for each in getattr(run.inputs, "dataset_inputs", ())},
        )


class Store:
    """One experiment in one store; methods raise what MLflow raises (`FAILURES`)."""

    def __init__(self, workspace: Workspace) -> None:
        """Name the store; `connect` opens it."""
        self.uri = workspace.tracking_uri  # May hold a password: show `public_uri` instead.
        self.experiment_name = os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT_NAME
        self.experiment_id: str | None = None
        self._workspace = workspace
        self._lock = workspace.root / ".tracking.lock"
        self._client: MlflowClient | None = None
        # By kind, key and id of the parent.
        self._runs: dict[tuple[str, str, str | None], StoredRun] = {}
        self._searched: set[str] = set()  # root keys

    @property
    def public_uri(self) -> str:
        """The address without user and password."""
        return strip_credentials(self.uri)

    @property
    def is_remote(self) -> bool:
        """Whether the store is a server, which may be down, and not a local database."""
        return self.uri.startswith(("http://", "https://", "databricks"))

    @property
    def _is_in_workspace(self) -> bool:
        return self.uri == f"{SQLITE}{self._workspace.database}"

    def connect(self) -> MlflowClient:
        """Return the client; create the database and the experiment if they are missing."""
        if self._client is None:
            _check_database(self.uri)
            with lock_file(self._lock):
                if self._is_in_workspace:
                    relocate_artifacts(self._workspace.database, self._workspace.artifacts)
                client = MlflowClient(tracking_uri=self.uri)  # This creates the database.
                found = client.get_experiment_by_name(self.experiment_name)
                self.experiment_id = (
                    found.experiment_id if found else self._create_experiment(client)
                )
            self._client = client
        return self._client

    def prepare(self, identities: Iterable[RunIdentity]) -> None:
        """Find the runs that this process does not know yet; create those that are missing."""
        unknown = [identity for identity in identities if self.known(identity) is None]
        if not unknown:
            return
        client = self.connect()
        with lock_file(self._lock):  # Two processes must not create the same run.
            for root in dict.fromkeys(identity.root_key for identity in unknown):
                self._search(client, root, [i.key for i in unknown if i.root_key == root])
            for identity in unknown:
                self._find_or_create(client, identity)

    def run(self, identity: RunIdentity) -> StoredRun:
        """Return the run with this identity; create it if it is missing."""
        self.prepare([identity])
        run = self.known(identity)
        assert run is not None
        return run

    def known(self, identity: RunIdentity) -> StoredRun | None:
        """Return a run that this process has found or created before, without asking the store."""
        parent = self.known(identity.parent) if identity.parent else None
        if identity.parent and not parent:
            return None
        return self._runs.get((identity.kind, identity.key, parent.id if parent else None))

    def forget(self, identity: RunIdentity) -> None:
        """Search for a run again, because the store may have changed."""
        forgotten = self.known(identity)
        self._runs = {place: run for place, run in self._runs.items() if run is not forgotten}

    def newest(self, kind: str, limit: int) -> list[Run]:
        """Return the newest runs of a kind, newest first."""
        runs = self.connect().search_runs(
            [str(self.experiment_id)],
            tag_filter({KIND_TAG: kind}),
            max_results=limit,
            order_by=["attributes.start_time DESC"],
        )
        return list(runs)

    def _search(self, client: MlflowClient, root_key: str, keys: Sequence[str]) -> None:
        """Search for a run with those nested in it; later on, for the runs with these keys."""
        wanted = {ROOT_TAG: root_key}
        if root_key in self._searched and len(keys) == 1:
            wanted[KEY_TAG] = keys[0]
        self._searched.add(root_key)
        for run in client.search_runs(
            [str(self.experiment_id)], tag_filter(wanted), max_results=MAX_RUNS_FOUND
        ):
            found = StoredRun.of(run)
            tags = found.tags
            place = (tags.get(KIND_TAG, ""), tags.get(KEY_TAG, ""), tags.get(PARENT_TAG))
            self._runs.setdefault(place, found)

    def _find_or_create(self, client: MlflowClient, identity: RunIdentity) -> StoredRun:
        parent = self._find_or_create(client, identity.parent) if identity.parent else None
        if found := self.known(identity):
            return found
        tags = {KEY_TAG: identity.key, KIND_TAG: identity.kind, ROOT_TAG: identity.root_key}
        tags |= context_tags()
        if parent:
            tags[PARENT_TAG] = parent.id
        created = client.create_run(
            str(self.experiment_id), identity.started_ms, tags, run_name=identity.name
        )
        run = StoredRun.of(created)
        self._runs[identity.kind, identity.key, parent.id if parent else None] = run
        return run

    def _create_experiment(self, client: MlflowClient) -> str:
        # An explicit artifact folder keeps `./mlruns` out of the current directory.
        location = None if self.is_remote else self._workspace.artifacts.as_uri()
        # Without the tag, MLflow opens the experiment on its pages for language-model applications.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        if self._is_in_workspace:
            tags[ARTIFACTS_TAG] = "true"
        return str(
            client.create_experiment(self.experiment_name, artifact_location=location, tags=tags)
        )


def tag_filter(tags: Mapping[str, str]) -> str:
    """Return a search expression for runs with all of the tags."""
    quoted = {name: f'"{value}"' if "'" in value else f"'{value}'" for name, value in tags.items()}
    return " and ".join(f"tags.`{name}` = {value}" for name, value in quoted.items())


def valid_name(name: str) -> str:
    """Return a metric's or parameter's name as the store takes it: lm-eval has `acc,none`."""
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in name)


def _check_database(uri: str) -> None:
    # MLflow would retry for two minutes before it fails.
    path = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if not uri.startswith(SQLITE) or not path.name:
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a database file", str(path))
    with path.open("rb") as file:
        head = file.read(len(SQLITE_HEAD))
    if head and head != SQLITE_HEAD:
        raise OSError(errno.EINVAL, "it is not a sqlite database", str(path))


def is_refusal(error: Exception) -> bool:
    """Return whether the store refused the request, so that a retry is useless."""
    missing_file = isinstance(error, FileNotFoundError)
    return missing_file or getattr(error, "error_code", None) in _REFUSALS
