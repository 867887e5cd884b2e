"""Tracking as the pipelines use it: publish runs, find what is stored, links, chart views.

`Tracking.publish` writes a run as a file of the workspace, then puts it into the queue of the
`Publisher`. Its thread calls `Tracking.show_in_mlflow`, which lets `Store.send` bring MLflow's run
up to date. So training never waits. A server that does not answer costs one warning; when it is
back, or by `ui --sync`, it gets what the files say then.

MLflow's fluent API and Ray's callback would raise errors into training, block for minutes, and
create a second run for every resumed trial.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from orchestrator.records.tracked_run import (
    NOTE_TAG,
    REPORT_TAG,
    RUN_ID,
    VIEW_TAG,
    RegisteredModel,
    TrackedRun,
    tag_filter,
)
from orchestrator.tracking import models
from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.store import (
    FAILURES,
    KEY_TAG,
    KIND_TAG,
    MAX_RUNS_FOUND,
    MAX_TAG_CHARACTERS,
    PARENT_TAG,
    ROOT_TAG,
    CopiedStoreError,
    RunIdentity,
    Store,
    is_refusal,
)
from orchestrator.workspace.errors import UserError, first_line, is_disk_full
from orchestrator.workspace.layout import Workspace

SECONDS_BETWEEN_COPIES = 4.0
"""Running runs are published again after so long, with what their journals have gained."""


class Publisher:
    """A queue of runs, and the background thread that shows them in order."""

    def __init__(self, show: Callable[[Sequence[TrackedRun]], Iterable[bool]]) -> None:
        """Begin with an empty queue.

        Args:
            show: Shows runs, and yields after each whether it need not be tried again.
        """
        self._show = show
        self._waiting: dict[RunIdentity, TrackedRun] = {}
        """Runs to publish, in their last state: new ones, and those to be tried again."""
        self._running: dict[RunIdentity, TrackedRun] = {}
        """Runs whose work goes on."""
        self._has_new = False
        self._is_busy = False
        self._num_published = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def enqueue(self, *runs: TrackedRun) -> None:
        """Show runs soon, the run of a sweep before those of its trials; returns at once."""
        with self._changed:
            for run in runs:
                self._waiting[run.identity] = run
                self._running.pop(run.identity, None)
                if run.status == "RUNNING":
                    self._running[run.identity] = run
            self._has_new = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float, *, in_all: bool = False) -> bool:
        """Return whether everything in the queue was tried.

        Args:
            seconds: Longest wait for the next run to be shown.
            in_all: Whether this is the longest wait for the whole queue.

        Raises:
            BaseException: What `show` raised.
        """
        while True:
            num_before = self._num_published
            with self._changed:
                is_over = self._changed.wait_for(
                    lambda: not (self._has_new or self._is_busy), seconds
                )
            # While runs are published, however slowly, the wait begins again.
            if is_over or in_all or self._num_published == num_before:
                break
        with self._changed:
            error = self._error
            self._error = None
        if error:
            raise error
        return is_over

    def _work(self) -> None:
        copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_new, max(0, copy_at - time.monotonic()))
                batch = self._waiting
                self._waiting = {}
                if time.monotonic() >= copy_at:
                    batch = {**self._running, **batch}
                    copy_at = time.monotonic() + SECONDS_BETWEEN_COPIES
                self._has_new = False
                self._is_busy = True
            # The lock is free here: publishing may take minutes, and `enqueue` must return at once.
            unpublished: dict[RunIdentity, TrackedRun] = {}
            try:
                runs = list(batch.values())
                for run, is_done in zip(runs, self._show(runs), strict=True):
                    self._num_published += is_done
                    if not is_done:
                        unpublished[run.identity] = run
            except BaseException as error:  # Raised by `wait`, in the thread that waits.
                self._error = error
            with self._changed:
                # What was enqueued meanwhile is newer, so it replaces what is tried again.
                self._waiting = {**unpublished, **self._waiting}
                self._is_busy = self._has_new
                self._changed.notify_all()
                if not (self._waiting or self._running):
                    self._thread = None
                    return


FIRST_PAUSE_SECONDS = 30.0
"""Time without attempts after a failure of the store; each further failure doubles it."""
MAX_PAUSE_SECONDS = 600.0
MAX_WAIT_SECONDS = 60.0
"""Longest wait at the end of a command for a store that publishes nothing."""
SHORT_WAIT_SECONDS = 2.0
"""Longest wait if the store failed last time, or the caller is in a hurry."""
PROGRAM_PREFIXES = ("iiet.", "mlflow.")
"""Begin the names of tags that this program or MLflow writes; people write the others."""

Warn = Callable[[str], None]


class Tracking:
    """One experiment. Only `wait` and what returns something wait for the store."""

    def __init__(self, workspace: Workspace, *, warn: Warn | None = None) -> None:
        """Name the store; `open_tracking` also connects.

        Args:
            warn: Called once when the store stops responding, and for what it refuses (default: a
                log message).
        """
        self.store = Store(workspace)
        self._workspace = workspace
        self._warn = warn or logging.getLogger(__name__).warning
        self._publisher = Publisher(self.show_in_mlflow)
        self._pause_seconds = 0.0
        """Length of the last pause; 0 once the store has responded again."""
        self._paused_until = 0.0
        self._has_warned_of_files = False
        self.copied: CopiedStoreError | None = None
        """Why the workspace's database shows nothing new, if it was copied."""

    def publish(self, *runs: TrackedRun) -> None:
        """Store runs in the workspace, and show them in MLflow soon; returns at once."""
        try:
            if self._workspace.is_writable:
                for run in runs:
                    run.write(run.path(self._workspace))
        except OSError as error:
            if not self._has_warned_of_files:
                self._warn(
                    f"cannot store what MLflow shows in {self._workspace.tracked} ({error}); the "
                    "work continues, and running the same command again stores it"
                )
            self._has_warned_of_files = True
        if self.copied and not self._pause_seconds:
            self._pause_seconds = MAX_PAUSE_SECONDS
            self._warn(str(self.copied))
        self._publisher.enqueue(*runs)

    def withdraw(self, kind: str, key: str) -> None:
        """Show a run no more, if the workspace holds one: another run shows the same."""
        if run := self.stored(kind, key):
            run.path(self._workspace).unlink(missing_ok=True)
            self._publisher.enqueue(run.changed(status="WITHDRAWN"))

    def stored(self, kind: str, key: str, parent: str | None = None) -> TrackedRun | None:
        """Return a run as the workspace holds it; None if it holds none, or a damaged one."""
        return TrackedRun.stored(self._workspace, kind, key, parent)

    def show_in_mlflow(self, runs: Sequence[TrackedRun]) -> Iterator[bool]:
        """Show runs in MLflow; yields after each whether it is shown, or refused for good."""
        if not self.is_store_down:
            try:
                self.store.prepare(runs)  # All with one search.
            except FAILURES as error:
                if not is_refusal(error):  # Else each run reports it.
                    self.pause(error)
        for run in runs:
            yield self._show_run(run)

    def _show_run(self, run: TrackedRun) -> bool:
        if self.is_store_down:
            return False
        try:
            try:
                self.store.send(run, models.log_model)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                self.store.forget(run)  # It may have been changed or deleted by others.
                self.store.send(run, models.log_model)
        except FAILURES as error:
            self.store.forget(run)
            if not is_refusal(error):
                self.pause(error)
                return False
            self._warn(f"MLflow refused {run.kind} {run.name}: {first_line(error)[:200]}")
        self._pause_seconds = 0.0
        return True

    def register(self, model: RegisteredModel, *, moves_alias: bool = True) -> bool:
        """Store an exported model as a version of a registered one; its run is published before.

        Args:
            moves_alias: Whether an alias that another version has moves to this one.

        Returns:
            Whether the store has it now.
        """
        if moves_alias:
            model.write(model.path(self._workspace))
        self.wait()
        if self.is_store_down or (run := self.store.known(model.run)) is None:
            return False
        try:
            with self.store.lock():
                models.register(self.store.connect(), run, model, moves_alias=moves_alias)
        except FAILURES as error:
            if not is_refusal(error):
                self.pause(error)
                return False
            self._warn(f"MLflow refused {model.name}@{model.alias}: {first_line(error)[:200]}")
            return False
        return True

    def wait(self, *, briefly: bool = False) -> None:
        """Wait until the store has everything, as long as it responds; or for two seconds."""
        has_failed = self._pause_seconds > 0
        seconds = SHORT_WAIT_SECONDS if briefly or has_failed else MAX_WAIT_SECONDS
        is_over = False
        try:
            is_over = self._publisher.wait(seconds, in_all=briefly)
        finally:
            if not is_over:  # Also after Ctrl-C.
                self.pause(TimeoutError("no answer yet"))

    def run_id(self, run: TrackedRun) -> str | None:
        """Return MLflow's id of a published run; None if the store does not respond."""
        self.wait()
        stored = self.store.known(run.identity)
        return stored.id if stored else None

    @property
    def is_store_down(self) -> bool:
        """Whether the store failed a moment ago, so that there are no attempts for now."""
        return time.monotonic() < self._paused_until

    def pause(self, error: Exception) -> None:
        """Make no attempts for a while; warn the first time."""
        if isinstance(error, CopiedStoreError):
            self.copied = error  # `publish` warns of it.
            self._paused_until = math.inf
            return
        if not self._pause_seconds:
            self._warn(
                f"MLflow at {self.store.public_uri} does not respond ({first_line(error)[:200]}); "
                "training continues, and `iiet-orch ui --sync` publishes what is missing later"
            )
        self._pause_seconds = min(
            max(2 * self._pause_seconds, FIRST_PAUSE_SECONDS), MAX_PAUSE_SECONDS
        )
        self._paused_until = time.monotonic() + self._pause_seconds

    def open_experiment(self) -> str | None:
        """Connect to the store and return the experiment's id; None if it does not respond."""
        if not self.is_store_down:
            try:
                self.store.connect()
            except FAILURES as error:
                self.pause(error)
        return self.store.experiment_id

    def links(self, base_url: str, overview: ChartView, max_sweeps: int) -> list[str]:
        """Return links to all runs and, for each new sweep, to its charts, table, report and run.

        There are no links while the store does not respond.

        Args:
            base_url: Address of MLflow's server.
            overview: View of all runs; it is saved first, because a link cannot choose columns.
            max_sweeps: Number of the newest sweeps that get links.
        """
        try:
            client = self.store.connect()
            experiment_id = str(self.store.experiment_id)
            client.set_experiment_tag(experiment_id, *overview.tag)
            sweeps = client.search_runs(
                [experiment_id],
                tag_filter({KIND_TAG: "sweep"}),
                max_results=max_sweeps,
                order_by=["attributes.start_time DESC"],
            )
        except FAILURES as error:
            self.pause(error)
            return []
        runs = f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs"
        # A plain address would show neither losses nor nested runs.
        training = "workflowType=machine_learning"
        charts = f"{runs}?{training}&compareRunsMode={{}}&viewStateShareKey={{}}"
        lines = [f"training runs: {charts.format('TABLE', overview.key)}"]
        for run in sweeps:
            run_page = f"{runs}/{run.info.run_id}"
            pages: dict[str, str] = {}
            if view := run.data.tags.get(VIEW_TAG):
                pages["charts"] = charts.format("CHART", view)
                pages["table"] = charts.format("TABLE", view)
            if report := run.data.tags.get(REPORT_TAG):
                pages["report"] = f"{run_page}/artifacts/{report}?{training}"
            pages["run"] = f"{run_page}?{training}"
            for page, link in pages.items():
                lines.append(f"sweep {run.info.run_name}, {page + ':':<7} {link}")
        return lines

    def added_by_people(self) -> list[str]:
        """Name what the store holds and no file of the workspace says: a new one would lack it."""
        client = MlflowClient(self.store.uri)
        experiment = client.get_experiment_by_name(self.store.experiment_name)
        additions: list[str] = []
        experiment_ids = [experiment.experiment_id] if experiment else []
        for run in client.search_runs(experiment_ids, max_results=MAX_RUNS_FOUND):
            tags = run.data.tags
            parent = tags.get(ROOT_TAG) if PARENT_TAG in tags else None
            tracked_run = self.stored(tags.get(KIND_TAG, ""), tags.get(KEY_TAG, ""), parent)
            note = ""
            if tracked_run:
                note = tracked_run.tags.get(NOTE_TAG, "").replace(RUN_ID, run.info.run_id)
            if tags.get(NOTE_TAG, "") != note[:MAX_TAG_CHARACTERS]:
                additions.append(f"the note of {run.info.run_name}")
            for name in tags:
                if not name.startswith(PROGRAM_PREFIXES):
                    additions.append(f"the tag {name} of {run.info.run_name}")
        picked = {path.stem for path in self._workspace.tracked.glob("registered/*.json")}
        for model in client.search_registered_models():
            aliases = {f"{model.name}@{alias}" for alias in model.aliases}
            additions += [f"the alias {name}" for name in sorted(aliases - picked)]
        return additions


def open_tracking(workspace: Workspace, *, warn: Warn | None = None) -> Tracking:
    """Open the workspace's store; create its database and experiment if they are missing.

    Call it once before workers start. A server is connected to when the first run is published; one
    that does not respond is no error: see `Tracking`.

    Raises:
        UserError: If the address is not one of MLflow's, or the local store is damaged.
    """
    tracking = Tracking(workspace, warn=warn)
    if tracking.store.is_remote:
        return tracking
    uri = tracking.store.public_uri
    valid = "set MLFLOW_TRACKING_URI to sqlite:///FILE or an http:// address"
    try:
        tracking.store.connect()
    except ModuleNotFoundError as error:
        raise UserError(
            f"MLflow's store {uri} needs the module {error.name}; install it, or {valid}"
        ) from None
    except CopiedStoreError as error:
        tracking.pause(error)
    except FAILURES as error:
        if is_disk_full(error):
            raise
        raise UserError(
            f"cannot open MLflow's store {uri}: {first_line(error)[:200]}; "
            f"move the file away, or {valid}"
        ) from None
    return tracking
