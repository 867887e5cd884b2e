"""Build the settings from defaults, a YAML file, `--set a.b=c` and option values, in this order.

All values end in one nested mapping, which pydantic validates once. YAML is read by PyYAML's safe
loader, within limits. A name appears once in a mapping. Numbers are read as people write them:
`3e-4` is a number, and neither `017` (octal in YAML 1.1) nor `1:30` (there in base 60) nor a date
is a whole number.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
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
            and `origin` unless all of them were set by `assignments` or `options`.
    """
    merged = _unshared_copy(tree or {})
    problems: list[str] = []
    changed: list[str] = []
    for change in (*assignments, *(options or {}).items()):
        try:
            name, value = _parse_assignment(change) if isinstance(change, str) else change
            changed.append(name)
            _set_value(merged, name.split("."), value)
        except UserError as error:
            problems.append(str(error))
    try:
        # Merged here, not by pydantic: both recipes have one type, but different defaults.
        settings = Settings.model_validate(_merge(DEFAULTS.model_dump(), merged))
    except ValidationError as error:
        found = [text for problem in error.errors() for text in _described(problem)]
        if all(_concerns(text, changed) for text in found):
            origin = "settings"
        problems += found
    if problems:
        raise UserError(list_of_problems(origin, problems))
    return _fill_precisions(settings, merged)


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


def _concerns(problem: str, changed: Iterable[str]) -> bool:
    # A problem begins with the setting, or, of a rule, names all settings that break it.
    setting = problem.partition(":")[0]
    return any(name in problem or name.startswith(f"{setting}.") for name in changed)


def _described(problem: Any) -> list[str]:
    location = [str(part) for part in problem["loc"]]
    if not location:  # Broken rules, one a line; or the whole tree is not a mapping.
        return str(problem["msg"]).removeprefix("Value error, ").split("\n")
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
    message = problem["msg"].removeprefix("Value error, ").replace("tuple", "list")
    message = message[0].lower() + message[1:]
    return [f"{shortened('.'.join(location))}: {message}; got {quoted(problem['input'])}"]


def _fill_precisions(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return the settings with the precision of their devices where `given` names none.

    This happens once, when settings are read. Recipes, keys and records then hold the precision
    itself, and a plan does not depend on the machine that makes it.
    """
    trials = settings.trials_use_gpus
    run = trials if settings.sweep.kind == "iterations" else settings.cluster.num_gpus > 0
    training, distillation, evaluation = (
        settings.training, settings.distillation, settings.evaluation,
    )  # fmt: skip
    if "precision" not in (given.get("training") or {}):
        training = training.model_copy(update={"precision": default_precision(on_gpus=run)})
    if "precision" not in ((given.get("distillation") or {}).get("training") or {}):
        recipe = distillation.training.model_copy(
            update={"precision": default_precision(on_gpus=trials)}
        )
        distillation = distillation.model_copy(update={"training": recipe})
    # Without GPUs it stays open: `evaluate` loads models on a GPU if this machine has one.
    if trials and not evaluation.precision:
        evaluation = evaluation.model_copy(update={"precision": "bf16"})
    return settings.model_copy(
        update={"training": training, "distillation": distillation, "evaluation": evaluation}
    )


MAX_CHARACTERS = 1_000_000
"""Longest text, also with every alias of an anchor written out."""
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_REPLACED = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")
_NUMBERS = {
    _INT: r"[-+]?(0|[1-9](_?[0-9]){0,18})$",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$",
}


class YamlProblem(ValueError):
    """A YAML text that is invalid or refused; its message is one line."""


def parse_yaml(text: str) -> Any:
    """Return the plain values that a YAML text holds.

    Raises:
        YamlProblem: If the text is invalid or too long, or a name appears twice.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlProblem(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _length(node, {}) > MAX_CHARACTERS:
            raise YamlProblem(
                f"it has more than {MAX_CHARACTERS:,} characters with its anchors written out"
            )
        return loader.construct_document(node)
    except YamlProblem:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        words = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(shortened(" ".join(words.split())) + where) from None
    except RecursionError:
        raise YamlProblem("it is nested too deeply") from None
    except Exception as error:  # PyYAML converts values with a tag, such as !!int, unchecked.
        words = shortened(" ".join(str(error).split()))
        raise YamlProblem(f"it holds a value that cannot be read ({words})") from None


def dump_yaml(values: Any, **options: Any) -> str:
    """Return plain values as YAML that `parse_yaml` reads."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, **options))


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"{shortened(key.value)} appears more than once"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes also those texts that `_Loader` would read as numbers."""


_Loader.yaml_implicit_resolvers = {
    first: [found for found in resolvers if found[0] not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, re.compile(_NUMBERS[_FLOAT]), list("-+.0123456789"))


def _length(node: yaml.Node, known: dict[int, float]) -> float:
    """Return the characters of all values as if every alias were written out.

    An anchor that contains itself is endless.
    """
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        own = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        known[id(node)] = 1 + own + sum(_length(part, known) for part in parts)
    return known[id(node)]
