"""Prepared depth tasks: batches for training, and questions for tests.

A sequence is generated from a seed and a position, so nothing is stored and no sequence repeats.
The folder of the data has only the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.data.depth_tasks import NO_ANSWER, DepthTask, DepthTasks, Sequences
from orchestrator.data.depth_tokenizer import depth_tokenizer
from orchestrator.data.order import ComponentOrder, random_bits
from orchestrator.data.store import PreparedData, finish_folder, is_complete
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings
from orchestrator.workspace.files import new_folder
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from iiet.model.batch import Batch

GENERATOR_VERSION = 1
"""Increase it if the same settings give other sequences."""
_STREAMS = {"train": 1, "validation": 2, "test": 3}
"""Part of the random generator's keys, so that no two streams share a sequence."""
_POSITION_SEED = 4
"""Seed for choosing the positions at which a test asks."""
_SEQUENCES_PER_ROUND = 256
"""Sequences that are generated together for test items."""


class DepthItem(NamedTuple):
    """One question of a test: the text that a model reads, and the expected answer."""

    context: str
    answer: str


@dataclass(frozen=True)
class DepthStore(PreparedData):
    """Prepared depth tasks, alone or of a mixture. Their folder holds a tokenizer; sequences are
    generated."""

    depth_tasks: DepthTasks

    @property
    def tasks(self) -> tuple[DepthTask, ...]:
        """The tasks whose sequences these data hold."""
        return self.depth_tasks.tasks

    @property
    def profile(self) -> dict[str, Any]:
        chances = {f"chance_{task.name}": task.chance for task in self.tasks}
        names = ", ".join(task.name for task in self.tasks)
        return {"source": "depth", "tasks": names, **chances, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> None:
        return None

    def describe(self) -> str:
        tasks = ", ".join(task.name_with_chance for task in self.tasks)
        return f"{tasks}, sequences of {self.depth_tasks.sequence_length} tokens"

    def check_length(self, context_length: int) -> None:
        self.depth_tasks.check_length(context_length)

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        return self._sequences(positions, context_length, "train", seed)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        num_sequences = max(1, num_tokens // context_length)
        for first in range(0, num_sequences, batch_size):
            numbers = np.arange(first, min(first + batch_size, num_sequences), dtype=np.int64)
            yield self._sequences(numbers, context_length, "validation", 0)

    def items(self, task: DepthTask, num_items: int) -> Iterator[DepthItem]:
        """Yield questions of a task; no training or validation has their sequences."""
        rounds = (self._round_of_items(task, first) for first in count(step=_SEQUENCES_PER_ROUND))
        return islice(chain.from_iterable(rounds), num_items)

    def _round_of_items(self, task: DepthTask, first: int) -> Iterator[DepthItem]:
        numbers = np.arange(first, first + _SEQUENCES_PER_ROUND, dtype=np.int64)
        symbols, answers = _generate(task, numbers, "test", 0)
        position_bits = random_bits(_key(task, "test", seed=_POSITION_SEED), numbers, 1)[:, 0]
        marker = task.marker if self.depth_tasks.has_markers else ""
        for row, position in enumerate(task.asked_positions(answers, position_bits)):
            if position == NO_ANSWER:
                continue
            context = "".join(task.symbols[symbol] for symbol in symbols[row, : position + 1])
            yield DepthItem(marker + context, task.symbols[answers[row, position]])

    def _sequences(
        self, positions: np.ndarray, context_length: int, stream: str, seed: int
    ) -> Batch:
        import torch

        from iiet.model.batch import NO_TARGET, Batch

        # Sequences are padded with the end-of-text token, which is not a target.
        ids = np.full((len(positions), context_length), self.manifest.end_of_text_id)
        targets = np.full_like(ids, NO_TARGET)
        # Each task has the same share.
        order = ComponentOrder.of_shares([1.0] * len(self.tasks))
        parts = order.split(positions, content_number("order", stream, seed))
        for task, (rows, numbers) in zip(self.tasks, parts, strict=True):
            symbols, answers = _generate(task, numbers, stream, seed)
            symbol_ids = np.array([self._ids[symbol] for symbol in task.symbols])
            first = 0
            if self.depth_tasks.has_markers:
                first = 1
                ids[rows, 0] = self._ids[task.marker]
            end = first + task.length
            ids[rows, first:end] = symbol_ids[symbols]
            # Not shifted: a position's answer is predicted at the same position.
            targets[rows, first:end] = np.where(
                answers == NO_ANSWER, NO_TARGET, symbol_ids[answers]
            )
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets))

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        """Text of a symbol or marker -> its id."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        if self.depth_tasks.in_words:
            return {
                word: tokenizer.encode(word, add_special_tokens=False).ids[0]
                for word in self.depth_tasks.vocabulary
            }
        ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        return ids


def _generate(task: DepthTask, numbers: np.ndarray, stream: str, seed: int) -> Sequences:
    return task.generate(random_bits(_key(task, stream, seed), numbers, task.num_random))


def _key(task: DepthTask, stream: str, seed: int) -> int:
    return content_number(GENERATOR_VERSION, task.name, _STREAMS[stream], seed)


def content_number(*parts: str | int) -> int:
    """Return a hash of values as a number of 64 bits."""
    return int(content_key(*parts)[:16], 16)


def depth_folder(settings: DataSettings, parent: Path) -> Path:
    """Return the folder in `parent` of prepared depth tasks, whether it exists or not."""
    tokenizer = depth_tokenizer(settings).to_str()
    return parent / content_key("depth", GENERATOR_VERSION, settings.depth.to_key(), tokenizer)


def write_depth(settings: DataSettings, parent: Path) -> Path:
    """Write the folder of depth tasks, unless it exists; it holds no sequences."""
    folder = depth_folder(settings, parent)
    if not is_complete(folder):
        tokenizer = depth_tokenizer(settings)
        with new_folder(folder) as temporary:
            finish_folder(temporary, folder.name, settings.read_by_source(), tokenizer)
    return folder
