"""Open and verify token folders: two flat files of integers, a tokenizer and a manifest.

A folder's name is its fingerprint: a hash of every document, its side of the split and the
tokenizer. It identifies the data in all keys. Opening a folder checks the file sizes. Comparing the
hashes takes minutes for a large corpus, so it is done once, again when a file's time or size has
changed, and on request. `tokenization.py` writes these folders.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    damage_as_user_error,
    read_json,
    read_json_object,
    write_json,
)
from orchestrator.workspace.provenance import file_digest

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
STAMP_NAME = "verified.json"
"""File that holds sizes and times of the files when their hashes were last verified."""
_REMEDY = "delete its folder and run `iiet-orch prepare` again"


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
    num_validation_bytes: int
    """UTF-8 bytes of the validation documents, for bits per byte."""
    tokenizer_path: Path
    end_of_text_id: int
    manifest: dict[str, Any]

    @property
    def validation_documents_path(self) -> Path:
        """JSON lines of the held-out documents: `text`, `source`."""
        return self.folder / "validation.jsonl"

    @property
    def profile(self) -> dict[str, Any]:
        """Origin and size of the text, as plain values for display."""
        settings = self.manifest["settings"]
        sizes = {
            f"{side}_{unit}": self.manifest[side][unit]
            for side in ("train", "validation")
            for unit in ("documents", "tokens", "bytes")
        }
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        return {**origin, **sizes, "vocab_size": self.vocab_size}


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds tokens whose files have the sizes in the manifest."""
    try:
        manifest = _manifest(folder)
        return manifest is not None and not _problem(folder, manifest, verify=False)
    except UserError:
        return False


def open_tokens(folder: Path | str, *, verify: bool = False) -> TokenStore:
    """Open a folder of tokens.

    Args:
        folder: As returned by `write_tokens`.
        verify: Also compare the files' hashes.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = _require_manifest(folder)
    problem = _problem(folder, manifest, verify=verify)
    if problem:
        raise UserError(f"{problem}; run `iiet-orch prepare` again")
    with damage_as_user_error(folder / MANIFEST_NAME, remedy=_REMEDY):
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        return TokenStore(
            folder=folder,
            train=np.memmap(folder / "train.bin", dtype=dtype, mode="r"),
            validation=np.memmap(folder / "validation.bin", dtype=dtype, mode="r"),
            vocab_size=manifest["vocab_size"],
            fingerprint=manifest["fingerprint"],
            num_validation_bytes=manifest["validation"]["bytes"],
            tokenizer_path=folder / "tokenizer.json",
            end_of_text_id=manifest["end_of_text_id"],
            manifest=manifest,
        )


def verify_tokens(folder: Path, *, always: bool = False) -> None:
    """Compare the files' hashes with the manifest, unless they are unchanged since the last time.

    Args:
        folder: Complete, see `is_complete`.
        always: Compare even if size and time of the files are unchanged.

    Raises:
        UserError: If a file's content has changed; names it.
    """
    manifest = _require_manifest(folder)
    stamps = _stamps(folder, manifest)
    if not always and _verified_stamps(folder) == stamps:
        return
    problem = _problem(folder, manifest, verify=True)
    if problem:
        raise UserError(f"{problem}; delete the folder {folder} and run `iiet-orch prepare` again")
    with suppress(OSError):  # A read-only folder is verified each time.
        write_json(folder / STAMP_NAME, stamps)


def _require_manifest(folder: Path) -> dict[str, Any]:
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    return manifest


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST_NAME
    manifest = read_json_object(path, remedy=_REMEDY)
    if manifest is not None and manifest.get("format") == FORMAT_VERSION:
        with damage_as_user_error(path, remedy=_REMEDY):
            for name in manifest["sha256"]:
                int(manifest["sizes"][name])
            for side in ("train", "validation"):
                for unit in ("documents", "tokens", "bytes"):
                    int(manifest[side][unit])
            dict(manifest["settings"])
    return manifest


def _verified_stamps(folder: Path) -> Any:
    try:
        return read_json(folder / STAMP_NAME)
    except UserError:
        return None


def _stamps(folder: Path, manifest: dict[str, Any]) -> dict[str, list[int]]:
    names = manifest.get("sha256", ())  # absent in the format of another version
    stats = {name: (folder / name).stat() for name in names if (folder / name).is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _problem(folder: Path, manifest: dict[str, Any], *, verify: bool) -> str | None:
    if manifest.get("format") != FORMAT_VERSION:
        return f"{folder} was written by another version of the program"
    for name, size in manifest["sizes"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: {path.stat().st_size} bytes instead of {size}"
        if verify and file_digest(path) != manifest["sha256"][name]:
            return f"{path} is damaged: its content has changed"
    return None
