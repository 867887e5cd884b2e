"""Parse YAML from users safely: plain values only, within limits.

A small text can still be huge through aliases, so size, depth and number of values are limited
before anything is built. Numbers that YAML 1.1 reads in a surprising way are refused: `017` would
be 15, and `1:30` would be 90.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from orchestrator.workspace.errors import quoted, shortened

MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Values and names in a text; every use of an alias counts again."""

INT = "tag:yaml.org,2002:int"
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class YamlProblem(ValueError):
    """A YAML text that is invalid or refused; its message is one line."""


def parse_yaml(text: str) -> Any:
    """Return the plain values that a YAML text holds.

    Raises:
        YamlProblem: If the text is invalid, breaks a limit, or holds an unreadable value.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlProblem(f"it has {len(text):,} characters; {MAX_CHARACTERS:,} are allowed")
    try:
        return yaml.load(text, _Loader)  # A subclass of the safe loader.
    except yaml.YAMLError as error:
        raise YamlProblem(_one_line(error)) from None
    # PyYAML converts some values without checks.
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise YamlProblem(f"it holds a value that cannot be read ({quoted(str(error))})") from None


class _Loader(yaml.SafeLoader):
    """The safe loader with limits; refuses a name that appears twice in a mapping."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._measured: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(event.anchor)
            if known is not None and id(known) not in self._measured:
                raise _problem(f"*{quoted(event.anchor)} contains itself", event.start_mark)
            return super().compose_node(parent, index)
        if self._depth >= MAX_DEPTH:
            raise _problem(f"it is nested more than {MAX_DEPTH} levels deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._measure(node)
            if len(self._measured) > MAX_VALUES:  # Fail before the rest of a large text is read.
                raise _problem(f"it holds more than {MAX_VALUES:,} values", event.start_mark)
        return node

    def _measure(self, node: yaml.Node) -> None:
        # Values and levels as if every alias were written out.
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        known = [self._measured[id(child)] for child in children]
        size = 1 + sum(values for values, _ in known)
        depth = 1 + max((levels for _, levels in known), default=0)
        if size > MAX_VALUES:
            raise _problem(f"it holds more than {MAX_VALUES:,} values", node.start_mark)
        if depth > MAX_DEPTH:
            raise _problem(f"it is nested more than {MAX_DEPTH} levels deep", node.start_mark)
        self._measured[id(node)] = size, depth

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise _problem(
                        f"{shortened(key.value)} appears more than once", node.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError):
            if not isinstance(node, yaml.ScalarNode):
                raise
            tag = node.tag.rpartition(":")[2]
            kind = {"timestamp": "date", "int": "whole number", "float": "number"}.get(tag, tag)
            raise _problem(
                f"{quoted(node.value)} cannot be read as a {kind}", node.start_mark
            ) from None

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node))
        if _OCTAL.fullmatch(text):
            plain = text.replace("_", "").lstrip("+-").lstrip("0") or "0"
            raise _problem(
                f"{quoted(text)} begins with 0, which YAML reads as octal; write {quoted(plain)}, "
                "or put it in quotes if it is a text",
                node.start_mark,
            )
        if ":" in text:
            raise _problem(
                f"{quoted(text)} would be read as a number in base 60; write it in one unit, or "
                "put it in quotes if it is a text",
                node.start_mark,
            )
        return self.construct_yaml_int(node) if node.tag == INT else self.construct_yaml_float(node)


_Loader.add_constructor(INT, _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _problem(text: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def _one_line(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return shortened(" ".join(str(error).split()))
    mark = error.problem_mark or error.context_mark
    text = ", ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{shortened(text)}{where}"
