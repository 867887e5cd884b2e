"""The results of a benchmark as values: rows of measurements with their ratio and goal.

The same values become a table on the terminal and JSON in a file. A goal is for one size; rows of
other sizes have none. The median of the ratio decides whether a goal is met; the quartiles beside
it show the noise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.table import Table

from benchmarks.timing import Spread


@dataclass(frozen=True)
class Goal:
    """The bound that a ratio should keep."""

    kind: Literal["at most", "at least"]
    limit: float

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.kind == "at most" else value >= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


@dataclass(frozen=True)
class Quantity:
    """One measured quantity."""

    label: str
    """The program or variant that was measured."""
    spread: Spread
    unit: str

    def __str__(self) -> str:
        return f"{self.label} {_digits(self.spread)} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A claim and its measurements."""

    what: str
    """What was compared, at which size."""
    quantities: tuple[Quantity, ...]
    """The measured quantities."""
    ratio: Spread | None = None
    """The first quantity over the second, unless `what` says otherwise; None for a row without a
    comparison."""
    goal: Goal | None = None
    """The goal at this size; None without a claim."""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None or self.ratio is None:
            return None
        return self.goal.met_by(self.ratio.median)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, including `met`."""
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of one benchmark."""

    title: str
    setting: str
    """Sizes and conditions in one sentence."""
    rows: tuple[Row, ...]
    checks: tuple[str, ...] = field(default=())
    """The equalities checked before measuring."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {
            "title": self.title,
            "setting": self.setting,
            "checks": list(self.checks),
            "rows": rows,
        }

    def table(self) -> Table:
        """Return the report as a table."""
        caption = "\n".join([self.setting, *(f"checked: {check}" for check in self.checks)])
        table = Table(title=self.title, caption=caption, caption_justify="left", expand=False)
        table.add_column("what")
        table.add_column("median (quartiles)")
        table.add_column("ratio", justify="right")
        table.add_column("goal", justify="right")
        table.add_column("met", justify="right")
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


def _digits(spread: Spread) -> str:
    if spread.low == spread.median == spread.high:
        return f"{spread.median:.3g}"
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"
