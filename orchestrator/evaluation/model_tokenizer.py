"""How text becomes tokens for a model that is scored.

Checkpoints that were trained here add no special tokens. A transformers folder may (one that opens
every text, for example), and its published scores were measured with them. So its own tokenizer is
used, called as lm-eval calls it, also by a checkpoint that was imported from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer, load_transformers_tokenizer
from orchestrator.training.checkpoint import (
    GENERATION_CONFIG,
    TOKEN_IDS,
    TOKENIZER_CONFIG,
    tokenizer_file,
)
from orchestrator.training.model_loading import read_config
from orchestrator.workspace.errors import UserError


class ScoringTokenizer(Protocol):
    """What scoring needs from a tokenizer."""

    @property
    def prefix_id(self) -> int:
        """The token that replaces an empty context."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text, with the tokenizer's special tokens if wanted."""
        ...


class PlainTokenizer:
    """The tokenizer of a model that was trained here; it adds no special tokens.

    Raises:
        UserError: If the file is missing or damaged, or has no end-of-text token.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)
        self.prefix_id = end_of_text_id(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:  # noqa: ARG002
        """Return the tokens of a text, as in the training data."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


class FolderTokenizer:
    """The tokenizer of a transformers folder, with the special tokens that it adds.

    Raises:
        UserError: If the folder has no tokenizer that can be loaded, or the tokenizer names no
            token to begin a text with.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.tokenizer = load_transformers_tokenizer(folder, trust_remote_code=trust_remote_code)
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        if first is None:
            raise UserError(
                f"the tokenizer in {folder} names neither a bos_token nor an eos_token, and a text "
                "without context needs one; name one in tokenizer_config.json"
            )
        self.prefix_id = int(first)
        self._prefix = self.tokenizer.decode([self.prefix_id])

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text; an opening token that is present is not added again."""
        wanted = add_special_tokens and not text.startswith(self._prefix)
        return tuple(
            self.tokenizer.encode(text, **({} if wanted else {"add_special_tokens": False}))
        )


def checkpoint_tokenizer(checkpoint: Path) -> ScoringTokenizer:
    """Return how a checkpoint reads text: as in training here, or as in the folder it came from.

    Raises:
        UserError: If it has no tokenizer, or one that cannot be used.
    """
    if (checkpoint / TOKENIZER_CONFIG).is_file():
        return FolderTokenizer(checkpoint)
    return PlainTokenizer(tokenizer_file(checkpoint))


def stop_token_ids(checkpoint: Path) -> set[int]:
    """Return the tokens that end a text, from the files of an imported checkpoint.

    The set is empty if no file names one, as for a model that was trained here.

    Raises:
        UserError: If a file cannot be read.
    """
    files = [checkpoint / name for name in (TOKEN_IDS, GENERATION_CONFIG)]
    found = [read_token_ids(file, "eos_token_id") for file in files if file.is_file()]
    return {number for ids in found for number in ids if number >= 0}


def read_token_ids(file: Path, name: str) -> list[int]:
    """Return the ids of a special token in a configuration; it may be one, a list, or absent.

    Raises:
        UserError: If the file cannot be read, or the value is no token's number.
    """
    value = read_config(file.parent, file.name).get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise UserError(
            f"{name} in {file} must be a token's number, or a list of them; got {value!r}"
        )
    return ids
