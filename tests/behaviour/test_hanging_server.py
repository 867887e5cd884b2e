"""An MLflow server that never answers delays neither training nor Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_size import SMALL

from orchestrator.planning.save_time import LEAST_SECONDS
from orchestrator.tracking.delivery import SHORT_WAIT_SECONDS
from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.workspace.names import OUTBOX_NAME

pytestmark = pytest.mark.slow

SECONDS_TO_CLOSE = 8.0  # Ray's processes, on a busy machine.


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("command", "section", "folders"),
    [
        (["pretrain", "--local"], "training", "runs/*"),
        pytest.param(["pretrain"], "training", "runs/*", marks=pytest.mark.long),
        pytest.param(
            ["sweep-threshold"], "distillation.training", "trials/*", marks=pytest.mark.long
        ),
    ],
    ids=["here", "under Ray", "a sweep"],
)
def test_ctrl_c_is_answered_at_once_while_mlflow_hangs(
    command: list[str], section: str, folders: str, silent_server: str, tmp_path: Path
) -> None:
    def start(command: list[str], settings: list[str], uri: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *command, "--workspace", str(tmp_path)]
            + [part for setting in settings for part in ("--set", setting)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        )

    if section != "training":
        teacher = start(["pretrain", "--local"], SMALL, "")
        printed, _ = teacher.communicate()
        assert teacher.returncode == 0, printed
    longer = [f"{section}.num_steps=100000", f"{section}.checkpoint_every_steps=50"]
    if section != "training":
        longer.append("distillation.teacher_cache=live")
    process = start(command, [*SMALL, *longer], silent_server)
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
    lines = map(json.loads, (tmp_path / OUTBOX_NAME).read_text().splitlines())
    statuses = [line.get("arguments", {}).get("status") for line in lines]
    assert statuses[-1] == "KILLED"
    num_trials = sum(1 for folder in tmp_path.glob("trials/*") if find_checkpoints(folder))
    assert statuses.count("KILLED") >= 1 + num_trials
