"""The append-only log of a training, one JSON object per line; progress and MLflow read it.

Records: `{"kind": "metrics", "time": ms, "step": n, "values": {name: number}}` and
`{"kind": "event", "time": ms, "name": ..., ...}`. Readers skip a line that a crash cut off.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.workspace.layout import workspace_root

JOURNAL_NAME = "journal.jsonl"
SPEED_METRIC = "train/tokens_per_second"
GFLOPS_METRIC = "train/gflops_per_second"
"""Billions of FLOP/s of all workers together."""
VALIDATION_METRIC = "validation/loss"
"""The loss on held-out sequences during a training, in nats per target."""
CHEAPEST_METRIC = "validation/cheapest_loss"
"""The validation loss under the cheapest schedule of an elastic model."""
ACCURACY_METRIC = "validation/accuracy"
"""Share of right answers; only of data that have answers."""
OUTPUT_RMS_METRIC = "validation/output_rms"
"""Prefix of the size of the fields' outputs, one for each evaluation within a layer."""
TAIL_BYTES = 65_536
"""A record is shorter than this."""
_YEAR_9999 = 250_000_000_000_000
"""Time in ms; no date is later."""

JournalRecord = dict[str, Any]


def now_ms() -> int:
    """Return the time in ms since 1970, the unit of journals and of MLflow."""
    return int(time.time() * 1000)


class Journal:
    """Writes a journal; only one process may write at a time."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`/journal.jsonl for appending; make the folder if it is missing."""
        root = workspace_root(folder)
        self._root = f"{root}/" if root else ""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_NAME
        self._file = self.path.open("a+b")
        if size := self._file.seek(0, os.SEEK_END):
            # End the line that a crash cut off, so that it does not spoil the next one.
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step."""
        self._write({"kind": "metrics", "step": step, "values": dict(values)})

    def event(self, name: str, **details: Any) -> None:
        """Record an event: `resumed`, `checkpoint`, `stopped`, `finished`.

        Paths in the workspace, also those in sentences, are written relative to its root.
        """
        if self._root:
            for key, value in details.items():
                if isinstance(value, str):
                    details[key] = value.replace(self._root, "")
        self._write({"kind": "event", "name": name, **details})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, record: JournalRecord) -> None:
        self._file.write(json.dumps({"time": now_ms(), **record}).encode() + b"\n")
        self._file.flush()


def record_event(folder: Path, name: str, **details: Any) -> None:
    """Append one event to the journal of a folder, such as that of a sweep."""
    journal = Journal(folder)
    journal.event(name, **details)
    journal.close()


def read_journal(
    folder: Path, offset: int = 0, *, end: int | None = None
) -> tuple[list[JournalRecord], int]:
    """Return the complete records after a byte offset, until `end`, and the offset of the rest."""
    path = folder / JOURNAL_NAME
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(-1 if end is None else end - offset)
    # The last line may be half written; the next call begins with it.
    complete_lines = data[: data.rfind(b"\n") + 1]
    return list(_records(complete_lines.splitlines())), offset + len(complete_lines)


def read_metrics(folder: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the step and the numbers of each record of metrics.

    A resumed run repeats some steps; the last record of a step counts.
    """
    for record in read_journal(folder)[0]:
        if record["kind"] == "metrics":
            yield record["step"], record["values"]


class JournalReader:
    """Follows a folder's journal: reads on from where the last call stopped; it may not exist yet.

    Opening a file asks the server of a network file system, so a journal is opened only if its size
    has changed. The size may be as old as the file system's cache of attributes (seconds).
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        """Begin at a byte offset, which an earlier reader has reached."""
        self.step = 0
        """The last step that was read."""
        self.offset = offset
        """Bytes that were read."""
        self.folder = folder
        self._seen_size = 0

    def read(self) -> list[JournalRecord]:
        """Return the records since the last call."""
        try:
            size = (self.folder / JOURNAL_NAME).stat().st_size
        except FileNotFoundError:
            return []
        if size == self._seen_size:
            return []
        self._seen_size = size
        records, self.offset = read_journal(self.folder, self.offset)
        for record in records:
            if record["kind"] == "metrics":
                self.step = record["step"]
        return records


def read_tail(folder: Path) -> list[JournalRecord]:
    """Return the last records of a journal; none if it is missing or unreadable."""
    return list(_records(_last_lines(folder)))


def _last_lines(folder: Path) -> list[bytes]:
    with suppress(OSError), (folder / JOURNAL_NAME).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        # This may begin in the middle of a line, which then is no JSON and is skipped.
        file.seek(max(0, size - TAIL_BYTES))
        data = file.read()
        return data[: data.rfind(b"\n") + 1].splitlines()
    return []


def last_recorded(folder: Path) -> float:
    """Return the time of a folder's last record, or of the folder without one, in seconds.

    The times of files would not do: a copied workspace has new ones.
    """
    last_record = next(_records(reversed(_last_lines(folder))), None)
    return float(last_record["time"] / 1000) if last_record else folder.stat().st_mtime


def recorded_times(folder: Path) -> tuple[int, int] | None:
    """Return the times of a journal's first and last record in ms; None if it has no record."""
    with suppress(OSError, StopIteration), (folder / JOURNAL_NAME).open("rb") as file:
        first = next(_records(file))
        # The tail may hold no record if damaged lines follow the first one.
        last = (read_tail(folder) or [first])[-1]
        return first["time"], last["time"]
    return None


def _records(lines: Iterable[bytes]) -> Iterator[JournalRecord]:
    for line in lines:
        with suppress(ValueError, RecursionError):  # Cut off by a crash.
            record = json.loads(line)
            if _is_record(record):
                yield record


def _is_record(record: Any) -> bool:
    # A damaged line can be valid JSON: a flipped bit may have renamed a key or changed a digit.
    match record:
        case {"kind": "metrics", "time": int() as ms, "step": int(), "values": dict() as values}:
            # A longer integer is damage, and might not fit into a float.
            are_numbers = all(
                isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
                for value in values.values()
            )
            return are_numbers and 0 <= ms < _YEAR_9999
        case {"kind": "event", "time": int() as ms, "name": str()}:
            return 0 <= ms < _YEAR_9999
    return False
