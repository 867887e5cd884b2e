"""Checkpoints off the critical path: training copies its state and goes on, another thread writes.

The copy is what a step waits for; serializing, checksums and the flush to disk happen beside the
next steps. One checkpoint is in flight at most: the next one, a stop and the end wait for it. So a
process that is killed loses no more than the checkpoint that was being written, of which a
temporary folder is left, and the next start removes it. What keeps a checkpoint from being written
(a full disk) surfaces at the next of these moments, on all workers at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from iiet.decoder import Decoder
from orchestrator.data.token_store import TokenStore
from orchestrator.training.checkpoint import read_text_files, weights_key, write_checkpoint
from orchestrator.training.distributed import World, full_tensor, run_on_first
from orchestrator.training.first_stage import first_stage_of
from orchestrator.training.job import TrainingJob
from orchestrator.training.loop import Position
from orchestrator.training.retention import best_checkpoint, prune_checkpoints, record_best
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.provenance import environment

if TYPE_CHECKING:
    from orchestrator.training.remote_copy import RemoteCopy

Event = Callable[..., None]

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a disk that takes no more looks like, from Python, PyTorch and safetensors."""


class CheckpointWriteFailed(RunFailed):
    """A checkpoint could not be written; trying again at once would end the same way."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The state of a run after a step, in memory that training does not touch."""

    position: Position
    """Where the run stood."""
    weights: dict[str, Tensor]
    """Of the whole decoder, on the CPU."""
    training_state: dict[str, Any]
    """Optimizer, position, random numbers."""


class CheckpointWriter:
    """Saves one run; every worker has one and calls it at the same steps, the first writes."""

    def __init__(self, job: TrainingJob, world: World, store: TokenStore, event: Event) -> None:
        """Name the run, what goes beside its weights, and who hears of a written checkpoint."""
        self.checkpoint: Path | None = None
        """The newest one that is written; known to the first worker."""
        self._job, self._world, self._store, self._event = job, world, store, event
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        # A student reads and writes text as the imported model does that it was made from.
        origin = job.teacher_folder or job.initial_folder
        self._text_files = read_text_files(Path(origin)) if origin else {}
        self.first_stage = first_stage_of(job)
        """What this run has in common with others, if anything."""
        self._remote: RemoteCopy | None = None
        if job.storage and world.is_first:
            from orchestrator.training.remote_copy import RemoteCopy  # pyarrow takes a moment

            self._remote = RemoteCopy(job.storage, job.folder)

    def fetch(self) -> Path | None:
        """Bring back the newest checkpoint from the run's storage; None if it has none there.

        Raises:
            RunFailed: If the storage does not answer.
        """
        if self._remote is None:
            return None
        from orchestrator.training.remote_copy import COPY_ERRORS, one_line

        try:
            return self._remote.fetch(lambda sentence: self._event("damaged", text=sentence))
        except COPY_ERRORS as error:
            raise RunFailed(
                f"{self._job.storage} may hold checkpoints to go on from, and does not answer "
                f"({one_line(error)}); try again, or unset cluster.storage to start "
                "anew"
            ) from None

    def go_on_from(self, checkpoint: Path, step: int) -> None:
        """Begin behind a checkpoint that is there already."""
        self.checkpoint, self._saved_step = checkpoint, step

    def is_due(self, step: int) -> bool:
        """Return whether the recipe's minutes have passed since the last checkpoint, or other
        models may go on from this step.
        """
        if self._ends_first_stage(step):
            return True
        minutes = self._job.recipe.checkpoint_every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes

    def save(self, position: Position, decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write a checkpoint, unless this step has one or nothing is trained yet.

        Raises:
            CheckpointWriteFailed: If the one before could not be written.
        """
        if position.step in (0, self._saved_step):
            return
        run_on_first(self.finish, self._world)
        self._saved_step, self._saved_at = position.step, time.monotonic()
        is_first = self._world.is_first
        if not (is_first or self._world.is_sharded):
            return
        snapshot = Snapshot(
            position=replace(position),
            weights=_copied(decoder.state_dict(), keep=is_first),
            training_state={
                "optimizer": _copied(optimizer.state_dict(), keep=is_first),
                "position": asdict(position),
                "random": random_state(self._world),
            },
        )
        if is_first:
            self._writing = self._pool.submit(self._write, snapshot)

    def finish(self) -> None:
        """Wait for the checkpoint in flight.

        Raises:
            CheckpointWriteFailed: If it could not be written; those before it are as they were.
        """
        writing, self._writing = self._writing, None
        try:
            if writing:
                writing.result()
        except WRITE_ERRORS as error:
            raise CheckpointWriteFailed(
                f"the checkpoint after step {self._saved_step} could not be written to "
                f"{self._job.folder} ({error}); make room there, then the same command goes on "
                f"from {self.checkpoint or 'the start'}"
            ) from error

    def close(self) -> None:
        """Wait for the thread to end, whatever became of its work."""
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        folder, recipe, position = self._job.folder, self._job.recipe, snapshot.position
        self.checkpoint = write_checkpoint(
            folder,
            position.step,
            config=self._job.config(),
            weights=snapshot.weights,
            training_state=snapshot.training_state,
            tokenizer_path=self._store.tokenizer_path,
            provenance=checkpoint_provenance(self._job, self._store),
            text_files=self._text_files,
        )
        if recipe.keep_best and position.validated_step == position.step:
            record_best(self.checkpoint, position.step, position.validation_loss)
        best = best_checkpoint(folder) if recipe.keep_best else None
        prune_checkpoints(folder, recipe.num_checkpoints_kept, keep=best)
        self._event("checkpoint", step=position.step, path=str(self.checkpoint))
        self._share(position.step)
        self._copy(self._remote)

    def _ends_first_stage(self, step: int) -> bool:
        stage = self.first_stage
        return stage is not None and step == stage.num_steps and not stage.is_there

    def _share(self, step: int) -> None:
        if not (self.first_stage and self._ends_first_stage(step)):
            return
        assert self.checkpoint is not None
        try:
            self.first_stage.put(self.checkpoint)
        except OSError as error:
            self._event("not shared", text=f"no first stage for others to go on from: {error}")

    def _copy(self, mirror: RemoteCopy | None) -> None:
        if mirror is None:
            return
        from orchestrator.training.remote_copy import COPY_ERRORS, one_line

        try:
            mirror.send()
        except COPY_ERRORS as error:
            text = f"no copy in {self._job.storage}: {one_line(error)}"
            self._event("not copied", text=f"{text}; training goes on, the next one is tried again")


def _copied(value: Any, *, keep: bool) -> Any:
    """Return the state with every tensor, as a whole, copied to the CPU.

    All workers that hold shards take part; who does not `keep` gets None in their places.
    """
    if isinstance(value, Tensor):
        tensor = full_tensor(value.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {name: _copied(part, keep=keep) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part, keep=keep) for part in value)
    return value


def checkpoint_provenance(job: TrainingJob, store: TokenStore) -> dict[str, Any]:
    """Return what a checkpoint says about its origin; weights and checksums are added on saving."""
    return {
        "tokens": store.fingerprint,
        "objective": job.objective,
        "recipe": job.recipe.model_dump(mode="json"),
        "distillation": asdict(job.distillation) if job.distillation else None,
        "teacher": weights_key(Path(job.teacher_folder)) if job.teacher_folder else None,
        "environment": environment(),
        **job.provenance,
    }


def random_state(world: World) -> dict[str, Tensor]:
    """Return the state of the random numbers.

    Nothing draws any after the weights are made; it is kept so that dropout could come.
    """
    state = {"cpu": torch.get_rng_state()}
    if world.device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_random_state(state: Mapping[str, Tensor], world: World) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], world.device)
