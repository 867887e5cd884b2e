"""Build the settings from defaults, a YAML file, `--set a.b=c` and option values, in this order.

All values end in one nested mapping, which pydantic validates once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from orchestrator.settings.precision import fill_precisions
from orchestrator.settings.safe_yaml import MAX_CHARACTERS, YamlProblem, parse_yaml
from orchestrator.settings.schema import Settings
from orchestrator.settings.section import Section
from orchestrator.settings.shipped import find_settings_file
from orchestrator.workspace.errors import UserError, quoted, shortened

DEFAULTS = Settings()
MAX_PROBLEMS_SHOWN = 20


def resolve_settings(
    tree: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    origin: str = "settings",
) -> Settings:
    """Build the settings; later sources win.

    Args:
        tree: Nested mapping as read from YAML; missing keys keep their defaults.
        assignments: Texts `section.key=value`; the value is read as YAML.
        options: Values by `section.key`.

    Raises:
        UserError: Names every unknown key and every bad value at once, and `origin` unless
            all of them were set by `assignments` or `options`.
    """
    merged = _unshared_copy(tree or {})
    problems: list[str] = []
    changed: list[str] = []
    for change in (*assignments, *(options or {}).items()):
        try:
            name, value = _parse_assignment(change) if isinstance(change, str) else change
            _set_value(merged, name.split("."), value)
            changed.append(f"{name}.")
        except UserError as error:
            problems.append(str(error))
    try:
        # Merged here, not by pydantic: both recipes have one type, but different defaults.
        settings = Settings.model_validate(_merge(DEFAULTS.model_dump(), merged))
    except ValidationError as error:
        found = error.errors()
        problems += [_describe(problem) for problem in found]
        if all(_concerns(problem["loc"], changed) for problem in found):
            origin = "settings"
    if problems:
        raise UserError(_join_problems(origin, problems))
    return fill_precisions(settings, merged)


def read_settings(
    path: Path | str | None,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """Read a YAML file, a shipped sweep by its name, or nothing; see `resolve_settings`.

    Raises:
        UserError: If the file is missing or is not a YAML mapping, or a setting is wrong.
    """
    if isinstance(path, str):
        path = find_settings_file(path)
    tree = _read_yaml(path) if path else {}
    return resolve_settings(tree, assignments, options, origin=str(path) if path else "settings")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)  # Limits memory, however large the file is.
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
        raise UserError(
            f"{path} holds no settings; `iiet-orch init` or `iiet-orch config copy` writes a file "
            "to start from"
        )
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} must hold names and values such as `training:`, not a {type(tree).__name__}"
        )
    return tree


SETTINGS_NAME = "settings.yaml"
"""File with the settings of a run or sweep, in its folder."""


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


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    name, separator, text = assignment.partition("=")
    keys = [key.strip() for key in name.split(".")]
    if not separator or not all(keys):
        raise UserError(
            "--set takes section.key=value, such as training.num_steps=500; got "
            f"{quoted(assignment)}"
        )
    try:
        return ".".join(keys), parse_yaml(text)
    except YamlProblem as error:
        raise UserError(
            f"--set {shortened(name)}: cannot read the value {quoted(text)}: {error}"
        ) from None


def _set_value(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree[key] = {} if tree.get(key) is None else tree[key]
        if not isinstance(child, dict):
            raise UserError(
                f"cannot set {shortened('.'.join(keys))}: {shortened(key)} is a value, "
                "not a section"
            )
        tree = child
    tree[keys[-1]] = value


def _unshared_copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    # `copy.deepcopy` would keep one mapping for all aliases of a YAML anchor.
    return {k: _unshared_copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for name, value in values.items():
        default = merged.get(name)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            merged[name] = _merge(default, value)
        elif value is not None or not isinstance(default, Mapping):
            merged[name] = value  # An empty section keeps its defaults.
    return merged


def _concerns(location: Iterable[str | int], changed: Iterable[str]) -> bool:
    # A validator of a whole section complains about the section.
    where = "".join(f"{part}." for part in location)
    return any(where.startswith(name) or name.startswith(where) for name in changed)


def _describe(problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = _fields_of(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        if near:
            hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?"
        else:
            hint = f"known: {', '.join(known)}"
        return f"{shortened('.'.join(location))} is not a setting; {hint}"
    # A union or a list adds parts after the field's name; the user knows only the field.
    while len(location) > 1 and location[-1] not in _fields_of(location[:-1]):
        location.pop()
    # Pydantic puts "Value error, " before a validator's own sentence.
    message = problem["msg"].removeprefix("Value error, ")
    # YAML has lists; the settings keep them as tuples.
    message = (message[0].lower() + message[1:]).replace("tuple", "list")
    # A section that is refused as a whole is too long to repeat.
    is_section = isinstance(problem["input"], Mapping) and problem["type"] == "value_error"
    given = "" if is_section else f"; got {quoted(problem['input'])}"
    return f"{shortened('.'.join(location))}: {message}{given}"


def find_field(key: str) -> FieldInfo:
    """Return the field of a setting such as `training.num_steps`: type, limits, description.

    Raises:
        KeyError: If there is no such setting.
    """
    *sections, name = key.split(".")
    return _fields_of(sections)[name]


def _fields_of(location: list[str]) -> dict[str, FieldInfo]:
    # Empty if the location is not a section.
    section: type[Section] = Settings
    for name in location:
        field = section.model_fields.get(name)
        # A section that may be left out is one of two types.
        types = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [t for t in types if isinstance(t, type) and issubclass(t, Section)]
        if not found:
            return {}
        section = found[0]
    return section.model_fields


def _join_problems(origin: str, problems: list[str]) -> str:
    unique = list(dict.fromkeys(problems))  # The branches of a union report the same problem.
    if len(unique) == 1:
        return f"{origin}: {unique[0]}"
    shown = [f"  - {text}" for text in unique[:MAX_PROBLEMS_SHOWN]]
    if len(unique) > len(shown):
        shown.append(f"  - and {len(unique) - len(shown)} more")
    return "\n".join([f"{origin}: {len(unique)} problems", *shown])
