"""A server that accepts connections and never answers delays Ctrl-C by at most ten seconds."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from orchestrator.tracking import NestedRun, Tracking, open_tracking
from orchestrator.workspace.folders import open_workspace
from orchestrator.workspace.journal import Journal

NUM_TRIALS = 200
MOST_SECONDS = 10.0


@pytest.fixture
def tracking(tmp_path: Path, silent_server: str, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    """MLflow at the address of a silent server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    return open_tracking(open_workspace(tmp_path), warn=lambda text: None)


def trial(number: int, status: str, folder: Path) -> NestedRun:
    return NestedRun(
        key=f"trial-{number}", kind="trial", name=f"trial {number}", params={"n": str(number)},
        tags={}, metrics={"loss": 1.0}, journal_folder=folder, status=status,
    )  # fmt: skip


def statuses(tracking: Tracking) -> list[str | None]:
    return [record["arguments"].get("status") for record in tracking.outbox.records()]


def test_a_stop_of_a_sweep_with_many_trials_waits_once(tracking: Tracking, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trial")
    journal.metrics(1, {"train/loss": 1.0})
    journal.close()
    folder, started = journal.path.parent, time.monotonic()
    sweep = tracking.run("sweep", name="sweep", kind="sweep")
    for number in range(NUM_TRIALS):
        [run] = tracking.log_nested([trial(number, "RUNNING", folder)], parent=sweep)
        run.log_journal(folder)
    assert time.monotonic() - started < MOST_SECONDS, "nothing waits while trials run"
    started = time.monotonic()
    for number in range(NUM_TRIALS):
        tracking.log_nested([trial(number, "KILLED", folder)], parent=sweep)
    sweep.finish("KILLED")
    assert time.monotonic() - started < MOST_SECONDS
    assert tracking.is_store_down
    assert statuses(tracking).count("KILLED") == NUM_TRIALS + 1
    assert "RUNNING" not in statuses(tracking), "what is delivered later starts no ended run again"
    # Other runs of the command end, which would be waited for if the server responded.
    started = time.monotonic()
    for number in range(3):
        tracking.run(f"other {number}", name="other", kind="influence").finish()
    assert time.monotonic() - started < MOST_SECONDS


def test_a_wait_for_the_last_records_can_be_interrupted(tracking: Tracking) -> None:
    sweep = tracking.run("sweep", name="sweep", kind="sweep")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep.finish()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, earlier)
    assert time.monotonic() - started < MOST_SECONDS
    assert statuses(tracking) == [None, "FINISHED"]
