"""Tokenize a text source into a token folder: shard by shard, several at once.

Each shard becomes a folder of its own, whole or absent, so an interrupted command continues with
the shards that are missing. It holds the tokens of its training documents in their order, those of
the held-out ones, these also as text, and a record of a few bytes for each document. Training reads
the shards' files one after the other: they get a second name in the final folder. The few held-out
documents are appended to one file. So neither the number of shards nor how many are at work at once
changes the order of a token, and no more than the documents at work are in memory.

Shards are written by threads, which use all CPUs of this machine since the tokenizer works outside
of Python's lock; or by whatever else runs functions (`ShardRunner`), such as Ray on all nodes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import heappop, heappush
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from orchestrator.data.store import (
    TEXTS_NAME,
    VALIDATION_NAME,
    VALIDATION_TARGETS_NAME,
    SplitCounts,
    finish_folder,
    is_complete,
    targets_name,
    token_dtype,
    train_name,
)
from orchestrator.data.text import Document, TextSource, read_documents, text_source
from orchestrator.models.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    num_token_ids,
    opening_ids,
    train_tokenizer,
)
from orchestrator.records.record import Record
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_bytes
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damaged_file, new_file, new_folder, read_json, write_json
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.processors import num_cpus
from orchestrator.workspace.provenance import content_key, file_digest

TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on about this much text; more changes its pairs little."""
MAX_SHARDS_SAMPLED = 100
"""Shards that are read for a tokenizer: six gigabytes of files."""
DOCUMENTS_PER_REPORT = 10_000
DOCUMENTS_PER_BATCH = 1024
FEW_DOCUMENTS = 100
"""In a corpus smaller than this, at least one document is held out whatever its hash."""
SEEN_SECONDS = 60.0
"""Longest wait for a shard of another node; NFS may answer from its memory for so long."""
SECONDS_BETWEEN_LOOKS = 0.2
RECORD = np.dtype([("hash", "V16"), ("tokens", "<u4"), ("bytes", "<u4"), ("held_out", "?")])
"""What is known of a document."""
# Files of a preparation, and the folder of its shards.
_PLAN = "plan.json"
_TOKENIZER = "tokenizer.json"
_SHARDS = "tokenized"
# Files of each shard.
_TRAIN = "train.bin"
_VALIDATION = "validation.bin"
_TEXTS = "held_out.jsonl"
_RECORDS = "records.npy"
_PROMPTS = "prompts.npy"
"""Of a shard with prompts: the number of tokens that each document begins with as its prompt."""
_SUMS = "sha256.json"

T = TypeVar("T")
Report = Callable[[int, int], None]
"""Takes the tokens and the bytes of text that were tokenized since the last call."""


class ShardRunner(Protocol):
    """Runs work on shards, several at once."""

    @property
    def num_at_once(self) -> int:
        """How many works run at once."""
        ...

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run work, which can be pickled, somewhere."""
        ...

    def submit_reporting(self, work: Callable[[Report], T], report: Report) -> Future[T]:
        """Likewise; what the work reports arrives as calls of `report` in this process."""
        ...


OpenRunner = Callable[[], AbstractContextManager[ShardRunner]]
"""Opens a runner for a block, at whose end nothing of it runs any more."""


class Plan(Record):
    """What the shards of one preparation share, with the tokenizer beside it."""

    settings: DataSettings
    shards: list[Any]
    """Parts of the source, see `TextSource.shards`."""
    fraction: float
    """Share of the documents that is held out."""


def write_text(
    settings: DataSettings,
    parent: Path,
    key: str,
    progress: Progress,
    tokenizer: Tokenizer | None = None,
    *,
    open_runner: OpenRunner | None = None,
) -> Path:
    """Tokenize a text source into `parent`/<fingerprint>; keep a folder that has the same content.

    Args:
        settings: The settings of one text source.
        parent: Folder of all prepared data; also holds the temporary files.
        key: Identifies documents and tokenizer, so that a later call can resume this one.
        progress: Shows shards, tokens and rates.
        tokenizer: Used instead of the one that the settings name.
        open_runner: Where shards are tokenized if there are several; in as many threads as there
            are CPUs when unset.

    Raises:
        UserError: If the source cannot be read, or there is too little text to hold some out.
    """
    folder = parent / f"{TEMPORARY_PREFIX}{key}"
    folder.mkdir(parents=True, exist_ok=True)
    # One source for all shards: opening a data set of thousands of files takes seconds.
    source = text_source(settings)
    try:
        plan = _make_plan(folder, settings, source, tokenizer, progress)
        writer = ShardWriter(folder, source)
        if open_runner is None or len(writer.shards) == 1:
            open_runner = partial(thread_runner, num_cpus())
        with open_runner() as runner:
            shards = _tokenize_shards(writer, progress, runner)
            final = _join(folder, shards, plan, parent, runner)
    except BaseException:  # Also Ctrl-C, after which whole shards stay.
        if not can_resume(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return final


def can_resume(folder: Path) -> bool:
    """Return whether a temporary folder holds work that a later call can resume."""
    return any(folder.glob(f"{_SHARDS}/[0-9]*"))


def _make_plan(
    folder: Path,
    settings: DataSettings,
    source: TextSource,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> Plan:
    # The plan of an interrupted call: its shards were tokenized with the tokenizer beside it.
    if stored := Plan.read(folder / _PLAN):
        return stored
    progress.start("corpus")
    progress.advance(0, "reading")
    shards = list(source.shards())
    fraction = held_out_fraction(settings, source)
    if tokenizer is None and settings.tokenizer == "train":
        texts = sample_texts(settings, source, TOKENIZER_CHARACTERS, progress)
        progress.advance(0, "training the tokenizer")
        tokenizer = train_tokenizer(texts, settings.vocab_size)
    with new_file(folder / _TOKENIZER) as temporary:
        (tokenizer or load_tokenizer(settings.tokenizer)).save(str(temporary))
    plan = Plan(settings=settings, shards=shards, fraction=fraction)
    plan.write(folder / _PLAN)
    return plan


def held_out_fraction(settings: DataSettings, source: TextSource) -> float:
    """Return the share of the documents that is held out: `data.validation_fraction`, or more where
    a small corpus has no document below it.

    Raises:
        UserError: If the source cannot be read, or is empty.
    """
    max_documents = min(FEW_DOCUMENTS, settings.max_documents or FEW_DOCUMENTS)
    documents = chain.from_iterable(read_documents(source, shard) for shard in source.shards())
    places = [
        _place_in_split(document.deciding_text) for document in islice(documents, max_documents)
    ]
    if not places:
        raise UserError(
            "the corpus is empty: no document with text was found; check data.source and data.files"
        )
    if 1 < len(places) < FEW_DOCUMENTS:
        # The next larger number: a document is held out if its place is below the fraction.
        return max(settings.validation_fraction, math.nextafter(min(places), 1.0))
    return settings.validation_fraction


def sample_texts(
    settings: DataSettings, source: TextSource, num_characters: int, progress: Progress
) -> list[str]:
    """Return texts for training a tokenizer, of documents that are not held out, in their order.

    Those with the smallest hashes, as a corpus may be sorted, by language for example. Of many
    shards some are read, which hashes of their numbers choose.

    Args:
        num_characters: As many documents as hold so much text, or all.

    Raises:
        UserError: If the source cannot be read, or is empty.
    """
    fraction = held_out_fraction(settings, source)
    shards = source.shards()
    numbers: Sequence[int] = range(len(shards))
    if settings.max_documents is None:  # Otherwise the first documents are the corpus.
        by_hash = sorted(numbers, key=lambda number: hashlib.blake2b(b"%d" % number).digest())
        numbers = sorted(by_hash[:MAX_SHARDS_SAMPLED])
    documents = chain.from_iterable(read_documents(source, shards[number]) for number in numbers)
    sample: list[tuple[int, int, str]] = []  # A heap, whose first document has the largest hash.
    sample_characters = 0
    for place, document in enumerate(islice(documents, settings.max_documents)):
        if place % DOCUMENTS_PER_REPORT == 0:
            progress.advance(0, f"reading for the tokenizer: {place:,} documents")
        if is_validation(document.deciding_text, fraction):
            continue
        heappush(sample, (-int.from_bytes(_hash(document), "big"), place, document.text))
        sample_characters += len(document.text)
        while sample_characters - len(sample[0][2]) >= num_characters:
            _, _, text = heappop(sample)
            sample_characters -= len(text)
    return [text for _, _, text in sorted(sample, key=itemgetter(1))]


def _hash(document: Document) -> bytes:
    content = document.text.encode()
    if document.prompt_characters is not None:
        # The same text with another prompt teaches something else. Text holds no NUL.
        content += f"\0{document.prompt_characters}".encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out: its own text decides, no other document."""
    return _place_in_split(text) < fraction


def _place_in_split(text: str) -> float:
    """Return a hash of a text in [0, 1)."""
    data = text.encode("utf-8", "replace")
    # `person` makes it another hash than that of the content.
    digest = hashlib.blake2b(data, digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") / 2**64


# Shards


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

    def submit_reporting(self, work: Callable[[Report], T], report: Report) -> Future[T]:
        return self.pool.submit(work, report)


class ShardWriter:
    """Tokenizes any shard of a plan; a process has one, which its threads share."""

    def __init__(self, folder: Path, source: TextSource | None = None) -> None:
        """Read the plan in a folder.

        Args:
            folder: Holds plan and tokenizer, and will hold the shards.
            source: The source of the plan, if it is open already.
        """
        plan = Plan.read(folder / _PLAN)
        assert plan is not None, "a shard is written after its plan"
        self.plan = plan
        self.shards = [folder / _SHARDS / f"{number:06}" for number in range(len(plan.shards))]
        """The folder of each shard; it exists when the shard is whole."""
        self._folder = folder
        self._source = source or text_source(plan.settings)
        self._tokenizer = load_tokenizer(folder / _TOKENIZER)

    def __reduce__(self) -> tuple[Callable[[Path], ShardWriter], tuple[Path]]:
        """Let another process open source and tokenizer itself, once for all of its shards."""
        return _writer_of_process, (self._folder,)

    def write(self, number: int, report: Report) -> None:
        """Tokenize a shard; its folder appears when it is whole."""
        opening = opening_ids(self._tokenizer)
        end = end_of_text_id(self._tokenizer)
        dtype = _dtype_of(self._tokenizer)
        documents = read_documents(self._source, self.plan.shards[number])
        documents = islice(documents, self.plan.settings.max_documents)
        records: list[tuple[bytes, int, int, bool]] = []
        prompt_lengths: list[int] = []
        with new_folder(self.shards[number]) as temporary:
            with (
                (temporary / _TRAIN).open("wb") as train_tokens,
                (temporary / _VALIDATION).open("wb") as validation_tokens,
                (temporary / _TEXTS).open("w", encoding="utf-8") as texts,
            ):
                while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
                    # A prompt is encoded by itself, as the model reads it when it answers.
                    prompts = self._encode([document.prompt for document in batch])
                    completions = self._encode([document.completion for document in batch])
                    num_tokens = 0
                    num_bytes = 0
                    for document, prompt, completion in zip(
                        batch, prompts, completions, strict=True
                    ):
                        is_pair = document.prompt_characters is not None
                        start = opening
                        if is_pair:
                            # A chat template may have written the opening tokens.
                            is_open = prompt.ids[: len(opening)] == opening
                            start = prompt.ids if is_open else [*opening, *prompt.ids]
                        # The end is ours: some tokenizers put none after a text, some put two.
                        ids = [*start, *completion.ids, end]
                        prompt_lengths.append(len(start) if is_pair else 0)
                        is_held_out = is_validation(document.deciding_text, self.plan.fraction)
                        file = validation_tokens if is_held_out else train_tokens
                        file.write(np.array(ids, dtype).tobytes())
                        if is_held_out:
                            row = {"text": document.text, "source": document.source}
                            texts.write(json.dumps(row) + "\n")
                        size = len(document.text.encode())
                        records.append((_hash(document), len(ids), size, is_held_out))
                        num_tokens += len(ids)
                        num_bytes += size
                    report(num_tokens, num_bytes)
            np.save(temporary / _RECORDS, np.array(records, RECORD))
            names = [_TRAIN, _VALIDATION, _TEXTS, _RECORDS]
            if any(prompt_lengths):
                np.save(temporary / _PROMPTS, np.array(prompt_lengths, "<u4"))
                names.append(_PROMPTS)
            sums = {name: file_digest(temporary / name) for name in names}
            write_json(temporary / _SUMS, sums)

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@lru_cache(maxsize=1)
def _writer_of_process(folder: Path) -> ShardWriter:
    return ShardWriter(folder)


def _dtype_of(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(token_dtype(num_token_ids(tokenizer))).newbyteorder("<")


def _tokenize_shards(writer: ShardWriter, progress: Progress, runner: ShardRunner) -> list[Path]:
    """Tokenize the shards that are missing; return the first ones that hold enough documents."""
    missing = _missing_shards(writer.shards, progress)
    progress.start("corpus", len(missing) if len(missing) > 1 else None)
    rates = _Rates(progress)
    max_documents = writer.plan.settings.max_documents
    waiting = deque(missing)
    at_work: dict[Future[None], int] = {}
    num_counted = 0  # The shards before this one are whole and counted.
    num_documents = 0  # In these shards.
    try:
        while True:
            unfinished = {*waiting, *at_work.values()}
            # Shards are counted in their order: the first documents are kept.
            while num_counted < len(writer.shards) and num_counted not in unfinished:
                num_documents += _num_documents(writer.shards[num_counted])
                num_counted += 1
                if max_documents is not None and num_documents >= max_documents:
                    return writer.shards[:num_counted]
            if not unfinished:
                return writer.shards
            while waiting and len(at_work) < runner.num_at_once:
                if max_documents is not None and waiting[0] != num_counted:
                    # No shard is begun that is not likely to be needed. The first one is read
                    # alone: how many documents a shard holds is not known before.
                    if num_counted == 0:
                        break
                    if waiting[0] * num_documents / num_counted >= max_documents:
                        break
                number = waiting.popleft()
                writing = runner.submit_reporting(partial(writer.write, number), rates)
                at_work[writing] = number
            ended, _ = wait(at_work, return_when=FIRST_COMPLETED)
            for future in ended:
                number = at_work.pop(future)
                future.result()
                _wait_until_seen(writer.shards[number])
                rates.end_shard()
    finally:
        # Threads cannot be stopped; those at work end at their next report.
        rates.is_over = True


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
            damage = damaged_file(shard, read_json(shard / _SUMS) or {_SUMS: ""})
            if damage is None:
                continue
            progress.note(f"{shard} is damaged: {damage}; it is deleted and written again")
            shutil.rmtree(shard)
        missing.append(number)
    if len(missing) < len(shards):
        progress.note(f"resuming after {len(shards) - len(missing):,} of {len(shards):,} shards")
    return missing


def _num_documents(shard: Path) -> int:
    return len(np.load(shard / _RECORDS))


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


# Join


@dataclass(frozen=True)
class ShardDocuments:
    """The documents of a shard that are kept: all, or the first ones."""

    folder: Path
    num_kept: int

    def records(self) -> np.ndarray:
        """Read what is known of the documents, as values of `RECORD`."""
        records: np.ndarray = np.load(self.folder / _RECORDS)
        return records[: self.num_kept]

    def prompt_lengths(self) -> np.ndarray:
        """Read the number of tokens that a document begins with that are no targets."""
        if (self.folder / _PROMPTS).exists():
            lengths: np.ndarray = np.load(self.folder / _PROMPTS)
            return lengths[: self.num_kept]
        return np.zeros(self.num_kept, "<u4")


def _first_documents(folders: Sequence[Path], max_documents: int | None) -> list[ShardDocuments]:
    """Choose the first documents of all shards; only the last shard may lose some."""
    shards: list[ShardDocuments] = []
    remaining = math.inf if max_documents is None else max_documents
    for folder in folders:
        num_kept = int(min(_num_documents(folder), remaining))
        shards.append(ShardDocuments(folder, num_kept))
        remaining -= num_kept
    return shards


def _join(
    folder: Path, shard_folders: Sequence[Path], plan: Plan, parent: Path, runner: ShardRunner
) -> Path:
    """Make the folder of all documents that are kept, named by the content, and return it."""
    shards = _first_documents(shard_folders, plan.settings.max_documents)
    has_prompts = any(shard.prompt_lengths().any() for shard in shards)

    # What is kept: its size on each side, and a hash of it.
    train = SplitCounts()
    validation = SplitCounts()
    shards_to_train_on: list[ShardDocuments] = []
    content = hashlib.sha256()
    for shard in shards:
        records = shard.records()
        content.update(records.tobytes())
        is_held_out = records["held_out"]
        train += _counts(records[~is_held_out])
        validation += _counts(records[is_held_out])
        if not is_held_out.all():
            shards_to_train_on.append(shard)
    if has_prompts:
        for shard in shards:
            content.update(shard.prompt_lengths().tobytes())
    num_documents = train.documents + validation.documents
    if num_documents == 1:
        raise UserError(
            f"the corpus is a single document of {train.tokens + validation.tokens} tokens, too "
            "little to train on one part and to hold out another; give more text, or cut a "
            "long document by --set data.passage_characters=4000"
        )
    if not (train.documents and validation.documents):
        name = "validation" if train.documents else "training"
        raise UserError(
            f"none of the {num_documents} documents falls to {name} with "
            f"data.validation_fraction={plan.fraction:g}; choose another fraction or give more text"
        )

    fingerprint = content_key(content.hexdigest(), file_digest(folder / _TOKENIZER))
    final = parent / fingerprint
    if is_complete(final):
        return final
    tokenizer = load_tokenizer(folder / _TOKENIZER)
    dtype = _dtype_of(tokenizer)
    num_files = len(shards_to_train_on)
    names = [train_name(number, num_files) for number in range(num_files)]
    with new_folder(final) as temporary:
        works = (
            partial(_write_training_tokens, shard, temporary / name, dtype, has_prompts=has_prompts)
            for shard, name in zip(shards_to_train_on, names, strict=True)
        )
        checksums: dict[str, str] = {}
        for checksums_of_shard in _results(runner, works):
            checksums |= checksums_of_shard
        with (
            (temporary / VALIDATION_NAME).open("wb") as validation_file,
            (temporary / TEXTS_NAME).open("wb") as texts,
        ):
            for shard in shards:
                num_held_out = int(shard.records()["held_out"].sum())
                with (shard.folder / _TEXTS).open("rb") as rows:
                    texts.writelines(islice(rows, num_held_out))
                with (shard.folder / _VALIDATION).open("rb") as tokens:
                    shutil.copyfileobj(tokens, validation_file)
            # Of the last shard, only the first documents may be kept.
            validation_file.truncate(validation.tokens * dtype.itemsize)
        if has_prompts:
            with (temporary / VALIDATION_TARGETS_NAME).open("wb") as targets:
                for shard in shards:
                    targets.write(_targets_of(shard, shard.records()["held_out"]))
        finish_folder(
            temporary,
            fingerprint,
            plan.settings.read_by_source(),
            tokenizer,
            train=train,
            validation=validation,
            train_files=names,
            known_checksums=checksums,
        )
    return final


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
    stored = shard.folder / _TRAIN
    num_bytes = int(records["tokens"][is_training].sum(dtype=np.int64)) * dtype.itemsize
    file.unlink(missing_ok=True)  # Of a task whose worker was lost, and which is done again.
    if num_bytes == stored.stat().st_size:
        try:
            file.hardlink_to(stored)
        except OSError:  # Some file systems have no second names.
            shutil.copyfile(stored, file)
        checksums = {file.name: (read_json(shard.folder / _SUMS) or {})[_TRAIN]}
    else:
        shutil.copyfile(stored, file)
        os.truncate(file, num_bytes)
        checksums = {file.name: file_digest(file)}
    if has_prompts:
        targets = file.with_name(targets_name(file.name))
        targets.write_bytes(_targets_of(shard, is_training))
        checksums[targets.name] = file_digest(targets)
    return checksums


def _targets_of(shard: ShardDocuments, is_chosen: np.ndarray) -> bytes:
    """Return for each token of the chosen documents whether it is a target, a byte each."""
    num_tokens = shard.records()["tokens"][is_chosen]
    return _is_target(num_tokens, shard.prompt_lengths()[is_chosen]).tobytes()


def _counts(records: np.ndarray) -> SplitCounts:
    return SplitCounts(
        documents=len(records),
        tokens=int(records["tokens"].sum(dtype=np.int64)),
        bytes=int(records["bytes"].sum(dtype=np.int64)),
    )


def _is_target(num_tokens: np.ndarray, num_prompt_tokens: np.ndarray) -> np.ndarray:
    """Return for each token of some documents whether it is a target: it follows the prompt."""
    ends = np.cumsum(num_tokens, dtype=np.int64)
    starts = np.repeat(ends - num_tokens, num_tokens)
    place_in_document = np.arange(len(starts)) - starts
    is_target: np.ndarray = place_in_document >= np.repeat(num_prompt_tokens, num_tokens)
    return is_target
