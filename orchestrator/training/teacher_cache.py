"""A teacher's logits on disk: computed once, read by all students of a sweep.

    teachers/KEY/answers.bin      for each sequence, in the order of the steps, its tokens (int32)
                                  and its logits (time, vocab), float32, or the bits of bfloat16
    teachers/KEY/manifest.json    what determines them, and the file's checksum

A student gets the same losses to the last bit, on the same machine with the same number of threads,
and saves a forward pass of the teacher in each step. `distillation.teacher_cache` asks for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.distillation import DistillationConfig
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import load_config, weights_key
from orchestrator.models.loading import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.training.device_work import OnDevice, on_cpu
from orchestrator.training.distributed import World, autocast
from orchestrator.training.job import sequences_per_step
from orchestrator.training.precision import frozen_dtype
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import (
    checksums_of,
    damaged_file,
    delete_folder,
    delete_leftovers,
    free_disk,
    read_json,
    replace_folder,
    write_json,
)
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.locks import lock_file
from orchestrator.workspace.provenance import content_key

ANSWERS, MANIFEST = "answers.bin", "manifest.json"
FORMAT_VERSION = 2

AnswersByStep = Callable[[int], tuple[Tensor, Tensor]]
"""Number of a teaching step, from 0 -> its sequences (batch, time), and the teacher's logits."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """Content of a cache, known before it is written."""

    origin: dict[str, Any]
    """JSON-able: everything else that determines the logits; part of the key."""
    num_steps: int
    """Steps whose loss needs the teacher."""
    num_sequences: int
    """Sequences per step, of all workers together."""
    context_length: int
    vocab_size: int
    precision: str = "fp32"

    @property
    def key(self) -> str:
        """Hash of everything that determines the content; the name of the folder."""
        return content_key("teacher cache", FORMAT_VERSION, asdict(self))

    @property
    def bytes_per_sequence(self) -> int:
        """Size of a sequence's tokens and logits."""
        return self.context_length * (4 + self.vocab_size * (2 if self.precision == "bf16" else 4))

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.num_steps * self.num_sequences * self.bytes_per_sequence

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_steps * self.num_sequences * self.context_length


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return the content of a job's teacher cache; None if it needs no teacher's logits.

    Raises:
        UserError: If tokens or teacher are missing, or the batch is no whole number of sequences.
    """
    if job.objective != "distill" or not job.teacher_folder:
        return None
    folder = Path(job.teacher_folder)
    return answers_plan(
        load_config(folder),
        job.recipe,
        job.distillation or DistillationConfig(),
        teacher_key=weights_key(folder),
        tokens=open_data(job.tokens_folder).fingerprint,
    )


def answers_plan(
    teacher: ModelConfig,
    recipe: TrainingSettings,
    loss: DistillationConfig,
    *,
    teacher_key: str,
    tokens: str,
) -> CachePlan | None:
    """Return the logits that a recipe and a loss need; None if hidden states are needed, too.

    Args:
        teacher_key: Hash of the teacher's weights; any text if only the size matters.
        tokens: Fingerprint of the tokens; likewise.

    Raises:
        UserError: If the batch is no whole number of sequences.
    """
    steps = _teaching_steps(recipe, loss)
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
    )


def _teaching_steps(recipe: TrainingSettings, loss: DistillationConfig) -> list[int]:
    return [step for step in range(recipe.num_steps) if loss.uses_teacher(step)]


def answers_by_step(job: TrainingJob, *, device: str = "cpu") -> AnswersByStep:
    """Return a function that computes the teacher's logits of a step as the job itself would."""
    data, recipe = open_data(job.tokens_folder), job.recipe
    steps = _teaching_steps(recipe, job.distillation or DistillationConfig())
    folder, dtype = Path(str(job.teacher_folder)), frozen_dtype(recipe.precision, device)
    # Loaded at the first call: a complete cache needs no teacher.
    teacher = cache(lambda: load_model(folder, device=device, dtype=dtype, frozen=True))

    @torch.no_grad()
    def answers(number: int) -> tuple[Tensor, Tensor]:
        sequences = data.batch(
            steps[number],
            context_length=job.model.context_length,
            seed=recipe.seed,
            global_batch=sequences_per_step(recipe, job.model),
        ).input_ids
        with autocast(recipe.precision, World(device=device)):
            # The device keeps the logits of one pass only, as in the job itself.
            parts = torch.split(sequences, recipe.num_sequences_per_pass or len(sequences))
            return sequences, torch.cat([teacher()(part.to(device)).cpu() for part in parts])

    return answers


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that reads its logits from a cache; called like a decoder.

    It finds a sequence by the hash of its tokens: an unknown one is an error, never a wrong answer.
    The file is memory-mapped, so the workers and trials of one machine share it.
    """

    folder: Path
    plan: CachePlan
    _sequences: np.ndarray
    _numbers: dict[bytes, int]

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return the teacher's logits for sequences (batch, time) of the plan, in any order.

        Raises:
            KeyError: If a sequence is not part of the plan.
        """
        try:
            numbers = [self._numbers[digest] for digest in _digests(input_ids.cpu().numpy())]
        except KeyError:
            raise KeyError(f"{self.folder} has no answer for a requested sequence") from None
        length, is_half = self.plan.context_length, self.plan.precision == "bf16"
        found = self._sequences[numbers, 4 * length :].view("<i2" if is_half else "<f4")
        logits = torch.from_numpy(found.reshape(len(numbers), length, -1)).to(input_ids.device)
        return logits.view(torch.bfloat16) if is_half else logits


def _digests(sequences: np.ndarray) -> Iterator[bytes]:
    rows = sequences.astype("<i4", copy=False)
    return (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)


def open_cache(folder: Path, plan: CachePlan) -> CachedTeacher | None:
    """Open a cache; None if it is missing, incomplete or has other content."""
    # This compares sizes; `write_cache` verifies checksums once for all readers.
    if find_cache_damage(folder, plan, read=False):
        return None
    try:
        answers = np.memmap(folder / ANSWERS, np.uint8, "r")
    except FileNotFoundError:  # Another process has just deleted it.
        return None
    sequences = answers.reshape(-1, plan.bytes_per_sequence)
    digests = _digests(sequences[:, : 4 * plan.context_length].view("<i4"))
    numbers = {digest: number for number, digest in enumerate(digests)}
    return CachedTeacher(folder, plan, sequences, numbers)


def write_cache(
    plan: CachePlan, parent: Path, answers: AnswersByStep, *, progress: Progress | None = None
) -> Path:
    """Write a cache into `parent`/<key>, unless an intact one exists; return its folder.

    Raises:
        OSError: If the disk is full. Complete steps stay, and the next call resumes after them.
    """
    progress = progress or Progress()
    folder, temporary = parent / plan.key, parent / f"{TEMPORARY_PREFIX}{plan.key}"
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
        step_bytes = plan.num_sequences * plan.bytes_per_sequence
        with (temporary / ANSWERS).open("ab") as file:
            num_done = file.tell() // step_bytes
            file.truncate(num_done * step_bytes)
            for number in range(num_done, plan.num_steps):
                sequences, logits = answers(number)
                if plan.precision == "bf16":
                    logits = logits.view(torch.int16)  # NumPy has no bfloat16.
                parts = [sequences.int().numpy(), logits.detach().numpy()]
                whole = np.concatenate(
                    [part.reshape(len(part), -1).view("u1") for part in parts], 1
                )
                assert whole.nbytes == step_bytes, "the logits are not those of the plan"
                file.write(whole.tobytes())
                file.flush()
                progress.advance(number + 1)
            os.fsync(file.fileno())
        checksums = checksums_of(temporary, [ANSWERS])
        write_json(temporary / MANIFEST, {"plan": asdict(plan), "checksums": checksums})
        replace_folder(temporary, folder)
    return folder


def find_cache_damage(folder: Path, plan: CachePlan, *, read: bool = True) -> str | None:
    """Return what is wrong with a cache; None if nothing is. `read` verifies checksums, too."""
    manifest, path = None, folder / ANSWERS
    with suppress(UserError):
        manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("plan") != asdict(plan) or "checksums" not in manifest:
        return "it holds other answers"
    if not path.is_file() or path.stat().st_size != plan.num_bytes:
        return f"{ANSWERS} is incomplete"
    return damaged_file(folder, manifest["checksums"], names=[ANSWERS]) if read else None


class TeacherWork(NamedTuple):
    """Tokens that teachers have yet to compute, those of them to store, and the bytes to store."""

    num_tokens: int = 0
    num_stored_tokens: int = 0
    num_bytes: int = 0


def teacher_work(
    plans: Sequence[CachePlan | None], tokens_left: Sequence[int], parent: Path
) -> TeacherWork:
    """Return what teachers will compute for trainings whose plans are to be stored.

    Args:
        plans: The logits that each training reads from the disk; None if its teacher runs in it.
        tokens_left: Tokens that a teacher reads which runs in the training.
        parent: Folder of all caches.

    Raises:
        UserError: If the logits do not fit on the disk.
    """
    live = sum(tokens for plan, tokens in zip(plans, tokens_left, strict=True) if plan is None)
    missing = {}
    for plan in filter(None, plans):
        if find_cache_damage(parent / plan.key, plan, read=False):
            written = parent / f"{TEMPORARY_PREFIX}{plan.key}" / ANSWERS
            num_written = written.stat().st_size if written.is_file() else 0
            missing[plan.key] = (plan.num_tokens, max(0, plan.num_bytes - num_written))
    stored = sum(num_tokens for num_tokens, _ in missing.values())
    num_bytes, free = sum(num_bytes for _, num_bytes in missing.values()), free_disk(parent)
    if num_bytes > free:
        raise UserError(
            f"distillation.teacher_cache needs {format_bytes(num_bytes)}, and {parent} has "
            f"{format_bytes(free)} free; set it to false, or shorten distillation.training"
        )
    return TeacherWork(live + stored, stored, num_bytes)


def store_answers(
    jobs: Sequence[TrainingJob],
    parent: Path,
    *,
    on_device: OnDevice = on_cpu,
    progress: Progress | None = None,
) -> tuple[list[TrainingJob], TeacherWork]:
    """Store what the teachers of jobs answer; return the jobs, which then read it, and the work.

    Args:
        parent: Folder of all caches.
        on_device: Runs the teacher.

    Raises:
        UserError: If the logits do not fit on the disk.
        RunFailed: If the disk fills up.
    """
    progress, found = progress or Progress(), list(jobs)
    plans = [cache_plan(job) for job in jobs]
    work = teacher_work(plans, [0] * len(plans), parent)
    for number, (job, plan) in enumerate(zip(jobs, plans, strict=True)):
        if plan is None:
            continue
        folder = parent / plan.key
        if plan not in plans[:number]:
            progress.start("teacher", plan.num_steps)
            try:
                # A damaged cache is written again; an intact one needs no teacher and no device.
                if find_cache_damage(folder, plan):
                    on_device(partial(_write_answers, job, plan, parent), progress)
            except OSError as error:
                raise RunFailed(
                    f"cannot store the teacher's answers in {parent} ({error.strerror or error}); "
                    "free disk space, or set distillation.teacher_cache=false"
                ) from None
            size = format_bytes(plan.num_bytes)
            progress.finish(f"answers for {plan.num_tokens:,} tokens, {size}")
        found[number] = job.model_copy(update={"teacher_cache": str(folder)})
    return found, work


def _write_answers(
    job: TrainingJob, plan: CachePlan, parent: Path, device: str, progress: Progress
) -> None:
    write_cache(plan, parent, answers_by_step(job, device=device), progress=progress)


def delete_answers(jobs: Iterable[TrainingJob]) -> None:
    """Delete what was stored for jobs that are finished.

    A process that has opened it can read on; a later one runs the teacher.
    """
    for folder in {job.teacher_cache for job in jobs if job.teacher_cache}:
        with suppress(OSError):
            delete_folder(Path(folder))
