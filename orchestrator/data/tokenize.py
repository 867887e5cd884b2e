"""Tokenize a text source into a token folder: plan, shards, choice of documents, files.

What all shards share is planned first: the tokenizer, which may be trained, and the share of the
documents that is held out. The shards are tokenized into folders of their own (`text_shards.py`).
Then the documents that are kept are chosen, and their files become those of the token folder
(`join.py`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer

from orchestrator.data.join import choose_documents, write_documents
from orchestrator.data.split import document_hash, held_out_fraction, is_validation
from orchestrator.data.store import TOKENIZER_NAME, is_complete
from orchestrator.data.text import TextSource, read_documents, text_source
from orchestrator.data.text_shards import (
    PLAN_NAME,
    SHARDS_NAME,
    OpenRunner,
    Plan,
    ShardWriter,
    thread_runner,
    tokenize_shards,
)
from orchestrator.models.tokenizer import load_tokenizer, train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.files import new_file
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.processors import num_cpus
from orchestrator.workspace.provenance import content_key, file_digest

TOKENIZER_CHARACTERS = 50_000_000
"""A tokenizer is trained on about this much text; more changes its pairs little."""
MAX_SHARDS_SAMPLED = 100
"""Shards that are read for a tokenizer: six gigabytes of files."""
DOCUMENTS_PER_REPORT = 10_000


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
            shards = tokenize_shards(writer, progress, runner)
            chosen = choose_documents(shards, plan)
            tokenizer_file = folder / TOKENIZER_NAME
            final = parent / content_key(chosen.digest, file_digest(tokenizer_file))
            if not is_complete(final):
                tokenizer = load_tokenizer(tokenizer_file)
                write_documents(chosen, final, plan.settings, tokenizer, runner)
    except BaseException:  # Also Ctrl-C, after which whole shards stay.
        if not can_resume(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return final


def can_resume(folder: Path) -> bool:
    """Return whether a temporary folder holds work that a later call can resume."""
    return any(folder.glob(f"{SHARDS_NAME}/[0-9]*"))


def _make_plan(
    folder: Path,
    settings: DataSettings,
    source: TextSource,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> Plan:
    # The plan of an interrupted call: its shards were tokenized with the tokenizer beside it.
    if stored := Plan.read(folder / PLAN_NAME):
        return stored
    progress.start("corpus")
    progress.advance(0, "reading")
    shards = list(source.shards())
    fraction = held_out_fraction(settings, source)
    if tokenizer is None and settings.tokenizer == "train":
        texts = sample_texts(settings, source, TOKENIZER_CHARACTERS, progress)
        progress.advance(0, "training the tokenizer")
        tokenizer = train_tokenizer(texts, settings.vocab_size)
    with new_file(folder / TOKENIZER_NAME) as temporary:
        (tokenizer or load_tokenizer(settings.tokenizer)).save(str(temporary))
    plan = Plan(settings=settings, shards=shards, fraction=fraction)
    plan.write(folder / PLAN_NAME)
    return plan


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
        heappush(sample, (-int.from_bytes(document_hash(document), "big"), place, document.text))
        sample_characters += len(document.text)
        while sample_characters - len(sample[0][2]) >= num_characters:
            _, _, text = heappop(sample)
            sample_characters -= len(text)
    return [text for _, _, text in sorted(sample, key=itemgetter(1))]
