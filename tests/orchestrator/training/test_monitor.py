"""The terminal shows speed, time left and problems while jobs train."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.watching import RunMonitor
from orchestrator.workspace.journal import Journal


class RecordingProgress(Progress):
    def __init__(self) -> None:
        self.shown: list[tuple[float, str, float | None]] = []
        self.notes: list[str] = []

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self.shown.append((done, text, seconds_left))

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def job(tmp_path: Path, tiny_model: dict[str, Any]) -> TrainingJob:
    return TrainingJob(
        run_folder=str(tmp_path / "run"),
        tokens_folder="unused",
        model=tiny_model,
        recipe=TrainingSettings(num_steps=100, num_tokens_per_step=64, iterate_from_fraction=0.5),
    )


def test_the_time_left_accounts_for_corrections(job: TrainingJob) -> None:
    progress, journal = RecordingProgress(), Journal(job.folder)
    monitor = RunMonitor({"iiet": job}, cast("Tracking", None), progress)
    monitor.poll()
    assert progress.shown[-1] == (0, "waiting for the first step", None)
    speed = {"train/loss": 5.5, "train/tokens_per_second": 640.0}
    journal.metrics(10, speed)
    monitor.poll()
    done, text, first = progress.shown[-1]
    assert (done, text) == (10, "loss iiet 5.50, 640 tokens/s")
    # 40 steps of the first stage at 0.1 s; 50 of the second, each dearer but not 2.5 times so.
    assert first is not None
    assert 40 * 0.1 + 50 * 0.1 < first < 40 * 0.1 + 50 * 0.25
    journal.metrics(60, speed)
    monitor.poll()
    assert progress.shown[-1][2] == pytest.approx(40 * 0.1)
    journal.metrics(100, speed)
    monitor.poll()
    assert progress.shown[-1] == (100, "", None)
    journal.close()


def test_a_speed_of_an_earlier_process_is_not_shown(job: TrainingJob) -> None:
    progress, journal = RecordingProgress(), Journal(job.folder)
    journal.metrics(60, {"train/loss": 5.5, "train/tokens_per_second": 640.0})
    time.sleep(0.01)  # Records are stamped in milliseconds.
    monitor = RunMonitor({"iiet": job}, cast("Tracking", None), progress)
    monitor.poll()
    assert progress.shown[-1] == (60, "loss iiet 5.50", None)
    journal.metrics(70, {"train/tokens_per_second": 320.0})
    monitor.poll()
    assert progress.shown[-1][1] == "loss iiet 5.50, 320 tokens/s"
    journal.event("resumed", step=60)  # A worker died.
    monitor.poll()
    assert progress.shown[-1][1] == "loss iiet 5.50"
    journal.close()


def test_unusual_events_are_noted(job: TrainingJob) -> None:
    progress, journal = RecordingProgress(), Journal(job.folder)
    monitor = RunMonitor({"iiet": job}, cast("Tracking", None), progress)
    journal.event("skipped", step=7, loss=float("nan"), gradient_norm=2.0)
    journal.event("damaged", text="a sentence")
    journal.event("compiled", seconds=41.3)
    journal.event("not compiled", text="another sentence")
    monitor.poll()
    assert progress.notes == [
        "iiet: step 7 was skipped: loss nan, gradient norm 2",
        "a sentence",
        "iiet: compiled in 41 s",
        "another sentence",
    ]
    journal.close()


def test_lines_and_bar_show_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", -1.0)
    out = io.StringIO()
    with Progress(Console(file=out, width=100)) as plain:
        plain.start("pretrain", 100)
        plain.advance(10, "loss 5.5", seconds_left=150.0)
    assert "pretrain: 10/100 loss 5.5, 2.5 min left" in out.getvalue()
    out = io.StringIO()
    with Progress(Console(file=out, width=100, force_terminal=True)) as bar:
        bar.start("pretrain", 100)
        bar.advance(10, "loss 5.5", seconds_left=7200.0)
    assert "2 h left" in out.getvalue()
