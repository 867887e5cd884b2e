"""Load tasks by name through lm-eval, and fingerprint them.

A name without a task, and a local task that cannot be loaded or scored, are errors: an average over
the rest would be another number under the same name. Only tasks that the hub does not provide are
skipped. The hub is asked at most once, and only if its cache lacks a task's data: lm-eval alone
would try again for 23 seconds per task. Nor are all of lm-eval's 14,000 task files parsed, which
takes 8 seconds.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from orchestrator.evaluation.adapter import suppress_output
from orchestrator.evaluation.heldout import heldout_configs
from orchestrator.evaluation.tasks import TaskSelection, expand_groups
from orchestrator.models.hub import hub_problem, offline
from orchestrator.records.evaluation import ACCURACY_METRICS
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.errors import RunFailed, UserError, first_line
from orchestrator.workspace.provenance import content_key

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent


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
            self._hashes[name] = _task_hash(self.tasks[name])
        key = self._hashes[name]
        return content_key(key, self.prompts.key) if self.prompts else key


def _task_hash(task: Task) -> str:
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
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return content_key(text, str(task.VERSION), metadata.version("lm_eval"))


def load_suite(asked: TaskSelection, planned: Collection[str] | None = None) -> Suite:
    """Load tasks by name; in one process, tasks of the same files are loaded once.

    Args:
        planned: Names of tasks found when a sweep was planned, without held-out ones. The suite
            gets exactly these, so that all models have an average over the same tasks.

    Raises:
        UserError: If a name has no task, or a local task cannot be loaded or scored.
        RunFailed: If the hub provides none of the tasks, or a planned task cannot be loaded.
    """
    folders = [folder for folder in (*asked.folders, asked.heldout) if folder]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    state = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    suite = replace(_load(replace(asked, prompts=None), state), prompts=asked.prompts)
    if suite.skipped:
        _load.cache_clear()  # The hub may provide them later.
    if planned is None:
        return suite
    own = heldout_configs(asked.heldout) if asked.heldout else {}
    wanted = {*planned, *(name for name in own if not asked.names or name in asked.names)}
    if missing := [name for name in wanted if name not in suite.tasks]:
        reasons = f" ({_as_text(suite.skipped)})" if suite.skipped else ""
        raise RunFailed(
            f"{', '.join(sorted(missing))} could be loaded when the sweep was planned, and "
            f"cannot now{reasons}; the same command tries again"
        )
    others = [name for name in suite.tasks if name not in wanted]
    reason = "it could not be loaded when the sweep was planned"
    return replace(suite.only(wanted), skipped=suite.skipped | dict.fromkeys(others, reason))


@lru_cache(maxsize=4)
def _load(asked: TaskSelection, _state: tuple[tuple[Path, int, int], ...]) -> Suite:
    """Load tasks whose files have this state."""
    for folder in asked.folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} to find lm-eval task files in")
    manager = TaskManager(include_path=list(asked.folders), include_defaults=False)
    _check_files(manager, asked.folders)
    own = heldout_configs(asked.heldout) if asked.heldout else {}
    names, in_python = expand_groups(asked.names or sorted({*manager.all_subtasks, *own}))
    if not names:
        places = ", ".join(map(str, asked.folders))
        raise UserError(
            f"there are no lm-eval task files in {places}" if places else "no task was named"
        )
    configs, builtin = {**own, **in_python}, dict[str, set[str]]()
    if any(name not in configs and name not in manager.task_index for name in names):
        # Of lm-eval's own tasks, only the folders that define these names are read.
        builtin = index_names(LM_EVAL_TASKS)
        having: set[str] = set().union(*(builtin.get(name, set()) for name in names))
        with suppress_output():
            manager = TaskManager(
                include_path=[*sorted(having), *asked.folders], include_defaults=False
            )

    # Load them; only what the hub does not give is skipped.
    tasks: dict[str, Task] = {}
    groups: dict[str, tuple[str, ...]] = {}
    problems, skipped = dict[str, str](), dict[str, str]()
    without_hub = cache(hub_problem)
    for name in names:
        if name not in configs and name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.task_index, *builtin], 1, 0.75)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems[name] = f"there is no such task{hint}"
            continue
        try:
            with suppress_output(), offline():
                if name in configs:
                    loaded: dict[str, Task] = {name: ConfigurableTask(config=configs[name])}
                else:
                    loaded = manager.load([name])["tasks"]
        except ConnectionError:  # It is not in the hub's cache.
            try:
                if problem := without_hub():
                    raise RunFailed(f"it needs the hub, and {problem}") from None
                with suppress_output():
                    loaded = manager.load([name])["tasks"]
            except Exception as error:  # The hub's libraries raise dozens of kinds.
                skipped[name] = first_line(error, with_type=not isinstance(error, RunFailed))
                continue
        except Exception as error:  # Tasks run their own code; data sets raise many types.
            file = name not in configs and manager.task_index[name].yaml_path
            problems[name] = first_line(error, with_type=True) + (f" ({file})" if file else "")
            continue
        flags = ("UNSAFE_CODE", "MULTIMODAL")
        if any(getattr(task, flag, False) for task in loaded.values() for flag in flags):
            problems[name] = "it runs code that a model wrote, or needs more than text"
            continue
        tasks |= loaded
        if list(loaded) != [name]:
            groups[name] = tuple(loaded)
    if problems:
        raise UserError(
            f"cannot evaluate {_as_text(problems)}; correct evaluation.suite, or leave out what "
            "cannot be evaluated (an average over the rest alone would be another number)"
        )
    if not tasks:
        raise RunFailed(f"nothing is left to evaluate: {_as_text(skipped)}")
    for task in tasks.values():
        if asked.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", asked.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return Suite(tasks=tasks, groups=groups, skipped=skipped)


def _check_files(manager: TaskManager, folders: Collection[Path]) -> None:
    """Raise `UserError` for a damaged task file, which lm-eval would ignore silently."""
    read = {entry.yaml_path for entry in manager.task_index.values()}
    files = [file for folder in folders for file in sorted(folder.glob("**/*.yaml"))]
    for file in (file for file in files if file not in read):
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:
            reason = first_line(error, with_type=True)
            raise UserError(f"cannot read the task file {file}: {reason}") from None
        if not config:
            raise UserError(f"the task file {file} is empty")


def _as_text(reasons: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


_NAMED = re.compile(rb"^(task|group|tag):[ \t]*[\"']?([\w.:+-]+)", re.MULTILINE)
_TAG_LIST = re.compile(rb"^tag:[ \t]*\n((?:[ \t]*-[ \t]*[\w.:+-]+[ \t]*\n?)+)", re.MULTILINE)
_ITEM = re.compile(rb"-[ \t]*([\w.:+-]+)")


@lru_cache(maxsize=2)
def index_names(root: Path) -> dict[str, set[str]]:
    """Map each name of a task, group or tag under `root` to the folders to load it from.

    The files are searched by a regular expression, which takes 0.3 to 3 seconds. A task needs its
    own folder. A group may use tasks elsewhere in its family, so it needs the whole family: the top
    folder, directly under `root`.
    """
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for folder, _, files in os.walk(root):
        family = str(root.joinpath(*Path(folder).relative_to(root).parts[:1]))
        for name in files:
            if not name.endswith(".yaml"):
                continue
            text = Path(folder, name).read_bytes()
            for kind, named in _NAMED.findall(text):
                folders[named.decode()].add(family if kind == b"group" else folder)
            for block in _TAG_LIST.findall(text) if b"tag:" in text else ():
                for named in _ITEM.findall(block):
                    folders[named.decode()].add(folder)
    return dict(folders)
