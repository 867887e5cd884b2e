"""Write the token folder of one text source, and remember which source it was made from."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from orchestrator.data.corpus import read_documents
from orchestrator.data.source_index import store_folder
from orchestrator.data.tokenization import TokenProgress, write_tokens
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress


def write_text(
    settings: DataSettings,
    parent: Path,
    key: str,
    progress: Progress,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the token folder of a text source and store it under its key; resumes.

    Args:
        tokenizer: Used instead of the one that the settings name.
    """
    progress_with_rate = TokenProgress(progress)
    folder = write_tokens(
        parent,
        read_documents(settings, progress_with_rate),
        settings,
        resume_key=key,
        tokenizer=tokenizer,
        progress=progress_with_rate,
    )
    store_folder(key, folder)
    return folder
