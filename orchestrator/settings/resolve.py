"""From defaults, a YAML file and `--set a.b=c` to the settings; every mistake is named at once."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.settings.section import Section
from orchestrator.settings.tree import Settings
from orchestrator.settings.yaml_text import MAX_CHARACTERS, YamlProblem, parse_yaml
from orchestrator.workspace.errors import UserError, quoted, shortened

MAX_PROBLEMS_SHOWN = 50
"""Of a file that is none of ours, the first tell enough."""


def resolve_settings(
    tree: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    *,
    origin: str = "settings",
) -> Settings:
    """Build the settings from a YAML tree and `a.b=c` assignments, in this order.

    Args:
        tree: Nested mapping as read from YAML; missing keys keep their defaults.
        assignments: Texts of the form `section.key=value`; the value is read as YAML.
        origin: What the tree came from; it stands in the error.

    Raises:
        UserError: Names every unknown key and every bad value at once.
    """
    merged = _deep_copy(tree or {})
    problems: list[str] = []
    for assignment in assignments:
        try:
            _assign(merged, assignment)
        except UserError as error:
            problems.append(str(error))
    # Over the defaults of this very tree: the two recipes have one type and different defaults.
    merged = _merge(Settings().model_dump(), merged)
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        problems += [_describe(problem) for problem in error.errors()]
    if problems:
        raise UserError(_as_list(origin, problems))
    return settings


def read_settings(path: Path | None, assignments: Iterable[str] = ()) -> Settings:
    """Read a YAML file (or none) and apply assignments.

    Raises:
        UserError: If the file is missing or is not a YAML mapping, or a setting is wrong.
    """
    tree = read_yaml(path) if path else {}
    return resolve_settings(tree, assignments, origin=str(path) if path else "settings")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        UserError: If the file is missing, unreadable, too large, or no mapping of names to values.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)  # No more, however large the file is.
        if len(text) > MAX_CHARACTERS:
            raise YamlProblem(f"it has more than {MAX_CHARACTERS:,} characters")
        tree = parse_yaml(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"the settings file {path} is not UTF-8 text (byte {error.start}); convert it first"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the settings file {path}: {error}") from None
    except YamlProblem as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold names and values such as `training:`, not a {type(tree).__name__}"
        )
    return tree


def to_yaml(settings: Section) -> str:
    """Return the whole tree as YAML, in the order of declaration."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def flatten(settings: Section, prefix: str = "") -> dict[str, str]:
    """Return `section.key` -> value as text, for parameters of a tracked run."""
    flat: dict[str, str] = {}
    for name, value in settings:
        if isinstance(value, Section):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "" if value is None else str(value)
    return flat


def _assign(tree: dict[str, Any], assignment: str) -> None:
    name, separator, text = assignment.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not separator or not all(keys):
        raise UserError(
            "--set takes section.key=value, such as training.num_steps=500; got "
            f"{quoted(assignment)}"
        )
    try:
        value = parse_yaml(text)
    except YamlProblem as error:
        raise UserError(
            f"--set {shortened(name)}: cannot read the value {quoted(text)}: {error}"
        ) from None
    for key in keys[:-1]:
        child = tree[key] = {} if tree.get(key) is None else tree[key]
        if not isinstance(child, dict):
            raise UserError(
                f"--set {shortened(assignment)}: {shortened(key)} is a value, not a section"
            )
        tree = child
    tree[keys[-1]] = value


def _deep_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        if not isinstance(lower, Mapping):
            merged[name] = value
        elif isinstance(value, Mapping):
            merged[name] = _merge(lower, value)
        elif value is not None:  # A section with nothing in it keeps its defaults.
            merged[name] = value
    return merged


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    section = _section_at(location[:-1])
    known = list(section.model_fields) if section else []
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = (
            f"did you mean {'.'.join([*location[:-1], near[0]])}?"
            if near
            else f"known: {', '.join(known)}"
        )
        return f"{shortened('.'.join(location))} is no setting; {hint}"
    # A union or a tuple adds parts of its own behind the field's name; the user knows only the
    # field.
    while len(location) > 1 and location[-1] not in known:
        location.pop()
        section = _section_at(location[:-1])
        known = list(section.model_fields) if section else []
    # YAML has lists; that the settings keep them as tuples is nobody's concern.
    message = (problem["msg"][0].lower() + problem["msg"][1:]).replace("tuple", "list")
    return f"{shortened('.'.join(location))}: {message}; got {quoted(problem['input'])}"


def _section_at(location: list[str]) -> type[Section] | None:
    section: type[Section] = Settings
    for name in location:
        field = section.model_fields.get(name)
        kind = field.annotation if field else None
        if not (
            isinstance(kind, type)
            and not isinstance(kind, types.GenericAlias)
            and issubclass(kind, Section)
        ):
            return None
        section = kind
    return section


def _as_list(origin: str, problems: list[str]) -> str:
    unique = list(dict.fromkeys(problems))  # The branches of a union say the same thing.
    if len(unique) == 1:
        return f"{origin}: {unique[0]}"
    shown = [f"  - {text}" for text in unique[:MAX_PROBLEMS_SHOWN]]
    if len(unique) > len(shown):
        shown.append(f"  - and {len(unique) - len(shown)} more")
    return "\n".join([f"{origin}: {len(unique)} problems", *shown])
