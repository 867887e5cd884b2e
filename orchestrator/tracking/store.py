"""MLflow's store: one experiment, its runs by key.

Database and experiment are made once, under a file lock, because four
processes that meet a new sqlite file at the same time crash; an explicit artifact folder keeps
`./mlruns` out of the current directory.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.tracking.client import MlflowClient, MlflowException, Run
from orchestrator.tracking.identity import RunIdentity
from orchestrator.tracking.links import tag_filter
from orchestrator.tracking.operations import OPERATIONS
from orchestrator.workspace.credentials import mask_secrets, strip_credentials
from orchestrator.workspace.folders import Workspace

EXPERIMENT_NAME = "iiet-orch"
SQLITE = "sqlite:///"
SQLITE_HEAD = b"SQLite format 3\0"
"""First bytes of every database's file that is not empty."""
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
KEY_TAG, KIND_TAG = "iiet.key", "iiet.kind"
PARENT_TAG = "mlflow.parentRunId"

FAILURES = (MlflowException, SQLAlchemyError, OSError)
"""What MLflow's client raises when a store cannot be reached or does not take something."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")


class Store:
    """One experiment in one store; methods raise what MLflow raises (`FAILURES`)."""

    def __init__(self, workspace: Workspace) -> None:
        """Name the store; nothing is opened before `connect`."""
        self.uri = workspace.tracking_uri  # May hold a password: show `public_uri` instead.
        self.experiment_name = os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT_NAME
        self.experiment_id: str | None = None
        self._artifacts = workspace.artifacts
        self._lock = FileLock(str(workspace.root / ".tracking.lock"))
        self._client: MlflowClient | None = None

    @property
    def public_uri(self) -> str:
        """The address as it may be shown: without user and password."""
        return strip_credentials(self.uri)

    @property
    def is_remote(self) -> bool:
        """Whether the store is a server, which may be away, and not a database of our own."""
        return self.uri.startswith(("http://", "https://", "databricks"))

    def connect(self) -> MlflowClient:
        """Return the client, after making database and experiment if they are missing."""
        if self._client is None:
            check_database(self.uri)
            with self._lock:
                client = MlflowClient(tracking_uri=self.uri)  # This makes the database.
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
        query = tag_filter(wanted)
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
            tag_filter({KIND_TAG: kind}),
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


def check_database(uri: str) -> None:
    """Find at once what no sqlite database can be made of; MLflow would try for two minutes.

    Raises:
        OSError: If the address names a folder, a link without an end, or a file of another kind.
    """
    path = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if not uri.startswith(SQLITE) or not path.name:
        return
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a database's file", str(path))
    with path.open("rb") as file:
        head = file.read(len(SQLITE_HEAD))
    if head and head != SQLITE_HEAD:
        raise OSError(errno.EINVAL, "it is not a database of sqlite", str(path))


def is_refusal(error: Exception) -> bool:
    """Tell whether the store understood and refused, so that trying again is no use."""
    missing_file = isinstance(error, FileNotFoundError)
    return missing_file or getattr(error, "error_code", None) in _REFUSALS


def first_line(error: Exception) -> str:
    """Return the error's text, short enough for one line and without passwords."""
    lines = mask_secrets(str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
