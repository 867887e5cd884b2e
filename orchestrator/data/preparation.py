"""Stage `prepare`: from the source to prepared tokens, once.

Finished work is found by the source's key, and its checksums are compared before it is used. A stop
at any point leaves what is safely written, and the same command goes on from there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from orchestrator.data.corpus import read_documents
from orchestrator.data.prepared import find_prepared, pointer_to, source_key
from orchestrator.data.tokenizing import (
    TEMPORARY_PREFIX,
    RatedProgress,
    is_unfinished,
    write_tokens,
)
from orchestrator.data.tokens import open_tokens, verify_tokens
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.files import write_json
from orchestrator.workspace.folders import Workspace


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
    rated = RatedProgress(progress)
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
