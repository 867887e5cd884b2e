"""Prepared depth tasks: a tokenizer and the settings. Sequences are generated when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from iiet.batch import NO_TARGET, Batch
from orchestrator.data.depth.task import NO_ANSWER, DepthTask
from orchestrator.data.depth.tasks import make_tasks, marker, symbol_tokenizer, vocabulary
from orchestrator.data.keyed_random import random_bits
from orchestrator.data.prepared import (
    Manifest,
    PreparedData,
    SplitCounts,
    is_complete,
    write_without_tokens,
)
from orchestrator.data.shares import SourceOrder
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.settings.data import DepthSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key

GENERATOR_VERSION = 1
"""Increase it if the same settings give other sequences."""
_STREAMS = {"train": 1, "validation": 2, "test": 3}
_ASKING = 4
"""Stream of the random numbers that choose the asked positions."""
_SEQUENCES_PER_ROUND = 256
"""Sequences that are generated together for test items."""


class DepthItem(NamedTuple):
    """One question of a test: the texts of what a model reads and must answer."""

    context: str
    answer: str


@dataclass(frozen=True)
class DepthStore(PreparedData):
    """Prepared depth tasks, or those of a mixture."""

    tasks: tuple[DepthTask, ...]
    has_markers: bool
    """Whether each sequence begins with the token of its task."""

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return longest_sequence(self.tasks, with_markers=self.has_markers)

    @property
    def profile(self) -> dict[str, Any]:
        chances = {f"chance_{task.name}": task.chance for task in self.tasks}
        names = ", ".join(task.name for task in self.tasks)
        return {"source": "depth", "tasks": names, **chances, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> None:
        return None

    def check_length(self, context_length: int) -> None:
        check_depth_length(self.sequence_length, context_length)

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        return self._sequences(positions, context_length, "train", seed)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        wanted = max(1, num_tokens // context_length)
        for first in range(0, wanted, batch_size):
            numbers = np.arange(first, min(first + batch_size, wanted), dtype=np.int64)
            yield self._sequences(numbers, context_length, "validation")

    def items(self, task: DepthTask, num_items: int) -> Iterator[DepthItem]:
        """Return questions of a task; no stream of training or validation holds their sequences."""
        rounds = map(partial(self._round_of_items, task), count())
        return islice(chain.from_iterable(rounds), num_items)

    def _round_of_items(self, task: DepthTask, number: int) -> Iterator[DepthItem]:
        first = number * _SEQUENCES_PER_ROUND
        numbers = np.arange(first, first + _SEQUENCES_PER_ROUND, dtype=np.int64)
        symbols, answers = task.generate(self._bits(task, numbers, "test"))
        asking = random_bits(self._key(task, "test", seed=_ASKING), numbers, 1)[:, 0]
        texts, start = task.symbols, marker(task) if self.has_markers else ""
        for row, place in enumerate(task.asked_positions(answers, asking)):
            if place != NO_ANSWER:
                context = "".join(texts[symbol] for symbol in symbols[row, : place + 1])
                yield DepthItem(start + context, texts[answers[row, place]])

    def _sequences(
        self,
        positions: np.ndarray,
        context_length: int,
        stream: Literal["train", "validation"],
        seed: int = 0,
    ) -> Batch:
        ids = np.full((len(positions), context_length), self.manifest.end_of_text_id)
        targets = np.full_like(ids, NO_TARGET)
        order = SourceOrder.of_shares([1.0] * len(self.tasks))
        parts = order.split(positions, content_number("order", stream, seed))
        for task, (own, numbers) in zip(self.tasks, parts, strict=True):
            symbols, answers = task.generate(self._bits(task, numbers, stream, seed))
            known = self._token_ids[task.name]
            first = int(self.has_markers)
            end = first + task.length
            if self.has_markers:
                ids[own, 0] = self._ids[marker(task)]
            ids[own, first:end] = known[symbols]
            targets[own, first:end] = np.where(answers == NO_ANSWER, NO_TARGET, known[answers])
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))

    def _bits(self, task: DepthTask, numbers: np.ndarray, stream: str, seed: int = 0) -> np.ndarray:
        return random_bits(self._key(task, stream, seed), numbers, task.num_random)

    def _key(self, task: DepthTask, stream: str, seed: int) -> int:
        return content_number(GENERATOR_VERSION, task.name, _STREAMS[stream], seed)

    @cached_property
    def _token_ids(self) -> dict[str, np.ndarray]:
        # Name of a task -> the token of each of its symbols.
        return {
            task.name: np.array([self._ids[symbol] for symbol in task.symbols])
            for task in self.tasks
        }

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        ids: dict[str, int] = load_tokenizer(self.tokenizer_path).get_vocab(with_added_tokens=True)
        return ids


def content_number(*parts: str | int) -> int:
    """Return a hash of values as a number of 64 bits."""
    return int(content_key(*parts)[:16], 16)


def longest_sequence(tasks: tuple[DepthTask, ...], *, with_markers: bool) -> int:
    """Return the tokens of the longest sequence of some tasks; 0 if there are none."""
    return max((task.length + with_markers for task in tasks), default=0)


def check_depth_length(sequence_length: int, context_length: int) -> None:
    """Raise a `UserError` if a model's context is shorter than the longest sequence."""
    if sequence_length > context_length:
        raise UserError(
            f"the depth tasks have sequences of {sequence_length} tokens, more than "
            f"model.context_length={context_length}; set it to {sequence_length}, or make the "
            "tasks shorter"
        )


def open_depth(folder: Path, manifest: Manifest) -> DepthStore:
    """Open a folder of nothing but depth tasks."""
    tasks = make_tasks(DepthSettings.model_validate(manifest.settings["depth"]))
    return DepthStore(folder, manifest, tasks, has_markers=len(tasks) > 1)


def depth_tokenizer(settings: DepthSettings) -> Tokenizer:
    """Return the tokenizer of data that hold nothing but depth tasks."""
    tasks = make_tasks(settings)
    return symbol_tokenizer(vocabulary(tasks, with_markers=len(tasks) > 1))


def depth_folder(settings: DataSettings, parent: Path) -> Path:
    """Return the folder in `parent` of prepared depth tasks, whether it exists or not.

    Raises:
        UserError: If the settings name no tasks, or a sequence cannot hold its task.
    """
    tokenizer = depth_tokenizer(settings.depth).to_str()
    return parent / content_key(
        "depth", GENERATOR_VERSION, settings.depth.model_dump(mode="json"), tokenizer
    )


def write_depth(settings: DataSettings, parent: Path) -> Path:
    """Write the folder of depth tasks, unless it exists; it holds no sequences."""
    folder = depth_folder(settings, parent)
    if is_complete(folder):
        return folder
    return write_without_tokens(
        folder,
        settings.read_by_source(),
        depth_tokenizer(settings.depth),
        train=SplitCounts(),
        validation=SplitCounts(),
    )
