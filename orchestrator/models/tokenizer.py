"""Tokenizers: train a byte-level BPE on the corpus, or load an existing tokenizer.

Any text has tokens; none stands for "unknown". Training reads no held-out document, and the same
text gives the same file. The end-of-text token ends every document, with id 0 if it is trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from orchestrator.models.hub import offline
from orchestrator.models.hub_models import download_tokenizer, is_hub_name
from orchestrator.workspace.errors import UserError, first_line
from orchestrator.workspace.files import expand_user

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` entries; a short text may give fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` (or the folder that holds one), or `hub:NAME`.

    Raises:
        UserError: If it is missing or damaged, or the hub cannot be reached.
    """
    path = tokenizer_path(name)
    if not path.is_file():
        raise UserError(
            f"there is no tokenizer at {path}; data.tokenizer takes `train`, the path of a "
            "tokenizer.json, or hub:NAME"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"{path} is not a tokenizer.json of the tokenizers library: {error}"
        ) from None


def tokenizer_path(name: str | Path) -> Path:
    """Return the `tokenizer.json` that a user names: the file, its folder, or `hub:NAME`.

    Raises:
        UserError: If the hub does not give it.
    """
    path = download_tokenizer(name) if is_hub_name(name) else expand_user(name)
    return path / "tokenizer.json" if path.is_dir() else path


def load_transformers_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder as transformers does; a `UserError` if that fails."""
    # Imported here because it takes seconds; our own models do not need it.
    from transformers import AutoTokenizer

    try:
        with offline():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise dozens of kinds
        raise UserError(f"cannot load a tokenizer from {folder}: {first_line(error)}") from None


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """Return the id of the end-of-text token; a `UserError` if the tokenizer has no known one."""
    token_id = find_end_of_text_id(tokenizer)
    if token_id is None:
        raise UserError(
            f"the tokenizer has no end-of-text token; it needs one of "
            f"{', '.join(END_OF_TEXT_NAMES)}"
        )
    return token_id


def find_end_of_text_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the first known end-of-text token in the tokenizer, or None."""
    found = (tokenizer.token_to_id(token) for token in END_OF_TEXT_NAMES)
    return next((int(token_id) for token_id in found if token_id is not None), None)


def num_token_ids(tokenizer: Tokenizer) -> int:
    """Return the number of ids, including unused ones: the rows of the embedding."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
