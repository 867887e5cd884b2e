"""Deliver operations in the background; a dead server costs one warning.

A background thread attempts each operation; if that fails, it goes to the outbox. Each attempt at a
dead server takes seconds, so after a failure there are no attempts for a while, longer each time.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence

from orchestrator.settings import MLFLOW
from orchestrator.tracking.client import MlflowException
from orchestrator.tracking.log_mirror import LogMirror, log_folder
from orchestrator.tracking.operations import OPERATIONS
from orchestrator.tracking.outbox import Outbox, Record
from orchestrator.tracking.sender import Sender
from orchestrator.tracking.store import FAILURES, RunIdentity, Store, is_refusal
from orchestrator.workspace.errors import first_line
from orchestrator.workspace.folders import Workspace

FIRST_PAUSE_SECONDS = 30.0
MAX_PAUSE_SECONDS = 600.0
MAX_WAIT_SECONDS, SHORT_WAIT_SECONDS = 60.0, 2.0

Warn = Callable[[str], None]


class Delivery:
    """Performs operations in order in a background thread, or puts them into the outbox.

    A slow server delays neither training nor Ctrl-C; only `wait` and `sync` wait for it.
    """

    def __init__(
        self, workspace: Workspace, *, warn: Warn | None = None, loggers: Collection[str] = ()
    ) -> None:
        """Name store and outbox.

        Args:
            warn: Called once when the store stops responding, and for values that it refuses
                (default: a log message).
            loggers: As the setting; those beside `mlflow` get the updates of runs, too.

        Raises:
            UserError: If the package of a logger is missing or broken.
        """
        self.root = workspace.root
        self.store = Store(workspace)
        self.outbox = Outbox(workspace.root)
        self._warn = warn or logging.getLogger(__name__).warning
        self._mirrors = [
            LogMirror(name, log_folder(workspace.root, name), warn=self._warn)
            for name in loggers
            if name != MLFLOW
        ]
        self._sender = Sender(self._send)
        self._pause_seconds = self._paused_until = 0.0
        self._num_performed = 0
        self._has_lost = False

    def sync(self) -> int:
        """Deliver the outbox; return how many operations were delivered, or refused for good."""
        self._paused_until = 0.0
        if num_damaged := self.outbox.num_damaged():
            self._warn(f"{self.outbox.path} is damaged: {num_damaged} of its lines are left out")
        self._prepare(self.outbox.records())
        return self.outbox.deliver(self._perform)

    def write(self, *records: Record) -> None:
        """Perform operations soon, or put them into the outbox; returns at once."""
        if records:
            self._sender.put(records)
        self.mirror(*records)

    def mirror(self, *records: Record) -> None:
        """Let the other loggers know the updates of runs; waits for them."""
        for mirror in self._mirrors:
            for record in records:
                if record["operation"] == "update":
                    mirror.update(record["run"], record["arguments"])

    def wait(self, seconds: float = MAX_WAIT_SECONDS, *, in_all: bool = False) -> None:
        """Wait until the store has everything; the outbox gets what it does not have in time.

        Args:
            seconds: Longest wait for a single operation.
            in_all: Whether this is the longest wait for all of them.
        """
        if self._pause_seconds:  # It did not respond last time: one long wait is enough.
            seconds = min(seconds, SHORT_WAIT_SECONDS)
        is_over, num_before = False, -1
        try:
            while not is_over and num_before < self._num_performed:
                num_before = self._num_performed
                is_over = self._sender.wait(seconds)
                if in_all:
                    break
        finally:
            if not is_over:  # Also after Ctrl-C.
                self.pause(TimeoutError("no answer yet"))
                self._keep([*itertools.chain(*self._sender.take_back())])

    def _send(self, records: Sequence[Record]) -> None:
        self._prepare(records)
        rest = list(itertools.dropwhile(self._perform, records))
        if rest and self._sender.is_first(records):
            self._keep(rest)

    def _keep(self, records: Sequence[Record]) -> None:
        try:
            self.outbox.add([_storable(record) for record in records])
        except OSError as error:
            if not self._has_lost:
                self._warn(
                    f"cannot store records for MLflow in {self.outbox.path} ({error}); training "
                    "continues, and running the same command again sends them"
                )
            self._has_lost = True

    def _prepare(self, records: Sequence[Record]) -> None:
        # Find or create the runs of all operations at once.
        if self.is_paused:
            return
        runs = [RunIdentity.model_validate(record["run"]) for record in records if "run" in record]
        try:
            self.store.connect()
            self.store.prepare(runs)
        except FAILURES as error:
            if not is_refusal(error):  # Else each operation reports it.
                self.pause(error)

    def _perform(self, record: Record) -> bool:
        """Perform an operation; return False if it should be tried again later."""
        if self.is_paused:
            return False
        try:
            try:
                self._attempt(record)
            except MlflowException as error:
                if not is_refusal(error):
                    raise
                # The run may have been changed or deleted by others.
                if "run" in record:
                    self.store.forget(RunIdentity.model_validate(record["run"]))
                self._attempt(record)
        except FAILURES as error:
            if is_refusal(error):
                self._warn(f"MLflow refused {record['operation']}: {first_line(error)[:200]}")
                return True
            self.pause(error)
            return False
        self._pause_seconds = 0.0
        self._num_performed += 1
        return True

    def _attempt(self, record: Record) -> None:
        client, operation = self.store.connect(), record["operation"]
        if operation == "tag the experiment":
            client.set_experiment_tag(str(self.store.experiment_id), record["tag"], record["value"])
        else:
            run = self.store.run(RunIdentity.model_validate(record["run"]))
            OPERATIONS[operation](client, run, **record["arguments"])

    @property
    def is_paused(self) -> bool:
        """Whether the store failed a moment ago, so that there are no attempts for now."""
        return time.monotonic() < self._paused_until

    def pause(self, error: Exception) -> None:
        """Make no attempts for a while; warn the first time."""
        if not self._pause_seconds:
            self._warn(
                f"MLflow at {self.store.public_uri} does not respond ({first_line(error)[:200]}); "
                "training continues, and `iiet-orch sync` delivers the missing records later"
            )
        longer = max(2 * self._pause_seconds, FIRST_PAUSE_SECONDS)
        self._pause_seconds = min(longer, MAX_PAUSE_SECONDS)
        self._paused_until = time.monotonic() + self._pause_seconds


def _storable(record: Record) -> Record:
    # The run may have ended when this is delivered; and one that is created then is running anyway.
    arguments = dict(record.get("arguments", {}))
    if arguments.get("status") == "RUNNING":
        del arguments["status"]
    return {**record, "arguments": arguments} if arguments else record
