"""Training jobs under Ray Train, which starts a job's workers again when one dies.

A job resumes from its own folder, so Ray's own records, which a crash can damage, are deleted. A
worker that fails raises its error, which ends the others: they may wait for it for ever.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from orchestrator.cluster.devices import collective_backend, worker_device
from orchestrator.cluster.messages import Message, watch_messages
from orchestrator.cluster.node_wait import NodeWait, NodeWatch
from orchestrator.cluster.nodes import alive_nodes, wait_for_gpus
from orchestrator.cluster.placement import Placement, pretraining_placement
from orchestrator.cluster.preemption import own_node, watch_nodes
from orchestrator.cluster.process_group import PrivateTorchConfig
from orchestrator.cluster.resizing import SaveBeforeResize, SaveRequests
from orchestrator.cluster.running_jobs import (
    RunningJobs,
    journal_bytes,
    save_request,
    wait_message,
)
from orchestrator.cluster.start import ray_cluster
from orchestrator.planning.estimate import out_of_memory_explained, seconds_to_save
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.stop import stop_on_signals, stop_when
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.training.devices import World, gathered
from orchestrator.training.trainer import Diverged, run_job
from orchestrator.training.watching import describe_saved_state, jobs_to_train
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.layout import RAY_FOLDER, find_checkpoints

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray.exceptions
import ray.train.torch

train_api: Any = ray.train  # type checkers see the API before version 2 there

GROW_SECONDS = 300.0  # how often a job of variable size looks for nodes that have joined
FINAL_ERRORS = (UserError, Diverged, CheckpointWriteFailed)
"""Errors that trying again cannot help."""


def run_train_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings | None = None,
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs under Ray Train, as many at the same time as fit; finished ones take no time.

    Jobs that another process trains are waited for. The outcomes are in the order of the jobs.

    Args:
        jobs: What to train, each in a folder of its own; checked by `check_trainings`.
        watch: Called a few times a second, to show progress.
        note: Called with a sentence if another process or a node is waited for, or while saving.
        say: Called with a sentence when Ray starts.

    Raises:
        UserError: If there are too few CPUs or GPUs, or a job cannot run as described.
        Diverged: If a loss is not finite.
        RunFailed: If a job failed too often. The others have ended before.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    cluster = cluster or ClusterSettings()
    outcomes: dict[str, TrainingOutcome] = {}
    with closing(jobs_to_train(jobs, outcomes, watch=watch, note=note)) as parts:
        for ours in parts:
            stop = Message()
            ray_runs = ray_cluster(cluster, folder=ours[0].folder.parent, say=say)
            with ray_runs as resources, stop_on_signals():
                if cluster.wait_for_gpus:
                    wait_for_gpus(cluster.fewest_gpus, note)
                    resources = replace(resources, nodes=alive_nodes())
                placement = pretraining_placement(cluster, len(ours), resources)
                pool = ThreadPoolExecutor(placement.jobs_at_once)
                fit = partial(
                    fit_job,
                    placement=placement,
                    stop=stop,
                    parallel=cluster.parallel,
                    shards=cluster.num_shards,
                    max_failures=cluster.max_failures,
                    node_wait_minutes=cluster.node_wait_minutes,
                )
                running = RunningJobs(ours, stop, note)
                trainings = [*map(partial(pool.submit, fit), ours)]
                pool.shutdown(wait=False)  # It runs what was submitted, and ends.
                running.wait_for(trainings, watch)
    return [outcomes[job.run_folder] for job in jobs]


def fit_job(
    job: TrainingJob,
    placement: Placement,
    *,
    stop: Message,
    parallel: Literal["ddp", "fsdp"] | None = None,
    shards: int | None = None,
    max_failures: int = 0,
    node_wait_minutes: float | None = None,
) -> None:
    """Run one job in the Ray that runs already, from the driver or inside a trial.

    Nothing is started if the job was asked to stop. The caller watches for signals, and reads the
    outcome from the job's folder.

    Args:
        stop: Asks the workers to save and return.
        parallel: `ddp`, each worker has the whole model, or `fsdp`, they share it; None for `ddp`
            if the settings offer no choice.
        shards: With `fsdp`, workers that share one copy of the model; None for all.
        max_failures: How often it is started again after a worker died, without a new checkpoint.
        node_wait_minutes: Longest wait for a node that replaces a lost one; None waits for ever.

    Raises:
        UserError: If the job cannot run as described, or does not fit into its workers' memory.
        Diverged: If a loss is not finite.
        RunFailed: If it failed too often.
    """
    if stop.is_posted():
        return
    storage = job.folder / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)
    trainer = train_api.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "stop": stop,
            "num_threads": placement.cpus,
            "parallel": parallel,
            "shards": shards,
            "use_gpu": placement.use_gpu,
        },
        scaling_config=_scaling_config(placement),
        torch_config=PrivateTorchConfig(
            backend=collective_backend(use_gpu=placement.use_gpu),
            timeout_s=placement.collective_timeout_seconds,
        ),
        run_config=train_api.RunConfig(
            name="train",
            storage_path=str(storage),
            # `FailureLimit` limits the failures of workers, and `NodeWatch` all others.
            failure_config=train_api.FailureConfig(-1, controller_failure_limit=-1),
            logging_config=train_api.LoggingConfig(log_level="WARNING"),
            callbacks=[
                FailureLimit(job.folder, stop.is_posted, max_failures),
                NodeWatch(
                    NodeWait(has_started=journal_bytes(job) > 0, minutes=node_wait_minutes),
                    placement,
                    announce=wait_message(stop, job),
                    name=job.folder.name,
                ),
                SaveBeforeResize(
                    job.folder, save_request(stop, job), seconds=seconds_to_save([job])
                ),
            ],
        ),
    )
    try:
        with _failures_of(job):
            trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


@contextmanager
def _failures_of(job: TrainingJob) -> Iterator[None]:
    try:
        yield
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        cause = getattr(error, "controller_failure", None)
        if isinstance(cause, FINAL_ERRORS):
            raise cause from None
        text = f"training in {job.folder} failed: {failure_reason(error)}"
        if isinstance(error, ray.exceptions.RayError):  # Ray's controller died, not the training.
            text += f"; {describe_saved_state({'': job})}; run the same command again to resume"
        raise RunFailed(text) from error


def _scaling_config(placement: Placement) -> Any:
    fewest, most = placement.min_workers, placement.workers
    return train_api.ScalingConfig(
        num_workers=(fewest, most) if fewest else most,
        use_gpu=placement.use_gpu,
        resources_per_worker=placement.worker_resources,
        placement_strategy=placement.strategy,
        elastic_resize_monitor_interval_s=GROW_SECONDS,
    )


def _train_worker(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["num_threads"])
    context = ray.train.get_context()
    job = TrainingJob.model_validate(config["job"])
    stop: Message = config["stop"]
    save = save_request(stop, job)
    with watch_messages(stop, save) as inbox, stop_when(partial(inbox.has, stop)):
        requests = SaveRequests(inbox, save)
        world = World(
            rank=context.get_world_rank(),
            size=context.get_world_size(),
            device=_train_device(use_gpu=config["use_gpu"]),
            parallel=config["parallel"] or "ddp",
            shards=config["shards"],
        )
        with (
            out_of_memory_explained(job, world, config["parallel"]),
            watch_nodes(gathered(own_node(), world)) as notices,
        ):
            run_job(
                job,
                world=world,
                should_save=lambda: notices.take() or requests.take(),
            )


class FailureLimit(train_api.UserCallback):  # type: ignore[misc]
    """Decides, in Ray's controller, whether a job whose workers failed is started again.

    It is not if trying again cannot help, and after too many failures without a new checkpoint.
    """

    def __init__(
        self, run_folder: Path, is_stopping: Callable[[], bool], max_failures: int
    ) -> None:
        """Watch a job that writes checkpoints to `run_folder`."""
        self._run_folder, self._is_stopping = run_folder, is_stopping
        self._max_failures, self._num_failures = max_failures, 0
        self._newest = find_checkpoints(run_folder)[-1:]

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raise the workers' error if it ends the job: errors of callbacks are not tried again."""
        errors = worker_exceptions.values()
        for error in errors:
            if isinstance(error, FINAL_ERRORS):
                raise error
        # Of a worker that died; the others then fail because they lost the connection to it.
        deaths = [e.health_check_failure for e in errors if hasattr(e, "health_check_failure")]
        if any(getattr(death, "preempted", False) for death in deaths):
            return  # A loss that was announced.
        newest = find_checkpoints(self._run_folder)[-1:]
        self._num_failures = 1 if newest != self._newest else self._num_failures + 1
        self._newest = newest
        if self._is_stopping() or self._num_failures > self._max_failures:
            raise next(iter([*deaths, *errors]))


def _train_device(*, use_gpu: bool) -> str:
    if worker_device(use_gpu=use_gpu) == "cpu":
        return "cpu"
    # The workers of one node see all of their GPUs; Ray knows which one is whose.
    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return str(device)


def failure_reason(error: BaseException) -> str:
    """Say in one line what went wrong in a worker; the line is stored with the results."""
    if isinstance(error, ray.train.WorkerGroupError) and error.worker_failures:
        error = next(iter(error.worker_failures.values()))
    if isinstance(error, ray.train.ControllerError):
        error = error.controller_failure
    error = getattr(error, "cause", None) or error
    return first_line(error, with_type=not isinstance(error, RunFailed))
