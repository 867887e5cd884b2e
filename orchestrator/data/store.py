"""A folder of prepared data: what training, validation and evaluation read.

It holds a tokenizer and a manifest. Text also has token files (flat arrays of integers), one with
the held-out tokens and one or more with the training tokens, and a file of the held-out documents.
The folder is named by its fingerprint: the hash of everything that determines the sequences, which
identifies the data in all keys. The fingerprint does not depend on the number of files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from orchestrator.data.order import WindowOrder, positions_of_step
from orchestrator.models.tokenizer import end_of_text_id, num_token_ids
from orchestrator.records.record import Record
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import checksums_of, damaged, damaged_file

if TYPE_CHECKING:
    from torch import Tensor

    from iiet.model.batch import Batch

TOKENIZER_NAME = "tokenizer.json"
MANIFEST_NAME = "manifest.json"
TRAIN_NAME = "train.bin"
"""File of the training tokens, if they are in one file."""
VALIDATION_NAME = "validation.bin"
TEXTS_NAME = "validation.jsonl"
"""The held-out documents."""
VALIDATION_TARGETS_NAME = "validation_targets.bin"
"""File of text with prompts: a byte for each validation token, 1 where it is a target."""
MAPS_KEPT = 256
"""Most token files of one side of the split that are mapped at the same time; each needs a file
descriptor."""


def train_name(number: int, num_files: int) -> str:
    """Return the name of a file of training tokens."""
    return TRAIN_NAME if num_files == 1 else f"train_{number:06}.bin"


def targets_name(train_file: str) -> str:
    """Return the name of the file that says which tokens of a training file are targets.

    Its form is that of `VALIDATION_TARGETS_NAME`; only text with prompts has such files.
    """
    return train_file.replace("train", "train_targets")


class SplitCounts(BaseModel):
    """Size of one side of the split; `bytes` is the text's length in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: SplitCounts) -> SplitCounts:
        """Return the size of both texts together."""
        return SplitCounts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


class Manifest(Record):
    """Content of a folder of prepared data."""

    fingerprint: str
    """Hash of documents, split and tokenizer."""
    settings: dict[str, Any]
    """The `DataSettings` of the preparation."""
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    """Rows of the embedding."""
    end_of_text_id: int
    train: SplitCounts
    validation: SplitCounts
    sha256: dict[str, str]
    """SHA-256 of each file."""
    train_files: tuple[str, ...] = (TRAIN_NAME,)
    """Names of the files of training tokens, in their order; data without text have none."""
    texts: dict[str, str] = Field(default_factory=dict)
    """The texts of a mixture: component -> name of its folder in the same parent."""

    def text_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each text source of the mixture in `folder`."""
        return {source: folder.parent / name for source, name in self.texts.items()}


@dataclass(frozen=True)
class PreparedData(ABC):
    """An open folder of prepared data; opening is cheap."""

    folder: Path
    manifest: Manifest

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines the sequences; identifies the data in all keys."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.manifest.vocab_size

    @property
    def component_names(self) -> tuple[str, ...]:
        """Names of a mixture's components, in the order of their numbers; otherwise empty."""
        return ()

    @property
    def tokenizer_path(self) -> Path:
        """The `tokenizer.json` of the data."""
        return self.folder / TOKENIZER_NAME

    @property
    def parts(self) -> tuple[PreparedData, ...]:
        """The data of each component of a mixture; otherwise only these data."""
        return (self,)

    @property
    @abstractmethod
    def profile(self) -> dict[str, Any]:
        """Origin and size of the data, as plain values for display."""

    @property
    @abstractmethod
    def num_validation_tokens(self) -> int | None:
        """Number of held-out tokens; None if any number can be generated."""

    @abstractmethod
    def describe(self) -> str:
        """Summarize the data in a few words."""

    @abstractmethod
    def check_length(self, context_length: int) -> None:
        """Raise a `UserError` if there are no sequences of this length."""

    @abstractmethod
    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        """Return training sequences by their numbers, int64 from 0, (positions, context_length)."""

    @abstractmethod
    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, (<= batch_size, context_length).

        Args:
            num_tokens: At most this many tokens in all, rounded down to whole sequences.
        """

    def batch(
        self,
        step: int,
        *,
        context_length: int,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Return one worker's share of a training step; arguments as in `positions_of_step`."""
        positions = positions_of_step(
            step, global_batch=global_batch, rank=rank, world_size=world_size
        )
        return self.sequences(positions, context_length=context_length, seed=seed)


class FileArray:
    """A flat array in several memory-mapped files, one after the other."""

    def __init__(self, files: Sequence[Path], dtype: np.dtype) -> None:
        """Take the sizes of the files; a file is opened when it is first read."""
        self._files = files
        self._dtype = dtype
        sizes = [file.stat().st_size // dtype.itemsize for file in files]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._starts = self._ends - sizes
        self._map = lru_cache(MAPS_KEPT)(self._open)

    def _open(self, number: int) -> np.ndarray:
        return np.memmap(self._files[number], self._dtype, "r")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the values of a range without steps."""
        first, end, _ = part.indices(len(self))
        values = np.empty(max(0, end - first), self._dtype)
        has_values = np.minimum(self._ends, end) > np.maximum(self._starts, first)
        for number in np.flatnonzero(has_values).tolist():
            file_start = int(self._starts[number])
            start = max(first, file_start)
            stop = min(end, int(self._ends[number]))
            part_of_file = self._map(number)[start - file_start : stop - file_start]
            values[start - first : stop - first] = part_of_file
        return values

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the windows that start at `starts`, int64, (starts, length)."""
        values = np.empty((len(starts), length), self._dtype)
        first_files = np.searchsorted(self._ends, starts, side="right")
        last_files = np.searchsorted(self._ends, starts + length - 1, side="right")
        is_inside = first_files == last_files
        for number in np.unique(first_files[is_inside]).tolist():
            is_in_file = is_inside & (first_files == number)
            starts_in_file = starts[is_in_file] - self._starts[number]
            values[is_in_file] = self._map(number)[starts_in_file[:, None] + np.arange(length)]
        for row in np.flatnonzero(~is_inside).tolist():  # The window crosses the end of a file.
            values[row] = self[int(starts[row]) : int(starts[row]) + length]
        return values


@dataclass(frozen=True)
class TokenStore(PreparedData):
    """Prepared text."""

    train: FileArray
    """Flat training tokens; each document ends with the end-of-text token."""
    validation: FileArray
    """Flat validation tokens, in the same form."""
    train_targets: FileArray | None = None
    """Whether each training token is a target; None: all are."""
    validation_targets: FileArray | None = None
    """Whether each validation token is a target; None: all are."""

    def validation_texts(self) -> Iterator[str]:
        """Yield the held-out documents."""
        with (self.folder / TEXTS_NAME).open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)

    @property
    def profile(self) -> dict[str, Any]:
        settings = self.manifest.settings
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        sides = {"train": self.manifest.train, "validation": self.manifest.validation}
        sizes = {f"{side}_{unit}": size for side, counts in sides.items() for unit, size in counts}
        return {**origin, **sizes, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> int:
        return len(self.validation)

    def describe(self) -> str:
        train = self.manifest.train
        validation = self.manifest.validation
        return (
            f"{train.documents + validation.documents:,} documents, {train.tokens:,} tokens to "
            f"train on, {validation.tokens:,} held out"
        )

    def check_length(self, context_length: int) -> None:
        for split, tokens in (("training", self.train), ("validation", self.validation)):
            if len(tokens) < context_length:
                raise UserError(
                    f"the {split} text has {len(tokens)} tokens, fewer than one sequence of "
                    f"{context_length}; give more text, or set a smaller model.context_length or "
                    "training.sequence_length"
                )

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        from iiet.model.batch import Batch

        starts = WindowOrder(len(self.train), context_length, seed).starts(positions)
        mask = None
        if self.train_targets is not None:
            mask = gather(self.train_targets, starts, context_length)
        return Batch.of_text(gather(self.train, starts, context_length), mask)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, spread evenly over the text; as the base class says."""
        from iiet.model.batch import Batch

        self.check_length(context_length)
        available = len(self.validation) // context_length
        num_sequences = min(max(1, num_tokens // context_length), available)
        numbers = np.arange(num_sequences, dtype=np.int64) * available // num_sequences
        starts = numbers * context_length
        for first in range(0, num_sequences, batch_size):
            batch_starts = starts[first : first + batch_size]
            mask = None
            if self.validation_targets is not None:
                mask = gather(self.validation_targets, batch_starts, context_length)
            yield Batch.of_text(gather(self.validation, batch_starts, context_length), mask)


def gather(tokens: FileArray, starts: np.ndarray, length: int) -> Tensor:
    """Return the sequences of a flat array that start at `starts`, int64, (starts, length)."""
    import torch

    return torch.from_numpy(tokens.windows(starts, length).astype(np.int64))


# Folders


def open_tokens(folder: Path | str) -> TokenStore:
    """Open a folder of tokens and verify its files, see `verify_data`."""
    folder = Path(folder)
    manifest = verify_data(folder)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    train = FileArray([folder / name for name in manifest.train_files], dtype)
    validation = FileArray([folder / VALIDATION_NAME], dtype)
    if VALIDATION_TARGETS_NAME not in manifest.sha256:
        return TokenStore(folder, manifest, train, validation)
    is_target = np.dtype(np.bool_)
    train_targets = FileArray(
        [folder / targets_name(name) for name in manifest.train_files], is_target
    )
    validation_targets = FileArray([folder / VALIDATION_TARGETS_NAME], is_target)
    return TokenStore(folder, manifest, train, validation, train_targets, validation_targets)


def finish_folder(
    folder: Path,
    fingerprint: str,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    train: SplitCounts | None = None,
    validation: SplitCounts | None = None,
    train_files: Sequence[str] = (TRAIN_NAME,),
    known_checksums: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the tokenizer and, last, the manifest of a folder; token files exist already.

    Args:
        train_files: Names of the files of training tokens, in their order.
        known_checksums: Name -> SHA-256 of files whose checksum is already known.
        texts: Component of a mixture -> name of its folder.
    """
    tokenizer.save(str(folder / TOKENIZER_NAME))
    names = (
        *train_files,
        *map(targets_name, train_files),
        VALIDATION_NAME,
        VALIDATION_TARGETS_NAME,
        TEXTS_NAME,
        TOKENIZER_NAME,
    )
    stored_names = [name for name in names if (folder / name).exists()]
    sha256 = checksums_of(folder, stored_names, known=known_checksums)
    manifest = Manifest(
        fingerprint=fingerprint,
        settings=dict(settings),
        dtype=token_dtype(num_token_ids(tokenizer)),
        vocab_size=num_token_ids(tokenizer),
        end_of_text_id=end_of_text_id(tokenizer),
        train=train or SplitCounts(),
        validation=validation or SplitCounts(),
        sha256=sha256,
        train_files=tuple(train_files),
        texts=dict(texts or {}),
    )
    manifest.write(folder / MANIFEST_NAME)


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder, and no other file.

    Raises:
        UserError: If the folder is missing.
        DamagedFile: If the manifest is damaged.
    """
    manifest = Manifest.read(folder / MANIFEST_NAME)
    if manifest is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    return manifest


def is_complete(folder: Path) -> bool:
    """Return whether a folder exists, and with a mixture also the folders of its texts.

    A folder gets its name when all of its files are written; these are not verified here.

    Raises:
        DamagedFile: If a manifest is not what was written.
    """
    manifest = Manifest.read(folder / MANIFEST_NAME)
    return manifest is not None and all(map(is_complete, manifest.text_folders(folder).values()))


def verify_data(folder: Path, *, always: bool = False, remember: bool = False) -> Manifest:
    """Verify the content of a folder's files, see `files.damaged_file`; return its manifest.

    Raises:
        UserError: If the folder is missing.
        DamagedFile: If a file is missing or has changed.
    """
    manifest = read_manifest(folder)
    for text_folder in manifest.text_folders(folder).values():
        verify_data(text_folder, always=always, remember=remember)
    if damage := damaged_file(folder, manifest.sha256, always=always, remember=remember):
        raise damaged(folder, damage)
    return manifest
