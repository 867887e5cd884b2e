"""The shards of a text: each is tokenized into a folder of its own, several at once.

A folder is whole or absent, so an interrupted command continues with the shards that are missing.
It holds the tokens of the shard's training documents in their order, those of the held-out ones,
these also as text, and a record of a few bytes for each document. No more than the documents at
work are in memory.

Shards are written by threads, which use all CPUs of this machine since the tokenizer works outside
of Python's lock; or by whatever else runs functions (`ShardRunner`), such as Ray on all nodes.
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
"""Longest wait for a shard of another node; NFS may answer from its memory for so long."""
SECONDS_BETWEEN_LOOKS = 0.2
RECORD = np.dtype([("hash", "V16"), ("tokens", "<u4"), ("bytes", "<u4"), ("held_out", "?")])
"""What is known of a document."""
# Beside the tokenizer, what a preparation has stored: its plan, and the folder of its shards.
PLAN_NAME = "plan.json"
SHARDS_NAME = "tokenized"
# Files of each shard.
TRAIN = "train.bin"
VALIDATION = "validation.bin"
TEXTS = "held_out.jsonl"
RECORDS = "records.npy"
PROMPTS = "prompts.npy"
"""Of a shard with prompts: the number of tokens that each document begins with as its prompt."""
SUMS = "sha256.json"

T = TypeVar("T")
ReportTokens = Callable[[int, int], None]
"""Takes the tokens and the bytes of text that were tokenized since the last call."""


class Plan(Record):
    """What the shards of one preparation share, with the tokenizer beside it."""

    settings: DataSettings
    shards: list[Any]
    """Parts of the source, see `TextSource.shards`."""
    fraction: float
    """Share of the documents that is held out."""


# What runs the work


class ShardRunner(Protocol):
    """Runs work on shards, several at once."""

    @property
    def num_at_once(self) -> int:
        """How many works run at once."""
        ...

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run work, which can be pickled, somewhere."""
        ...

    def submit_reporting(
        self, work: Callable[[ReportTokens], T], report: ReportTokens
    ) -> Future[T]:
        """Likewise; what the work reports arrives as calls of `report` in this process."""
        ...


OpenRunner = Callable[[], AbstractContextManager[ShardRunner]]
"""Opens a runner for a block, at whose end nothing of it runs any more."""


@contextmanager
def thread_runner(number: int) -> Iterator[ShardRunner]:
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


# One shard


class TokenizedDocument(NamedTuple):
    """A document with its tokens."""

    document: Document
    ids: list[int]
    num_prompt_tokens: int
    """Tokens that it begins with as its prompt; 0 if it has none."""
    num_bytes: int
    """Length of its text in UTF-8."""


class ShardWriter:
    """Tokenizes any shard of a plan; a process has one, which its threads share."""

    def __init__(self, folder: Path, source: TextSource | None = None) -> None:
        """Read the plan in a folder.

        Args:
            folder: Holds plan and tokenizer, and will hold the shards.
            source: The source of the plan, if it is open already.
        """
        plan = Plan.read(folder / PLAN_NAME)
        assert plan is not None, "a shard is written after its plan"
        self.plan = plan
        self.shards = [folder / SHARDS_NAME / f"{number:06}" for number in range(len(plan.shards))]
        """The folder of each shard; it exists when the shard is whole."""
        self._folder = folder
        self._source = source or text_source(plan.settings)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_NAME)

    def __reduce__(self) -> tuple[Callable[[Path], ShardWriter], tuple[Path]]:
        """Let another process open source and tokenizer itself, once for all of its shards."""
        return _writer_of_process, (self._folder,)

    def write(self, number: int, report: ReportTokens) -> None:
        """Tokenize a shard; its folder appears when it is whole."""
        dtype = dtype_of(self._tokenizer)
        documents = read_documents(self._source, self.plan.shards[number])
        documents = islice(documents, self.plan.settings.max_documents)
        records: list[tuple[bytes, int, int, bool]] = []
        prompt_lengths: list[int] = []
        with new_folder(self.shards[number]) as temporary:
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
        """Encode documents together, and yield one after the other: lists of ids take memory."""
        opening = opening_ids(self._tokenizer)
        end = end_of_text_id(self._tokenizer)
        # A prompt is encoded by itself, as the model reads it when it answers.
        prompts = self._encode([document.prompt for document in documents])
        completions = self._encode([document.completion for document in documents])
        for document, prompt, completion in zip(documents, prompts, completions, strict=True):
            start = opening
            num_prompt_tokens = 0
            if document.prompt_characters is not None:
                # A chat template may have written the opening tokens.
                is_open = prompt.ids[: len(opening)] == opening
                start = prompt.ids if is_open else [*opening, *prompt.ids]
                num_prompt_tokens = len(start)
            # The end is ours: some tokenizers put none after a text, some put two.
            ids = [*start, *completion.ids, end]
            num_bytes = len(document.text.encode())
            yield TokenizedDocument(document, ids, num_prompt_tokens, num_bytes)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@lru_cache(maxsize=1)
def _writer_of_process(folder: Path) -> ShardWriter:
    return ShardWriter(folder)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the tokens in a shard's files."""
    return np.dtype(token_dtype(num_token_ids(tokenizer))).newbyteorder("<")


def num_documents(shard: Path) -> int:
    """Return how many documents a whole shard holds."""
    return len(np.load(shard / RECORDS))


# All shards


def tokenize_shards(writer: ShardWriter, progress: Progress, runner: ShardRunner) -> Sequence[Path]:
    """Tokenize the shards that are missing; return the first ones that hold enough documents."""
    missing = _missing_shards(writer.shards, progress)
    progress.start("corpus", len(missing) if len(missing) > 1 else None)
    rates = _Rates(progress)
    queue = _ShardQueue(writer.shards, missing, writer.plan.settings.max_documents)
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
                _wait_until_seen(writer.shards[number])
                queue.note_whole(number)
                rates.end_shard()
        return queue.first_shards
    finally:
        # Threads cannot be stopped; those at work end at their next report.
        rates.is_over = True


class _ShardQueue:
    """The shards that are still to be written, as far as their documents are needed.

    The first documents of the text are kept, so whole shards are counted in their order.
    """

    def __init__(
        self, shards: Sequence[Path], missing: Sequence[int], max_documents: int | None
    ) -> None:
        self._shards = shards
        self._waiting = deque(missing)
        self._unfinished = {*missing}
        self._max_documents = max_documents
        self._num_counted = 0  # The shards before this one are whole and counted.
        self._num_documents = 0  # In these shards.
        self._count()

    def take(self) -> int | None:
        """Return the number of the shard to begin now; None if there is none.

        No shard is begun that is not likely to be needed. The first one is read alone: how many
        documents a shard holds is not known before.
        """
        if not self._waiting:
            return None
        number = self._waiting[0]
        if self._max_documents is not None and number != self._num_counted:
            if self._num_counted == 0:
                return None
            # The whole shards say how many documents stand before this one.
            if number * self._num_documents / self._num_counted >= self._max_documents:
                return None
        return self._waiting.popleft()

    def note_whole(self, number: int) -> None:
        """Note that a shard is written."""
        self._unfinished.remove(number)
        self._count()

    def _count(self) -> None:
        while self._num_counted < len(self._shards) and not self._has_enough:
            if self._num_counted in self._unfinished:
                return
            self._num_documents += num_documents(self._shards[self._num_counted])
            self._num_counted += 1

    @property
    def _has_enough(self) -> bool:
        return self._max_documents is not None and self._num_documents >= self._max_documents

    @property
    def is_over(self) -> bool:
        """Whether the whole shards hold all documents that are kept."""
        return self._has_enough or not self._unfinished

    @property
    def first_shards(self) -> Sequence[Path]:
        """The folders of the first shards, up to the first one that is not whole or not needed."""
        return self._shards[: self._num_counted]


def _wait_until_seen(shard: Path) -> None:
    """Wait for a folder that another node may have made: network file systems show it late."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not shard.is_dir() and time.monotonic() < deadline:
        list(shard.parent.iterdir())  # Asks the server again.
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _missing_shards(shards: Sequence[Path], progress: Progress) -> list[int]:
    missing: list[int] = []
    for number, shard in enumerate(shards):
        if shard.is_dir():
            damage = damaged_file(shard, read_json(shard / SUMS) or {SUMS: ""})
            if damage is None:
                continue
            progress.note(f"{shard} is damaged: {damage}; it is deleted and written again")
            shutil.rmtree(shard)
        missing.append(number)
    if len(missing) < len(shards):
        progress.note(f"resuming after {len(shards) - len(missing):,} of {len(shards):,} shards")
    return missing


class _Rates:
    """Adds the tokens and bytes that threads report to the progress."""

    def __init__(self, progress: Progress) -> None:
        self.is_over = False
        """Whether the threads have to end: at an error of one, or after Ctrl-C."""
        self._progress = progress
        self._started = time.monotonic()
        self._lock = Lock()
        self._tokens = 0
        self._bytes = 0
        self._shards = 0

    def __call__(self, num_tokens: int, num_bytes: int) -> None:
        if self.is_over:
            raise InterruptedError
        with self._lock:
            self._tokens += num_tokens
            self._bytes += num_bytes
            seconds = max(1e-9, time.monotonic() - self._started)
            text = f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"
            self._progress.advance(self._shards, f"{text}, {format_bytes(self._bytes / seconds)}/s")

    def end_shard(self) -> None:
        """Count a shard that is whole."""
        self._shards += 1
        self(0, 0)
