"""Base class of all sections of the settings, and texts that are one of several names.

Sections use pydantic's strict types, so that `true` is not the number 1, and a text not a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    field_validator,
)
from pydantic_core import core_schema

from iiet.extensions import ExtensionTable

MAX_COUNT = 2**31 - 1
"""Largest count that libraries below can hold in 32 bits."""
_MAX_WHOLE_NUMBER = 2**53  # Floats represent whole numbers exactly up to here.


class Section(BaseModel):
    """Base of all sections: frozen, refuses unknown names, a docstring under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_huge(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > _MAX_WHOLE_NUMBER:
            raise ValueError("this number is too large")
        return value


@dataclass(frozen=True, eq=False)
class OneOf:
    """Annotation of a text: one of the names to which other packages add (`iiet.extensions`).

    Raises:
        ValueError: In the validation, if there is no such name, or the class
            of another package cannot be imported.
    """

    table: ExtensionTable[Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate the text, then the name."""
        return core_schema.no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """List the names that are known now."""
        return {**handler(schema), "enum": list(self.table)}

    def checked(self, name: str) -> str:
        """Return the name if it can be used."""
        if name not in self.table:
            *first_names, last_name = map(repr, self.table)
            raise ValueError(f"input should be {', '.join(first_names)} or {last_name}")
        if name not in self.table.own_classes:
            self.table.load(name)  # The package of this class may be broken.
        return name
