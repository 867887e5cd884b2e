"""Write checkpoints: folders `step_00000100/` that are complete or absent.

A background thread writes. The state is first copied to the host's memory. On a CPU training waits
for that; on a GPU the copy is queued in its stream before the next step, and only the thread waits.
In a sharded model each worker copies and writes its own rows (`shards.py`). One checkpoint is
written at a time: the next one, a stop and the end of the run wait for it, and raise its error
(full disk) on all workers. A killed process loses at most that checkpoint.
`provenance.json` holds the SHA-256 of every other file, which finds later damage. Nothing is
unpickled: weights and shards are safetensors, the training state loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from iiet.decoder import Decoder
from iiet.hf.weights import LazyTensor, config_to_json, write_config, write_folder
from iiet.model.config import ModelConfig
from iiet.model.facts import METHODS
from orchestrator.data.store import PreparedData
from orchestrator.models.folder import (
    ELASTIC,
    JOB_KEY,
    METHOD_PACKAGE,
    TOKENIZER,
    TRAINING_STATE,
    read_text_files,
    weights_key,
)
from orchestrator.records.training import TrainingJob
from orchestrator.training.devices import copy_rows, run_on_first
from orchestrator.training.job import job_key
from orchestrator.training.schedules import elastic_family, stable_steps
from orchestrator.training.uploads import CheckpointUploads
from orchestrator.training.world import World
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import (
    UnfinishedFolder,
    checksums_of,
    delete_folder,
    new_folder,
)
from orchestrator.workspace.layout import (
    PROVENANCE,
    checkpoint_name,
    find_checkpoints,
)
from orchestrator.workspace.provenance import environment, extension_packages

if TYPE_CHECKING:
    from orchestrator.training.shards import ShardSaver

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, in the parameter's shape."""
MUON_BUFFER = "momentum_buffer"
"""What Muon keeps for each matrix, in its shape. Muon is not used for sharded models."""
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What Python, PyTorch and safetensors raise if the disk is full."""


class CheckpointWriteFailed(RunFailed):
    """A checkpoint could not be written; retrying at once would fail again."""


@dataclass
class Position:
    """State of a run without weights and optimizer: plain numbers."""

    step: int = 0
    """Optimizer steps done; it determines the next batch and learning rate."""
    num_tokens: int = 0
    """Tokens that the training has read, on all workers together."""
    flops: float = 0.0
    """Training FLOPs, counted from shapes."""
    shared_flops: float = 0.0
    """Part of them that another run spent, before this one continued it."""
    seconds: float = 0.0
    """Time spent in steps, without validation and saving."""
    validation_loss: float = math.nan
    """Latest validation loss; NaN before the first."""
    num_skipped: int = 0
    """Steps without an update, because loss or gradient were bad."""
    num_skipped_in_row: int = 0
    """Number of the latest steps that were all skipped."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the latest steps, if the recipe checks for spikes."""
    window: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Name -> sum and count of each loss and of the gradient norm since the last record.

    It is saved, so that a resumed run records the same means. Counts differ, as some losses are not
    computed in every step."""

    def add_to_window(self, numbers: Mapping[str, float]) -> None:
        """Add the losses and the gradient norm of a step whose update was made."""
        for name, number in numbers.items():
            total, count = self.window.get(name, (0.0, 0))
            self.window[name] = (total + number, count + 1)

    def end_window(self) -> dict[str, float]:
        """Return the means over the steps since the last call."""
        means = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        return means


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    config: ModelConfig,
    weights: Mapping[str, Tensor | LazyTensor],
    training_state: Mapping[str, Any],
    tokenizer_path: Path | None,
    provenance: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint completely, or raise and leave nothing; return its folder.

    An existing checkpoint of that step is replaced. The training state consists of tensors,
    numbers, strings and containers of them. `text_files` are an imported model's `TEXT_FILES`.
    """
    folder = run_folder / checkpoint_name(step)
    with new_folder(folder) as temporary:
        write_folder(temporary, config, weights)
        write_other_files(
            temporary,
            step,
            config,
            training_state=training_state,
            tokenizer_path=tokenizer_path,
            provenance=provenance,
            text_files=text_files,
        )
    return folder


def write_other_files(
    folder: Path,
    step: int,
    config: ModelConfig,
    *,
    training_state: Mapping[str, Any],
    tokenizer_path: Path | None,
    provenance: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
    checksums: Mapping[str, str] | None = None,
) -> None:
    """Write all files of a checkpoint but its weights, into the folder that has these.

    Args:
        checksums: Name -> SHA-256 of files whose digest is already known.
    """
    if tokenizer_path is not None:
        shutil.copyfile(tokenizer_path, folder / TOKENIZER)
    for name, content in (text_files or {}).items():
        (folder / name).write_bytes(content)
    torch.save(dict(training_state), folder / TRAINING_STATE)
    all_checksums = checksums_of(folder, known=checksums)
    record = {**provenance, "step": step, "checksums": all_checksums}
    if package := METHODS.package(config.method):
        record[METHOD_PACKAGE] = package
    text = json.dumps(record, indent=2) + "\n"
    (folder / PROVENANCE).write_text(text, encoding="utf-8")


def load_training_state(folder: Path) -> dict[str, Any]:
    """Load the state of the optimizer and the loop from a verified checkpoint.

    Tensors stay in the file until they are read: a worker reads its own rows only.

    Raises:
        UserError: If the state holds objects that are neither tensors nor plain values.
    """
    file = folder / TRAINING_STATE
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
    except UnpicklingError:
        raise UserError(
            f"{file} holds objects that are neither tensors nor plain values, which could run "
            "code, so it is not loaded; copy the checkpoint here again, or move its folder away"
        ) from None
    return state


def load_optimizer(
    optimizer: torch.optim.Optimizer, decoder: Decoder, checkpoint: Path, state: dict[str, Any]
) -> None:
    """Load the state of an optimizer from a checkpoint of any number of workers.

    Args:
        optimizer: Optimizer of the decoder's parameters.
        decoder: Whole or sharded; for a sharded parameter, only this worker's rows are read.
        checkpoint: Folder of the checkpoint. A sharded training stores moments in files of their
            own.
        state: Entry `optimizer` of the checkpoint's training state.
    """
    names = parameter_names(optimizer, decoder)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    restored: dict[int, dict[str, Tensor]] = {}
    in_shards: dict[str, Tensor] = {}
    for number, stored in state["state"].items():
        if MUON_BUFFER in stored:
            restored[number] = {MUON_BUFFER: stored[MUON_BUFFER].clone()}
            continue
        restored[number] = {"step": stored["step"].clone()}
        for moment in MOMENTS:
            tensor = torch.empty_like(parameters[number], requires_grad=False)
            restored[number][moment] = tensor
            if moment in stored:
                copy_rows(stored[moment], tensor)
            else:
                in_shards[f"{names[number]}.{moment}"] = tensor
    if in_shards:
        from orchestrator.training.shards import read_shards  # Its imports take a second.

        read_shards(checkpoint, in_shards)
    optimizer.load_state_dict({**state, "state": restored})


def parameter_names(optimizer: torch.optim.Optimizer, decoder: Decoder) -> list[str]:
    """Return the names of an optimizer's parameters in the order in which it counts them."""
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def prune_checkpoints(run_folder: Path, num_kept: int, *, keep: Collection[Path] = ()) -> None:
    """Delete all checkpoints but the newest and those to keep."""
    for folder in find_checkpoints(run_folder)[:-num_kept]:
        if folder not in keep:
            delete_folder(folder)


class CheckpointWriter:
    """Saves one run. Every worker calls it at the same steps.

    The first worker writes; in a sharded model each worker writes its own rows.
    """

    def __init__(
        self, job: TrainingJob, world: World, data: PreparedData, event: Callable[..., None]
    ) -> None:
        self.checkpoint: Path | None = None
        """The newest checkpoint that is written; known to the first worker."""
        self.remote: CheckpointUploads | None = None
        """Uploads to the run's storage, if it has one; only on the first worker."""
        self._job = job
        self._world = world
        self._data = data
        self._event = event
        self._key = job_key(job)
        if job.storage and world.is_first:
            self.remote = CheckpointUploads(job.storage, job.folder, self._key)
        self._shards: ShardSaver | None = None
        if world.is_sharded:
            from orchestrator.training.shards import ShardSaver  # Its imports take a second.

            self._shards = ShardSaver(world)
        self._buffers = HostBuffers(is_pinned=world.is_gpu)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        # A student keeps the text files of the imported model that it was made from.
        origin = job.teacher_folder or job.initial_folder
        self._text_files = read_text_files(Path(origin)) if origin else {}

    def resume_from(self, checkpoint: Path, step: int) -> None:
        """Continue after a checkpoint that is already written."""
        self.checkpoint = checkpoint
        self._saved_step = step
        if self.remote:  # A kill may have ended an upload.
            self._start_uploads(self.remote)

    def is_due(self, step: int) -> bool:
        """Return whether to save now: the decay begins, or it is time for the next checkpoint."""
        minutes = self._job.recipe.checkpoint_every_minutes
        is_late = minutes is not None and time.monotonic() - self._saved_at >= 60.0 * minutes
        return is_late or step == stable_steps(self._job.recipe)

    def save(self, position: Position, decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Start to write a checkpoint, unless this step has one or is the start.

        Raises:
            CheckpointWriteFailed: If the previous checkpoint could not be written.
        """
        world = self._world
        if position.step in (0, self._saved_step):
            return
        started = time.perf_counter()
        self.finish()
        self._saved_step = position.step
        self._saved_at = time.monotonic()
        if not (world.is_first or self._shards):
            return
        weights = decoder.state_dict()
        optimizer_state = optimizer.state_dict()
        state: dict[str, Any] = {"position": asdict(position)}
        if world.is_first:
            # No step draws random numbers yet; saving their state allows dropout to be added.
            state["random"] = {"cpu": torch.get_rng_state()}
            if world.is_gpu:
                state["random"]["cuda"] = torch.cuda.get_rng_state(world.device)
        if self._shards:
            names = parameter_names(optimizer, decoder)
            moments: dict[str, Tensor] = {}
            steps: dict[int, dict[str, Tensor]] = {}
            for number, values in optimizer_state["state"].items():
                steps[number] = {"step": values["step"].to("cpu", copy=True)}
                moments |= {f"{names[number]}.{moment}": values[moment] for moment in MOMENTS}
            state["optimizer"] = {**optimizer_state, "state": steps}
            folder = self._job.folder / checkpoint_name(position.step)
            complete = partial(self._complete_shards, position.step, state, started)
            self._writing = self._shards.start(folder, weights, moments, complete)
        else:
            copied = self._buffers.copy({"weights": weights, "optimizer": optimizer_state})
            is_copied = None
            if world.is_gpu:
                is_copied = torch.cuda.current_stream(world.device).record_event()
            state["optimizer"] = copied["optimizer"]
            waited = time.perf_counter() - started
            self._writing = self._pool.submit(
                self._write, position.step, copied["weights"], state, is_copied, waited
            )

    def finish(self) -> None:
        """Wait, on all workers, for the checkpoint that is being written.

        Raises:
            CheckpointWriteFailed: If it could not be written; earlier ones are unchanged.
        """
        if self._shards:  # All workers have written, or all get the error of one.
            self.wait()
        else:
            run_on_first(self.wait, self._world)

    def wait(self) -> None:
        """Wait for what this worker writes; raises what `finish` raises."""
        writing = self._writing
        self._writing = None
        try:
            if writing:
                writing.result()
        except RunFailed:  # A worker was lost; the disk is not the cause.
            raise
        except WRITE_ERRORS as error:
            raise CheckpointWriteFailed(
                f"the checkpoint after step {self._saved_step} could not be written to "
                f"{self._job.folder} ({error}); free disk space, then the same command resumes "
                f"from {self.checkpoint or 'the start'}"
            ) from error

    def end(self) -> None:
        """Wait, on all workers, for the last checkpoint and its upload; raises what `finish`
        raises."""
        self.finish()
        if self._job.storage:
            run_on_first(self._end_uploads, self._world)

    def _end_uploads(self) -> None:
        """Wait for the uploads, then delete the checkpoints that were kept for them, here and
        there."""
        assert self.remote is not None, "the first worker has it if the job has a storage"
        self.remote.wait()
        self._prune()
        self._start_uploads(self.remote)
        self.remote.wait()

    def close(self) -> None:
        """Wait for the threads to end, whether their work succeeded or not."""
        self._pool.shutdown()
        if self._shards:
            if self._writing:
                self._writing.exception()
            self._shards.close()
        if self.remote:  # After the writer: the last checkpoint's upload has begun.
            self.remote.close()

    def _write(
        self,
        step: int,
        weights: dict[str, Tensor],
        training_state: dict[str, Any],
        is_copied: torch.cuda.Event | None,
        waited_seconds: float,
    ) -> None:
        """Write the copied state; `waited_seconds` is how long training has waited for the copy."""
        started = time.perf_counter()
        if is_copied is not None:
            is_copied.synchronize()
        save_checkpoint(
            self._job.folder,
            step,
            config=self._job.model,
            weights=weights,
            training_state=training_state,
            tokenizer_path=self._data.tokenizer_path,
            provenance=self._provenance(),
            text_files=self._text_files,
        )
        self._after_writing(step, started, waited_seconds)

    def _complete_shards(
        self,
        step: int,
        training_state: dict[str, Any],
        started: float,
        unfinished: UnfinishedFolder,
        checksums: Mapping[str, str],
        copied_at: float,
    ) -> None:
        """Write the files of the first worker, after all have written their shards.

        See `shards.Complete`. Training has waited from `started` until `copied_at`.
        """
        write_config(unfinished.path, config_to_json(self._job.model))
        write_other_files(
            unfinished.path,
            step,
            self._job.model,
            training_state=training_state,
            tokenizer_path=self._data.tokenizer_path,
            provenance=self._provenance(),
            text_files=self._text_files,
            checksums=checksums,
        )
        unfinished.finish()
        self._after_writing(step, copied_at, copied_at - started)

    def _provenance(self) -> dict[str, Any]:
        """Return the provenance of this run's checkpoints, without the files' checksums."""
        job = self._job
        recipe = job.recipe
        teacher = job.teacher_folder
        return {
            "tokens": self._data.fingerprint,
            "objective": job.objective,
            "recipe": recipe.model_dump(mode="json"),
            ELASTIC: [*map(str, elastic_family(job.model.corrections, recipe.elastic))],
            "distillation": asdict(job.distillation) if job.distillation else None,
            "teacher": weights_key(Path(teacher)) if teacher else None,
            "kept_layers": job.kept_layers,
            "environment": {**environment(), **extension_packages()},
            **job.provenance,
            JOB_KEY: self._key,
        }

    def _after_writing(self, step: int, started: float, waited_seconds: float) -> None:
        """Delete old checkpoints, record that a new one is complete, and start its upload."""
        self.checkpoint = self._job.folder / checkpoint_name(step)
        self._prune()
        self._event(
            "checkpoint",
            step=step,
            path=str(self.checkpoint),
            seconds=round(time.perf_counter() - started, 3),
            waited_seconds=round(waited_seconds, 3),
        )
        if self.remote:
            self._start_uploads(self.remote)

    def _start_uploads(self, remote: CheckpointUploads) -> None:
        remote.start(
            self._event,
            num_kept=self._job.recipe.num_checkpoints_kept,
            names_kept={self._start_of_longer.name},
        )

    @property
    def _start_of_longer(self) -> Path:
        """The checkpoint that a longer training starts from, whether it exists or not."""
        return self._job.folder / checkpoint_name(stable_steps(self._job.recipe))

    def _prune(self) -> None:
        """Delete old checkpoints.

        Kept are the newest ones, the last one written, the one that a longer training starts from,
        and one that is being uploaded.
        """
        kept = {self._start_of_longer}
        if self.checkpoint:  # Not always the newest: a later, damaged one may exist.
            kept.add(self.checkpoint)
        with self.remote.kept() if self.remote else nullcontext(set[Path]()) as uploading:
            prune_checkpoints(
                self._job.folder, self._job.recipe.num_checkpoints_kept, keep=kept | uploading
            )


def set_random_state(state: Mapping[str, Tensor], world: World) -> None:
    """Restore the state of the random number generators from a checkpoint."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.is_gpu:
        torch.cuda.set_rng_state(state["cuda"], world.device)


class HostBuffers:
    """Host memory for copies of the training state, allocated once and reused."""

    def __init__(self, *, is_pinned: bool) -> None:
        """With `is_pinned`, the memory is pinned, so that a GPU copies without blocking the
        host."""
        self._is_pinned = is_pinned
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def copy(self, value: Any, path: tuple[object, ...] = ()) -> Any:
        """Copy nested dictionaries and lists of tensors.

        Copies from a GPU are complete when its stream has reached this point.
        """
        if isinstance(value, dict):
            return {name: self.copy(part, (*path, name)) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(
                self.copy(part, (*path, number)) for number, part in enumerate(value)
            )
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(path)
        if buffer is None:
            pinned = self._is_pinned
            buffer = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)
            self._buffers[path] = buffer
        return buffer.copy_(value.detach(), non_blocking=self._is_pinned)
