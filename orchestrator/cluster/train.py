"""Training jobs under Ray Train.

A job resumes from its own folder, so Ray's own records, which a crash can damage, are deleted. Ray
would start workers again even after errors that a retry cannot help, and would wait for a slot
without a limit. So Ray makes one attempt at a time, and `JobRun` decides about the next one. A
worker that fails raises its error, which ends the others: otherwise they might wait for it for
ever.
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
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from orchestrator.cluster.placement import (
    PLACEMENT_SECONDS,
    Placement,
    Signal,
    job_placement,
    reserved_slots,
    worker_device,
)
from orchestrator.cluster.ray import WATCHER_SWITCH, ray_cluster
from orchestrator.planning.estimate import note_saving
from orchestrator.planning.fit import out_of_memory_explained, sequences_if_uncompiled
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.render import format_duration
from orchestrator.terminal.stop import start_thread, stop_on_signals, stop_when, wait_for_work
from orchestrator.training.checkpoint import CheckpointWriteFailed
from orchestrator.training.run_locks import describe_saved_state, jobs_to_train
from orchestrator.training.trainer import Diverged, run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.journal import JOURNAL_NAME
from orchestrator.workspace.layout import RAY_FOLDER, find_checkpoints

GROW_SECONDS = 300.0
"""How often a job of variable size looks for new nodes."""
FIRST_START_SECONDS = 300.0
"""Longest wait for the first slot: somebody sits at the terminal. Later, a node may be lost at
night, and `cluster.node_wait_minutes` says how long to wait for its replacement."""
NOTICE_SECONDS = 2.0
"""How often workers ask whether the loss of one of their nodes was announced."""
MAX_FAILED_STARTS = 3
"""Consecutive starts that may fail although a slot was free, such as on a node that just died."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables for the network interface of PyTorch's backends; a user's own value stays."""
HANG_FOLDER = "hang_detector"
"""Folder with the workers' stacks after a hang of NCCL: first in Ray's folder, then in the
run's."""
FINAL_ERRORS = (UserError, Diverged, CheckpointWriteFailed)
"""Errors that a retry would raise again."""


def run_train_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings | None = None,
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
    failed: Callable[[TrainingJob, Exception], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs under Ray Train, as many at the same time as fit; finished ones take no time.

    If another process trains a job, this waits for it. The outcomes are in the order of the jobs.

    Args:
        jobs: What to train, each in a folder of its own; checked by `check_trainings`.
        watch: Called a few times a second, to show progress.
        note: Called with a sentence at a wait for another process or a node, and while saving.
        failed: Called with a job that has failed, and its error; the others continue.
        say: Called with a sentence when Ray starts.

    Raises:
        UserError: If there are too few CPUs or GPUs, or a job cannot run as described.
        Diverged: If a loss is not finite.
        RunFailed: If a job failed too often, or several failed; has the reason of each. All jobs
            have ended by then.
        Interrupted: After Ctrl-C or SIGTERM.
    """
    cluster = cluster or ClusterSettings()
    outcomes: dict[str, TrainingOutcome] = {}
    with closing(jobs_to_train(jobs, outcomes, watch=watch, note=note)) as parts:
        for jobs_of_part in parts:
            ray_runs = ray_cluster(cluster, folder=jobs_of_part[0].folder.parent, say=say)
            with ray_runs as resources, stop_on_signals():
                placement = job_placement(
                    len(jobs_of_part),
                    cluster.num_workers,
                    cluster.num_gpus,
                    resources,
                    min_gpus=cluster.min_gpus,
                    # On GPUs, jobs run one at a time, with all GPUs of the settings.
                    most_at_once=1 if cluster.num_gpus else None,
                )
                stop = Signal()
                runs = [JobRun(job, placement, cluster, stop) for job in jobs_of_part]
                _run_together(runs, watch, note, failed)
    return [outcomes[job.run_folder] for job in jobs]


def _run_together(
    runs: Sequence[JobRun],
    watch: Callable[[], None] | None,
    note: Callable[[str], None] | None,
    failed: Callable[[TrainingJob, Exception], None] | None,
) -> None:
    """Run each job in a thread until all have ended; after a signal, ask them to save."""
    jobs = {run.job.folder.name: run.job for run in runs}
    noted: dict[JobRun, str] = {}
    """The last note on what each job waits for."""

    def show() -> None:
        for run in runs:
            text = run.waits_for
            if note and text and text != noted.get(run):
                note(text)
            noted[run] = text
        if watch:
            watch()

    def ask_to_stop() -> bool:
        runs[0].stop.send()
        begun = [run.job for run in runs if run.has_something_to_save]
        note_saving(begun, note)
        return bool(begun)

    free_slots = threading.Semaphore(runs[0].placement.jobs_at_once)

    def fit_in_turn(run: JobRun) -> None:
        with free_slots:
            run.fit()

    def report_failure(name: str, error: Exception) -> None:
        if failed:
            failed(jobs[name], error)

    trainings = {
        name: start_thread(partial(fit_in_turn, run)) for name, run in zip(jobs, runs, strict=True)
    }
    wait_for_work(
        trainings,
        ask_to_stop=ask_to_stop,
        saved=partial(describe_saved_state, jobs),
        watch=show,
        failed=report_failure,
    )


class JobRun:
    """One job in a running Ray, started by the driver or by a trial."""

    def __init__(
        self, job: TrainingJob, placement: Placement, cluster: ClusterSettings, stop: Signal
    ) -> None:
        """Prepare a job; `stop` asks its workers to save and return."""
        self.job = job
        self.placement = placement
        self.cluster = cluster
        self.stop = stop
        self.waits_for = ""
        """A sentence on the slot that the job waits for; empty while it runs."""
        self._num_bytes = self._journal_bytes()

    def _journal_bytes(self) -> int:
        path = self.job.folder / JOURNAL_NAME
        return path.stat().st_size if path.exists() else 0

    @property
    def has_something_to_save(self) -> bool:
        """Whether its workers run and have written something."""
        return not self.waits_for and self._journal_bytes() > self._num_bytes

    def fit(self) -> None:
        """Run the job to its end, or until a request to stop; its folder has the outcome.

        After the death of a worker it starts again. It may fail `cluster.max_failures` times
        without a new checkpoint in between.

        Raises:
            UserError: If the job cannot run as described, or does not fit into its workers' memory.
            Diverged: If a loss is not finite.
            RunFailed: If it failed too often, or waited too long.
        """
        import ray.exceptions
        import ray.train

        train: Any = ray.train  # Type checkers see the API before version 2 there.
        folder = self.job.folder
        failed = f"training in {folder} failed: "
        newest = find_checkpoints(folder)[-1:]
        num_failures = 0
        num_failed_starts = 0
        while self._find_slots():
            size = self._journal_bytes()
            if self.placement.use_gpu:
                watch_for_hangs(self.cluster.collective_timeout_seconds)
            try:
                self._trainer().fit()
                return
            except train.PreemptionError:  # The loss of a node was announced.
                continue
            except train.ControllerError as error:
                num_failed_starts = 1 if self._journal_bytes() > size else num_failed_starts + 1
                if num_failed_starts > MAX_FAILED_STARTS:
                    reason = f"the workers did not start: {failure_reason(error)}"
                    raise RunFailed(failed + reason) from error
            except train.WorkerGroupError as error:
                errors = [*error.worker_failures.values()]
                for worker_error in errors:
                    if isinstance(worker_error, FINAL_ERRORS):
                        raise worker_error from None
                # Report the death of a worker: the others fail because they lost their connection
                # to it.
                checks = [getattr(failure, "health_check_failure", None) for failure in errors]
                deaths = [death for death in checks if death]
                if any(getattr(death, "preempted", False) for death in deaths):
                    continue
                before = newest
                newest = find_checkpoints(folder)[-1:]
                num_failures = 1 if newest != before else num_failures + 1
                if num_failures > self.cluster.max_failures or self.stop.is_sent():
                    raise RunFailed(failed + failure_reason([*deaths, *errors][0])) from error
            except ray.exceptions.RayError as error:  # Ray's controller failed, not the training.
                saved = describe_saved_state({"": self.job})
                reason = f"{failure_reason(error)}; {saved}; run the same command again to resume"
                raise RunFailed(failed + reason) from error
            finally:
                keep_stacks(folder)
                shutil.rmtree(folder / RAY_FOLDER, ignore_errors=True)

    def _find_slots(self) -> bool:
        """Wait until the job's workers have slots; return False after a request to stop.

        Raises:
            RunFailed: If it has waited for too long.
        """
        import ray

        if self.stop.is_sent():
            return False  # Ray may already have ended.
        placement = self.placement
        minutes = self.cluster.node_wait_minutes
        seconds = math.inf if minutes is None else 60 * minutes
        if not self._journal_bytes():
            seconds = FIRST_START_SECONDS
        num_workers = placement.min_workers or placement.workers
        resource = "GPU" if placement.use_gpu else "CPU"
        num_needed = num_workers * (placement.gpus if placement.use_gpu else placement.cpus)
        begun = time.monotonic()
        with reserved_slots(
            [placement.worker_resources] * num_workers, placement.strategy
        ) as group:
            while not self.stop.is_sent() and not group.wait(PLACEMENT_SECONDS):
                resources = ray.available_resources()  # type: ignore[no-untyped-call]
                # The nodes may have enough in total, while none has enough for a worker.
                num_free = min(resources.get(resource, 0.0), num_needed)
                shortage = f"{num_free:g} of {num_needed:g} {resource}s are free"
                self.waits_for = f"{self.job.folder.name} waits for a slot: {shortage}"
                if time.monotonic() - begun >= seconds:
                    raise RunFailed(
                        f"training in {self.job.folder} failed: there was no slot for "
                        f"{format_duration(seconds)} ({shortage}); add nodes or wait until others "
                        "have finished, and run the same command again; cluster.node_wait_minutes "
                        "says how long to wait for the replacement of a lost node"
                    )
        self.waits_for = ""
        return not self.stop.is_sent()

    def _trainer(self) -> Any:
        """Return a Ray trainer that starts the workers once and waits for their end."""
        import ray.train.backend
        import ray.train.torch

        class SharedGpus(ray.train.backend.Backend):
            """Makes each worker see all GPUs of the job on its node, so that NCCL can connect
            them."""

            share_cuda_visible_devices = True

        class OwnRendezvous(ray.train.torch.TorchConfig):
            """Leaves the rendezvous to the workers: Ray would listen on every address of the
            machine."""

            @property
            def backend_cls(self) -> Any:
                return SharedGpus

        train: Any = ray.train
        fewest = self.placement.min_workers
        most = self.placement.workers
        storage = self.job.folder / RAY_FOLDER
        shutil.rmtree(storage, ignore_errors=True)
        rendezvous_folder = storage / "rendezvous"
        rendezvous_folder.mkdir(parents=True, mode=0o700)
        return train.torch.TorchTrainer(
            train_worker,
            train_loop_config={
                "job": self.job.model_dump(mode="json"),
                "stop": self.stop,
                "placement": self.placement,
                "cluster": self.cluster,
                "rendezvous_folder": rendezvous_folder,
            },
            scaling_config=train.ScalingConfig(
                num_workers=(fewest, most) if fewest else most,
                use_gpu=self.placement.use_gpu,
                resources_per_worker=self.placement.worker_resources,
                placement_strategy=self.placement.strategy,
                elastic_resize_monitor_interval_s=GROW_SECONDS,
            ),
            torch_config=OwnRendezvous(),
            run_config=train.RunConfig(
                name="train",
                storage_path=str(storage),
                failure_config=train.FailureConfig(
                    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                ),
                logging_config=train.LoggingConfig(log_level="WARNING"),
            ),
        )


def watch_for_hangs(collective_timeout_seconds: float) -> None:
    """Let Ray Train detect hangs of NCCL, and store the workers' stacks.

    It does so after half of the timeout of collective operations, while the processes still exist.
    It needs NCCL's program `ncclras` (2.28 or later). Ray reads the variables when a training
    starts; the user's own values stay.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
    half = str(collective_timeout_seconds / 2)
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", half)


def keep_stacks(folder: Path) -> None:
    """Move the stacks of a hang from Ray's folder, which is deleted, to the run's folder."""
    for stored in (folder / RAY_FOLDER).glob(f"*/{HANG_FOLDER}"):
        shutil.rmtree(folder / HANG_FOLDER, ignore_errors=True)
        shutil.move(stored, folder / HANG_FOLDER)


def train_worker(config: dict[str, Any]) -> None:
    """Run in each worker of a job."""
    import ray.train

    train: Any = ray.train
    context = train.get_context()
    job = TrainingJob.model_validate(config["job"])
    placement = config["placement"]
    torch.set_num_threads(placement.cpus)
    device = worker_device(use_gpu=placement.use_gpu)
    if device != "cpu":
        # All workers of a node see all of their GPUs; Ray knows each worker's own.
        device = str(train.torch.get_device())
        torch.cuda.set_device(device)
    world = World(
        rank=context.get_world_rank(),
        size=context.get_world_size(),
        device=device,
        parallel=config["cluster"].parallel,
        shards=config["cluster"].num_shards,
    )
    if world.size > 1:
        _rendezvous(world, config, is_one_machine=context.get_local_world_size() == world.size)
    noticed = threading.Event()

    def wait_for_notice() -> None:
        # Ray announces the loss of a node, such as a spot instance. It answers only when all
        # workers have asked, so all must ask the same number of times.
        while train.get_preemption_info() is None:
            time.sleep(NOTICE_SECONDS)
        noticed.set()

    def take_notice() -> bool:
        is_new = noticed.is_set()
        noticed.clear()
        return is_new

    if os.environ.get(WATCHER_SWITCH) != "0":
        threading.Thread(target=wait_for_notice, daemon=True).start()
    parallel = config["cluster"].parallel
    with (
        stop_when(config["stop"].is_sent),
        out_of_memory_explained(job, world, parallel),
    ):
        run_job(
            job,
            world=world,
            should_save=take_notice,
            sequences_if_uncompiled=sequences_if_uncompiled(job, world, parallel),
        )


def _rendezvous(world: World, config: dict[str, Any], *, is_one_machine: bool) -> None:
    """Connect the workers of a job; on a single machine they use loopback.

    Workers of one machine find each other through a file that only this user can read, and that the
    driver deletes. The process group is never destroyed: with NCCL, that may wait for a dead
    worker.
    """
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    address = f"file://{config['rendezvous_folder'] / uuid.uuid4().hex}"
    if not is_one_machine:
        with socket.socket() as free:
            free.bind(("", 0))
            own_address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            address = f"tcp://{own_address}:{free.getsockname()[1]}"
    else:  # The loopback interface is `lo` on Linux, and `lo0` on macOS.
        for interface, addresses in psutil.net_if_addrs().items():
            if any(address.address == "127.0.0.1" for address in addresses):
                for variable in INTERFACE_VARIABLES:
                    os.environ.setdefault(variable, interface)
    torch.distributed.init_process_group(
        "nccl" if world.is_gpu else "gloo",
        init_method=broadcast_from_rank_zero(address),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=config["cluster"].collective_timeout_seconds),
        # Otherwise NCCL guesses it from the rank at the first barrier, and warns.
        device_id=torch.device(world.device) if world.is_gpu else None,
    )


def failure_reason(error: BaseException) -> str:
    """Return in one line what went wrong in a worker; the line is stored with the results."""
    if failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    for name in ("controller_failure", "cause"):
        error = getattr(error, name, None) or error
    return first_line(error, with_type=not isinstance(error, RunFailed))
