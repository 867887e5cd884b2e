"""An MLflow server that never answers delays neither training nor Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commands import Started, run_command, settings_options
from small_size import SMALL

from orchestrator.planning.estimate import LEAST_SECONDS
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.tracking.tracker import SHORT_WAIT_SECONDS
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow

SECONDS_TO_CLOSE = 8.0  # Ray's processes, on a busy machine.


@pytest.mark.parametrize(
    ("command", "section", "folders"),
    [
        (["pretrain", "--local"], "training", "runs/*"),
        pytest.param(
            ["sweep-threshold"], "distillation.training", "trials/*", marks=pytest.mark.long
        ),
    ],
    ids=["here", "a sweep"],
)
def test_ctrl_c_is_answered_at_once_while_mlflow_hangs(
    command: list[str], section: str, folders: str, silent_server: str, tmp_path: Path
) -> None:
    place = ("--workspace", str(tmp_path))
    if section != "training":
        run_command("pretrain", "--local", *settings_options(SMALL), *place)
    longer = [f"{section}.num_steps=100000", f"{section}.checkpoint_every_steps=50"]
    if section != "training":
        longer.append("distillation.teacher_cache=false")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": silent_server}
    options = settings_options([*SMALL, *longer])
    process = Started(*command, *options, *place, environment=environment)
    # The first request gets no answer for half a minute; the training does not wait for it.
    while not any(map(find_checkpoints, tmp_path.glob(folders))):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    asked_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    seconds = time.monotonic() - asked_at
    assert process.returncode == 130, printed
    assert seconds < LEAST_SECONDS + SHORT_WAIT_SECONDS + SECONDS_TO_CLOSE, printed
    assert "saved at step" in printed
    tracked = [TrackedRun.read(path) for path in (tmp_path / "tracked").rglob("*.json")]
    statuses = [run.status for run in tracked if run]
    assert "RUNNING" not in statuses
    num_trials = sum(1 for folder in tmp_path.glob("trials/*") if find_checkpoints(folder))
    assert statuses.count("KILLED") >= 1 + num_trials
