"""Where jobs and measurements run: under Ray, or in this process.

A measurement on a GPU is a Ray task, on whatever node has a GPU free: the process that starts it
opens no CUDA context. Jobs in this process, for debuggers and profilers, have bitwise the losses
that they have under Ray with one worker.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.cluster.places import alive_nodes, worker_device
from orchestrator.cluster.ray import ray_cluster, ray_environment
from orchestrator.data.tokenize import OpenRunner, Report, ShardRunner
from orchestrator.planning.machine import Resources, check_available, check_device, local_resources
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    interruption_text,
    note_saved_state,
    stop_on_signals,
    stop_requested,
)
from orchestrator.training.world import DeviceWork, OnDevice, on_cpu
from orchestrator.workspace.errors import Interrupted, RunFailed, first_line

T = TypeVar("T")

MAX_DEATHS = 2
"""How often a task is started again after its process or node died."""
WAITING = "waiting for a free GPU"
END_SECONDS = 3.0
"""Longest wait for the end of tasks that are cancelled."""

logger = logging.getLogger(__name__)


@contextmanager
def joined_cluster(
    cluster: ClusterSettings, folder: Path, check: Callable[[Resources], None], progress: Progress
) -> Iterator[None]:
    """Join the cluster that the settings name for a block of code, and check it first.

    What the block prepares may take hours. A Ray of this machine starts later, with the first jobs.

    Args:
        folder: The workspace.
        check: Raises `UserError` if the nodes have too few CPUs or GPUs.

    Raises:
        UserError: If the cluster cannot be joined, or its nodes cannot be used.
    """
    if cluster.ray_address == LOCAL:
        with ray_environment(LOCAL):  # What the block imports may import Ray.
            yield
        return
    with ray_cluster(cluster, folder=folder, say=progress.start) as resources:
        check(resources)
        yield


# Work that needs one device


def trial_device(settings: Settings, folder: Path) -> OnDevice:
    """Return a function that runs work as the trials of a sweep: on a GPU if they have some.

    Args:
        folder: The workspace, or a folder in it; the GPU may be on another node.
    """
    if not settings.trials_use_gpus:
        return on_cpu
    return partial(_run_on_best, cluster=settings.cluster, folder=folder, needs_gpu=True)


def command_device(cluster: ClusterSettings, folder: Path) -> OnDevice:
    """Return a function that runs the work of a command that starts no jobs.

    The settings may name GPUs, or a cluster that has some: then the work is a Ray
    task with a GPU. Otherwise it runs in this process, on a GPU if this machine has one.
    `cluster.device` may name the CPU or a GPU instead.

    Raises:
        UserError: If this machine does not have that device.
    """
    device = cluster.device
    needs_gpu = cluster.num_gpus > 0
    if device == "cuda" and (needs_gpu or cluster.ray_address != LOCAL):
        device = None
        needs_gpu = True
    if device is None:
        return partial(_run_on_best, cluster=cluster, folder=folder, needs_gpu=needs_gpu)
    check_device(device)

    def run_here(work: DeviceWork[T], progress: Progress) -> T:
        if device != "cpu":
            import torch

            torch.cuda.set_device(device)
        return work(device, progress)

    return run_here


def _run_on_best(
    work: DeviceWork[T],
    progress: Progress,
    *,
    cluster: ClusterSettings,
    folder: Path,
    needs_gpu: bool,
) -> T:
    if needs_gpu or cluster.ray_address != LOCAL:
        with ray_cluster(cluster, folder=folder, say=partial(progress.advance, 0)) as resources:
            if needs_gpu or resources.gpus:
                check_available(1, 1, resources)
                return run_gpu_task(work, progress)
    from orchestrator.models.load import best_device

    return work(best_device(), progress)


def run_gpu_task(work: DeviceWork[T], progress: Progress) -> T:
    """Run a function on one GPU of the Ray that runs.

    Its progress and log lines come back while it runs: the task is a generator. After Ctrl-C the
    task's process is killed, so functions store what they have made in whole steps.

    Raises:
        RunFailed: If the task's process died too often.
        Interrupted: After Ctrl-C or SIGTERM.
        Exception: What the function raised.
    """
    import ray
    import ray.exceptions

    # Ray's own retry would expect the same events again, and a task that resumes sends fewer.
    options: dict[str, Any] = {"num_gpus": 1, "num_returns": "streaming", "max_retries": 0}
    task: Any = ray.remote(num_cpus=1, **options)(_stream)
    function: Any = getattr(work, "func", work)
    for num_deaths in range(1, MAX_DEATHS + 2):
        try:
            with stop_on_signals():
                events = task.remote(work)
                progress.advance(0, WAITING)
                while True:
                    ready, _ = ray.wait([events], timeout=POLL_SECONDS)
                    if stop_requested():
                        ray.cancel(events, force=True)
                        raise Interrupted(interruption_text("what was stored is kept"))
                    event = ray.get(next(events)) if ready else None
                    if isinstance(event, tuple):
                        result: T = event[0]
                        return result
                    if isinstance(event, logging.LogRecord):
                        logging.getLogger(event.name).handle(event)
                    elif isinstance(event, str):
                        logger.info("%s.%s %s", function.__module__, function.__name__, event)
                        progress.advance(0)  # It waits no longer.
                    elif event:
                        event(progress)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # Its text is the traceback, for the log.
        except ray.exceptions.RayError as error:
            reason = first_line(error, with_type=True)
            logger.warning("the task's process died (%s times): %s", num_deaths, reason)
    raise RunFailed(
        f"a task on a GPU failed {MAX_DEATHS + 1} times, at last with {reason}; run the same "
        "command again to resume"
    )


def _stream(work: DeviceWork[Any]) -> Iterator[Any]:
    """Run a function in a thread of a task; yield all that the caller has to know.

    That is where it runs, as a text; its log records; its calls of `Progress`, as functions of the
    caller's display; and its result, as a tuple.
    """
    import ray

    gpus = ", ".join(map(str, ray.get_gpu_ids()))
    yield f"runs on GPU {gpus} of {socket.gethostname()}, process {os.getpid()}"
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # Ray ends this process after one task with a GPU, so nothing has to be undone.
    logging.getLogger().addHandler(logging.handlers.QueueHandler(events))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, worker_device(use_gpu=True), _SendingProgress(events.put))
        running.add_done_callback(events.put)
        while (event := events.get()) is not running:
            yield event
    yield (running.result(),)


class _SendingProgress(Progress):
    """Sends each call to the process that started the task; of frequent `advance`, a few."""

    def __init__(self, send: Callable[[Callable[[Progress], None]], None]) -> None:
        self._send = send
        self._sent_at = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self._send(methodcaller("start", title, total))

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        if time.monotonic() - self._sent_at >= POLL_SECONDS:
            self._sent_at = time.monotonic()
            self._send(methodcaller("advance", done, text, seconds_left=seconds_left))

    def note(self, text: str) -> None:
        self._send(methodcaller("note", text))

    def finish(self, summary: str) -> None:
        self._send(methodcaller("finish", summary))


# Shards of text


def shard_runner(cluster: ClusterSettings) -> OpenRunner | None:
    """Return what tokenizes shards on all nodes of the cluster that the settings name, which must
    be joined while it runs; None on one machine, whose threads need no Ray."""
    return None if cluster.ray_address == LOCAL else _shard_tasks


@contextmanager
def _shard_tasks() -> Iterator[ShardRunner]:
    tasks = _ShardTasks(sum(node.cpus for node in alive_nodes()))
    try:
        yield tasks
    finally:
        tasks.end()


class _ShardTasks:
    """Runs work on shards as Ray tasks of one CPU each. What they report comes when they end."""

    def __init__(self, num_cpus: int) -> None:
        import ray

        self.num_at_once = num_cpus
        # A task has one CPU, and the tokenizer would start threads for all of its node's.
        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        self._task: Any = ray.remote(num_cpus=1, runtime_env=environment)(_with_reported)
        self._at_work: set[Any] = set()

    def submit(self, work: Callable[[Report], T], report: Report) -> Future[T]:
        """Start a task; Ray starts it again on another node if its own is lost."""
        import ray.exceptions

        reference = self._task.remote(work)
        self._at_work.add(reference)
        answer: Future[T] = Future()

        def take_result(ended: Future[Any]) -> None:
            self._at_work.discard(reference)
            try:
                result, num_tokens, num_bytes = ended.result()
                report(num_tokens, num_bytes)
                answer.set_result(result)
            except ray.exceptions.RayTaskError as error:
                answer.set_exception(error.cause)
            except ray.exceptions.RayError as error:
                reason = first_line(error, with_type=True)
                answer.set_exception(
                    RunFailed(f"a task on a node failed ({reason}); run the same command again")
                )
            except Exception as error:  # The work is over: `report` says so.
                answer.set_exception(error)

        reference.future().add_done_callback(take_result)
        return answer

    def end(self) -> None:
        """End what still runs, after an error or Ctrl-C; a shard at work is written again."""
        import ray

        running = list(self._at_work)
        for reference in running:
            ray.cancel(reference, force=True)
        if running:
            ray.wait(running, num_returns=len(running), timeout=END_SECONDS)


def _with_reported(work: Callable[[Report], T]) -> tuple[T, int, int]:
    """Return what work returns, and the sums of the tokens and bytes that it reports."""
    reports: list[tuple[int, int]] = []
    result = work(lambda num_tokens, num_bytes: reports.append((num_tokens, num_bytes)))
    return result, sum(tokens for tokens, _ in reports), sum(size for _, size in reports)


# Training jobs


def job_runner(
    *, local: bool, say: Callable[[str], None] | None = None
) -> Callable[..., list[TrainingOutcome]]:
    """Return the function that runs jobs: `run_local_jobs`, or `run_train_jobs` under Ray.

    Args:
        say: Called with what is started while a Ray is, which takes seconds.
    """
    if local:
        return run_local_jobs
    from orchestrator.cluster.train import run_train_jobs

    return partial(run_train_jobs, say=say)


def run_local_jobs(
    jobs: Sequence[TrainingJob],
    cluster: ClusterSettings | None = None,
    *,
    watch: Callable[[], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[TrainingOutcome]:
    """Run jobs one after the other in this process, the first GPU or the CPU; as `run_train_jobs`.

    The loop runs in the main thread with as many PyTorch threads as the single Ray worker would
    have. Ctrl-C and SIGTERM ask to save and stop; a second one ends at once.

    Raises:
        UserError: If a job cannot run as described, or a GPU's memory is too small for it.
        Diverged: If a loss is not finite.
        Interrupted: After Ctrl-C or SIGTERM; says at which step the state is saved.
        Exception: What a job raised, also after a signal; then it says what is saved, too.
    """
    from orchestrator.evaluation.decode_timing import threads
    from orchestrator.planning.fit import out_of_memory_explained, sequences_if_uncompiled
    from orchestrator.training.trainer import run_job
    from orchestrator.training.watching import describe_saved_state, jobs_to_train
    from orchestrator.training.world import World

    world = World(device="cuda:0" if cluster and cluster.num_gpus else "cpu")
    outcomes: dict[str, TrainingOutcome] = {}
    watched_at = time.monotonic()

    def should_stop() -> bool:
        nonlocal watched_at
        if watch and time.monotonic() - watched_at > POLL_SECONDS:
            watch()
            watched_at = time.monotonic()
        return stop_requested()

    with closing(jobs_to_train(jobs, outcomes, watch=watch, note=note)) as parts:
        for jobs_of_part in parts:
            saved = partial(describe_saved_state, {job.folder.name: job for job in jobs_of_part})
            cpus = local_resources(count_gpus=False).cpus
            with stop_on_signals(second_ends=True), threads(cpus):
                try:
                    for job in jobs_of_part:
                        with out_of_memory_explained(job, world):
                            outcome = run_job(
                                job,
                                world=world,
                                should_stop=should_stop,
                                sequences_if_uncompiled=sequences_if_uncompiled(job, world),
                            )
                        if watch:
                            watch()
                        if not outcome.finished:
                            break
                except KeyboardInterrupt:
                    raise Interrupted(interruption_text(saved(), in_time=False)) from None
                except Exception as error:
                    if stop_requested():
                        note_saved_state(error, saved())
                    raise
                if stop_requested():
                    raise Interrupted(interruption_text(saved()))
    return [outcomes[job.run_folder] for job in jobs]
