"""Find the tasks that the settings name, check them before anything is trained, and load them.

`evaluation.suite` may name held-out tasks of the prepared data, task files in
`evaluation.include_path`, `short_answers`, and lm-eval's own tasks; `heldout` means all held-out
tasks, `paper` the tasks of the papers. A name without a task, and a local task that cannot be
loaded or scored, are errors, because an average over the rest would be another number under the
same name. Only tasks that the hub does not provide are skipped.

Three things save time. The hub is asked at most once, and only if its cache lacks a task's data;
lm-eval by itself would retry for 23 seconds per task. Not all of lm-eval's 14,000 task files are
parsed, which takes 8 seconds. And lm-eval, whose import takes seconds, is imported only where tasks
are loaded.
"""

from __future__ import annotations

import difflib
import io
import json
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.data.mixture import open_data
from orchestrator.evaluation.heldout import (
    TEXT_TASKS,
    has_accuracy,
    heldout_configs,
    heldout_folder,
    is_heldout_task,
    offered_tasks,
    python_config,
)
from orchestrator.evaluation.short_answers import short_answers_config
from orchestrator.models.hub import hub_problem, offline
from orchestrator.records.evaluation import ACCURACY_METRICS, BITS_METRIC, Suite
from orchestrator.settings import DataSettings, EvaluationSettings, Settings
from orchestrator.settings.evaluation import PYTHON_BITS_TASK, SHORT_ANSWERS, retention_task
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import RunFailed, UserError, first_line, shortened
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

HELDOUT = "heldout"
"""Name for all held-out tasks of the prepared data."""
FEWSHOT_SEED = 1234
"""lm-eval's default seed, which gives the usual prompts."""
PAPER = "paper"
"""Name for `PAPER_TASKS`."""
PAPER_TASKS = (
    "lambada_openai", "piqa", "hellaswag", "sciq", "arc_easy", "arc_challenge", "winogrande",
)  # fmt: skip
"""The papers' seven tasks, all lm-eval's own."""


# Tasks that the settings name


def make_suite(
    settings: EvaluationSettings,
    tokens: Path | None,
    *,
    context_length: int,
    make_progress: Progress | None = None,
) -> Suite:
    """Return the suite that the settings describe; `heldout` means all held-out tasks of the data.

    Args:
        tokens: Folder of prepared tokens, which held-out tasks need; see `needs_heldout`.
        context_length: The model's context length.
        make_progress: Shows the making of missing held-out tasks; with None none are made.

    Raises:
        UserError: If the model's context is shorter than the settings say; if the data do not
            offer the held-out tasks; or if these are damaged, or the documents give no items.
    """
    length = settings.tokens_at_once(context_length)
    names = named_tasks(settings)
    heldout = None
    if tokens is not None and needs_heldout(settings):
        offered = offered_tasks(open_data(tokens))
        check_offered(settings, offered)
        # Every held-out item fits into the context.
        heldout = heldout_folder(
            tokens, num_items=settings.num_items, context_length=length, make_progress=make_progress
        )
        if HELDOUT in names:
            position = names.index(HELDOUT)
            names[position : position + 1] = offered
    return Suite(
        tokens_folder=str(tokens or ""),
        tasks=tuple(dict.fromkeys(names)),
        suite=heldout.name if heldout else "",
        suite_folder=str(heldout or ""),
        include_folder=user_task_folder(settings),
        batch_size=settings.batch_size,
        limit=settings.limit,
        sequence_length=None if length == context_length else length,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
        precision=settings.precision,
    )


def named_tasks(settings: EvaluationSettings) -> list[str]:
    """Return the names in `evaluation.suite`."""
    return [name.strip() for name in settings.suite.split(",") if name.strip()]


def _lm_eval_names(settings: EvaluationSettings) -> list[str]:
    return [name for name in named_tasks(settings) if name != HELDOUT and not is_heldout_task(name)]


def unaveraged_tasks(settings: EvaluationSettings) -> tuple[str, ...]:
    """Return the tasks of `evaluation.retention` that the suite does not name; no average has them.

    Raises:
        UserError: If one is a held-out task that the suite does not name, or the suite is empty.
    """
    in_suite = _with_paper_tasks(named_tasks(settings))
    unaveraged = []
    for name in settings.retention or {}:
        task = retention_task(name)
        if not in_suite and task != PYTHON_BITS_TASK:
            raise UserError(
                f"evaluation.retention names {name}, and evaluation.suite names no task, which "
                f"means all of evaluation.include_path={settings.include_path}; name them there"
            )
        if is_heldout_task(task) and not {HELDOUT, task} & set(in_suite):
            raise UserError(
                f"evaluation.retention names {name}, a task of the data that "
                f"evaluation.suite={settings.suite} does not measure; add it there, or leave it out"
            )
        if not is_heldout_task(task) and task not in in_suite:
            unaveraged.append(task)
    return tuple(unaveraged)


def _retention_tasks_of_lm_eval(settings: EvaluationSettings) -> list[str]:
    return [name for name in unaveraged_tasks(settings) if name != PYTHON_BITS_TASK]


def needs_heldout(settings: EvaluationSettings) -> bool:
    """Return whether the suite has held-out tasks."""
    return len(_lm_eval_names(settings)) < len(named_tasks(settings))


def needs_lm_eval(settings: EvaluationSettings) -> bool:
    """Return whether a sweep measures other tasks than held-out ones."""
    measures_whole_folder = not named_tasks(settings) and bool(settings.include_path)
    named = _lm_eval_names(settings) or _retention_tasks_of_lm_eval(settings)
    return measures_whole_folder or bool(named)


def user_task_folder(settings: EvaluationSettings) -> str:
    """Return the user's folder of task files as an absolute path; empty if none is set.

    Raises:
        UserError: If it does not exist.
    """
    if not settings.include_path:
        return ""
    folder = expand_user(settings.include_path).absolute()
    if not folder.is_dir():
        raise UserError(
            f"evaluation.include_path: there is no folder {shortened(settings.include_path)} to "
            "find lm-eval task files in"
        )
    return str(folder)


def check_offered(settings: EvaluationSettings, offered: Collection[str]) -> None:
    """Raise `UserError` if the suite names held-out tasks that the data do not offer."""
    names = filter(is_heldout_task, named_tasks(settings))
    if missing := [name for name in names if name not in offered]:
        raise UserError(
            f"evaluation.suite names {', '.join(missing)}, which the data cannot make; they can "
            f"make {', '.join(offered)}"
        )


def check_task_names(settings: EvaluationSettings) -> None:
    """Raise `UserError` if a task is neither this program's nor lm-eval's own; loads no task.

    With a task folder of the user nothing is checked, because only lm-eval can read it.
    """
    names = [*_lm_eval_names(settings), *_retention_tasks_of_lm_eval(settings)]
    unchecked = [name for name in names if name not in {PAPER, *PAPER_TASKS, SHORT_ANSWERS}]
    if unchecked and not user_task_folder(settings):
        known = _builtin_folders()
        _refuse_tasks({name: _no_such_task(name, known) for name in unchecked if name not in known})


def check_sweep_tasks(settings: Settings, offered: Collection[str]) -> None:
    """Check the tasks of a sweep before it begins.

    Raises:
        UserError: As `check_offered`; or if a search optimizes bits per byte, which no task gives.
    """
    evaluation = settings.evaluation
    objective = settings.search.objective
    check_offered(evaluation, offered)
    wants_bits = settings.sweep.kind == "search" and objective == BITS_METRIC
    has_bits = BITS_METRIC in offered and {HELDOUT, BITS_METRIC} & set(named_tasks(evaluation))
    if wants_bits and not has_bits and not needs_lm_eval(evaluation):
        raise UserError(
            f"search.objective={objective}: no task of evaluation.suite={evaluation.suite} gives "
            "bits per byte on these data; set it to accuracy or validation_loss"
        )


def tasks_of_source(settings: DataSettings) -> tuple[str, ...]:
    """Return the held-out tasks that data of these settings offer, prepared or not."""
    if settings.source == "mixture":
        return (*(TEXT_TASKS if settings.texts else ()), *settings.tasks.tasks)
    return settings.depth.tasks if settings.source == "depth" else TEXT_TASKS


def lm_eval_task_fingerprints(
    settings: EvaluationSettings,
    progress: Progress | None = None,
    *,
    needs_accuracy: bool = False,
    context_length: int | None = None,
) -> dict[str, str]:
    """Load the suite's tasks, except held-out ones; return name -> hash of items and metrics.

    Args:
        progress: Shows which tasks are skipped.
        needs_accuracy: Whether one task of the suite must report an accuracy.
        context_length: Context length of the models, if answers must fit into it.

    Raises:
        UserError: If a task does not exist, cannot be read or answered; if the hub provides none
            of them; or if none reports an accuracy although one is needed.
    """
    include_folder = user_task_folder(settings)
    names = named_tasks(settings)
    unaveraged = tuple(_retention_tasks_of_lm_eval(settings))
    is_accuracy_known = any(name == HELDOUT or has_accuracy(name) for name in names)
    fingerprints = {}
    if needs_lm_eval(settings):
        loaded = load_suite(
            Suite(
                # Without names, all tasks of the user's folder.
                tasks=(*_lm_eval_names(settings), *unaveraged),
                unaveraged=unaveraged or None,
                include_folder=include_folder,
                num_fewshot=settings.num_fewshot,
                prompts=settings.prompts,
            )
        )
        for name, reason in loaded.skipped.items():
            (progress or Progress()).note(f"skipped {name}: {reason}")
        averaged = loaded.only([name for name in loaded.tasks if name not in unaveraged])
        metrics = {metric for task in averaged.tasks.values() for metric in task.aggregation()}
        is_accuracy_known |= bool(metrics & set(ACCURACY_METRICS))
        if context_length is not None:
            from orchestrator.evaluation.answers import check_answer_settings  # Imports PyTorch.

            check_answer_settings(loaded.tasks, context_length)
        fingerprints = {name: loaded.fingerprint(name) for name in sorted(loaded.tasks)}
    if needs_accuracy and not is_accuracy_known:
        raise UserError(
            f"a sweep's front needs an accuracy, and no task of evaluation.suite={settings.suite} "
            f"reports one; add a task such as {HELDOUT}: {settings.suite},{HELDOUT}"
        )
    return fingerprints


# Loading


@contextmanager
def suppress_output() -> Iterator[None]:
    """Suppress lm-eval's prints, progress bars, warnings and log lines within the block."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class LoadedSuite:
    """Loaded tasks of a suite, and tasks that the hub did not provide."""

    suite: Suite
    """The requested suite."""
    tasks: dict[str, Task]
    """Task by name, in the requested order."""
    groups: dict[str, tuple[str, ...]]
    """Requested group or tag -> names of its tasks."""
    skipped: dict[str, str]
    """Name of a task -> why it is skipped."""

    def only(self, names: Collection[str]) -> LoadedSuite:
        """Return the suite with only these tasks."""
        return replace(self, tasks={k: task for k, task in self.tasks.items() if k in names})

    def num_items(self, name: str) -> int:
        """Return the number of items of a task that a run scores."""
        available = len(self.tasks[name].eval_docs)
        return available if self.suite.limit is None else min(available, self.suite.limit)

    def fingerprint(self, name: str) -> str:
        """Return a hash of everything that determines items, prompts and metrics, without paths."""
        return self.suite.task_fingerprint(_task_hash(self.tasks[name]))


@lru_cache(maxsize=64)
def _task_hash(task: Task) -> str:
    # Hash the documents, not where they come from.
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


class NoTaskAvailable(UserError):
    """The hub provides none of the suite's tasks, and there are no others."""


def load_suite(suite: Suite) -> LoadedSuite:
    """Load the tasks of a suite; a process loads tasks of the same files once.

    If the suite has fingerprints, exactly these tasks and the held-out tasks are loaded, so that
    all models of a sweep have averages over the same tasks.

    Raises:
        UserError: If a name has no task, or a local task cannot be loaded or scored.
        NoTaskAvailable: If the hub provides none of the tasks, and no other is named.
        RunFailed: If a task with a fingerprint cannot be loaded.
    """
    folders = [*suite.task_folders, *([suite.heldout] if suite.heldout else [])]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    file_states = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    # Other fields of the suite do not determine which tasks are loaded.
    loaded_part = Suite(
        tasks=suite.tasks,
        unaveraged=suite.unaveraged,
        tokens_folder=suite.tokens_folder if suite.python_text else "",
        include_folder=suite.include_folder,
        suite_folder=suite.suite_folder,
        num_fewshot=suite.num_fewshot,
    )
    loaded = replace(_load_tasks(loaded_part.model_dump_json(), file_states), suite=suite)
    if loaded.skipped:
        _load_tasks.cache_clear()  # The hub may provide skipped tasks later.
    if suite.fingerprints is None:
        if not loaded.tasks:
            raise NoTaskAvailable(
                "no task of evaluation.suite can be evaluated: "
                f"{_as_text(loaded.skipped)}; make the hub reachable, or name other tasks"
            )
        return loaded
    planned = set(suite.fingerprints)
    for name in heldout_configs(suite.heldout) if suite.heldout else ():
        if not suite.tasks or name in suite.tasks:
            planned.add(name)
    if suite.python_text:
        planned.add(PYTHON_BITS_TASK)
    if missing := [name for name in planned if name not in loaded.tasks]:
        reasons = f" ({_as_text(loaded.skipped)})" if loaded.skipped else ""
        raise RunFailed(
            f"{', '.join(sorted(missing))} could be loaded when the sweep was planned, and "
            f"cannot now{reasons}; the same command tries again"
        )
    not_planned = [name for name in loaded.tasks if name not in planned]
    reason = "it could not be loaded when the sweep was planned"
    skipped = loaded.skipped | dict.fromkeys(not_planned, reason)
    return replace(loaded.only(planned), skipped=skipped)


@lru_cache(maxsize=4)
def _load_tasks(suite_json: str, _file_states: tuple[tuple[Path, int, int], ...]) -> LoadedSuite:
    """Load the tasks of a suite.

    Args:
        suite_json: The suite as JSON, because arguments of a cached function must be hashable.
        _file_states: Path, time of change and size of each task file, so that a changed file is
            loaded again.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask

    suite = Suite.model_validate_json(suite_json)

    def manager_of(*folders: Path) -> TaskManager:
        with suppress_output():
            return lm_eval.tasks.TaskManager(include_path=[*folders], include_defaults=False)

    # Find them.
    manager = manager_of(*suite.task_folders)
    _check_files(manager, suite.task_folders)
    configs = heldout_configs(suite.heldout) if suite.heldout else {}
    unaveraged = suite.unaveraged or ()
    names_of_folders = sorted({*manager.all_subtasks, *configs})
    names = _with_paper_tasks([*(suite.tasks or names_of_folders), *unaveraged])
    if PYTHON_BITS_TASK in unaveraged:
        configs[PYTHON_BITS_TASK] = python_config(Path(suite.tokens_folder))
    if SHORT_ANSWERS in names and SHORT_ANSWERS not in manager.task_index:
        configs[SHORT_ANSWERS] = short_answers_config()
    if not names and suite.include_folder:
        raise UserError(f"there are no lm-eval task files in {suite.include_folder}")
    if not names:
        raise UserError("no task was named")
    builtin: dict[str, set[Path]] = {}
    if any(name not in configs and name not in manager.task_index for name in names):
        # Read only the folders of lm-eval that define these names.
        builtin = _builtin_folders()
        folders: set[Path] = set().union(*(builtin.get(name, set()) for name in names))
        manager = manager_of(*sorted(folders), *suite.task_folders)

    # Load them; skip only what the hub does not provide.
    tasks: dict[str, Task] = {}
    groups: dict[str, tuple[str, ...]] = {}
    problems: dict[str, str] = {}
    skipped: dict[str, str] = {}
    hub_problem_once = cache(hub_problem)
    for name in names:
        if name not in configs and name not in manager.task_index:
            problems[name] = _no_such_task(name, [*manager.task_index, *builtin])
            continue
        try:
            with suppress_output(), offline():
                if name in configs:
                    loaded: dict[str, Task] = {name: ConfigurableTask(config=configs[name])}
                else:
                    loaded = manager.load([name])["tasks"]
        except ConnectionError:  # Not in the hub's cache.
            try:
                if problem := hub_problem_once():
                    raise RunFailed(f"it needs the hub, and {problem}") from None
                with suppress_output():
                    loaded = manager.load([name])["tasks"]
            except Exception as error:  # The hub's libraries raise dozens of kinds.
                skipped[name] = first_line(error, with_type=not isinstance(error, RunFailed))
                continue
        except Exception as error:  # Code of tasks and data sets raises many types.
            file = name not in configs and manager.task_index[name].yaml_path
            problems[name] = first_line(error, with_type=True) + (f" ({file})" if file else "")
            continue
        unsupported = ("UNSAFE_CODE", "MULTIMODAL")
        if any(getattr(task, flag, False) for task in loaded.values() for flag in unsupported):
            problems[name] = "it runs code that a model wrote, or needs more than text"
            continue
        if name in unaveraged and list(loaded) != [name]:
            problems[name] = "evaluation.retention takes single tasks, and this is a group"
            continue
        tasks |= loaded
        if list(loaded) != [name]:
            groups[name] = tuple(loaded)
    _refuse_tasks(problems)
    for task in tasks.values():
        if suite.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", suite.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return LoadedSuite(suite=suite, tasks=tasks, groups=groups, skipped=skipped)


def _no_such_task(name: str, known: Iterable[str]) -> str:
    similar = difflib.get_close_matches(name, known, 1, 0.75)
    return "there is no such task" + (f"; did you mean {similar[0]}?" if similar else "")


def _refuse_tasks(problems: dict[str, str]) -> None:
    """Raise `UserError` if there are problems: name of a task -> why it cannot be evaluated."""
    if problems:
        raise UserError(
            f"cannot evaluate {_as_text(problems)}; correct evaluation.suite or "
            "evaluation.retention, or leave out what cannot be evaluated (an average over the rest "
            "alone would be another number)"
        )


def _with_paper_tasks(names: Iterable[str]) -> list[str]:
    """Return the names, each once, with the papers' tasks instead of `paper`."""
    expanded: list[str] = []
    for name in names:
        expanded += PAPER_TASKS if name == PAPER else [name]
    return list(dict.fromkeys(expanded))


def _check_files(manager: TaskManager, folders: Collection[Path]) -> None:
    # lm-eval would ignore a damaged task file silently.
    from lm_eval.tasks._yaml_loader import load_yaml

    indexed_files = {entry.yaml_path for entry in manager.task_index.values()}
    files = [file for folder in folders for file in sorted(folder.glob("**/*.yaml"))]
    for file in (file for file in files if file not in indexed_files):
        try:
            config = load_yaml(file, resolve_func=False)
        except Exception as error:
            reason = first_line(error, with_type=True)
            raise UserError(f"cannot read the task file {file}: {reason}") from None
        if not config:
            raise UserError(f"the task file {file} is empty")


def _as_text(reasons: dict[str, str]) -> str:
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in reasons.items():
        by_reason[reason].append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


_NAMED = re.compile(rb"^(task|group|tag):[ \t]*[\"']?([\w.:+-]+)", re.MULTILINE)
_TAG_LIST = re.compile(rb"^tag:[ \t]*\n((?:[ \t]*-[ \t]*[\w.:+-]+[ \t]*\n?)+)", re.MULTILINE)
_ITEM = re.compile(rb"-[ \t]*([\w.:+-]+)")


@cache
def _builtin_folders() -> dict[str, set[Path]]:
    # Name of a task, group or tag of lm-eval -> folders to load it from, without importing lm-eval.
    # A task needs its own folder. A group may use tasks of its whole family: the top folder.
    spec = find_spec("lm_eval")
    assert spec, "this program depends on it"
    root = Path(str(spec.origin)).parent / "tasks"
    folders: defaultdict[str, set[Path]] = defaultdict(set)
    # Folder by folder: splitting 14,000 paths would take as long as reading the files.
    for folder_name, _, file_names in os.walk(root):
        folder = Path(folder_name)
        family = root.joinpath(*folder.relative_to(root).parts[:1])
        for file_name in file_names:
            if not file_name.endswith(".yaml"):
                continue
            text = (folder / file_name).read_bytes()
            for keyword, name in _NAMED.findall(text):
                folders[name.decode()].add(family if keyword == b"group" else folder)
            for block in _TAG_LIST.findall(text):
                for name in _ITEM.findall(block):
                    folders[name.decode()].add(folder)
    return dict(folders)
