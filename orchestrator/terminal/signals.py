"""Ctrl-C and SIGTERM as a request: save the state, then stop, with bounded patience.

Neither Ray Train nor Ray Tune lets a training loop save its state when the process that started it
gets a signal. So a job runs in a thread, the main thread watches it and keeps the signals to
itself, and the request reaches the job as a stop flag. Everything together, Ray's end included,
takes less than ten seconds. A job that fails while it stops is reported as that failure.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from orchestrator.workspace.errors import Interrupted, RunFailed, UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 4.0
"""How long a job may take to save its state."""
POLL_SECONDS = 0.2

T = TypeVar("T")


def run_interruptibly(
    work: Callable[[], T],
    *,
    ask_to_stop: Callable[[], bool],
    saved: Callable[[], str],
    watch: Callable[[], None] | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> T:
    """Run a Ray job in a thread, so that Ctrl-C and SIGTERM reach it as a request to save and stop.

    Args:
        work: The job; it returns soon after it was asked to stop.
        ask_to_stop: Called once, at the first signal; returns whether there is something to save,
            which is worth waiting for.
        saved: Says what is saved, such as "saved at step 40"; called at the end, after a signal.
        watch: Called a few times a second in the calling thread, to show progress.
        grace_seconds: How long the job may take to stop; a second signal ends the wait.

    Returns:
        What the job returns.

    Raises:
        Interrupted: After a signal. What still runs ends with the cluster.
        Exception: What the job raised, also after a signal; then it says what is saved, too.
    """
    future: Future[T] = Future()
    signals: list[int] = []
    has_state = False
    try:
        with signal_handlers(SIGNALS, lambda number, _: signals.append(number)):
            threading.Thread(target=_fulfil, args=(future, work), daemon=True).start()
            give_up_at = math.inf
            while not future.done() and len(signals) < 2 and time.monotonic() < give_up_at:
                if signals and give_up_at == math.inf:
                    has_state = ask_to_stop()
                    give_up_at = time.monotonic() + (grace_seconds if has_state else 0.0)
                wait((future,), timeout=POLL_SECONDS)
                if watch:
                    watch()
        if future.done():
            result = future.result()
    except Exception as error:
        if signals:
            note_saved_state(error, saved())
        raise
    if not signals:
        return result
    in_time = future.done() or not has_state
    raise Interrupted(interruption_text(saved(), in_time=in_time))


def interruption_text(saved: str, *, in_time: bool = True) -> str:
    """Return what a user is told after Ctrl-C.

    Args:
        saved: What is saved, such as "saved at step 40".
        in_time: Whether the steps after that were saved, or there were none.
    """
    late = "" if in_time else ", and the latest steps were not saved in time"
    return f"interrupted{late}; {saved}; start the same command again to go on"


def note_saved_state(error: Exception, saved: str) -> None:
    """Let an error that came after Ctrl-C say what is saved, too.

    Args:
        error: What the job raised.
        saved: What is saved, such as "saved at step 40".
    """
    text = f"it happened while the run was stopping; {saved}"
    if isinstance(error, UserError | RunFailed):
        error.args = (f"{error}; {text}",)
    else:
        error.add_note(text)


def wait_interruptibly(
    is_over: Callable[[], bool],
    *,
    begin: Callable[[], None] | None = None,
    watch: Callable[[], None] | None = None,
) -> None:
    """Wait for what another process does; Ctrl-C and SIGTERM end the wait, not the other process.

    Args:
        is_over: Asked a few times a second.
        begin: Called once, to say what is waited for; a signal that follows it ends the wait.
        watch: Called as often, to show progress.

    Raises:
        Interrupted: After a signal.
    """
    signals: list[int] = []
    with signal_handlers(SIGNALS, lambda number, _: signals.append(number)):
        if begin:
            begin()
        while True:
            ended = is_over()
            if signals:
                raise Interrupted(
                    "interrupted while waiting for another process; the same command goes on"
                )
            if ended:
                return
            time.sleep(POLL_SECONDS)
            if watch:
                watch()


def _fulfil(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def raise_keyboard_interrupt(*_: Any) -> None:
    """Do as Python does on Ctrl-C; a handler."""
    raise KeyboardInterrupt


@contextmanager
def signal_handlers(numbers: Iterable[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle signals so until the block ends; in the main thread only, as Python wants it."""
    if not _in_main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, function in earlier.items():
            signal.signal(number, function)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
