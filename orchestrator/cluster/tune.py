"""Trials under Ray Tune: it asks for them one by one, starts them where there is room, and tries
those that fail again.

A queue decides which trial is next, and hears how each one ended. It holds as many as find a place
on the nodes that are there now, so nodes that join later get trials, too. A trial with one worker
runs directly in a Tune function; one with several is a Ray Train job, which takes five times the
start-up and three times the memory. A trial resumes from its own folder, so Tune's snapshots, which
miss their last seconds, are deleted.

Ray ends processes when memory runs low, whoever takes it. Tune then loses trials, and often ends
itself. It is started again with what is left; such an end is no failure of a trial.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Protocol, TypeVar

import torch

from orchestrator.cluster.places import Placement, Signal, job_placement, worker_device
from orchestrator.cluster.ray import ray_cluster
from orchestrator.cluster.train import FINAL_ERRORS, JobRun, failure_reason
from orchestrator.planning.estimate import out_of_memory_explained
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import AshaRule, EarlyStop, Trial
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.terminal.render import join_names
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    run_interruptibly,
    stop_requested,
    stop_when,
    wait_interruptibly,
)
from orchestrator.training.job import finished_outcome
from orchestrator.training.trainer import Report, run_job
from orchestrator.training.watching import JournalReader
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.journal import VALIDATION_METRIC
from orchestrator.workspace.layout import STOPPED_NAME

# isort: split
# After our own modules; imported within `ray_cluster`, which sets the environment that Ray reads.
import ray
import ray.exceptions
import ray.tune
import ray.tune.schedulers
import ray.tune.search

tune: Any = ray.tune
schedulers: Any = ray.tune.schedulers
search: Any = ray.tune.search

T = TypeVar("T")
STEP, LOSS, ANSWER = "step", "validation_loss", "answer"
"""What a trial reports to Tune: its validations, and last how it ended."""

RESTART_PAUSES_SECONDS = (5.0, 20.0, 60.0)
"""Pauses before Tune is started again because memory ran low: others often free it soon."""
MAX_NAMED_PROCESSES = 3

logger = logging.getLogger(__name__)
# At its end, Tune would warn of each trial that has no file of results; they are switched off.
logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)


class TrialQueue(Protocol):
    """The trials of a sweep, in the order in which they start. Tune's thread calls the first five,
    the thread of `run_trials` the others.
    """

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

    def on_end(self, key: str, result: Trial | None, error: str) -> None:
        """Note how a trial ended: with a result, an error, or unfinished without either."""

    def start_again(self, reason: str) -> None:
        """Put the trials back that were taken and have not ended, and say why; Tune has ended."""

    def watch(self) -> None:
        """Called a few times a second."""

    def saved(self) -> str:
        """Say what is finished and saved; called after a signal."""

    def begin_saving(self) -> bool:
        """Say what the running trials save, and return whether there are any; called after a
        signal."""


@dataclass(frozen=True)
class TrialPlace:
    """Where a trial runs."""

    placement: Placement
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
        """Train a job here, or on the trial's workers, whose first one writes losses; as `run_job`.

        If a worker dies, the trial fails and is tried again, from its newest checkpoint.
        """
        num_workers = self.placement.workers
        if num_workers == 1:
            world = World(device=self.device)
            with out_of_memory_explained(job, world):
                return run_job(job, world=world, report=report)
        if outcome := finished_outcome(job):
            return outcome
        tail = JournalReader(job.folder)
        tail.read()  # What is there already was reported before.
        shards = self.cluster.shards_of(num_workers)
        cluster = self.cluster.model_copy(update={"num_shards": shards, "max_failures": 0})
        run = JobRun(job, self.placement, cluster, Signal())
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(run.fit)
            while not training.done():
                wait((training,), timeout=POLL_SECONDS)
                for record in tail.read():
                    if report and record["kind"] == "metrics":
                        report(record["step"], record["values"])
                if stop_requested():
                    run.stop.send()
        training.result()
        unfinished = TrainingOutcome(checkpoint=None, step=tail.step, finished=False)
        return finished_outcome(job) or unfinished

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


TrialFunction = Callable[[Trial, TrialPlace], Trial | None]
"""Importable function that returns a trial with its result; None if it is not finished."""


def run_trials(
    function: TrialFunction,
    queue: TrialQueue,
    storage: Path,
    sweep: SweepSettings,
    cluster: ClusterSettings,
    *,
    num_trials: int,
    scheduler: AshaByModel | None = None,
) -> None:
    """Run the trials of a queue under Ray Tune, as many at the same time as fit.

    A trial that fails is tried again `sweep.max_failures_per_trial` times, and does not end the
    others. The function resumes from what is on disk. When Ray has ended a trial because memory
    ran low, no other starts until the running ones have ended; then, after a pause, what is left
    starts again.

    Args:
        storage: Folder for Tune's own files, which all nodes see; it is deleted at the end.
        num_trials: Trials that can start at once; on CPUs, they share all of them.
        scheduler: Gets the validation losses.

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
        trainable = tune.with_parameters(
            _run_in_tune, function=function, place=TrialPlace(placement, cluster), stop=stop
        )
        # As many trials may wait for their processes as the queue gives.
        os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")

        def fit(suggester: _Suggester, listener: _Listener) -> None:
            tuner = tune.Tuner(
                tune.with_resources(trainable, placement.trial_resources),
                tune_config=tune.TuneConfig(
                    # The same processes serve one trial after another: 1 s instead of 2 to 3.
                    reuse_actors=True,
                    search_alg=suggester,
                    num_samples=-1,
                    scheduler=scheduler,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(storage),
                    failure_config=tune.FailureConfig(max_failures=sweep.max_failures_per_trial),
                    callbacks=[listener],
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            except Exception as error:
                if not is_memory_shortage(str(error)):
                    raise
                listener.shortage = str(error)

        def ask_to_stop(suggester: _Suggester) -> bool:
            suggester.is_stopping = True
            stop.send()
            return queue.begin_saving()

        for pause in (*RESTART_PAUSES_SECONDS, None):
            suggester = _Suggester(queue, placement, sweep.trials_at_once)
            listener = _Listener(queue, suggester)
            try:
                run_interruptibly(
                    partial(fit, suggester, listener),
                    ask_to_stop=partial(ask_to_stop, suggester),
                    saved=queue.saved,
                    watch=queue.watch,
                )
            finally:
                shutil.rmtree(storage, ignore_errors=True)
            if queue.is_over or not listener.shortage:
                return
            logger.warning("Ray ended trials: %s", listener.shortage)
            reason = f"memory ran low ({describe_shortage(listener.shortage)})"
            if pause is None:
                raise RunFailed(
                    f"Ray ended trials {len(RESTART_PAUSES_SECONDS) + 1} times because {reason}; "
                    "end other programs, or set sweep.trials_at_once lower, and run the same "
                    "command again to resume"
                )
            queue.start_again(f"Ray ended trials because {reason}; what is left starts again")
            over_at = time.monotonic() + pause
            wait_interruptibly(partial(_is_past, over_at), watch=queue.watch)


def _is_past(when: float) -> bool:
    return time.monotonic() >= when


def _run_in_tune(
    config: dict[str, Any], *, function: TrialFunction, place: TrialPlace, stop: Signal
) -> None:
    torch.set_num_threads(place.placement.cpus * place.placement.workers)
    result, text = None, ""
    with stop_when(stop.is_sent):
        if not stop_requested():
            try:
                result = function(Trial.model_validate_json(config["trial"]), place)
            except Exception as error:
                if not (isinstance(error, FINAL_ERRORS) or stop_requested()):
                    raise  # Tune tries it again.
                is_known = isinstance(error, UserError | RunFailed)
                text = str(error) if is_known else f"{type(error).__name__}: {error}"
    tune.report({ANSWER: json.dumps([result and result.model_dump(mode="json"), text])})


class _Suggester(search.Searcher):  # type: ignore[misc]
    """Gives Tune the trials of a queue, as many at the same time as the nodes hold now."""

    def __init__(self, queue: TrialQueue, placement: Placement, most: int | None) -> None:
        super().__init__()
        self.is_stopping = False
        self._queue, self._placement, self._most = queue, placement, most or math.inf

    def __reduce__(self) -> tuple[Any, ...]:
        return search.Searcher, ()  # Tune pickles it to restore it, and nothing is restored.

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002 - trials have keys of their own
        if self.is_stopping or self._queue.is_over:
            return search.Searcher.FINISHED
        if self._queue.num_taken >= min(self._most, self._placement.num_places()):
            return None
        trial = self._queue.take()
        return trial and {"key": trial.key, "trial": json.dumps(trial.model_dump(mode="json"))}

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        pass  # `_Listener` hears more of it.

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class _Listener(tune.Callback):  # type: ignore[misc]
    """Tells a queue how its trials start and end. Tune calls it with keyword arguments."""

    def __init__(self, queue: TrialQueue, suggester: _Suggester) -> None:
        self._queue, self._suggester = queue, suggester
        self._short_of_memory: set[str] = set()
        """Keys of trials that Ray has ended because memory ran low."""
        self.shortage = ""
        """What Ray said of the last of them, or when Tune itself ended; empty if there was none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def on_trial_start(self, *_: Any, trial: Any, **__: Any) -> None:
        self._queue.on_start(trial.config["key"])

    def on_trial_complete(self, *_: Any, trial: Any, **__: Any) -> None:
        found, error = json.loads((trial.last_result or {}).get(ANSWER, '[null, ""]'))
        self._queue.on_end(trial.config["key"], found and Trial.model_validate(found), error)

    def on_trial_recover(self, *_: Any, trial: Any, **__: Any) -> None:
        self._look_for_shortage(trial)

    def on_trial_error(self, *_: Any, trial: Any, **__: Any) -> None:
        self._look_for_shortage(trial)
        key = trial.config["key"]
        # Tune counted the ends for want of memory as failures. The next Tune counts anew.
        if key not in self._short_of_memory:
            self._queue.on_end(key, None, failure_reason(_trial_error(trial)))

    def _look_for_shortage(self, trial: Any) -> None:
        text = str(_trial_error(trial))
        if is_memory_shortage(text):
            self._short_of_memory.add(trial.config["key"])
            self._suggester.is_stopping = True
            self.shortage = text


def _trial_error(trial: Any) -> Exception:
    """Return the last error of a trial.

    Tune writes the text of each error into a file, after a line that counts it. It pickles those
    that functions raised, and those of actors that died, but no others.
    """
    path = Path(trial.error_file)
    texts = re.split(r"^Failure # .*\n", path.read_text() if path.is_file() else "", flags=re.M)
    text = texts[-1].strip() or "Ray ended its process and gave no reason"
    pickled = trial.pickled_error_file
    if pickled and Path(pickled).is_file():
        error: Exception = pickle.loads(Path(pickled).read_bytes())
        if str(error).strip() == text:  # Else it is an earlier one.
            return error
    return RunFailed(text)


def is_memory_shortage(text: str) -> bool:
    """Return whether an error says that Ray ended a process because memory ran low."""
    return "running low on memory" in text


def describe_shortage(text: str) -> str:
    """Return the memory and the largest processes that Ray's error about a shortage names."""
    memory = re.search(r"([\d.]+) ?GB(?: used)? / ([\d.]+) ?GB", text)
    facts = [f"{memory[1]} of {memory[2]} GB were used"] if memory else []
    # Lines of process, gigabytes and command; the words of a command may hold secrets.
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

    Only learning rates of the same model compete. A worse trial is not killed: the reason is
    written into its folder, where it looks after each validation; it saves its state and returns,
    so its workers and its lock are free.
    """

    def __init__(self, rule: AshaRule, models: Sequence[Sequence[Trial]]) -> None:
        """Prepare a bracket for each model; `models` are its trials."""
        super().__init__()
        self._rule, self._losses = rule, defaultdict[str, dict[int, float]](dict)
        self._trials = {trial.key: trial for own in models for trial in own}
        self._rivals = {trial.key: own for own in models for trial in own}
        self._brackets: dict[str, Any] = {}
        self._first_starts: dict[str, Any] = {}
        """Key -> Tune's trial when it first started; later starts are the same competitor."""
        for own in models:
            num_all = num_steps(own[0])
            bracket = schedulers.ASHAScheduler(
                time_attr=STEP,
                metric=LOSS,
                mode="min",
                max_t=num_all,
                grace_period=max(1, math.ceil(rule.first_rung * num_all)),
                reduction_factor=rule.reduction_factor,
                stop_last_trials=False,
            )
            self._brackets |= {trial.key: bracket for trial in own}

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Add a trial to the bracket of its model."""
        key = trial.config["key"]
        if key in self._brackets and key not in self._first_starts:
            self._first_starts[key] = trial
            self._brackets[key].on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide about a trial after a validation; to Tune, it always continues.

        The reason for its end names the competitor with the lowest loss by then.
        """
        key, loss = trial.config["key"], result.get(LOSS, math.nan)
        # A loss that is not finite ends its training by itself.
        if key not in self._brackets or not math.isfinite(loss):
            return str(schedulers.TrialScheduler.CONTINUE)
        step, num_all = result[STEP], num_steps(self._trials[key])
        self._losses[key][step] = loss
        first_start = self._first_starts[key]
        decision = self._brackets[key].on_trial_result(controller, first_start, result)
        if decision == schedulers.TrialScheduler.STOP and step < num_all:
            rivals = {
                rival.label: min((abs(at - step), value) for at, value in losses.items())[1]
                for rival in self._rivals[key]
                if (losses := self._losses.get(rival.key))
            }
            best = min(rivals, key=lambda label: rivals[label])
            stop = EarlyStop(
                rule=self._rule,
                step=step,
                num_steps=num_all,
                competitor=best,
                reason=f"its validation loss is {loss:.3f}, {best} had {rivals[best]:.3f}",
            )
            stop.write(Path(self._trials[key].folder) / STOPPED_NAME)
        return str(schedulers.TrialScheduler.CONTINUE)


def num_steps(trial: Trial) -> int:
    """Return the steps of a trial's whole training."""
    return trial.job.recipe.num_steps if trial.job else 0
