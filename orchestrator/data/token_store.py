"""Prepared tokens: two flat files of integers, a tokenizer, and a manifest that says what they are.

The folder's name is the fingerprint, a hash of every document, its side of the split and the
tokenizer; it names the data in every later key. Opening checks the files' sizes always. Their
hashes take minutes for a large corpus, so they are checked once, and again when a file's time or
size has changed, or on demand. `orchestrator.data.tokenization` writes such folders.
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
"""Sizes and times of the files when their hashes were last found right."""
_REMEDY = "delete its folder and run `iiet-orch prepare` again"


@dataclass(frozen=True)
class TokenStore:
    """An opened folder of tokens; the arrays are memory maps, so that opening costs nothing."""

    folder: Path
    train: np.ndarray
    """Flat training tokens, each document closed by the end-of-text token."""
    validation: np.ndarray
    """Flat validation tokens, likewise."""
    vocab_size: int
    """Rows that an embedding needs."""
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
        """Where the text is from and how much it is, as plain values for people to read."""
        settings = self.manifest["settings"]
        sizes = {
            f"{side}_{unit}": self.manifest[side][unit]
            for side in ("train", "validation")
            for unit in ("documents", "tokens", "bytes")
        }
        origin = {name: settings[name] for name in ("source", "hub_name") if settings.get(name)}
        return {**origin, **sizes, "vocab_size": self.vocab_size}


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds tokens whose files have the sizes that the manifest says."""
    try:
        manifest = _manifest(folder)
        return manifest is not None and not _problem(folder, manifest, verify=False)
    except UserError:
        return False


def open_tokens(folder: Path | str, *, verify: bool = False) -> TokenStore:
    """Open a folder of tokens.

    Args:
        folder: As returned by `write_tokens`.
        verify: Compare the files' hashes too, not only their sizes.

    Raises:
        UserError: If the folder is missing, incomplete or damaged.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
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
    """Compare the files' hashes with the manifest, unless nothing has touched them since the last
    time.

    Args:
        folder: Complete, see `is_complete`.
        always: Compare them in any case.

    Raises:
        UserError: If a file's content is not what was written; names it.
    """
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(f"there are no prepared tokens at {folder}; run `iiet-orch prepare`")
    stamp = _stamps(folder, manifest)
    if not always and _verified(folder) == stamp:
        return
    problem = _problem(folder, manifest, verify=True)
    if problem:
        raise UserError(f"{problem}; delete the folder {folder} and run `iiet-orch prepare` again")
    with suppress(OSError):  # A store that is read only is checked each time.
        write_json(folder / STAMP_NAME, stamp)


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


def _verified(folder: Path) -> Any:
    """Return the stamps of the files that were verified; None if there are none to read."""
    try:
        return read_json(folder / STAMP_NAME)
    except UserError:
        return None


def _stamps(folder: Path, manifest: dict[str, Any]) -> dict[str, list[int]]:
    names = manifest.get("sha256", ())  # None where another version wrote it.
    return {name: _stamp(folder / name) for name in names if (folder / name).is_file()}


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


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
