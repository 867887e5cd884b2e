"""Write settings as YAML that people read: what differs from the defaults, what a setting means."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from orchestrator.settings.resolve import DEFAULTS
from orchestrator.settings.schema import Settings
from orchestrator.settings.section import Section

COMMENT_WIDTH = 96
_INDENT = "  "

Choose = Callable[[str, Any, Any], bool]
"""Name `section.key`, value and default of a setting -> whether to write it."""


def marked_yaml(settings: Settings, *, only_changed: bool = False) -> str:
    """Return the settings as YAML; what differs from the default is marked with the default."""

    def choose(_: str, value: Any, default: Any) -> bool:
        return not only_changed or value != default

    return "".join(_lines(settings, DEFAULTS, "", choose, mark=True))


def explained_yaml(settings: Settings, choose: Choose) -> str:
    """Return the chosen settings as YAML, each under a comment that says what it means."""
    return "".join(_lines(settings, DEFAULTS, "", choose, explain=True))


def _lines(
    section: Section,
    default: Any,
    prefix: str,
    choose: Choose,
    *,
    mark: bool = False,
    explain: bool = False,
) -> Iterator[str]:
    depth = prefix.count(".")
    indent = _INDENT * depth
    for name, field in type(section).model_fields.items():
        value, usual = getattr(section, name), getattr(default, name, None)
        if isinstance(value, Section):
            inner = [*_lines(value, usual, f"{prefix}{name}.", choose, mark=mark, explain=explain)]
            if inner:
                yield f"{indent}{name}:{_mark(value, usual) if mark and usual is None else ''}\n"
                yield from inner
                yield "\n" if explain and not depth else ""
        elif choose(f"{prefix}{name}", value, usual):
            if explain:
                words = " ".join((field.description or "").split())
                width = COMMENT_WIDTH - len(indent)
                yield from (f"{indent}# {line}\n" for line in textwrap.wrap(words, width))
            yield f"{indent}{name}: {_flow(value)}{_mark(value, usual) if mark else ''}\n"


def _mark(value: Any, default: Any) -> str:
    return "" if value == default else f"  # default: {_flow(default)}"


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    plain = json.loads(json.dumps(value))  # Tuples become lists.
    if isinstance(plain, str) and not plain.isprintable():
        return json.dumps(plain)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
