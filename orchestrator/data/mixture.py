"""A mixture: training sequences of several components, each at its share, in one vocabulary.

A component is a text or a depth task. A mixture stores no sequences: the position of a sequence
determines its component and its number there. A text has the same sequences as by itself; those of
a depth task begin with a marker. The folder of a mixture holds a tokenizer for all components and
the names of the texts' folders, so mixtures at other shares or with other tasks share the tokens.

Symbols of depth tasks are tokens after those of the text. Texts are tokenized without them, so that
a text which happens to contain the characters of a symbol does not get its token.
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
from orchestrator.data.order import ComponentOrder
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
from orchestrator.settings.data import component_order
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

    components: Mapping[str, TokenStore | DepthStore]
    """Component -> its data, in the order of `order`."""
    order: ComponentOrder

    @property
    def parts(self) -> tuple[PreparedData, ...]:
        return tuple(self.components.values())

    @property
    def texts(self) -> list[TokenStore]:
        """The components that are texts."""
        return [data for data in self.components.values() if isinstance(data, TokenStore)]

    @property
    def component_names(self) -> tuple[str, ...]:
        return tuple(self.components)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Component -> its share of the sequences."""
        total = sum(self.order.counts)
        counts = zip(self.components, self.order.counts, strict=True)
        return {name: count / total for name, count in counts}

    @property
    def profile(self) -> dict[str, Any]:
        profile: dict[str, Any] = {"source": "mixture"}
        for name, data in self.components.items():
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
        # Held-out sequences have the shares of training. So the text with the fewest held-out
        # tokens for its share limits the whole.
        limits = [
            int(data.num_validation_tokens / self.shares[name])
            for name, data in self.components.items()
            if data.num_validation_tokens is not None
        ]
        return min(limits, default=None)

    def describe(self) -> str:
        parts: list[str] = []
        for name, data in self.components.items():
            if isinstance(data, TokenStore):
                text = f"{name} ({data.describe()})"
            else:
                text = ", ".join(task.name_with_chance for task in data.tasks)
            parts.append(f"{100 * self.shares[name]:.3g}% {text}")
        return ", ".join(parts)

    def check_length(self, context_length: int) -> None:
        for data in self.components.values():
            data.check_length(context_length)

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        import torch

        from iiet.model.batch import Batch

        shape = (len(positions), context_length)
        ids = torch.empty(shape, dtype=torch.int64)
        targets = torch.empty_like(ids)
        component_numbers = torch.empty_like(ids)
        has_prompts = any(text.train_targets is not None for text in self.texts)
        mask = torch.ones(shape, dtype=torch.bool) if has_prompts else None
        parts = self.order.split(positions, content_number("mixture", seed))
        for component, (data, (is_of_component, numbers)) in enumerate(
            zip(self.components.values(), parts, strict=True)
        ):
            rows = torch.from_numpy(is_of_component)
            part = data.sequences(numbers, context_length=context_length, seed=seed)
            ids[rows] = part.input_ids
            targets[rows] = part.targets
            component_numbers[rows] = component
            if mask is not None and part.mask is not None:
                mask[rows] = part.mask
        # The padding of depth tasks has no predictions to learn from a teacher.
        is_text = len(self.texts) == len(self.components)
        return Batch(ids, targets, mask, is_text=is_text, component_numbers=component_numbers)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, component by component, at the shares of training.

        Each component has at least one sequence, and each batch is of one component.
        """
        import torch

        limit = self.num_validation_tokens
        if limit is not None:
            num_tokens = min(num_tokens, limit)
        for component, (name, data) in enumerate(self.components.items()):
            num_sequences = max(1, round(num_tokens / context_length * self.shares[name]))
            batches = data.validation_batches(
                context_length=context_length,
                num_tokens=num_sequences * context_length,
                batch_size=batch_size,
            )
            for batch in batches:
                yield replace(batch, component_numbers=torch.full_like(batch.input_ids, component))


def mixture_tokenizer(settings: DataSettings, text_tokenizer: Tokenizer | None) -> Tokenizer:
    """Return the tokenizer of all components of a mixture.

    Args:
        text_tokenizer: The tokenizer of its texts; None without texts.

    Raises:
        UserError: If the tokenizer of the texts already has the symbols of the tasks, or one of
            their words is not one token.
    """
    if text_tokenizer is None:
        return depth_tokenizer(settings)
    tasks = DepthTasks.of(settings)
    if tasks.in_words:
        check_words(tasks, text_tokenizer, settings.tokenizer)
    symbols = tasks.added_tokens
    # Texts are tokenized without the symbols, so the symbols are added to another instance.
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
        texts: Name of a text -> its folder.
        tokenizer: The tokenizer of all components, from `mixture_tokenizer`.
    """
    folder_names = {source: path.name for source, path in texts.items()}
    fingerprint = content_key(
        "mixture",
        MIXTURE_VERSION,
        GENERATOR_VERSION,
        dict(zip(component_order(settings.shares), _order_of(settings).counts, strict=True)),
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


def _order_of(settings: DataSettings) -> ComponentOrder:
    shares = settings.shares
    return ComponentOrder.of_shares([shares[name] for name in component_order(shares)])


def open_data(folder: Path | str) -> PreparedData:
    """Open a folder of any prepared data and verify its files, see `verify_data`.

    Raises:
        UserError: If the folder is missing or damaged, or a package that adds one of its data
            sources is not installed.
    """
    folder = Path(folder)
    manifest = verify_data(folder)
    if manifest.settings.get("source") not in ("depth", "mixture"):
        return open_tokens(folder)
    try:
        settings = DataSettings.model_validate(manifest.settings)
    except ValidationError as error:  # A package that adds the data source is not installed.
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"cannot read the data in {folder}: {reason}") from None
    tasks = DepthTasks.of(settings)
    if settings.source == "depth":
        return DepthStore(folder, manifest, tasks)
    text_folders = manifest.text_folders(folder)
    tasks_by_name = {task.name: task for task in tasks.tasks}
    components: dict[str, TokenStore | DepthStore] = {}
    for name in component_order(settings.shares):
        if name in text_folders:
            components[name] = open_tokens(text_folders[name])
        else:
            one_task = tasks._replace(tasks=(tasks_by_name[name],))
            components[name] = DepthStore(folder, manifest, one_task)
    return MixtureStore(folder, manifest, components, _order_of(settings))


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
        or ", ".join(data.component_names)  # Of a mixture.
        or profile.get("hub_name")
        or profile["source"]
    )
    return name, data.fingerprint, profile
