"""The results of a benchmark as values: rows of measurements with their ratio and goal.

The same values become a table on the terminal and JSON in a file. A goal is for one size; rows of
other sizes have none. The median of the ratio decides whether a goal is met; the quartiles beside
it show the noise.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from rich.table import Table

from benchmarks.timing import Spread, paired_ratio


@dataclass(frozen=True)
class Goal:
    """The bound that a ratio should keep."""

    kind: Literal["at most", "at least"]
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


@dataclass(frozen=True)
class Quantity:
    """One measured quantity of a program or variant."""

    label: str
    spread: Spread
    unit: str

    @classmethod
    def one(cls, label: str, value: float, unit: str) -> Quantity:
        """Return a quantity that was measured once."""
        return cls(label, Spread.of([value]), unit)

    @classmethod
    def milliseconds(cls, label: str, seconds: Sequence[float]) -> Quantity:
        """Summarize times that were measured in seconds."""
        return cls(label, Spread.of([1e3 * value for value in seconds]), "ms")

    def __str__(self) -> str:
        return f"{self.label} {_digits(self.spread)} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A claim and its measurements."""

    what: str
    """What was compared, at which size."""
    quantities: tuple[Quantity, ...]
    ratio: Spread | None = None
    """The first quantity over the second, unless `what` says otherwise; None for a row without a
    comparison."""
    goal: Goal | None = None
    """The goal at this size; None without a claim."""

    @classmethod
    def paired(
        cls,
        what: str,
        seconds: Mapping[str, Sequence[float]],
        first: str,
        second: str,
        goal: Goal | None = None,
    ) -> Row:
        """Compare two of the tasks whose seconds were measured in turns."""
        ratio = paired_ratio(seconds[first], seconds[second])
        both = tuple(Quantity.milliseconds(name, seconds[name]) for name in (first, second))
        return cls(what=what, quantities=both, ratio=ratio, goal=goal)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None or self.ratio is None:
            return None
        if self.goal.kind == "at most":
            return self.ratio.median <= self.goal.limit
        return self.ratio.median >= self.goal.limit


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one benchmark."""

    title: str
    setting: str
    """Sizes and conditions in one sentence."""
    rows: Sequence[Row]
    checks: Sequence[str] = ()
    """The equalities checked before measuring."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with `met` in each row."""
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def table(self) -> Table:
        """Return the report as a table."""
        caption = "\n".join([self.setting, *(f"checked: {check}" for check in self.checks)])
        table = Table(title=self.title, caption=caption, caption_justify="left", expand=False)
        for head in ("what", "median (quartiles)", "ratio", "goal", "met"):
            table.add_column(head, justify="right" if head in ("ratio", "goal", "met") else "left")
        for row in self.rows:
            table.add_row(
                row.what,
                "\n".join(map(str, row.quantities)),
                "" if row.ratio is None else _digits(row.ratio),
                "" if row.goal is None else str(row.goal),
                {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[row.met],
            )
        return table


def checked(what: str, difference: float, tolerance: float) -> str:
    """Return a sentence that says how well two computations agree.

    Raises:
        ArithmeticError: they do not agree, so timing them against each other would mean nothing.
    """
    if not difference <= tolerance:
        raise ArithmeticError(f"{what} differ by {difference:.1e}, allowed are {tolerance:.0e}")
    return f"{what} differ by at most {difference:.1e}"


def machine_facts() -> dict[str, str | int | float]:
    """Return processor, threads, versions and the current load of the machine."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cpus": os.cpu_count() or 1,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _digits(spread: Spread) -> str:
    if spread.low == spread.median == spread.high:
        return f"{spread.median:.3g}"
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"
