"""A server that accepts connections and never answers delays Ctrl-C once and briefly, and no run.

A wait that is not a brief one takes longer than the test may.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from orchestrator.records.tracked_run import RunStatus, TrackedRun
from orchestrator.tracking import tracker
from orchestrator.tracking.tracker import Tracking, open_tracking
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import open_workspace

NUM_TRIALS = 20
pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
SWEEP = TrackedRun(key="sweep", kind="sweep", name="sweep", status="RUNNING")


@pytest.fixture
def tracking(tmp_path, silent_server, monkeypatch) -> Tracking:
    """MLflow at the address of a silent server, which is waited for in vain."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setattr(tracker, "MAX_WAIT_SECONDS", 1000.0)
    monkeypatch.setattr(tracker, "SHORT_WAIT_SECONDS", 0.1)
    return open_tracking(open_workspace(tmp_path), warn=lambda text: None)


def trial(number: int, status: RunStatus, folder: Path) -> TrackedRun:
    return TrackedRun(
        key=f"trial-{number}", kind="trial", name=f"trial {number}", parent="sweep",
        params={"n": str(number)}, points=[("loss", 1.0, 0)], journal=str(folder), status=status,
    )  # fmt: skip


def test_a_stop_of_a_sweep_with_many_trials_waits_once(tracking, tmp_path):
    journal = Journal(tmp_path / "trial")
    journal.metrics(1, {"train/loss": 1.0})
    journal.close()
    folder = journal.path.parent
    tracking.publish(SWEEP)
    for number in range(NUM_TRIALS):
        tracking.publish(trial(number, "RUNNING", folder))
    for number in range(NUM_TRIALS):
        tracking.publish(trial(number, "KILLED", folder))
    tracking.publish(SWEEP.changed(status="KILLED"))
    tracking.wait(briefly=True)
    assert tracking.is_store_down
    for number in range(NUM_TRIALS):
        stored = tracking.stored("trial", f"trial-{number}", "sweep")
        assert stored is not None
        assert stored.status == "KILLED", "`sync` publishes it like this"
    # Other runs of the command end, which would be waited for if the server responded.
    for number in range(3):
        tracking.publish(TrackedRun(key=f"other {number}", kind="influence", name="other"))
        tracking.wait()


def test_a_wait_for_the_last_records_can_be_interrupted(tracking):
    tracking.publish(SWEEP.changed(status="FINISHED"))

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def wait_until_the_alarm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        tracking.wait()

    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_until_the_alarm()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
    assert tracking.is_store_down
