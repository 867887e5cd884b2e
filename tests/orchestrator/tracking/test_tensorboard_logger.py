"""TensorBoard reads what the journals hold, each point once."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records.tracked_run import Status, TrackedRun
from orchestrator.tracking.loggers import LoggedRuns
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace


def run_of(journal: Path, status: Status = "RUNNING", **more: Any) -> TrackedRun:
    trial = {"key": "k", "name": "2,1", "parent": "s", "tags": {"iiet.sweep": "toy"}}
    return TrackedRun(kind="trial", journal=str(journal), status=status, **{**trial, **more})


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all points below a folder as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    found = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    return {tag: [(p.step, round(p.value, 4)) for p in events] for tag, events in found.items()}


def write(journal: Path, steps: range, **more: float) -> None:
    file = Journal(journal)
    for step in steps:
        file.metrics(step, {"train/loss": 5.0 - step / 10, **more})
    file.event("finished")
    file.close()


def test_every_point_is_there_at_its_time(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "run", range(1, 4))
    write(tmp_path / "run", range(4, 5), **{"validation/loss": 4.5})
    LoggedRuns("tensorboard", tmp_path).log(run_of(tmp_path / "run", "FINISHED"))
    folder = tmp_path / "tensorboard" / "toy" / "2,1"
    assert points(folder) == {
        "train/loss": [(1, 4.9), (2, 4.8), (3, 4.7), (4, 4.6)],
        "validation/loss": [(4, 4.5)],
    }
    read = EventAccumulator(str(folder))
    read.Reload()
    written = (tmp_path / "run" / "journal.jsonl").stat().st_mtime
    assert read.Scalars("train/loss")[-1].wall_time == pytest.approx(written, abs=60)


def test_a_resumed_training_has_each_point_once(tmp_path):
    journal, folder = tmp_path / "run", tmp_path / "tensorboard" / "toy" / "2,1"
    log = LoggedRuns("tensorboard", tmp_path)
    write(journal, range(1, 4))
    log.log(run_of(journal))
    write(journal, range(3, 6))  # It was killed, and repeats a step.
    log.log(run_of(journal))
    expected = {"train/loss": [(step, round(5 - step / 10, 4)) for step in range(1, 6)]}
    assert points(folder) == expected
    # Another process, which finds what this one has written.
    again = LoggedRuns("tensorboard", tmp_path)
    again.log(run_of(journal))
    again.log(run_of(journal, "FINISHED"))
    assert points(folder) == expected
    assert len(list(folder.iterdir())) == 1


def test_metrics_after_the_end_are_added(tmp_path):
    log = LoggedRuns("tensorboard", tmp_path)
    write(tmp_path / "run", range(1, 2))
    log.log(run_of(tmp_path / "run", "FINISHED"))
    write(tmp_path / "run", range(2, 3), **{"train/kl": math.nan})
    log.log(run_of(tmp_path / "run", "FINISHED"))
    found = points(tmp_path / "tensorboard" / "toy" / "2,1")
    assert found["train/loss"] == [(1, 4.9), (2, 4.8)]
    assert math.isnan(found["train/kl"][0][1])


def test_results_follow_once_and_measurements_without_a_training_are_left_out(tmp_path):
    log, name = LoggedRuns("tensorboard", tmp_path), "a/b: c"
    write(tmp_path / "run", range(1, 3))
    alone = {"key": "a", "name": name, "parent": None}
    log.log(TrackedRun(kind="evaluate", points=[("accuracy", 0.5, 0)], **alone))
    log.log(run_of(tmp_path / "run", **alone))
    for accuracy in (0.5, 0.5, 0.75):
        measured = [("accuracy", accuracy, 2), ("train/loss", 4.0, 2)]
        log.log(run_of(tmp_path / "run", "FINISHED", points=measured, **alone))
    [folder] = (tmp_path / "tensorboard").iterdir()
    assert folder.name == "a_b_ c"
    losses = [(1, 4.9), (2, 4.8)]
    assert points(folder) == {"accuracy": [(2, 0.5), (2, 0.75)], "train/loss": losses}


@pytest.mark.slow
def test_tracked_runs_are_mirrored_if_the_setting_says_so(tmp_path, monkeypatch):
    """A folder that cannot be written is one warning."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workspace = Workspace(tmp_path / "ws")
    workspace.root.mkdir()
    write(workspace.runs / "iiet", range(1, 4))
    for loggers, has_files in ((("mlflow",), False), (("mlflow", "tensorboard"), True)):
        tracking = open_tracking(workspace, warn=pytest.fail, loggers=loggers)
        alone = {"name": "iiet", "kind": "pretrain"}
        run = TrackedRun(key="k", journal=str(workspace.runs / "iiet"), **alone)
        tracking.publish(run)
        run_id = tracking.run_id(run)
        assert (workspace.root / "tensorboard").exists() == has_files
    assert len(points(workspace.root / "tensorboard" / "iiet")["train/loss"]) == 3
    client = tracking.store.connect()
    assert len(client.get_metric_history(str(run_id), "train/loss")) == 3
    shutil.rmtree(workspace.root / "tensorboard")
    (workspace.root / "tensorboard").write_text("a file")
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append, loggers=loggers)
    for _ in range(2):
        tracking.publish(run)
        assert tracking.run_id(run) == run_id
    [warning] = warnings
    assert warning.startswith("the logger tensorboard cannot log to ")
