"""Stage `prepare`: from the source to token shards, once.

Finished work is found by the source's key: the settings and a state of the source that needs no
reading of its content (names, sizes and times of files; the Python's own files). The key leads
through a small file to the folder, whose name is the fingerprint of the content. A stop at any
point leaves only a temporary folder, which the next call removes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock

from orchestrator.console import Progress
from orchestrator.data.corpus import read_documents
from orchestrator.data.prepared import find_prepared, pointer_to, source_key
from orchestrator.data.tokens import TEMPORARY_PREFIX, open_tokens, write_tokens
from orchestrator.settings import DataSettings
from orchestrator.workspace import Workspace, write_json


def prepare(settings: DataSettings, workspace: Workspace, progress: Progress | None = None) -> Path:
    """Return the folder of tokens for these settings, made if it is missing.

    Args:
        settings: Source, split and tokenizer.
        workspace: Where the tokens live.
        progress: Told what is going on.

    Raises:
        UserError: If the source is missing, empty or unreadable.
    """
    progress = progress or Progress()
    folder = find_prepared(settings, workspace.tokens)
    if folder is None:
        workspace.tokens.mkdir(parents=True, exist_ok=True)
        # One at a time: whoever holds the lock knows that temporary folders are leftovers.
        with FileLock(workspace.tokens / ".lock"):
            folder = find_prepared(settings, workspace.tokens)
            if folder is None:
                for leftover in workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                documents = read_documents(settings, progress)
                folder = write_tokens(workspace.tokens, documents, settings, progress=progress)
                pointer = pointer_to(source_key(settings), workspace.tokens)
                write_json(pointer, {"fingerprint": folder.name})
                progress.finish(describe(folder))
                return folder
    progress.start("corpus")
    progress.finish(f"{describe(folder)}, found again")
    return folder


def describe(folder: Path) -> str:
    """Return one line about a folder of tokens, such as for the end of a stage."""
    manifest = open_tokens(folder).manifest
    train, validation = manifest["train"], manifest["validation"]
    return (
        f"{train['documents'] + validation['documents']:,} documents, {train['tokens']:,} tokens "
        f"to train on, {validation['tokens']:,} held out, vocabulary {manifest['vocab_size']:,}"
    )
