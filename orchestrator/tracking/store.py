"""MLflow's store: one experiment, whose runs show what the workspace's files say.

The database and the experiment are created once, under a file lock: several processes that create
the same sqlite file would crash. A process searches for each run once, for a sweep's run together
with its nested runs; then it knows their content, and sends only what is new. After an error it
searches again, so publishing may stop anywhere and be repeated. Repeated points have the same
value, step and time, and MLflow stores them once.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.git_utils import get_git_commit
from sqlalchemy.exc import SQLAlchemyError

from orchestrator.records.tracked_run import RUN_ID, TrackedModel, TrackedRun, tag_filter
from orchestrator.workspace.errors import strip_credentials
from orchestrator.workspace.journal import JournalReader, JournalRecord, now_ms, read_journal
from orchestrator.workspace.layout import Workspace, portable_path
from orchestrator.workspace.locks import lock_file

EXPERIMENT_NAME = "iiet-orch"
EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
SQLITE = "sqlite:///"
SQLITE_HEAD = b"SQLite format 3\0"
"""First bytes of every sqlite file that is not empty."""
ARTIFACTS_TAG = "iiet.artifacts_in_workspace"
"""Tag of experiments whose artifacts lie in the database's workspace."""
KEY_TAG = "iiet.key"
KIND_TAG = "iiet.kind"
ROOT_TAG = "iiet.root_key"
"""Key of the sweep, for a run that is nested in one; else the run's own key."""
OFFSET_TAG = "iiet.mirrored_bytes"
"""Bytes of the journal that the run has."""
PARENT_TAG = "mlflow.parentRunId"
SOURCE_TAG = "mlflow.source.name"
COMMIT_TAG = "mlflow.source.git.commit"
REPOSITORY_TAG = "mlflow.source.git.repoURL"
COMMAND = "iiet-orch"
PROGRAMS = (f"/{COMMAND}", "/orchestrator/cli/__main__.py")
"""How the path of the running program ends if it is this command."""
MEASUREMENTS = ("evaluation", "benchmark", "influence")
"""Kinds of runs that read data to measure, not to train."""

# Limits of MLflow 3: longer texts are refused. A request takes 1,000 values, 100 of them parameters
# and 100 of them tags; the client puts more of those into further requests.
MAX_RUNS_FOUND = 50_000
METRICS_PER_REQUEST = 800
MAX_TAG_CHARACTERS = 8000
MAX_PARAM_CHARACTERS = 6000

FAILURES = (MlflowException, SQLAlchemyError, sqlite3.Error, OSError)
"""Errors of MLflow's client if a store cannot be reached or refuses a value."""
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")

T = TypeVar("T")
RunIdentity = tuple[str, str, str | None]
"""What a run is found by: its kind, its key, and its sweep's key if it is nested in one."""


class CopiedStoreError(OSError):
    """MLflow's database came with a copied or moved workspace, and names files at the old place."""


class Point(NamedTuple):
    """A metric at a step; `time_ms` says when it was measured, in ms since 1970."""

    name: str
    value: float
    step: int
    time_ms: int


CURVE_DENSITY = 100
"""Points of a curve in each doubling of the steps, about."""


class CurveReader:
    """Reads a journal from where the last call stopped; each step of a metric comes once.

    A resumed training records the steps after its checkpoint a second time, with the same values.
    MLflow is slow with many points, so a long journal is thinned out: later points are further
    apart. `last` has the last point.
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        """Start reading at byte `offset`; an earlier reader has read the bytes before it."""
        self.last: dict[str, Point] = {}
        """The last point of each metric."""
        self._shown_steps: dict[str, int] = {}
        """The last step of each metric that was returned."""
        self._journal = JournalReader(folder, offset)
        if offset:
            # Only for `last`: the run has these points already.
            self._new_points(read_journal(folder, end=offset)[0])

    @property
    def offset(self) -> int:
        """Bytes of the journal that were read."""
        return self._journal.offset

    def read(self, *, has_ended: bool) -> list[Point]:
        """Return the points since the last call; after the end of the run, including the last
        ones."""
        points = self._new_points(self._journal.read())
        if has_ended:
            for name, point in self.last.items():
                if self._shown_steps[name] < point.step:
                    self._shown_steps[name] = point.step
                    points.append(point)
        return points

    def _new_points(self, records: list[JournalRecord]) -> list[Point]:
        points = []
        for record in records:
            if record["kind"] != "metrics":
                continue
            for name, value in record["values"].items():
                last = self.last.get(name)
                if last is not None and record["step"] <= last.step:
                    continue
                point = Point(name, value, record["step"], record["time"])
                self.last[name] = point
                shown_step = self._shown_steps.get(name)
                if shown_step is None or point.step - shown_step >= shown_step // CURVE_DENSITY:
                    self._shown_steps[name] = point.step
                    points.append(point)
        return points


class FileStamp(NamedTuple):
    """A file with its time and size, which change with its content."""

    path: Path
    time_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Return the stamp of a file as it is now."""
        status = path.stat()
        return cls(path, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a run in the store lacks."""

    params: dict[str, str]
    tags: dict[str, str]
    deleted_tags: list[str]
    points: list[Point]
    data: DatasetInput | None
    """The data that it read."""
    texts: dict[str, str]
    """Path of an artifact -> its content."""
    files: dict[str, FileStamp]
    """Path of an artifact -> the file that is copied there."""
    views: dict[str, str]
    """Tags of the experiment, which hold saved chart views."""


@dataclass
class StoredRun:
    """Content of a run in the store, kept up to date by every change."""

    id: str
    experiment_id: str
    status: str
    started_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    values: dict[str, float]
    """The last value of each metric."""
    datasets: set[str]
    """Digests of the data that it read."""
    # The rest is what this process has sent; MLflow is not asked for it.
    last_points: dict[str, Point] = field(default_factory=dict)
    """The last point of each metric."""
    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileStamp] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    model: tuple[TrackedModel, dict[str, float]] | None = None
    """The logged model, and the metrics that were linked with it."""
    curves: CurveReader | None = None

    def add(self, batch: Batch) -> None:
        """Note that the store has received a batch."""
        self.params |= batch.params
        self.tags |= batch.tags
        for name in batch.deleted_tags:
            del self.tags[name]
        self.values |= {valid_name(point.name): point.value for point in batch.points}
        self.last_points |= {point.name: point for point in batch.points}
        if batch.data:
            self.datasets.add(batch.data.dataset.digest)
        self.texts |= batch.texts
        self.files |= batch.files
        self.views |= batch.views

    @classmethod
    def of(cls, run: Run) -> StoredRun:
        """Return the state of a run that MLflow returned."""
        dataset_inputs = getattr(run.inputs, "dataset_inputs", ())  # A new run has no inputs.
        return cls(
            id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            status=run.info.status,
            started_ms=run.info.start_time or 0,
            params=dict(run.data.params),
            tags=dict(run.data.tags),
            values=dict(run.data.metrics),
            datasets={dataset_input.dataset.digest for dataset_input in dataset_inputs},
        )


class Store:
    """One experiment in one store; methods raise what MLflow raises (`FAILURES`)."""

    def __init__(self, workspace: Workspace) -> None:
        """Name the store; `connect` opens it."""
        self.uri = workspace.tracking_uri  # May hold a password: show `public_uri` instead.
        self.public_uri = strip_credentials(self.uri)
        self.is_remote = self.uri.startswith(("http://", "https://", "databricks"))
        """Whether the store is a server, which may be down, and not a local database."""
        self.is_in_workspace = self.uri == f"{SQLITE}{workspace.database}"
        self.experiment_name = os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT_NAME
        self.experiment_id: str | None = None
        self._workspace = workspace
        self._client: MlflowClient | None = None
        self._runs: dict[RunIdentity, StoredRun] = {}
        """Runs that this process has searched for or created."""

    def connect(self) -> MlflowClient:
        """Return the client; create the database and the experiment if they are missing.

        Raises:
            CopiedStoreError: If the database came with a copied workspace.
        """
        if self._client is not None:
            return self._client
        _check_database(self.uri)
        with self.lock():
            client = MlflowClient(tracking_uri=self.uri)  # This creates the database.
            experiment = client.get_experiment_by_name(self.experiment_name)
            artifacts = self._workspace.artifacts.as_uri()
            if experiment is None:
                # Without the tag, MLflow opens its pages for language-model applications.
                tags = {"mlflow.experimentKind": "custom_model_development"}
                if self.is_in_workspace:
                    tags[ARTIFACTS_TAG] = "true"
                # An explicit folder keeps `./mlruns` out of the current directory.
                location = None if self.is_remote else artifacts
                self.experiment_id = str(
                    client.create_experiment(self.experiment_name, location, tags)
                )
            elif (
                self.is_in_workspace
                and ARTIFACTS_TAG in experiment.tags
                and experiment.artifact_location != artifacts
            ):
                raise CopiedStoreError(
                    "run `iiet-orch ui --sync --replace`, which makes MLflow's database anew: "
                    f"{self._workspace.database} was copied with the workspace, and names files in "
                    f"{experiment.artifact_location}; `iiet-orch ui --sync` says what people have "
                    "added there, which is lost"
                )
            else:
                self.experiment_id = experiment.experiment_id
        self._client = client
        return client

    def send(
        self,
        run: TrackedRun,
        log_model: Callable[[MlflowClient, StoredRun, TrackedRun], None] | None = None,
    ) -> None:
        """Update a run in the store to the state in the workspace; only what is new is sent.

        A RUNNING run restarts a killed or failed one; a finished one stays finished.

        Args:
            run: The run; if it is nested in a sweep, the sweep's run is in the store.
            log_model: Logs the run's model, after its metrics, to which the model is linked.
        """
        client = self.connect()
        self.prepare([run])
        stored = self._runs[run.identity]

        # The run's status, if it is withdrawn or starts again.
        if run.status == "WITHDRAWN":
            client.delete_run(stored.id)
            del self._runs[run.identity]
            return
        if run.status == "RUNNING" and stored.status in ("KILLED", "FAILED"):
            client.update_run(stored.id, status=run.status)
            stored.status = run.status

        batch = self._missing(run, stored)
        self._send_batch(batch, stored)
        stored.add(batch)

        # The model needs the metrics, which it is linked with.
        if run.model and log_model:
            model = run.model, last_values(run)
            if model != stored.model:
                with self.lock():
                    log_model(client, stored, run)
                stored.model = model

        # The end comes last: a run that is shown as finished has everything.
        if run.status not in ("RUNNING", stored.status):
            # The run of a short piece of work is created after that has ended.
            end_ms = max(time_of_values(run), stored.started_ms)
            client.set_terminated(stored.id, run.status, end_time=end_ms)
            stored.status = run.status

    def prepare(self, runs: Iterable[TrackedRun]) -> None:
        """Find the runs that this process does not know yet; create those that are missing."""
        unknown = [run for run in runs if run.identity not in self._runs]
        if not unknown:
            return
        client = self.connect()
        with self.lock():
            for root in dict.fromkeys(run.parent or run.key for run in unknown):
                keys = [run.key for run in unknown if root in (run.parent, run.key)]
                tags = {ROOT_TAG: root}
                # One search finds a sweep with all runs that are nested in it. For a run alone, and
                # for one more trial of a sweep that is known, that would be too much.
                if keys == [root] or (len(keys) == 1 and ("sweep", root, None) in self._runs):
                    tags[KEY_TAG] = keys[0]
                runs_in_store = client.search_runs(
                    [str(self.experiment_id)], tag_filter(tags), max_results=MAX_RUNS_FOUND
                )
                for stored in map(StoredRun.of, runs_in_store):
                    parent = root if PARENT_TAG in stored.tags else None
                    identity = stored.tags.get(KIND_TAG, ""), stored.tags.get(KEY_TAG, ""), parent
                    # The newest comes first, and an earlier call may know more of it.
                    self._runs.setdefault(identity, stored)
            # A sweep's run is created before those nested in it: with what the workspace says of
            # it, or, if that file is missing or damaged, with its key as its name.
            sweep_keys = dict.fromkeys(run.parent for run in unknown if run.parent)
            sweeps = [
                TrackedRun.stored(self._workspace, "sweep", key)
                or TrackedRun(key=key, kind="sweep", name=key)
                for key in sweep_keys
            ]
            for run in [*sweeps, *unknown]:
                if run.identity in self._runs:
                    continue
                tags = {KEY_TAG: run.key, KIND_TAG: run.kind, ROOT_TAG: run.parent or run.key}
                if run.parent:
                    tags[PARENT_TAG] = self._runs["sweep", run.parent, None].id
                created = client.create_run(
                    str(self.experiment_id), run.started_ms, tags | context_tags(), run.name
                )
                self._runs[run.identity] = StoredRun.of(created)

    def lock(self) -> AbstractContextManager[bool]:
        """Return the lock of the store: two processes must not create the same run or model."""
        return lock_file(self._workspace.root / ".tracking.lock")

    def known(self, identity: RunIdentity) -> StoredRun | None:
        """Return a run that this process has found or created before, without asking the store."""
        return self._runs.get(identity)

    def forget(self, run: TrackedRun) -> None:
        """Search for a run and its sweep again, because the store may have changed."""
        root = run.parent or run.key
        self._runs = {
            (kind, key, parent): stored
            for (kind, key, parent), stored in self._runs.items()
            if root not in (key, parent)
        }

    def _missing(self, run: TrackedRun, stored: StoredRun) -> Batch:
        """Return what a run lacks in the store."""
        root = self._workspace.root
        params = {
            valid_name(name): portable_path(text, root)[:MAX_PARAM_CHARACTERS]
            for name, text in run.params.items()
        }
        tags = {
            name: portable_path(text, root).replace(RUN_ID, stored.id)[:MAX_TAG_CHARACTERS]
            for name, text in run.tags.items()
        }
        # Reading a journal goes on where it stopped, so all points of its curves are new.
        if run.journal and stored.curves is None:
            stored.curves = CurveReader(Path(run.journal), int(stored.tags.get(OFFSET_TAG, 0)))
        curve_points: list[Point] = []
        if stored.curves:
            curve_points = stored.curves.read(has_ended=run.status != "RUNNING")
            tags[OFFSET_TAG] = str(stored.curves.offset)
        files = {
            f"{folder}/{file.name}": FileStamp.of(file)
            for folder, paths in run.files.items()
            for file in map(Path, paths)
            if file.is_file()
        }
        is_new_data = run.dataset is not None and run.dataset[1] not in stored.datasets
        return Batch(
            # MLflow does not change a parameter.
            params={name: text for name, text in params.items() if name not in stored.params},
            tags={name: text for name, text in _changed(tags, stored.tags).items() if text},
            deleted_tags=[name for name, text in tags.items() if not text and name in stored.tags],
            points=[*_new_points(run, stored), *curve_points],
            data=data_input(run) if is_new_data else None,
            texts=_changed(run.texts, stored.texts),
            files=_changed(files, stored.files),
            views=_changed(run.views, stored.views),
        )

    def _send_batch(self, batch: Batch, stored: StoredRun) -> None:
        """Send a batch: values in one request where they fit, then data, artifacts and views."""
        client = self.connect()
        for name in batch.deleted_tags:
            client.delete_tag(stored.id, name)
        metrics = [
            Metric(valid_name(point.name), point.value, point.time_ms, point.step)
            for point in batch.points
        ]
        # The last request has the tags: from then on, what was copied from a journal is copied.
        while len(metrics) > METRICS_PER_REQUEST:
            client.log_batch(stored.id, metrics=metrics[:METRICS_PER_REQUEST])
            metrics = metrics[METRICS_PER_REQUEST:]
        if metrics or batch.params or batch.tags:
            client.log_batch(
                stored.id,
                metrics=metrics,
                params=[Param(name, text) for name, text in batch.params.items()],
                tags=[RunTag(name, text) for name, text in batch.tags.items()],
            )
        if batch.data:
            client.log_inputs(stored.id, [batch.data])
        for artifact, text in batch.texts.items():
            client.log_text(stored.id, text, artifact)
        for artifact, file in batch.files.items():
            client.log_artifact(stored.id, str(file.path), artifact.rpartition("/")[0])
        for tag, view in batch.views.items():
            client.set_experiment_tag(stored.experiment_id, tag, view)


def _changed(wanted: Mapping[str, T], stored: Mapping[str, T]) -> dict[str, T]:
    return {name: value for name, value in wanted.items() if stored.get(name) != value}


def _new_points(run: TrackedRun, stored: StoredRun) -> list[Point]:
    """Return the points without a journal that a run lacks in the store."""
    time_ms = time_of_values(run)
    now = now_ms()
    newest_values = last_values(run)
    points = []
    for name, value, step in run.points:
        # The summary of a curve would stand before its first step.
        if stored.curves and name in stored.curves.last:
            continue
        stored_value = stored.values.get(valid_name(name))
        if _is_same(stored_value, newest_values[name]):
            continue
        # MLflow shows the newest value, so one that replaces another is measured now.
        points.append(Point(name, value, step, time_ms if stored_value is None else now))
    return points


def last_values(run: TrackedRun) -> dict[str, float]:
    """Return the last value of each metric that is in no journal."""
    return {name: value for name, value, _ in run.points}


def time_of_values(run: TrackedRun) -> int:
    """Return when the metrics that are in no journal were measured, in ms since 1970."""
    return run.ended_ms or run.started_ms


def data_input(run: TrackedRun) -> DatasetInput:
    """Return the data that a run read, as MLflow takes it."""
    assert run.dataset is not None
    name, digest, profile = run.dataset
    dataset = Dataset(name, digest, "local", source=digest, profile=json.dumps(profile))
    context = "evaluation" if run.kind in MEASUREMENTS else "training"
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


@lru_cache(maxsize=1)
def context_tags() -> dict[str, str]:
    """Return the tags of a new run that say who started it, with which command and which commit.

    The tags are those of MLflow's context providers, plugins and `MLFLOW_RUN_CONTEXT` among them.
    MLflow looks for the commit beside the program, which may lie outside the repository of the code
    that it runs; then the commit is that of this package.
    """
    tags = {name: str(value) for name, value in resolve_tags().items()}
    if Path(sys.argv[0]).as_posix().endswith(PROGRAMS):
        tags[SOURCE_TAG] = " ".join([COMMAND, *sys.argv[1:2]])
    if COMMIT_TAG not in tags and (commit := get_git_commit(__file__)):
        tags[COMMIT_TAG] = commit
    if REPOSITORY_TAG in tags:
        tags[REPOSITORY_TAG] = strip_credentials(tags[REPOSITORY_TAG])
    return tags


def valid_name(name: str) -> str:
    """Return a metric's or parameter's name as the store takes it: lm-eval has `acc,none`."""
    return "".join(c if c.isalnum() or c in "_-.:/ " else "_" for c in name)


def is_refusal(error: Exception) -> bool:
    """Return whether the store refused the request, so that a retry is useless."""
    is_missing_file = isinstance(error, FileNotFoundError)
    return is_missing_file or getattr(error, "error_code", None) in _REFUSALS


def _is_same(stored: float | None, value: float) -> bool:
    if stored is None:
        return False
    if math.isnan(value):
        return math.isnan(stored)
    largest = sys.float_info.max  # MLflow stores infinity as this.
    return stored in (value, min(max(value, -largest), largest))


def _check_database(uri: str) -> None:
    # MLflow would retry for two minutes before it fails.
    path = Path(uri.removeprefix(SQLITE).partition("?")[0])
    if uri.startswith(SQLITE) and path.name:
        with suppress(FileNotFoundError), path.open("rb") as file:
            head = file.read(len(SQLITE_HEAD))
            if head and head != SQLITE_HEAD:
                raise OSError(errno.EINVAL, "it is not a sqlite database", str(path))
