"""The curves of a run, read from its journal."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from orchestrator.workspace.journal import Record, read_journal


class Point(NamedTuple):
    """A metric at a step; `time_ms` says when it was measured, in ms since 1970."""

    name: str
    value: float
    step: int
    time_ms: int


class CurveReader:
    """Reads a journal from where the last call stopped; each step of a metric comes once.

    A resumed training records the steps after its checkpoint a second time, with the same values.
    """

    def __init__(self, folder: Path, offset: int = 0) -> None:
        """Start reading at byte `offset`; an earlier reader has read the bytes before it."""
        self.last: dict[str, Point] = {}
        """The last point of each metric."""
        self.offset = offset
        self._folder = folder
        if offset:
            self._new(read_journal(folder, end=offset)[0])

    def read(self) -> list[Point]:
        """Return the points since the last call."""
        records, self.offset = read_journal(self._folder, self.offset)
        return self._new(records)

    def _new(self, records: list[Record]) -> list[Point]:
        points = []
        for record in records:
            for name, value in record["values"].items() if record["kind"] == "metrics" else ():
                known = self.last.get(name)
                if known is None or record["step"] > known.step:
                    self.last[name] = Point(name, value, record["step"], record["time"])
                    points.append(self.last[name])
        return points
