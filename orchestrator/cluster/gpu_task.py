"""A function as a Ray task that reserves one GPU, on whatever node has one free.

The process that starts it opens no CUDA context, and may run on a node without GPUs. Progress, log
lines and the result, or the error, come back one by one: the task is a generator, and the function
runs in a thread of it. After Ctrl-C the task's process is killed, so functions store what they have
made in whole steps.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

from orchestrator.cluster.devices import worker_device
from orchestrator.cluster.start import ray_cluster
from orchestrator.planning.machine import check_available
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import (
    POLL_SECONDS,
    interruption_text,
    stop_on_signals,
    stop_requested,
)
from orchestrator.training.devices import DeviceWork
from orchestrator.workspace.errors import Interrupted, RunFailed, first_line

# isort: split
# After our own modules, because `orchestrator.cluster.start` sets the environment that Ray reads.
import ray
import ray.exceptions

T = TypeVar("T")

MAX_DEATHS = 2
"""How often a task is started again after its process or node died."""
WAITING = "waiting for a free GPU"

logger = logging.getLogger(__name__)


class _Event(NamedTuple):
    """A call of a method of `Progress`, or one of the names below."""

    name: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = {}  # noqa: RUF012 - nothing changes it


RUNS, LOG, RESULT, ERROR = "runs", "log", "result", "error"


def run_gpu_task(work: DeviceWork[T], progress: Progress, *, waits_for_gpus: bool = False) -> T:
    """Run a function on one GPU of the Ray that runs, or of one that is started for it.

    Args:
        waits_for_gpus: Whether a node with a GPU may join later.

    Raises:
        UserError: If there is no GPU, and none is waited for.
        RunFailed: If the task's process died too often.
        Interrupted: After Ctrl-C or SIGTERM.
        Exception: What the function raised.
    """
    with ray_cluster(say=partial(progress.advance, 0)) as resources:
        if not waits_for_gpus:
            check_available(1, 1, resources)
        for num_deaths in range(MAX_DEATHS + 1):
            try:
                return _run_once(work, progress)
            except ray.exceptions.RayError as error:
                reason = first_line(error, with_type=True)
                logger.warning("the task's process died (%s times): %s", num_deaths + 1, reason)
    raise RunFailed(
        f"a task on a GPU failed {MAX_DEATHS + 1} times, at last with {reason}; run the same "
        "command again to resume"
    )


def _run_once(work: DeviceWork[T], progress: Progress) -> T:
    # Ray's own retry would expect the same events again, and a task that resumes sends fewer.
    remote: Any = ray.remote(num_cpus=1, num_gpus=1, num_returns="streaming", max_retries=0)
    with stop_on_signals():
        events = remote(_stream).remote(work)
        progress.advance(0, WAITING)
        while True:
            ready, _ = ray.wait([events], timeout=POLL_SECONDS)
            if stop_requested():
                ray.cancel(events, force=True)
                raise Interrupted(interruption_text("what was stored is kept"))
            if ready:
                event: _Event = ray.get(next(events))
                if event.name == RESULT:
                    result: T = event.arguments[0]
                    return result
                _repeat(event, getattr(work, "func", work), progress)


def _repeat(event: _Event, function: Any, progress: Progress) -> None:
    """Do here what the task did there: show progress, log a line, raise an error."""
    name, arguments, options = event
    if name == ERROR:
        error, text = arguments
        raise error from _RemoteTraceback(text)
    if name == LOG:
        logging.getLogger(arguments[0]).log(*arguments[1:])
    elif name == RUNS:
        progress.advance(0)  # It waits no longer.
        logger.info("%s.%s %s", function.__module__, function.__name__, *arguments)
    else:
        getattr(progress, name)(*arguments, **options)


class _RemoteTraceback(Exception):
    """The traceback of an error in the task's process, for the log."""


def _stream(work: DeviceWork[Any]) -> Iterator[_Event]:
    """Run the function in a thread and yield its events; the last is the result or the error."""
    events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
    threading.Thread(target=_run, args=(work, events.put), daemon=True).start()
    is_over = False
    while not is_over:
        event = events.get()
        is_over = event.name in (RESULT, ERROR)
        yield event


def _run(work: DeviceWork[Any], send: Callable[[_Event], None]) -> None:
    # Ray ends this process after one task with a GPU, so nothing has to be undone.
    logging.getLogger().addHandler(_SendingHandler(send))
    try:
        gpus = ", ".join(map(str, ray.get_gpu_ids()))
        where = f"runs on GPU {gpus} of {socket.gethostname()}, process {os.getpid()}"
        send(_Event(RUNS, (where,)))
        result = work(worker_device(use_gpu=True), _SendingProgress(send))
        send(_Event(RESULT, (result,)))
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        send(_Event(ERROR, (_picklable(error), text)))


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # An error's own code runs here.
        return RunFailed(first_line(error, with_type=True))
    return error


class _SendingHandler(logging.Handler):
    def __init__(self, send: Callable[[_Event], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send(_Event(LOG, (record.name, record.levelno, "%s", self.format(record))))


class _SendingProgress(Progress):
    """Sends each call to the process that started the task; of frequent `advance`, a few."""

    def __init__(self, send: Callable[[_Event], None]) -> None:
        self._send = send
        self._sent_at = 0.0

    def start(self, title: str, total: float | None = None) -> None:
        self._send(_Event("start", (title, total)))

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        if time.monotonic() - self._sent_at >= POLL_SECONDS:
            self._sent_at = time.monotonic()
            self._send(_Event("advance", (done, text), {"seconds_left": seconds_left}))

    def note(self, text: str) -> None:
        self._send(_Event("note", (text,)))

    def finish(self, summary: str) -> None:
        self._send(_Event("finish", (summary,)))
