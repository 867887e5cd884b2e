"""Which checkpoints of a run stay on disk: the newest few, and the best if it is asked for.

What goes is renamed before it is deleted, and what a crash left half-written or half-deleted has a
name that no checkpoint has, so whatever looks like one is one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.workspace.files import (
    damage_as_user_error,
    delete_folder,
    read_json_object,
    write_json,
)
from orchestrator.workspace.folders import is_valid_name

BEST = "best.json"


def record_best(checkpoint: Path, step: int, validation_loss: float) -> None:
    """Name a checkpoint in its run's `best.json`, unless an earlier one there is as good."""
    path = checkpoint.parent / BEST
    best = read_json_object(path) if best_checkpoint(checkpoint.parent) else None
    with damage_as_user_error(path):
        is_better = best is None or validation_loss < best["validation_loss"]
    if is_better:
        found = {"checkpoint": checkpoint.name, "step": step, "validation_loss": validation_loss}
        write_json(path, found)


def best_checkpoint(run_folder: Path) -> Path | None:
    """Return the checkpoint that `best.json` names; None if none was remembered or it is gone.

    Raises:
        UserError: If the file is damaged.
    """
    best = read_json_object(run_folder / BEST)
    folder = (
        run_folder / best["checkpoint"] if best and is_valid_name(best.get("checkpoint")) else None
    )
    return folder if folder and folder.is_dir() else None


def prune_checkpoints(run_folder: Path, num_kept: int, *, keep: Path | None = None) -> None:
    """Delete all but the newest checkpoints and one to keep, and what a crash left half-written."""
    for folder in find_checkpoints(run_folder)[:-num_kept]:
        if folder != keep:
            delete_folder(folder)
    remove_partial_checkpoints(run_folder)


def remove_partial_checkpoints(run_folder: Path) -> None:
    """Delete what a crash left half-written or half-deleted."""
    for leftover in run_folder.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
