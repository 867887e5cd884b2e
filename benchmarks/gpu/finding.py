"""What a section finds: rows of figures, with a problem where something is not as it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.gpu.setup import Setup

Figure = float | int | str
Status = Literal["passed", "failed", "skipped"]


class Skipped(Exception):
    """A section cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measurement: a row of its section's table."""

    what: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Column, with its unit, to value."""
    problem: str | None = None
    """Why the measurement fails; None if it is as it must be."""
    skipped: str | None = None
    """Why it was not made."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report that runs in a process of its own."""

    name: str
    question: str
    measure: Callable[[Setup], Iterator[Finding]]
    """Yields findings one by one, so that those before a crash are kept; raises `Skipped`."""
    limit_minutes: float
    """Time after which it is ended."""


@dataclass(frozen=True, kw_only=True)
class SectionResult:
    """What became of a section."""

    name: str
    question: str
    findings: tuple[Finding, ...]
    seconds: float
    skipped: str | None = None
    error: str | None = None
    """Why it did not come to its end, in one line."""
    details: str = ""
    """The traceback, or the end of the process's output."""

    @property
    def problems(self) -> list[str]:
        """What failed: the section's own error last."""
        found = [f"{f.what}: {f.problem}" for f in self.findings if f.problem]
        return [*found, self.error] if self.error else found

    @property
    def status(self) -> Status:
        """`failed` with any problem; `skipped` if nothing was measured."""
        if self.problems:
            return "failed"
        if all(finding.skipped for finding in self.findings):
            return "skipped"
        return "passed"

    @property
    def reasons(self) -> list[str]:
        """Why it failed, or what was skipped."""
        skipped = dict.fromkeys(f.skipped for f in self.findings if f.skipped)
        return self.problems or [*([self.skipped] if self.skipped else []), *skipped]
