"""Answers of a task that is not finished, so that the same command only does the rest.

Lines are appended while a task runs, at most one write a second. A line holds the answers of a
batch, or of some questions, under the hash of what was asked, and begins with a checksum: a line
that a crash cut off, or that was damaged since, is as good as missing. The key of the evaluation
names the file. So a batch is found again only if it would be the same batch, and a resumed
evaluation ends with the same bits as one that was not interrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_WRITES = 1.0


class AnswerJournal(AbstractContextManager["AnswerJournal"]):
    """The answers of one task under one model; in memory only without a file.

    Use it as a context: the last answers are written if an error or Ctrl-C ends the block.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        failed: Callable[[OSError], None] = lambda _: None,
        seconds_between_writes: float = SECONDS_BETWEEN_WRITES,
    ) -> None:
        """Read the file; `failed` is called if it cannot be written, and then nothing more is."""
        self._path, self._failed, self._seconds = path, failed, seconds_between_writes
        self._waiting: list[str] = []
        self._written = time.monotonic()
        self._stored: dict[str, Any] = {}
        try:
            lines = path.read_bytes().splitlines() if path else []
        except OSError:
            lines = []
        for line in lines:
            checksum, _, text = line.decode(errors="replace").partition(" ")
            if checksum == _checksum(text):
                self._stored |= json.loads(text)

    @property
    def num_answers(self) -> int:
        """Answers that the file held."""
        return sum(len(v) if isinstance(v, list) else 1 for v in self._stored.values())

    def get(self, key: str) -> Any | None:
        """Return the JSON value that was stored under a key, if any."""
        return self._stored.get(key)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Store JSON values by key; they are in the file after a second at the latest call."""
        text = json.dumps(answers, separators=(",", ":"))
        self._waiting.append(f"{_checksum(text)} {text}\n")
        if time.monotonic() - self._written >= self._seconds:
            self._write()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._write()

    def _write(self) -> None:
        if self._path and self._waiting:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("ab", buffering=0) as file:
                    # After an empty line, because a crash may have cut the last one off.
                    file.write("".join(["\n", *self._waiting]).encode())
            except OSError as error:
                self._path = None
                self._failed(error)
        self._waiting.clear()
        self._written = time.monotonic()


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
