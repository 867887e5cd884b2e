"""What MLflow could not take: one JSON line for each operation, kept until a server takes it.

Tracking never stops training. When a server does not answer, the operation itself is written down
here, as data, and done later by the same code (`iiet-orch sync`). Operations can be repeated
without harm, so a crash between doing one and striking it off costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from orchestrator.workspace.files import write_text

OUTBOX_NAME = "tracking-outbox.jsonl"

Record = dict[str, Any]


class Outbox:
    """A file of pending operations; any number of processes append."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`/tracking-outbox.jsonl; nothing is written before the first `add`."""
        self.path = folder / OUTBOX_NAME
        self._lock = FileLock(str(self.path) + ".lock")

    def add(self, record: Record) -> None:
        """Append an operation; an equal one that waits already moves to the end."""
        line = json.dumps(record, sort_keys=True)
        with self._lock:
            self._replace([*(other for other in self._lines() if other != line), line])

    def records(self) -> list[Record]:
        """Return the pending operations in their order."""
        with self._lock:
            return [json.loads(line) for line in self._lines()]

    def drain(self, attempt: Callable[[Record], bool]) -> int:
        """Offer each pending operation in its order; keep the first that is refused and all behind
        it.

        Returns:
            How many were taken.
        """
        taken = 0
        for record in self.records():
            if not attempt(record):
                break
            taken += 1
            self._strike(record)
        return taken

    def _strike(self, record: Record) -> None:
        line = json.dumps(record, sort_keys=True)
        with self._lock:
            self._replace([other for other in self._lines() if other != line])

    def _replace(self, lines: list[str]) -> None:
        write_text(self.path, "".join(line + "\n" for line in lines))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False  # cut off by a crash
