"""Select the tasks of an evaluation: the suite in the settings as names and folders for lm-eval.

A suite is a list of names; `heldout` stands for the tasks made from held-out documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.prepared import MANIFEST_NAME, verify_data
from orchestrator.evaluation.heldout import TASKS, build_heldout
from orchestrator.settings import EvaluationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import expand_user, is_folder
from orchestrator.workspace.folders import Workspace

HELDOUT = "heldout"


@dataclass(frozen=True, kw_only=True)
class TaskSelection:
    """Names of tasks, and the folders in which they are looked up."""

    names: tuple[str, ...]
    """Tasks, groups, tags or named suites."""
    folders: tuple[Path, ...]
    """Folders of the user's task files; they take precedence over lm-eval's own."""
    heldout: Path | None = None
    """Folder of the held-out tasks; None if they were not requested."""


def newest_tokens(workspace: Workspace) -> Path:
    """Return the workspace's newest tokens, for models that were not trained on tokens of it.

    Raises:
        UserError: If it has none.
    """
    manifests = list(workspace.tokens.glob(f"*/{MANIFEST_NAME}"))
    if not manifests:
        raise UserError(
            f"held-out tasks are made from prepared text, and {workspace.root} has none; "
            "run `iiet-orch prepare`, or choose tasks of lm-eval with --suite"
        )
    folder = max(manifests, key=lambda path: path.stat().st_mtime).parent
    verify_data(folder)
    return folder


def select_tasks(
    settings: EvaluationSettings,
    tokens: Callable[[], Path],
    *,
    context_length: int,
    progress: Progress,
    make: bool = True,
) -> TaskSelection:
    """Return the tasks to run; held-out tasks are made if they are missing.

    Args:
        tokens: Returns the folder of prepared tokens; called only for held-out tasks.
        context_length: Tokens that the model reads; every held-out item fits into them.
        make: Whether missing held-out tasks are made.

    Raises:
        UserError: If held-out tasks are requested, and there are no tokens or they give no items.
    """
    names = [name.strip() for name in settings.suite.split(",") if name.strip()]
    folders = user_task_folders(settings)
    if HELDOUT not in names:
        return TaskSelection(names=tuple(names), folders=tuple(folders))
    built = build_heldout(
        tokens(),
        num_items=settings.num_items,
        context_length=context_length,
        progress=progress,
        make=make,
    )
    for note in built.notes:
        progress.note(note)
    place = names.index(HELDOUT)
    names[place : place + 1] = [name for name in TASKS if name in built.tasks]
    return TaskSelection(names=tuple(names), folders=tuple(folders), heldout=built.folder)


def user_task_folders(settings: EvaluationSettings) -> list[Path]:
    """Return the user's folder of task files as an absolute path, or nothing if none is set.

    Raises:
        UserError: If it does not exist.
    """
    if not settings.include_path:
        return []
    if not is_folder(settings.include_path):
        raise UserError(
            f"evaluation.include_path: there is no folder {shortened(settings.include_path)} to "
            "find lm-eval task files in"
        )
    return [expand_user(settings.include_path).absolute()]


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
    folders = user_task_folders(settings)
    names = [name.strip() for name in settings.suite.split(",")]
    others = [name for name in names if name and name != HELDOUT]
    if not others and not (settings.include_path and HELDOUT not in names):
        return {}
    # Imports lm-eval, which takes seconds.
    from orchestrator.evaluation.harness import check_answer_settings, load_suite

    loaded = load_suite(
        others, folders=folders, num_fewshot=settings.num_fewshot, prompts=settings.prompts
    )
    progress = progress or Progress()
    for name, reason in loaded.skipped.items():
        progress.note(f"skipped {name}: {reason}")
    if needs_accuracy and HELDOUT not in names and not loaded.has_accuracy:
        raise UserError(
            f"a sweep's front needs an accuracy, and no task of evaluation.suite={settings.suite} "
            f"reports one; add a task such as {HELDOUT}: {settings.suite},{HELDOUT}"
        )
    if context_length is not None:
        check_answer_settings(loaded.tasks, context_length)
    return {name: loaded.fingerprint(name) for name in sorted(loaded.tasks)}
