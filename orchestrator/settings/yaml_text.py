"""Read and write YAML as settings use it: PyYAML's safe loader, within limits.

A name appears once in a mapping. Numbers are read as people write them: `3e-4` is a number, and
neither `017` (octal in YAML 1.1) nor `1:30` (there in base 60) nor a date is a whole number.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from orchestrator.workspace.errors import shortened

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
