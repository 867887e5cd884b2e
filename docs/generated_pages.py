"""Writes the parts of the reference that come from the code: the command line and the settings.

The command line is read from the Typer application, the settings from the JSON schema of the
pydantic models. `docs/conf.py` calls this, and pages of docs/reference/ include what it writes.
`python docs/generated_pages.py FOLDER` writes it alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml

from orchestrator import cli
from orchestrator.settings import Settings

COMMAND_LINE = "command-line.md"
SETTINGS = "settings.md"

TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
    "string": "text",
    "array": "list",
    "object": "mapping",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
LARGEST_SHOWN_BOUND = 10**6
"""Larger bounds only keep typing errors from other programs."""


def write_pages(folder: Path) -> None:
    """Write both parts; a file that would not change is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ((COMMAND_LINE, command_line_page()), (SETTINGS, settings_page())):
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def command_line_page() -> str:
    """Return the reference of all commands, in the panels and the order of `iiet-orch --help`."""
    panels: dict[str, list[str]] = {}
    title = ""
    for words, command in _commands(typer.main.get_command(cli.build_app())):
        if len(words) == 1:  # Commands of a group stand in its panel.
            title = getattr(command, "rich_help_panel", title)
        panels.setdefault(title, []).extend(_describe(words, command))
    return "\n".join(line for title, lines in panels.items() for line in (f"## {title}\n", *lines))


def _commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*before, name), command
        if hasattr(command, "commands"):
            yield from _commands(command, (*before, name))


def _describe(words: tuple[str, ...], command: Any) -> list[str]:
    text, _, example = (command.help or "").partition("Example: ")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    lines = [f"### iiet-orch {' '.join(words)}\n", *(f"{_text(p)}\n" for p in paragraphs if p)]
    if example:
        lines.append(f"```bash\n{' '.join(example.split())}\n```\n")
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    if shown:
        lines += ["| option | meaning |", "| --- | --- |"]
        # Arguments first, as in a command.
        shown.sort(key=lambda parameter: parameter.param_type_name != "argument")
        types = get_type_hints(command.callback)
        lines += [_option_row(parameter, types.get(parameter.name)) for parameter in shown]
        lines.append("")
    return lines


def _option_row(parameter: Any, annotation: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or str(parameter.name).upper().rstrip("_")
        names = f"`{name}{' ...' if parameter.nargs == -1 else ''}`"
    else:
        every = [*parameter.opts, *parameter.secondary_opts]
        names = ", ".join(f"`{name}`" for name in every)
    values = _choices(annotation)
    choices = ", ".join(f"`{choice}`" for choice in values)
    text = _text(parameter.help or "")
    default = parameter.default
    is_shown = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    parts = [f"{choices}." if choices else "", text, "Required." if parameter.required else ""]
    parts.append(f"Default: `{default}`." if is_shown else "")
    return f"| {names} | {' '.join(filter(None, parts))} |"


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal`, also where it is one of several types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(_choices, get_args(annotation))), ())


def settings_page() -> str:
    """Return the reference of all settings, section by section."""
    schema = Settings.model_json_schema()
    lines: list[str] = []
    for name, part in schema["properties"].items():
        lines += _section(name, part, getattr(Settings(), name), schema["$defs"])
    return "\n".join(lines)


def _section(
    name: str, part: Mapping[str, Any], default: Any, definitions: Mapping[str, Any]
) -> list[str]:
    """Describe a section and those inside it."""
    section = definitions[_reference(part)]
    text = " ".join(str(section.get("description", "")).split())
    lines = [f"{'#' * (2 + name.count('.'))} {name}\n", f"{_text(text)}\n"]
    lines += ["| setting | meaning |", "| --- | --- |"]
    inner: list[str] = []
    for key, field in section["properties"].items():
        value = getattr(default, key, field.get("default"))
        if _reference(field):
            inner += _section(f"{name}.{key}", field, value, definitions)
            continue
        meaning = _text(" ".join(field.get("description", "").split()))
        usual = f"; default: {_default(value)}" if _default(value) else ""
        lines.append(f"| `{name}.{key}` | {meaning} <br>*{_allowed(field)}{usual}* |")
    return [*lines, "", *inner]


def _reference(part: Mapping[str, Any]) -> str:
    """Return the name of the section that a field is, or an empty text."""
    found = [p["$ref"] for p in (part, *part.get("anyOf", ())) if "$ref" in p]
    return found[0].rpartition("/")[2] if found else ""


def _allowed(part: Mapping[str, Any]) -> str:
    if "anyOf" in part:
        return " or ".join(_allowed(p) for p in part["anyOf"] if p.get("type") != "null")
    if "enum" in part or "const" in part:
        return ", ".join(f"`{choice}`" for choice in part.get("enum", [part.get("const")]))
    bounds = [
        f"{sign} {part[name]:,.10g}"
        for name, sign in BOUNDS.items()
        if name in part and abs(part[name]) <= LARGEST_SHOWN_BOUND
    ]
    return " ".join([TYPES[part["type"]], ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if value is None or value in ((), [], {}, ""):
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
    return f"`{text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}`"


def _text(text: str) -> str:
    """Escape what Markdown's tables would read as marks, but not in code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*<>])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", r"\|")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
