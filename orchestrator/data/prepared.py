"""A folder of prepared data: what training, validation and evaluation read.

It holds a tokenizer, a manifest, and for text the tokens. Its name is its fingerprint, a hash of
everything that determines the sequences, which identifies the data in all keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer

from iiet.batch import Batch
from orchestrator.data.batches import positions_of_step
from orchestrator.models.tokenizer import end_of_text_id, num_token_ids
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    checksums_of,
    damaged_file,
    new_folder,
    read_json,
    write_json,
)

TOKENIZER_NAME = "tokenizer.json"
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


class SplitCounts(BaseModel):
    """Size of one side of the split; `bytes` is the text's length in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class Manifest(BaseModel):
    """What a folder holds."""

    format: int = FORMAT_VERSION
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
    sizes: dict[str, int]
    """Bytes of each file."""
    sha256: dict[str, str]
    """Hash of each file."""
    texts: dict[str, str] = {}
    """Of a mixture: text source -> name of its folder, which lies beside this one."""

    def write(self, folder: Path) -> None:
        """Write the manifest of a folder, its last file."""
        unused = set() if self.texts else {"texts"}
        write_json(folder / MANIFEST_NAME, self.model_dump(exclude=unused))

    def text_folders(self, folder: Path) -> dict[str, Path]:
        """Return the folder of each text source of the mixture in `folder`."""
        return {name: folder.parent / beside for name, beside in self.texts.items()}


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
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources that `Batch.sources` numbers; empty if there is one source."""
        return ()

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER_NAME

    @property
    def parts(self) -> tuple[PreparedData, ...]:
        """The data of each source, if several are mixed; otherwise this one."""
        return (self,)

    @property
    @abstractmethod
    def profile(self) -> dict[str, Any]:
        """Origin and size of the data, as plain values for display."""

    @property
    @abstractmethod
    def num_validation_tokens(self) -> int | None:
        """Tokens held out; None if there is no end of them."""

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


def write_without_tokens(
    folder: Path,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    train: SplitCounts,
    validation: SplitCounts,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a folder of a tokenizer and a manifest; its tokens are generated, or lie beside it.

    Args:
        folder: Its name is the fingerprint.
        texts: Of a mixture: text source -> name of its folder.
    """
    vocab_size = num_token_ids(tokenizer)
    with new_folder(folder) as temporary:
        tokenizer.save(str(temporary / TOKENIZER_NAME))
        Manifest(
            fingerprint=folder.name,
            settings=dict(settings),
            dtype="uint16" if vocab_size <= 1 << 16 else "uint32",
            vocab_size=vocab_size,
            end_of_text_id=end_of_text_id(tokenizer),
            train=train,
            validation=validation,
            sizes={TOKENIZER_NAME: (temporary / TOKENIZER_NAME).stat().st_size},
            sha256=checksums_of(temporary, [TOKENIZER_NAME]),
            texts=dict(texts or {}),
        ).write(temporary)
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds data whose files have the sizes in the manifest."""
    try:
        check_files(folder, read_manifest(folder))
    except UserError:
        return False
    return True


def verify_data(folder: Path, *, always: bool = False, remember: bool = False) -> None:
    """Raise a `UserError` if a file's content has changed; see `files.damaged_file`."""
    manifest = read_manifest(folder)
    for text in manifest.text_folders(folder).values():
        verify_data(text, always=always, remember=remember)
    check_files(folder, manifest)
    if damage := damaged_file(folder, manifest.sha256, always=always, remember=remember):
        raise UserError(f"{folder} is damaged: {damage}; {remedy_of(folder)}")


def remedy_of(folder: Path) -> str:
    """Return what to do about a damaged folder, as the end of a sentence."""
    return f"delete the folder {folder} and run `iiet-orch prepare` again"


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest; a `UserError` if it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    values = read_json(path, remedy=remedy_of(folder))
    if values is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    if values.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{folder} was written by another version of the program; {remedy_of(folder)}"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(
            f"{path} is damaged (missing or invalid: {fields}); {remedy_of(folder)}"
        ) from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise a `UserError` if a file is missing or has another size than in the manifest."""
    problem = None
    for name in manifest.sha256:
        path, size = folder / name, manifest.sizes.get(name)
        if not path.is_file():
            problem = f"{path} is missing"
        elif path.stat().st_size != size:
            problem = f"{path} is damaged: {path.stat().st_size} bytes instead of {size}"
        if problem:
            raise UserError(f"{problem}; {remedy_of(folder)}")
    for text in manifest.text_folders(folder).values():
        check_files(text, read_manifest(text))
