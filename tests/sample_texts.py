"""Tokens of given texts, and texts that come with every Python."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from orchestrator.data.depth_tasks import NUMBER_WORDS, WORDS
from orchestrator.data.text import read_documents, text_source
from orchestrator.data.tokenize import write_text
from orchestrator.models.tokenizer import train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress


def lines_of(texts: Iterable[str]) -> str:
    """Return JSON lines, one for each text."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def tokens_of(
    texts: Iterable[str],
    folder: Path,
    *,
    loaded_tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> Path:
    """Return the token folder of some texts, which are written to a file in `folder`.

    Args:
        loaded_tokenizer: Encodes the texts; if unset, the setting `tokenizer` decides.
        settings: Other settings of the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "texts.jsonl"
    file.write_text(lines_of(texts), encoding="utf-8")
    data = DataSettings(source="files", files=(str(file),), **settings)
    return write_text(data, folder, "key", Progress(), loaded_tokenizer)


def add_opening(path: Path) -> None:
    """Let a `tokenizer.json` put a token <s> before every text, as Llama 3's does."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>"])
    opening = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[opening]
    )
    tokenizer.save(str(path))


def help_texts(num: int) -> list[str]:
    """Return texts of Python's help topics."""
    return [d.text for d in islice(read_documents(text_source(DataSettings()), None), num)]


def save_word_tokenizer(folder: Path, *texts: str) -> Path:
    """Train a byte-level tokenizer that has each word of depth tasks as one token; return its file.

    Args:
        texts: What it is trained on beside the words.
    """
    words = "".join(f" {word}" for word in (*WORDS, *NUMBER_WORDS))
    path = folder / "words.json"
    train_tokenizer([*texts, words, words, words], 1000).save(str(path))
    return path
