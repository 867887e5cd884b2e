"""Start a command of the program in a process of its own, to interrupt it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_command(
    *words: str, workspace: Path, settings: Sequence[str], tracking_uri: str | None = None
) -> subprocess.Popen[str]:
    """Start a command, with all its output in one pipe.

    Args:
        words: The command and its options.
        workspace: Where it works.
        settings: Values of `--set`.
        tracking_uri: Address of MLflow's store; the workspace's own if unset.
    """
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    if tracking_uri:
        environment["MLFLOW_TRACKING_URI"] = tracking_uri
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *words, "--workspace", str(workspace)]
        + [part for setting in settings for part in ("--set", setting)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
