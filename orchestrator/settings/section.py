"""What all sections of the settings have in common."""

from __future__ import annotations

import re
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

MAX_WHOLE_NUMBER = 2**53
"""Beyond it, whole numbers are not whole any more where they meet real ones."""
_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9_]")

MAX_COUNT = 2**31 - 1
"""Largest count where libraries below hold it in 32 bits."""


class Section(BaseModel):
    """Base of all sections: frozen, strict about names, a sentence under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _values_are_of_their_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would convert and nobody means: a switch as a number, a number as a
        switch, and digits that begin with 0."""
        kinds = _kinds_in(cls.model_fields[str(info.field_name)].annotation)
        takes_number, takes_switch = bool({int, float} & kinds), bool in kinds
        for part in _parts(value):
            if isinstance(part, bool):
                if takes_number and not takes_switch:
                    raise PydanticCustomError(
                        "switch_as_number",
                        "this is a number, and YAML reads true, yes and on as a switch",
                    )
            elif takes_switch and not takes_number and part is not None:
                raise PydanticCustomError("no_switch", "this is a switch: true or false")
            elif takes_number and isinstance(part, str) and str not in kinds:
                if _LEADING_ZERO.match(part):
                    raise PydanticCustomError(
                        "leading_zero", "a number does not begin with 0; leave the 0 out"
                    )
            elif isinstance(part, int) and takes_number and abs(part) > MAX_WHOLE_NUMBER:
                raise PydanticCustomError("too_large", "this number is too large")
        return value


def _kinds_in(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation is made of."""
    inner = typing.get_args(annotation)
    return set().union(*map(_kinds_in, inner)) if inner else {annotation}


def _parts(value: Any) -> typing.Iterator[Any]:
    """Yield a value, or what its lists and mappings hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value
