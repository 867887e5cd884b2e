"""A teacher's logits on disk: computed once, read by all students of a sweep.

    teachers/KEY/answers.bin      for each sequence, in the order of the steps, its tokens (int32)
                                  and its logits (time, vocab), float32, or the bits of bfloat16
    teachers/KEY/manifest.json    what determines them, and the file's checksum

A student gets the same losses to the last bit, on the same machine with the same number of threads,
and saves a forward pass of the teacher in each step. `distillation.teacher_cache` asks for it.
"""

from __future__ import annotations

import hashlib
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
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig
from orchestrator.data.mixture import open_data
from orchestrator.models.folder import load_config, weights_key
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.training.devices import OnDevice, World, autocast, frozen_dtype, on_cpu
from orchestrator.training.job import sequences_per_step
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import (
    checksums_of,
    damaged_file,
    delete_folder,
    free_disk,
    new_folder,
    read_json,
    write_json,
)
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
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.num_steps * self.num_sequences * self.context_length

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self.num_steps * self.num_sequences * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """One sequence as it is stored: NumPy has no bfloat16, so its bits are integers."""
        time, logit = self.context_length, "<i2" if self.precision == "bf16" else "<f4"
        return np.dtype([("tokens", "<i4", (time,)), ("logits", logit, (time, self.vocab_size))])


def cache_plan(job: TrainingJob) -> CachePlan | None:
    """Return the content of a job's teacher cache; as `answers_plan`, of which tokens and teacher
    must exist."""
    if job.objective != "distill" or not job.teacher_folder:
        return None
    folder, loss = Path(job.teacher_folder), job.distillation or DistillationConfig()
    keys = {"teacher_key": weights_key(folder), "tokens": open_data(job.tokens_folder).fingerprint}
    return answers_plan(load_config(folder), job.recipe, loss, **keys)


def answers_plan(
    teacher: ModelConfig,
    recipe: TrainingSettings,
    loss: DistillationConfig,
    *,
    teacher_key: str,
    tokens: str,
) -> CachePlan | None:
    """Return the logits that a recipe and a loss need; None if none, or hidden states are, too.

    Args:
        teacher_key: Hash of the teacher's weights; any text if only the size matters.
        tokens: Fingerprint of the tokens; likewise.

    Raises:
        UserError: If the batch is not a whole number of sequences.
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


def load_teacher(job: TrainingJob, world: World) -> Decoder | CachedTeacher | None:
    """Return the frozen teacher on this worker's device; None if the job has none.

    Stored answers replace the teacher if they are complete; incomplete ones are ignored.
    """
    if job.objective != "distill" or job.teacher_folder is None:
        return None
    plan = cache_plan(job) if job.teacher_cache else None
    if plan and (cached := open_cache(Path(str(job.teacher_cache)), plan)):
        return cached
    dtype = frozen_dtype(job.recipe.precision, world.device)
    folder = Path(job.teacher_folder)
    return load_model(folder, device=world.device, dtype=dtype, check=False, frozen=True)


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that reads its logits from a cache; called like a decoder.

    It finds a sequence by the hash of its tokens: an unknown one is an error, never a wrong answer.
    The file is memory-mapped, so the workers and trials of one machine share it.
    """

    folder: Path
    _stored: np.ndarray
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
        logits = torch.from_numpy(self._stored["logits"][numbers]).to(input_ids.device)
        return logits.view(torch.bfloat16) if logits.dtype == torch.int16 else logits


def _digests(sequences: np.ndarray) -> Iterator[bytes]:
    rows = sequences.astype("<i4", copy=False)
    return (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows)


def open_cache(folder: Path, plan: CachePlan) -> CachedTeacher | None:
    """Open a cache; None if it is missing, incomplete or has other content."""
    # This compares sizes; `write_cache` verifies checksums once for all readers.
    if find_cache_damage(folder, plan, read=False):
        return None
    try:
        stored = np.memmap(folder / ANSWERS, plan.dtype, "r")
    except FileNotFoundError:  # Another process has just deleted it.
        return None
    numbers = {digest: number for number, digest in enumerate(_digests(stored["tokens"]))}
    return CachedTeacher(folder, stored, numbers)


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
    num_live = sum(tokens for plan, tokens in zip(plans, tokens_left, strict=True) if plan is None)
    planned = {plan.key: plan for plan in plans if plan}
    missing = [p for k, p in planned.items() if find_cache_damage(parent / k, p, read=False)]
    num_stored, num_bytes = (
        sum(plan.num_tokens for plan in missing),
        sum(plan.num_bytes for plan in missing),
    )
    if num_bytes > (free := free_disk(parent)):
        raise UserError(
            f"distillation.teacher_cache needs {format_bytes(num_bytes)}, and {parent} has "
            f"{format_bytes(free)} free; set it to false, or shorten distillation.training"
        )
    return TeacherWork(num_live + num_stored, num_stored, num_bytes)


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
    progress, plans = progress or Progress(), [cache_plan(job) for job in jobs]
    work = teacher_work(plans, [0] * len(plans), parent)
    for number, (job, plan) in enumerate(zip(jobs, plans, strict=True)):
        if plan is None or plan in plans[:number]:
            continue
        progress.start("teacher", plan.num_steps)
        try:
            # A damaged cache is written again; an intact one needs no teacher and no device.
            if find_cache_damage(parent / plan.key, plan):
                on_device(partial(_write_answers, job, plan, parent), progress)
        except OSError as error:
            raise RunFailed(
                f"cannot store the teacher's answers in {parent} ({error.strerror or error}); "
                "free disk space, or set distillation.teacher_cache=false"
            ) from None
        size = format_bytes(plan.num_bytes)
        progress.finish(f"answers for {plan.num_tokens:,} tokens, {size}")
    folders = [str(parent / plan.key) if plan else None for plan in plans]
    return [
        job.model_copy(update={"teacher_cache": folder}) if folder else job
        for job, folder in zip(jobs, folders, strict=True)
    ], work


def _write_answers(
    job: TrainingJob, plan: CachePlan, parent: Path, device: str, progress: Progress
) -> None:
    write_cache(plan, parent, answers_by_step(job, device=device), progress=progress)


def answers_by_step(job: TrainingJob, *, device: str = "cpu") -> AnswersByStep:
    """Return a function that computes the teacher's logits of a step as the job itself would."""
    data, recipe, world = open_data(job.tokens_folder), job.recipe, World(device=device)
    steps = _teaching_steps(recipe, job.distillation or DistillationConfig())
    # Loaded at the first call: a complete cache needs no teacher.
    live = job.model_copy(update={"teacher_cache": None})
    teacher: Callable[[], Any] = cache(lambda: load_teacher(live, world))

    @torch.no_grad()
    def answers(number: int) -> tuple[Tensor, Tensor]:
        sequences = data.batch(
            steps[number],
            context_length=job.model.context_length,
            seed=recipe.seed,
            global_batch=sequences_per_step(recipe, job.model),
        ).input_ids
        with autocast(recipe.precision, world):
            # The device keeps the logits of one pass only, as in the job itself.
            parts = torch.split(sequences, recipe.num_sequences_per_pass or len(sequences))
            return sequences, torch.cat([teacher()(part.to(device)).cpu() for part in parts])

    return answers


def write_cache(
    plan: CachePlan, parent: Path, answers: AnswersByStep, *, progress: Progress | None = None
) -> Path:
    """Write a cache into `parent`/<key>, unless an intact one exists; return its folder.

    Raises:
        OSError: If the disk is full.
    """
    progress, folder = progress or Progress(), parent / plan.key
    with lock_file(parent / f".{plan.key}.lock"):
        problem = find_cache_damage(folder, plan)
        if problem is None:
            return folder
        if folder.exists():
            progress.note(f"{folder} is damaged ({problem}) and is written again")
        with new_folder(folder) as temporary:
            with (temporary / ANSWERS).open("wb") as file:
                for number in range(plan.num_steps):
                    sequences, logits = answers(number)
                    stored = np.empty(plan.num_sequences, plan.dtype)
                    stored["tokens"] = sequences.numpy()
                    is_half = logits.dtype == torch.bfloat16
                    stored["logits"] = (logits.view(torch.int16) if is_half else logits).numpy()
                    file.write(stored.tobytes())
                    progress.advance(number + 1)
            checksums = checksums_of(temporary, [ANSWERS])
            write_json(temporary / MANIFEST, {"plan": asdict(plan), "checksums": checksums})
    return folder


def delete_answers(jobs: Iterable[TrainingJob]) -> None:
    """Delete what was stored for jobs that are finished.

    A process that has opened it can read on; a later one runs the teacher.
    """
    for folder in {job.teacher_cache for job in jobs if job.teacher_cache}:
        with suppress(OSError):
            delete_folder(Path(folder))
