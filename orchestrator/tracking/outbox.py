"""Operations that MLflow has not received: one JSON line each, kept until they are delivered.

A line begins with a checksum. Values are those of JSON, and paths; a path in the workspace is
stored relative to its root.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.workspace.files import write_text
from orchestrator.workspace.locks import lock_file
from orchestrator.workspace.names import OUTBOX_NAME
from orchestrator.workspace.paths import absolute_path, portable_path, workspace_root

PATH_NAME = "path in workspace"
RECORDS_PER_WRITE = 100
"""The file is written once for so many delivered operations; a crash delivers them again."""

Record = dict[str, Any]


class Outbox:
    """A file of pending operations; any number of processes append."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`/tracking-outbox.jsonl; the first `add` creates it."""
        self.path = folder / OUTBOX_NAME
        self._root = workspace_root(folder)
        self._lock = folder / f"{OUTBOX_NAME}.lock"

    def add(self, records: Sequence[Record]) -> None:
        """Append operations; an equal pending one moves to the end."""
        self._replace(records, keep=True)

    def records(self) -> list[Record]:
        """Return the pending operations in order; damaged lines are left out."""
        with lock_file(self._lock):
            texts = [line.partition(" ")[2] for line in self._lines()]
        return [json.loads(text, object_hook=self._loaded) for text in texts]

    def num_damaged(self) -> int:
        """Return the number of lines that are not what was written."""
        return sum(not _is_whole(line) for line in self._all_lines())

    def deliver(self, attempt: Callable[[Record], bool]) -> int:
        """Attempt the pending operations in order, until one fails; return how many succeeded."""
        num_delivered, done = 0, []
        try:
            for record in self.records():
                if not attempt(record):
                    break
                done.append(record)
                num_delivered += 1
                if len(done) == RECORDS_PER_WRITE:
                    self._replace(done, keep=False)
                    done = []
        finally:
            self._replace(done, keep=False)
        return num_delivered

    def _replace(self, records: Sequence[Record], *, keep: bool) -> None:
        # Compared as text: a metric may be NaN, which does not equal itself.
        changed = dict.fromkeys(self._to_text(record) for record in records)
        with lock_file(self._lock):
            lines = [other for other in self._lines() if other not in changed]
            lines += changed if keep else []
            write_text(self.path, "".join(line + "\n" for line in lines))

    def _to_text(self, record: Record) -> str:
        def stored(value: object) -> dict[str, str]:
            assert isinstance(value, Path), value
            return {PATH_NAME: portable_path(str(value), self._root)}

        text = json.dumps(record, sort_keys=True, default=stored)
        return f"{_checksum(text)} {text}"

    def _loaded(self, values: dict[str, Any]) -> Any:
        is_path = values.keys() == {PATH_NAME}
        return Path(absolute_path(values[PATH_NAME], self._root)) if is_path else values

    def _lines(self) -> list[str]:
        return list(filter(_is_whole, self._all_lines()))

    def _all_lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()


def _is_whole(line: str) -> bool:
    checksum, _, text = line.partition(" ")
    return checksum == _checksum(text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
