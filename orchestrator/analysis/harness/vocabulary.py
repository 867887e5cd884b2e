"""How text becomes tokens for a model that is scored.

Our own checkpoints read text as their training data were written: no special tokens, and the
end-of-text token where there is no context. A folder of transformers has habits of its own (a token
that opens every text, for example), and its published numbers were measured with them; so its own
tokenizer is used, called as lm-eval's class for such models calls it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from orchestrator.data.hub import offline
from orchestrator.data.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.errors import UserError


class Vocabulary(Protocol):
    """What scoring asks of a tokenizer."""

    @property
    def prefix_id(self) -> int:
        """The token that stands where there is no context."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text, with the tokenizer's usual additions if wanted."""
        ...


class TrainedVocabulary:
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


class FolderVocabulary:
    """The tokenizer of a folder of transformers, whatever it adds to a text.

    Args:
        folder: Holds the tokenizer's files.
        trust_remote_code: Whether code that lies in the folder may run.

    Raises:
        UserError: If the folder has no tokenizer that can be loaded, or it names no token to begin
            a text with.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.tokenizer = _load(folder, trust_remote_code)
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


def _load(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        with offline():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # damaged files raise dozens of kinds, the tokenizers library plain ones
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load a tokenizer from {folder}: {line}") from None
