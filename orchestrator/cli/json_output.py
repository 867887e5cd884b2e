"""The option `--json`, and how its result is printed."""

from __future__ import annotations

import json
from typing import Annotated, Any, TextIO

import typer

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON alone; docs/json.md names its keys.")
]


def print_json(value: Any, file: TextIO | None = None) -> None:
    """Print a value as JSON; numbers that are not finite become null."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str), file=file)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and value - value != 0.0 else value
