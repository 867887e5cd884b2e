"""Open and verify token folders: two flat files of integers, a tokenizer and a manifest.

A folder's name is its fingerprint: a hash of every document, its side of the split and the
tokenizer. It identifies the data in all keys. `tokenization.py` writes these folders.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damage_as_user_error, read_json_object
from orchestrator.workspace.whole_folders import damaged_file

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


class SplitCounts(BaseModel):
    """Size of one side of the split; `bytes` is the text's length in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


class Manifest(BaseModel):
    """What a token folder holds."""

    format: int = FORMAT_VERSION
    fingerprint: str
    """Hash of documents, split and tokenizer."""
    settings: dict[str, Any]
    """The `DataSettings` of the preparation."""
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    """Rows of the embedding."""
    end_of_text_id: int
    train: SplitCounts
    validation: SplitCounts
    sizes: dict[str, int]
    """Bytes of each file."""
    sha256: dict[str, str]
    """Hash of each file."""


@dataclass(frozen=True)
class TokenStore:
    """An open token folder; the arrays are memory maps, so opening is cheap."""

    folder: Path
    train: np.ndarray
    """Flat training tokens, each document ends with the end-of-text token."""
    validation: np.ndarray
    """Flat validation tokens, in the same form."""
    vocab_size: int
    """Rows of the embedding."""
    fingerprint: str
    """Hash of documents, split and tokenizer."""
    tokenizer_path: Path
    manifest: Manifest

    @property
    def validation_documents_path(self) -> Path:
        """JSON lines of the held-out documents: `text`, `source`."""
        return self.folder / "validation.jsonl"

    @property
    def profile(self) -> dict[str, Any]:
        """Origin and size of the text, as plain values for display."""
        settings = self.manifest.settings
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        sides = {"train": self.manifest.train, "validation": self.manifest.validation}
        sizes = {f"{side}_{unit}": n for side, counts in sides.items() for unit, n in counts}
        return {**origin, **sizes, "vocab_size": self.vocab_size}


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds tokens whose files have the sizes in the manifest."""
    try:
        _check_files(folder, _read_manifest(folder))
    except UserError:
        return False
    return True


def open_tokens(folder: Path | str) -> TokenStore:
    """Open a folder of tokens; check the sizes of its files, but not their content.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    with damage_as_user_error(folder / MANIFEST_NAME, remedy=_remedy(folder)):
        return TokenStore(
            folder=folder,
            train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
            validation=np.memmap(folder / "validation.bin", dtype=dtype, mode="r"),
            vocab_size=manifest.vocab_size,
            fingerprint=manifest.fingerprint,
            tokenizer_path=folder / "tokenizer.json",
            manifest=manifest,
        )


def verify_tokens(folder: Path, *, always: bool = False) -> None:
    """Raise a `UserError` if a file's content has changed; see `whole_folders.damaged_file`."""
    manifest = _read_manifest(folder)
    _check_files(folder, manifest)
    if damage := damaged_file(folder, manifest.sha256, always=always):
        raise UserError(f"{folder} is damaged: {damage}; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"delete the folder {folder} and run `iiet-orch prepare` again"


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    values = read_json_object(path, remedy=_remedy(folder))
    if values is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    if values.get("format") != FORMAT_VERSION:
        raise UserError(
            f"{folder} was written by another version of the program; {_remedy(folder)}"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise UserError(
            f"{path} is damaged (missing or invalid: {fields}); {_remedy(folder)}"
        ) from None


def _check_files(folder: Path, manifest: Manifest) -> None:
    problem = None
    for name in manifest.sha256:
        path, size = folder / name, manifest.sizes.get(name)
        if not path.is_file():
            problem = f"{path} is missing"
        elif path.stat().st_size != size:
            problem = f"{path} is damaged: {path.stat().st_size} bytes instead of {size}"
        if problem:
            raise UserError(f"{problem}; {_remedy(folder)}")
