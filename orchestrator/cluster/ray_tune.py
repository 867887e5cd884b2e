"""Trials under Ray Tune: one worker runs directly in a Tune function, several as a Ray Train job.

A Ray Train job takes five times the start-up and three times the memory. A trial resumes from its
own folder, so Tune's snapshots, which miss their last seconds, are deleted. A trial that fails is
tried again a set number of times; then it is reported, and the others continue. Trials report
their validation losses to Tune, for its schedulers.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from orchestrator.cluster.asha_scheduler import LOSS, STEP, AshaByModel
from orchestrator.cluster.placement import Placement, trial_placement, worker_device
from orchestrator.cluster.ray import Signal, looks_for, ray_cluster
from orchestrator.cluster.train import FINAL_ERRORS, fit_job
from orchestrator.cluster.trial_search import TrialSearch
from orchestrator.cluster.tune_callback import ANSWER, TrialReport, TuneCallback
from orchestrator.planning.estimate import LEAST_SECONDS, out_of_memory_explained
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.terminal.stop import POLL_SECONDS, run_interruptibly, stop_requested, stop_when
from orchestrator.training.devices import World
from orchestrator.training.job import finished_outcome
from orchestrator.training.trainer import Report, run_job
from orchestrator.training.watching import JournalReader
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.journal import VALIDATION_METRIC

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray
import ray.exceptions
import ray.tune

tune: Any = ray.tune

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialContext:
    """Where a trial runs, and what may end its training early."""

    placement: Placement
    early_stop: Signal
    """Asks this trial's training to save and return."""
    cluster: ClusterSettings
    """How the trial's workers share a model."""

    @property
    def device(self) -> str:
        """Device of the trial's own process."""
        return worker_device(use_gpu=self.placement.use_gpu and self.placement.workers == 1)

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report a validation loss to Tune; returns when its scheduler has decided."""
        if VALIDATION_METRIC in numbers:
            tune.report({STEP: step, LOSS: numbers[VALIDATION_METRIC]})

    def train(self, job: TrainingJob, report: Report | None = None) -> TrainingOutcome:
        """Train a job here, or on the trial's workers; as `run_job`."""
        with stop_when(self.early_stop.is_sent):
            if self.placement.workers > 1:
                return train_with_workers(job, self.placement, self.cluster, report=report)
            world = World(device=self.device)
            with out_of_memory_explained(job, world):
                return run_job(job, world=world, report=report)

    def on_device(self, work: Callable[[str], T]) -> T:
        """Call a function with the name of one of the trial's devices, where that device is."""
        if self.placement.workers == 1 or not self.placement.use_gpu:
            return work(self.device)
        # The trial's own process has no GPU: its workers had them, and have ended.
        cpus = self.placement.cpus
        remote = ray.remote(num_cpus=cpus, num_gpus=1, scheduling_strategy="DEFAULT")
        try:
            answer: T = ray.get(remote(lambda: work(worker_device(use_gpu=True))).remote())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # Ray's own error has the traceback as its text.
        return answer


@dataclass(frozen=True, kw_only=True)
class TrialHooks:
    """Functions that `run_trials` calls in its own thread."""

    on_result: Callable[[TrialReport], None] = lambda _: None
    """Called for each trial, soon after it ended."""
    watch: Callable[[Collection[str]], None] = lambda _: None
    """Called a few times a second with the keys of the running trials, to show progress."""
    saved: Callable[[], str] = lambda: "finished trials are saved"
    """Says what unfinished trials have saved; called after a signal."""
    seconds_to_save: Callable[[Collection[str]], float] = lambda _: LEAST_SECONDS
    """Keys of the trials that run -> longest time until all are saved; called after a signal."""


TrialFunction = Callable[[dict[str, Any], TrialContext], dict[str, Any]]


def run_trials(
    function: TrialFunction,
    trials: Mapping[str, dict[str, Any]] | TrialSearch,
    storage: Path,
    sweep: SweepSettings | None = None,
    *,
    cluster: ClusterSettings | None = None,
    scheduler: AshaByModel | None = None,
    early_stops: Signal | None = None,
    hooks: TrialHooks | None = None,
) -> dict[str, TrialReport]:
    """Run trials under Ray Tune, as many at the same time as fit; return their reports by key.

    A failed trial does not end the others.

    Args:
        function: Importable function from parameters and context to a JSON-able result. It may be
            called again for the same trial after a crash; it resumes from what is on disk.
        trials: Key -> parameters of each trial, which JSON can hold; or what suggests them.
        storage: Folder for Tune's own files, which all nodes see; it is deleted at the end.
        cluster: How the workers of a trial share a model, and how long they wait for each other.
        scheduler: Gets the validation losses.
        early_stops: The part that is named as a trial asks its training to save and return.
        hooks: Show progress and collect results.

    Raises:
        UserError: If there are too few CPUs or GPUs for one trial.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    sweep, hooks = sweep or SweepSettings(), hooks or TrialHooks()
    num_trials = trials.source.num_left if isinstance(trials, TrialSearch) else len(trials)
    if not num_trials:
        return {}
    reports: dict[str, TrialReport] = {}
    with ray_cluster() as resources:
        placement = replace(
            trial_placement(sweep, num_trials, resources),
            collective_timeout_seconds=(cluster or ClusterSettings()).collective_timeout_seconds,
        )
        logger.info("trials: %s", placement)
        callback = TuneCallback(hooks.seconds_to_save)

        def deliver() -> None:
            for report in callback.new_reports():
                reports[report.key] = report
                hooks.on_result(report)
            hooks.watch(callback.running)

        def run() -> None:
            stops = {"stop": callback.stop, "early_stops": early_stops or Signal()}
            trainable = tune.with_parameters(
                _tune_trial,
                function=function,
                placement=placement,
                cluster=cluster or ClusterSettings(),
                **stops,
            )
            run_config = _run_config(storage, callback, sweep.max_failures_per_trial)
            _tuner(trainable, trials, placement, run_config, scheduler).fit()

        try:
            stop = callback.request_stop
            run_interruptibly(run, ask_to_stop=stop, saved=hooks.saved, watch=deliver)
        except Interrupted:
            deliver()  # Trials may have failed in the last moment.
            raise
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        deliver()
    return reports


def _run_config(storage: Path, callback: TuneCallback, max_failures: int) -> Any:
    return tune.RunConfig(
        name="tune",
        storage_path=str(storage),
        failure_config=tune.FailureConfig(max_failures=max_failures),
        callbacks=[callback],
        stop=callback,
        verbose=0,
    )


def _tuner(
    trainable: Any,
    trials: Mapping[str, dict[str, Any]] | TrialSearch,
    placement: Placement,
    run_config: Any,
    scheduler: AshaByModel | None,
) -> Any:
    search = trials if isinstance(trials, TrialSearch) else None
    space = {}
    if not isinstance(trials, TrialSearch):
        configs = [{"key": key, "parameters": json.dumps(own)} for key, own in trials.items()]
        space = {"trial": tune.grid_search(configs)}
    return tune.Tuner(
        tune.with_resources(trainable, placement.trial_resources),
        param_space=space,
        # The same processes serve one trial after another: 1 s a trial instead of 2 to 3.
        tune_config=tune.TuneConfig(
            max_concurrent_trials=placement.jobs_at_once,
            reuse_actors=True,
            search_alg=search,
            num_samples=-1 if search else 1,
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=run_config,
    )


def _tune_trial(
    config: dict[str, Any],
    *,
    function: TrialFunction,
    stop: Signal,
    early_stops: Signal,
    placement: Placement,
    cluster: ClusterSettings,
) -> None:
    torch.set_num_threads(placement.cpus * placement.workers)
    early_stop = early_stops.part(config["trial"]["key"])
    answer: dict[str, Any] = {}
    with (
        stop_when(looks_for(stop)),
    ):
        if not stop_requested():
            context = TrialContext(placement, early_stop, cluster)
            try:
                answer = {"result": function(json.loads(config["trial"]["parameters"]), context)}
            except Exception as error:
                if not (isinstance(error, FINAL_ERRORS) or stop_requested()):
                    raise  # It is tried again.
                is_known = isinstance(error, UserError | RunFailed)
                answer = {"text": str(error) if is_known else f"{type(error).__name__}: {error}"}
    # Also when nothing was begun: Tune prints a warning about a trial that ends without a report.
    tune.report({ANSWER: json.dumps(answer)})


def train_with_workers(
    job: TrainingJob,
    placement: Placement,
    cluster: ClusterSettings,
    *,
    report: Report | None = None,
) -> TrainingOutcome:
    """Train a job on a trial's workers, until its end or a stop; a finished one takes no time.

    The trial's own process reads losses from the journal that the first worker writes. If a worker
    dies, the trial fails and is tried again, which resumes from the newest checkpoint.

    Args:
        cluster: How the workers share the model.
        report: Called with the training step and its numbers.

    Raises:
        UserError: If the job cannot run as described.
        Diverged: If a loss is not finite.
        RunFailed: If a worker failed.
    """
    if outcome := finished_outcome(job):
        return outcome
    tail = JournalReader(job.folder)
    tail.read()  # Whoever resumes the trial has read what is there already.
    stop = Signal()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            fit_job,
            job,
            placement,
            stop=stop,
            parallel=cluster.parallel,
            shards=cluster.shards_of(placement.workers),
        )
        while not training.done():
            wait((training,), timeout=POLL_SECONDS)
            for record in tail.read():
                if report and record["kind"] == "metrics":
                    report(record["step"], record["values"])
            if stop_requested():
                stop.send()
    training.result()
    return finished_outcome(job) or TrainingOutcome(checkpoint=None, step=tail.step, finished=False)
