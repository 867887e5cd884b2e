"""How text becomes tokens for a model that is scored.

Checkpoints that were trained here read text as their training data were written: no special tokens,
and the end-of-text token where there is no context. A folder of transformers has habits of its own
(a token that opens every text, for example), and its published numbers were measured with them; so
its own tokenizer is used, called as lm-eval's class for such models calls it. A checkpoint that was
imported keeps those habits: one model has one score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer, load_transformers_tokenizer
from orchestrator.training.checkpoint import TOKENIZER_CONFIG, tokenizer_file
from orchestrator.workspace.errors import UserError


class ScoringTokenizer(Protocol):
    """What scoring asks of a tokenizer."""

    @property
    def prefix_id(self) -> int:
        """The token that stands where there is no context."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text, with the tokenizer's usual additions if wanted."""
        ...


class PlainTokenizer:
    """The tokenizer of a checkpoint of ours; it adds nothing to a text.

    Raises:
        UserError: If the file is missing or damaged, or has no end-of-text token.
    """

    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)
        self.prefix_id = end_of_text_id(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:  # noqa: ARG002
        """Return the tokens of a text as training data have them."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


class FolderTokenizer:
    """The tokenizer of a folder of transformers, whatever it adds to a text.

    Args:
        folder: Holds the tokenizer's files.
        trust_remote_code: Whether code that lies in the folder may run.

    Raises:
        UserError: If the folder has no tokenizer that can be loaded, or it names no token to begin
            a text with.
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
        """Return the tokens of a text; an opening token that it has already is not doubled."""
        wanted = add_special_tokens and not text.startswith(self._prefix)
        return tuple(
            self.tokenizer.encode(text, **({} if wanted else {"add_special_tokens": False}))
        )


def checkpoint_tokenizer(checkpoint: Path) -> ScoringTokenizer:
    """Return how a checkpoint reads text: as it was trained here, or as where it came from.

    Raises:
        UserError: If it has no tokenizer, or one that cannot be used.
    """
    if (checkpoint / TOKENIZER_CONFIG).is_file():
        return FolderTokenizer(checkpoint)
    return PlainTokenizer(tokenizer_file(checkpoint))
