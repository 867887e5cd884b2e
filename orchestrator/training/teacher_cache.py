"""What a teacher says about the sequences of a distillation, written once and read by many.

A cache is a folder of flat files: the sequences, and for each of their tokens the teacher's logits
as they are (exact), or its likeliest tokens with the tail's mass (coarse). It is asked as a teacher
is, by tokens: a sequence finds its row by its hash. So neither the loop nor its workers keep count
of steps, passes and ranks, and a sequence that was not foreseen is an error, never a wrong answer.

The hash is over all `input_ids` of a sequence, which are all that a teacher reads. Targets and
masks are in no hash and no key: answers are stored at every position, the losses read those that
count, and batches with the same tokens and another mask share a cache.

Rows are appended step by step under a temporary name and renamed at the end; a cut-off writing goes
on with the first step that is not whole, and a lock keeps a second writer waiting. Bytes: tokens x
(vocabulary x 4) exact in float32, tokens x (8 k + 4) coarse, and 4 a token for the sequences.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from iiet.distillation import CoarseDistribution
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, write_json
from orchestrator.workspace.provenance import content_key, file_digest

MANIFEST_NAME = "manifest.json"
TEMPORARY_PREFIX = ".writing-"
FORMAT_VERSION = 1

Answer = Tensor | CoarseDistribution
"""What a teacher says about a batch: logits, (batch, time, vocab), or their coarse form."""

Answers = Callable[[int], tuple[Tensor, Answer]]
"""Number of a teaching step, from 0 -> its sequences, (batch, time), and the teacher's answer."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What a cache holds, known before it is made."""

    origin: dict[str, Any]
    """JSON-able: all that determines the answers beside the fields below; part of the key."""
    num_steps: int
    """Steps in which the teacher has a say."""
    num_sequences: int
    """Sequences of one step, of all workers together."""
    context_length: int
    """Tokens of one sequence."""
    vocab_size: int
    """Logits of one token."""
    precision: str = "fp32"
    """Arithmetic of the teacher, as in the recipe: `fp32` or `bf16`."""
    top_k: int | None = None
    """Likeliest tokens that are kept; None keeps all logits as they are."""
    temperature: float = 1.0
    """Of the coarse form; exact logits are kept undivided."""

    @property
    def key(self) -> str:
        """Hash of all that determines the content; the folder's name."""
        return content_key("teacher cache", FORMAT_VERSION, asdict(self))

    @property
    def num_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(self.num_rows * column.num_bytes for column in self.columns())

    @property
    def num_rows(self) -> int:
        """Sequences in all."""
        return self.num_steps * self.num_sequences

    def columns(self) -> tuple[_Column, ...]:
        """Return the files, and what one sequence takes in each."""
        tokens = _Column("tokens", np.dtype("<i4"), (self.context_length,))
        if self.top_k is None:
            # NumPy has no bfloat16; its bits travel as integers.
            dtype = np.dtype("<i2" if self.precision == "bf16" else "<f4")
            return tokens, _Column("logits", dtype, (self.context_length, self.vocab_size))
        shape = (self.context_length, min(self.top_k, self.vocab_size))
        return (
            tokens,
            _Column("ids", np.dtype("<i4"), shape),
            _Column("log_probs", np.dtype("<f4"), shape),
            _Column("log_tail", np.dtype("<f4"), shape[:1]),
        )


@dataclass(frozen=True)
class _Column:
    """One file: its name, and one sequence's entry in it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.bin"

    def encoded(self, values: Tensor) -> bytes:
        if values.dtype == torch.bfloat16:
            values = values.view(torch.int16)
        array = values.detach().cpu().numpy()
        assert array.shape[1:] == self.shape, f"{self.name}: {array.shape[1:]} is not {self.shape}"
        # Never a conversion that loses digits: an exact cache is exact or not written.
        return array.astype(self.dtype, casting="same_kind", copy=False).tobytes()


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that looks its answers up; to be called as a decoder is.

    The files are mapped into memory, so workers and trials on one machine share what was read.
    """

    folder: Path
    plan: CachePlan
    _arrays: dict[str, np.ndarray] = field(repr=False)
    _rows: dict[bytes, int] = field(repr=False)

    def __call__(self, input_ids: Tensor) -> Answer:
        """Return the teacher's answer about whole sequences of the plan, on their device.

        Args:
            input_ids: (batch, time) of integers, any of the plan's sequences in any order.

        Raises:
            KeyError: If a sequence is none of the plan's.
        """
        try:
            rows = [self._rows[digest] for digest in _digests(_as_int32(input_ids))]
        except KeyError:
            raise KeyError(
                f"{self.folder} has no answer about a sequence it was asked for"
            ) from None
        found = {
            name: torch.from_numpy(array[rows]).to(input_ids.device)
            for name, array in self._arrays.items()
        }
        if self.plan.top_k is None:
            logits = found["logits"]
            return logits.view(torch.bfloat16) if self.plan.precision == "bf16" else logits
        return CoarseDistribution(
            ids=found["ids"],
            log_probs=found["log_probs"],
            log_tail=found["log_tail"],
            temperature=self.plan.temperature,
        )


def open_cache(folder: Path, plan: CachePlan) -> CachedTeacher | None:
    """Open a cache; None if there is none, or one that is cut off or holds something else.

    Sizes are compared here, contents by `write_cache`, once for all readers.
    """
    if find_cache_damage(folder, plan, read=False):
        return None
    try:
        arrays = {
            column.name: np.memmap(
                column.path(folder),
                dtype=column.dtype,
                mode="r",
                shape=(plan.num_rows, *column.shape),
            )
            for column in plan.columns()
        }
    except FileNotFoundError:  # Deleted just now.
        return None
    rows = {digest: row for row, digest in enumerate(_digests(arrays.pop("tokens")))}
    return CachedTeacher(folder, plan, dict(arrays), rows)


def write_cache(
    plan: CachePlan, parent: Path, answers: Answers, *, progress: Progress | None = None
) -> Path:
    """Write a cache into `parent`/<key>, unless a whole one is there.

    Args:
        plan: What it will hold.
        parent: Folder of all caches.
        answers: Asked for each step that is not written yet.
        progress: Told how many steps are done, and of damage.

    Returns:
        The cache's folder.

    Raises:
        OSError: If the disk is full; what is written stays, and the next call goes on from there.
    """
    progress = progress or Progress()
    folder = parent / plan.key
    temporary = parent / f"{TEMPORARY_PREFIX}{plan.key}"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{plan.key}.lock"):
        problem = find_cache_damage(folder, plan)
        if problem is None:
            return folder
        if folder.exists():
            progress.note(f"{folder} is damaged ({problem}); it is made again")
            shutil.rmtree(folder)
        for leftover in parent.glob("*.tmp"):  # Of deletions that were cut off.
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(exist_ok=True)
        _append_missing_steps(plan, temporary, answers, progress)
        digests = {c.name: file_digest(c.path(temporary)) for c in plan.columns()}
        write_json(temporary / MANIFEST_NAME, {"plan": asdict(plan), "checksums": digests})
        temporary.replace(folder)
    return folder


def find_cache_damage(folder: Path, plan: CachePlan, *, read: bool = True) -> str | None:
    """Say what keeps a folder from being the plan's cache; None if nothing does.

    Args:
        folder: The cache's folder.
        plan: What it should hold.
        read: Whether to compare checksums too, which reads all of it.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except UserError:
        return f"{MANIFEST_NAME} cannot be read"
    if not isinstance(manifest, dict):
        return f"{MANIFEST_NAME} is missing"
    if manifest.get("plan") != asdict(plan):
        return "it holds the answers to something else"
    for column in plan.columns():
        path = column.path(folder)
        if not path.is_file() or path.stat().st_size != plan.num_rows * column.num_bytes:
            return f"{path.name} is cut off"
        checksums = manifest.get("checksums")
        known = checksums.get(column.name) if isinstance(checksums, dict) else None
        if read and file_digest(path) != known:
            return f"{path.name} is not what was written"
    return None


def bytes_to_write(plan: CachePlan, parent: Path) -> int:
    """Return the bytes of a cache that are yet to be written into `parent`."""
    if find_cache_damage(parent / plan.key, plan, read=False) is None:
        return 0
    temporary = parent / f"{TEMPORARY_PREFIX}{plan.key}"
    paths = [column.path(temporary) for column in plan.columns()]
    written = sum(path.stat().st_size for path in paths if path.is_file())
    return max(0, plan.num_bytes - written)


def _append_missing_steps(
    plan: CachePlan, folder: Path, answers: Answers, progress: Progress
) -> None:
    columns = plan.columns()
    sizes = [plan.num_sequences * column.num_bytes for column in columns]
    with ExitStack() as stack:
        files: list[BinaryIO] = [
            stack.enter_context(column.path(folder).open("ab")) for column in columns
        ]
        lengths = [os.fstat(file.fileno()).st_size for file in files]
        num_whole = min(length // size for length, size in zip(lengths, sizes, strict=True))
        num_whole = min(num_whole, plan.num_steps)
        for file, size in zip(files, sizes, strict=True):
            file.truncate(num_whole * size)
        for step in range(num_whole, plan.num_steps):
            sequences, answer = answers(step)
            values = {"tokens": sequences.to(torch.int32), **_as_columns(answer)}
            for column, file in zip(columns, files, strict=True):
                file.write(column.encoded(values[column.name]))
                file.flush()
            progress.advance(step + 1)
        for file in files:
            os.fsync(file.fileno())


def _as_columns(answer: Answer) -> dict[str, Tensor]:
    if isinstance(answer, Tensor):
        return {"logits": answer}
    return {
        "ids": answer.ids.to(torch.int32),
        "log_probs": answer.log_probs,
        "log_tail": answer.log_tail,
    }


def _as_int32(input_ids: Tensor) -> np.ndarray:
    array: np.ndarray = input_ids.cpu().numpy().astype("<i4")
    return array


def _digests(sequences: np.ndarray) -> Iterator[bytes]:
    return (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in sequences)
