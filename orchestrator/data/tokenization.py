"""Tokenize documents into a token folder: in one pass, on all cores, resumable.

Threads encode the next batches of documents while this one hashes and writes the previous ones.
A later call with the same `resume_key` reads the committed documents again, because their hash is
part of the fingerprint, but does not tokenize them again. The result is byte-identical.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from orchestrator.data.corpus import Document, hash_fraction, is_validation
from orchestrator.data.store import (
    SplitCounts,
    finish_folder,
    is_complete,
    verify_data,
)
from orchestrator.data.token_writer import RECORD_NAME, StaleTokens, TokenWriter
from orchestrator.models.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    train_tokenizer,
)
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import new_file, replace_folder
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.provenance import content_key, file_digest

TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on at most this much text; more changes its pairs little."""
DOCUMENTS_PER_BATCH = 1024
BATCHES_AHEAD = 2
COMMIT_BYTES = 32 << 20
"""Commit after this much text."""
FEW_DOCUMENTS = 100
"""In a corpus smaller than this, at least one document is held out whatever its hash."""

DocumentBatch = list[Document]


def write_tokens(
    parent: Path,
    documents: Iterable[Document],
    settings: DataSettings,
    *,
    resume_key: str,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> Path:
    """Tokenize documents into `parent`/<fingerprint>; keep a folder that has the same content.

    Args:
        resume_key: Identifies documents and tokenizer, so that a later call can resume this one.
        tokenizer: Used instead of the one that the settings name.

    Raises:
        UserError: If there is no text, or too little to hold some out.
    """
    parent.mkdir(parents=True, exist_ok=True)
    temporary = parent / f"{TEMPORARY_PREFIX}{resume_key}"
    temporary.mkdir(exist_ok=True)
    if not isinstance(progress, TokenProgress):
        progress = TokenProgress(progress or Progress())
    try:
        if tokenizer is not None:
            _save(tokenizer, temporary / "tokenizer.json")
        fingerprint = _write_folder(temporary, documents, settings, progress)
        final = parent / fingerprint
        if not is_complete(final):
            replace_folder(temporary, final)
            verify_data(final, remember=True)
    except BaseException as error:
        # Other user errors keep the commits: an unreachable network, for example, is one.
        if isinstance(error, StaleTokens) or not can_resume(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    return final


def can_resume(folder: Path) -> bool:
    """Return whether a temporary folder holds work that a later call can resume."""
    return (folder / RECORD_NAME).is_file()


def _write_folder(
    folder: Path, documents: Iterable[Document], settings: DataSettings, progress: TokenProgress
) -> str:
    fraction, stream = _validation_fraction(iter(documents), settings.validation_fraction)
    tokenizer, stream = _choose_tokenizer(folder, settings, stream, fraction, progress)
    end, vocab_size = end_of_text_id(tokenizer), num_token_ids(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    with closing(TokenWriter(folder)) as writer:
        if writer.num_documents:
            progress.note(f"resuming after {writer.num_documents:,} tokenized documents")
        written = islice(stream, writer.num_documents)
        writer.skip((d.text, is_validation(d.text, fraction)) for d in written)
        progress.update(*writer.totals())
        for batch, encoded in encode_batches(tokenizer, stream):
            for document, ids in zip(batch, encoded, strict=True):
                is_held_out = is_validation(document.text, fraction)
                data = np.asarray([*ids, end], dtype=dtype).tobytes()
                row = json.dumps({"text": document.text, "source": document.source})
                writer.add(document.text, data, len(ids) + 1, row if is_held_out else None)
            if writer.uncommitted_bytes >= COMMIT_BYTES:
                writer.commit()
            progress.update(*writer.totals())
        _check_counts(writer.train, writer.validation, fraction)
        writer.commit()
        fingerprint = content_key(writer.corpus_digest, file_digest(folder / "tokenizer.json"))
        writer.delete_record()
    finish_folder(
        folder,
        fingerprint,
        settings.read_by_source(),
        tokenizer,
        train=writer.train,
        validation=writer.validation,
    )
    return fingerprint


def encode_batches(
    tokenizer: Tokenizer, documents: Iterator[Document]
) -> Iterator[tuple[DocumentBatch, list[list[int]]]]:
    """Yield batches of documents with their token ids, in order; encode the next ones ahead."""

    def encode(batch: DocumentBatch) -> list[Any]:
        texts = [document.text for document in batch]
        encodings: list[Any] = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return encodings

    waiting: deque[tuple[DocumentBatch, Future[list[Any]]]] = deque()
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
    """Adds the number of tokens and their rate to the progress that the corpus reader reports."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done, self._text, self._rate = 0.0, "", ""
        self._first: tuple[float, int, int] | None = None

    def start(self, title: str, total: float | None = None) -> None:
        self._progress.start(title, total)

    def advance(self, done: float, text: str = "", *, seconds_left: float | None = None) -> None:
        self._done, self._text = done, text
        words = " ".join(filter(None, (text, self._rate)))
        self._progress.advance(done, words, seconds_left=seconds_left)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def update(self, num_tokens: int, num_bytes: int) -> None:
        """Report the tokens and the bytes of text written so far."""
        now = time.monotonic()
        self._first = self._first or (now, num_tokens, num_bytes)
        started, tokens_before, bytes_before = self._first
        self._rate = f"{num_tokens:,} tokens"
        if seconds := now - started:
            self._rate += (
                f", {(num_tokens - tokens_before) / seconds:,.0f} tokens/s, "
                f"{format_bytes((num_bytes - bytes_before) / seconds)}/s"
            )
        self.advance(self._done, self._text)


def _validation_fraction(
    documents: Iterator[Document], fraction: float
) -> tuple[float, Iterator[Document]]:
    # A small corpus with no document below the fraction gets a larger one.
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
    # The returned documents include those that the training of the tokenizer has read.
    path = folder / "tokenizer.json"
    if path.is_file():  # saved before an interruption, or given
        return load_tokenizer(path), documents
    if settings.tokenizer != "train":
        tokenizer = load_tokenizer(settings.tokenizer)
        _save(tokenizer, path)
        return tokenizer, documents
    read = list(_first_characters(documents, TOKENIZER_CHARACTERS))
    if not read:
        raise _empty_corpus()
    progress.advance(0, "training the tokenizer")
    texts = (d.text for d in read if not is_validation(d.text, fraction))
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    progress.advance(0, "tokenizing")
    _save(tokenizer, path)
    return tokenizer, chain(read, documents)


def training_texts(
    documents: Iterable[Document], settings: DataSettings, *, num_characters: int
) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on: the first ones that are not held out."""
    fraction, stream = _validation_fraction(iter(documents), settings.validation_fraction)
    for document in _first_characters(stream, num_characters):
        if not is_validation(document.text, fraction):
            yield document.text


def _first_characters(documents: Iterator[Document], num_characters: int) -> Iterator[Document]:
    num_read = 0
    for document in documents:
        yield document
        num_read += len(document.text)
        if num_read >= num_characters:
            return


def _save(tokenizer: Tokenizer, path: Path) -> None:
    with new_file(path) as temporary:
        tokenizer.save(str(temporary))


def _empty_corpus() -> UserError:
    return UserError(
        "the corpus is empty: no document with text was found; check data.source and data.files"
    )


def _check_counts(train: SplitCounts, validation: SplitCounts, fraction: float) -> None:
    num_documents = train.documents + validation.documents
    if num_documents == 0:
        raise _empty_corpus()
    if num_documents == 1:
        raise UserError(
            f"the corpus is a single document of {train.tokens + validation.tokens} tokens, too "
            "little to train on one part and to hold out another; give more text"
        )
    for name, counts in (("training", train), ("validation", validation)):
        if counts.documents == 0:
            raise UserError(
                f"none of the {num_documents} documents falls to {name} with "
                f"data.validation_fraction={fraction:g}; choose another fraction or give more text"
            )
