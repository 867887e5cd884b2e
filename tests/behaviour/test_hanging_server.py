"""An MLflow server that never answers delays neither training nor Ctrl-C."""

import os
import signal

import pytest
from commands import Started, settings_options
from small_size import SMALL

from orchestrator.records.tracked_run import TrackedRun
from orchestrator.workspace.layout import find_checkpoints

pytestmark = pytest.mark.slow


def test_ctrl_c_is_answered_at_once_while_mlflow_hangs(silent_server, tmp_path):
    longer = ["training.num_steps=100000", "training.checkpoint_every_steps=50"]
    command = ["pretrain", "--local", *settings_options([*SMALL, *longer], "pretrain")]
    # Who waits for an answer waits longer than this test.
    patient = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3000", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    environment = {**os.environ, **patient, "MLFLOW_TRACKING_URI": silent_server}
    process = Started(*command, "--workspace", str(tmp_path), environment=environment)
    # The first request gets no answer; the training does not wait for it.
    process.wait_for(lambda: any(map(find_checkpoints, tmp_path.glob("runs/*"))))
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "saved at step" in printed
    [tracked] = map(TrackedRun.read, (tmp_path / "tracked").rglob("*.json"))
    assert tracked.status == "KILLED"
