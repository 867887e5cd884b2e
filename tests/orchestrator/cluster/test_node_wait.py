"""How long a job waits for its places, in pretended time."""

from __future__ import annotations

import pytest

from orchestrator.cluster.node_wait import FIRST_START_SECONDS, MAX_FAILED_STARTS, NodeWait
from orchestrator.workspace.errors import RunFailed

SOME = "4 of 8 GPUs are free"


class Job:
    """A job whose places are asked for every ten seconds of pretended time."""

    def __init__(self, *, minutes: float | None, has_started: bool = False) -> None:
        self.now = 0.0
        self.wait = NodeWait(has_started=has_started, minutes=minutes, clock=lambda: self.now)
        self.wait.begin()

    def wait_for(self, seconds: float) -> None:
        """Find no place for a time."""
        for _ in range(int(seconds / 10)):
            self.now += 10
            self.wait.no_place(SOME)

    def run_for(self, seconds: float) -> None:
        self.wait.started()
        self.now += seconds
        self.wait.begin()  # A node is lost.


def test_a_node_may_return_after_six_minutes_as_often_as_it_is_lost() -> None:
    job = Job(minutes=None)
    for _ in range(3):
        job.run_for(3600)
        job.wait_for(6 * 60)
    job.run_for(3600)
    job.wait_for(7 * 24 * 3600)


def test_the_wait_for_a_node_ends_after_the_set_minutes() -> None:
    job = Job(minutes=10)
    job.run_for(3600)
    job.wait_for(6 * 60)
    job.run_for(3600)
    with pytest.raises(RunFailed, match=r"within 10 min \(4 of 8 GPUs are free\)"):
        job.wait_for(11 * 60)
    assert job.now == 3600 + 6 * 60 + 3600 + 10 * 60


def test_a_first_start_may_be_late_and_gives_up_after_minutes() -> None:
    job = Job(minutes=None)
    job.wait_for(FIRST_START_SECONDS - 10)
    job.run_for(10)
    with pytest.raises(RunFailed, match=r"no place for 5 min \(4 of 8 GPUs are free\)"):
        Job(minutes=None).wait_for(FIRST_START_SECONDS)
    Job(minutes=None, has_started=True).wait_for(3 * FIRST_START_SECONDS)


def test_workers_that_have_places_and_do_not_start_end_a_job() -> None:
    job = Job(minutes=None)
    for _ in range(2):
        for _ in range(MAX_FAILED_STARTS):
            job.wait.failed(OSError("the node has just died"))
        job.run_for(10)
    for _ in range(MAX_FAILED_STARTS):
        job.wait.failed(OSError("no module named torch"))
    with pytest.raises(RunFailed, match="did not start: no module named torch"):
        job.wait.failed(OSError("no module named torch"))
