"""The sender keeps the order, and what was not sent in time can be taken back."""

from __future__ import annotations

import threading

import pytest

from orchestrator.tracking.sender import Sender


def test_items_are_sent_in_order_by_one_thread_that_ends() -> None:
    sent: list[tuple[int, threading.Thread]] = []
    sender = Sender[int](lambda item: sent.append((item, threading.current_thread())))
    for start in (0, 100):
        for number in range(100):
            sender.put(start + number)
        assert sender.wait(60)
    assert [item for item, _ in sent] == [*range(200)]
    assert threading.main_thread() not in {thread for _, thread in sent}
    for _, thread in sent:
        thread.join(60)
        assert not thread.is_alive()


def test_what_a_hanging_server_did_not_take_comes_back_and_later_items_are_sent() -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    sent: list[str] = []

    def send(item: str) -> None:
        if item == "hangs":
            has_begun.set()
            assert may_end.wait(60)
        sent.append(f"{item}, taken back: {not sender.is_first(item)}")

    sender = Sender[str](send)
    sender.put("hangs")
    sender.put("waits")
    assert has_begun.wait(60)
    assert not sender.wait(0.01)
    assert sender.take_back() == ["hangs", "waits"]
    sender.put("later")
    assert sender.wait(60)
    assert sent == ["later, taken back: False"]
    may_end.set()
    while len(sent) < 2:
        pass
    assert sent[-1] == "hangs, taken back: True"


def test_an_unexpected_error_is_raised_where_it_is_waited_for() -> None:
    def send(item: int) -> None:
        if item == 0:
            raise ValueError("a mistake in this program")

    sender = Sender[int](send)
    sender.put(0)
    sender.put(1)
    with pytest.raises(ValueError, match="a mistake"):
        sender.wait(60)
    assert sender.wait(60)
