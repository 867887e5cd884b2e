"""A mixture: training sequences of several sources, each at its share, in one vocabulary.

A mixture is a view: the position of a sequence alone decides its source and its number there. A
text gives the sequences that it gives alone, a depth task those that it gives alone with a marker
in front. The folder of a mixture holds a tokenizer for all sources and the names of the texts'
folders beside it, so mixtures at other shares or with other tasks read the same tokens.

Symbols of depth tasks are tokens after those of the text. A text that happens to hold the letters
of a symbol must not turn into it; so texts are tokenized by the tokenizer without the symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from tokenizers import Tokenizer

from orchestrator.data.depth import GENERATOR_VERSION, DepthStore, content_number
from orchestrator.data.depth_tasks import DepthTasks
from orchestrator.data.depth_tokenizer import add_symbols, check_words, depth_tokenizer
from orchestrator.data.order import SourceOrder
from orchestrator.data.store import (
    PreparedData,
    SplitCounts,
    TokenStore,
    finish_folder,
    is_complete,
    open_tokens,
    read_manifest,
    verify_data,
)
from orchestrator.models.tokenizer import num_token_ids
from orchestrator.settings import DataSettings
from orchestrator.settings.data import source_order
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import new_folder
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from iiet.model.batch import Batch

MIXTURE_VERSION = 1
"""Increase it if the same settings and texts give other sequences."""


@dataclass(frozen=True)
class MixtureStore(PreparedData):
    """A prepared mixture."""

    sources: Mapping[str, TokenStore | DepthStore]
    """Each source by itself, in the order of `order`. A depth task is a source of its own."""
    order: SourceOrder

    @property
    def parts(self) -> tuple[PreparedData, ...]:
        return tuple(self.sources.values())

    @property
    def texts(self) -> list[TokenStore]:
        """The text sources."""
        return [data for data in self.sources.values() if isinstance(data, TokenStore)]

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share of each source, as its sequences are counted."""
        total = sum(self.order.counts)
        counts = zip(self.sources, self.order.counts, strict=True)
        return {name: count / total for name, count in counts}

    @property
    def profile(self) -> dict[str, Any]:
        profile: dict[str, Any] = {"source": "mixture"}
        for name, data in self.sources.items():
            profile[f"{name}_share"] = self.shares[name]
            if isinstance(data, TokenStore):
                for size in ("train_tokens", "validation_tokens"):
                    profile[f"{name}_{size}"] = data.profile[size]
            else:
                profile |= {
                    entry: value
                    for entry, value in data.profile.items()
                    if entry.startswith("chance_")
                }
        return {**profile, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> int | None:
        # All sources are held out at their shares. So the text that has held out least for its
        # share limits the whole.
        limits = [
            int(data.num_validation_tokens / self.shares[name])
            for name, data in self.sources.items()
            if data.num_validation_tokens is not None
        ]
        return min(limits, default=None)

    def describe(self) -> str:
        parts: list[str] = []
        for name, data in self.sources.items():
            if isinstance(data, TokenStore):
                text = f"{name} ({data.describe()})"
            else:
                text = ", ".join(task.name_with_chance for task in data.tasks)
            parts.append(f"{100 * self.shares[name]:.3g}% {text}")
        return ", ".join(parts)

    def check_length(self, context_length: int) -> None:
        for data in self.sources.values():
            data.check_length(context_length)

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        import torch

        from iiet.model.batch import Batch

        shape = (len(positions), context_length)
        ids = torch.empty(shape, dtype=torch.int64)
        targets = torch.empty_like(ids)
        sources = torch.empty_like(ids)
        has_prompts = any(text.train_targets is not None for text in self.texts)
        mask = torch.ones(shape, dtype=torch.bool) if has_prompts else None
        parts = self.order.split(positions, content_number("mixture", seed))
        for source, (data, (is_of_source, numbers)) in enumerate(
            zip(self.sources.values(), parts, strict=True)
        ):
            rows = torch.from_numpy(is_of_source)
            part = data.sequences(numbers, context_length=context_length, seed=seed)
            ids[rows] = part.input_ids
            targets[rows] = part.targets
            sources[rows] = source
            if mask is not None and part.mask is not None:
                mask[rows] = part.mask
        # A teacher has nothing to say about the padding of depth tasks.
        is_text = len(self.texts) == len(self.sources)
        return Batch(ids, targets, mask, is_text=is_text, sources=sources)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, source by source, at the shares of training.

        Each source gives at least one sequence, and each batch is of one source.
        """
        import torch

        limit = self.num_validation_tokens
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        for source, (name, data) in enumerate(self.sources.items()):
            num_sequences = max(1, round(num_tokens / context_length * self.shares[name]))
            batches = data.validation_batches(
                context_length=context_length,
                num_tokens=num_sequences * context_length,
                batch_size=batch_size,
            )
            for batch in batches:
                yield replace(batch, sources=torch.full_like(batch.input_ids, source))


def mixture_tokenizer(settings: DataSettings, text_tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of all sources of a mixture.

    Args:
        text_tokenizer: The tokenizer of its texts; None if it has no texts.

    Raises:
        UserError: If the tokenizer of the texts has the symbols of the tasks, or a word of them is
            not one token.
    """
    if text_tokenizer is None:
        return depth_tokenizer(settings)
    tasks = DepthTasks.of(settings)
    if tasks.in_words:
        check_words(tasks, text_tokenizer, settings.tokenizer)
    symbols = tasks.added_tokens
    # A copy: texts are tokenized without the symbols.
    tokenizer = Tokenizer.from_str(text_tokenizer.to_str())
    add_symbols(tokenizer, symbols)
    first_new_id = num_token_ids(text_tokenizer)
    for symbol in symbols:
        if (tokenizer.token_to_id(symbol) or 0) < first_new_id:
            raise UserError(
                f"data.tokenizer={settings.tokenizer} cannot get {symbol} as a new token, because "
                "it has this token or unused ids; the symbols of depth tasks need ids after those "
                "of the text; choose another tokenizer"
            )
    return tokenizer


def write_mixture(
    settings: DataSettings, parent: Path, texts: Mapping[str, Path], tokenizer: Tokenizer
) -> Path:
    """Write the folder of a mixture, unless it exists; its texts are written.

    Args:
        texts: Text source -> its folder.
        tokenizer: The tokenizer of all sources, from `mixture_tokenizer`.
    """
    folder_names = {source: path.name for source, path in texts.items()}
    fingerprint = content_key(
        "mixture",
        MIXTURE_VERSION,
        GENERATOR_VERSION,
        dict(zip(source_order(settings.shares), _order_of(settings).counts, strict=True)),
        folder_names,
        settings.tasks.to_key(),
        tokenizer.to_str(),
    )
    folder = parent / fingerprint
    if not is_complete(folder):
        train = SplitCounts()
        validation = SplitCounts()
        for manifest in map(read_manifest, texts.values()):
            train += manifest.train
            validation += manifest.validation
        with new_folder(folder) as temporary:
            finish_folder(
                temporary,
                fingerprint,
                settings.read_by_source(),
                tokenizer,
                train=train,
                validation=validation,
                texts=folder_names,
            )
    return folder


def _order_of(settings: DataSettings) -> SourceOrder:
    shares = settings.shares
    return SourceOrder.of_shares([shares[name] for name in source_order(shares)])


def open_data(folder: Path | str) -> PreparedData:
    """Open a folder of any prepared data and verify its files, see `verify_data`.

    Raises:
        UserError: If the folder is missing or damaged, or the package of a mixture's source is not
            installed.
    """
    folder = Path(folder)
    manifest = verify_data(folder)
    if manifest.settings.get("source") not in ("depth", "mixture"):
        return open_tokens(folder)
    try:
        settings = DataSettings.model_validate(manifest.settings)
    except ValidationError as error:  # The package of a text's source is not installed.
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"cannot read the data in {folder}: {reason}") from None
    tasks = DepthTasks.of(settings)
    if settings.source == "depth":
        return DepthStore(folder, manifest, tasks)
    text_folders = manifest.text_folders(folder)
    tasks_by_name = {task.name: task for task in tasks.tasks}
    sources: dict[str, TokenStore | DepthStore] = {}
    for name in source_order(settings.shares):
        if name in text_folders:
            sources[name] = open_tokens(text_folders[name])
        else:
            one_task = tasks._replace(tasks=(tasks_by_name[name],))
            sources[name] = DepthStore(folder, manifest, one_task)
    return MixtureStore(folder, manifest, sources, _order_of(settings))


@lru_cache(maxsize=64)
def describe_data(folder: Path | str) -> tuple[str, str, dict[str, Any]]:
    """Return name, fingerprint and profile of a folder of prepared data, for a tracked run.

    Raises:
        UserError: As `open_data`.
    """
    data = open_data(folder)
    profile = data.profile
    name = (
        profile.get("tasks")  # Of depth tasks alone.
        or ", ".join(data.source_names)  # Of a mixture.
        or profile.get("hub_name")
        or profile["source"]
    )
    return name, data.fingerprint, profile
