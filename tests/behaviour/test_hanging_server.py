"""An MLflow server that never answers delays neither training nor Ctrl-C."""

import os
import signal
import time

import pytest
from commands import Started, settings_options
from small_size import SMALL

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.tracking.tracker import SHORT_WAIT_SECONDS
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow

SECONDS_TO_SAVE_AND_CLOSE = 12.0  # On a busy machine.


def test_ctrl_c_is_answered_at_once_while_mlflow_hangs(silent_server, tmp_path):
    longer = ["training.num_steps=100000", "training.checkpoint_every_steps=50"]
    command = ["pretrain", "--local", *settings_options([*SMALL, *longer], "pretrain")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": silent_server}
    process = Started(*command, "--workspace", str(tmp_path), environment=environment)
    # The first request gets no answer for half a minute; the training does not wait for it.
    process.wait_for(lambda: any(map(find_checkpoints, tmp_path.glob("runs/*"))))
    asked_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    seconds = time.monotonic() - asked_at
    assert process.returncode == 130, printed
    assert seconds < SHORT_WAIT_SECONDS + SECONDS_TO_SAVE_AND_CLOSE, printed
    assert "saved at step" in printed
    [tracked] = map(TrackedRun.read, (tmp_path / "tracked").rglob("*.json"))
    assert tracked.status == "KILLED"
