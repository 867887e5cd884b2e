"""What pipelines return: plans and results, which the command line prints and Python reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.text import Text

from orchestrator.terminal.render import print_line
from orchestrator.workspace.errors import UserError

if TYPE_CHECKING:
    import pandas
    from rich.console import RenderableType


MAX_SHOWN = 100
"""Letters of a field that `repr` shows."""
NOTEBOOK_WIDTH = 130
"""Letters of a line in a notebook."""


class Output(BaseModel):
    """What a command prints: its fields are its JSON, but for those with `Field(exclude=True)`."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True, extra="forbid")

    merged: ClassVar[tuple[str, ...]] = ()
    """Fields whose parts stand beside the other fields in JSON."""
    row_key: ClassVar[str] = ""
    """The key in JSON of the list that `rows` returns, if the output is a table."""

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints: names and plain values."""
        values = self.model_dump(mode="json", by_alias=True)
        for name in self.merged:
            values |= values.pop(name)
        return values

    def to_text(self) -> str:
        """Return that as JSON text; numbers that are not finite become null."""
        return json.dumps(_finite(self.to_json()), indent=2, default=str)

    def rows(self) -> list[dict[str, Any]]:
        """Return the output as a table, if it is one: a row of plain values for each item."""
        if not self.row_key:
            raise NotImplementedError(f"{type(self).__name__} is not a table; use its fields")
        return list(self.to_json()[self.row_key])

    def to_pandas(self) -> pandas.DataFrame:
        """Return `rows` as a table of pandas."""
        import pandas

        return pandas.DataFrame(self.rows())

    def shown(self) -> Iterable[RenderableType]:
        """Return what the terminal shows: sentences, and Rich's tables."""
        return []

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return what a line can show: the fields that are a short text, a number or a path."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            is_short = isinstance(value, str | int | float | Path) and len(str(value)) <= MAX_SHOWN
            if is_short and not field.exclude:
                yield name, value

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what a terminal does."""
        console = Console(width=NOTEBOOK_WIDTH, record=True, file=io.StringIO())
        show(self, console)
        text = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
        return text.replace("<pre>", '<pre style="line-height: 1.3; white-space: pre-wrap">', 1)


class Plan(Output):
    """What a command would do, found out by reading only."""

    @property
    def problems(self) -> dict[str, str | None]:
        """Place -> why a plan does not fit there; None if it does. First this machine."""
        return {}

    def check(self) -> None:
        """Check that a plan can be run on this machine, before anything is made.

        Raises:
            UserError: If it cannot; says what would help.
        """
        if problem := next(iter(self.problems.values()), None):
            raise UserError(problem)


class Result(Output):
    """What a command has done or found."""

    def raise_failures(self) -> None:
        """Raise `RunFailed` if a part failed; called when the result is printed."""


class Answer(Result):
    """A result of a few values and lines."""

    merged = ("values",)

    values: dict[str, Any]
    lines: list[Any] = Field(exclude=True)

    def shown(self) -> Iterable[RenderableType]:
        """Return the lines."""
        return self.lines


def show(output: Output, console: Console) -> None:
    """Print what a terminal shows of a plan or a result."""
    for part in output.shown():
        if isinstance(part, str | Text):
            print_line(console, part)
        else:
            console.print(part)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0.0 else value
