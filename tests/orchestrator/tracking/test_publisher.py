"""Runs are published in the background, in order, and only in their last state."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from orchestrator.records.tracked_run import RunStatus, TrackedRun
from orchestrator.tracking import tracker as publishing
from orchestrator.tracking.tracker import SECONDS_BETWEEN_COPIES, Publisher


def run(key: str, status: RunStatus = "FINISHED", name: str = "") -> TrackedRun:
    return TrackedRun(key=key, kind="trial", name=name or key, status=status)


class Shown:
    """Remembers what was published, and by which threads."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.threads: set[threading.Thread] = set()
        self.is_down = False
        self.before: Callable[[TrackedRun], None] = lambda run: None

    def publish(self, runs: Sequence[TrackedRun]) -> Iterator[bool]:
        for run in runs:
            self.before(run)
            self.threads.add(threading.current_thread())
            if not self.is_down:
                self.names.append(run.name)
            yield not self.is_down


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_runs_are_published_in_order_by_a_thread_that_ends(shown):
    publisher = Publisher(shown.publish)
    for start in (0, 100):
        for number in range(100):
            publisher.enqueue(run(str(start + number)))
        assert publisher.wait(60)
    assert shown.names == [str(number) for number in range(200)]
    assert threading.main_thread() not in shown.threads
    for thread in shown.threads:
        thread.join(60)
        assert not thread.is_alive()


def test_only_the_last_state_of_a_run_waits_for_a_slow_server(shown):
    has_begun = threading.Event()
    may_end = threading.Event()

    def wait(published: TrackedRun) -> None:
        if published.key == "slow":
            has_begun.set()
            assert may_end.wait(60)

    shown.before = wait
    publisher = Publisher(shown.publish)
    publisher.enqueue(run("slow"))
    assert has_begun.wait(60)
    for number in range(5):
        publisher.enqueue(run("a", name=f"a{number}"), run("b"))
    assert not publisher.wait(0.01), "it hangs"
    may_end.set()
    assert publisher.wait(60)
    assert shown.names == ["slow", "a4", "b"]


def test_running_ones_are_published_again_until_they_end(shown, monkeypatch):
    assert SECONDS_BETWEEN_COPIES < 5.0, "what is shown is at most 5 s old"
    monkeypatch.setattr(publishing, "SECONDS_BETWEEN_COPIES", 0.01)
    publisher = Publisher(shown.publish)
    again = threading.Event()
    shown.before = lambda _: again.set() if len(shown.names) > 10 else None
    publisher.enqueue(run("a", "RUNNING"))
    assert again.wait(60)
    publisher.enqueue(run("a", "FINISHED", name="end"))
    assert publisher.wait(60)
    assert set(shown.names[:-1]) == {"a"}
    for thread in shown.threads:
        thread.join(60)
    assert shown.names[-1] == "end"


def test_what_a_dead_server_missed_is_published_when_it_is_back(shown):
    shown.is_down = True
    publisher = Publisher(shown.publish)
    for runs in ((run("a"), run("b", name="old")), (run("b", name="new"), run("c"))):
        publisher.enqueue(*runs)
        assert publisher.wait(60), "it was tried"
    assert shown.names == []
    shown.is_down = False
    publisher.enqueue(run("d"))
    assert publisher.wait(60)
    assert shown.names == ["a", "new", "c", "d"]

    def fail(published: TrackedRun) -> None:
        if published.key == "bad":
            raise ValueError("a mistake in this program")

    # An unexpected error is raised where it is waited for.
    shown.before = fail
    publisher.enqueue(run("bad"))
    with pytest.raises(ValueError, match="a mistake"):
        publisher.wait(60)
    publisher.enqueue(run("e"))
    assert publisher.wait(60)
    assert shown.names[-1] == "e"


def test_a_state_that_comes_while_a_server_fails_stays_the_last_one(shown):
    shown.is_down = True
    publisher = Publisher(shown.publish)
    newer = [run("a", name="new")]

    def end_meanwhile(_: TrackedRun) -> None:
        if newer:
            publisher.enqueue(newer.pop())

    shown.before = end_meanwhile
    publisher.enqueue(run("a", "RUNNING", name="old"))
    assert publisher.wait(60), "both were tried"
    shown.is_down = False
    publisher.enqueue(run("b"))
    assert publisher.wait(60)
    assert shown.names == ["new", "b"]
