"""The terminal shows speed, time left and problems of jobs; MLflow shows how each one ended."""

from __future__ import annotations

import math
import re
from itertools import count
from typing import cast
from unittest.mock import MagicMock

import pytest
from kept_progress import KeptProgress

from orchestrator.cluster.task import run_local_jobs
from orchestrator.records.tracked_run import REASON_TAG, TrackedRun
from orchestrator.records.training import TrainingJob
from orchestrator.settings import resolve_settings
from orchestrator.tracking.tracker import Tracking
from orchestrator.training.watching import RunMonitor
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.journal import Journal

UNKNOWN = pytest.approx(math.nan, nan_ok=True)
STARTING = "starting, no step yet"
FIRST_STAGE = ", r = 0 until step 50"


@pytest.fixture
def job(tiny_job) -> TrainingJob:
    return tiny_job(num_steps=100, iterate_from_fraction=0.5)


SPEED = {"train/loss": 5.5, "train/tokens_per_second": 640.0}


def test_the_time_left_accounts_for_corrections(job, monkeypatch):
    clock = count()  # No two records have the same time.
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    progress = KeptProgress()
    journal = Journal(job.folder)
    monitor = RunMonitor({"iiet": job}, cast("Tracking", None), progress)
    monitor.poll()
    assert progress.shown[-1] == (0, STARTING, UNKNOWN)
    journal.event("started")
    # The first record includes what is done once, so its speed does not count.
    journal.metrics(2, {**SPEED, "train/tokens_per_second": 1.0})
    monitor.poll()
    assert progress.shown[-1] == (2, f"loss iiet 5.50{FIRST_STAGE}", UNKNOWN)
    journal.metrics(6, SPEED)
    monitor.poll()
    assert progress.shown[-1] == (6, f"loss iiet 5.50, 640 tokens/s{FIRST_STAGE}", UNKNOWN)
    journal.metrics(10, SPEED)
    monitor.poll()
    num_done, text, seconds_left = progress.shown[-1]
    assert (num_done, text) == (10, f"loss iiet 5.50, 640 tokens/s{FIRST_STAGE}")
    # 40 steps of the first stage at 0.1 s; 50 of the second, each dearer but not 2.5 times so.
    assert seconds_left is not None
    assert 40 * 0.1 + 50 * 0.1 < seconds_left < 40 * 0.1 + 50 * 0.25
    journal.metrics(60, SPEED)
    monitor.poll()
    assert progress.shown[-1][1:] == ("loss iiet 5.50, 640 tokens/s", pytest.approx(40 * 0.1))
    # A worker died, or this is another process: the speed was that of an earlier one.
    journal.event("resumed", step=60)
    monitor.poll()
    assert progress.shown[-1] == (60, STARTING, UNKNOWN)
    journal.metrics(70, SPEED)
    journal.metrics(70, SPEED)
    later = RunMonitor({"iiet": job}, cast("Tracking", None), progress)
    later.poll()
    assert progress.shown[-1] == (70, STARTING, UNKNOWN)
    journal.metrics(75, SPEED)
    journal.metrics(80, {"train/tokens_per_second": 480.0})
    journal.metrics(90, {"train/tokens_per_second": 960.0})
    later.poll()  # Ten steps took as long at both speeds together as at 640 tokens/s.
    assert progress.shown[-1] == (90, "loss iiet 5.50, 640 tokens/s", pytest.approx(1.0))
    journal.metrics(100, SPEED)
    later.poll()
    assert progress.shown[-1] == (100, "", UNKNOWN)
    journal.close()


def test_the_time_left_counts_jobs_that_wait_and_is_unknown_while_one_begins(tiny_job):
    jobs = {
        name: tiny_job(name, num_steps=10, iterate_from_fraction=0.0)
        for name in ("first", "second")
    }
    progress = KeptProgress()
    journal = Journal(jobs["first"].folder)
    monitor = RunMonitor(jobs, cast("Tracking", None), progress)
    for step in (2, 3, 4):
        journal.metrics(step, {"train/loss": 2.0, "train/tokens_per_second": 32.0})
    monitor.poll()
    journal.close()
    # 16 steps of 64 tokens.
    assert progress.shown == [(4, "loss first 2.00, 32 tokens/s", pytest.approx(32.0))]
    second_journal = Journal(jobs["second"].folder)
    second_journal.event("started")
    second_journal.close()
    monitor.poll()
    assert progress.shown[-1] == (4, "loss first 2.00, 32 tokens/s", UNKNOWN)


def test_mlflow_shows_each_training_by_its_own_outcome(tiny_job):
    jobs = {
        "high": tiny_job("first", num_steps=3, learning_rate=1e9, warmup_steps=0),
        "higher": tiny_job("second", num_steps=3, learning_rate=1e12, warmup_steps=0),
        "low": tiny_job("third", num_steps=1),
    }
    published = dict[str, TrackedRun]()
    tracking = MagicMock()
    tracking.publish = lambda *runs: published.update({run.name: run for run in runs})
    progress = KeptProgress()
    monitor = RunMonitor(jobs, tracking, progress)
    monitor.open_runs("pretrain", dict.fromkeys(jobs, resolve_settings({})))
    with pytest.raises(RunFailed) as caught, monitor:
        run_local_jobs([*jobs.values()], failed=monitor.note_failure)
    reasons = {name: run.tags[REASON_TAG] for name, run in published.items()}
    assert published["third"].status == "FINISHED"
    assert reasons["third"] == ""
    for name, rate in (("first", "1e+09"), ("second", "1e+12")):
        assert published[name].status == "FAILED"
        assert re.findall(r"learning_rate \(here (1e\S\d+)", reasons[name]) == [rate]
        assert reasons[name] in str(caught.value)
    # Each was said when it happened.
    assert [note.partition(":")[0] for note in progress.notes] == ["high failed", "higher failed"]
