"""Tokenize a data source into a token folder: plan, parts, choice of documents, files.

The plan has what all parts share: the tokenizer, which may be trained, and the held-out share of
the documents. Each part is tokenized into a folder of its own (`text_parts.py`). Then the documents
to keep are chosen, and their files become the token files of the final folder (`join.py`).
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
from orchestrator.data.text_parts import (
    PARTS_NAME,
    PLAN_NAME,
    OpenRunner,
    PartWriter,
    Plan,
    thread_runner,
    tokenize_parts,
)
from orchestrator.models.tokenizer import load_tokenizer, train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.files import new_file
from orchestrator.workspace.layout import TEMPORARY_PREFIX
from orchestrator.workspace.processors import num_cpus
from orchestrator.workspace.provenance import content_key, file_digest

TOKENIZER_CHARACTERS = 50_000_000
"""Characters of text that a tokenizer is trained on; more would change its merges little."""
MAX_PARTS_SAMPLED = 100
"""Parts that are read for a tokenizer: six gigabytes of files."""
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
    """Tokenize a data source into `parent`/<fingerprint>; a folder of the same content is kept.

    Args:
        settings: Settings of one text.
        parent: Folder of all prepared data; also holds the temporary files.
        key: Hash that identifies documents and tokenizer, so that a later call can resume this one.
        progress: Shows parts, tokens and rates.
        tokenizer: Used instead of the one that the settings name.
        open_runner: What tokenizes several parts; when unset, one thread per CPU.

    Raises:
        UserError: If the source cannot be read, or there is too little text to hold some out.
    """
    folder = parent / f"{TEMPORARY_PREFIX}{key}"
    folder.mkdir(parents=True, exist_ok=True)
    # Opened once for all parts: a data set of thousands of files takes seconds to open.
    source = text_source(settings)
    try:
        plan = _make_plan(folder, settings, source, tokenizer, progress)
        writer = PartWriter(folder, source)
        if open_runner is None or len(writer.parts) == 1:
            open_runner = partial(thread_runner, num_cpus())
        with open_runner() as runner:
            parts = tokenize_parts(writer, progress, runner)
            chosen = choose_documents(parts, plan)
            tokenizer_file = folder / TOKENIZER_NAME
            final = parent / content_key(chosen.digest, file_digest(tokenizer_file))
            if not is_complete(final):
                tokenizer = load_tokenizer(tokenizer_file)
                write_documents(chosen, final, plan.settings, tokenizer, runner)
    except BaseException:  # Also Ctrl-C: finished parts stay.
        if not can_resume(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return final


def can_resume(folder: Path) -> bool:
    """Return whether a temporary folder holds work that a later call can resume."""
    return any(folder.glob(f"{PARTS_NAME}/[0-9]*"))


def _make_plan(
    folder: Path,
    settings: DataSettings,
    source: TextSource,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> Plan:
    # The plan of an interrupted call stays valid: its parts were tokenized with its tokenizer.
    if stored := Plan.read(folder / PLAN_NAME):
        return stored
    progress.start("corpus")
    progress.advance(0, "reading")
    parts = list(source.parts())
    fraction = held_out_fraction(settings, source)
    if tokenizer is None and settings.tokenizer == "train":
        texts = sample_texts(settings, source, TOKENIZER_CHARACTERS, progress)
        progress.advance(0, "training the tokenizer")
        tokenizer = train_tokenizer(texts, settings.vocab_size)
    with new_file(folder / TOKENIZER_NAME) as temporary:
        (tokenizer or load_tokenizer(settings.tokenizer)).save(str(temporary))
    plan = Plan(settings=settings, parts=parts, fraction=fraction)
    plan.write(folder / PLAN_NAME)
    return plan


def sample_texts(
    settings: DataSettings, source: TextSource, num_characters: int, progress: Progress
) -> list[str]:
    """Return texts for training a tokenizer, of documents that are not held out, in their order.

    They are those with the smallest hashes, because a corpus may be sorted, for example by
    language. Of many parts only some are read, chosen by hashes of their numbers.

    Args:
        num_characters: Characters of all texts together, at least; fewer if the corpus is smaller.

    Raises:
        UserError: If the source cannot be read, or is empty.
    """
    fraction = held_out_fraction(settings, source)
    parts = source.parts()
    numbers: Sequence[int] = range(len(parts))
    if settings.max_documents is None:  # Otherwise the first documents are the corpus.
        by_hash = sorted(numbers, key=lambda number: hashlib.blake2b(b"%d" % number).digest())
        numbers = sorted(by_hash[:MAX_PARTS_SAMPLED])
    documents = chain.from_iterable(read_documents(source, parts[number]) for number in numbers)
    sample: list[tuple[int, int, str]] = []  # A heap, whose first document has the largest hash.
    sample_characters = 0
    for number, document in enumerate(islice(documents, settings.max_documents)):
        if number % DOCUMENTS_PER_REPORT == 0:
            progress.advance(0, f"reading for the tokenizer: {number:,} documents")
        if is_validation(document.deciding_text, fraction):
            continue
        heappush(sample, (-int.from_bytes(document_hash(document), "big"), number, document.text))
        sample_characters += len(document.text)
        while sample_characters - len(sample[0][2]) >= num_characters:
            _, _, text = heappop(sample)
            sample_characters -= len(text)
    return [text for _, _, text in sorted(sample, key=itemgetter(1))]
