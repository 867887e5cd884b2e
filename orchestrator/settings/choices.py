"""Settings whose values are names in a table to which other packages add (`iiet.extensions`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

from iiet.extensions import ExtensionNames, ExtensionTable


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text: one of the names of a table.

    Raises:
        ValueError: In the validation, if there is no such name, or two packages have it; with a
            table of classes also if its package cannot be imported.
    """

    names: ExtensionNames | ExtensionTable[Any]
    also: tuple[str, ...] = ()
    """Further names, which no table holds."""

    def __iter__(self) -> Iterator[str]:
        return iter((*self.also, *self.names))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate the text, then the name."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """List the names that are known now."""
        return {**handler(schema), "enum": list(self)}

    def _checked(self, name: str) -> str:
        if name in self.also:
            return name
        if name not in self.names:
            *others, last = map(repr, self)
            raise ValueError(f"input should be {', '.join(others)} or {last}")
        if isinstance(self.names, ExtensionTable):
            self.names[name]
        else:
            self.names.entry_point(name)
        return name
