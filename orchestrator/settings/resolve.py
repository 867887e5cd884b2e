"""Build the settings from defaults, a YAML file, `--set a.b=c` and option values, in this order.

All values end in one nested mapping, which pydantic validates once. YAML is read by PyYAML's safe
loader, with two differences: a name appears once in a mapping, and `3e-4` is a number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from orchestrator.settings.schema import Settings, fields_of
from orchestrator.settings.section import Section
from orchestrator.settings.training import default_precision
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
        UserError: Names every unknown key and every bad value at once, or else every broken rule;
            and `origin` if the tree alone has problems, too.
    """
    merged = _merge({}, tree or {})  # A copy for each alias of a YAML anchor.
    problems: list[str] = []
    for change in (*assignments, *(options or {}).items()):
        try:
            name, value = _parse_assignment(change) if isinstance(change, str) else change
            _set_value(merged, name.split("."), value)
        except UserError as error:
            problems.append(str(error))
    try:
        settings = Settings.model_validate(_with_defaults(merged))
    except ValidationError as error:
        errors = error.errors()
        for problem in errors:
            if not _has_a_wrong_item(problem, errors):
                problems += _described(problem)
    if not problems:
        return _fill_precisions(settings, merged)
    if assignments or options:
        resolve_settings(tree, origin=origin)  # Blames the file for its own problems.
        origin = "settings"
    raise UserError(list_of_problems(origin, problems))


def list_of_problems(origin: str, problems: Iterable[str]) -> str:
    """Return a message of all problems, or of the first ones and their number."""
    unique = list(dict.fromkeys(problems))  # The branches of a union report the same problem.
    if len(unique) == 1:
        return f"{origin}: {unique[0]}"
    shown = [f"  - {text}" for text in unique[:MAX_PROBLEMS_SHOWN]]
    if len(unique) > len(shown):
        shown.append(f"  - and {len(unique) - len(shown)} more")
    return "\n".join([f"{origin}: {len(unique)} problems", *shown])


def flatten(settings: Section, prefix: str = "") -> dict[str, str]:
    """Return `section.key` -> value as text, for parameters of a tracked run."""
    flat: dict[str, str] = {}
    for name, value in settings:
        if isinstance(value, Section):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = "" if value is None else str(value)
    return flat


def changed_keys(assignment: str) -> list[str]:
    """Return the keys of the settings that a text `section.key=value` changes; of a mapping, those
    of its values. A text that is no assignment changes none; `resolve_settings` refuses it."""
    try:
        name, value = _parse_assignment(assignment)
    except UserError:
        return []
    return list(_keys_in(name, value))


def _keys_in(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for inner_name, inner_value in value.items():
            yield from _keys_in(f"{name}.{inner_name}", inner_value)
    else:
        yield name


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
        place = f"--set {shortened(name)}"
        raise UserError(f"{place}: cannot read the value {quoted(text)}: {error}") from None


def _set_value(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = tree[key] = {} if tree.get(key) is None else tree[key]
        if not isinstance(child, dict):
            name = shortened(".".join(keys))
            raise UserError(f"cannot set {name}: {shortened(key)} is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def _merge(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(defaults)
    for name, value in values.items():
        default = merged.get(name)
        if isinstance(value, Mapping):
            merged[name] = _merge(default if isinstance(default, Mapping) else {}, value)
        elif value is not None or not isinstance(default, Mapping):
            merged[name] = value  # An empty section keeps its defaults.
    return merged


def _with_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those defaults that the types do not have.

    Both recipes have one type, but different defaults. All others are left to pydantic, so that
    `model_fields_set` of a section says which values were given.
    """
    students = DEFAULTS.distillation.training.model_dump()
    values = _merge({"distillation": {"training": students}}, tree)
    return _without_empty_sections(values, DEFAULTS.model_dump())


def _without_empty_sections(
    values: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    # An empty section keeps its defaults.
    full: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            full[name] = _without_empty_sections(value, default)
        elif value is not None or not isinstance(default, Mapping):
            full[name] = value
    return full


def _has_a_wrong_item(problem: Any, errors: list[Any]) -> bool:
    """Return whether the value is a list with an item that another problem is about."""
    value = problem["input"]
    if not isinstance(value, list | tuple):
        return False
    place = problem["loc"]
    section = place[:-1]
    return any(
        len(error["loc"]) > len(place)
        and error["loc"][: len(section)] == section
        and error["input"] in value
        for error in errors
    )


def _described(problem: Any) -> list[str]:
    """Return pydantic's message after the setting's name, or the broken rules, one a line."""
    location = [str(part) for part in problem["loc"]]
    message = problem["msg"]
    message = message.removeprefix("Value error, ")
    if not location:
        return str(message).split("\n")
    if problem["type"] == "extra_forbidden":
        known = fields_of(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"known: {', '.join(known)}"
        if near:
            hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?"
        return [f"{shortened('.'.join(location))} is not a setting; {hint}"]
    # A union or a list adds parts after the field's name; the user knows only the field.
    while len(location) > 1 and location[-1] not in fields_of(location[:-1]):
        location.pop()
    # YAML has lists; the settings keep them as tuples.
    message = message[0].lower() + message[1:].replace("tuple", "list")
    return [f"{shortened('.'.join(location))}: {message}; got {quoted(problem['input'])}"]


def _fill_precisions(settings: Settings, tree: Mapping[str, Any]) -> Settings:
    """Return the settings with the precision of their devices where the tree names none.

    This happens once, when settings are read. Recipes, keys and records then hold the precision
    itself, and a plan does not depend on the machine that makes it.
    """
    trials_use_gpus = settings.trials_use_gpus
    if settings.sweep.kind == "iterations":  # Its trials are the pretrainings.
        pretraining_uses_gpus = trials_use_gpus
    else:
        pretraining_uses_gpus = settings.cluster.num_gpus > 0
    changes: dict[str, Any] = {}
    pretrainings = {"training": settings.training, "source_training": settings.source_training}
    for name, recipe in pretrainings.items():
        if recipe is not None and "precision" not in (tree.get(name) or {}):
            precision = {"precision": default_precision(on_gpus=pretraining_uses_gpus)}
            changes[name] = recipe.model_copy(update=precision)
    distillation = settings.distillation
    if "precision" not in ((tree.get("distillation") or {}).get("training") or {}):
        precision = {"precision": default_precision(on_gpus=trials_use_gpus)}
        recipe = distillation.training.model_copy(update=precision)
        changes["distillation"] = distillation.model_copy(update={"training": recipe})
    # Without GPUs it stays open: `evaluate` loads models on a GPU if this machine has one.
    if trials_use_gpus and not settings.evaluation.precision:
        changes["evaluation"] = settings.evaluation.model_copy(update={"precision": "bf16"})
    return settings.model_copy(update=changes)


class YamlProblem(ValueError):
    """A YAML text that is invalid; its message is one line."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise YamlProblem(
                        f"{shortened(key.value)} appears more than once (line {line})"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes also those texts that `_Loader` would read as numbers."""


for _form in (_Loader, _Dumper):
    _number = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
    _form.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Return the plain values that a YAML text holds.

    Raises:
        YamlProblem: If the text is invalid, or a name appears twice.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML converts values with a tag, such as !!int, unchecked.
        raise YamlProblem(shortened(" ".join(str(error).split()))) from None


def dump_yaml(values: Any, **options: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options))
