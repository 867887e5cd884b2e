"""Tasks by name beside those of lm-eval and of the prepared data: groups, and tasks in Python.

Other packages add both by entry points of the group `iiet_orch.tasks`. A task is run by lm-eval, as
one of a task file is. This module does not import lm-eval, which takes seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from iiet.extensions import ExtensionError, ExtensionNames, ExtensionTable
from orchestrator.evaluation.heldout import is_heldout_task, item_sets
from orchestrator.workspace.errors import UserError


class EvaluationTask(ABC):
    """Base of the tasks in Python: items, and how they are asked and scored."""

    version: ClassVar[int] = 1
    """Part of the results' key, as are the items and the configuration. Increase it if code changes
    that the configuration names."""

    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """Return the keys of an lm-eval task file, without those about the data set.

        Such as `output_type`, `doc_to_text`, `doc_to_choice`, `doc_to_target` and `metric_list`;
        texts are Jinja templates over the fields of an item.
        """

    @abstractmethod
    def items(self) -> Sequence[Mapping[str, Any]]:
        """Return the items: JSON values by field, the same fields in each, in a fixed order."""

    def examples(self) -> Sequence[Mapping[str, Any]]:
        """Return the solved examples for `evaluation.num_fewshot`, with the fields of the items."""
        return ()


class TaskGroup:
    """Base of the groups: several tasks under one name, each of which counts as if it was named."""

    names: ClassVar[tuple[str, ...]] = ()
    """Names of tasks of lm-eval, of `evaluation.include_path`, or of this table."""


class Paper(TaskGroup):
    """The seven tasks of the papers."""

    names = (
        "lambada_openai", "piqa", "hellaswag", "sciq", "arc_easy", "arc_challenge", "winogrande",
    )  # fmt: skip


HELDOUT = "heldout"
"""Stands for all tasks that the prepared data give."""

TASKS: ExtensionTable[type[EvaluationTask] | type[TaskGroup]] = ExtensionTable(
    ExtensionNames(
        "iiet_orch.tasks",
        "task",
        ("paper",),
        is_reserved=lambda name: name == HELDOUT or is_heldout_task(name),
    ),
    {"paper": Paper},
    bases=(EvaluationTask, TaskGroup),
)
"""Groups and tasks by the names that `evaluation.suite` takes."""


def expand_groups(names: Sequence[str]) -> list[str]:
    """Return the names with the members of groups in their place, each once.

    Raises:
        UserError: If the package of a name is broken.
    """
    expanded: list[str] = []
    for name in names:
        kind = _class(name)
        expanded += kind.names if kind is not None and issubclass(kind, TaskGroup) else (name,)
    return list(dict.fromkeys(expanded))


def task_config(name: str) -> dict[str, Any] | None:
    """Return the configuration of a task in Python for lm-eval; None if there is none.

    Raises:
        UserError: If its package is broken, or it has no items.
    """
    kind = _class(name)
    if kind is None or not issubclass(kind, EvaluationTask):
        return None
    task = kind()
    splits = {"test": [*task.items()]}
    if not splits["test"]:
        raise UserError(f"evaluation.suite: the task {name} of {kind.__module__} has no items")
    if examples := [*task.examples()]:
        splits["train"] = examples
    return {
        "task": name,
        "custom_dataset": partial(item_sets, splits),
        "test_split": "test",
        **({"fewshot_split": "train"} if examples else {}),
        **task.config(),
        "metadata": {"version": kind.version},
    }


def _class(name: str) -> type[EvaluationTask] | type[TaskGroup] | None:
    try:
        return TASKS.get(name)
    except ExtensionError as error:
        raise UserError(f"evaluation.suite: {error}") from None
