"""Which tasks the settings ask for, and checks of them before anything is trained."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from orchestrator.data.mixture import open_data
from orchestrator.data.store import MANIFEST_NAME, verify_data
from orchestrator.evaluation.heldout import (
    TEXT_TASKS,
    build_heldout,
    find_heldout,
    has_accuracy,
    is_heldout_task,
    offered_tasks,
)
from orchestrator.evaluation.tasks import HELDOUT, TaskSelection
from orchestrator.records.evaluation import BITS_METRIC
from orchestrator.settings import DataSettings, EvaluationSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.layout import Workspace


def select_tasks(
    settings: EvaluationSettings,
    tokens: Path | None,
    *,
    context_length: int,
    make: Progress | None = None,
) -> TaskSelection:
    """Return the tasks that the settings ask for.

    `heldout` stands for all tasks in the held-out suite of these tokens. Before the suite is made,
    it stands for the tasks that can be made from the tokens.

    Args:
        tokens: Folder of prepared tokens, if held-out tasks are requested; see `needs_heldout`.
        context_length: Tokens that the model reads; every held-out item fits into them.
        make: Makes a missing suite, and is told about it.

    Raises:
        UserError: If the tokens do not give the held-out tasks, or the suite is damaged, or cannot
            be made because the documents give no items.
    """
    names, heldout = named_tasks(settings), None
    if tokens is not None:
        check_offered(settings, offered_tasks(open_data(tokens)))
        size = {"num_items": settings.num_items, "context_length": context_length}
        if make is None:
            suite = find_heldout(tokens, **size)
        else:
            suite = build_heldout(tokens, **size, progress=make)
            for note in suite.notes:
                make.note(note)
        heldout = suite.folder
        if HELDOUT in names:
            place = names.index(HELDOUT)
            names[place : place + 1] = suite.tasks
    return TaskSelection(
        names=tuple(dict.fromkeys(names)),
        folders=user_task_folders(settings),
        heldout=heldout,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
    )


def named_tasks(settings: EvaluationSettings) -> list[str]:
    """Return the names in `evaluation.suite`."""
    return [name.strip() for name in settings.suite.split(",") if name.strip()]


def _lm_eval_names(settings: EvaluationSettings) -> list[str]:
    return [n for n in named_tasks(settings) if n != HELDOUT and not is_heldout_task(n)]


def needs_heldout(settings: EvaluationSettings) -> bool:
    """Return whether the suite has held-out tasks."""
    return len(_lm_eval_names(settings)) < len(named_tasks(settings))


def needs_lm_eval(settings: EvaluationSettings) -> bool:
    """Return whether the suite has tasks besides held-out ones."""
    names_all = not named_tasks(settings) and bool(settings.include_path)
    return names_all or bool(_lm_eval_names(settings))


def user_task_folders(settings: EvaluationSettings) -> tuple[Path, ...]:
    """Return the user's folder of task files as an absolute path, or nothing if none is set.

    Raises:
        UserError: If it does not exist.
    """
    if not settings.include_path:
        return ()
    folder = expand_user(settings.include_path).absolute()
    if not folder.is_dir():
        raise UserError(
            f"evaluation.include_path: there is no folder {shortened(settings.include_path)} to "
            "find lm-eval task files in"
        )
    return (folder,)


def newest_tokens(workspace: Workspace) -> Path:
    """Return the workspace's newest tokens, for models that were not trained on tokens of it.

    Raises:
        UserError: If it has none.
    """
    manifests = list(workspace.tokens.glob(f"*/{MANIFEST_NAME}"))
    if not manifests:
        raise UserError(
            f"held-out tasks are made from prepared data, and {workspace.root} has none; "
            "run `iiet-orch prepare`, or choose tasks of lm-eval with evaluation.suite"
        )
    folder = max(manifests, key=lambda path: path.stat().st_mtime).parent
    verify_data(folder)
    return folder


def check_offered(settings: EvaluationSettings, offered: Collection[str]) -> None:
    """Raise `UserError` if the suite names held-out tasks that are not among those offered."""
    names = filter(is_heldout_task, named_tasks(settings))
    if missing := [name for name in names if name not in offered]:
        raise UserError(
            f"evaluation.suite names {', '.join(missing)}, which the data cannot make; they can "
            f"make {', '.join(offered)}"
        )


def check_sweep_tasks(settings: Settings, offered: Collection[str]) -> None:
    """Check the tasks of a sweep before it begins.

    Raises:
        UserError: As `check_offered`; or if a search is to improve bits per byte, and no task gives
            them.
    """
    evaluation, objective = settings.evaluation, settings.search.objective
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
    """Load the suite's tasks, without held-out tasks, and return a hash of each.

    Args:
        progress: Shows which tasks are skipped.
        needs_accuracy: Whether one task of the suite must report an accuracy.
        context_length: Tokens that the models read, if they must be able to generate the answers of
            the tasks that want some.

    Returns:
        Name of a task -> hash of all that determines its items and metrics.

    Raises:
        UserError: If a task does not exist, cannot be read or not be answered, or none reports an
            accuracy although one is needed.
        RunFailed: If the hub provides none of the tasks.
    """
    folders, names = user_task_folders(settings), named_tasks(settings)
    is_accuracy_known = any(name == HELDOUT or has_accuracy(name) for name in names)
    fingerprints = {}
    if needs_lm_eval(settings):
        from orchestrator.evaluation.adapter import check_answer_settings
        from orchestrator.evaluation.suite import load_suite

        others = TaskSelection(
            names=tuple(_lm_eval_names(settings)),
            folders=folders,
            num_fewshot=settings.num_fewshot,
            prompts=settings.prompts,
        )
        loaded = load_suite(others)
        progress = progress or Progress()
        for name, reason in loaded.skipped.items():
            progress.note(f"skipped {name}: {reason}")
        is_accuracy_known |= loaded.has_accuracy
        if context_length is not None:
            check_answer_settings(loaded.tasks, context_length)
        fingerprints = {name: loaded.fingerprint(name) for name in sorted(loaded.tasks)}
    if needs_accuracy and not is_accuracy_known:
        raise UserError(
            f"a sweep's front needs an accuracy, and no task of evaluation.suite={settings.suite} "
            f"reports one; add a task such as {HELDOUT}: {settings.suite},{HELDOUT}"
        )
    return fingerprints
