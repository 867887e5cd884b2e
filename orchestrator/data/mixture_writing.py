"""Write the folder of a mixture: a tokenizer for all sources, and the names of the texts' folders.

The tokens of each text are a folder of their own beside it: the one that the text alone gives with
this tokenizer. So mixtures at other shares or with other tasks read the same tokens, and an
interrupted preparation resumes with the text that it was at.

Symbols of depth tasks are tokens after those of the text. A text that happens to hold the letters
of a symbol must not turn into it; so texts are tokenized by the tokenizer without the symbols. The
folder of the mixture, and the checkpoints of its models, hold the tokenizer with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer

from orchestrator.data.corpus import read_documents
from orchestrator.data.depth.store import GENERATOR_VERSION
from orchestrator.data.depth.tasks import add_symbols, symbol_tokenizer, vocabulary
from orchestrator.data.mixture import mixture_tasks, order_of
from orchestrator.data.prepared import (
    SplitCounts,
    is_complete,
    read_manifest,
    verify_data,
    write_without_tokens,
)
from orchestrator.data.source_index import MIXTURE_VERSION, find_folder, source_key, store_folder
from orchestrator.data.text_writing import write_text
from orchestrator.data.tokenization import (
    TOKENIZER_CHARACTERS,
    training_texts,
)
from orchestrator.models.tokenizer import load_tokenizer, num_token_ids, train_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.settings.data import source_order
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key


def write_mixture(settings: DataSettings, parent: Path, key: str, progress: Progress) -> Path:
    """Write the folders of a mixture and of its texts, unless they exist, under the mixture's key.

    Raises:
        UserError: If a text is missing, empty or unreadable, or its tokenizer has the symbols.
    """
    texts: dict[str, Path] = {}
    tokenizer = None
    if settings.texts:
        tokenizer = _text_tokenizer(settings, progress)
        for name, alone in settings.texts.items():
            text_key = source_key(alone, "mixture", tokenizer.to_str())
            found = find_folder(text_key, parent)
            texts[name] = found or write_text(alone, parent, text_key, progress, tokenizer)
    whole = whole_tokenizer(settings, tokenizer)
    fingerprint = content_key(
        "mixture",
        MIXTURE_VERSION,
        GENERATOR_VERSION,
        dict(zip(source_order(settings.shares), order_of(settings).counts, strict=True)),
        {name: path.name for name, path in texts.items()},
        settings.tasks.model_dump(mode="json"),
        whole.to_str(),
    )
    folder = parent / fingerprint
    if not is_complete(folder):
        counts = [read_manifest(path) for path in texts.values()]
        write_without_tokens(
            folder,
            settings.read_by_source(),
            whole,
            train=_total([manifest.train for manifest in counts]),
            validation=_total([manifest.validation for manifest in counts]),
            texts={name: path.name for name, path in texts.items()},
        )
    verify_data(folder, remember=True)
    store_folder(key, folder)
    return folder


def whole_tokenizer(settings: DataSettings, text: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of all sources of a mixture.

    Args:
        text: The tokenizer of its texts; None if it has none.

    Raises:
        UserError: If the tokenizer of the texts has the symbols of the tasks.
    """
    symbols = vocabulary(mixture_tasks(settings), with_markers=True)
    if text is None:
        return symbol_tokenizer(symbols)
    whole = Tokenizer.from_str(text.to_str())
    add_symbols(whole, symbols)
    first = num_token_ids(text)
    for symbol in symbols:
        if (whole.token_to_id(symbol) or 0) < first:
            raise UserError(
                f"data.tokenizer={settings.tokenizer} cannot get {symbol} as a new token, because "
                "it has this token or unused ids; the symbols of depth tasks need ids after those "
                "of the text; choose another tokenizer"
            )
    return whole


def _text_tokenizer(settings: DataSettings, progress: Progress) -> Tokenizer:
    if settings.tokenizer != "train":
        return load_tokenizer(settings.tokenizer)
    # A long text must not leave nothing for the others to read.
    total = sum(settings.shares[name] for name in settings.texts)
    texts: list[Iterator[str]] = [
        training_texts(
            read_documents(alone, progress),
            alone,
            num_characters=int(TOKENIZER_CHARACTERS * settings.shares[name] / total),
        )
        for name, alone in settings.texts.items()
    ]
    tokenizer = train_tokenizer(chain.from_iterable(texts), settings.vocab_size)
    progress.advance(0, "the tokenizer is trained")
    return tokenizer


def _total(counts: list[SplitCounts]) -> SplitCounts:
    units = SplitCounts.model_fields
    return SplitCounts(**{unit: sum(getattr(one, unit) for one in counts) for unit in units})
