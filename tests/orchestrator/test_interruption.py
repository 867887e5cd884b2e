"""Signals become requests: asked once, waited for, and never for ever."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from orchestrator.errors import Interrupted
from orchestrator.interruption import run_interruptibly


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_returns_what_the_work_returns_and_restores_the_handlers() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert run_interruptibly(lambda: 42, ask_to_stop=lambda: True) == 42
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_raises_what_the_work_raises() -> None:
    def fail() -> None:
        raise ValueError("the work's own")

    with pytest.raises(ValueError, match="the work's own"):
        run_interruptibly(fail, ask_to_stop=lambda: True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_once_and_waits_for_the_state(number: int) -> None:
    asked = threading.Event()
    requests: list[bool] = []
    pressed: list[int] = []

    def ask() -> bool:
        requests.append(True)
        asked.set()
        return True

    def watch() -> None:
        if not pressed:
            pressed.append(number)
            press(number)

    with pytest.raises(Interrupted, match="the state is saved"):
        run_interruptibly(asked.wait, ask_to_stop=ask, watch=watch)
    assert len(requests) == 1


def test_a_second_signal_ends_the_wait() -> None:
    never = threading.Event()
    with pytest.raises(Interrupted, match="last saved state"):
        run_interruptibly(never.wait, ask_to_stop=lambda: True, watch=press, grace_seconds=3600.0)
    never.set()


def test_nothing_to_save_is_not_waited_for() -> None:
    never = threading.Event()
    pressed = iter([press])

    def press_once() -> None:
        next(pressed, lambda: None)()

    with pytest.raises(Interrupted):
        run_interruptibly(
            never.wait, ask_to_stop=lambda: False, watch=press_once, grace_seconds=3600.0
        )
    never.set()
