"""Tasks by name: which ones the settings ask for, checked before anything is trained, and loaded.

A name in `evaluation.suite` is that of a held-out task of the prepared data, of a task file in
`evaluation.include_path`, of `short_answers`, or of a task of lm-eval's own; `heldout` stands for
all held-out tasks, `paper` for those of the papers. A name without a task, and a local task that
cannot be loaded or scored, are errors: an average over the rest would be another number under the
same name. Only tasks that the hub does not provide are skipped. The hub is asked at most once, and
only if its cache lacks a task's data: lm-eval alone would try again for 23 seconds per task. Nor
are all of lm-eval's 14,000 task files parsed, which takes 8 seconds. lm-eval is imported
where tasks are loaded, as it takes seconds, too.
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
"""Stands for all tasks that the prepared data give."""
FEWSHOT_SEED = 1234
"""lm-eval's default, so that prompts are the usual ones."""
PAPER = "paper"
"""Stands for `PAPER_TASKS`."""
PAPER_TASKS = (
    "lambada_openai", "piqa", "hellaswag", "sciq", "arc_easy", "arc_challenge", "winogrande",
)  # fmt: skip
"""The seven tasks of the papers, which are lm-eval's."""


# What the settings ask for


def make_suite(
    settings: EvaluationSettings,
    tokens: Path | None,
    *,
    context_length: int,
    make_progress: Progress | None = None,
) -> Suite:
    """Return what the settings ask to measure; `heldout` means all held-out tasks of the data.

    Args:
        tokens: Folder of prepared tokens, which held-out tasks need; see `needs_heldout`.
        context_length: Most tokens that the model can read.
        make_progress: Makes missing held-out tasks, and shows how far that is; None makes none.

    Raises:
        UserError: If the model reads fewer tokens at once than the settings say, the tokens do not
            give the held-out tasks, or these are damaged, or cannot be made because the documents
            give no items.
    """
    length = settings.tokens_at_once(context_length)
    names = named_tasks(settings)
    heldout = None
    if tokens is not None and needs_heldout(settings):
        offered = offered_tasks(open_data(tokens))
        check_offered(settings, offered)
        # Every held-out item fits into what the model reads at once.
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
    """Return the tasks of `evaluation.retention` that are not among those of the suite.

    Raises:
        UserError: If one is a task of the data that the suite does not name, or if it names none.
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
    """Return whether a sweep measures tasks besides held-out ones."""
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
    """Raise `UserError` if the suite names held-out tasks that are not among those offered."""
    names = filter(is_heldout_task, named_tasks(settings))
    if missing := [name for name in names if name not in offered]:
        raise UserError(
            f"evaluation.suite names {', '.join(missing)}, which the data cannot make; they can "
            f"make {', '.join(offered)}"
        )


def check_task_names(settings: EvaluationSettings) -> None:
    """Raise `UserError` if a task is neither this program's nor lm-eval's own; loads none.

    Which tasks a folder of the user has, only lm-eval can say.
    """
    names = [*_lm_eval_names(settings), *_retention_tasks_of_lm_eval(settings)]
    unchecked = [name for name in names if name not in {PAPER, *PAPER_TASKS, SHORT_ANSWERS}]
    if unchecked and not user_task_folder(settings):
        known = _builtin_folders()
        _refuse_tasks({name: _no_such_task(name, known) for name in unchecked if name not in known})


def check_sweep_tasks(settings: Settings, offered: Collection[str]) -> None:
    """Check the tasks of a sweep before it begins.

    Raises:
        UserError: As `check_offered`; or if a search is to improve bits per byte, and no task gives
            them.
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
    """Load the suite's tasks, without held-out tasks; return by name a hash of items and metrics.

    Args:
        progress: Shows which tasks are skipped.
        needs_accuracy: Whether one task of the suite must report an accuracy.
        context_length: Tokens that the models read, if answers to the tasks must fit into them.

    Raises:
        UserError: If a task does not exist, cannot be read or not be answered, the hub provides
            none of them, or none reports an accuracy although one is needed.
    """
    include_folder = user_task_folder(settings)
    names = named_tasks(settings)
    unaveraged = tuple(_retention_tasks_of_lm_eval(settings))
    is_accuracy_known = any(name == HELDOUT or has_accuracy(name) for name in names)
    fingerprints = {}
    if needs_lm_eval(settings):
        loaded = load_suite(
            Suite(
                # Without a name in the suite, those of the user's folder.
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
    """Loaded tasks of a suite, and those that the hub did not provide."""

    suite: Suite
    """What was asked for."""
    tasks: dict[str, Task]
    """Task by name, in the requested order."""
    groups: dict[str, tuple[str, ...]]
    """Requested group or tag -> names of its tasks."""
    skipped: dict[str, str]
    """Name of a task -> why it is not run."""

    def only(self, names: Collection[str]) -> LoadedSuite:
        """Return the suite with only these tasks."""
        return replace(self, tasks={k: task for k, task in self.tasks.items() if k in names})

    def num_items(self, name: str) -> int:
        """Return the number of items of a task that a run scores."""
        available = len(self.tasks[name].eval_docs)
        return available if self.suite.limit is None else min(available, self.suite.limit)

    def fingerprint(self, name: str) -> str:
        """Return a hash of all that determines items, prompts and metrics, but no file paths."""
        return self.suite.task_fingerprint(_task_hash(self.tasks[name]))


@lru_cache(maxsize=64)
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


class NoTaskAvailable(UserError):
    """None of the suite's tasks can be had: all are the hub's."""


def load_suite(suite: Suite) -> LoadedSuite:
    """Load the tasks of a suite; in one process, tasks of the same files are loaded once.

    A suite with fingerprints gets exactly the tasks that have one, and the held-out tasks, so that
    all models of a sweep have an average over the same tasks.

    Raises:
        UserError: If a name has no task, or a local task cannot be loaded or scored.
        NoTaskAvailable: If the hub provides none of the tasks, and no other is named.
        RunFailed: If a task with a fingerprint cannot be loaded.
    """
    folders = [*suite.task_folders, *([suite.heldout] if suite.heldout else [])]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    file_states = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    # The other fields of the suite say how tasks are run, not which there are.
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
        _load_tasks.cache_clear()  # The hub may provide them later.
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
        suite_json: The suite as JSON, because a key of the cache must be hashable.
        _file_states: Path, time of change and size of each task file; another state of a file is
            another key of the cache.
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
        # Of lm-eval's own tasks, only the folders that define these names are read.
        builtin = _builtin_folders()
        folders: set[Path] = set().union(*(builtin.get(name, set()) for name in names))
        manager = manager_of(*sorted(folders), *suite.task_folders)

    # Load them; only what the hub does not give is skipped.
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
        except ConnectionError:  # It is not in the hub's cache.
            try:
                if problem := hub_problem_once():
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
    """Return the names, each once, with the papers' tasks in the place of `paper`."""
    expanded: list[str] = []
    for name in names:
        expanded += PAPER_TASKS if name == PAPER else [name]
    return list(dict.fromkeys(expanded))


def _check_files(manager: TaskManager, folders: Collection[Path]) -> None:
    # A damaged task file is an error; lm-eval would ignore it silently.
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
    # Each name of a task, group or tag of lm-eval, which is not imported -> the folders to load it
    # from. A task needs its own folder. A group may use tasks elsewhere in its family, so it needs
    # the whole family: the top folder.
    spec = find_spec("lm_eval")
    assert spec, "this program depends on it"
    root = Path(str(spec.origin)).parent / "tasks"
    folders: defaultdict[str, set[Path]] = defaultdict(set)
    # A folder at a time: to take 14,000 paths apart would take as long as to read the files.
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
