"""Which checkpoints of a run stay on disk: the newest few, and optionally the best.

A checkpoint is renamed before it is deleted, so a folder with a checkpoint's name is complete.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.training.checkpoint_lookup import find_checkpoints
from orchestrator.workspace.files import damage_as_user_error, read_json_object, write_json
from orchestrator.workspace.folders import is_valid_name
from orchestrator.workspace.whole_folders import delete_folder, delete_leftovers

BEST = "best.json"


def record_best(checkpoint: Path, step: int, validation_loss: float) -> None:
    """Record a checkpoint in `best.json`, unless the one there is at least as good."""
    path = checkpoint.parent / BEST
    best = read_json_object(path) if best_checkpoint(checkpoint.parent) else None
    with damage_as_user_error(path):
        is_better = best is None or validation_loss < best["validation_loss"]
    if is_better:
        found = {"checkpoint": checkpoint.name, "step": step, "validation_loss": validation_loss}
        write_json(path, found)


def best_checkpoint(run_folder: Path) -> Path | None:
    """Return the checkpoint that `best.json` names; None if there is none or it was deleted.

    Raises:
        UserError: If the file is damaged.
    """
    best = read_json_object(run_folder / BEST)
    folder = (
        run_folder / best["checkpoint"] if best and is_valid_name(best.get("checkpoint")) else None
    )
    return folder if folder and folder.is_dir() else None


def prune_checkpoints(run_folder: Path, num_kept: int, *, keep: Path | None = None) -> None:
    """Delete all checkpoints but the newest and `keep`; delete partial ones."""
    for folder in find_checkpoints(run_folder)[:-num_kept]:
        if folder != keep:
            delete_folder(folder)
    delete_leftovers(run_folder)
