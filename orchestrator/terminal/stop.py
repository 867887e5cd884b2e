"""Requests to save the state and stop: Ctrl-C, SIGTERM, or a message.

`stop_requested` covers all of them, in the driver and in its workers. With Ray, a training loop
cannot save its state when the driver gets a signal. So jobs run in threads, the main thread
receives the signals, and jobs check for the request. A job that fails while it stops is reported as
failed.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from orchestrator.workspace.errors import Interrupted, RunFailed, UserError, joint_error

SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.2
SECONDS_TO_SAVE = 480.0
"""Longest wait for jobs to save; less than the ten minutes that the examples for SLURM and
Kubernetes allow."""

T = TypeVar("T")

_signals: list[int] = []
"""Signals that arrived in active blocks of `stop_on_signals`."""
_sources: list[Callable[[], bool]] = []
"""Functions of the active blocks of `stop_when`."""


def stop_requested() -> bool:
    """Return whether this process was asked to save its state and stop soon."""
    return bool(_signals) or any(has_request() for has_request in _sources)


def end_if_stop_requested() -> None:
    """Raise `Interrupted` if this process was asked to stop; called between passes of work that has
    no state to save."""
    if stop_requested():
        raise Interrupted("interrupted; run the same command again to resume")


@contextmanager
def stop_when(has_request: Callable[[], bool]) -> Iterator[None]:
    """Check a function for requests to stop while the block runs, such as one that reads a message.

    Args:
        has_request: Returns whether there is a request.
    """
    _sources.append(has_request)
    try:
        yield
    finally:
        _sources.remove(has_request)


@contextmanager
def stop_on_signals(*, second_ends: bool = False) -> Iterator[None]:
    """Turn signals that arrive in the block into a request to stop.

    Args:
        second_ends: Whether a second signal raises `KeyboardInterrupt`.
    """

    def record(number: int, frame: Any) -> None:
        _signals.append(number)
        if second_ends and len(_signals) > 1:
            signal.default_int_handler(number, frame)

    num_before = len(_signals)
    with signal_handlers(SIGNALS, record):
        try:
            yield
        finally:
            # Signals belong to the main thread's block; a block in another thread gets none.
            if threading.current_thread() is threading.main_thread():
                del _signals[num_before:]


@contextmanager
def signal_handlers(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Install a handler until the block ends; Python allows this in the main thread alone.

    In any other thread, the block runs without it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier_handlers = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier_handler in earlier_handlers.items():
            signal.signal(number, earlier_handler)


def start_thread(work: Callable[[], T]) -> Future[T]:
    """Run a function in a daemon thread.

    A thread may wait for an ended Ray for ever. A daemon thread does not keep the process alive, as
    the threads of a `ThreadPoolExecutor` would.
    """
    future: Future[T] = Future()

    def fulfil() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fulfil, daemon=True).start()
    return future


def wait_for_work(
    futures: Mapping[str, Future[T]],
    *,
    ask_to_stop: Callable[[], bool],
    saved: Callable[[], str],
    watch: Callable[[], None] | None = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[T]:
    """Wait for Ray jobs that run in threads, and return their results; a request stops them.

    A job that fails stops no other one.

    Call it in the block of `stop_on_signals` in which the jobs were started.

    Args:
        futures: The jobs by name; they end soon after `ask_to_stop`.
        ask_to_stop: Called once, at the request; returns whether there is state to save, which is
            waited for.
        saved: Returns what is saved, such as "saved at step 40"; called after a request, when the
            error is shown.
        watch: Called every `POLL_SECONDS` in the calling thread, to show progress.
        failed: Called in the calling thread when a job has failed, with its name and error.

    Raises:
        Interrupted: After a request, at the latest after `SECONDS_TO_SAVE` or a second signal. Work
            that is still running ends with the cluster.
        Exception: That of the job that failed, or one that has those of all that failed; after a
            request, its text also says what is saved.
    """
    must_save = False
    deadline = math.inf  # Until a request.
    is_over = False
    errors: dict[str, Exception] = {}

    def note_failures() -> None:
        for name, future in futures.items():
            if name in errors or not future.done():
                continue
            error = future.exception()
            if isinstance(error, Interrupted):  # A stop is no failure.
                raise error
            if isinstance(error, Exception):
                errors[name] = error
                if failed:
                    failed(name, error)
            elif error:
                raise error

    try:
        while not (is_over := all(future.done() for future in futures.values())):
            if stop_requested() and deadline == math.inf:
                must_save = ask_to_stop()
                deadline = time.monotonic() + (SECONDS_TO_SAVE if must_save else 0.0)
            if len(_signals) > 1 or time.monotonic() > deadline:
                break
            wait(futures.values(), timeout=POLL_SECONDS)
            note_failures()
            if watch:
                watch()
        if is_over:
            note_failures()
            if errors:
                raise joint_error(errors)
    except Exception as error:
        if stop_requested():
            note_saved_state(error, saved())
        raise
    if not stop_requested():
        return [future.result() for future in futures.values()]
    # The text is made when it is shown, because workers may save until Ray has ended.
    raise Interrupted(lambda: interruption_text(saved(), in_time=is_over or not must_save))


def wait_interruptibly(
    is_over: Callable[[], bool],
    *,
    begin: Callable[[], None] | None = None,
    watch: Callable[[], None] | None = None,
) -> None:
    """Wait for another process or a node; a request ends the wait alone.

    Args:
        is_over, watch: Called every `POLL_SECONDS`; `watch` shows progress.
        begin: Called once, to announce the wait; signals are already handled.

    Raises:
        Interrupted: After a request.
    """
    with stop_on_signals():
        if begin:
            begin()
        while True:
            has_ended = is_over()
            # Checked second, so that a Ctrl-C during `is_over` is not lost.
            if stop_requested():
                raise Interrupted("interrupted while waiting; run the same command again to resume")
            if has_ended:
                return
            time.sleep(POLL_SECONDS)
            if watch:
                watch()


def interruption_text(saved: str, *, in_time: bool = True) -> str:
    """Return the message after Ctrl-C.

    Args:
        in_time: Whether all steps were saved, or there were none to save.
    """
    loss = "" if in_time else ", and the latest steps were not saved in time"
    return f"interrupted{loss}; {saved}; run the same command again to resume"


def note_saved_state(error: Exception, saved: str) -> None:
    """Add to an error after Ctrl-C what is saved, such as "saved at step 40"."""
    text = f"it happened while the run was stopping; {saved}"
    # The command line shows only the text of these; tracebacks of others show notes.
    if isinstance(error, UserError | RunFailed):
        error.args = (f"{error}; {text}",)
    else:
        error.add_note(text)
