"""A teacher's outputs on disk: written once, read by all its students.

The files hold the sequences, and for each token the logits (exact) or the top k log-probabilities
and the mass of the rest (coarse): 4 bytes, and 4 x vocabulary (2 x in bf16) or 8 k + 4 bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iiet.coarse_distribution import CoarseDistribution, coarsen
from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from orchestrator.data.sources import open_data
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import load_config, weights_key
from orchestrator.training.distributed import World, autocast
from orchestrator.training.job import sequences_per_step
from orchestrator.training.model_loading import load_model
from orchestrator.training.precision import frozen_dtype
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    checksums_of,
    damaged_file,
    delete_leftovers,
    read_json,
    replace_folder,
    write_json,
)
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.locks import lock_file
from orchestrator.workspace.provenance import content_key

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

TeacherOutput = Tensor | CoarseDistribution
"""Output for a batch: logits (batch, time, vocab), or their coarse form."""
OutputsByStep = Callable[[int], tuple[Tensor, TeacherOutput]]
"""Number of a teaching step, from 0 -> its sequences (batch, time), and the teacher's output."""


class StepValues(NamedTuple):
    """The values of one step in a file."""

    base: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of all values."""
        return self.base.itemsize * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Content of a cache, known before it is written."""

    origin: dict[str, Any]
    """JSON-able: everything else that determines the outputs; part of the key."""
    num_steps: int
    """Steps whose loss needs the teacher."""
    num_sequences: int
    """Sequences per step, of all workers together."""
    context_length: int
    vocab_size: int
    precision: str = "fp32"
    top_k: int | None = None
    """Most likely tokens to store; None stores all logits."""
    temperature: float = 1.0
    """Temperature of the coarse form; exact logits are not divided by it."""

    @property
    def key(self) -> str:
        """Hash of everything that determines the content; the name of the folder."""
        return content_key("teacher cache", FORMAT_VERSION, asdict(self))

    @property
    def num_bytes(self) -> int:
        """Size of all files without the manifest."""
        return self.num_steps * sum(step.itemsize for step in self.files().values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_steps * self.num_sequences * self.context_length

    def files(self) -> dict[str, StepValues]:
        """Return file name -> its values in one step."""
        shape = (self.num_sequences, self.context_length)
        files: dict[str, Any] = {"tokens": ("<i4", shape)}
        if self.top_k is None:
            # NumPy has no bfloat16; the bits are stored as integers.
            stored_as = "<i2" if self.precision == "bf16" else "<f4"
            files["logits"] = (stored_as, (*shape, self.vocab_size))
        else:
            top = (*shape, min(self.top_k, self.vocab_size))
            files |= {"ids": ("<i4", top), "log_probs": ("<f4", top), "log_tail": ("<f4", shape)}
        # No dtype with a shape: NumPy's hold at most 2 GiB.
        return {
            f"{name}.bin": StepValues(np.dtype(base), shape)
            for name, (base, shape) in files.items()
        }


def teaching_steps(recipe: TrainingSettings, loss: DistillationConfig) -> list[int]:
    """Return the steps whose loss needs the teacher."""
    return [step for step in range(recipe.num_steps) if loss.uses_teacher(step)]


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return the content of a job's teacher cache; None if its teacher's outputs cannot be stored.

    Raises:
        UserError: If tokens or teacher are missing, or the batch is no whole number of sequences.
    """
    if job.objective != "distill" or not job.teacher_folder:
        return None
    folder = Path(job.teacher_folder)
    return outputs_plan(
        load_config(folder),
        job.recipe,
        job.distillation or DistillationConfig(),
        teacher_key=weights_key(folder),
        tokens=open_data(job.tokens_folder).fingerprint,
    )


def outputs_plan(
    teacher: ModelConfig,
    recipe: TrainingSettings,
    loss: DistillationConfig,
    *,
    teacher_key: str,
    tokens: str,
) -> CachePlan | None:
    """Return the outputs that a recipe and a loss need; None if they cannot be stored.

    Args:
        teacher_key: Hash of the teacher's weights; any text if only the size matters.
        tokens: Fingerprint of the tokens; likewise.

    Raises:
        UserError: If the batch is no whole number of sequences.
    """
    steps = teaching_steps(recipe, loss)
    if loss.hidden_weight or not steps:
        return None
    return CachePlan(
        origin={
            "teacher": teacher_key,
            "model": teacher.to_dict(),
            "tokens": tokens,
            "seed": recipe.seed,
            "first_step": steps[0],
            # The last bits of a row can depend on how many rows are computed together.
            "sequences_per_pass": recipe.num_sequences_per_pass,
        },
        num_steps=len(steps),
        num_sequences=sequences_per_step(recipe, teacher),
        context_length=teacher.context_length,
        vocab_size=teacher.vocab_size,
        precision=recipe.precision,
        top_k=loss.top_k,
        temperature=loss.temperature if loss.top_k else 1.0,
    )


def teacher_outputs_by_step(job: TrainingJob, *, device: str = "cpu") -> OutputsByStep:
    """Return a function that computes the teacher's outputs of a step as the job itself would."""
    data, config, recipe = open_data(job.tokens_folder), job.model, job.recipe
    global_batch = sequences_per_step(recipe, config)
    loss = job.distillation or DistillationConfig()
    steps = teaching_steps(recipe, loss)
    folder = Path(str(job.teacher_folder))
    # Loaded at the first call: a complete cache needs no teacher.
    dtype = frozen_dtype(recipe.precision, device)
    teacher = cache(lambda: load_model(folder, device=device, dtype=dtype, frozen=True))

    @torch.no_grad()
    def output_of_pass(input_ids: Tensor) -> Any:
        with autocast(recipe.precision, World(device=device)):
            ids = input_ids.to(device)
            # Keep the logits of one pass only on the device, as the job itself does.
            if loss.top_k is None:
                return teacher()(ids).cpu()
            shorten = partial(coarsen, top_k=loss.top_k, temperature=loss.temperature)
            return teacher()(ids, finish=shorten)

    def outputs(number: int) -> tuple[Tensor, TeacherOutput]:
        batch = data.batch(
            steps[number],
            context_length=config.context_length,
            seed=recipe.seed,
            global_batch=global_batch,
        )
        sequences = batch.input_ids
        parts = torch.split(sequences, recipe.num_sequences_per_pass or len(sequences))
        join = torch.cat if loss.top_k is None else CoarseDistribution.joined
        return sequences, join([output_of_pass(part) for part in parts])

    return outputs


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that reads its outputs from a cache; called like a decoder.

    It finds a sequence by the hash of its tokens: an unknown one is an error, never a wrong output.
    The files are memory-mapped, so the workers and trials of one machine share them.
    """

    folder: Path
    plan: CachePlan
    _arrays: dict[str, np.ndarray]
    _rows: dict[bytes, int]

    def __call__(self, input_ids: Tensor) -> TeacherOutput:
        """Return the teacher's output for sequences (batch, time) of the plan, in any order.

        Raises:
            KeyError: If a sequence is not part of the plan.
        """
        try:
            rows = [self._rows[digest] for digest in _digests(input_ids.cpu().numpy())]
        except KeyError:
            raise KeyError(f"{self.folder} has no output for a requested sequence") from None
        found = {
            name.removesuffix(".bin"): torch.from_numpy(array[rows]).to(input_ids.device)
            for name, array in self._arrays.items()
        }
        if self.plan.top_k is not None:
            return CoarseDistribution(**found, temperature=self.plan.temperature)
        logits = found["logits"]
        return logits.view(torch.bfloat16) if self.plan.precision == "bf16" else logits


def open_cache(folder: Path, plan: CachePlan) -> CachedTeacher | None:
    """Open a cache; None if it is missing, incomplete or has other content."""
    # This compares sizes; `write_cache` verifies checksums once for all readers.
    if find_cache_damage(folder, plan, read=False):
        return None
    try:
        arrays = {
            name: np.memmap(folder / name, step.base, "r").reshape(-1, *step.shape[1:])
            for name, step in plan.files().items()
        }
    except FileNotFoundError:  # Another process has just deleted it.
        return None
    rows = {digest: row for row, digest in enumerate(_digests(arrays.pop("tokens.bin")))}
    return CachedTeacher(folder, plan, dict(arrays), rows)


def write_cache(
    plan: CachePlan, parent: Path, outputs: OutputsByStep, *, progress: Progress | None = None
) -> Path:
    """Write a cache into `parent`/<key>, unless an intact one exists; return its folder.

    Raises:
        OSError: If the disk is full. Complete steps stay, and the next call resumes after them.
    """
    progress = progress or Progress()
    folder = parent / plan.key
    temporary = parent / f"{TEMPORARY_PREFIX}{plan.key}"
    parent.mkdir(parents=True, exist_ok=True)
    with lock_file(parent / f".{plan.key}.lock"):
        problem = find_cache_damage(folder, plan)
        if problem is None:
            return folder
        if folder.exists():
            progress.note(f"{folder} is damaged ({problem}) and is written again")
            shutil.rmtree(folder)
        delete_leftovers(parent)
        temporary.mkdir(exist_ok=True)
        files = {temporary / name: step for name, step in plan.files().items()}
        num_done = plan.num_steps
        for path, step in files.items():
            path.touch()
            num_done = min(num_done, path.stat().st_size // step.itemsize)
        for path, step in files.items():
            os.truncate(path, num_done * step.itemsize)
        for number in range(num_done, plan.num_steps):
            sequences, output = outputs(number)
            values = {"logits": output} if isinstance(output, Tensor) else vars(output)
            for path, step in files.items():
                with path.open("ab") as file:
                    file.write(_encoded({"tokens": sequences, **values}[path.stem], step))
            progress.advance(number + 1)
        for path in files:
            with path.open("ab") as file:
                os.fsync(file.fileno())
        checksums = checksums_of(temporary, plan.files())
        write_json(temporary / MANIFEST_NAME, {"plan": asdict(plan), "checksums": checksums})
        replace_folder(temporary, folder)
    return folder


def find_cache_damage(folder: Path, plan: CachePlan, *, read: bool = True) -> str | None:
    """Return what is wrong with a cache; None if nothing is. `read` verifies checksums, too."""
    manifest = None
    with suppress(UserError):
        manifest = read_json(folder / MANIFEST_NAME)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or damaged"
    if manifest.get("plan") != asdict(plan) or "checksums" not in manifest:
        return "it holds other outputs"
    for name, step in plan.files().items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != plan.num_steps * step.itemsize:
            return f"{name} is incomplete"
    return damaged_file(folder, manifest["checksums"], names=plan.files()) if read else None


def bytes_to_write(plan: CachePlan, parent: Path) -> int:
    """Return the bytes of a cache in `parent` that are not written yet; 0 if it is complete."""
    if find_cache_damage(parent / plan.key, plan, read=False) is None:
        return 0
    paths = [parent / f"{TEMPORARY_PREFIX}{plan.key}" / name for name in plan.files()]
    return max(0, plan.num_bytes - sum(path.stat().st_size for path in paths if path.is_file()))


def _encoded(values: Tensor, step: StepValues) -> bytes:
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    array = values.detach().cpu().numpy()
    assert array.shape == step.shape, f"{array.shape} is not {step.shape}"
    # No conversion may lose digits: an exact cache must be exact.
    return array.astype(step.base, casting="same_kind", copy=False).tobytes()


def _digests(sequences: np.ndarray) -> Iterator[bytes]:
    rows = sequences.astype("<i4", copy=False)
    return (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)
