"""Print what a pipeline returns: a plan or a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.terminal.layout import print_line

if TYPE_CHECKING:
    from orchestrator.cli.session import Session
    from orchestrator.pipelines.result import Result


def show(session: Session, result: Result, *, as_json: bool) -> None:
    """Print a plan or a result; then raise `RunFailed` if a part of it failed."""
    if as_json:
        session.print_json(result.to_json())
    else:
        for part in result.shown():
            if isinstance(part, str):
                print_line(session.console, part)
            else:
                session.console.print(part)
    result.raise_failures()
