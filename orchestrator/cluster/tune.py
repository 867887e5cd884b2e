"""Run trials under Ray Tune, which starts them where slots are free, and retries failed ones.

A queue decides which trial is next, and hears how each one ended. Tune gets as many trials as
the nodes have slots now, so nodes that join later get trials, too. A trial with one worker
runs directly in a Tune function. One with several workers is a Ray Train job, whose start takes
five times as long, with three times the memory. A trial resumes from its own folder, so Tune's
snapshots, which may be seconds old, are deleted.

When memory runs low, Ray ends processes, whoever uses the memory. Tune then loses trials, and often
ends itself. It is started again with the remaining trials; this does not count as a failure.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch

from orchestrator.cluster.placement import (
    Placement,
    Signal,
    StopRequests,
    job_placement,
    worker_device,
)
from orchestrator.cluster.ray import ray_cluster
from orchestrator.cluster.train import FINAL_ERRORS, JobRun, failure_reason
from orchestrator.cluster.work import Executor
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import AshaRule, EarlyStop, Trial
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.terminal.render import join_names
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    start_thread,
    stop_on_signals,
    stop_requested,
    stop_when,
    wait_for_work,
)
from orchestrator.training.job import finished_outcome
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.journal import VALIDATION_METRIC, JournalReader

# isort: split
# Imported last, and within `ray_cluster`, which sets the environment that Ray reads.
import ray
import ray.exceptions
import ray.tune
import ray.tune.schedulers
import ray.tune.search

tune: Any = ray.tune
schedulers: Any = ray.tune.schedulers
search: Any = ray.tune.search

STEP = "step"
LOSS = "validation_loss"
"""What a trial reports to Tune after each validation."""
ANSWER = "answer"
"""Key of a trial's last report: its result and its error, as JSON."""

RESTART_PAUSES_SECONDS = (5.0, 20.0, 60.0)
"""Pauses before Tune starts again after memory ran low, which other programs may free soon."""
MAX_NAMED_PROCESSES = 3

logger = logging.getLogger(__name__)
# Files of results are switched off, and Tune would warn of each missing one.
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


class TrialQueue(Protocol):
    """The trials of a sweep, in the order in which they start. Only Tune's thread changes it."""

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""

    @property
    def num_taken(self) -> int:
        """Number of trials that were taken and have not ended."""

    def take(self) -> Trial | None:
        """Return a trial that can start; None if there is none at the moment."""

    def on_start(self, key: str) -> None:
        """Note that a trial has started."""

    def on_early_stop(self, key: str, stop: EarlyStop) -> None:
        """Note that ASHA ends a trial, which first saves its state."""

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        """Note that a trial ended with a result or an error; with neither it is unfinished."""

    def start_again(self, reason: str) -> None:
        """Put taken trials that have not ended back, and note why; called after the end of Tune."""

    def begin_saving(self) -> bool:
        """Announce that the running trials save, and return whether there are any; called in the
        main thread after a signal."""

    def saved(self) -> str:
        """Return what is finished and saved, as text; called in the main thread after a signal."""


class TuneProcess:
    """The Tune process of a trial, and ASHA's decision about the trial."""

    def __init__(
        self,
        trial: Trial,
        placement: Placement,
        cluster: ClusterSettings,
        stops: StopRequests | None = None,
    ) -> None:
        """Find the devices of this process and of the trial's workers.

        Args:
            placement: What Ray has reserved for the trial.
            cluster: How the trial's workers share a model.
            stops: ASHA's requests to stop; None if no trials compete.
        """
        self.placement = placement
        self.num_workers = placement.workers
        self.device = worker_device(use_gpu=placement.use_gpu and placement.workers == 1)
        """Device of the trial's own process."""
        self.executor = Executor(device=self.device)
        if placement.use_gpu and placement.workers > 1:
            # The workers had the GPUs and have ended; this process has reserved none.
            self.executor = Executor(needs_gpu=True, num_cpus=placement.cpus)
        self._key = trial.key
        self._cluster = cluster
        self._stops = stops
        self._is_beaten = False

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report a validation loss to Tune, which decides whether the trial continues."""
        if VALIDATION_METRIC in numbers:
            # This returns when the scheduler has decided.
            tune.report({STEP: step, LOSS: numbers[VALIDATION_METRIC]})
            self._is_beaten = self._stops is not None and self._stops.is_asked(self._key)

    def is_beaten(self) -> bool:
        """Return whether the last report has ended the trial early."""
        return self._is_beaten

    def train_on_workers(self, job: TrainingJob) -> TrainingOutcome:
        """Train a job on the trial's workers like `run_job`, and report the losses in its journal.

        If a worker dies, the trial fails, and a retry resumes from the newest checkpoint.
        """
        if outcome := finished_outcome(job):
            return outcome
        journal = JournalReader(job.folder)
        journal.read()  # Earlier records were reported before.
        changes = {"num_shards": self._cluster.shards_of(self.num_workers), "max_failures": 0}
        cluster = self._cluster.model_copy(update=changes)
        run = JobRun(job, self.placement, cluster, Signal())
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(run.fit)
            is_over = False
            while not is_over:
                is_over = bool(wait((training,), timeout=POLL_SECONDS).done)
                # Once more after the end, as the training may be short.
                for record in journal.read():
                    if record["kind"] == "metrics":
                        self.report(record["step"], record["values"])
                if stop_requested():
                    run.stop.send()
        training.result()
        unfinished = TrainingOutcome(checkpoint=None, step=journal.step, finished=False)
        return finished_outcome(job) or unfinished


TrialFunction = Callable[[Trial, TuneProcess], Trial | None]
"""An importable function that runs a trial and returns it with its result; None if unfinished."""


def run_queue(
    function: TrialFunction,
    queue: TrialQueue,
    storage: Path,
    sweep: SweepSettings,
    cluster: ClusterSettings,
    *,
    num_trials: int,
    competitors: Sequence[Sequence[Trial]] = (),
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run the trials of a queue under Ray Tune, as many at the same time as fit.

    A failed trial is retried `sweep.max_failures_per_trial` times, and does not end the others. The
    function resumes from the trial's folder. After Ray has ended a trial because memory ran low, no
    trial starts until the running ones have ended; after a pause the remaining ones start again.

    Args:
        storage: Folder for Tune's own files, which all nodes see; deleted at the end.
        num_trials: Trials that can start at once; on CPUs, they share all CPUs.
        competitors: For each model with several learning rates, its trials, which ASHA compares.
        watch: Called a few times a second in this thread.

    Raises:
        UserError: If there are too few CPUs or GPUs for one trial.
        RunFailed: If memory ran low again after the last pause.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    with ray_cluster() as resources:
        placement = job_placement(
            num_trials,
            sweep.workers_per_trial,
            sweep.gpus_per_trial or 0,
            resources,
            most_at_once=sweep.trials_at_once,
            per_trial=True,
        )
        logger.info("trials: %s", placement)
        stop = Signal()
        stops = StopRequests() if competitors else None
        scheduler = AshaByModel(AshaRule.of(sweep), competitors, queue, stops)
        trainable = tune.with_parameters(
            run_in_tune,
            function=function,
            placement=placement,
            cluster=cluster,
            stop=stop,
            stops=stops,
        )
        # The queue limits how many trials wait for a process.
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")

        def run_queue() -> None:
            for pause in (*RESTART_PAUSES_SECONDS, None):
                suggester = Suggester(queue, placement, sweep.trials_at_once)
                listener = Listener(queue, suggester)
                tuner = tune.Tuner(
                    tune.with_resources(trainable, placement.trial_resources),
                    tune_config=tune.TuneConfig(
                        # Processes are reused, so that a trial starts in 1 s instead of 2 to 3.
                        reuse_actors=True,
                        search_alg=suggester,
                        num_samples=-1,
                        scheduler=scheduler,
                        trial_dirname_creator=lambda trial: trial.trial_id,
                    ),
                    run_config=tune.RunConfig(
                        name="tune",
                        storage_path=str(storage),
                        failure_config=tune.FailureConfig(
                            max_failures=sweep.max_failures_per_trial
                        ),
                        callbacks=[listener],
                        verbose=0,
                    ),
                )
                try:
                    tuner.fit()
                except Exception as error:
                    # A shortage of memory between trials ends Tune itself.
                    if not is_memory_shortage(str(error)):
                        raise
                    listener.shortage = str(error)
                if queue.is_over or not listener.shortage or stop_requested():
                    return
                logger.warning("Ray ended trials: %s", listener.shortage)
                reason = f"memory ran low ({describe_shortage(listener.shortage)})"
                if pause is None:
                    raise RunFailed(
                        f"Ray ended trials {len(RESTART_PAUSES_SECONDS) + 1} times because "
                        f"{reason}; end other programs, or set sweep.trials_at_once lower, and run "
                        "the same command again to resume"
                    )
                queue.start_again(f"Ray ended trials because {reason}; what is left starts again")
                shutil.rmtree(storage, ignore_errors=True)
                over_at = time.monotonic() + pause
                while time.monotonic() < over_at and not stop_requested():
                    time.sleep(POLL_SECONDS)

        def ask_to_stop() -> bool:
            stop.send()
            return queue.begin_saving()

        # Tune runs in its own thread, because the main thread receives the signals.
        try:
            with stop_on_signals():
                tuning = start_thread(run_queue)
                wait_for_work(
                    {"the trials": tuning},
                    ask_to_stop=ask_to_stop,
                    saved=queue.saved,
                    watch=watch,
                )
        finally:
            shutil.rmtree(storage, ignore_errors=True)


def run_in_tune(
    config: dict[str, Any],
    *,
    function: TrialFunction,
    placement: Placement,
    cluster: ClusterSettings,
    stop: Signal,
    stops: StopRequests | None,
) -> None:
    """Run a trial in a Tune process, and report its end."""
    torch.set_num_threads(placement.cpus * placement.workers)
    result = None
    reason = ""
    with stop_when(stop.is_sent):
        if not stop_requested():
            trial = Trial.model_validate_json(config["trial"])
            try:
                result = function(trial, TuneProcess(trial, placement, cluster, stops))
            except Exception as error:
                if not (isinstance(error, FINAL_ERRORS) or stop_requested()):
                    raise  # Tune retries it.
                is_known = isinstance(error, UserError | RunFailed)
                reason = str(error) if is_known else f"{type(error).__name__}: {error}"
    tune.report({ANSWER: json.dumps([result and result.model_dump(mode="json"), reason])})


class Suggester(search.Searcher):  # type: ignore[misc]
    """Gives Tune the trials of a queue, as many at the same time as the nodes have slots now."""

    def __init__(self, queue: TrialQueue, placement: Placement, most: int | None) -> None:
        super().__init__()
        self.is_short_of_memory = False
        """Whether to start no trial until the running ones have ended."""
        self._queue = queue
        self._placement = placement
        self._most = most or math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return search.Searcher, ()  # Tune pickles this, but never restores it.

    def suggest(self, *_: Any, **__: Any) -> Any:
        if self.is_short_of_memory or stop_requested() or self._queue.is_over:
            return search.Searcher.FINISHED
        if self._queue.num_taken >= min(self._most, self._placement.num_slots()):
            return None
        trial = self._queue.take()
        if trial is None:
            return None
        return {"key": trial.key, "trial": json.dumps(trial.model_dump(mode="json"))}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        pass  # `Listener` handles it.

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class Listener(tune.Callback):  # type: ignore[misc]
    """Tells a queue about starts and ends of its trials. Tune calls it with keyword arguments."""

    def __init__(self, queue: TrialQueue, suggester: Suggester) -> None:
        self._queue = queue
        self._suggester = suggester
        self._short_of_memory: set[str] = set()
        """Keys of trials that Ray ended because memory ran low."""
        self.shortage = ""
        """Ray's text about the last shortage of memory; empty if there was none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def on_trial_start(self, *_: Any, trial: Any, **__: Any) -> None:
        self._queue.on_start(trial.config["key"])

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
        # A trial that Tune ended has reported no answer.
        answer = (trial.last_result or {}).get(ANSWER, '[null, ""]')
        result, error = json.loads(answer)
        self._queue.on_end(trial.config["key"], result and Trial.model_validate(result), error)

    def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
        self._look_for_shortage(trial)

    def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
        self._look_for_shortage(trial)
        key = trial.config["key"]
        # Tune counted shortages of memory as failures; the next Tune starts at zero.
        if key not in self._short_of_memory:
            self._queue.on_end(key, None, failure_reason(_trial_error(trial)))

    def _look_for_shortage(self, trial: Any) -> None:
        text = str(_trial_error(trial))
        if is_memory_shortage(text):
            self._short_of_memory.add(trial.config["key"])
            self._suggester.is_short_of_memory = True
            self.shortage = text


def _trial_error(trial: Any) -> Exception:
    """Return the last error of a trial.

    Tune writes the text of every error to a file, after a numbered line. It pickles only errors of
    functions and of dead actors.
    """
    path = Path(trial.error_file)
    texts = re.split(r"^Failure # .*\n", path.read_text() if path.is_file() else "", flags=re.M)
    text = texts[-1].strip() or "Ray ended its process and gave no reason"
    pickled = trial.pickled_error_file
    if pickled and Path(pickled).is_file():
        error: Exception = pickle.loads(Path(pickled).read_bytes())
        if str(error).strip() == text:  # Otherwise the pickled error is an earlier one.
            return error
    return RunFailed(text)


def is_memory_shortage(text: str) -> bool:
    """Return whether an error says that Ray ended a process because memory ran low."""
    return "running low on memory" in text


def describe_shortage(text: str) -> str:
    """Return the used memory and the largest processes in Ray's error about a shortage, as text."""
    memory = re.search(r"([\d.]+) ?GB(?: used)? / ([\d.]+) ?GB", text)
    facts = [f"{memory[1]} of {memory[2]} GB were used"] if memory else []
    # Lines have process, gigabytes and command; arguments of a command may contain secrets.
    processes = re.findall(r"^(\d+)\t([\d.]+)\t(\S+)", text, flags=re.M)
    largest = [
        f"{PurePath(command).name} (process {process}) {size} GB"
        for process, size, command in processes[:MAX_NAMED_PROCESSES]
    ]
    if largest:
        facts.append(f"the largest processes were {join_names(largest)}")
    return "; ".join(facts) or first_line(RunFailed(text))


class AshaByModel(schedulers.FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (ASHA; Li et al., MLSys 2020), one bracket per model.

    Only learning rates of the same model compete. Tune would kill a worse trial; here the trial is
    asked to stop, saves its state and returns, so its workers and its lock are free.
    """

    def __init__(
        self,
        rule: AshaRule,
        models: Sequence[Sequence[Trial]],
        queue: TrialQueue,
        stops: StopRequests | None,
    ) -> None:
        """Prepare a bracket for each model.

        Args:
            models: For each model, its trials; if empty, no trial is stopped early.
            queue: Stores why a trial is stopped.
            stops: Carries the request to the trial.
        """
        super().__init__()
        self._rule = rule
        self._queue = queue
        self._stops = stops
        self._rivals: dict[str, Sequence[Trial]] = {}
        """Key of a trial -> all trials of its model."""
        self._brackets: dict[str, Any] = {}
        """Key of a trial -> Ray's ASHA for its model."""
        self._first_starts: dict[str, Any] = {}
        """Key -> Tune's trial at its first start; a retry is the same competitor."""
        self._losses = defaultdict[str, dict[int, float]](dict)
        """Key -> step -> validation loss."""
        self._beaten: set[str] = set()
        """Keys of the trials that were asked to stop."""
        for trials in models:
            num_all = num_steps(trials[0])
            bracket = schedulers.ASHAScheduler(
                time_attr=STEP,
                metric=LOSS,
                mode="min",
                max_t=num_all,
                grace_period=max(1, math.ceil(rule.first_rung * num_all)),
                reduction_factor=rule.reduction_factor,
                stop_last_trials=False,
            )
            for trial in trials:
                self._rivals[trial.key] = trials
                self._brackets[trial.key] = bracket

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Add a trial to the bracket of its model."""
        key = trial.config["key"]
        if key in self._brackets and key not in self._first_starts:
            self._first_starts[key] = trial
            self._brackets[key].on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial after a validation; Tune is always told to continue.

        The reason of a stop names the competitor with the lowest loss at that step.
        """
        key = trial.config["key"]
        loss = result.get(LOSS, math.nan)
        # A loss that is not finite ends the training anyway.
        if key in self._brackets and math.isfinite(loss):
            step = result[STEP]
            self._losses[key][step] = loss
            first_start = self._first_starts[key]
            decision = self._brackets[key].on_trial_result(controller, first_start, result)
            is_worse = decision == schedulers.TrialScheduler.STOP
            # Its process may have died after the request; then the retry needs the request again.
            if is_worse or key in self._beaten:
                self._ask_to_end(key, step)
        return str(schedulers.TrialScheduler.CONTINUE)

    def _ask_to_end(self, key: str, step: int) -> None:
        """Ask a trial to stop after a step, unless that is its last one."""
        rivals = self._rivals[key]
        num_all = num_steps(rivals[0])
        if step >= num_all:
            return
        # The loss of each rival at the nearest step; of two equally near steps, the lower loss.
        rival_losses: dict[str, float] = {}
        for rival in rivals:
            losses = self._losses.get(rival.key)
            if rival.key != key and losses:
                _, loss = min((abs(at - step), loss) for at, loss in losses.items())
                rival_losses[rival.label] = loss
        best = min(rival_losses, key=lambda label: rival_losses[label])
        stop = EarlyStop(
            rule=self._rule,
            step=step,
            num_steps=num_all,
            competitor=best,
            reason=(
                f"its validation loss is {self._losses[key][step]:.3f}, "
                f"{best} had {rival_losses[best]:.3f}"
            ),
        )
        self._beaten.add(key)
        self._queue.on_early_stop(key, stop)
        if self._stops:
            self._stops.ask(key)


def num_steps(trial: Trial) -> int:
    """Return the steps of a trial's whole training."""
    return trial.job.recipe.num_steps if trial.job else 0
