"""Run work that needs one device, such as a measurement: here, or as a Ray task on a GPU.

A task runs on any node that has a free GPU; the process that starts it opens no CUDA context.
Commands, sweeps and trials each have an `Executor`, which follows from the settings.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.cluster.placement import worker_device
from orchestrator.cluster.ray import ray_cluster
from orchestrator.planning.machine import check_available, check_device
from orchestrator.settings import ClusterSettings, Settings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    interruption_text,
    stop_on_signals,
    stop_requested,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, first_line

T = TypeVar("T")
Work = Callable[[str, Progress], T]
"""Gets the name of a device and a progress display. Work and result can be pickled."""

MAX_DEATHS = 2
"""How often a task is started again after its process or node died."""
WAITING = "waiting for a free GPU"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Runs work that needs one device, in this process or as a Ray task."""

    device: str | None = None
    """Device of work in this process; None: a GPU if there is one, else the CPU."""
    needs_gpu: bool = False
    """Whether the work is a Ray task with a GPU."""
    num_cpus: int = 1
    """CPUs of that task."""
    cluster: ClusterSettings | None = None
    """The Ray to start or join, whose GPUs are used if it has any. None for work in this process,
    and within a trial, whose process belongs to a running Ray."""
    folder: Path | None = None
    """The workspace, or a folder in it, which all nodes of that Ray must see."""

    def run(self, work: Work[T], progress: Progress) -> T:
        """Run work, and return what it returns.

        Raises:
            UserError: If a GPU is needed and there is none.
            RunFailed: If the process of a task died too often.
            Interrupted: After a request to stop a task.
            Exception: What the work raised.
        """
        if self.cluster is not None:
            say = partial(progress.advance, 0)
            with ray_cluster(self.cluster, folder=self.folder, say=say) as resources:
                if self.needs_gpu or resources.gpus:
                    check_available(1, 1, resources)
                    return run_gpu_task(work, progress, self.num_cpus)
        elif self.needs_gpu:
            return run_gpu_task(work, progress, self.num_cpus)
        from orchestrator.models.load import best_device

        device = self.device or best_device()
        if ":" in device:
            import torch

            torch.cuda.set_device(device)  # What allocates without naming a device uses it, too.
        return work(device, progress)


CPU = Executor(device="cpu")
"""This process, on the CPU."""


def command_executor(cluster: ClusterSettings, folder: Path) -> Executor:
    """Return the executor of a command that starts no jobs.

    If the settings name GPUs, or a cluster that has some, work is a Ray task with a GPU. Otherwise
    it runs in this process, on a GPU if this machine has one. `cluster.device` overrides both.

    Raises:
        UserError: If this machine does not have that device.
    """
    is_elsewhere = cluster.ray_address != LOCAL
    needs_gpu = cluster.num_gpus > 0
    if cluster.device == "cuda" and (needs_gpu or is_elsewhere):
        return Executor(needs_gpu=True, cluster=cluster, folder=folder)
    if cluster.device is not None:
        check_device(cluster.device)
        return Executor(device=cluster.device)
    if needs_gpu or is_elsewhere:
        return Executor(needs_gpu=needs_gpu, cluster=cluster, folder=folder)
    return Executor()


def sweep_executor(settings: Settings, folder: Path) -> Executor:
    """Return the executor of a sweep's measurements: on a GPU if its trials have GPUs.

    Args:
        folder: The workspace, or a folder in it; the GPU may be on another node.
    """
    if not settings.trials_use_gpus:
        return CPU
    return Executor(needs_gpu=True, cluster=settings.cluster, folder=folder)


def run_gpu_task(work: Work[T], progress: Progress, num_cpus: int) -> T:
    """Run work as a task on one GPU of the running Ray.

    The task is a generator, so its progress and log lines arrive while it runs. Ctrl-C kills the
    task's process, so work must store each finished part at once.

    Raises:
        RunFailed: If the task's process died too often.
        Interrupted: After Ctrl-C or SIGTERM.
        Exception: What the function raised.
    """
    import ray
    import ray.exceptions

    # Ray's own retry expects the same events again, but a resumed task sends fewer.
    options: dict[str, Any] = {"num_returns": "streaming", "max_retries": 0}
    # By default, the task of a trial would wait for a GPU among those that the trial has reserved.
    options["scheduling_strategy"] = "DEFAULT"
    task: Any = ray.remote(num_cpus=num_cpus, num_gpus=1, **options)(_stream)
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
                        progress.advance(0)  # The wait is over.
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


def _stream(work: Work[Any]) -> Iterator[Any]:
    """Run a function in a thread of a task, and yield what the caller needs.

    These are a text that says where it runs; log records; calls of `Progress`, as functions of the
    caller's display; and the result, as a tuple.
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
    """Sends each call to the process that started the task; of many `advance` calls, only some."""

    def __init__(self, send: Callable[[Callable[[Progress], None]], None]) -> None:
        self._send = send
        self._sent_at = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self._send(methodcaller("start", title, total))

    def advance(
        self, done: float, text: str | Sequence[str] = "", *, seconds_left: float | None = None
    ) -> None:
        if time.monotonic() - self._sent_at >= POLL_SECONDS:
            self._sent_at = time.monotonic()
            self._send(methodcaller("advance", done, text, seconds_left=seconds_left))

    def note(self, text: str) -> None:
        self._send(methodcaller("note", text))

    def finish(self, summary: str) -> None:
        self._send(methodcaller("finish", summary))
