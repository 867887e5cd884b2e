"""A signal requests a stop once, and the wait for the state is limited."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.terminal.stop import (
    run_interruptibly,
    stop_on_signals,
    stop_requested,
    stop_when,
    wait_for_work,
    wait_interruptibly,
)
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError


def saved() -> str:
    return "saved at step 40"


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_the_result_is_returned_and_the_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run_interruptibly(lambda: 42, ask_to_stop=lambda: 3600.0, saved=saved) == 42
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_results_of_several_jobs_are_in_their_order() -> None:
    meeting = threading.Barrier(2)
    calls: list[int] = []

    def work(number: int) -> int:
        calls.append(number)
        meeting.wait(timeout=30)
        return number

    with ThreadPoolExecutor(2) as pool, stop_on_signals():
        futures = [pool.submit(work, number) for number in range(6)]
        results = wait_for_work(futures, ask_to_stop=float, saved=saved)
    assert results == [*range(6)]
    assert sorted(calls) == [*range(6)]


def test_an_error_of_the_job_is_raised() -> None:
    def fail() -> None:
        raise ValueError("the job's own")

    with pytest.raises(ValueError, match="the job's own"):
        run_interruptibly(fail, ask_to_stop=lambda: 3600.0, saved=saved)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop_once_and_waits_for_the_state(number: int) -> None:
    asked = threading.Event()
    requests: list[bool] = []
    pressed: list[int] = []

    def ask() -> float:
        requests.append(True)
        asked.set()
        return 3600.0

    def watch() -> None:
        if not pressed:
            pressed.append(number)
            press(number)

    with pytest.raises(Interrupted, match=r"^interrupted; saved at step 40; "):
        run_interruptibly(asked.wait, ask_to_stop=ask, watch=watch, saved=saved)
    assert len(requests) == 1


def test_the_next_block_begins_without_the_signals_of_the_last() -> None:
    def press_twice() -> None:
        with stop_on_signals(second_ends=True):
            press()
            assert stop_requested()
            press()

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert not stop_requested()


def test_a_message_is_a_request_while_it_is_looked_for() -> None:
    posted: list[str] = []
    with stop_when(lambda: bool(posted)), stop_when(lambda: False):
        assert not stop_requested()
        posted.append("stop")
        assert stop_requested()
        with pytest.raises(Interrupted, match="while waiting"):
            wait_interruptibly(lambda: True)
    assert not stop_requested()


def test_a_second_signal_ends_the_wait() -> None:
    never, newest = threading.Event(), ["step 40"]
    with pytest.raises(Interrupted) as caught:
        run_interruptibly(
            never.wait, ask_to_stop=lambda: 3600.0, watch=press, saved=lambda: newest[-1]
        )
    newest.append("step 50")  # A worker finishes its save while Ray ends.
    assert "not saved in time; step 50" in str(caught.value)
    never.set()


def test_there_is_no_wait_if_there_is_nothing_to_save() -> None:
    never = threading.Event()
    pressed = iter([press])

    def press_once() -> None:
        next(pressed, lambda: None)()

    with pytest.raises(Interrupted, match=r"^interrupted; nothing was saved; "):
        run_interruptibly(
            never.wait,
            ask_to_stop=lambda: 0.0,
            watch=press_once,
            saved=lambda: "nothing was saved",
        )
    never.set()


@pytest.mark.parametrize("error", [UserError, RunFailed, OSError])
@pytest.mark.parametrize("what_fails", ["the job", "the request"])
def test_an_error_after_a_signal_also_says_what_is_saved(
    error: type[Exception], what_fails: str
) -> None:
    asked = threading.Event()
    pressed = iter([press])

    def ask() -> float:
        if what_fails == "the request":
            raise error("the disk is full")
        asked.set()
        return 3600.0

    def fail() -> None:
        asked.wait()
        raise error("the disk is full")

    with pytest.raises(error) as caught:
        run_interruptibly(
            fail, ask_to_stop=ask, watch=lambda: next(pressed, lambda: None)(), saved=saved
        )
    asked.set()
    text = "; ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert text == "the disk is full; it happened while the run was stopping; saved at step 40"
