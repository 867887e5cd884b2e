"""Settings of depth tasks: generated sequences whose answers take a known number of steps."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from orchestrator.settings.section import MAX_COUNT, Section
from orchestrator.workspace.errors import quoted

TASK_KINDS = ("phop", "chain", "s5")
MAX_SYMBOLS = 10_000
_TASK_NAME = re.compile(rf"({'|'.join(TASK_KINDS)})_([0-9]+)")


class DepthSettings(Section):
    """Depth tasks for `data.source: depth`."""

    tasks: tuple[str, ...] = ()
    """Names of the tasks, each with its depth: `phop_6` (induction over 6 hops), `chain_8` (8
    pointers of a chain), `s5_16` (products of up to 16 permutations of 5 things). Of several tasks,
    each gives as many sequences, which then begin with the task's name."""
    num_symbols: int = Field(default=4, ge=2, le=MAX_SYMBOLS)
    """Alphabet of `phop`."""
    length: int = Field(default=64, gt=0, le=MAX_COUNT)
    """Symbols of each sequence of `phop`."""
    num_chains: int = Field(default=2, ge=2, le=MAX_SYMBOLS)
    """Chains that are interleaved in each sequence of `chain`."""

    @field_validator("tasks")
    @classmethod
    def _refuse_unknown_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for name in tasks:
            parse_task_name(name)
        if len(set(tasks)) < len(tasks):
            raise ValueError("a task is given twice")
        return tasks


def is_depth_task(name: str) -> bool:
    """Return whether this is the name of a depth task, with any depth."""
    return _TASK_NAME.fullmatch(name) is not None


def parse_task_name(name: str) -> tuple[str, int]:
    """Return kind and depth of a task.

    Raises:
        ValueError: If it is not such a name, or the depth is 0.
    """
    match = _TASK_NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"{quoted(name)} is not a depth task; name one of {', '.join(TASK_KINDS)} with its "
            "depth, such as phop_6"
        )
    if not (depth := int(match[2])):
        raise ValueError(f"{name} has depth 0; a depth task takes at least one step")
    return match[1], depth
