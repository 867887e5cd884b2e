"""The tokenizer of depth tasks: one of symbols alone, or that of a text, some words of which are
the symbols."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models

from orchestrator.data.depth_tasks import DepthTasks
from orchestrator.models.tokenizer import END_OF_TEXT, load_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.workspace.errors import UserError


def symbol_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that knows nothing but symbols and the end of a text, id 0."""
    tokenizer = Tokenizer(models.WordLevel({END_OF_TEXT: 0}))
    tokenizer.add_special_tokens([END_OF_TEXT])
    add_symbols(tokenizer, texts)
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def depth_tokenizer(settings: DataSettings) -> Tokenizer:
    """Return the tokenizer of depth tasks without text beside them.

    Raises:
        UserError: If words are wanted, and no tokenizer has them as tokens.
    """
    tasks = DepthTasks.of(settings)
    if not tasks.in_words:
        return symbol_tokenizer(tasks.vocabulary)
    check_names_tokenizer(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    check_words(tasks, tokenizer, settings.tokenizer)
    return tokenizer


def check_words(tasks: DepthTasks, tokenizer: Tokenizer, shown: str) -> None:
    """Check that each word of tasks in words is one token.

    Args:
        tasks: The tasks.
        tokenizer: The tokenizer of a text.
        shown: The value of `data.tokenizer`, for the message.

    Raises:
        UserError: If a word has several tokens.
    """
    for word in tasks.vocabulary:
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        if len(ids) != 1:
            raise UserError(
                f"data.depth.symbols=words: for data.tokenizer={shown} the word "
                f"{word.strip()}, with a space before it, is {len(ids)} tokens instead of one; "
                "take another tokenizer, fewer data.depth.num_symbols, or letters"
            )


def check_names_tokenizer(settings: DataSettings) -> None:
    """Raise a `UserError` if words are wanted of a tokenizer for which there is no text."""
    if settings.depth.in_words and settings.tokenizer == "train":
        raise UserError(
            "data.depth.symbols=words: words are tokens of a text's tokenizer, and there is no "
            "text to train one; set data.tokenizer, or train from a source, whose tokenizer is "
            "taken"
        )


def add_symbols(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Add symbols to a tokenizer, after its own tokens. No text is ever merged with a symbol."""
    # Unnormalized: a symbol is recognized in the text as it is, whatever else is done to the text.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
