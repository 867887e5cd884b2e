"""A mixture: training sequences of several sources, each at its share, in one vocabulary.

The position of a sequence alone decides its source and its number there (`shares.py`). A text gives
the sequences that it gives alone, a depth task those that it gives alone with a marker in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from iiet.batch import Batch
from orchestrator.data.depth.store import DepthStore, content_number
from orchestrator.data.depth.task import DepthTask
from orchestrator.data.depth.tasks import make_tasks
from orchestrator.data.prepared import Manifest, PreparedData
from orchestrator.data.shares import SourceOrder
from orchestrator.data.token_store import TokenStore, open_tokens
from orchestrator.settings import DataSettings
from orchestrator.settings.data import source_order
from orchestrator.workspace.errors import UserError

_SIZES = ("train_tokens", "validation_tokens")


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
        shown: dict[str, Any] = {"source": "mixture"}
        for name, data in self.sources.items():
            shown[f"{name}_share"] = self.shares[name]
            known = data.profile
            if isinstance(data, TokenStore):
                shown |= {f"{name}_{size}": known[size] for size in _SIZES}
            else:
                shown |= {key: n for key, n in known.items() if key.startswith("chance_")}
        return {**shown, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> int | None:
        # The text of which least is held out, measured by its share, limits all.
        limits = [
            int(data.num_validation_tokens / self.shares[name])
            for name, data in self.sources.items()
            if data.num_validation_tokens is not None
        ]
        return min(limits, default=None)

    def check_length(self, context_length: int) -> None:
        for data in self.sources.values():
            data.check_length(context_length)

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        shape = (len(positions), context_length)
        ids, targets, sources = (torch.empty(shape, dtype=torch.int64) for _ in range(3))
        parts = self.order.split(positions, content_number("mixture", seed))
        for number, (data, (own, numbers)) in enumerate(
            zip(self.sources.values(), parts, strict=True)
        ):
            rows = torch.from_numpy(own)
            part = data.sequences(numbers, context_length=context_length, seed=seed)
            ids[rows], targets[rows], sources[rows] = part.input_ids, part.targets, number
        # A teacher has nothing to say about the padding of depth tasks.
        is_text = len(self.texts) == len(self.sources)
        return Batch(ids, targets, is_text=is_text, sources=sources)

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, source by source, at the shares of training.

        Each source gives at least one sequence, and each batch is of one source.
        """
        limit = self.num_validation_tokens
        wanted = (num_tokens if limit is None else min(num_tokens, limit)) / context_length
        for number, (name, data) in enumerate(self.sources.items()):
            own = max(1, round(wanted * self.shares[name]))
            for batch in data.validation_batches(
                context_length=context_length,
                num_tokens=own * context_length,
                batch_size=batch_size,
            ):
                yield replace(batch, sources=torch.full_like(batch.input_ids, number))


def open_mixture(folder: Path, manifest: Manifest) -> MixtureStore:
    """Open a folder that holds a mixture.

    Raises:
        UserError: If the tokens of a text are missing, incomplete or damaged, or the package of a
            text's source is not installed.
    """
    try:
        settings = DataSettings.model_validate(manifest.settings)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"cannot read the mixture in {folder}: {reason}") from None
    folders = manifest.text_folders(folder)
    tasks = {task.name: task for task in mixture_tasks(settings)}
    sources = {
        name: open_tokens(folders[name])
        if name in folders
        else DepthStore(folder, manifest, (tasks[name],), has_markers=True)
        for name in source_order(settings.shares)
    }
    return MixtureStore(folder, manifest, sources, order_of(settings))


def order_of(settings: DataSettings) -> SourceOrder:
    """Return the order of a mixture's sources."""
    shares = settings.shares
    return SourceOrder.of_shares([shares[name] for name in source_order(shares)])


def mixture_tasks(settings: DataSettings) -> tuple[DepthTask, ...]:
    """Return the depth tasks of a mixture; a `UserError` if a sequence cannot hold its task."""
    return make_tasks(settings.tasks) if settings.tasks.tasks else ()
