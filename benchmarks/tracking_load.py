"""Time and requests to write the trials of a sweep into MLflow, against a request for each step.

The trials are simulated: each starts, its journal grows and is copied meanwhile, and it ends with a
result. `ours` is what a sweep does (`LiveSweep`). `by step` sends the numbers of each step in a
request of their own, as most callbacks do; a few trials show its time. Both write into a SQLite
file, then into `mlflow server --workers 1` with such a file. The server's log counts the requests;
for the file, calls of MLflow's client are counted.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.simulated_sweep import SimulatedSweep
from benchmarks.timing import Spread
from orchestrator.pipelines.ui import LOG_NAME, serve
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.sweeping.live_sweep import LiveSweep
from orchestrator.tracking import TrackedRun, open_tracking
from orchestrator.tracking.journal_copies import SECONDS_BETWEEN_COPIES
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace, open_workspace

__all__ = ["measure"]

_CURVES = ("train/loss", "train/learning_rate", "train/tokens_per_second", "train/memory_gb")
_ADDRESS = "MLFLOW_TRACKING_URI"
_REQUEST = re.compile(r'"(?:GET|POST|PATCH|PUT|DELETE) /api/')


@dataclass(frozen=True, kw_only=True)
class _Size:
    num_trials: int
    num_steps: int
    num_copies: int
    """Copies of each journal while it grows."""
    num_by_step: int
    """Trials that are written step by step."""
    goal: Goal | None = None


# A tenth of the time; the run itself has to be made, and every number to be stored, in any case.
_FULL = _Size(
    num_trials=200, num_steps=250, num_copies=5, num_by_step=3, goal=Goal("at least", 10.0)
)
_QUICK = _Size(num_trials=3, num_steps=10, num_copies=2, num_by_step=1)


@dataclass(frozen=True)
class _Load:
    num_trials: int
    seconds: float
    cpu_seconds: float
    """Processor time of the client's process, without the server's."""
    num_requests: int

    def per_trial(self, number: float) -> Spread:
        return Spread.of([number / self.num_trials])


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure the load of a sweep on MLflow's stores.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    rows: list[Row] = []
    checks: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        sweep = SimulatedSweep(size.num_trials, Path(temporary))
        plan = sweep.plan()
        for store in ("SQLite file", "server"):
            say(f"tracking_load: {size.num_trials} trials into a {store}")
            with ExitStack() as stack:
                served = open_workspace(Path(temporary, store))
                uri = f"sqlite:///{served.database}"
                if store == "server":
                    uri = stack.enter_context(_server(served))
                stack.enter_context(patch.dict(os.environ, {_ADDRESS: uri}))
                log = served.logs / LOG_NAME if store == "server" else None
                bench = _Bench(plan, sweep.workspace, size, log)
                ours, by_step = bench.ours(), bench.by_step()
                checks.append(bench.check_points(store))
            rows += _rows(store, size, ours, by_step)
    setting = (
        f"{size.num_trials} trials of {size.num_steps} steps with {len(_CURVES)} numbers each; "
        f"ours copies {size.num_copies} times while a trial trains; by step: {size.num_by_step} "
        "trials"
    )
    return Report(title="tracking_load", setting=setting, rows=tuple(rows), checks=tuple(checks))


class _Bench:
    """One store, and the trials that are written into it."""

    def __init__(
        self, plan: SweepPlan, workspace: Workspace, size: _Size, log: Path | None
    ) -> None:
        """Open the store; `log` is that of its server, if it has one."""
        self.plan, self.size, self._log = plan, size, log
        self.trials = [trial for trial in plan.trials if trial.job]
        self.folder = workspace.sweeps / "history"
        self.tracking = open_tracking(workspace, warn=_fail)
        self.run = self.tracking.run(plan.key, name=plan.name, kind="sweep")
        self.tracking.wait()
        self.runs: list[TrackedRun] = []

    def ours(self) -> _Load:
        """Write all trials as a sweep does, one after the other."""
        size, now = self.size, 0.0
        live = LiveSweep(
            self.plan,
            self.run,
            self.tracking,
            self.folder,
            num_trials=len(self.trials),
            clock=lambda: now,
        )
        every = -(-size.num_steps // size.num_copies)

        def write(trial: Trial) -> None:
            nonlocal now
            journal = Journal(Path(trial.folder))
            journal.path.write_text("")  # That of the store before.
            live.watch([trial])
            self.tracking.wait()
            for step in range(1, size.num_steps + 1):
                journal.metrics(step, _numbers(step))
                if step % every == 0 or step == size.num_steps:
                    now += SECONDS_BETWEEN_COPIES
                    live.watch([trial])
                    self.tracking.wait()  # Seconds pass in a training.
            journal.close()
            measured = {
                "numbers": {"quality/accuracy": 0.5, "train/seconds": 1.0},
                "checkpoint": f"{trial.folder}/step_{size.num_steps:08d}",
            }
            live.log_results([trial.model_copy(update=measured)])
            self.runs[:1] = [
                self.tracking.handle(trial.key, name="", kind=trial.role, parent=self.run)
            ]

        return self._load(self.trials, write)

    def by_step(self) -> _Load:
        """Write some trials with a request for each step."""

        def write(trial: Trial) -> None:
            run = self.tracking.run(
                f"{trial.key}-by-step", name=trial.name, kind=trial.role, params=trial.params()
            )
            for step in range(1, self.size.num_steps + 1):
                run.log_metrics(_numbers(step), step)
            run.finish(wait=False)
            self.runs[1:] = [run]

        return self._load(self.trials[: self.size.num_by_step], write)

    def _load(self, trials: list[Trial], write: Callable[[Trial], None]) -> _Load:
        client, logged = _CountedCalls(self.tracking.store.connect()), self._num_logged()
        with patch.object(self.tracking.store, "connect", return_value=client):
            started, cpu_started = time.perf_counter(), time.process_time()
            for trial in trials:
                write(trial)
                self.tracking.wait()
            seconds = time.perf_counter() - started
            cpu_seconds = time.process_time() - cpu_started
        num_requests = self._num_logged() - logged if self._log else client.num_calls
        return _Load(len(trials), seconds, cpu_seconds, num_requests)

    def _num_logged(self) -> int:
        """Return the number of requests in the server's log."""
        if not self._log:
            return 0
        return len(_REQUEST.findall(self._log.read_text(encoding="utf-8", errors="replace")))

    def check_points(self, store: str) -> str:
        """Compare the curves of the last trial of either kind with what was recorded."""
        client, expected = self.tracking.store.connect(), range(1, self.size.num_steps + 1)
        num_wrong = 0
        for run in self.runs:
            for name in _CURVES:
                history = client.get_metric_history(str(run.run_id), name)
                found = [(point.step, point.value) for point in history]
                num_wrong += found != [(step, _numbers(step)[name]) for step in expected]
        return checked(f"curves in the {store} and in the journal", float(num_wrong), 0.0)


class _CountedCalls:
    """MLflow's client, with the number of its calls."""

    def __init__(self, client: Any) -> None:
        self._client, self.num_calls = client, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        self.num_calls += callable(value)
        return value


def _numbers(step: int) -> dict[str, float]:
    return {name: 4.0 + number + 1.0 / step for number, name in enumerate(_CURVES)}


def _rows(store: str, size: _Size, ours: _Load, by_step: _Load) -> list[Row]:
    def row(what: str, unit: str, numbers: tuple[float, float], goal: Goal | None = None) -> Row:
        spreads = ours.per_trial(numbers[0]), by_step.per_trial(numbers[1])
        return Row(
            what=f"{store}: {what} by step / ours",
            quantities=(Quantity("ours", spreads[0], unit), Quantity("by step", spreads[1], unit)),
            ratio=Spread.of([spreads[1].median / spreads[0].median]),
            goal=goal,
        )

    whole = f"{store}: all {ours.num_trials} trials, ours"
    return [
        row("time of a trial,", "s", (ours.seconds, by_step.seconds), size.goal),
        row("processor time of a trial,", "s", (ours.cpu_seconds, by_step.cpu_seconds)),
        row("requests of a trial,", "requests", (ours.num_requests, by_step.num_requests)),
        Row(what=whole, quantities=(Quantity("time", Spread.of([ours.seconds]), "s"),)),
        Row(
            what=whole,
            quantities=(Quantity("requests", Spread.of([float(ours.num_requests)]), ""),),
        ),
    ]


@contextmanager
def _server(workspace: Workspace) -> Iterator[str]:
    """Serve a workspace's store as `iiet-orch ui` does, and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, stopped = threading.Event(), threading.Event()
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if "Ctrl-C" in text:
            started.set()

    def run() -> None:
        try:
            serve(workspace, port=port, say=say, should_stop=stopped.is_set)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    with patch.dict(os.environ):
        os.environ.pop(_ADDRESS, None)
        thread.start()
        started.wait()
    try:
        if "Ctrl-C" not in lines[-1]:
            raise RuntimeError(f"MLflow's server did not start: {lines}")
        yield f"http://127.0.0.1:{port}"
    finally:
        stopped.set()
        thread.join()


def _fail(text: str) -> None:
    raise RuntimeError(text)
