"""The first stage of training in stages, trained once for all models that share it.

An IIET is first trained without corrections, so models with the same seed, rate and recipe are
equal until then. The first one stores its checkpoint and journal; later ones resume from it, with
bitwise equal results. Models that start at the same time each train the stage: none waits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from iiet.methods import METHODS
from orchestrator.models.folder import check_checkpoint
from orchestrator.records.training import TrainingJob
from orchestrator.training.job import JOURNAL_ONLY_FIELDS, job_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import delete_folder, new_folder
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.layout import PROVENANCE, checkpoint_name, step_of
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True)
class FirstStage:
    """The steps of a model before its corrections are switched on."""

    folder: Path
    """Holds the checkpoint after the last step, and a journal."""
    num_steps: int

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint after the last step."""
        return self.folder / checkpoint_name(self.num_steps)

    @property
    def exists(self) -> bool:
        """Whether the checkpoint is stored; it may be damaged."""
        return (self.checkpoint / PROVENANCE).is_file()

    def saves_steps(self, checkpoint: Path | None) -> bool:
        """Return whether the stage ends after a run's newest checkpoint, or the run has none."""
        return checkpoint is None or step_of(checkpoint) < self.num_steps

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """Return the stored checkpoint if it is intact, else None.

        A damaged one is reported and deleted: the next run that trains the stage stores it again.
        """
        if not self.folder.exists():
            return None
        try:
            check_checkpoint(self.checkpoint, with_training_state=True)
        except UserError as error:
            warn(f"{error}; the first stage is trained again")
            with suppress(OSError):  # Another process deleted it, or we may not.
                delete_folder(self.folder)
            return None
        return self.checkpoint

    def store(self, checkpoint: Path) -> None:
        """Store a run's checkpoint after the last step, and its metrics until then.

        Raises:
            OSError: If the disk is full.
        """
        with new_folder(self.folder) as temporary:
            shutil.copytree(checkpoint, temporary / checkpoint.name, copy_function=_link)
            journal = Journal(temporary)
            for step, values in metrics_until(checkpoint):
                journal.metrics(step, values)
            journal.close()


def first_stage_of(job: TrainingJob) -> FirstStage | None:
    """Return the first stage that a job may share with others; None if there is none."""
    config, recipe = job.model, job.recipe
    num_steps = round(recipe.num_steps * recipe.iterate_from_fraction)
    may_share = job.first_stages and job.objective == "pretrain" and not job.initial_folder
    has_stages = 0 < num_steps < recipe.num_steps and METHODS[config.method].has_corrections
    if not (may_share and has_stages):
        return None
    no_stages = {
        "iterate_from_fraction": 0.0,
        "iterate_ramp_fraction": 0.0,
        "elastic": None,
    }
    plain = job.model_copy(
        update={
            "model": replace(config, schedule=config.corrections.none(config.num_layers)),
            "recipe": recipe.model_copy(update=no_stages),
        }
    )
    journal_fields = {name: getattr(recipe, name) for name in JOURNAL_ONLY_FIELDS}
    key = content_key("first stage", job_key(plain), num_steps, journal_fields)
    return FirstStage(Path(str(job.first_stages)) / key, num_steps)


def metrics_until(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the steps and metrics in the journal beside a checkpoint, until the checkpoint."""
    return [
        (record["step"], record["values"])
        for record in read_journal(checkpoint.parent)[0]
        if record["kind"] == "metrics" and record["step"] <= step_of(checkpoint)
    ]


def share_first_stages(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Return the jobs; those whose first stage is neither stored nor shared store none."""
    stages = [first_stage_of(job) for job in jobs]
    users: dict[Path, set[str]] = {}
    for job, stage in zip(jobs, stages, strict=True):
        if stage:
            users.setdefault(stage.folder, set()).add(job.run_folder)
    return [
        job
        if stage and (stage.exists or len(users[stage.folder]) > 1)
        else job.model_copy(update={"first_stages": None})
        for job, stage in zip(jobs, stages, strict=True)
    ]


def _link(source: str, target: str) -> None:
    # Checkpoints are never modified; a link takes no disk space while the run keeps its own.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
