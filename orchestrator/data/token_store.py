"""Prepared text: two flat files of integers, training and held-out, and the held-out documents.

The fingerprint is a hash of every document, its side of the split and the tokenizer.
`tokenization.py` writes these folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from iiet.batch import Batch
from orchestrator.data.batches import WindowOrder, check_text_length, gather, validation_batches
from orchestrator.data.prepared import (
    MANIFEST_NAME,
    Manifest,
    PreparedData,
    check_files,
    read_manifest,
    remedy_of,
)
from orchestrator.workspace.files import damage_as_user_error


@dataclass(frozen=True)
class TokenStore(PreparedData):
    """Prepared text; the arrays are memory maps."""

    train: np.ndarray
    """Flat training tokens, each document ends with the end-of-text token."""
    validation: np.ndarray
    """Flat validation tokens, in the same form."""

    @property
    def validation_documents_path(self) -> Path:
        """JSON lines of the held-out documents: `text`, `source`."""
        return self.folder / "validation.jsonl"

    @property
    def profile(self) -> dict[str, Any]:
        settings = self.manifest.settings
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        sides = {"train": self.manifest.train, "validation": self.manifest.validation}
        sizes = {f"{side}_{unit}": n for side, counts in sides.items() for unit, n in counts}
        return {**origin, **sizes, "vocab_size": self.vocab_size}

    @property
    def num_validation_tokens(self) -> int:
        return len(self.validation)

    def check_length(self, context_length: int) -> None:
        check_text_length(len(self.train), context_length, "training")
        check_text_length(len(self.validation), context_length, "validation")

    def sequences(self, positions: np.ndarray, *, context_length: int, seed: int) -> Batch:
        order = WindowOrder(len(self.train), context_length, seed)
        return Batch.of_text(gather(self.train, order.starts(positions), context_length))

    def validation_batches(
        self, *, context_length: int, num_tokens: int, batch_size: int
    ) -> Iterator[Batch]:
        """Yield fixed held-out sequences, spread evenly over the text; as the base class says."""
        return validation_batches(
            self.validation,
            context_length=context_length,
            num_tokens=num_tokens,
            batch_size=batch_size,
        )


def open_tokens(folder: Path | str) -> TokenStore:
    """Open a folder of tokens; check the sizes of its files, but not their content.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return map_tokens(folder, manifest)


def map_tokens(folder: Path, manifest: Manifest) -> TokenStore:
    """Map the files of a folder whose manifest is read and whose files are checked."""
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    with damage_as_user_error(folder / MANIFEST_NAME, remedy=remedy_of(folder)):
        return TokenStore(
            folder=folder,
            manifest=manifest,
            train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
            validation=np.memmap(folder / "validation.bin", dtype=dtype, mode="r"),
        )
