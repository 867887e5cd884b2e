"""The first stage of training in stages, made once for all models that have it in common.

Before its corrections are switched on an IIET is trained without any, whatever its schedule. So
models of one seed, rate and recipe are the same up to there, r = 0 among them, and what differs
comes after. The first of them that gets there puts its checkpoint, and the record so far, into a
folder named by the hash of all that determines them; who starts later goes on from there. A run
that goes on from a checkpoint equals one that never stopped to the last bit, so a model comes out
as if it had made all steps itself. Nobody waits for it: models that start at the same time each
make it. It stays in the workspace, as checkpoints do, and takes the bytes of one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from iiet.methods import METHODS
from orchestrator.training.checkpoint import (
    PROVENANCE,
    check_checkpoint,
    checkpoint_name,
    load_provenance,
)
from orchestrator.training.job import JOURNAL_ONLY_FIELDS, TrainingJob, job_key
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import delete_folder
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True)
class FirstStage:
    """The steps that a model makes before its corrections are switched on."""

    folder: Path
    """Where they are put and found: the last one's checkpoint, and a journal."""
    num_steps: int
    """How many they are."""

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint after the last of them."""
        return self.folder / checkpoint_name(self.num_steps)

    @property
    def is_there(self) -> bool:
        """Whether somebody has put it there; it may be damaged."""
        return (self.checkpoint / PROVENANCE).is_file()

    def is_ahead_of(self, checkpoint: Path | None) -> bool:
        """Whether a run with this checkpoint, or none, would save steps by it."""
        return checkpoint is None or int(load_provenance(checkpoint)["step"]) < self.num_steps

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to go on from; None if there is none that is whole. A damaged one
        is deleted, so that the next run to get there puts another in its place.

        Args:
            warn: Told of a damaged one.
        """
        if not self.folder.exists():
            return None
        try:
            check_checkpoint(self.checkpoint)
        except UserError as error:
            warn(f"{error}; the first stage is made anew")
            with suppress(OSError):  # Gone already, or not ours to delete.
                delete_folder(self.folder)
            return None
        return self.checkpoint

    def record(self) -> list[tuple[int, dict[str, float]]]:
        """Return the steps and numbers that its journal holds, in their order."""
        return _numbers(self.folder, self.num_steps)

    def put(self, checkpoint: Path) -> None:
        """Put a run's checkpoint after the last step there, with the run's record up to it.

        Raises:
            OSError: If there is no room for it.
        """
        temporary = self.folder.with_name(f"{self.folder.name}.new.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, temporary / checkpoint.name, copy_function=_link)
            journal = Journal(temporary)
            for step, values in _numbers(checkpoint.parent, self.num_steps):
                journal.metrics(step, values)
            journal.close()
            temporary.rename(self.folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self.is_there:  # Else another one was faster.
                raise


def first_stage_of(job: TrainingJob) -> FirstStage | None:
    """Return the first stage that a job shares; None if it has none, or keeps it to itself."""
    config, recipe = job.config(), job.recipe
    num_steps = round(recipe.num_steps * recipe.iterate_from_fraction)
    may_share = job.first_stages and job.objective == "pretrain" and not job.initial_folder
    is_part = 0 < num_steps < recipe.num_steps
    if not (may_share and is_part and METHODS[config.method].has_corrections):
        return None
    plain = replace(
        job,
        model=replace(config, schedule=config.corrections.none(config.num_layers)).to_dict(),
        recipe=recipe.model_copy(
            update={"iterate_from_fraction": 0.0, "iterate_ramp_fraction": 0.0}
        ),
    )
    watched = {name: getattr(recipe, name) for name in JOURNAL_ONLY_FIELDS}
    key = content_key("first stage", job_key(plain), num_steps, watched)
    return FirstStage(Path(str(job.first_stages)) / key, num_steps)


def share_first_stages(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Return the jobs, those without `first_stages` that have no first stage in common with another
    one of them, nor one that is there already.
    """
    stages = [first_stage_of(job) for job in jobs]
    users: dict[Path, set[str]] = {}
    for job, stage in zip(jobs, stages, strict=True):
        if stage:
            users.setdefault(stage.folder, set()).add(job.run_folder)
    return [
        job
        if stage and (stage.is_there or len(users[stage.folder]) > 1)
        else replace(job, first_stages=None)
        for job, stage in zip(jobs, stages, strict=True)
    ]


def _numbers(folder: Path, num_steps: int) -> list[tuple[int, dict[str, float]]]:
    records, _ = read_journal(folder)
    return [
        (record["step"], record["values"])
        for record in records
        if record["kind"] == "metrics" and record["step"] <= num_steps
    ]


def _link(source: str, target: str) -> None:
    # Checkpoints are never written to again; a link takes no room as long as the run keeps its own.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
