"""Write checkpoints in a background thread: a step waits only for a copy of the state in memory,
on GPUs only its update of the weights (`host_copies.py`).

One checkpoint is written at a time: the next one, a stop and the end of the run wait for it, and
raise its error (full disk) on all workers. A killed process loses at most that checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from iiet.decoder import Decoder
from orchestrator.data.store import PreparedData
from orchestrator.models.folder import ELASTIC, JOB_KEY, read_text_files, weights_key
from orchestrator.records.training import TrainingJob
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.training.distributed import World, run_on_first
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.host_copies import HostCopies
from orchestrator.training.job import job_key
from orchestrator.training.learning_rate import stable_steps
from orchestrator.training.loop import Position
from orchestrator.training.schedules import elastic_family
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import damage_as_user_error, delete_folder, read_json, write_json
from orchestrator.workspace.layout import BEST, checkpoint_name, find_checkpoints, is_valid_name
from orchestrator.workspace.provenance import environment, extension_packages

if TYPE_CHECKING:
    from orchestrator.training.remote_copy import RemoteCopy

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, PyTorch and safetensors raise if the disk is full."""


class CheckpointWriteFailed(RunFailed):
    """A checkpoint could not be written; retrying at once would fail again."""


class CheckpointWriter:
    """Saves one run. Every worker calls it at the same steps; the first worker writes."""

    def __init__(
        self, job: TrainingJob, world: World, data: PreparedData, event: Callable[..., None]
    ) -> None:
        self.checkpoint: Path | None = None
        """The newest checkpoint that is written; known to the first worker."""
        self.first_stage = first_stage_of(job)
        """First stage shared with other models, if any."""
        self._job, self._world, self._data, self._event = job, world, data, event
        self._key = job_key(job)
        self._copies = HostCopies(world.device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        # A student keeps the text files of the imported model that it was made from.
        origin = job.teacher_folder or job.initial_folder
        self._text_files = read_text_files(Path(origin)) if origin else {}
        self._remote: RemoteCopy | None = None
        if job.storage and world.is_first:
            from orchestrator.training.remote_copy import RemoteCopy  # importing pyarrow is slow

            self._remote = RemoteCopy(job.storage, job.folder, self._key)

    def download(self) -> Path | None:
        """Download the newest checkpoint from the run's storage; None if there is none.

        Raises:
            RunFailed: If the storage does not answer.
        """
        if self._remote is None:
            return None
        from orchestrator.training.remote_copy import COPY_ERRORS, one_line

        try:
            return self._remote.download(lambda text: self._event("damaged", text=text))
        except COPY_ERRORS as error:
            raise RunFailed(
                f"{self._job.storage} may hold checkpoints to resume from, and does not answer "
                f"({one_line(error)}); try again, or unset cluster.storage to start anew"
            ) from None

    def resume_from(self, checkpoint: Path, step: int) -> None:
        """Continue after a checkpoint that is already written."""
        self.checkpoint, self._saved_step = checkpoint, step

    def is_due(self, step: int) -> bool:
        """Return whether a first stage or the stable part ends, or the minutes have passed."""
        minutes = self._job.recipe.checkpoint_every_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes
        return is_late or step == stable_steps(self._job.recipe) or self._ends_first_stage(step)

    def save(self, position: Position, decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Start to write a checkpoint, unless this step has one or is the start.

        Raises:
            CheckpointWriteFailed: If the previous checkpoint could not be written.
        """
        if position.step in (0, self._saved_step):
            return
        run_on_first(self.finish, self._world)
        self._saved_step, self._saved_at = position.step, time.monotonic()
        is_first = self._world.is_first
        if not (is_first or self._world.is_sharded):
            return
        self._copies.order_updates(optimizer)
        state = {"weights": decoder.state_dict(), "optimizer": optimizer.state_dict()}
        copied = self._copies.copy(state, keep=is_first)
        training_state = {
            "optimizer": copied["optimizer"],
            "position": asdict(position),
            "random": _random_state(self._world),
        }
        if is_first:
            arguments = replace(position), copied["weights"], training_state
            self._writing = self._pool.submit(self._write, *arguments)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointWriteFailed: If it could not be written; earlier ones are unchanged.
        """
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except WRITE_ERRORS as error:
            raise CheckpointWriteFailed(
                f"the checkpoint after step {self._saved_step} could not be written to "
                f"{self._job.folder} ({error}); free disk space, then the same command resumes "
                f"from {self.checkpoint or 'the start'}"
            ) from error

    def close(self) -> None:
        """Wait for the thread to end, whether its work succeeded or not."""
        self._pool.shutdown()

    def _write(
        self, position: Position, weights: dict[str, Tensor], training_state: dict[str, Any]
    ) -> None:
        self._copies.wait()
        started = time.perf_counter()
        folder, recipe = self._job.folder, self._job.recipe
        self.checkpoint = save_checkpoint(
            folder,
            position.step,
            config=self._job.model,
            weights=weights,
            training_state=training_state,
            tokenizer_path=self._data.tokenizer_path,
            provenance={**_provenance(self._job, self._data), JOB_KEY: self._key},
            text_files=self._text_files,
        )
        if recipe.keep_best and position.validated_step == position.step:
            record_best(self.checkpoint, position.step, position.validation_loss)
        best = best_checkpoint(folder) if recipe.keep_best else None
        stable = folder / checkpoint_name(stable_steps(recipe))
        prune_checkpoints(folder, recipe.num_checkpoints_kept, keep=(best, stable))
        seconds = time.perf_counter() - started
        path = str(self.checkpoint)
        self._event("checkpoint", step=position.step, path=path, seconds=round(seconds, 3))
        if self.first_stage and self._ends_first_stage(position.step):
            try:
                self.first_stage.store(self.checkpoint)
            except OSError as error:
                self._event("not shared", text=f"the first stage could not be stored: {error}")
        if self._remote:
            self._upload(self._remote, position.step)

    def _ends_first_stage(self, step: int) -> bool:
        stage = self.first_stage
        return stage is not None and step == stage.num_steps and not stage.exists

    def _upload(self, remote: RemoteCopy, step: int) -> None:
        from orchestrator.training.remote_copy import COPY_ERRORS, one_line

        started = time.perf_counter()
        try:
            remote.upload()
        except COPY_ERRORS as error:
            text = f"no copy in {self._job.storage}: {one_line(error)}"
            self._event("not copied", text=f"{text}; training continues and tries again later")
        else:
            self._event("uploaded", step=step, seconds=round(time.perf_counter() - started, 3))


def record_best(checkpoint: Path, step: int, validation_loss: float) -> None:
    """Record a checkpoint in `best.json`, unless the one there is at least as good or the loss is
    not finite.
    """
    path = checkpoint.parent / BEST
    best = read_json(path) if best_checkpoint(checkpoint.parent) else None
    with damage_as_user_error(path):
        is_better = best is None or validation_loss < best["validation_loss"]
    if is_better and math.isfinite(validation_loss):
        found = {"checkpoint": checkpoint.name, "step": step, "validation_loss": validation_loss}
        write_json(path, found)


def best_checkpoint(run_folder: Path) -> Path | None:
    """Return the checkpoint that `best.json` names; None if there is none or it was deleted.

    Raises:
        UserError: If the file is damaged.
    """
    best = read_json(run_folder / BEST)
    folder = (
        run_folder / best["checkpoint"] if best and is_valid_name(best.get("checkpoint")) else None
    )
    return folder if folder and folder.is_dir() else None


def prune_checkpoints(
    run_folder: Path, num_kept: int, *, keep: Collection[Path | None] = ()
) -> None:
    """Delete all checkpoints but the newest and those to keep."""
    for folder in find_checkpoints(run_folder)[:-num_kept]:
        if folder not in keep:
            delete_folder(folder)


def _provenance(job: TrainingJob, data: PreparedData) -> dict[str, Any]:
    return {
        "tokens": data.fingerprint,
        "objective": job.objective,
        "recipe": job.recipe.model_dump(mode="json"),
        ELASTIC: [*map(str, elastic_family(job.model.corrections, job.recipe.elastic))],
        "distillation": asdict(job.distillation) if job.distillation else None,
        "teacher": weights_key(Path(job.teacher_folder)) if job.teacher_folder else None,
        "kept_layers": job.kept_layers,
        "environment": {**environment(), **extension_packages()},
        **job.provenance,
    }


def _random_state(world: World) -> dict[str, Tensor]:
    # No step draws random numbers yet; saving the state allows dropout to be added.
    state = {"cpu": torch.get_rng_state()}
    if world.device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_random_state(state: Mapping[str, Tensor], world: World) -> None:
    """Restore the state of the random number generators from a checkpoint."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], world.device)
