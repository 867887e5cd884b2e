"""What the trials of a sweep are measured on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.model.config import ModelConfig
from orchestrator.data.mixture import open_data
from orchestrator.evaluation.heldout import python_passages
from orchestrator.evaluation.tasks import (
    HELDOUT,
    lm_eval_task_fingerprints,
    make_suite,
    unaveraged_tasks,
)
from orchestrator.models.folder import text_files_key
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import (
    SweepTrials,
)
from orchestrator.settings import EvaluationSettings
from orchestrator.settings.evaluation import PYTHON_BITS_TASK
from orchestrator.settings.training import default_precision
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import last_recorded
from orchestrator.workspace.layout import PLAN_FILE, Workspace
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    pass


def load_tasks(
    settings: EvaluationSettings, tokens: Path, config: ModelConfig, progress: Progress
) -> dict[str, str]:
    """Make the held-out items that are missing, load lm-eval's tasks, and return their hashes.

    Raises:
        UserError: If the text gives too few items, a task is missing, or its answers are too long.
    """
    make_suite(settings, tokens, context_length=config.context_length, make_progress=progress)
    length = settings.tokens_at_once(config.context_length)
    return lm_eval_task_fingerprints(settings, context_length=length)


def plan_suite(
    settings: EvaluationSettings,
    tokens: Path,
    config: ModelConfig,
    hashes: Mapping[str, str] | None = None,
    *,
    teacher: Path | None = None,
    workspace: Workspace | None = None,
) -> Suite:
    """Return how trials are evaluated.

    Args:
        hashes: Result of `load_tasks`; when unset, the hashes of the newest sweep.
        teacher: Checkpoint of the full model; an imported one has its own tokenizer.
    """
    suite = make_suite(settings, tokens, context_length=config.context_length)
    changes: dict[str, Any] = {
        "tokens": open_data(tokens).fingerprint,
        "precision": settings.precision or default_precision(on_gpus=False),
        "fingerprints": dict(hashes) if hashes else None,
    }
    if settings.suite == HELDOUT and not settings.include_path:
        changes["tasks"] = ()  # No names: all held-out tasks of the folder.
    unaveraged = unaveraged_tasks(settings)
    if unaveraged:
        changes["unaveraged"] = unaveraged
    if PYTHON_BITS_TASK in unaveraged:
        changes["python_text"] = content_key(*python_passages(tokens))
    if teacher and (vocabulary := text_files_key(teacher)):
        changes |= {"vocabulary": vocabulary, "vocabulary_folder": str(teacher)}
    suite = suite.model_copy(update=changes)
    if hashes is None and workspace:
        return _with_known_fingerprints(suite, workspace)
    return suite


def _with_known_fingerprints(suite: Suite, workspace: Workspace) -> Suite:
    """Return a suite with the task hashes of the newest sweep with the same tasks."""
    for folder in sorted(workspace.sweeps.glob("*/"), key=last_recorded, reverse=True):
        with suppress(UserError):  # A plan may be damaged.
            if plan := SweepTrials.read(folder / PLAN_FILE):
                stored_suite = plan.trials[0].suite
                changes = {"fingerprints": stored_suite.fingerprints}
                suite_with_hashes = suite.model_copy(update=changes)
                if suite_with_hashes.key == stored_suite.key:
                    return suite_with_hashes
    return suite
