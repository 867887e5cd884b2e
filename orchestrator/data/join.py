"""From whole shards to a token folder: choose the documents that are kept, then write them.

Training reads the shards' files one after the other: they get a second name in the final folder.
The few held-out documents are appended to one file. So neither the number of shards nor how many
were at work at once changes the order of a token.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from orchestrator.data.store import (
    TEXTS_NAME,
    VALIDATION_NAME,
    VALIDATION_TARGETS_NAME,
    SplitCounts,
    finish_folder,
    targets_name,
    train_name,
)
from orchestrator.data.text_shards import (
    PROMPTS,
    RECORDS,
    SUMS,
    TEXTS,
    TRAIN,
    VALIDATION,
    Plan,
    ShardRunner,
    dtype_of,
    num_documents,
)
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import new_folder, read_json
from orchestrator.workspace.provenance import file_digest

T = TypeVar("T")

# Choose


@dataclass(frozen=True)
class ShardDocuments:
    """The documents of a shard that are kept: all, or the first ones."""

    folder: Path
    num_kept: int

    def records(self) -> np.ndarray:
        """Read what is known of the documents, as values of `RECORD`."""
        records: np.ndarray = np.load(self.folder / RECORDS)
        return records[: self.num_kept]

    def prompt_lengths(self) -> np.ndarray:
        """Read the number of tokens that a document begins with that are no targets."""
        if (self.folder / PROMPTS).exists():
            lengths: np.ndarray = np.load(self.folder / PROMPTS)
            return lengths[: self.num_kept]
        return np.zeros(self.num_kept, "<u4")

    @property
    def has_training_documents(self) -> bool:
        """Whether not all documents are held out."""
        return not self.records()["held_out"].all()


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """All documents that are kept, in their order."""

    shards: list[ShardDocuments]
    train: SplitCounts
    validation: SplitCounts
    has_prompts: bool
    digest: str
    """Hash of the documents and their split."""


def choose_documents(shard_folders: Sequence[Path], plan: Plan) -> ChosenDocuments:
    """Choose the documents that are kept, of whole shards that hold them.

    Raises:
        UserError: If there are too few to hold some out.
    """
    shards = _first_documents(shard_folders, plan.settings.max_documents)
    has_prompts = any(shard.prompt_lengths().any() for shard in shards)
    train = SplitCounts()
    validation = SplitCounts()
    content = hashlib.sha256()
    for shard in shards:
        records = shard.records()
        content.update(records.tobytes())
        is_held_out = records["held_out"]
        train += _counts(records[~is_held_out])
        validation += _counts(records[is_held_out])
    if has_prompts:
        for shard in shards:
            content.update(shard.prompt_lengths().tobytes())
    num_kept = train.documents + validation.documents
    if num_kept == 1:
        raise UserError(
            f"the corpus is a single document of {train.tokens + validation.tokens} tokens, too "
            "little to train on one part and to hold out another; give more text, or cut a "
            "long document by --set data.passage_characters=4000"
        )
    if not (train.documents and validation.documents):
        name = "validation" if train.documents else "training"
        raise UserError(
            f"none of the {num_kept} documents falls to {name} with "
            f"data.validation_fraction={plan.fraction:g}; choose another fraction or give more text"
        )
    return ChosenDocuments(
        shards=shards,
        train=train,
        validation=validation,
        has_prompts=has_prompts,
        digest=content.hexdigest(),
    )


def _first_documents(folders: Sequence[Path], max_documents: int | None) -> list[ShardDocuments]:
    """Choose the first documents of all shards; only the last shard may lose some."""
    shards: list[ShardDocuments] = []
    remaining = math.inf if max_documents is None else max_documents
    for folder in folders:
        num_kept = int(min(num_documents(folder), remaining))
        shards.append(ShardDocuments(folder, num_kept))
        remaining -= num_kept
    return shards


def _counts(records: np.ndarray) -> SplitCounts:
    return SplitCounts(
        documents=len(records),
        tokens=int(records["tokens"].sum(dtype=np.int64)),
        bytes=int(records["bytes"].sum(dtype=np.int64)),
    )


# Write


def write_documents(
    chosen: ChosenDocuments,
    folder: Path,
    settings: DataSettings,
    tokenizer: Tokenizer,
    runner: ShardRunner,
) -> None:
    """Write a token folder, whose name is its fingerprint; it appears when it is whole."""
    dtype = dtype_of(tokenizer)
    shards_to_train_on = [shard for shard in chosen.shards if shard.has_training_documents]
    num_files = len(shards_to_train_on)
    names = [train_name(number, num_files) for number in range(num_files)]
    with new_folder(folder) as temporary:
        works = (
            partial(
                _write_training_tokens,
                shard,
                temporary / name,
                dtype,
                has_prompts=chosen.has_prompts,
            )
            for shard, name in zip(shards_to_train_on, names, strict=True)
        )
        checksums: dict[str, str] = {}
        for checksums_of_shard in _results(runner, works):
            checksums |= checksums_of_shard
        _write_validation(chosen, temporary, dtype)
        finish_folder(
            temporary,
            folder.name,
            settings.read_by_source(),
            tokenizer,
            train=chosen.train,
            validation=chosen.validation,
            train_files=names,
            known_checksums=checksums,
        )


def _results(runner: ShardRunner, works: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of some works in their order; as many run as the runner takes at once."""
    at_work: deque[Future[T]] = deque()
    for work in works:
        if len(at_work) >= runner.num_at_once:
            yield at_work.popleft().result()
        at_work.append(runner.submit(work))
    while at_work:
        yield at_work.popleft().result()


def _write_training_tokens(
    shard: ShardDocuments, file: Path, dtype: np.dtype, *, has_prompts: bool
) -> dict[str, str]:
    """Write the training tokens of a shard's kept documents; return name -> SHA-256.

    Where all are kept, the shard's own file gets a second name.
    """
    records = shard.records()
    is_training = ~records["held_out"]
    stored = shard.folder / TRAIN
    num_bytes = int(records["tokens"][is_training].sum(dtype=np.int64)) * dtype.itemsize
    file.unlink(missing_ok=True)  # Of a task whose worker was lost, and which is done again.
    if num_bytes == stored.stat().st_size:
        try:
            file.hardlink_to(stored)
        except OSError:  # Some file systems have no second names.
            shutil.copyfile(stored, file)
        checksums = {file.name: (read_json(shard.folder / SUMS) or {})[TRAIN]}
    else:
        shutil.copyfile(stored, file)
        os.truncate(file, num_bytes)
        checksums = {file.name: file_digest(file)}
    if has_prompts:
        targets = file.with_name(targets_name(file.name))
        targets.write_bytes(_targets_of(shard, is_training))
        checksums[targets.name] = file_digest(targets)
    return checksums


def _write_validation(chosen: ChosenDocuments, folder: Path, dtype: np.dtype) -> None:
    """Write tokens, texts and, with prompts, targets of all held-out documents."""
    with (
        (folder / VALIDATION_NAME).open("wb") as validation_file,
        (folder / TEXTS_NAME).open("wb") as texts,
    ):
        for shard in chosen.shards:
            num_held_out = int(shard.records()["held_out"].sum())
            with (shard.folder / TEXTS).open("rb") as rows:
                texts.writelines(islice(rows, num_held_out))
            with (shard.folder / VALIDATION).open("rb") as tokens:
                shutil.copyfileobj(tokens, validation_file)
        # Of the last shard, only the first documents may be kept.
        validation_file.truncate(chosen.validation.tokens * dtype.itemsize)
    if chosen.has_prompts:
        with (folder / VALIDATION_TARGETS_NAME).open("wb") as targets:
            for shard in chosen.shards:
                targets.write(_targets_of(shard, shard.records()["held_out"]))


def _targets_of(shard: ShardDocuments, is_chosen: np.ndarray) -> bytes:
    """Return for each token of the chosen documents whether it is a target, a byte each."""
    num_tokens = shard.records()["tokens"][is_chosen]
    return _is_target(num_tokens, shard.prompt_lengths()[is_chosen]).tobytes()


def _is_target(num_tokens: np.ndarray, num_prompt_tokens: np.ndarray) -> np.ndarray:
    """Return for each token of some documents whether it is a target: it follows the prompt."""
    ends = np.cumsum(num_tokens, dtype=np.int64)
    starts = np.repeat(ends - num_tokens, num_tokens)
    place_in_document = np.arange(len(starts)) - starts
    is_target: np.ndarray = place_in_document >= np.repeat(num_prompt_tokens, num_tokens)
    return is_target
