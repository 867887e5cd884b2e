"""A training: everything that determines it, and how it ended.

The same job runs in this process (`training/run.py`), in a Ray Train worker or in a Ray Tune trial.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from iiet.distillation import DistillationConfig
from orchestrator.records.record import Config, Record, WorkspacePath
from orchestrator.settings import TrainingSettings


class TrainingJob(Record):
    """Everything that determines one training. Paths and `section` are not part of the key."""

    run_folder: WorkspacePath
    """Folder of journal, checkpoints and result; every worker must see it."""
    tokens_folder: WorkspacePath
    """Prepared tokens; empty in a dry run while there are none."""
    model: Config
    """The model, with the iteration schedule to train."""
    recipe: TrainingSettings
    """Steps, batch, learning rate, when to validate and save."""
    objective: Literal["pretrain", "distill", "cross_entropy"] = "pretrain"
    """`pretrain`: cross-entropy from random weights; `distill`: from a teacher; `cross_entropy`: a
    student trained without its teacher."""
    teacher_folder: WorkspacePath | None = None
    """Checkpoint of the frozen teacher; for `distill`."""
    initial_folder: WorkspacePath | None = None
    """Checkpoint with the initial weights; random weights when unset."""
    kept_layers: tuple[int, ...] | None = None
    """Layers of the initial weights that the model has, the first being 0; all when unset."""
    continued_from: WorkspacePath | None = None
    """Checkpoint of a shorter run whose steps this one has in common with it; it starts there."""
    distillation: DistillationConfig | None = None
    """The distillation loss; defaults when unset."""
    teacher_cache: WorkspacePath | None = None
    """Folder of the teacher's stored outputs."""
    first_stages: WorkspacePath | None = None
    """Folder of first stages shared between models; nothing is shared when unset."""
    storage: str | None = None
    """URI for copies of the checkpoints."""
    section: str = "training"
    """Settings section of the recipe, named in errors."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """JSON-able entries for the `provenance.json` of every checkpoint; not part of the key."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder)


class TrainingOutcome(Record):
    """The result of a run, finished or stopped."""

    checkpoint: WorkspacePath | None
    """Folder of the newest checkpoint; None if the run was stopped before the first."""
    step: int
    """Optimizer steps done."""
    finished: bool
    """False if the run was stopped on request; the same job resumes it."""
    validation_loss: float = math.nan
    """Latest validation loss; NaN before the first."""
    train_seconds: float = 0.0
    """Time spent in steps, over all restarts."""
    num_tokens: int = 0
    """Tokens trained on."""
    training_flops: float = 0.0
    """Training FLOPs, with the forward passes of a teacher that ran."""
    shared_flops: float = 0.0
    """Part of them that another run spent: on a shared first stage, or before it was continued."""
