"""A signal requests a stop once, and the wait for the state is limited."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orchestrator.terminal.stop import (
    start_thread,
    stop_on_signals,
    stop_requested,
    stop_when,
    wait_for_work,
    wait_interruptibly,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def run(work: Callable[[], Any], **changes: Any) -> Any:
    """Run work that saves step 40; `pressed`: the signals during it, in order."""
    pressed = iter(changes.pop("pressed", ()))
    options: dict[str, Any] = {"ask_to_stop": lambda: True, "saved": lambda: "saved at step 40"}

    def watch() -> None:
        if number := next(pressed, None):
            press(number)

    with stop_on_signals():
        [result] = wait_for_work(
            {"run": start_thread(work)}, **{**options, "watch": watch, **changes}
        )
    return result


def test_results_and_errors_are_those_of_the_jobs_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    meeting = threading.Barrier(2)

    def meet(number: int) -> int:
        meeting.wait(timeout=30)
        return number

    with ThreadPoolExecutor(2) as pool, stop_on_signals():
        futures = {str(number): pool.submit(meet, number) for number in range(6)}
        assert wait_for_work(futures, ask_to_stop=bool, saved=str) == [*range(6)]


def test_each_failure_is_said_when_it_happens_and_all_are_raised_at_the_end():
    first_is_said = threading.Event()
    failures: list[str] = []

    def fail_first() -> None:
        raise RunFailed("the loss is not finite")

    def fail_later() -> None:
        assert first_is_said.wait(timeout=10)
        raise UserError("its tokens are missing")

    def failed(name: str, error: Exception) -> None:
        failures.append(f"{name}: {error}")
        first_is_said.set()

    work = {"iiet": fail_first, "vanilla": fail_later, "pcformer": lambda: None}
    futures = {name: start_thread(function) for name, function in work.items()}
    with pytest.raises(RunFailed) as caught:
        wait_for_work(futures, ask_to_stop=bool, saved=str, failed=failed)
    assert failures == ["iiet: the loss is not finite", "vanilla: its tokens are missing"]
    assert all(failure in str(caught.value) for failure in failures)
    assert isinstance(caught.value.__cause__, ExceptionGroup)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop_once_and_waits_for_the_state(number):
    requested = threading.Event()
    requests: list[bool] = []

    def ask() -> bool:
        requests.append(True)
        requested.set()
        return True

    with pytest.raises(Interrupted, match="saved at step 40; "):
        run(requested.wait, ask_to_stop=ask, pressed=[number])
    assert len(requests) == 1


def test_a_message_is_a_request_while_it_is_looked_for_and_a_signal_within_its_block():
    posted: list[str] = []
    with stop_when(lambda: bool(posted)), stop_when(lambda: False):
        assert not stop_requested()
        posted.append("stop")
        assert stop_requested()
        with pytest.raises(Interrupted, match="while waiting"):
            wait_interruptibly(lambda: True)
    assert not stop_requested()

    def press_twice() -> None:
        with stop_on_signals(second_ends=True):
            press()
            assert stop_requested()
            press()

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert not stop_requested()


@pytest.mark.slow
def test_a_second_signal_ends_the_wait_and_nothing_to_save_is_not_waited_for(monkeypatch):
    never = threading.Event()
    threads_before = {*threading.enumerate()}
    newest = ["step 40"]
    with pytest.raises(Interrupted) as caught:
        run(never.wait, saved=lambda: newest[-1], pressed=[signal.SIGINT] * 9)
    newest.append("step 50")  # A worker finishes its save while Ray ends.
    assert "; step 50" in str(caught.value)
    with pytest.raises(Interrupted, match=r"^interrupted; nothing; "):
        run(never.wait, ask_to_stop=bool, saved=lambda: "nothing", pressed=[signal.SIGINT])
    monkeypatch.setattr("orchestrator.terminal.stop.SECONDS_TO_SAVE", 0.0)
    with pytest.raises(Interrupted, match="not saved"):
        run(never.wait, pressed=[signal.SIGTERM])
    waiting_threads = {*threading.enumerate()} - threads_before
    assert waiting_threads
    assert all(thread.daemon for thread in waiting_threads), "the process can end"
    never.set()


@pytest.mark.parametrize("error", [UserError, RunFailed, OSError])
@pytest.mark.parametrize("what_fails", ["the job", "the request"])
def test_an_error_after_a_signal_also_says_what_is_saved(error, what_fails):
    requested = threading.Event()

    def ask() -> bool:
        if what_fails == "the request":
            raise error("the disk is full")
        requested.set()
        return True

    def fail() -> None:
        requested.wait()
        raise error("the disk is full")

    with pytest.raises(error) as caught:
        run(fail, ask_to_stop=ask, pressed=[signal.SIGINT])
    requested.set()
    text = "; ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert text.startswith("the disk is full")
    assert text.endswith("saved at step 40")
