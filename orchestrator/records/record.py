"""Base of all records: frozen values that are stored as JSON, read back and validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import PydanticCustomError

from iiet.extensions import ExtensionError
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from orchestrator.workspace.errors import UserError, first_problem
from orchestrator.workspace.files import INVALID_VALUE_ERRORS, damaged, read_json, write_json
from orchestrator.workspace.layout import absolute_path, portable_path, workspace_root

_EXTENSION = "extension"
"""Type of a validation error that is no damage: a package is missing or broken."""


class Record(BaseModel):
    """A frozen value with a stored form, in which unknown and missing fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self.stored_at(path))

    def stored_at(self, path: Path) -> dict[str, Any]:
        """Return the JSON values for a file; paths in the file's workspace are relative."""
        return self.model_dump(mode="json", context=workspace_root(path))

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a record; None if the file is missing.

        Raises:
            DamagedFile: If the file is not JSON, or its values do not fit the record.
            UserError: If a package that it needs is missing.
        """
        stored = read_json(path)
        if stored is None:
            return None
        try:
            return cls.model_validate(stored, context=workspace_root(path))
        except ValidationError as error:
            if any(problem["type"] == _EXTENSION for problem in error.errors()):
                raise UserError(f"cannot use {path}: {first_problem(error)}") from None
            raise damaged(path, first_problem(error)) from None


def _absolute(path: str, info: ValidationInfo) -> str:
    return absolute_path(path, info.context)


def _portable(path: str, info: SerializationInfo) -> str:
    return portable_path(path, info.context)


WorkspacePath = Annotated[str, AfterValidator(_absolute), PlainSerializer(_portable)]
"""An absolute path; `Record.write` and `read` store it relative to the workspace it lies in."""


def _parsed_by(
    value_type: type[ModelConfig] | type[InfluenceTable], problem: str = "{}"
) -> PlainValidator:
    """Return a validator that takes a value of a type, or the dictionary of its `to_dict`.

    Args:
        problem: Text of the error; `{}` is replaced by the error of `from_dict`.
    """

    def parsed(value: Any) -> Any:
        if isinstance(value, value_type):
            return value
        try:
            return value_type.from_dict(value)
        except ExtensionError as error:
            raise PydanticCustomError(_EXTENSION, "{text}", {"text": str(error)}) from None
        except INVALID_VALUE_ERRORS as error:
            raise ValueError(problem.format(error)) from None

    return PlainValidator(parsed)


Config = Annotated[ModelConfig, _parsed_by(ModelConfig), PlainSerializer(ModelConfig.to_dict)]
"""A model's configuration; `ModelConfig.to_dict()` in JSON."""


Influence = Annotated[
    InfluenceTable,
    _parsed_by(InfluenceTable, "it is not an influence table ({})"),
    PlainSerializer(InfluenceTable.to_dict),
]
"""A teacher's influence table; `InfluenceTable.to_dict()` in JSON."""
