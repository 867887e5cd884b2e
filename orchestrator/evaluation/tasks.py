"""Tasks by name: the table of groups and tasks in Python, and what is asked of lm-eval.

A name in `evaluation.suite` is that of a held-out task of the prepared data (`heldout` stands for
all of them), of an entry of `TASKS`, of a task file in `evaluation.include_path`, or of lm-eval's
own. This module imports no lm-eval, which takes seconds; `suite` loads the tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from iiet.extensions import ExtensionError, ExtensionTable
from orchestrator.evaluation.heldout import item_sets
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import UserError

HELDOUT = "heldout"
"""Stands for all tasks that the prepared data give."""


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


TASKS: ExtensionTable[type[EvaluationTask] | type[TaskGroup]] = ExtensionTable(
    "iiet_orch.tasks",
    "task",
    {"paper": f"{__name__}:Paper"},
    f"{__name__}:EvaluationTask",
    f"{__name__}:TaskGroup",
)
"""Groups and tasks in Python by the names that `evaluation.suite` takes; other packages add to it
by entry points of the group `iiet_orch.tasks`."""


def expand_groups(names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the names, each once, with the members of groups in their place.

    Returns:
        The names, and the configuration for lm-eval of those that are tasks in Python.

    Raises:
        UserError: If the package of a name is broken, or its task has no items.
    """
    expanded: list[str] = []
    configs: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            kind = TASKS.get(name)
        except ExtensionError as error:
            raise UserError(f"evaluation.suite: {error}") from None
        if kind is not None and issubclass(kind, TaskGroup):
            members, below = expand_groups(kind.names)
            expanded += members
            configs |= below
            continue
        expanded.append(name)
        if kind is None:
            continue
        task = kind()
        splits = {"test": [*task.items()], "train": [*task.examples()]}
        if not splits["test"]:
            raise UserError(f"evaluation.suite: the task {name} of {kind.__module__} has no items")
        given = {split: rows for split, rows in splits.items() if rows}
        configs[name] = {
            "task": name,
            "custom_dataset": partial(item_sets, given),
            "test_split": "test",
            **({"fewshot_split": "train"} if "train" in given else {}),
            **task.config(),
            "metadata": {"version": kind.version},
        }
    return list(dict.fromkeys(expanded)), configs


@dataclass(frozen=True, kw_only=True)
class TaskSelection:
    """Names of tasks, where they are looked up, and how they are asked."""

    names: tuple[str, ...] = ()
    """Tasks, groups or tags; if empty, all tasks of the folders and all held-out tasks."""
    folders: tuple[Path, ...] = ()
    """Folders of the user's task files; they take precedence over lm-eval's own."""
    heldout: Path | None = None
    """Folder of the held-out tasks, which take precedence over all others; None without any."""
    num_fewshot: int | None = None
    """Solved examples before each item, unless a task fixes 0; if unset, the task's own number."""
    prompts: Prompts | None = None
    """How items become prompts, if not as the tasks' files say."""
