"""What each field of a recipe changes: a mark in the field's annotation, from which keys follow.

    learning_rate: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=2e-3, gt=0.0)

A training is found again by a key: the hash of all that determines its weights. So each field of a
recipe, and of the record of a training, says whether another value gives other weights.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Effect(Enum):
    """What another value of a field changes."""

    WEIGHTS = "weights"
    """The weights, from the first step on. The field is part of the key."""
    LATER_WEIGHTS = "later weights"
    """The weights, but perhaps only those of later steps. The field is part of the key. A longer
    training may continue a finished one with another value: `training/continuing.py` knows what
    the field does in each step."""
    JOURNAL = "journal"
    """What is recorded of the training, or its rounding, or whether it gets to its end. The field
    is not part of the key."""
    FILES = "files"
    """Where, when and how much is stored. The field is part of no key."""

    @property
    def is_in_key(self) -> bool:
        """Whether trainings with another value are other trainings."""
        return self in (Effect.WEIGHTS, Effect.LATER_WEIGHTS)


class KeyForm(Enum):
    """How a field stands in the key."""

    ABSENT_AT_DEFAULT = "absent at its default"
    """A field that was added later: at its default, keys are those of earlier versions."""


def effect_of(field: FieldInfo) -> Effect:
    """Return the mark of a field.

    Raises:
        TypeError: If it has none.
    """
    for mark in field.metadata:
        if isinstance(mark, Effect):
            return mark
    raise TypeError(
        "a field of a recipe has no mark of `Effect`, so nobody knows whether it is part of the key"
    )


def fields_with(model: type[BaseModel], *effects: Effect) -> list[str]:
    """Return the names of the fields that have one of these effects."""
    return [name for name, field in model.model_fields.items() if effect_of(field) in effects]


def key_values(section: BaseModel) -> dict[str, Any]:
    """Return the fields that are part of the key, also those of sections inside, as JSON values."""
    values: dict[str, Any] = {}
    as_json = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        is_absent = KeyForm.ABSENT_AT_DEFAULT in field.metadata and value == field.default
        if effect_of(field).is_in_key and not is_absent:
            values[name] = key_values(value) if isinstance(value, BaseModel) else as_json[name]
    return values
