"""Find, load and fingerprint tasks by name.

A name without a task, and a local task that cannot be loaded or scored, are errors: an average over
the rest would be another number under the same name. Only tasks that the hub does not provide are
skipped. The hub is contacted at most once, and only if a task needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from orchestrator.evaluation.harness.suppressed_output import suppress_output
from orchestrator.evaluation.harness.task_index import index_names, nearest_name
from orchestrator.evaluation.heldout import heldout_configs
from orchestrator.evaluation.python_tasks import TASKS, expand_groups, task_config
from orchestrator.models.hub import hub_problem, offline
from orchestrator.records.evaluation import ACCURACY_METRICS
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.provenance import content_key

MAX_LOADED = 4
"""Suites that a process keeps; the models of one command have one to a few."""

LOCAL_FORMATS = ("json", "csv", "text", "parquet", "arrow")
"""Values of `dataset_path` of tasks that read files of this machine."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Loaded tasks, and those that the hub did not provide."""

    tasks: dict[str, Task]
    """Task by name, in the requested order."""
    groups: dict[str, tuple[str, ...]]
    """Requested group or tag -> names of its tasks."""
    skipped: dict[str, str]
    """Name of a task -> why it is not run."""
    prompts: Prompts | None = None
    """How items become prompts, if not as the tasks' files say."""
    _hashes: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def has_accuracy(self) -> bool:
        """Whether a task reports a metric that counts as accuracy."""
        return any(set(ACCURACY_METRICS) & set(t.aggregation()) for t in self.tasks.values())

    def only(self, names: Collection[str]) -> Suite:
        """Return the suite with only these tasks."""
        return replace(self, tasks={k: task for k, task in self.tasks.items() if k in names})

    def num_items(self, name: str, limit: int | None = None) -> int:
        """Return the number of items that a run with this limit scores."""
        available = len(self.tasks[name].eval_docs)
        return available if limit is None else min(available, limit)

    def fingerprint(self, name: str) -> str:
        """Return a hash of all that determines items, prompts and metrics, but no file paths."""
        if name not in self._hashes:
            self._hashes[name] = self._task_hash(self.tasks[name])
        key = self._hashes[name]
        return content_key(key, self.prompts.key) if self.prompts else key

    def _task_hash(self, task: Task) -> str:
        # The source of the documents does not matter: the documents themselves are hashed.
        config = {
            name: value
            for name, value in task.dump_config().items()
            if not name.startswith("dataset_") and name != "custom_dataset"
        }
        notes = config.get("metadata") or {}
        config["metadata"] = {k: v for k, v in notes.items() if k != "config_source"}
        documents = [*task.eval_docs]
        if config.get("num_fewshot"):
            documents += task.fewshot_docs() or []
        text = json.dumps([config, documents], default=str, sort_keys=True)
        # A function without source code prints as its address.
        return content_key(
            re.sub(r" at 0x[0-9a-f]+", "", text), str(task.VERSION), metadata.version("lm_eval")
        )


_LOADED: dict[Hashable, Suite] = {}


def load_suite(
    names: Sequence[str] = (),
    *,
    folders: Sequence[Path] = (),
    heldout: Path | None = None,
    num_fewshot: int | None = None,
    prompts: Prompts | None = None,
    planned: Collection[str] | None = None,
) -> Suite:
    """Load tasks by name; in one process, tasks of the same files are loaded once.

    Args:
        names: Tasks, groups, tags, or keys of `TASKS`; if empty, all tasks in `folders` and
            `heldout`.
        folders: Folders of task files; they take precedence over lm-eval's own.
        heldout: Folder of the held-out tasks; they take precedence over all others.
        num_fewshot: Solved examples before each item, unless a task fixes 0; if unset, the task's
            own number.
        prompts: How items become prompts, if not as the tasks' files say.
        planned: Names of tasks found when a sweep was planned, without those of `heldout`. The
            suite gets exactly these, so that all models have an average over the same tasks.

    Raises:
        UserError: If a name has no task, or a local task cannot be loaded or scored.
        RunFailed: If the hub provides none of the tasks, or a planned task cannot be loaded.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} to find lm-eval task files in")
    key = (tuple(names), tuple(folders), heldout, num_fewshot, _state(*folders, heldout))
    suite = _LOADED.get(key) or _load(names, folders, heldout, num_fewshot)
    if not suite.skipped:  # The hub may provide them later.
        _LOADED[key] = suite
        if len(_LOADED) > MAX_LOADED:
            del _LOADED[next(iter(_LOADED))]
    suite = replace(suite, prompts=prompts)
    if planned is None:
        return suite
    own = heldout_configs(heldout) if heldout else {}
    return _as_planned(suite, {*planned, *(name for name in own if not names or name in names)})


def _state(*folders: Path | None) -> tuple[tuple[Path, int, int], ...]:
    """Return all files of the folders with their time and size."""
    files = [file for folder in folders if folder for file in sorted(folder.rglob("*"))]
    status = [(file, file.stat()) for file in files if file.is_file()]
    return tuple((file, found.st_mtime_ns, found.st_size) for file, found in status)


def _load(
    names: Sequence[str], folders: Sequence[Path], heldout: Path | None, num_fewshot: int | None
) -> Suite:
    manager = TaskManager(include_path=list(folders), include_defaults=False)
    own = heldout_configs(heldout) if heldout else {}
    wanted = expand_groups(names) or sorted({*manager.all_subtasks, *own})
    in_python = {name: config for name in wanted if (config := task_config(name))}
    _check_names(manager, in_python)
    made = _made_tasks({**own, **in_python})
    if not wanted:
        places = ", ".join(map(str, folders))
        raise UserError(
            f"there are no lm-eval task files in {places}" if folders else "no task was named"
        )
    _check_files(manager, folders)
    manager, problems = _find(manager, [name for name in wanted if name not in made], folders)
    known = [name for name in wanted if name not in problems]
    tasks, groups, skipped, unusable = _load_tasks(manager, known, made)
    if problems := problems | unusable:
        raise UserError(
            f"cannot evaluate {_as_text(problems)}; correct evaluation.suite, or leave out what "
            "cannot be evaluated (an average over the rest alone would be another number)"
        )
    if not tasks:
        raise RunFailed(f"nothing is left to evaluate: {_as_text(skipped)}")
    for task in tasks.values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return Suite(tasks=tasks, groups=groups, skipped=skipped)


def _as_planned(suite: Suite, names: Collection[str]) -> Suite:
    """Return the suite with exactly these tasks."""
    if missing := [name for name in names if name not in suite.tasks]:
        reasons = f" ({_as_text(suite.skipped)})" if suite.skipped else ""
        raise RunFailed(
            f"{', '.join(sorted(missing))} could be loaded when the sweep was planned, and "
            f"cannot now{reasons}; the same command tries again"
        )
    others = [name for name in suite.tasks if name not in names]
    reason = "it could not be loaded when the sweep was planned"
    return replace(suite.only(names), skipped=suite.skipped | dict.fromkeys(others, reason))


def _made_tasks(configs: Mapping[str, dict[str, Any]]) -> dict[str, Task]:
    with suppress_output():
        return {name: ConfigurableTask(config=config) for name, config in configs.items()}


def _check_names(manager: TaskManager, in_python: Collection[str]) -> None:
    """Raise `UserError` if a task of a package has the name of one in a file."""
    if not in_python:
        return
    builtin = index_names(Path(lm_eval.tasks.__file__).parent)
    for name in in_python:
        if name in builtin or name in manager.task_index:
            origin = "evaluation.include_path" if name in manager.task_index else "lm-eval"
            raise UserError(
                f"evaluation.suite: the task {name!r} is defined by {TASKS.names.package(name)} "
                f"and by {origin}; uninstall the package, or give one of them another name"
            )


def _check_files(manager: TaskManager, folders: Sequence[Path]) -> None:
    """Raise `UserError` for a damaged task file, which lm-eval would ignore silently."""
    known = {entry.yaml_path for entry in manager.task_index.values()}
    files = [file for folder in folders for file in sorted(folder.glob("**/*.yaml"))]
    for file in (file for file in files if file not in known):
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:
            raise UserError(
                f"cannot read the task file {file}: {first_line(error, with_type=True)}"
            ) from None
        if not config:
            raise UserError(f"the task file {file} is empty")


def _find(
    manager: TaskManager, names: Sequence[str], folders: Sequence[Path]
) -> tuple[TaskManager, dict[str, str]]:
    """Add the folders of lm-eval that define the names; return names without a task too."""
    if all(name in manager.task_index for name in names):
        return manager, {}
    builtin = index_names(Path(lm_eval.tasks.__file__).parent)
    having: set[str] = set().union(*(builtin.get(name, set()) for name in names))
    with suppress_output():
        manager = TaskManager(include_path=[*sorted(having), *folders], include_defaults=False)
    unknown: dict[str, str] = {}
    for name in names:
        if name not in manager.task_index:
            near = nearest_name(name, [*manager.task_index, *builtin])
            hint = f"; did you mean {near}?" if near else ""
            unknown[name] = f"there is no such task{hint}"
    return manager, unknown


def _load_tasks(
    manager: TaskManager, names: Sequence[str], made: Mapping[str, Task]
) -> tuple[dict[str, Task], dict[str, tuple[str, ...]], dict[str, str], dict[str, str]]:
    """Return tasks, groups, skipped and unusable names with their reasons."""
    tasks: dict[str, Task] = {}
    groups: dict[str, tuple[str, ...]] = {}
    skipped: dict[str, str] = {}
    unusable: dict[str, str] = {}
    needing_hub = {name for name in names if name not in made and _reads_hub(manager, name)}
    problem = hub_problem() if needing_hub else None
    for name in names:
        if name in made:
            tasks[name] = made[name]
            continue
        online = name in needing_hub and problem is None
        try:
            with suppress_output(), nullcontext() if online else offline():
                loaded = manager.load([name])["tasks"]
        except Exception as error:  # Tasks run their own code; data sets raise many types.
            reason = first_line(error, with_type=True)
            if name in needing_hub:
                skipped[name] = f"it needs the hub, and {problem}" if problem else reason
            else:
                file = manager.task_index[name].yaml_path
                unusable[name] = f"{reason} ({file})" if file else reason
            continue
        unfit = [why for task in loaded.values() if (why := _unsupported_reason(task))]
        if unfit:
            unusable[name] = unfit[0]
            continue
        tasks |= loaded
        if list(loaded) != [name]:
            groups[name] = tuple(loaded)
    return tasks, groups, skipped, unusable


def _reads_hub(manager: TaskManager, name: str) -> bool:
    """Return whether a task, or a member of a group or tag, takes its data from the hub."""
    entry = manager.task_index[name]
    members = entry.tags if entry.cfg is None else entry.cfg.get("task")
    if entry.cfg is None or not isinstance(members, str | None):
        known = [str(member) for member in members or () if str(member) in manager.task_index]
        # A member that is defined inside the group, or unknown, may need the hub.
        return len(known) < len(members or [1]) or any(_reads_hub(manager, n) for n in known)
    config = entry.cfg
    if "dataset_path" not in config:
        return not {"custom_dataset", "class"} & set(config)
    path = str(config["dataset_path"])
    return "custom_dataset" not in config and path not in LOCAL_FORMATS and not Path(path).exists()


def _unsupported_reason(task: Task) -> str | None:
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        return "it runs code that a model wrote, or needs more than text"
    return None


def _as_text(skipped: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
