"""What an evaluation's settings ask for, as task names and folders that lm-eval can load.

Single evaluations and whole sweeps both come through here, so `heldout` means the same items in
both: those made from the documents that were kept out of a model's training. A suite is a list of
names, of which `heldout` stands for these tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.token_store import MANIFEST_NAME, verify_tokens
from orchestrator.evaluation.heldout import TASKS, build_heldout
from orchestrator.settings import EvaluationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.folders import Workspace

HELDOUT = "heldout"


@dataclass(frozen=True, kw_only=True)
class TaskSelection:
    """Names, and where they are looked up."""

    names: tuple[str, ...]
    """Tasks, groups, tags or named suites."""
    folders: tuple[Path, ...]
    """Folders of the user's task files, which come before lm-eval's own."""
    heldout: Path | None = None
    """The folder of the held-out tasks, where those were asked for."""


def newest_tokens(workspace: Workspace) -> Path:
    """Return the workspace's newest tokens, for models that were not trained on any of them.

    Raises:
        UserError: If it has none.
    """
    manifests = list(workspace.tokens.glob(f"*/{MANIFEST_NAME}"))
    if not manifests:
        raise UserError(
            f"held-out tasks are made from prepared text, and {workspace.root} has none; "
            "`iiet-orch prepare` makes it, or --suite takes tasks of lm-eval"
        )
    folder = max(manifests, key=lambda path: path.stat().st_mtime).parent
    verify_tokens(folder)
    return folder


def select_tasks(
    settings: EvaluationSettings,
    tokens: Callable[[], Path],
    *,
    context_length: int,
    progress: Progress,
) -> TaskSelection:
    """Return what is to be measured; held-out tasks are made if they are missing.

    Args:
        settings: The suite, its size, and the user's own folder.
        tokens: Gives the folder of prepared tokens; asked for held-out tasks alone.
        context_length: Tokens that the model reads; every held-out item fits.
        progress: Told what is going on, and what a reader of the results should know.

    Raises:
        UserError: If held-out tasks are wanted, and there are no tokens or they give none.
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
    )
    for note in built.notes:
        progress.note(note)
    place = names.index(HELDOUT)
    names[place : place + 1] = [name for name in TASKS if name in built.tasks]
    return TaskSelection(names=tuple(names), folders=tuple(folders), heldout=built.folder)


def user_task_folders(settings: EvaluationSettings) -> list[Path]:
    """Return the user's own folder of task files, as an absolute path, if there is one.

    Raises:
        UserError: If it is named and is not there.
    """
    if not settings.include_path:
        return []
    folder = expand_user(settings.include_path).absolute()
    if not folder.is_dir():
        raise UserError(
            f"evaluation.include_path: there is no folder {folder} to find lm-eval task files in"
        )
    return [folder]


def lm_eval_task_fingerprints(
    settings: EvaluationSettings,
    progress: Progress | None = None,
    *,
    needs_accuracy: bool = False,
) -> dict[str, str]:
    """Load what a suite asks for beside the held-out tasks, which are named by their content.

    Args:
        settings: The suite, and the user's own folder.
        progress: Told which tasks cannot be loaded.
        needs_accuracy: Whether one task of the suite must have an accuracy.

    Returns:
        Name -> hash of all that determines items and metrics, wherever the files stand; one name
        for each task of a group or a named suite.

    Raises:
        UserError: If a task does not exist or cannot be read, or none has the accuracy that is
            needed.
        RunFailed: If the hub gives none of them.
    """
    folders = user_task_folders(settings)
    names = [name.strip() for name in settings.suite.split(",")]
    others = [name for name in names if name and name != HELDOUT]
    if not others and not (settings.include_path and HELDOUT not in names):
        return {}
    from orchestrator.evaluation.harness import load_suite  # Brings lm-eval along: seconds.

    loaded = load_suite(others, folders=folders, num_fewshot=settings.num_fewshot)
    told = progress or Progress()
    for name, reason in loaded.skipped.items():
        told.note(f"skipped {name}: {reason}")
    if needs_accuracy and HELDOUT not in names and not loaded.has_accuracy:
        raise UserError(
            f"a sweep's front is drawn by accuracy, and evaluation.suite={settings.suite} has no "
            f"task with one; add a task such as {HELDOUT}: {settings.suite},{HELDOUT}"
        )
    return {name: loaded.fingerprint(name) for name in sorted(loaded.tasks)}
