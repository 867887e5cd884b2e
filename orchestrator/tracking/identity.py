"""What finds a run again: its key, its kind and the run it is nested in.

A plain value, so that it travels to workers, lies in the outbox as JSON, and names a parent whose
run does not exist yet because the server was down. The same trial under two sweeps is two runs, one
under each parent, with one key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunIdentity:
    """Names a run, whether it exists or not."""

    key: str
    """Content key, or the name of a sweep."""
    kind: str
    """Becomes the tag `iiet.kind`: pretrain, influence, sweep, trial, teacher, baseline."""
    name: str
    """What the user interface shows; not part of the search."""
    parent: RunIdentity | str | None = None
    """The run it is nested in: its identity, or its run id."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able mapping."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunIdentity:
        """Rebuild an identity with its chain of parents."""
        parent = values["parent"]
        return cls(
            values["key"],
            values["kind"],
            values["name"],
            cls.from_dict(parent) if isinstance(parent, Mapping) else parent,
        )
