"""From tokenized parts to a token folder: choose the documents to keep, then write them.

Training reads the parts' token files one after the other; hard links give them names in the final
folder. The few held-out documents are appended to one file. So the order of the tokens depends
neither on the number of parts nor on how many were tokenized at the same time.
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
from orchestrator.data.text_parts import (
    PROMPTS,
    RECORDS,
    SUMS,
    TEXTS,
    TRAIN,
    VALIDATION,
    PartRunner,
    Plan,
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
class PartDocuments:
    """The kept documents of a part: all, or the first ones."""

    folder: Path
    num_kept: int

    def records(self) -> np.ndarray:
        """Read the records of the documents, of dtype `RECORD`."""
        records: np.ndarray = np.load(self.folder / RECORDS)
        return records[: self.num_kept]

    def prompt_lengths(self) -> np.ndarray:
        """Read the number of prompt tokens of each document, which are no targets."""
        if (self.folder / PROMPTS).exists():
            lengths: np.ndarray = np.load(self.folder / PROMPTS)
            return lengths[: self.num_kept]
        return np.zeros(self.num_kept, "<u4")

    @property
    def has_training_documents(self) -> bool:
        """Whether at least one document is for training."""
        return not self.records()["held_out"].all()


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """All kept documents, in their order."""

    parts: list[PartDocuments]
    train: SplitCounts
    validation: SplitCounts
    has_prompts: bool
    digest: str
    """Hash of the documents and their split."""


def choose_documents(part_folders: Sequence[Path], plan: Plan) -> ChosenDocuments:
    """Choose the documents to keep from tokenized parts.

    Raises:
        UserError: If there are too few to hold some out.
    """
    parts = _first_documents(part_folders, plan.settings.max_documents)
    has_prompts = any(part.prompt_lengths().any() for part in parts)
    train = SplitCounts()
    validation = SplitCounts()
    content = hashlib.sha256()
    for part in parts:
        records = part.records()
        content.update(records.tobytes())
        is_held_out = records["held_out"]
        train += _counts(records[~is_held_out])
        validation += _counts(records[is_held_out])
    if has_prompts:
        for part in parts:
            content.update(part.prompt_lengths().tobytes())
    num_kept = train.documents + validation.documents
    if num_kept == 1:
        raise UserError(
            f"the corpus is a single document of {train.tokens + validation.tokens} tokens, too "
            "few to split into training and held-out text; give more text, or cut a "
            "long document by --set data.passage_characters=4000"
        )
    if not (train.documents and validation.documents):
        name = "validation" if train.documents else "training"
        raise UserError(
            f"with {num_kept} documents, the {name} text is empty at "
            f"data.validation_fraction={plan.fraction:g}; choose another fraction or give more text"
        )
    return ChosenDocuments(
        parts=parts,
        train=train,
        validation=validation,
        has_prompts=has_prompts,
        digest=content.hexdigest(),
    )


def _first_documents(folders: Sequence[Path], max_documents: int | None) -> list[PartDocuments]:
    """Choose the first documents of all parts; only the last part may be kept incompletely."""
    parts: list[PartDocuments] = []
    remaining = math.inf if max_documents is None else max_documents
    for folder in folders:
        num_kept = int(min(num_documents(folder), remaining))
        parts.append(PartDocuments(folder, num_kept))
        remaining -= num_kept
    return parts


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
    runner: PartRunner,
) -> None:
    """Write a token folder, named by its fingerprint; it gets its name when it is complete."""
    dtype = dtype_of(tokenizer)
    parts_to_train_on = [part for part in chosen.parts if part.has_training_documents]
    num_files = len(parts_to_train_on)
    names = [train_name(number, num_files) for number in range(num_files)]
    with new_folder(folder) as temporary:
        works = (
            partial(
                _write_training_tokens,
                part,
                temporary / name,
                dtype,
                has_prompts=chosen.has_prompts,
            )
            for part, name in zip(parts_to_train_on, names, strict=True)
        )
        checksums: dict[str, str] = {}
        for checksums_of_part in _results(runner, works):
            checksums |= checksums_of_part
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


def _results(runner: PartRunner, works: Iterator[Callable[[], T]]) -> Iterator[T]:
    """Yield the results of works in their order; the runner decides how many run at the same
    time."""
    at_work: deque[Future[T]] = deque()
    for work in works:
        if len(at_work) >= runner.num_at_once:
            yield at_work.popleft().result()
        at_work.append(runner.submit(work))
    while at_work:
        yield at_work.popleft().result()


def _write_training_tokens(
    part: PartDocuments, file: Path, dtype: np.dtype, *, has_prompts: bool
) -> dict[str, str]:
    """Write the training tokens of a part's kept documents; return name -> SHA-256.

    If all documents are kept, the new file is a hard link to the part's own file.
    """
    records = part.records()
    is_training = ~records["held_out"]
    stored = part.folder / TRAIN
    num_bytes = int(records["tokens"][is_training].sum(dtype=np.int64)) * dtype.itemsize
    file.unlink(missing_ok=True)  # A task that is repeated after the loss of its worker.
    if num_bytes == stored.stat().st_size:
        try:
            file.hardlink_to(stored)
        except OSError:  # Some file systems have no hard links.
            shutil.copyfile(stored, file)
        checksums = {file.name: (read_json(part.folder / SUMS) or {})[TRAIN]}
    else:
        shutil.copyfile(stored, file)
        os.truncate(file, num_bytes)
        checksums = {file.name: file_digest(file)}
    if has_prompts:
        targets = file.with_name(targets_name(file.name))
        targets.write_bytes(_targets_of(part, is_training))
        checksums[targets.name] = file_digest(targets)
    return checksums


def _write_validation(chosen: ChosenDocuments, folder: Path, dtype: np.dtype) -> None:
    """Write tokens, texts and, with prompts, targets of all held-out documents."""
    with (
        (folder / VALIDATION_NAME).open("wb") as validation_file,
        (folder / TEXTS_NAME).open("wb") as texts,
    ):
        for part in chosen.parts:
            num_held_out = int(part.records()["held_out"].sum())
            with (part.folder / TEXTS).open("rb") as rows:
                texts.writelines(islice(rows, num_held_out))
            with (part.folder / VALIDATION).open("rb") as tokens:
                shutil.copyfileobj(tokens, validation_file)
        # The last part may be kept only in part.
        validation_file.truncate(chosen.validation.tokens * dtype.itemsize)
    if chosen.has_prompts:
        with (folder / VALIDATION_TARGETS_NAME).open("wb") as targets:
            for part in chosen.parts:
                targets.write(_targets_of(part, part.records()["held_out"]))


def _targets_of(part: PartDocuments, is_chosen: np.ndarray) -> bytes:
    """Return one byte for each token of the chosen documents: whether it is a target."""
    num_tokens = part.records()["tokens"][is_chosen]
    return _is_target(num_tokens, part.prompt_lengths()[is_chosen]).tobytes()


def _is_target(num_tokens: np.ndarray, num_prompt_tokens: np.ndarray) -> np.ndarray:
    """Return for each token of some documents whether it is a target, which prompt tokens are
    not."""
    ends = np.cumsum(num_tokens, dtype=np.int64)
    starts = np.repeat(ends - num_tokens, num_tokens)
    place_in_document = np.arange(len(starts)) - starts
    is_target: np.ndarray = place_in_document >= np.repeat(num_prompt_tokens, num_tokens)
    return is_target
