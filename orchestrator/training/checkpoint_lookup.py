"""Find the checkpoints of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from iiet.schedule import IterationSchedule
from orchestrator.training.checkpoint import check_checkpoint, served_schedules
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import CHECKPOINT_NAME, PROVENANCE, find_checkpoints, step_of


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, intact or damaged, and not a run folder."""
    return (path / PROVENANCE).is_file() or bool(CHECKPOINT_NAME.fullmatch(path.name))


def known_schedules(folder: Path) -> tuple[IterationSchedule, ...]:
    """Return the `served_schedules` of a checkpoint; of another model folder none are known.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    return served_schedules(folder) if is_checkpoint(folder) else ()


def newest_intact_checkpoint(
    run_folder: Path, *, up_to_step: float = math.inf, with_training_state: bool = False
) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint of a run or None, and what is wrong with newer ones."""
    damage = []
    for folder in reversed(find_checkpoints(run_folder)):
        if step_of(folder) > up_to_step:
            continue
        try:
            check_checkpoint(folder, with_training_state=with_training_state)
        except UserError as error:
            damage.append(str(error))
        else:
            return folder, damage
    return None, damage


def newest_checkpoint(
    run_folder: Path,
    warn: Callable[[str], None] | None = None,
    *,
    with_training_state: bool = False,
) -> Path | None:
    """Return the newest intact checkpoint of a run, or None; warn of each damaged newer one."""
    newest, damage = newest_intact_checkpoint(run_folder, with_training_state=with_training_state)
    if warn is not None:
        instead = f"{newest} is used instead" if newest else "no older one is left"
        for problem in damage:
            warn(f"{problem}; {instead}")
    return newest
