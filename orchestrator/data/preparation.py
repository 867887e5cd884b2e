"""Prepare tokens: turn the source of text into a token folder, once.

A small file maps the source's key, a hash of the settings and of names, sizes and times of files,
to the token folder, which is named by the fingerprint of the content.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.corpus import read_documents, source_state
from orchestrator.data.depth.store import (
    DepthStore,
    depth_folder,
    depth_tokenizer,
    longest_sequence,
    write_depth,
)
from orchestrator.data.depth.tasks import make_tasks
from orchestrator.data.prepared import is_complete, verify_data
from orchestrator.data.sources import open_data
from orchestrator.data.text_files import find_files
from orchestrator.data.token_store import open_tokens
from orchestrator.data.tokenization import (
    TEMPORARY_PREFIX,
    TokenProgress,
    can_resume,
    write_tokens,
)
from orchestrator.data.tokenizer import HUB_PREFIX, load_tokenizer, num_token_ids
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import expand_user, read_json, write_json
from orchestrator.workspace.folders import Workspace, is_valid_name
from orchestrator.workspace.locks import lock_file
from orchestrator.workspace.provenance import content_key
from orchestrator.workspace.read_only import check_may_write

ASSUMED_VOCABULARY = 32000
"""Entries of a tokenizer on the hub, assumed without a request: as in the published models."""
ASSUMED_TEXT_BYTES_PER_TOKEN = 4
ASSUMED_TOKENS_PER_DOCUMENT = 1000
"""For data sets on the hub."""


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
        check_may_write(workspace.tokens)
        folder = write_depth(settings, workspace.tokens)
    elif folder is None:
        check_may_write(workspace.tokens)
        # One process at a time: two would write the same files.
        with lock_file(workspace.tokens / ".lock"):
            folder = find_prepared(settings, workspace.tokens)
            if folder is None:
                return _write(settings, workspace, progress)
    progress.start("corpus")
    verify_data(folder, always=verify)
    progress.finish(f"{describe(folder)}, found again")
    return folder


def _write(settings: DataSettings, workspace: Workspace, progress: Progress) -> Path:
    key = _source_key(settings)
    pointer = _pointer(key, workspace.tokens)
    if pointer.exists():
        progress.note(
            f"the tokens that {pointer} names are missing or damaged; preparing them again"
        )
    for leftover in workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"):
        if not can_resume(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    progress_with_rate = TokenProgress(progress)
    folder = write_tokens(
        workspace.tokens,
        read_documents(settings, progress_with_rate),
        settings,
        resume_key=key,
        progress=progress_with_rate,
    )
    write_json(pointer, {"fingerprint": folder.name})
    progress.finish(describe(folder))
    return folder


def describe(folder: Path) -> str:
    """Summarize prepared data in one line."""
    data = open_data(folder)
    if isinstance(data, DepthStore):
        tasks = ", ".join(f"{task.name} (chance {100 * task.chance:.3g}%)" for task in data.tasks)
        return f"{tasks}, sequences of {data.sequence_length} tokens, vocabulary {data.vocab_size}"
    manifest = data.manifest
    train, validation = manifest.train, manifest.validation
    return (
        f"{train.documents + validation.documents:,} documents, {train.tokens:,} tokens to train "
        f"on, {validation.tokens:,} held out, vocabulary {manifest.vocab_size:,}"
    )


def _source_key(settings: DataSettings) -> str:
    tokenizer_state = None
    is_path = settings.tokenizer != "train" and not settings.tokenizer.startswith(HUB_PREFIX)
    if is_path and (path := expand_user(settings.tokenizer)).is_file():
        tokenizer_state = [path.stat().st_size, path.stat().st_mtime_ns]
    # Without the section of another source, so that keys are those of earlier versions.
    chosen = settings.model_dump(mode="json", exclude={"depth"})
    return content_key(chosen, source_state(settings), tokenizer_state)


def _pointer(key: str, parent: Path) -> Path:
    return parent / "sources" / f"{key}.json"


def find_prepared(settings: DataSettings, parent: Path) -> Path | None:
    """Return the complete token folder in `parent` for these settings, or None.

    Raises:
        UserError: If the source's files do not exist, or the file of the source's key is damaged.
    """
    if settings.source == "depth":
        folder = depth_folder(settings, parent)
        return folder if is_complete(folder) else None
    path = _pointer(_source_key(settings), parent)
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
    """Describe the tokens of a planned run; `prepared` is their folder, if it exists.

    Raises:
        UserError: If files or a tokenizer that the settings name are missing.
    """
    if settings.source == "depth":
        return ExpectedTokens(
            vocab_size=num_token_ids(depth_tokenizer(settings.depth)),
            origin="of the depth tasks",
            num_train_tokens=None,
            context_length=sequence_length(settings),
            new_bytes=0,
        )
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


def sequence_length(settings: DataSettings) -> int | None:
    """Return the length in tokens of the data's sequences; None for text, which has any length.

    Raises:
        UserError: If depth tasks are wanted, and none is named or a sequence cannot hold one.
    """
    return longest_sequence(make_tasks(settings.depth)) if settings.source == "depth" else None


def _vocabulary(settings: DataSettings) -> tuple[int, str]:
    if settings.tokenizer == "train":
        return settings.vocab_size, "data.vocab_size; a short text may give fewer"
    if settings.tokenizer.startswith(HUB_PREFIX):
        return ASSUMED_VOCABULARY, f"assumed; {settings.tokenizer} is not downloaded"
    return num_token_ids(load_tokenizer(settings.tokenizer)), f"of {settings.tokenizer}"


def _bytes_to_write(settings: DataSettings, vocab_size: int) -> int:
    if settings.source == "hub":
        documents = settings.max_documents or 0
        text = documents * ASSUMED_TOKENS_PER_DOCUMENT * ASSUMED_TEXT_BYTES_PER_TOKEN
    elif settings.source == "files":
        text = sum(path.stat().st_size for path in find_files(settings))
    else:
        return 0  # a few megabytes
    token_bytes = 2 if vocab_size <= 1 << 16 else 4
    held_out = int(text * settings.validation_fraction)  # stored as text, too
    return text // ASSUMED_TEXT_BYTES_PER_TOKEN * token_bytes + held_out
