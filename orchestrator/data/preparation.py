"""Prepare tokens: from the source of text to a folder of tokens, once.

Prepared tokens are found by the source's key: a hash of the settings and of a state of the source
that needs no reading of its content (names, sizes and times of files). A small file leads from the
key to the folder, whose name is the fingerprint of the content. An interrupted preparation keeps
what is safely written, and the same command resumes it. `expected_tokens` describes the tokens
before they are prepared.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from orchestrator.data.corpus import find_files, read_documents, source_state
from orchestrator.data.token_store import is_complete, open_tokens, verify_tokens
from orchestrator.data.tokenization import (
    TEMPORARY_PREFIX,
    TokenProgress,
    is_unfinished,
    write_tokens,
)
from orchestrator.data.tokenizer import HUB_PREFIX, load_tokenizer, num_token_ids
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import expand_user, read_json, write_json
from orchestrator.workspace.folders import Workspace, is_valid_name
from orchestrator.workspace.provenance import content_key

ASSUMED_VOCABULARY = 32000
"""Entries of a tokenizer on the hub, which is not asked: those of the published models."""
ASSUMED_TEXT_BYTES_PER_TOKEN = 4
ASSUMED_TOKENS_PER_DOCUMENT = 1000
"""Of a data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class ExpectedTokens:
    """What is known of the tokens before a run, and how."""

    vocab_size: int
    """Entries of the tokenizer."""
    origin: str
    """Where that number is from, for people."""
    num_train_tokens: int | None
    """Tokens to train on; None where only reading the text can say."""
    new_bytes: int
    """Bytes that preparing them will write, as far as it can be told; 0 when they are there."""


def prepare(
    settings: DataSettings,
    workspace: Workspace,
    progress: Progress | None = None,
    *,
    verify: bool = False,
) -> Path:
    """Return the folder of tokens for these settings, made if it is missing.

    Args:
        settings: Source, split and tokenizer.
        workspace: Where the tokens live.
        progress: Told what is going on.
        verify: Compare the checksums of tokens that are there even if nothing has touched the files
            since the last time.

    Raises:
        UserError: If the source is missing, empty or unreadable, or the tokens that are there are
            not what was written.
    """
    progress = progress or Progress()
    folder = find_prepared(settings, workspace.tokens)
    if folder is None:
        workspace.tokens.mkdir(parents=True, exist_ok=True)
        # One at a time: two would write the same files.
        with FileLock(workspace.tokens / ".lock"):
            folder = find_prepared(settings, workspace.tokens)
            if folder is None:
                return _make(settings, workspace, progress)
    progress.start("corpus")
    verify_tokens(folder, always=verify)
    progress.finish(f"{describe(folder)}, found again")
    return folder


def _make(settings: DataSettings, workspace: Workspace, progress: Progress) -> Path:
    key = source_key(settings)
    if (named := pointer_to(key, workspace.tokens)).exists():
        progress.note(f"the tokens that {named} names are missing or damaged; they are made anew")
    for leftover in workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"):
        if not is_unfinished(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    rated = TokenProgress(progress)
    folder = write_tokens(
        workspace.tokens,
        read_documents(settings, rated),
        settings,
        resume_key=key,
        progress=rated,
    )
    write_json(pointer_to(key, workspace.tokens), {"fingerprint": folder.name})
    progress.finish(describe(folder))
    return folder


def describe(folder: Path) -> str:
    """Return one line about a folder of tokens, such as for the end of a stage."""
    manifest = open_tokens(folder).manifest
    train, validation = manifest["train"], manifest["validation"]
    return (
        f"{train['documents'] + validation['documents']:,} documents, {train['tokens']:,} tokens "
        f"to train on, {validation['tokens']:,} held out, vocabulary {manifest['vocab_size']:,}"
    )


def source_key(settings: DataSettings) -> str:
    """Return the key of settings and source; it changes when the source's content does.

    Raises:
        UserError: If the source's files do not exist.
    """
    tokenizer_state = None
    path = expand_user(settings.tokenizer)
    if (
        settings.tokenizer != "train"
        and not settings.tokenizer.startswith(HUB_PREFIX)
        and path.is_file()
    ):
        tokenizer_state = [path.stat().st_size, path.stat().st_mtime_ns]
    return content_key(settings.model_dump(mode="json"), source_state(settings), tokenizer_state)


def pointer_to(key: str, parent: Path) -> Path:
    """Return the file that names the folder of a source's tokens; `parent` holds all of them."""
    return parent / "sources" / f"{key}.json"


def find_prepared(settings: DataSettings, parent: Path) -> Path | None:
    """Return the folder of whole tokens for these settings, if it was made.

    Args:
        settings: Source, split and tokenizer.
        parent: Folder of all token folders.

    Raises:
        UserError: If the source's files do not exist, or the file that names the folder is damaged.
    """
    path = pointer_to(source_key(settings), parent)
    found = read_json(path)
    if found is None:
        return None
    fingerprint = found.get("fingerprint") if isinstance(found, dict) else None
    if not is_valid_name(fingerprint):
        raise UserError(
            f"{path} is damaged (fingerprint: {fingerprint!r}); delete it and run the command again"
        )
    folder = parent / str(fingerprint)
    return folder if is_complete(folder) else None


def expected_tokens(settings: DataSettings, prepared: Path | None) -> ExpectedTokens:
    """Say what a run's tokens will be like.

    Args:
        settings: Source, split and tokenizer.
        prepared: Their folder, if they are made.

    Raises:
        UserError: If files or a tokenizer that the settings name are missing.
    """
    if prepared is not None:
        store = open_tokens(prepared)
        return ExpectedTokens(
            vocab_size=store.vocab_size,
            origin="of the prepared tokens",
            num_train_tokens=len(store.train),
            new_bytes=0,
        )
    vocab_size, origin = _vocabulary(settings)
    return ExpectedTokens(
        vocab_size=vocab_size,
        origin=origin,
        num_train_tokens=None,
        new_bytes=_bytes_to_write(settings, vocab_size),
    )


def _vocabulary(settings: DataSettings) -> tuple[int, str]:
    if settings.tokenizer == "train":
        return settings.vocab_size, "data.vocab_size; a short text may give fewer"
    if settings.tokenizer.startswith(HUB_PREFIX):
        return ASSUMED_VOCABULARY, f"assumed; {settings.tokenizer} is not asked"
    return num_token_ids(load_tokenizer(settings.tokenizer)), f"of {settings.tokenizer}"


def _bytes_to_write(settings: DataSettings, vocab_size: int) -> int:
    """Tokens, and the held-out documents as text."""
    if settings.source == "hub":
        documents = settings.max_documents or 0
        text = documents * ASSUMED_TOKENS_PER_DOCUMENT * ASSUMED_TEXT_BYTES_PER_TOKEN
    elif settings.source == "files":
        text = sum(path.stat().st_size for path in find_files(settings))
    else:
        return 0  # a few megabytes
    width = 2 if vocab_size <= 1 << 16 else 4
    held_out = int(text * settings.validation_fraction)
    return text // ASSUMED_TEXT_BYTES_PER_TOKEN * width + held_out
