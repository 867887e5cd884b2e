"""Where work that needs one device is done, and the call that does it there.

Work of a command, such as a measurement, is done in this process, on the CPU or a GPU, or it is a
Ray task, on whatever node has a GPU free: then the process that asks for it opens no CUDA context.
Commands, sweeps and trials each have a `WorkPlace`, which follows from the settings.
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

from orchestrator.cluster.places import worker_device
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
class WorkPlace:
    """Where work that needs one device is done."""

    device: str | None = None
    """Device of work in this process; None: a GPU if there is one, else the CPU."""
    needs_gpu: bool = False
    """Whether the work is a Ray task with a GPU."""
    num_cpus: int = 1
    """CPUs of that task."""
    cluster: ClusterSettings | None = None
    """The Ray that is started or joined, and whose GPUs are used if it has any; None for work in
    this process, and for that of a trial, whose process is part of a Ray."""
    folder: Path | None = None
    """The workspace, or a folder in it, which all nodes of that Ray must see."""

    def run(self, work: Work[T], progress: Progress) -> T:
        """Do work here, and return what it returns.

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


CPU = WorkPlace(device="cpu")
"""This process, on the CPU."""


def command_place(cluster: ClusterSettings, folder: Path) -> WorkPlace:
    """Return where the work of a command is done that starts no jobs.

    The settings may name GPUs, or a cluster that has some: then it is a Ray task with a GPU. Else
    it is done in this process, on a GPU if this machine has one. `cluster.device` may name the CPU
    or a GPU instead.

    Raises:
        UserError: If this machine does not have that device.
    """
    is_elsewhere = cluster.ray_address != LOCAL
    needs_gpu = cluster.num_gpus > 0
    if cluster.device == "cuda" and (needs_gpu or is_elsewhere):
        return WorkPlace(needs_gpu=True, cluster=cluster, folder=folder)
    if cluster.device is not None:
        check_device(cluster.device)
        return WorkPlace(device=cluster.device)
    if needs_gpu or is_elsewhere:
        return WorkPlace(needs_gpu=needs_gpu, cluster=cluster, folder=folder)
    return WorkPlace()


def sweep_place(settings: Settings, folder: Path) -> WorkPlace:
    """Return where a sweep measures beside its trials: on a GPU if they have some.

    Args:
        folder: The workspace, or a folder in it; the GPU may be on another node.
    """
    if not settings.trials_use_gpus:
        return CPU
    return WorkPlace(needs_gpu=True, cluster=settings.cluster, folder=folder)


def run_gpu_task(work: Work[T], progress: Progress, num_cpus: int) -> T:
    """Do work as a task on one GPU of the Ray that runs.

    Its progress and log lines come back while it runs: the task is a generator. After Ctrl-C the
    task's process is killed, so work stores what it has made in whole steps.

    Raises:
        RunFailed: If the task's process died too often.
        Interrupted: After Ctrl-C or SIGTERM.
        Exception: What the function raised.
    """
    import ray
    import ray.exceptions

    # Ray's own retry would expect the same events again, and a task that resumes sends fewer.
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


def _stream(work: Work[Any]) -> Iterator[Any]:
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
