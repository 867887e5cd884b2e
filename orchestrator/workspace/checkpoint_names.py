"""Names of checkpoint folders, and the checkpoints of a run by name.

A listing of the workspace needs them, so they import no PyTorch.
"""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINT_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("_")[2])


def find_checkpoints(run_folder: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, unchecked."""
    if not run_folder.is_dir():
        return []
    names = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in run_folder.iterdir()}
    found = [(int(match[1]), path) for path, match in names.items() if match]
    return [path for _, path in sorted(found)]
