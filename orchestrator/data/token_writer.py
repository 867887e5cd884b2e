"""The files of prepared tokens while they are written, and a record that makes the work resumable.

`make_safe` flushes the files to disk and then writes a record: how many documents are in them, how
long they are and what their hashes are up to there. Whoever opens the folder again cuts the files
back to the record, checks their hashes, and adds behind them. Hashes cannot be stored half-done, so
they are made again from the files, which costs seconds a gigabyte and finds damage too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json_object, write_json

RECORD_NAME = "progress.json"
TRAIN, VALIDATION, TEXTS = "train.bin", "validation.bin", "validation.jsonl"
_BLOCK = 1 << 20


class StaleTokens(UserError):
    """What an interrupted call has written cannot be gone on from."""


class _File:
    """A file that only grows, with the hash of what is in it."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.digest = path, hashlib.sha256()
        path.touch()
        self.file: BinaryIO = path.open("r+b")
        self.file.truncate(size)
        while block := self.file.read(_BLOCK):
            self.digest.update(block)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def make_safe(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self.digest.hexdigest()}


class TokenWriter:
    """Writes both sides of the split into a folder, behind what an earlier one has made safe.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._record_path = folder / RECORD_NAME
        try:
            record = read_json_object(self._record_path) or {}
        except UserError as error:
            raise StaleTokens(
                f"{error}: what the interrupted call wrote is deleted, and the same command starts "
                "over"
            ) from None
        files = record.get("files", {})
        self.num_documents: int = record.get("documents", 0)
        """Documents that are in the files."""
        self.train: dict[str, int] = record.get("train", _no_counts())
        """Documents, tokens and bytes to train on."""
        self.validation: dict[str, int] = record.get("validation", _no_counts())
        """The same, held out."""
        self.unsafe_bytes = 0
        """Text that was added since the last record."""
        self._corpus = hashlib.sha256()
        self._corpus_safe: str | None = record.get("corpus")
        self._files = {
            name: _File(folder / name, files.get(name, {}).get("bytes", 0))
            for name in (TRAIN, VALIDATION, TEXTS)
        }
        self._known = files
        self._folder = folder

    def totals(self) -> tuple[int, int]:
        """Return tokens and bytes of text of both sides."""
        sides = (self.train, self.validation)
        return sum(side["tokens"] for side in sides), sum(side["bytes"] for side in sides)

    @property
    def corpus_digest(self) -> str:
        """Hash of all documents and their sides of the split."""
        return self._corpus.hexdigest()

    def pass_over(self, documents: Iterable[tuple[str, bool]]) -> None:
        """Take note of the documents that are in the files: text, and whether it is held out.

        Raises:
            StaleTokens: If they are not the same any more.
        """
        for text, is_held_out in documents:
            self._note(text, is_held_out)
        if self._corpus_safe not in (None, self.corpus_digest):
            raise StaleTokens(
                "the source has changed since the interruption; what was written is deleted, and "
                "the same command starts over"
            )

    def add(self, text: str, tokens: bytes, num_tokens: int, row: str | None) -> None:
        """Write a document.

        Args:
            text: The document.
            tokens: Its tokens as they stand in the file.
            num_tokens: How many.
            row: Its line among the held-out documents; None trains on it.
        """
        is_held_out = row is not None
        size = self._note(text, is_held_out)
        counts = self.validation if is_held_out else self.train
        counts["documents"] += 1
        counts["tokens"] += num_tokens
        counts["bytes"] += size
        self._files[VALIDATION if is_held_out else TRAIN].write(tokens)
        if row is not None:
            self._files[TEXTS].write(row.encode() + b"\n")
        self.num_documents += 1
        self.unsafe_bytes += size

    def make_safe(self) -> dict[str, str]:
        """Flush everything to disk, and write down how far it goes.

        Returns:
            The hashes of the files.
        """
        files = {name: file.make_safe() for name, file in self._files.items()}
        record = {
            "documents": self.num_documents,
            "corpus": self.corpus_digest,
            "train": self.train,
            "validation": self.validation,
            "files": files,
        }
        write_json(self._record_path, record)
        self.unsafe_bytes = 0
        return {name: known["sha256"] for name, known in files.items()}

    def forget(self) -> None:
        """Delete the record: the folder is whole."""
        self._record_path.unlink()

    def __enter__(self) -> TokenWriter:
        """Check what is there.

        Raises:
            StaleTokens: If what was made safe has changed since; names the file.
        """
        try:
            self._check()
        except StaleTokens:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what is not safe is cut off by the next writer."""
        for file in self._files.values():
            file.file.close()

    def _check(self) -> None:
        for name, known in self._known.items():
            if self._files[name].digest.hexdigest() != known["sha256"]:
                raise StaleTokens(
                    f"{self._folder / name} is damaged: it is not what was written before the "
                    "interruption; it is deleted, and the same command starts over"
                )

    def _note(self, text: str, is_held_out: bool) -> int:
        data = text.encode("utf-8")
        self._corpus.update(b"%d%b\0" % (is_held_out, data))
        return len(data)


def _no_counts() -> dict[str, int]:
    return {"documents": 0, "tokens": 0, "bytes": 0}
