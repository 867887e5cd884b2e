"""A driver says what its jobs wait for, does not wait for them to save, and ends those that have
waited for too long."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from orchestrator.cluster.messages import Message
from orchestrator.cluster.running_jobs import RunningJobs, wait_message
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ClusterSettings
from orchestrator.terminal.stop import stop_on_signals
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import Journal

pytestmark = pytest.mark.slow


def start_and_lose(job: TrainingJob) -> None:
    """Leave what a job leaves whose node was lost."""
    journal = Journal(job.folder)
    journal.event("started")
    journal.close()


def test_ctrl_c_does_not_wait_for_a_job_without_a_node(
    ray_session: None, tiny_job: Callable[..., TrainingJob]
) -> None:
    job, stop = tiny_job(), Message()
    notes: list[str] = []
    running = RunningJobs([job], stop, notes.append)
    start_and_lose(job)
    wait_message(stop, job).post("run waits for a place: 0 of 1 CPUs are free")

    def watch() -> None:
        if notes:
            os.kill(os.getpid(), signal.SIGINT)

    with stop_on_signals(), pytest.raises(Interrupted, match=r"^interrupted; nothing"):
        running.wait_for([Future()], watch)
    assert notes == ["run waits for a place: 0 of 1 CPUs are free"]
    assert stop.is_posted()


def test_a_job_whose_node_is_not_replaced_in_time_fails(
    ray_session: None, tiny_job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    from orchestrator.cluster.ray_train import run_train_jobs

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    job = tiny_job()
    start_and_lose(job)
    others = placement_group([{"CPU": 2}])
    try:
        assert others.wait(60)
        with pytest.raises(RunFailed, match=r"failed: no node replaced a lost one within 0 min"):
            run_train_jobs([job], ClusterSettings(node_wait_minutes=0))
    finally:
        remove_placement_group(others)
