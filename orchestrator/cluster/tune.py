"""Trials side by side under Ray Tune: one worker directly in a Tune function, more as a Train job.

A Ray Train job inside each trial costs five times the start-up and three times the memory, so only
trials of several workers have one (`trial_workers.py`).
Tune keeps no state that is read again: a trial goes on from its own folder, so Tune's experiment
snapshots, which miss what happened in their last seconds, are deleted. A trial that fails is tried
again a set number of times; then it is reported with its reason, and the rest goes on.
"""

from __future__ import annotations

import json
import math
import pickle
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.cluster.placement import Room, TrialLimits, find_room
from orchestrator.cluster.start import ray_cluster
from orchestrator.cluster.train import RAY_FOLDER, Watch, answer_of, failure_reason
from orchestrator.cluster.tune_workers import train_with_workers
from orchestrator.terminal.signals import GRACE_SECONDS, run_interruptibly
from orchestrator.training.distributed import World
from orchestrator.training.job import (
    TrainingJob,
    TrainingOutcome,
    clear_stop_request,
    is_stop_requested,
    request_stop,
)
from orchestrator.training.run import Report, run_job
from orchestrator.workspace.errors import Interrupted

# isort: split
# Behind our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray
import ray.tune

tune: Any = ray.tune  # its callbacks are called with names, of which ours take what they need

ANSWER = "answer"

T = TypeVar("T")


@dataclass(frozen=True)
class TrialContext:
    """What a trial is told beside its parameters."""

    room: Room
    """How many workers it has, and what each gets."""
    should_stop: Callable[[], bool]
    """Whether to save and return soon."""

    @property
    def world(self) -> World:
        """The place of the trial's own process."""
        return World(device="cuda" if self.room.use_gpu and self.room.workers == 1 else "cpu")

    def train(
        self, job: TrainingJob, should_stop: Callable[[], bool], report: Report | None = None
    ) -> TrainingOutcome:
        """Train a job here, or on the trial's workers; as `run_job`."""
        if self.room.workers == 1:
            return run_job(job, world=self.world, should_stop=should_stop, report=report)
        return train_with_workers(job, self.room, should_stop=should_stop, report=report)

    def on_device(self, work: Callable[[str], T]) -> T:
        """Do work that takes the name of a device, on one of the trial's devices."""
        if self.room.workers == 1 or not self.room.use_gpu:
            return work(self.world.device)
        # The trial's own process has none: its workers had them, and have ended.
        remote = ray.remote(num_cpus=self.room.cpus, num_gpus=1, scheduling_strategy="DEFAULT")
        answer: T = ray.get(remote(work).remote("cuda"))
        return answer


@dataclass(frozen=True)
class TrialReport:
    """How one trial ended."""

    number: int
    """Its place in the list of trials."""
    parameters: dict[str, Any]
    """What it was given."""
    result: dict[str, Any] | None = None
    """What it returned; None if it failed."""
    error: str | None = None
    """Why it failed, after all its retries."""
    after_stop: bool = False
    """Whether that was after a stop was asked for."""


TrialFunction = Callable[[dict[str, Any], TrialContext], dict[str, Any]]


def run_trials(
    function: TrialFunction,
    trials: Sequence[dict[str, Any]],
    stop_folder: Path,
    *,
    limits: TrialLimits | None = None,
    on_result: Callable[[TrialReport], None] | None = None,
    watch: Watch | None = None,
    saved: Callable[[], str] | None = None,
) -> list[TrialReport]:
    """Run trials side by side under Ray Tune. A failed one does not end the others.

    Args:
        function: Importable function from parameters and context to a JSON-able result. It may be
            called again for the same trial after a crash, and then goes on from what is on disk.
        trials: Parameters of each trial.
        stop_folder: Shared folder for the file that asks running trials to stop.
        limits: How many at once, on what, and how often one may fail.
        on_result: Called in this thread for each trial that ended, as soon as it did.
        watch: Called a few times a second, to show progress.
        saved: Says what unfinished trials have saved; called after a signal.

    Returns:
        One report a trial, in their order.

    Raises:
        UserError: If there is no room for one trial.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    limits = limits or TrialLimits()
    if not trials:
        return []
    clear_stop_request(stop_folder)
    reports: dict[int, TrialReport] = {}
    with ray_cluster() as cluster:
        room = find_room(limits, len(trials), cluster.resources)
        follower = _Follower(trials, stop_folder)

        def deliver() -> None:
            for report in follower.ended():
                reports[report.number] = report
                if on_result:
                    on_result(report)
            if watch:
                watch()

        try:
            run_interruptibly(
                lambda: _tune(function, follower, room, limits.max_failures),
                ask_to_stop=follower.ask_to_stop,
                saved=saved or (lambda: "finished trials are saved"),
                watch=deliver,
            )
        except Interrupted:
            deliver()  # Trials may have failed in the last moment.
            raise
        deliver()
    return [
        reports.get(number, TrialReport(number, parameters, error="it was not run"))
        for number, parameters in enumerate(trials)
    ]


def _tune(function: TrialFunction, follower: _Follower, room: Room, max_failures: int) -> None:
    storage = follower.stop_folder / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)
    trainable = tune.with_parameters(
        _tune_trial,
        function=function,
        trials=list(follower.trials),
        stop_folder=follower.stop_folder,
        room=room,
    )
    # Several workers hold their own places; any here could starve them. Tune wants something.
    own = {"CPU": room.cpus, "GPU": int(room.use_gpu)} if room.workers == 1 else {"memory": 1}
    tune.Tuner(
        tune.with_resources(trainable, own),
        param_space={"number": tune.grid_search(list(range(len(follower.trials))))},
        # The same processes serve one trial after another: 1 s a trial instead of 2 to 3.
        tune_config=tune.TuneConfig(max_concurrent_trials=room.at_once, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[follower],
            stop=follower,
            verbose=0,
        ),
    ).fit()
    shutil.rmtree(storage, ignore_errors=True)


def _tune_trial(
    config: dict[str, Any],
    *,
    function: TrialFunction,
    trials: Sequence[dict[str, Any]],
    stop_folder: Path,
    room: Room,
) -> None:
    torch.set_num_threads(room.cpus * room.workers)
    context = TrialContext(room, lambda: is_stop_requested(stop_folder))
    # One that was not begun reports nothing, too: Tune prints of a trial that it ended unheard.
    asked = context.should_stop()
    answer = {}
    if not asked:
        trial = trials[config["number"]]
        answer = answer_of(lambda: function(trial, context), is_stopping=context.should_stop)
    tune.report({ANSWER: json.dumps(answer)})


class _Follower(tune.Callback, tune.Stopper):  # type: ignore[misc]
    """Hears from Tune which trials run and how they end, and ends the experiment after a stop.

    Tune would start the waiting trials while the running ones save their state, and it pickles what
    it is given; so this object waits for those that ran when the stop was asked for, and pickles as
    nothing.
    """

    def __init__(self, trials: Sequence[dict[str, Any]], stop_folder: Path) -> None:
        self.trials, self.stop_folder = trials, stop_folder
        self._reports: queue.SimpleQueue[TrialReport] = queue.SimpleQueue()
        self._running: set[int] = set()
        self._to_wait_for: set[int] | None = None
        self._give_up_at = math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def ask_to_stop(self) -> bool:
        """Ask running trials to save and return; True if there are any."""
        request_stop(self.stop_folder)
        return bool(self._running)

    def ended(self) -> Iterator[TrialReport]:
        """Yield the reports of trials that ended since the last call."""
        while not self._reports.empty():
            yield self._reports.get()

    def __call__(self, *_: Any, **__: Any) -> bool:
        """Never stop a trial from outside: it stops by itself, with its state saved."""
        return False

    def stop_all(self) -> bool:
        """Tell Tune to end once the trials that ran at the stop have returned, or took too long."""
        if self._to_wait_for is None:
            if not is_stop_requested(self.stop_folder):
                return False
            self._to_wait_for = set(self._running)
            self._give_up_at = time.monotonic() + GRACE_SECONDS
        return not self._to_wait_for or time.monotonic() > self._give_up_at

    def on_trial_start(self, *_: Any, trial: Any, **__: Any) -> None:
        """Note that a trial runs."""
        self._running.add(trial.config["number"])

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report a trial's answer; one that stopped without an answer is not reported."""
        number = self._ended(trial)
        answer = json.loads((trial.last_result or {}).get(ANSWER, "{}"))
        if answer:
            self._report(number, result=answer.get("result"), error=answer.get("text"))

    def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report a trial that died after a stop: Tune would try it again, and it would do nothing.

        One that dies before is tried again, and reported when it ends.
        """
        if is_stop_requested(self.stop_folder):
            self.on_trial_error(trial=trial)

    def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
        """Report why a trial failed for the last time."""
        number = self._ended(trial)
        self._report(number, error=failure_reason(_last_error(trial)))

    def _report(
        self, number: int, result: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        after_stop = is_stop_requested(self.stop_folder)
        parameters = dict(self.trials[number])
        self._reports.put(TrialReport(number, parameters, result, error, after_stop))

    def _ended(self, trial: Any) -> int:
        number: int = trial.config["number"]
        self._running.discard(number)
        if self._to_wait_for is not None:
            self._to_wait_for.discard(number)
        return number


def _last_error(trial: Any) -> BaseException:
    """Return why a trial failed. Tune writes it here first and copies it to its storage later."""
    path = trial.pickled_error_file
    if path and Path(path).is_file():
        error: BaseException = pickle.loads(Path(path).read_bytes())
        return error
    return trial.get_pickled_error() or RuntimeError(trial.get_error())
