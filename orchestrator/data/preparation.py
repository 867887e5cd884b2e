"""Prepare data: turn the source that settings name into a folder of prepared data, once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from orchestrator.data.corpus import read_documents
from orchestrator.data.depth import (
    check_depth_length,
    depth_folder,
    depth_tokenizer,
    longest_sequence,
    make_tasks,
    only_tasks,
    vocabulary,
    write_depth,
)
from orchestrator.data.mixture import mixture_tokenizer, open_data, write_mixture
from orchestrator.data.source_index import find_folder, index_file, source_key, store_folder
from orchestrator.data.store import TokenStore, is_complete, verify_data
from orchestrator.data.text_source import text_source
from orchestrator.data.text_writing import write_text
from orchestrator.data.tokenization import TOKENIZER_CHARACTERS, can_resume, training_texts
from orchestrator.models.hub import is_hub_name
from orchestrator.models.tokenizer import load_tokenizer, num_token_ids, train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import TEMPORARY_PREFIX, Workspace
from orchestrator.workspace.locks import lock_file

ASSUMED_VOCABULARY = 32000
"""Entries of a tokenizer on the hub, assumed without a request: as in the published models."""
ASSUMED_TEXT_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, kw_only=True)
class ExpectedTokens:
    """The tokens of a planned run, prepared or not."""

    vocab_size: int
    origin: str
    """Where `vocab_size` comes from, for display."""
    num_train_tokens: int | None
    """Training tokens; None if they are not prepared yet."""
    context_length: int | None = None
    """Length of the sequences, where the data have one; None for text."""
    new_bytes: int
    """Estimate of the bytes that preparation will write; 0 if it is done."""


def prepare(
    settings: DataSettings,
    workspace: Workspace,
    progress: Progress | None = None,
    *,
    verify: bool = False,
) -> Path:
    """Return the token folder for these settings; create it if it is missing.

    Args:
        verify: Compare the hashes of existing tokens even if size and time of the files are
            unchanged since the last time.

    Raises:
        UserError: If the source is missing, empty or unreadable, or existing tokens are damaged.
    """
    progress = progress or Progress()
    folder = find_prepared(settings, workspace.tokens)
    if folder is None and settings.source == "depth":
        folder = write_depth(settings, workspace.tokens)
        progress.start("corpus")
        progress.finish(_summary(folder))
        return folder
    if folder is None:
        # One process at a time: two would write the same files.
        with lock_file(workspace.tokens / ".lock"):
            folder = find_prepared(settings, workspace.tokens)
            if folder is None:
                return _write(settings, workspace, progress)
    progress.start("corpus")
    verify_data(folder, always=verify, remember=True)
    progress.finish(f"{_summary(folder)}, found again")
    return folder


def _write(settings: DataSettings, workspace: Workspace, progress: Progress) -> Path:
    parent = workspace.tokens
    key = source_key(settings)
    index = index_file(key, parent)
    if index.exists():
        progress.note(f"the tokens that {index} names are missing or damaged; preparing them again")
    for leftover in parent.glob(f"{TEMPORARY_PREFIX}*"):
        if not can_resume(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    write = _write_mixture if settings.source == "mixture" else write_text
    folder = write(settings, parent, key, progress)
    progress.finish(_summary(folder))
    return folder


def _write_mixture(settings: DataSettings, parent: Path, key: str, progress: Progress) -> Path:
    texts: dict[str, Path] = {}
    tokenizer = None
    if settings.texts:
        tokenizer = _text_tokenizer(settings, progress)
        for name, alone in settings.texts.items():
            text_key = source_key(alone, "mixture", tokenizer.to_str())
            found = find_folder(text_key, parent)
            texts[name] = found or write_text(alone, parent, text_key, progress, tokenizer)
    folder = write_mixture(settings, parent, texts, tokenizer)
    verify_data(folder, remember=True)
    store_folder(key, folder)
    return folder


def _text_tokenizer(settings: DataSettings, progress: Progress) -> Tokenizer:
    if settings.tokenizer != "train":
        return load_tokenizer(settings.tokenizer)
    # A long text must not leave nothing for the others to read.
    total = sum(settings.shares[name] for name in settings.texts)
    texts: list[Iterator[str]] = [
        training_texts(
            read_documents(alone, progress),
            alone,
            num_characters=int(TOKENIZER_CHARACTERS * settings.shares[name] / total),
        )
        for name, alone in settings.texts.items()
    ]
    tokenizer = train_tokenizer(chain.from_iterable(texts), settings.vocab_size)
    progress.advance(0, "the tokenizer is trained")
    return tokenizer


def _summary(folder: Path) -> str:
    data = open_data(folder)
    return f"{data.describe()}, vocabulary {data.vocab_size:,}"


def find_prepared(settings: DataSettings, parent: Path) -> Path | None:
    """Return the complete token folder in `parent` for these settings, or None.

    Raises:
        UserError: If the source's files do not exist, or the file of the source's key is damaged.
    """
    if settings.source == "depth":
        folder = depth_folder(settings, parent)
        return folder if is_complete(folder) else None
    return find_folder(source_key(settings), parent)


def expected_tokens(settings: DataSettings, prepared: Path | None) -> ExpectedTokens:
    """Describe the tokens of a planned run; `prepared` is their folder, if it exists.

    Raises:
        UserError: If files or a tokenizer that the settings name are missing.
    """
    if settings.source == "depth":
        return ExpectedTokens(
            vocab_size=num_token_ids(depth_tokenizer(settings)),
            origin="of the depth tasks",
            num_train_tokens=None,
            context_length=sequence_length(settings),
            new_bytes=0,
        )
    if prepared is not None:
        data = open_data(prepared)
        return ExpectedTokens(
            vocab_size=data.vocab_size,
            origin="of the prepared tokens",
            num_train_tokens=len(data.train) if isinstance(data, TokenStore) else None,
            context_length=sequence_length(settings),
            new_bytes=0,
        )
    vocab_size, origin = _vocabulary(settings)
    texts = settings.texts if settings.source == "mixture" else {settings.source: settings}
    return ExpectedTokens(
        vocab_size=vocab_size,
        origin=origin,
        num_train_tokens=None,
        context_length=sequence_length(settings),
        new_bytes=sum(_bytes_to_write(text, vocab_size) for text in texts.values()),
    )


def sequence_length(settings: DataSettings) -> int | None:
    """Return the length in tokens of the data's sequences; None for text, which has any length.

    Raises:
        UserError: If depth tasks are wanted, and none is named or a sequence cannot hold one.
    """
    has_text = settings.source not in ("depth", "mixture") or settings.texts
    return None if has_text else _longest_task(settings)


def check_context_length(settings: DataSettings, context_length: int) -> None:
    """Check that a model's context holds the sequences of depth tasks, prepared or not.

    Raises:
        UserError: If it does not, or a sequence cannot hold its task.
    """
    if settings.source in ("depth", "mixture"):
        check_depth_length(_longest_task(settings), context_length)


def _longest_task(settings: DataSettings) -> int:
    if settings.source == "depth":
        tasks = only_tasks(settings)
        return longest_sequence(tasks, with_markers=len(tasks) > 1)
    return longest_sequence(make_tasks(settings.tasks), with_markers=True)


def _vocabulary(settings: DataSettings) -> tuple[int, str]:
    if settings.source == "mixture":
        if not settings.texts:
            return num_token_ids(mixture_tokenizer(settings, None)), "of the depth tasks"
        num_symbols = len(vocabulary(make_tasks(settings.tasks), with_markers=True))
        size, origin = _text_vocabulary(settings)
        return size + num_symbols, f"{num_symbols} symbols, and {size:,}: {origin}"
    return _text_vocabulary(settings)


def _text_vocabulary(settings: DataSettings) -> tuple[int, str]:
    if settings.tokenizer == "train":
        return settings.vocab_size, "data.vocab_size; a short text may give fewer"
    if is_hub_name(settings.tokenizer):
        return ASSUMED_VOCABULARY, f"assumed; {settings.tokenizer} is not downloaded"
    return num_token_ids(load_tokenizer(settings.tokenizer)), f"of {settings.tokenizer}"


def _bytes_to_write(settings: DataSettings, vocab_size: int) -> int:
    text = text_source(settings).num_bytes()
    token_bytes = 2 if vocab_size <= 1 << 16 else 4
    held_out = int(text * settings.validation_fraction)  # stored as text, too
    return text // ASSUMED_TEXT_BYTES_PER_TOKEN * token_bytes + held_out
