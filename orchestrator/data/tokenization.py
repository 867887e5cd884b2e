"""Documents in, prepared tokens out: in one pass, on all cores, resumable, never held as a whole.

Batches of documents are encoded by the tokenizers library's own threads while this one hashes and
writes the batches before. Everything goes into a folder beside the final one, which is renamed at
the end, so that a folder under its final name is complete.

A stretch of documents that is safely on disk is a shard: a record says how far the files go and
what their hashes are there. Killed or interrupted, the next call cuts the files back to the last
shard and goes on behind it. The documents before are read again, because their hash is part of the
fingerprint, but not tokenized again; the result is the same to the last byte.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from orchestrator.data.corpus import Document, hash_fraction, is_validation
from orchestrator.data.token_store import FORMAT_VERSION, MANIFEST_NAME, is_complete, verify_tokens
from orchestrator.data.token_writer import RECORD_NAME, StaleTokens, TokenWriter
from orchestrator.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    train_tokenizer,
)
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_json
from orchestrator.workspace.provenance import content_key, file_digest

TEMPORARY_PREFIX = ".writing-"
TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on this much text at most; its pairs change little after that."""
DOCUMENTS_PER_BATCH = 1024
BATCHES_AHEAD = 2
SHARD_BYTES = 32 << 20
"""Text after which what is written is made safe."""
FEW_DOCUMENTS = 100
"""Of fewer documents than this, at least one is held out whatever its hash."""

Batch = list[Document]


def write_tokens(
    parent: Path,
    documents: Iterable[Document],
    settings: DataSettings,
    *,
    resume_key: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Tokenize documents into `parent`/<fingerprint>.

    Args:
        parent: Folder of all token folders.
        documents: The corpus, in any size; read once.
        settings: Tokenizer and share of validation; stored in the manifest.
        resume_key: Names the work, so that a later call with the same documents goes on where this
            one was interrupted; without it, nothing is kept.
        progress: Told what is going on.

    Returns:
        The folder. If the same data were there already, they are kept.

    Raises:
        UserError: If there is no text, or too little to hold some out.
    """
    parent.mkdir(parents=True, exist_ok=True)
    work = parent / f"{TEMPORARY_PREFIX}{resume_key or os.getpid()}"
    if resume_key is None:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    if not isinstance(progress, TokenProgress):
        progress = TokenProgress(progress or Progress())
    try:
        fingerprint = _write_folder(work, documents, settings, progress)
        final = parent / fingerprint
        if not is_complete(final):
            shutil.rmtree(final, ignore_errors=True)
            work.replace(final)
            verify_tokens(final)
    except BaseException as error:
        # The network's failures are the user's too: what is tokenized by then is kept.
        if resume_key is None or isinstance(error, StaleTokens) or not is_unfinished(work):
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)
    return final


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder holds work that can be gone on with."""
    return (folder / RECORD_NAME).is_file()


def _write_folder(
    folder: Path, documents: Iterable[Document], settings: DataSettings, progress: TokenProgress
) -> str:
    fraction, stream = _effective_fraction(iter(documents), settings.validation_fraction)
    tokenizer, stream = _choose_tokenizer(folder, settings, stream, fraction, progress)
    end, vocab_size = end_of_text_id(tokenizer), num_token_ids(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    with TokenWriter(folder) as writer:
        if writer.num_documents:
            progress.note(f"going on behind {writer.num_documents:,} documents that are tokenized")
        before = islice(stream, writer.num_documents)
        writer.pass_over((d.text, is_validation(d.text, fraction)) for d in before)
        progress.tell(*writer.totals())
        for batch, encoded in _encoded(tokenizer, stream):
            for document, ids in zip(batch, encoded, strict=True):
                is_held_out = is_validation(document.text, fraction)
                data = np.asarray([*ids, end], dtype=dtype).tobytes()
                row = json.dumps({"text": document.text, "source": document.source})
                writer.add(document.text, data, len(ids) + 1, row if is_held_out else None)
            if writer.unsafe_bytes >= SHARD_BYTES:
                writer.make_safe()
            progress.tell(*writer.totals())
        _check_counts(writer.train, writer.validation, fraction)
        checksums = writer.make_safe()
    checksums["tokenizer.json"] = file_digest(folder / "tokenizer.json")
    fingerprint = content_key(writer.corpus_digest, checksums["tokenizer.json"])
    write_json(
        folder / MANIFEST_NAME,
        {
            "format": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "settings": settings.model_dump(mode="json"),
            "dtype": dtype.name,
            "vocab_size": vocab_size,
            "end_of_text_id": end,
            "train": writer.train,
            "validation": writer.validation,
            "sizes": {name: (folder / name).stat().st_size for name in checksums},
            "sha256": checksums,
        },
    )
    writer.forget()
    return fingerprint


def _encoded(
    tokenizer: Tokenizer, documents: Iterator[Document]
) -> Iterator[tuple[Batch, list[list[int]]]]:
    """Yield batches with their tokens, in order; the next ones are encoded meanwhile."""

    def encode(batch: Batch) -> list[Any]:
        texts = [document.text for document in batch]
        encodings: list[Any] = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return encodings

    waiting: deque[tuple[Batch, Future[list[Any]]]] = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as pool:
        while True:
            while len(waiting) <= BATCHES_AHEAD and (
                batch := list(islice(documents, DOCUMENTS_PER_BATCH))
            ):
                waiting.append((batch, pool.submit(encode, batch)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            yield batch, [encoding.ids for encoding in future.result()]


class TokenProgress(Progress):
    """Adds to another progress how much text has become tokens, and how fast.

    Args:
        progress: The one that is shown; who reads the documents tells it what is done.
    """

    def __init__(self, progress: Progress) -> None:
        self._shown = progress
        self._done, self._text, self._rate = 0.0, "", ""
        self._first: tuple[float, int, int] | None = None

    def start(self, title: str, total: float | None = None) -> None:
        self._shown.start(title, total)

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self._done, self._text = done, text
        words = " ".join(filter(None, (text, self._rate)))
        self._shown.advance(done, words, seconds_left=seconds_left)

    def note(self, text: str) -> None:
        self._shown.note(text)

    def tell(self, tokens: int, num_bytes: int) -> None:
        """Say how many tokens and bytes of text are written by now."""
        now = time.monotonic()
        started, tokens_before, bytes_before = self._first or (now, tokens, num_bytes)
        self._first = started, tokens_before, bytes_before
        seconds = max(now - started, 1e-9)
        self._rate = f"{tokens / 1e6:,.1f}M tokens"
        if now > started:
            self._rate += (
                f", {(tokens - tokens_before) / seconds:,.0f} tokens/s, "
                f"{(num_bytes - bytes_before) / seconds / 1e6:,.1f} MB/s"
            )
        self.advance(self._done, self._text)


def _effective_fraction(
    documents: Iterator[Document], fraction: float
) -> tuple[float, Iterator[Document]]:
    """Return the share of validation, raised where a handful of documents would leave it empty."""
    head = list(islice(documents, FEW_DOCUMENTS))
    if 1 < len(head) < FEW_DOCUMENTS:
        smallest = min(hash_fraction(document.text, "split") for document in head)
        fraction = max(fraction, math.nextafter(smallest, 1.0))
    return fraction, chain(head, documents)


def _choose_tokenizer(
    folder: Path,
    settings: DataSettings,
    documents: Iterator[Document],
    fraction: float,
    progress: Progress,
) -> tuple[Tokenizer, Iterator[Document]]:
    """Return the tokenizer, and the documents with those that its training has used up put back in
    front. It is written into the folder, or was by the work that goes on here."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return load_tokenizer(path), documents
    if settings.tokenizer != "train":
        tokenizer = load_tokenizer(settings.tokenizer)
        _save(tokenizer, path)
        return tokenizer, documents
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
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    progress.advance(0, "tokenizing")
    _save(tokenizer, path)
    return tokenizer, chain(read, documents)


def _save(tokenizer: Tokenizer, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    tokenizer.save(str(temporary))
    temporary.replace(path)


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
