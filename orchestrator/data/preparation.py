"""Prepare data, and find the prepared data of settings or of a model.

A data source has a key: the hash of its settings and of the names, sizes and times of its files. A
small file maps the key to the folder of prepared data, named by the fingerprint of the content.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from orchestrator.data.depth import GENERATOR_VERSION, depth_folder, write_depth
from orchestrator.data.depth_tasks import DepthTasks
from orchestrator.data.depth_tokenizer import check_names_tokenizer, symbol_tokenizer
from orchestrator.data.mixture import MIXTURE_VERSION, mixture_tokenizer, open_data, write_mixture
from orchestrator.data.store import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    TokenStore,
    is_complete,
    token_dtype,
    verify_data,
)
from orchestrator.data.text import find_files, source_state, text_source, unread_note
from orchestrator.data.text_parts import OpenRunner
from orchestrator.data.tokenize import TOKENIZER_CHARACTERS, sample_texts, write_text
from orchestrator.models.folder import load_provenance, tokenizer_file
from orchestrator.models.hub import is_hub_name
from orchestrator.models.tokenizer import load_tokenizer, num_token_ids, train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damaged, expand_user, read_json, write_json
from orchestrator.workspace.layout import (
    CORPUS_LOCK_SUFFIX,
    SOURCES_NAME,
    Workspace,
    is_valid_name,
)
from orchestrator.workspace.locks import lock_file, lock_holder
from orchestrator.workspace.provenance import content_key, file_key

ASSUMED_VOCABULARY = 32000
"""Vocabulary that plans assume for a tokenizer on the Hugging Face hub: that of the paper's
models."""
ASSUMED_TEXT_BYTES_PER_TOKEN = 4


def prepare(
    settings: DataSettings,
    workspace: Workspace,
    progress: Progress | None = None,
    *,
    verify: bool = False,
    open_runner: OpenRunner | None = None,
) -> Path:
    """Return the token folder for these settings; create it if it is missing.

    Args:
        verify: Compare the checksums of existing token files even if their sizes and times have
            not changed.
        open_runner: What tokenizes the parts of a text; this process when unset.

    Raises:
        UserError: If the source is missing, empty or unreadable, or existing tokens are damaged.
    """
    progress = progress or Progress()
    parent = workspace.tokens
    folder = find_prepared(settings, parent)
    if folder is None:
        with _lock_corpus(source_key(settings), parent, progress):
            # Another process may have prepared the data while this one waited.
            folder = find_prepared(settings, parent)
            if folder is None:
                folder = _write(settings, parent, progress, open_runner)
                progress.finish(_summary(folder, settings))
                return folder
    progress.start("corpus")
    verify_data(folder, always=verify, remember=True)
    progress.finish(f"{_summary(folder, settings)}, found again")
    return folder


def _write(
    settings: DataSettings, parent: Path, progress: Progress, open_runner: OpenRunner | None
) -> Path:
    """Write the folder of prepared data and the file that maps the key to it; the lock is held."""
    key = source_key(settings)
    if settings.source == "depth":
        progress.start("corpus")
        folder = write_depth(settings, parent)
        if settings.depth.in_words:
            _store_folder(key, folder)
        return folder
    index = _index_file(key, parent)
    if index.exists():
        progress.note(f"the tokens that {index} names are missing; preparing them again")
    if settings.source == "mixture":
        texts: dict[str, Path] = {}
        tokenizer = _tokenizer_of_texts(settings, progress) if settings.texts else None
        # Before the texts are tokenized for hours: this may refuse words of the tasks.
        whole_tokenizer = mixture_tokenizer(settings, tokenizer)
        for name, text_settings in settings.texts.items():
            assert tokenizer is not None
            # The text's tokens are those of the mixture's tokenizer, not those that it has by
            # itself.
            text_key = source_key(text_settings, "mixture", tokenizer.to_str())
            # Another mixture may have prepared this text with this tokenizer.
            with _lock_corpus(text_key, parent, progress):
                texts[name] = find_folder(text_key, parent) or write_text(
                    text_settings, parent, text_key, progress, tokenizer, open_runner=open_runner
                )
                _store_folder(text_key, texts[name])
        folder = write_mixture(settings, parent, texts, whole_tokenizer)
    else:
        folder = write_text(settings, parent, key, progress, open_runner=open_runner)
    _store_folder(key, folder)
    verify_data(folder, remember=True)
    return folder


@contextmanager
def _lock_corpus(key: str, parent: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of a data source's key, so that two processes do not write the same files."""
    lock = parent / SOURCES_NAME / f"{key}{CORPUS_LOCK_SUFFIX}"
    with ExitStack() as stack:
        if not stack.enter_context(lock_file(lock, seconds=0.0)):
            process = lock_holder(lock)
            holder = f"process {process}" if process else "another process"
            progress.note(f"waiting for {holder}, which prepares the same data")
            stack.enter_context(lock_file(lock))
        yield


def _tokenizer_of_texts(settings: DataSettings, progress: Progress) -> Tokenizer:
    if settings.tokenizer != "train":
        return load_tokenizer(settings.tokenizer)
    # Each text contributes its share of the characters.
    total_share = sum(settings.shares[name] for name in settings.texts)
    texts: list[str] = []
    progress.start("corpus")
    for name, text_settings in settings.texts.items():
        num_characters = int(TOKENIZER_CHARACTERS * settings.shares[name] / total_share)
        source = text_source(text_settings)
        texts += sample_texts(text_settings, source, num_characters, progress)
    return train_tokenizer(texts, settings.vocab_size)


def _summary(folder: Path, settings: DataSettings) -> str:
    data = open_data(folder)
    origin = ""
    if settings.source == "files":
        origin = f"{format_count(len(find_files(settings)), 'file')} gave "
    cuts = ""
    if settings.source in ("python", "files", "hub") and settings.passage_characters is not None:
        cuts = f"; long ones are cut by data.passage_characters={settings.passage_characters}"
    unread = unread_note(settings)
    others = f"; {unread}" if unread else ""
    return f"{origin}{data.describe()}, vocabulary {data.vocab_size:,}{cuts}{others}"


# Find


def find_prepared(settings: DataSettings, parent: Path) -> Path | None:
    """Return the complete token folder in `parent` for these settings, or None.

    Raises:
        UserError: If the source's files do not exist, or the file of the source's key is damaged.
    """
    # The settings determine the folder of tasks with symbols. A folder of tasks with words is
    # named after their tokenizer, which a plan may not have yet; so it is found by the key.
    if settings.source == "depth" and not settings.depth.in_words:
        folder = depth_folder(settings, parent)
        return folder if is_complete(folder) else None
    return find_folder(source_key(settings), parent)


def source_key(settings: DataSettings, *more: Any) -> str:
    """Return the key of a data source; reads no content.

    Args:
        more: Further JSON values that determine the data.

    Raises:
        UserError: If the source's files do not exist, or the settings name no source.
    """
    if settings.source == "mixture":
        states = {name: source_state(text) for name, text in settings.texts.items()}
        state = ["mixture", MIXTURE_VERSION, GENERATOR_VERSION, states]
    elif settings.source == "depth":
        state = ["depth", GENERATOR_VERSION]
    else:
        state = source_state(settings)
    # The settings have the tokenizer's name, which does not tell whether its file has changed.
    tokenizer_state = None
    is_path = settings.tokenizer != "train" and not is_hub_name(settings.tokenizer)
    if is_path and (path := expand_user(settings.tokenizer)).is_file():
        tokenizer_state = [path.stat().st_size, path.stat().st_mtime_ns]
    return content_key(settings.read_by_source(), state, tokenizer_state, *more)


def find_folder(key: str, parent: Path) -> Path | None:
    """Return the complete folder in `parent` of a data source, or None.

    Raises:
        UserError: If the file that names the folder is damaged.
    """
    path = _index_file(key, parent)
    index = read_json(path)
    if index is None:
        return None
    fingerprint = index.get("fingerprint")
    if not is_valid_name(fingerprint):
        raise damaged(path, f"fingerprint: {fingerprint!r}")
    folder = parent / str(fingerprint)
    return folder if is_complete(folder) else None


def _store_folder(key: str, folder: Path) -> None:
    write_json(_index_file(key, folder.parent), {"fingerprint": folder.name})


def _index_file(key: str, parent: Path) -> Path:
    return parent / SOURCES_NAME / f"{key}.json"


def tokens_folder_of(checkpoint: Path, workspace: Workspace) -> Path:
    """Return the folder of a checkpoint's training tokens.

    For an imported checkpoint, these are the newest tokens that were made with its tokenizer.

    Raises:
        UserError: If the tokens are not in this workspace, or damaged.
    """
    provenance = load_provenance(checkpoint)
    if "imported" in provenance:
        return newest_tokens(workspace, tokenizer_file(checkpoint))
    fingerprint = provenance.get("tokens", "")
    folder = workspace.tokens / str(fingerprint)
    if not is_valid_name(fingerprint) or not folder.is_dir():
        raise UserError(
            f"the training tokens of {checkpoint} ({fingerprint or 'unknown'}) are not in "
            f"{workspace.root}; run `iiet-orch prepare` with the same data settings"
        )
    verify_data(folder)
    return folder


def reads_tokens(checkpoint: Path, folder: Path) -> bool:
    """Return whether these are a checkpoint's training tokens; for an imported one, whether the
    tokenizers agree."""
    provenance = load_provenance(checkpoint)
    if "imported" not in provenance:
        return bool(provenance.get("tokens") == open_data(folder).fingerprint)
    tokenizer = folder / TOKENIZER_NAME
    return tokenizer.is_file() and file_key(tokenizer) == file_key(tokenizer_file(checkpoint))


def newest_tokens(workspace: Workspace, tokenizer: Path | None = None) -> Path:
    """Return the workspace's newest tokens, for models that were not trained on its tokens.

    Args:
        tokenizer: The model's `tokenizer.json`, if the tokens must have been made with it.

    Raises:
        UserError: If the workspace has no such tokens.
    """
    manifests = list(workspace.tokens.glob(f"*/{MANIFEST_NAME}"))
    kind = "prepared data"
    option = ""
    if tokenizer:
        tokenizer_key = file_key(tokenizer)
        manifests = [
            manifest
            for manifest in manifests
            if file_key(manifest.with_name(TOKENIZER_NAME)) == tokenizer_key
        ]
        kind = "tokens of this model's tokenizer"
        option = f" --set data.tokenizer={tokenizer}"
    if not manifests:
        raise UserError(f"{workspace.root} has no {kind}; `iiet-orch prepare{option}` makes them")
    folder = max(manifests, key=lambda manifest: manifest.stat().st_mtime).parent
    verify_data(folder)
    return folder


# Plan


@dataclass(frozen=True, kw_only=True)
class ExpectedTokens:
    """The tokens of a planned run, prepared or not."""

    vocab_size: int
    origin: str
    """Text that says where `vocab_size` comes from."""
    num_train_tokens: int | None
    """Training tokens; None if they are not prepared yet."""
    context_length: int | None = None
    """Tokens of a sequence, if the data fix it; None for text."""
    new_bytes: int
    """Estimated bytes that the preparation will write; 0 after it."""


def expected_tokens(settings: DataSettings, prepared: Path | None) -> ExpectedTokens:
    """Describe the tokens of a planned run; `prepared` is their folder, if it exists.

    Raises:
        UserError: If files or a tokenizer that the settings name are missing.
    """
    is_mixture = settings.source == "mixture"
    texts = settings.texts if is_mixture else {settings.source: settings}
    num_train_tokens = None
    new_bytes = 0
    if settings.source == "depth" or not (texts or prepared):
        tasks = DepthTasks.of(settings)
        if tasks.in_words:
            check_names_tokenizer(settings)
            vocab_size, origin = _text_vocabulary(settings)
        else:
            vocab_size = num_token_ids(symbol_tokenizer(tasks.vocabulary))
            origin = "of the depth tasks"
    elif prepared is not None:
        data = open_data(prepared)
        vocab_size = data.vocab_size
        origin = "of the prepared tokens"
        num_train_tokens = len(data.train) if isinstance(data, TokenStore) else None
    else:
        vocab_size, origin = _text_vocabulary(settings)
        num_symbols = len(DepthTasks.of(settings).added_tokens) if is_mixture else 0
        if num_symbols:
            origin = f"{num_symbols} symbols, and {vocab_size:,}: {origin}"
            vocab_size += num_symbols
        new_bytes = sum(_bytes_to_write(text, vocab_size) for text in texts.values())
    return ExpectedTokens(
        vocab_size=vocab_size,
        origin=origin,
        num_train_tokens=num_train_tokens,
        context_length=sequence_length(settings),
        new_bytes=new_bytes,
    )


def sequence_length(settings: DataSettings) -> int | None:
    """Return the tokens of a sequence if the data fix it; None for text, which allows any length.

    Raises:
        UserError: If no depth task is named where one is needed, or a sequence is too short for it.
    """
    has_text = settings.source not in ("depth", "mixture") or settings.texts
    return None if has_text else DepthTasks.of(settings).sequence_length


def check_sequence_length(settings: DataSettings, num_tokens: int) -> None:
    """Check that the sequences of depth tasks, prepared or not, fit into a training sequence.

    Raises:
        UserError: If a training sequence is too short, or a task's own sequence is.
    """
    if settings.source in ("depth", "mixture"):
        DepthTasks.of(settings).check_length(num_tokens)


def _text_vocabulary(settings: DataSettings) -> tuple[int, str]:
    if settings.tokenizer == "train":
        return settings.vocab_size, "data.vocab_size; a short text may give fewer"
    if is_hub_name(settings.tokenizer):
        return ASSUMED_VOCABULARY, f"assumed; {settings.tokenizer} is not downloaded"
    return num_token_ids(load_tokenizer(settings.tokenizer)), f"of {settings.tokenizer}"


def _bytes_to_write(settings: DataSettings, vocab_size: int) -> int:
    text_bytes = text_source(settings).num_bytes()
    num_tokens = text_bytes // ASSUMED_TEXT_BYTES_PER_TOKEN
    token_bytes = np.dtype(token_dtype(vocab_size)).itemsize
    held_out_bytes = int(text_bytes * settings.validation_fraction)  # Also stored as text.
    # Held-out tokens exist twice until the parts are deleted at the end.
    return num_tokens * token_bytes + 2 * held_out_bytes
