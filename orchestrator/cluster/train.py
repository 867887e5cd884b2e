"""Training jobs under Ray Train.

A job resumes from its own folder, so Ray's own records, which a crash can damage, are deleted. Ray
would start workers again also after a mistake that trying again cannot help, and it would wait for
a place without an end. So Ray makes one attempt at a time, and `fit_job` decides about the next. A
worker that fails raises its error, which ends the others: they may wait for it for ever.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from orchestrator.cluster.nodes import alive_nodes
from orchestrator.cluster.placement import (
    Placement,
    pretraining_placement,
    use_fake_gpus,
    worker_device,
)
from orchestrator.cluster.ray import (
    PLACEMENT_SECONDS,
    WATCHER_SWITCH,
    Signal,
    asked_places,
    looks_for,
    ray_cluster,
    wait_for_gpus,
)
from orchestrator.planning.estimate import out_of_memory_explained, seconds_to_save
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.render import format_duration
from orchestrator.terminal.stop import stop_on_signals, stop_when, wait_for_work
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.training.devices import World
from orchestrator.training.trainer import Diverged, run_job
from orchestrator.training.watching import describe_saved_state, jobs_to_train
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.journal import JOURNAL_NAME
from orchestrator.workspace.layout import RAY_FOLDER, find_checkpoints

GROW_SECONDS = 300.0
"""How often a job of variable size looks for nodes that have joined."""
FIRST_START_SECONDS = 300.0
"""Longest wait for the first place: somebody sits at the terminal. Later, a node may be lost at
night, and `cluster.node_wait_minutes` says how long its replacement is waited for."""
MAX_FAILED_STARTS = 3
"""Starts in a row that fail although there was a place, such as on a node that has just died."""
NOTICE_SECONDS = 2.0
"""How often workers ask whether one of their nodes will be taken away."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables for the network interface of PyTorch's backends; a user's own value stays."""
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
            ray_runs = ray_cluster(cluster, folder=ours[0].folder.parent, say=say)
            with ray_runs as resources, stop_on_signals():
                if cluster.wait_for_gpus:
                    wait_for_gpus(cluster.fewest_gpus, note)
                    resources = replace(resources, nodes=alive_nodes())
                placement = pretraining_placement(cluster, len(ours), resources)
                _run_together(ours, placement, cluster, watch, note)
    return [outcomes[job.run_folder] for job in jobs]


def _run_together(
    jobs: Sequence[TrainingJob],
    placement: Placement,
    cluster: ClusterSettings,
    watch: Callable[[], None] | None,
    note: Callable[[str], None] | None,
) -> None:
    """Run each job in a thread until all have ended; after a signal, ask them to save."""
    stop = Signal()
    sizes = {job.run_folder: _journal_bytes(job) for job in jobs}
    waits: dict[str, str] = {}  # Run folder -> what the job waits for; empty while it runs.
    said: dict[str, str] = {}

    def show() -> None:
        for folder, text in [*waits.items()]:
            if note and text and text != said.get(folder):
                note(text)
            said[folder] = text
        if watch:
            watch()

    def ask_to_stop() -> float:
        stop.send()
        # A job that waits for a node has nothing to save, nor one that has written nothing yet.
        begun = [
            job
            for job in jobs
            if not waits.get(job.run_folder) and _journal_bytes(job) > sizes[job.run_folder]
        ]
        return seconds_to_save(begun, note) if begun else 0.0

    pool = ThreadPoolExecutor(placement.jobs_at_once)
    trainings = [
        pool.submit(
            fit_job,
            job,
            placement,
            stop=stop,
            parallel=cluster.parallel,
            shards=cluster.num_shards,
            max_failures=cluster.max_failures,
            node_wait_minutes=cluster.node_wait_minutes,
            announce=partial(waits.__setitem__, job.run_folder),
        )
        for job in jobs
    ]
    pool.shutdown(wait=False)  # It runs what was submitted, and ends.
    saved = partial(describe_saved_state, {job.folder.name: job for job in jobs})
    wait_for_work(trainings, ask_to_stop=ask_to_stop, saved=saved, watch=show)


def _journal_bytes(job: TrainingJob) -> int:
    path = job.folder / JOURNAL_NAME
    return path.stat().st_size if path.exists() else 0


def fit_job(
    job: TrainingJob,
    placement: Placement,
    *,
    stop: Signal,
    parallel: Literal["ddp", "fsdp"] | None = None,
    shards: int | None = None,
    max_failures: int = 0,
    node_wait_minutes: float | None = None,
    announce: Callable[[str], object] = lambda _: None,
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
        announce: Called with what the job waits for, and with an empty text when it starts.

    Raises:
        UserError: If the job cannot run as described, or does not fit into its workers' memory.
        Diverged: If a loss is not finite.
        RunFailed: If it failed too often, or waited too long.
    """
    import ray.exceptions
    import ray.train

    train: Any = ray.train  # Type checkers see the API before version 2 there.
    failed = f"training in {job.folder} failed: "
    newest, num_failures, num_failed_starts = find_checkpoints(job.folder)[-1:], 0, 0
    while _find_place(job, placement, stop, node_wait_minutes, announce):
        size = _journal_bytes(job)
        try:
            _trainer(job, placement, stop, parallel, shards).fit()
            return
        except train.PreemptionError:
            continue  # A loss that was announced.
        except train.ControllerError as error:
            num_failed_starts = 1 if _journal_bytes(job) > size else num_failed_starts + 1
            if num_failed_starts > MAX_FAILED_STARTS:
                reason = f"the workers did not start: {failure_reason(error)}"
                raise RunFailed(failed + reason) from error
        except train.WorkerGroupError as error:
            errors = [*error.worker_failures.values()]
            # Of a worker that died; the others then fail because they lost the connection to it.
            deaths = [d for e in errors if (d := getattr(e, "health_check_failure", None))]
            for final in errors:
                if isinstance(final, FINAL_ERRORS):
                    raise final from None
            if any(getattr(death, "preempted", False) for death in deaths):
                continue
            before, newest = newest, find_checkpoints(job.folder)[-1:]
            num_failures = 1 if newest != before else num_failures + 1
            if num_failures > max_failures or stop.is_sent():
                raise RunFailed(failed + failure_reason([*deaths, *errors][0])) from error
        except ray.exceptions.RayError as error:  # Ray's controller died, not the training.
            saved = describe_saved_state({"": job})
            reason = f"{failure_reason(error)}; {saved}; run the same command again to resume"
            raise RunFailed(failed + reason) from error
        finally:
            shutil.rmtree(job.folder / RAY_FOLDER, ignore_errors=True)


def _find_place(
    job: TrainingJob,
    placement: Placement,
    stop: Signal,
    minutes: float | None,
    announce: Callable[[str], object],
) -> bool:
    """Wait until as many workers as the job needs find a place; return False after a stop.

    Raises:
        RunFailed: If it has waited for too long.
    """
    import ray

    is_first = not _journal_bytes(job)
    seconds = FIRST_START_SECONDS if is_first else math.inf if minutes is None else 60 * minutes
    num_workers = placement.min_workers or placement.workers
    kind, each = ("GPU", placement.gpus) if placement.use_gpu else ("CPU", placement.cpus)
    is_stopped, begun = looks_for(stop), time.monotonic()
    failed = f"training in {job.folder} failed: "
    with asked_places([placement.worker_resources] * num_workers, placement.strategy) as group:
        while not is_stopped() and not group.wait(PLACEMENT_SECONDS):
            free = ray.available_resources().get(kind, 0.0)  # type: ignore[no-untyped-call]
            needed = num_workers * each
            found = f"{min(free, needed):g} of {needed:g} {kind}s are free"
            announce(f"{job.folder.name} waits for a place: {found}")
            if time.monotonic() - begun < seconds:
                continue
            if is_first:
                raise RunFailed(
                    f"{failed}there was no place for {format_duration(seconds)} ({found}); wait "
                    "until others have finished, or ask for fewer"
                )
            raise RunFailed(
                f"{failed}no node replaced a lost one within {minutes:g} min ({found}); add a node "
                "and run the same command again, or raise cluster.node_wait_minutes"
            )
    announce("")
    return not is_stopped()


def _trainer(
    job: TrainingJob,
    placement: Placement,
    stop: Signal,
    parallel: Literal["ddp", "fsdp"] | None,
    shards: int | None,
) -> Any:
    """Return a trainer that starts the workers of a job once, and waits until they end."""
    import ray.train.backend
    import ray.train.torch

    class SharedGpus(ray.train.backend.Backend):
        """Each worker sees all GPUs of the job on its node, so that NCCL can connect them."""

        share_cuda_visible_devices = True

    class OwnRendezvous(ray.train.torch.TorchConfig):
        """The workers connect themselves; Ray would listen on every address of the machine."""

        @property
        def backend_cls(self) -> Any:
            return SharedGpus

    train: Any = ray.train
    fewest, most = placement.min_workers, placement.workers
    storage = job.folder / RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)
    meeting = storage / "meeting"
    meeting.mkdir(parents=True, mode=0o700)
    return train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "stop": stop,
            "placement": placement,
            "parallel": parallel,
            "shards": shards,
            "meeting": meeting,
        },
        scaling_config=train.ScalingConfig(
            num_workers=(fewest, most) if fewest else most,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.worker_resources,
            placement_strategy=placement.strategy,
            elastic_resize_monitor_interval_s=GROW_SECONDS,
        ),
        torch_config=OwnRendezvous(),
        run_config=train.RunConfig(
            name="train",
            storage_path=str(storage),
            failure_config=train.FailureConfig(
                max_failures=0, controller_failure_limit=1, max_preemption_failures=0
            ),
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _train_worker(config: dict[str, Any]) -> None:
    """Run in each worker of a job."""
    import ray.train

    context = ray.train.get_context()
    job, placement = TrainingJob.model_validate(config["job"]), config["placement"]
    torch.set_num_threads(placement.cpus)
    device = worker_device(use_gpu=placement.use_gpu)
    if device != "cpu":
        # The workers of one node see all of their GPUs; Ray knows which one is whose.
        device = str(ray.train.torch.get_device())
        torch.cuda.set_device(device)
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        parallel=config["parallel"] or "ddp",
        shards=config["shards"],
    )
    if world.size > 1:
        _meet(world, placement, config["meeting"], context.get_local_world_size() == world.size)
    noticed = threading.Event()

    def take_notice() -> bool:
        is_new = noticed.is_set()
        noticed.clear()
        return is_new

    if os.environ.get(WATCHER_SWITCH) != "0":
        threading.Thread(target=_wait_for_notice, args=(noticed,), daemon=True).start()
    with (
        stop_when(looks_for(config["stop"])),
        out_of_memory_explained(job, world, config["parallel"]),
    ):
        run_job(job, world=world, should_save=take_notice)


def _wait_for_notice(noticed: threading.Event) -> None:
    """Wait until Ray says that a worker's node will be taken away, such as a spot instance.

    All workers ask the same number of times: Ray answers once all have asked.
    """
    import ray.train

    train: Any = ray.train
    while train.get_preemption_info() is None:
        time.sleep(NOTICE_SECONDS)
    noticed.set()


def _meet(world: World, placement: Placement, folder: Path, is_one_machine: bool) -> None:
    """Connect the workers of a job; those of one machine talk over loopback.

    Workers of one machine find each other through a file that only this user can read; the driver
    deletes it. The group is never taken apart: with NCCL, that may wait for a worker that has died.
    """
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    address = f"file://{folder / uuid.uuid4().hex}"
    if not is_one_machine:
        with socket.socket() as free:
            free.bind(("", 0))
            own: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            address = f"tcp://{own}:{free.getsockname()[1]}"
    elif loopback := _loopback():
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, loopback)
    torch.distributed.init_process_group(
        "nccl" if placement.use_gpu and not use_fake_gpus() else "gloo",
        init_method=broadcast_from_rank_zero(address),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=placement.collective_timeout_seconds),
    )


def _loopback() -> str | None:
    """Return the name of the loopback interface: `lo` on Linux, `lo0` on macOS."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return None


def failure_reason(error: BaseException) -> str:
    """Say in one line what went wrong in a worker; the line is stored with the results."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    for name in ("controller_failure", "cause"):
        error = getattr(error, name, None) or error
    return first_line(error, with_type=not isinstance(error, RunFailed))
