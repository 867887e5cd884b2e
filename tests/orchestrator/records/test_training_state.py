"""The state of a training is that of its folder, whatever was left there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import refused

from orchestrator.models.folder import check_checkpoint
from orchestrator.records.training_state import DIVERGED_EVENT, Training, TrainingState
from orchestrator.workspace.errors import DamagedFile, UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, STOPPED_NAME, find_checkpoints


def _diverge(run: Path, *later_events: str) -> None:
    (run / DONE_NAME).unlink()
    journal = Journal(run)
    for name in (DIVERGED_EVENT, *later_events):
        journal.event(name)
    journal.close()


def _import(run: Path) -> None:
    (run / DONE_NAME).unlink()
    (run / JOB_NAME).unlink()


def _stop_early(run: Path) -> None:
    (run / DONE_NAME).unlink()
    (run / STOPPED_NAME).touch()


FOLDERS: dict[str, tuple[Callable[[Path], object], TrainingState]] = {
    "a run": (lambda _: None, TrainingState.FINISHED),
    "without its end": (lambda run: (run / DONE_NAME).unlink(), TrainingState.STOPPED),
    "without its last checkpoint": (
        lambda run: shutil.rmtree(find_checkpoints(run)[-1]),
        TrainingState.STOPPED,
    ),
    "diverged": (_diverge, TrainingState.DIVERGED),
    "diverged before its profile was complete": (
        lambda run: _diverge(run, "not profiled"),
        TrainingState.DIVERGED,
    ),
    "diverged, and begun again": (lambda run: _diverge(run, "resumed"), TrainingState.STOPPED),
    "stopped early": (_stop_early, TrainingState.STOPPED_EARLY),
    "at its end when it was stopped": (
        lambda run: (run / STOPPED_NAME).touch(),
        TrainingState.FINISHED,
    ),
    "without a training": (_import, TrainingState.IMPORTED),
    "missing": (shutil.rmtree, TrainingState.EMPTY),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_state_is_that_of_the_folder(name, trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    harm, state = FOLDERS[name]
    harm(run)
    training = Training(run)
    assert training.state is state
    assert training.step == (0 if state is TrainingState.EMPTY else 2)


def test_a_file_that_is_missing_or_cannot_be_read_is_named(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    job = (run / JOB_NAME).read_text()
    (run / JOB_NAME).unlink()
    with refused(UserError, f"run/{JOB_NAME}", "missing"):
        Training(run)
    (run / JOB_NAME).write_text(job)
    (run / DONE_NAME).write_text("{}")
    with refused(DamagedFile, f"run/{DONE_NAME}"):
        Training(run)


def test_a_last_checkpoint_counts_if_it_is_intact_for_who_checks_it(trained_run, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(trained_run, run)
    [checkpoint] = find_checkpoints(run)
    (checkpoint / "model.safetensors").write_bytes(b"")
    assert Training(run).state is TrainingState.FINISHED
    assert Training(run).outcome.checkpoint == str(checkpoint)
    checked = Training(run, check_checkpoint)
    assert checked.state is TrainingState.STOPPED
    assert "model.safetensors" in str(checked.lost_end)
