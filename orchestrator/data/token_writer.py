"""Write the files of a token folder so that an interrupted preparation can resume.

`commit` flushes the files and then records their lengths and hashes. The next writer truncates the
files to the record, checks their hashes (seconds per gigabyte), and appends.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.data.store import SplitCounts
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json, write_json

RECORD_NAME = "progress.json"
_TRAIN, _VALIDATION, _TEXTS = "train.bin", "validation.bin", "validation.jsonl"
_BLOCK_BYTES = 1 << 20


class StaleTokens(UserError):
    """The files of an interrupted preparation cannot be resumed."""


class _HashedFile:
    """An append-only file with the hash of its content."""

    def __init__(self, path: Path, size: int) -> None:
        self.digest = hashlib.sha256()
        path.touch()
        self.file: BinaryIO = path.open("r+b")
        self.file.truncate(size)
        while block := self.file.read(_BLOCK_BYTES):
            self.digest.update(block)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def commit(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.file.tell(), "sha256": self.digest.hexdigest()}


class TokenWriter:
    """Appends documents to both sides of the split, after those of the last commit.

    Raises:
        StaleTokens: If a file has changed since the last commit; names it.
    """

    def __init__(self, folder: Path) -> None:
        self._record_path = folder / RECORD_NAME
        try:
            record = read_json(self._record_path) or {}
        except UserError as error:
            raise StaleTokens(
                f"{error}: the files of the interrupted preparation are deleted, and the same "
                "command starts over"
            ) from None
        self.num_documents: int = record.get("documents", 0)
        """Documents in the files."""
        self.train = SplitCounts.model_validate(record.get("train", {}))
        self.validation = SplitCounts.model_validate(record.get("validation", {}))
        self.uncommitted_bytes = 0
        """Bytes of text added since the last commit."""
        self._corpus = hashlib.sha256()
        self._committed_corpus: str | None = record.get("corpus")
        committed = record.get("files", {})
        self._files = {
            name: _HashedFile(folder / name, committed.get(name, {}).get("bytes", 0))
            for name in (_TRAIN, _VALIDATION, _TEXTS)
        }
        for name, file in committed.items():
            if self._files[name].digest.hexdigest() != file["sha256"]:
                self.close()
                raise StaleTokens(
                    f"{folder / name} is damaged: it has changed since the interruption; it is "
                    "deleted, and the same command starts over"
                )

    def totals(self) -> tuple[int, int]:
        """Return tokens and bytes of text of both sides together."""
        return self.train.tokens + self.validation.tokens, self.train.bytes + self.validation.bytes

    @property
    def corpus_digest(self) -> str:
        """Hash of all documents and their sides of the split."""
        return self._corpus.hexdigest()

    def skip(self, documents: Iterable[tuple[str, bool]]) -> None:
        """Skip documents (text, is held out); `StaleTokens` if they are not those in the files."""
        for text, is_held_out in documents:
            self._hash_document(text, is_held_out)
        if self._committed_corpus not in (None, self.corpus_digest):
            raise StaleTokens(
                "the source has changed since the interruption; the files written before are "
                "deleted, and the same command starts over"
            )

    def add(self, text: str, tokens: bytes, num_tokens: int, row: str | None) -> None:
        """Write a document, and its JSON line `row` if it is held out (None if it is not)."""
        is_held_out = row is not None
        size = self._hash_document(text, is_held_out)
        counts = self.validation if is_held_out else self.train
        counts.documents += 1
        counts.tokens += num_tokens
        counts.bytes += size
        self._files[_VALIDATION if is_held_out else _TRAIN].write(tokens)
        if row is not None:
            self._files[_TEXTS].write(row.encode() + b"\n")
        self.num_documents += 1
        self.uncommitted_bytes += size

    def commit(self) -> dict[str, str]:
        """Flush everything to disk and record the state; return the hashes of the files."""
        files = {name: file.commit() for name, file in self._files.items()}
        record = {
            "documents": self.num_documents,
            "corpus": self.corpus_digest,
            "train": self.train.model_dump(),
            "validation": self.validation.model_dump(),
            "files": files,
        }
        write_json(self._record_path, record)
        self.uncommitted_bytes = 0
        return {name: file["sha256"] for name, file in files.items()}

    def delete_record(self) -> None:
        """Delete the record, once the folder is complete."""
        self._record_path.unlink()

    def close(self) -> None:
        """Close the files; the next writer drops what is not committed."""
        for file in self._files.values():
            file.file.close()

    def _hash_document(self, text: str, is_held_out: bool) -> int:
        data = text.encode("utf-8")
        self._corpus.update(b"%d%b\0" % (is_held_out, data))
        return len(data)
