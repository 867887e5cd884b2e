"""The results of a section as values, and the report that is made of them.

A section yields rows: what was measured, its figures, and a goal for their ratio or the problem
that makes the section fail. A missed goal is not a failure. Rows of equal figures are one table of
the report, which is Markdown on the terminal and in a file; the same values are stored as JSON.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from benchmarks.timing import Spread, paired_ratio
from orchestrator.reporting.sections import bullets, markdown_table

Figure = Spread | float | int | str
RATIO = "ratio"
"""The figure that a goal is for."""


@dataclass(frozen=True)
class Goal:
    """The bound that the median of a ratio should keep."""

    kind: Literal["at most", "at least"]
    limit: float

    def is_met(self, ratio: Spread) -> bool:
        """Return whether a ratio keeps it."""
        if self.kind == "at most":
            return ratio.median <= self.limit
        return ratio.median >= self.limit


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    what: str
    """What was measured or compared, at which size."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Column, with its unit, to value; a row without any is a remark."""
    goal: Goal | None = None
    """The goal of `ratio` at this size."""
    problem: str | None = None
    """Why the section fails here; None if the measurement is as it must be."""
    skipped: str | None = None
    """Why it was not made."""

    @classmethod
    def paired(
        cls,
        what: str,
        seconds: Mapping[str, Sequence[float]],
        first: str,
        second: str,
        goal: Goal | None = None,
    ) -> Row:
        """Compare two tasks whose seconds were measured in turns: first / second."""
        times: dict[str, Figure] = {
            f"{name} (ms)": milliseconds(seconds[name]) for name in (first, second)
        }
        ratio = paired_ratio(seconds[first], seconds[second])
        return cls(what=what, figures={**times, RATIO: ratio}, goal=goal)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        ratio = self.figures.get(RATIO)
        return self.goal.is_met(ratio) if self.goal and isinstance(ratio, Spread) else None

    @property
    def verdict(self) -> str:
        """The last cell of the row."""
        if self.problem:
            return "failed"
        if self.goal is None:
            return ""
        missed = "" if self.met else ", missed"
        return f"goal {self.goal.kind} {self.goal.limit:g}{missed}"


def milliseconds(seconds: Sequence[float]) -> Spread:
    """Summarize times that were measured in seconds."""
    return Spread.of([1e3 * value for value in seconds])


def checked(what: str, difference: float, tolerance: float) -> Row:
    """Return a row that says how well two computations agree.

    Raises:
        ArithmeticError: they do not agree, so timing them against each other would mean nothing.
    """
    if not difference <= tolerance:  # NaN is not.
        raise ArithmeticError(f"{what} differ by {difference:.1e}, allowed are {tolerance:.0e}")
    return Row(what=f"checked: {what} differ by at most {difference:.1e}")


def problem_unless(difference: float, tolerance: float, problem: str) -> str | None:
    """Return the problem unless the difference is within the tolerance; NaN is not."""
    return None if difference <= tolerance else problem


@dataclass(frozen=True, kw_only=True)
class SectionResult:
    """What became of a section."""

    name: str
    question: str
    rows: tuple[Row, ...]
    seconds: float
    skipped: str | None = None
    error: str | None = None
    """Why it did not come to its end, in one line."""
    details: str = ""
    """The traceback, or the end of the process's output."""

    @property
    def problems(self) -> list[str]:
        """What failed: the section's own error last."""
        found = [f"{row.what}: {row.problem}" for row in self.rows if row.problem]
        return [*found, self.error] if self.error else found

    @property
    def status(self) -> Literal["passed", "failed", "skipped"]:
        """`failed` with any problem; `skipped` if nothing was measured."""
        if self.problems:
            return "failed"
        return "skipped" if all(row.skipped for row in self.rows) else "passed"

    @property
    def reasons(self) -> list[str]:
        """Why it failed, or what was skipped."""
        skipped = dict.fromkeys(row.skipped for row in self.rows if row.skipped)
        return self.problems or [*([self.skipped] if self.skipped else []), *skipped]

    def to_markdown(self) -> str:
        """Return its part of the report: remarks, tables, and what failed or was skipped."""
        # One table for the rows of equal columns, so that no cell is empty.
        tables: dict[tuple[str, ...], list[list[str]]] = {}
        for row in (row for row in self.rows if row.figures):
            cells = [row.what, *map(_three_digits, row.figures.values()), row.verdict]
            tables.setdefault(tuple(row.figures), []).append(cells)
        notes = [row.what for row in self.rows if not row.figures and not row.skipped]
        notes += [f"{row.what}: not measured, {row.skipped}" for row in self.rows if row.skipped]
        notes += [f"**{problem}**" for problem in self.problems]
        notes += [self.skipped] if self.skipped else []
        parts = [f"## {self.name}", self.question]
        parts += [markdown_table(["", *heads, ""], rows) for heads, rows in tables.items()]
        parts += [bullets(notes)] if notes else []
        parts += [f"```text\n{self.details.strip()}\n```"] if self.details else []
        return "\n\n".join(parts) + "\n"


def to_markdown(results: Sequence[SectionResult], facts: Mapping[str, Any]) -> str:
    """Return the report: facts, one table of verdicts, then each section."""
    verdicts = [
        [
            f"[{result.name}](#{result.name})",
            result.question,
            result.status,
            f"{result.seconds:.0f}",
            "; ".join(result.reasons),
        ]
        for result in results
    ]
    heads = ["section", "question", "verdict", "seconds", "reason"]
    parts = [
        f"# Report of {facts['name']}\n",
        bullets(f"{name}: {value}" for name, value in facts.items()) + "\n",
        markdown_table(heads, verdicts, left_columns=(0, 1, 2, 4)) + "\n",
    ]
    return "\n".join([*parts, *(result.to_markdown() for result in results)])


def to_dict(results: Sequence[SectionResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain JSON values; a figure that is not finite is a string."""
    sections = []
    for result in results:
        rows = [
            {**asdict(row), "figures": {k: _plain(v) for k, v in row.figures.items()}}
            | {"met": row.met}
            for row in result.rows
        ]
        verdict = {"status": result.status, "problems": result.problems}
        sections.append({**asdict(result), "rows": rows, **verdict})
    return {"machine": dict(facts), "sections": sections}


def _plain(value: Figure) -> Any:
    if isinstance(value, Spread):
        return asdict(value)
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def _three_digits(value: Figure) -> str:
    if isinstance(value, Spread):
        ends = f"{_three_digits(value.low)} to {_three_digits(value.high)}"
        is_one = value.low == value.median == value.high
        return _three_digits(value.median) + ("" if is_one else f" ({ends})")
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def machine_facts() -> dict[str, str | int | float]:
    """Return processor, threads, versions and the current load of the machine."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "CPUs": os.cpu_count() or 1,
        "load before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
    }
