"""Writes the parts of the reference that come from the code: the command line and the settings.

The command line is read from the Typer application, the keys of `--json` from the docstrings of the
results or from `KEYS`, the settings from the JSON schema of the pydantic models. `docs/conf.py`
calls this, and pages of docs/reference/ include what it writes.
`python docs/generated_pages.py FOLDER` writes it alone.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import yaml

from orchestrator import cli
from orchestrator.pipelines import (
    benchmarking,
    doctor,
    evaluating,
    influence,
    inspecting,
    models,
    syncing,
    training,
    upkeep,
)
from orchestrator.reporting.output import Output, Plan, Result
from orchestrator.reporting.sweep_report import ReportResult
from orchestrator.settings import Settings
from orchestrator.sweeping import plan, sweep

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
SWEEPS: dict[str, type[Output]] = {"": sweep.SweepResult, "--dry-run": plan.SweepPlan}
RESULTS: dict[str, dict[str, type[Output]]] = {
    **dict.fromkeys(("quickstart", "sweep", "sweep-threshold", "sweep-iterations"), SWEEPS),
    "doctor": {"": doctor.Findings},
    "pretrain": {"": training.PretrainResult, "--dry-run": training.TrainingPlan},
    "distill": {"": training.StudentsResult},
    "inspect": {"": inspecting.InspectedModel},
    "influence": {
        "": influence.InfluenceResult,
        "--dry-run": influence.InfluencePlan,
    },
    "evaluate": {
        "": evaluating.ModelEvaluations,
        "--dry-run": evaluating.EvaluatePlan,
    },
    "benchmark": {
        "": benchmarking.BenchmarkResult,
        "--dry-run": benchmarking.BenchmarkPlan,
    },
    "report": {"": ReportResult},
    "pick": {"": models.PickResult},
    "ui": {"--sync": syncing.SyncResult},
    "list": {"": upkeep.Listing, "running": upkeep.WorkspaceStatus},
    "clean": {"": upkeep.CleanPlan},
}
"""Command -> what it prints as JSON, by its options."""
KEYS = {
    "prepare": {
        "tokens": "folder of the prepared tokens",
        "num_documents": "documents of the text, with those held out; `null` without a text",
        "num_tokens": "their tokens, likewise",
        "vocab_size": "entries of the vocabulary",
    },
    "generate": {
        "model": "folder of the model that was used",
        "schedule": "its schedule, or `null` without corrections",
        "texts": "one entry per prompt: `prompt`, and its continuation `text`",
    },
    "import": {"checkpoint": "the new checkpoint"},
    "export": {
        "folder": "the exported folder",
        "hub": "with `--push-to-hub` the address of its page, else `null`",
    },
    "config show": {"settings": "section to its settings by name, as in a file"},
    "config list": {"sweeps": "one entry per shipped sweep: `name`, and `text`, what it does"},
}
"""Command -> the keys of the values that it prints as JSON."""
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
    for words, command in _commands(typer.main.get_command(cli.commands)):
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
    if reads := getattr(command.callback, "reads", ()):
        lines.append(f"It reads these settings: {', '.join(f'`{part}`' for part in reads)}.\n")
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    if shown:
        lines += ["| option | meaning |", "| --- | --- |"]
        # Arguments first, as in a command.
        shown.sort(key=lambda parameter: parameter.param_type_name != "argument")
        types = inspect.signature(command.callback).parameters
        lines += [_option_row(option, types[option.name].annotation) for option in shown]
        lines.append("")
    name = " ".join(words)
    for options, keys in json_keys(name).items():
        lines += [
            f"`{f'{name} {options}'.strip()} --json`:\n",
            "| key | content |",
            "| --- | --- |",
        ]
        lines += [f"| `{key}` | {_text(text)} |" for key, text in keys.items()]
        lines.append("")
    return lines


def json_keys(name: str) -> dict[str, dict[str, str]]:
    """Return the keys that a command prints as JSON with their texts, by its options."""
    if name in RESULTS:
        return {options: _keys_of(result) for options, result in RESULTS[name].items()}
    return {"": KEYS[name]} if name in KEYS else {}


def _keys_of(result: type[Output]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in reversed(result.__mro__):
        if not issubclass(kind, Output) or kind in (Output, Plan, Result):
            continue
        if "to_json" in vars(kind):
            found = _keys_in(vars(kind)["to_json"].__doc__)
            continue
        texts = _texts_of_attributes(kind)
        for name in vars(kind).get("__annotations__", {}):
            field = kind.model_fields.get(name)
            if field is None or field.exclude:
                continue
            text = " ".join(texts.get(name, "").split())
            inner = [each for each in get_args(field.annotation) if inspect.isclass(each)]
            if name in kind.merged:  # Its parts stand beside the other keys.
                parts = get_args(next(iter(get_args(field.annotation)), None))
                found |= _keys_in(texts[name]) or dict.fromkeys(parts, text)
                continue
            if inner and issubclass(inner[0], Output):
                of_each = ", ".join(f"`{key}`" for key in _keys_of(inner[0]))
                text = f"{text} Each has {of_each}."
            found[field.serialization_alias or name] = text
        for name, computed in kind.model_computed_fields.items():
            if name in vars(kind):
                found[name] = " ".join((computed.description or "").split("\n\n")[0].split())
    return found


def _texts_of_attributes(kind: type) -> dict[str, str]:
    """Return the docstrings below the attributes of a class."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        one.target.id: str(text.value.value)
        for one, text in pairs
        if isinstance(one, ast.AnnAssign)
        and isinstance(one.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _keys_in(docstring: str | None) -> dict[str, str]:
    """Return the section `Keys:` of a docstring."""
    text = inspect.cleandoc(docstring or "").partition("\n\nKeys:\n")[2]
    parts = re.split(r"^ {4}(\w+): ", text, flags=re.MULTILINE)[1:]
    return {k: " ".join(t.split()) for k, t in zip(parts[::2], parts[1::2], strict=True)}


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
