"""Token shards: documents in, two flat files of integers out, and a manifest that says what they
are.

The stream of documents is tokenized as it comes and never held as a whole. Everything is written
into a temporary folder beside the final one and renamed at the end, so that a folder under its
final name is complete. The fingerprint is a hash of every document, its side of the split and the
tokenizer; it names the data in every later key. Opening checks the files' sizes always, and their
hashes on demand, because hashing a large corpus takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer

from orchestrator.console import Progress
from orchestrator.data.corpus import Document, hash_share, is_validation
from orchestrator.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    train_tokenizer,
)
from orchestrator.errors import UserError
from orchestrator.provenance import content_key, file_digest
from orchestrator.settings import DataSettings
from orchestrator.workspace import read_json, write_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
TEMPORARY_PREFIX = ".writing-"
TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on this much text at most; its pairs change little after that."""
DOCUMENTS_PER_BATCH = 256
FEW_DOCUMENTS = 100
"""Of fewer documents than this, at least one is held out whatever its hash."""


@dataclass(frozen=True)
class TokenStore:
    """An opened folder of tokens; the arrays are memory maps, so that opening costs nothing."""

    folder: Path
    train: np.ndarray
    """Flat training tokens, each document closed by the end-of-text token."""
    validation: np.ndarray
    """Flat validation tokens, likewise."""
    vocab_size: int
    """Rows that an embedding needs."""
    fingerprint: str
    """Hash of documents, split and tokenizer."""
    num_validation_bytes: int
    """UTF-8 bytes of the validation documents, for bits per byte."""
    tokenizer_path: Path
    end_of_text_id: int
    manifest: dict[str, Any]

    @property
    def validation_documents(self) -> Path:
        """JSON lines of the held-out documents: `text`, `source`."""
        return self.folder / "validation.jsonl"

    @property
    def profile(self) -> dict[str, Any]:
        """Where the text is from and how much it is, as plain values for people to read."""
        settings = self.manifest["settings"]
        sizes = {
            f"{side}_{unit}": self.manifest[side][unit]
            for side in ("train", "validation")
            for unit in ("documents", "tokens", "bytes")
        }
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        return {**origin, **sizes, "vocab_size": self.vocab_size}


class _Split:
    """One side of the split while it is written: its file, its counts."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}
        self._file = file
        self._dtype = dtype
        self._digest = hashlib.sha256()

    def add(self, text: str, ids: list[int], end: int) -> None:
        data = np.asarray([*ids, end], dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids) + 1
        self.counts["bytes"] += len(text.encode("utf-8"))

    def finish(self) -> str:
        """Flush to disk and return the hash of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def write_tokens(
    parent: Path,
    documents: Iterable[Document],
    settings: DataSettings,
    *,
    progress: Progress | None = None,
) -> Path:
    """Tokenize documents into `parent`/<fingerprint>.

    Args:
        parent: Folder of all token folders.
        documents: The corpus, in any size; read once.
        settings: Tokenizer and share of validation; stored in the manifest.
        progress: Told what is going on after the documents are read.

    Returns:
        The folder. If the same data were there already, they are kept.

    Raises:
        UserError: If there is no text, or too little to hold some out.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f"{TEMPORARY_PREFIX}{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fingerprint = _write_folder(temporary, documents, settings, progress or Progress())
        final = parent / fingerprint
        if not is_complete(final):
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
        return final
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_folder(
    folder: Path, documents: Iterable[Document], settings: DataSettings, progress: Progress
) -> str:
    fraction, stream = _effective_fraction(iter(documents), settings.validation_fraction)
    tokenizer, stream = _choose_tokenizer(settings, stream, fraction, progress)
    tokenizer_path = folder / "tokenizer.json"
    tokenizer.save(str(tokenizer_path))
    end, vocab_size = end_of_text_id(tokenizer), num_token_ids(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    digest = hashlib.sha256()
    with (
        (folder / "train.bin").open("wb") as train_file,
        (folder / "validation.bin").open("wb") as validation_file,
        (folder / "validation.jsonl").open("w", encoding="utf-8") as held_out,
    ):
        train, validation = _Split(train_file, dtype), _Split(validation_file, dtype)
        while batch := list(islice(stream, DOCUMENTS_PER_BATCH)):
            encoded = tokenizer.encode_batch([d.text for d in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encoded, strict=True):
                is_held_out = is_validation(document.text, fraction)
                (validation if is_held_out else train).add(document.text, encoding.ids, end)
                digest.update(b"%d%b\0" % (is_held_out, document.text.encode("utf-8")))
                if is_held_out:
                    row = {"text": document.text, "source": document.source}
                    held_out.write(json.dumps(row) + "\n")
        checksums = {"train.bin": train.finish(), "validation.bin": validation.finish()}
    for name in ("tokenizer.json", "validation.jsonl"):
        checksums[name] = file_digest(folder / name)
    _check_counts(train.counts, validation.counts, fraction)
    fingerprint = content_key(digest.hexdigest(), checksums["tokenizer.json"])
    write_json(
        folder / MANIFEST_NAME,
        {
            "format": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "settings": settings.model_dump(mode="json"),
            "dtype": dtype.name,
            "vocab_size": vocab_size,
            "end_of_text_id": end,
            "train": train.counts,
            "validation": validation.counts,
            "sizes": {name: (folder / name).stat().st_size for name in checksums},
            "sha256": checksums,
        },
    )
    return fingerprint


def _effective_fraction(
    documents: Iterator[Document], fraction: float
) -> tuple[float, Iterator[Document]]:
    """Return the share of validation, raised where a handful of documents would leave it empty."""
    head = list(islice(documents, FEW_DOCUMENTS))
    if 1 < len(head) < FEW_DOCUMENTS:
        smallest = min(hash_share(document.text, "split") for document in head)
        fraction = max(fraction, math.nextafter(smallest, 1.0))
    return fraction, chain(head, documents)


def _choose_tokenizer(
    settings: DataSettings, documents: Iterator[Document], fraction: float, progress: Progress
) -> tuple[Tokenizer, Iterator[Document]]:
    """Return the tokenizer, and the documents with those that its training has used up put back in
    front."""
    if settings.tokenizer != "train":
        return load_tokenizer(settings.tokenizer), documents
    read: list[Document] = []
    num_characters = 0
    for document in documents:
        read.append(document)
        num_characters += len(document.text)
        if num_characters >= TOKENIZER_CHARACTERS:
            break
    _check_not_empty(read)
    progress.advance(0, "training the tokenizer")
    texts = (d.text for d in read if not is_validation(d.text, fraction))
    return train_tokenizer(texts, settings.vocab_size), chain(read, documents)


def _check_not_empty(documents: list[Document]) -> None:
    if not documents:
        raise UserError(
            "the corpus is empty: no document with text was found; check data.source and data.files"
        )


def _check_counts(train: dict[str, int], validation: dict[str, int], fraction: float) -> None:
    num_documents = train["documents"] + validation["documents"]
    if num_documents == 0:
        _check_not_empty([])
    if num_documents == 1:
        raise UserError(
            f"the corpus is a single document of {train['tokens'] + validation['tokens']} tokens, "
            "too little to train on one part and to hold out another; give more text"
        )
    for name, counts in (("training", train), ("validation", validation)):
        if counts["documents"] == 0:
            raise UserError(
                f"none of the {num_documents} documents falls to {name} with "
                f"data.validation_fraction={fraction:g}; choose another fraction or give more text"
            )


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds tokens whose files have the sizes that the manifest says."""
    try:
        manifest = read_json(folder / MANIFEST_NAME)
        return bool(manifest) and not _problem(folder, manifest, verify=False)
    except UserError:
        return False


def open_tokens(folder: Path | str, *, verify: bool = False) -> TokenStore:
    """Open a folder of tokens.

    Args:
        folder: As returned by `write_tokens`.
        verify: Compare the files' hashes too, not only their sizes.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    problem = _problem(folder, manifest, verify=verify)
    if problem:
        raise UserError(f"{problem}; run `iiet-orch prepare` again")
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    return TokenStore(
        folder=folder,
        train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
        validation=np.memmap(folder / "validation.bin", dtype=dtype, mode="r"),
        vocab_size=manifest["vocab_size"],
        fingerprint=manifest["fingerprint"],
        num_validation_bytes=manifest["validation"]["bytes"],
        tokenizer_path=folder / "tokenizer.json",
        end_of_text_id=manifest["end_of_text_id"],
        manifest=manifest,
    )


def _problem(folder: Path, manifest: dict[str, Any], *, verify: bool) -> str | None:
    if manifest.get("format") != FORMAT_VERSION:
        return f"{folder} was written by another version of the program"
    for name, size in manifest["sizes"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: {path.stat().st_size} bytes instead of {size}"
        if verify and file_digest(path) != manifest["sha256"][name]:
            return f"{path} is damaged: its content has changed"
    return None
