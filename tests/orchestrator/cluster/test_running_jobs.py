"""A driver says what its jobs wait for, and does not wait for them to save."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from orchestrator.cluster.messages import Message
from orchestrator.cluster.running_jobs import RunningJobs, wait_message
from orchestrator.records.training import TrainingJob
from orchestrator.terminal.signals import recorded_signals
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.journal import Journal


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_job_without_a_node(
    ray_session: None, tiny_job: Callable[..., TrainingJob]
) -> None:
    job, stop = tiny_job(), Message()
    notes: list[str] = []
    running = RunningJobs([job], stop, notes.append)
    journal = Journal(job.folder)
    journal.event("started")  # Then its node was lost.
    journal.close()
    wait_message(stop, job).post("run waits for a place: 0 of 1 CPUs are free")

    def watch() -> None:
        if notes:
            os.kill(os.getpid(), signal.SIGINT)

    with recorded_signals() as signals, pytest.raises(Interrupted, match=r"^interrupted; nothing"):
        running.wait_for([Future()], signals, watch)
    assert notes == ["run waits for a place: 0 of 1 CPUs are free"]
    assert stop.is_posted()
