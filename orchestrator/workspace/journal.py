"""An append-only record of a run, one JSON object a line: the truth about what happened.

Training writes here and nowhere else, so that no server can stop it; progress bars and MLflow read
from here (`tracking.py` mirrors a journal into a run, from any position, as often as needed). A
line is written in one call and flushed, and a last line that a crash cut off is skipped by the
reader.

Records: `{"kind": "metrics", "time": ms, "step": n, "values": {name: number}}` and
`{"kind": "event", "time": ms, "name": ..., ...}`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The writing end; one writer at a time."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`/journal.jsonl for appending; the folder is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_NAME
        self._file = self.path.open("a+b")
        self._end_cut_line()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step."""
        self._write({"kind": "metrics", "step": step, "values": dict(values)})

    def event(self, name: str, **details: Any) -> None:
        """Record that something happened: `resumed`, `checkpoint`, `stopped`, `finished`."""
        self._write({"kind": "event", "name": name, **details})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        record = {"time": int(time.time() * 1000), **record}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def _end_cut_line(self) -> None:
        # A crash can leave half a line; the newline makes it one bad line instead of spoiling the
        # next.
        size = self._file.seek(0, 2)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")


def read_journal(folder: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read the complete records behind a byte offset.

    Returns:
        The records and the offset to read on from. A missing journal reads as empty.
    """
    path = folder / JOURNAL_NAME
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for line in whole.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line cut off by a crash
        if _is_record(record):
            records.append(record)
    return records, offset + len(whole)


def _is_record(record: Any) -> bool:
    """Tell whether a line has the parts that a writer gave it; a flipped bit renames one."""
    if not isinstance(record, dict) or not isinstance(record.get("time"), int):
        return False
    if record.get("kind") == "metrics":
        values = record.get("values")
        is_numbers = isinstance(values, dict) and all(
            isinstance(value, int | float) for value in values.values()
        )
        return is_numbers and isinstance(record.get("step"), int)
    return record.get("kind") == "event" and isinstance(record.get("name"), str)
