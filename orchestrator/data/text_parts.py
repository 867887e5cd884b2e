"""Tokenize the parts of a text, several at the same time, each into a folder of its own.

A folder is complete or absent, so an interrupted command continues with the missing parts. It holds
the tokens of the part's training documents in their order, the tokens and texts of the held-out
documents, and a record of a few bytes for each document. Only the documents that are being
tokenized are in memory.

A `PartRunner` runs the work: threads, which use all CPUs because the tokenizer releases Python's
global lock, or Ray tasks on all nodes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from orchestrator.data.split import document_hash, is_validation
from orchestrator.data.store import TOKENIZER_NAME, token_dtype
from orchestrator.data.text import Document, TextSource, read_documents, text_source
from orchestrator.models.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    opening_ids,
)
from orchestrator.records.record import Record
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.workspace.files import damaged_file, new_folder, read_json, write_json
from orchestrator.workspace.provenance import file_digest

DOCUMENTS_PER_BATCH = 1024
SEEN_SECONDS = 60.0
"""Longest wait for a part of another node; NFS may answer from its cache for so long."""
SECONDS_BETWEEN_LOOKS = 0.2
RECORD = np.dtype([("hash", "V16"), ("tokens", "<u4"), ("bytes", "<u4"), ("held_out", "?")])
"""Record of a document."""
# What an unfinished preparation has stored besides the tokenizer: its plan and its parts.
PLAN_NAME = "plan.json"
PARTS_NAME = "tokenized"
# Files of each part.
TRAIN = "train.bin"
VALIDATION = "validation.bin"
TEXTS = "held_out.jsonl"
RECORDS = "records.npy"
PROMPTS = "prompts.npy"
"""File of a part with prompts: the number of prompt tokens of each document."""
SUMS = "sha256.json"

T = TypeVar("T")
ReportTokens = Callable[[int, int], None]
"""Gets the tokens and the bytes of text that were tokenized since the last call."""


class Plan(Record):
    """What the parts of one preparation share, except the tokenizer."""

    settings: DataSettings
    parts: list[Any]
    """Parts of the source, see `TextSource.parts`."""
    fraction: float
    """Held-out share of the documents."""


# What runs the work


class PartRunner(Protocol):
    """Runs work on parts, several at the same time."""

    @property
    def num_at_once(self) -> int:
        """How many works run at the same time."""
        ...

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Start work, which can be pickled."""
        ...

    def submit_reporting(
        self, work: Callable[[ReportTokens], T], report: ReportTokens
    ) -> Future[T]:
        """Start work that reports; `report` is called in this process."""
        ...


OpenRunner = Callable[[], AbstractContextManager[PartRunner]]
"""Opens a runner until the end of a block, when all of its work has ended."""


@contextmanager
def thread_runner(number: int) -> Iterator[PartRunner]:
    """Open the runner of this process, with this many threads."""
    pool = ThreadPoolExecutor(number)
    try:
        yield _Threads(number, pool)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Threads:
    num_at_once: int
    pool: ThreadPoolExecutor

    def submit(self, work: Callable[[], T]) -> Future[T]:
        return self.pool.submit(work)

    def submit_reporting(
        self, work: Callable[[ReportTokens], T], report: ReportTokens
    ) -> Future[T]:
        return self.pool.submit(work, report)


# One part


class TokenizedDocument(NamedTuple):
    """A document with its tokens."""

    document: Document
    ids: list[int]
    num_prompt_tokens: int
    """Tokens of the prompt at its beginning; 0 without a prompt."""
    num_bytes: int
    """Length of its text in UTF-8."""


class PartWriter:
    """Tokenizes any part of a plan; the threads of a process share one."""

    def __init__(self, folder: Path, source: TextSource | None = None) -> None:
        """Read the plan in a folder.

        Args:
            folder: Holds plan and tokenizer, and will hold the parts.
            source: The data source of the plan, if it is already open.
        """
        plan = Plan.read(folder / PLAN_NAME)
        assert plan is not None, "a part is written after its plan"
        self.plan = plan
        self.parts = [folder / PARTS_NAME / f"{number:06}" for number in range(len(plan.parts))]
        """The folder of each part; it exists when the part is complete."""
        self._folder = folder
        self._source = source or text_source(plan.settings)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_NAME)

    def __reduce__(self) -> tuple[Callable[[Path], PartWriter], tuple[Path]]:
        """Make another process open data source and tokenizer itself, once for all of its parts."""
        return _writer_of_process, (self._folder,)

    def write(self, number: int, report: ReportTokens) -> None:
        """Tokenize a part; its folder gets its name when it is complete."""
        dtype = dtype_of(self._tokenizer)
        documents = read_documents(self._source, self.plan.parts[number])
        documents = islice(documents, self.plan.settings.max_documents)
        records: list[tuple[bytes, int, int, bool]] = []
        prompt_lengths: list[int] = []
        with new_folder(self.parts[number]) as temporary:
            with (
                (temporary / TRAIN).open("wb") as train_tokens,
                (temporary / VALIDATION).open("wb") as validation_tokens,
                (temporary / TEXTS).open("w", encoding="utf-8") as texts,
            ):
                while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
                    num_tokens_of_batch = 0
                    num_bytes_of_batch = 0
                    for document, ids, num_prompt_tokens, num_bytes in self._tokenize(batch):
                        is_held_out = is_validation(document.deciding_text, self.plan.fraction)
                        file = validation_tokens if is_held_out else train_tokens
                        file.write(np.array(ids, dtype).tobytes())
                        if is_held_out:
                            row = {"text": document.text, "source": document.source}
                            texts.write(json.dumps(row) + "\n")
                        records.append((document_hash(document), len(ids), num_bytes, is_held_out))
                        prompt_lengths.append(num_prompt_tokens)
                        num_tokens_of_batch += len(ids)
                        num_bytes_of_batch += num_bytes
                    report(num_tokens_of_batch, num_bytes_of_batch)
            np.save(temporary / RECORDS, np.array(records, RECORD))
            names = [TRAIN, VALIDATION, TEXTS, RECORDS]
            if any(prompt_lengths):
                np.save(temporary / PROMPTS, np.array(prompt_lengths, "<u4"))
                names.append(PROMPTS)
            sums = {name: file_digest(temporary / name) for name in names}
            write_json(temporary / SUMS, sums)

    def _tokenize(self, documents: list[Document]) -> Iterator[TokenizedDocument]:
        """Encode documents together, but yield them one by one, because lists of ids take
        memory."""
        opening = opening_ids(self._tokenizer)
        end = end_of_text_id(self._tokenizer)
        # A prompt is encoded by itself, as in generation.
        prompts = self._encode([document.prompt for document in documents])
        completions = self._encode([document.completion for document in documents])
        for document, prompt, completion in zip(documents, prompts, completions, strict=True):
            start = opening
            num_prompt_tokens = 0
            if document.prompt_characters is not None:
                # A chat template may already contain the opening tokens.
                is_open = prompt.ids[: len(opening)] == opening
                start = prompt.ids if is_open else [*opening, *prompt.ids]
                num_prompt_tokens = len(start)
            # The end-of-text token is added here: some tokenizers add none, some two.
            ids = [*start, *completion.ids, end]
            num_bytes = len(document.text.encode())
            yield TokenizedDocument(document, ids, num_prompt_tokens, num_bytes)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@lru_cache(maxsize=1)
def _writer_of_process(folder: Path) -> PartWriter:
    return PartWriter(folder)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the tokens in a part's files."""
    return np.dtype(token_dtype(num_token_ids(tokenizer))).newbyteorder("<")


def num_documents(part: Path) -> int:
    """Return the number of documents of a tokenized part."""
    return len(np.load(part / RECORDS))


# All parts


def tokenize_parts(writer: PartWriter, progress: Progress, runner: PartRunner) -> Sequence[Path]:
    """Tokenize the missing parts; return the first parts that together hold enough documents."""
    missing = _missing_parts(writer.parts, progress)
    progress.start("corpus", len(missing) if len(missing) > 1 else None)
    rates = _Rates(progress)
    queue = _PartQueue(writer.parts, missing, writer.plan.settings.max_documents)
    at_work: dict[Future[None], int] = {}
    try:
        while not queue.is_over:
            while len(at_work) < runner.num_at_once and (number := queue.take()) is not None:
                writing = runner.submit_reporting(partial(writer.write, number), rates)
                at_work[writing] = number
            ended, _ = wait(at_work, return_when=FIRST_COMPLETED)
            for future in ended:
                number = at_work.pop(future)
                future.result()
                _wait_until_seen(writer.parts[number])
                queue.note_whole(number)
                rates.end_part()
        return queue.first_parts
    finally:
        # Threads cannot be stopped; running ones end at their next report.
        rates.is_over = True


class _PartQueue:
    """The missing parts whose documents are needed.

    With `data.max_documents`, the first documents of the text are kept, so finished parts are
    counted in their order.
    """

    def __init__(
        self, parts: Sequence[Path], missing: Sequence[int], max_documents: int | None
    ) -> None:
        self._parts = parts
        self._waiting = deque(missing)
        self._unfinished = {*missing}
        self._max_documents = max_documents
        self._num_counted = 0  # The number of first parts that are finished and counted.
        self._num_documents = 0  # Documents of these parts.
        self._count()

    def take(self) -> int | None:
        """Return the number of the part to start now; None if there is none.

        Only parts that are likely to be needed are started. The first one is read alone, as before
        that nobody knows how many documents a part holds.
        """
        if not self._waiting:
            return None
        number = self._waiting[0]
        if self._max_documents is not None and number != self._num_counted:
            if self._num_counted == 0:
                return None
            # Finished parts tell how many documents this one is likely to follow.
            if number * self._num_documents / self._num_counted >= self._max_documents:
                return None
        return self._waiting.popleft()

    def note_whole(self, number: int) -> None:
        """Note that a part is finished."""
        self._unfinished.remove(number)
        self._count()

    def _count(self) -> None:
        while self._num_counted < len(self._parts) and not self._has_enough:
            if self._num_counted in self._unfinished:
                return
            self._num_documents += num_documents(self._parts[self._num_counted])
            self._num_counted += 1

    @property
    def _has_enough(self) -> bool:
        return self._max_documents is not None and self._num_documents >= self._max_documents

    @property
    def is_over(self) -> bool:
        """Whether the finished parts hold all documents that are needed."""
        return self._has_enough or not self._unfinished

    @property
    def first_parts(self) -> Sequence[Path]:
        """The folders of the first parts, up to the first that is unfinished or not needed."""
        return self._parts[: self._num_counted]


def _wait_until_seen(part: Path) -> None:
    """Wait for a folder of another node, which network file systems may show late."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not part.is_dir() and time.monotonic() < deadline:
        list(part.parent.iterdir())  # Makes the client ask the server again.
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _missing_parts(parts: Sequence[Path], progress: Progress) -> list[int]:
    missing: list[int] = []
    for number, part in enumerate(parts):
        if part.is_dir():
            damage = damaged_file(part, read_json(part / SUMS) or {SUMS: ""})
            if damage is None:
                continue
            progress.note(f"{part} is damaged: {damage}; it is deleted and written again")
            shutil.rmtree(part)
        missing.append(number)
    if len(missing) < len(parts):
        progress.note(f"resuming after {len(parts) - len(missing):,} of {len(parts):,} parts")
    return missing


class _Rates:
    """Shows the tokens and bytes that threads report as progress."""

    def __init__(self, progress: Progress) -> None:
        self.is_over = False
        """Whether the threads must end: after an error of one of them, or Ctrl-C."""
        self._progress = progress
        self._started = time.monotonic()
        self._lock = Lock()
        self._tokens = 0
        self._bytes = 0
        self._parts = 0

    def __call__(self, num_tokens: int, num_bytes: int) -> None:
        if self.is_over:
            raise InterruptedError
        with self._lock:
            self._tokens += num_tokens
            self._bytes += num_bytes
            seconds = max(1e-9, time.monotonic() - self._started)
            text = f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"
            self._progress.advance(self._parts, f"{text}, {format_bytes(self._bytes / seconds)}/s")

    def end_part(self) -> None:
        """Count a finished part."""
        self._parts += 1
        self(0, 0)
