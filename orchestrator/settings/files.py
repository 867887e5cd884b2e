"""Settings files: the shipped sweeps, reading, writing for people, and a file to start from."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from orchestrator.settings.resolve import (
    DEFAULTS,
    YamlProblem,
    dump_yaml,
    parse_yaml,
    resolve_settings,
)
from orchestrator.settings.schema import Settings
from orchestrator.settings.section import Section
from orchestrator.workspace.errors import UserError, quoted

SETTINGS_NAME = "settings.yaml"
"""File with the settings of a run or sweep, in its folder."""
COMMENT_WIDTH = 96
_PACKAGE = Path(__file__).resolve().parent.parent

Size = Literal["tiny", "55m", "340m"]
_SWEEP_OF_SIZE = {"tiny": "toy", "55m": "paper-55m", "340m": "paper-340m"}
_VOCABULARY_OF_PAPER = 32000
_ALWAYS_WRITTEN = (
    "data.source", "data.files", "data.hub_name", "data.text_field", "data.tokenizer",
    "data.vocab_size", "model.preset", "model.method", "model.corrections", "training.num_steps",
    "training.num_tokens_per_step", "training.learning_rate", "training.seed",
    "distillation.training.num_steps", "distillation.training.learning_rate", "evaluation.suite",
    "sweep.kind", "sweep.num_schedules", "cluster.num_gpus",
)  # fmt: skip
"""What a beginner changes first. What differs from the defaults is written, too."""


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of every shipped sweep, sorted by name."""
    installed = _PACKAGE / "sweeps"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_settings_file(name: str) -> Path:
    """Return the file of a path, or of the name of a shipped sweep; a `UserError` for others."""
    # A text may be none of a path on this machine, such as one that is too long.
    with suppress(OSError, ValueError, RuntimeError):
        if (path := Path(name).expanduser()).is_file():
            return path
    shipped = shipped_sweeps()
    if name in shipped:
        return shipped[name]
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped)}"
    raise UserError(
        f"there is no settings file {quoted(name)} and no shipped sweep of that name; {hint}"
    )


def read_settings(
    path: Path | str | None,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Read a YAML file, a shipped sweep by its name, or nothing; see `resolve_settings`.

    Raises:
        UserError: If the file is missing or is not a YAML mapping, or a setting is wrong.
    """
    if path is None:
        return resolve_settings({}, assignments, options)
    if isinstance(path, str):
        path = find_settings_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            tree = parse_yaml(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the settings file {path}: {error}") from None
    except YamlProblem as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        raise UserError(
            f"{path} holds no settings; `iiet-orch config init` writes a file to start from"
        )
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold names and values such as `training:`, not a {type(tree).__name__}"
        )
    return resolve_settings(tree, assignments, options, origin=str(path))


def to_yaml(settings: Section) -> str:
    """Return the whole tree as YAML, in the order of declaration."""
    return dump_yaml(settings.model_dump(mode="json"))


def marked_yaml(settings: Settings, *, only_changed: bool = False) -> str:
    """Return the settings as YAML; a value that was changed has its default in a comment."""

    def choose(_key: str, is_usual: bool) -> bool:
        return not (only_changed and is_usual)

    return "".join(_lines(settings, DEFAULTS, choose))


def changed_values(section: Section, default: Any = DEFAULTS) -> dict[str, Any]:
    """Return what differs from the defaults, as JSON values by name."""
    changed: dict[str, Any] = {}
    for name, value in section.model_dump(mode="json").items():
        part = getattr(section, name)
        usual = getattr(default, name, None)
        if part == usual:
            continue
        is_section = isinstance(part, Section)
        changed[name] = changed_values(part, _inner_defaults(part, usual)) if is_section else value
    return changed


def _inner_defaults(section: Section, usual: Section | None) -> Section:
    """Return the defaults of a section's settings: its own if the section is off by default."""
    return type(section).model_construct() if usual is None else usual


def _lines(
    section: Section,
    default: Any,
    choose: Callable[[str, bool], bool],
    prefix: str = "",
    *,
    explain: bool = False,
) -> Iterator[str]:
    """Yield a line of YAML for each setting that `choose` accepts.

    Args:
        choose: Called with a setting's key and whether its value is the default.
        explain: Write the description above each line, instead of the default at its end.
    """
    depth = prefix.count(".")
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        usual = getattr(default, name, None)
        key = prefix + name
        is_usual = value == usual
        has_default = hasattr(default, name)
        is_marked = has_default and not (explain or is_usual or isinstance(usual, Section))
        mark = f"  # default: {_flow(usual)}" if is_marked else ""
        if isinstance(value, Section):
            usual_inside = _inner_defaults(value, usual)
            if inner := [*_lines(value, usual_inside, choose, f"{key}.", explain=explain)]:
                yield f"{indent}{name}:{mark}\n"
                yield from inner
                yield "\n" if explain and not depth else ""
            elif not is_usual and choose(key, is_usual):
                yield f"{indent}{name}: {{}}{mark}\n"
        elif choose(key, is_usual):
            words = " ".join((field.description or "").split()) if explain else ""
            lines = textwrap.wrap(words, COMMENT_WIDTH - len(indent))
            yield from (f"{indent}# {line}\n" for line in lines)
            yield f"{indent}{name}: {_flow(value)}{mark}\n"


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    plain = json.loads(json.dumps(value))  # Tuples become lists.
    if isinstance(plain, str) and not plain.isprintable():
        return json.dumps(plain)
    text = dump_yaml(plain, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def starting_settings(size: Size, options: Mapping[str, Any]) -> Settings:
    """Return the settings of a shipped sweep of a size, for other data.

    Args:
        options: What differs, by `section.key`; such as the data.

    Raises:
        UserError: If they are not valid.
    """
    other_data: dict[str, Any] = {
        "data.files": [],
        "data.hub_name": "",
        "data.tokenizer": "train",
        "data.max_documents": None,
    }
    if size != "tiny":
        other_data["data.vocab_size"] = _VOCABULARY_OF_PAPER
    return read_settings(shipped_sweeps()[_SWEEP_OF_SIZE[size]], (), {**other_data, **options})


def starting_yaml(settings: Settings) -> str:
    """Return such settings as a commented YAML file."""
    unused = "data.files" if settings.data.source == "hub" else "data.hub_name"

    def choose(key: str, is_usual: bool) -> bool:
        return key != unused and (key in _ALWAYS_WRITTEN or not is_usual)

    head = (
        f"# A sweep on your own text: a {settings.model.preset} teacher, its influence, and\n"
        "# a front of distilled schedules. What is not written here has its default:\n"
        "# `iiet-orch config show` prints all settings.\n\n"
    )
    written = "".join(_lines(settings, DEFAULTS, choose, explain=True))
    return head + written.rstrip("\n") + "\n"
