"""Base class of all sections of the settings."""

from __future__ import annotations

import re
import typing
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

MAX_WHOLE_NUMBER = 2**53
"""Floats represent whole numbers exactly up to here."""
MAX_COUNT = 2**31 - 1
"""Largest count that libraries below can hold in 32 bits."""
_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9_]")


class Section(BaseModel):
    """Base of all sections: frozen, refuses unknown names, a docstring under each field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_surprising_conversions(cls, value: Any, info: ValidationInfo) -> Any:
        # Pydantic would convert: a switch to a number, a number to a switch, "017" to 17.
        types = _types_in(cls.model_fields[str(info.field_name)].annotation)
        takes_number, takes_switch = bool({int, float} & types), bool in types
        for leaf in _leaves(value):
            if isinstance(leaf, bool):
                if takes_number and not takes_switch:
                    raise ValueError(
                        "this is a number, and YAML reads true, yes and on as a switch"
                    )
            elif takes_switch and not takes_number and leaf is not None:
                if not (isinstance(leaf, str) and str in types):
                    raise ValueError("this is a switch: true or false")
            elif takes_number and isinstance(leaf, str) and str not in types:
                if _LEADING_ZERO.match(leaf):
                    raise ValueError("a number does not begin with 0; leave the 0 out")
            elif isinstance(leaf, int) and takes_number and abs(leaf) > MAX_WHOLE_NUMBER:
                raise ValueError("this number is too large")
        return value


def _types_in(annotation: Any) -> set[Any]:
    inner = typing.get_args(annotation)
    return set().union(*map(_types_in, inner)) if inner else {annotation}


def _leaves(value: Any) -> typing.Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
