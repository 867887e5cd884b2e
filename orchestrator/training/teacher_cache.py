"""A teacher's outputs on disk: written once, read by all its students.

A cache is a folder of flat files: the sequences, and for each token the teacher's logits (exact) or
its top k log-probabilities and the mass of the rest (coarse). It is called like a teacher, with
tokens, and finds the row of a sequence by the hash of its `input_ids`. So no worker counts steps
and ranks, and an unknown sequence is an error, never a wrong output. Targets and masks are in no
hash: outputs are stored at every position.

Steps are appended under a temporary name that is renamed at the end; an interrupted writer resumes
at the first incomplete step, and a lock excludes a second one. Bytes per token: 4 for the sequence
plus 4 x vocabulary (exact, float32) or 8 k + 4 (coarse).
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
from orchestrator.workspace.provenance import content_key
from orchestrator.workspace.whole_folders import (
    checksums_of,
    damaged_file,
    delete_leftovers,
    mark_verified,
    replace_folder,
)

MANIFEST_NAME = "manifest.json"
TEMPORARY_PREFIX = ".writing-"
FORMAT_VERSION = 1

TeacherOutput = Tensor | CoarseDistribution
"""Output for a batch: logits (batch, time, vocab), or their coarse form."""

OutputsByStep = Callable[[int], tuple[Tensor, TeacherOutput]]
"""Number of a teaching step, from 0 -> its sequences (batch, time), and the teacher's output."""


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
    """Tokens per sequence."""
    vocab_size: int
    """Logits per token."""
    precision: str = "fp32"
    """Arithmetic of the teacher: `fp32` or `bf16`."""
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
        return sum(self.num_rows * column.num_bytes for column in self.columns())

    @property
    def num_rows(self) -> int:
        """Sequences of all steps."""
        return self.num_steps * self.num_sequences

    def columns(self) -> tuple[_Column, ...]:
        """Return the files with their entry per sequence."""
        tokens = _Column("tokens", np.dtype("<i4"), (self.context_length,))
        if self.top_k is None:
            # NumPy has no bfloat16; the bits are stored as integers.
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
    """One file, with the dtype and shape of its entry per sequence."""

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
        # No conversion may lose digits: an exact cache must be exact.
        return array.astype(self.dtype, casting="same_kind", copy=False).tobytes()


@dataclass(frozen=True)
class CachedTeacher:
    """A teacher that reads its outputs from a cache; called like a decoder.

    The files are memory-mapped: workers and trials on one machine share them.
    """

    folder: Path
    plan: CachePlan
    _arrays: dict[str, np.ndarray] = field(repr=False)
    _rows: dict[bytes, int] = field(repr=False)

    def __call__(self, input_ids: Tensor) -> TeacherOutput:
        """Return the teacher's output for complete sequences, on their device.

        Args:
            input_ids: (batch, time), sequences of the plan in any order.

        Raises:
            KeyError: If a sequence is not part of the plan.
        """
        try:
            rows = [self._rows[digest] for digest in _digests(_as_int32(input_ids))]
        except KeyError:
            raise KeyError(f"{self.folder} has no output for a requested sequence") from None
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
    """Open a cache; None if it is missing, incomplete or has other content.

    This compares sizes; `write_cache` verifies checksums once for all readers.
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
    except FileNotFoundError:  # Another process has just deleted it.
        return None
    rows = {digest: row for row, digest in enumerate(_digests(arrays.pop("tokens")))}
    return CachedTeacher(folder, plan, dict(arrays), rows)


def write_cache(
    plan: CachePlan, parent: Path, outputs: OutputsByStep, *, progress: Progress | None = None
) -> Path:
    """Write a cache into `parent`/<key>, unless an intact one exists; return its folder.

    Args:
        plan: Content of the cache.
        parent: Folder of all caches.
        outputs: Called for each step that is not written yet.
        progress: Shows the steps done, and reports damage.

    Raises:
        OSError: If the disk is full. Complete steps stay, and the next call resumes after them.
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
            progress.note(f"{folder} is damaged ({problem}) and is written again")
            shutil.rmtree(folder)
        delete_leftovers(parent)
        temporary.mkdir(exist_ok=True)
        _append_missing_steps(plan, temporary, outputs, progress)
        checksums = checksums_of(temporary, [c.path(temporary).name for c in plan.columns()])
        write_json(temporary / MANIFEST_NAME, {"plan": asdict(plan), "checksums": checksums})
        mark_verified(temporary, checksums)
        replace_folder(temporary, folder)
    return folder


def find_cache_damage(folder: Path, plan: CachePlan, *, read: bool = True) -> str | None:
    """Return what is wrong with a cache; None if nothing is.

    Args:
        folder: The cache's folder.
        plan: Its expected content.
        read: Whether to verify checksums, which reads all files.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except UserError:
        return f"{MANIFEST_NAME} cannot be read"
    if not isinstance(manifest, dict):
        return f"{MANIFEST_NAME} is missing"
    if manifest.get("plan") != asdict(plan):
        return "it holds other outputs"
    for column in plan.columns():
        path = column.path(folder)
        if not path.is_file() or path.stat().st_size != plan.num_rows * column.num_bytes:
            return f"{path.name} is incomplete"
    checksums = manifest.get("checksums")
    if not isinstance(checksums, dict):
        return "it has no checksums"
    names = [column.path(folder).name for column in plan.columns()]
    return damaged_file(folder, checksums, names=names) if read else None


def bytes_to_write(plan: CachePlan, parent: Path) -> int:
    """Return the bytes of a cache in `parent` that are not written yet."""
    if find_cache_damage(parent / plan.key, plan, read=False) is None:
        return 0
    temporary = parent / f"{TEMPORARY_PREFIX}{plan.key}"
    paths = [column.path(temporary) for column in plan.columns()]
    written = sum(path.stat().st_size for path in paths if path.is_file())
    return max(0, plan.num_bytes - written)


def _append_missing_steps(
    plan: CachePlan, folder: Path, outputs: OutputsByStep, progress: Progress
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
            sequences, output = outputs(step)
            values = {"tokens": sequences.to(torch.int32), **_as_columns(output)}
            for column, file in zip(columns, files, strict=True):
                file.write(column.encoded(values[column.name]))
                file.flush()
            progress.advance(step + 1)
        for file in files:
            os.fsync(file.fileno())


def _as_columns(output: TeacherOutput) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"logits": output}
    return {
        "ids": output.ids.to(torch.int32),
        "log_probs": output.log_probs,
        "log_tail": output.log_tail,
    }


def _as_int32(input_ids: Tensor) -> np.ndarray:
    array: np.ndarray = input_ids.cpu().numpy().astype("<i4")
    return array


def _digests(sequences: np.ndarray) -> Iterator[bytes]:
    return (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in sequences)
