"""Names of files, folders and kinds of things that several packages read.

They are here so that a listing of the workspace imports no PyTorch, and a help text nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, get_args

JOB_NAME = "job.json"
"""What a training in this folder is."""
DONE_NAME = "done.json"
"""How a training ended that is finished."""
RUN_LOCK_NAME = "trial.lock"
"""Locked by the command that trains or measures in a folder; trials that measure other tasks on the
same weights share it."""
WORKERS_LOCK_NAME = "lock"
"""Locked by the process that trains in a folder; workers outlive a killed command by seconds."""
BEST = "best.json"
"""Names the checkpoint with the lowest validation loss."""
PROVENANCE = "provenance.json"
"""Origin and checksums of a checkpoint."""
RAY_FOLDER = "ray"
"""Ray Train's own files of a run; deleted at its end."""
STOPPED_NAME = "stopped-early.json"
"""Why a trial was stopped early."""
PLAN_FILE = "plan.json"
RESULTS_FILE = "results.json"
"""Plan and results of a sweep."""
OUTBOX_NAME = "tracking-outbox.jsonl"
"""Records that MLflow has not received."""
TEMPORARY_PREFIX = ".writing-"
"""Begins the name of a folder of tokens or teacher outputs that is not complete yet."""

Kind = Literal["runs", "checkpoints", "trials", "sweeps", "models"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What `list` lists."""


class RemovableKind(StrEnum):
    """What `clean` looks for."""

    TEMPORARY = "temporary"
    RAY = "ray"
    TEACHERS = "teachers"
    FIRST_STAGES = "first-stages"
    CHECKPOINTS = "checkpoints"
    DAMAGED = "damaged"
