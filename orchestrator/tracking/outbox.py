"""Operations that MLflow has not received: one JSON line each, kept until they are delivered."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.workspace.files import write_text
from orchestrator.workspace.locks import lock_file

OUTBOX_NAME = "tracking-outbox.jsonl"

Record = dict[str, Any]


class Outbox:
    """A file of pending operations; any number of processes append."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`/tracking-outbox.jsonl; the first `add` creates it."""
        self.path = folder / OUTBOX_NAME
        self._lock = folder / f"{OUTBOX_NAME}.lock"

    def add(self, records: Sequence[Record]) -> None:
        """Append operations; an equal pending one moves to the end."""
        self._replace(records, keep=True)

    def records(self) -> list[Record]:
        """Return the pending operations in order; lines cut off by a crash are skipped."""
        with lock_file(self._lock):
            return [json.loads(line) for line in self._lines()]

    def deliver(self, attempt: Callable[[Record], bool]) -> int:
        """Attempt the pending operations in order, until one fails; return how many succeeded."""
        delivered = 0
        for record in self.records():
            if not attempt(record):
                break
            delivered += 1
            self._replace([record], keep=False)
        return delivered

    def _replace(self, records: Sequence[Record], *, keep: bool) -> None:
        # Compared as text: a metric may be NaN, which does not equal itself.
        changed = dict.fromkeys(json.dumps(record, sort_keys=True) for record in records)
        with lock_file(self._lock):
            lines = [other for other in self._lines() if other not in changed]
            lines += changed if keep else []
            write_text(self.path, "".join(line + "\n" for line in lines))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return list(filter(_is_object, self.path.read_text(encoding="utf-8").splitlines()))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
