"""The store of evaluations, shared by all commands: each task is measured once for each model.

A folder holds lm-eval's files of one task under the hash of all that determines it: weights and
precision, configuration with its schedule, tokenizer, the task's items and metrics, limit. The loss
over held-out tokens is an entry like a task. So a further task costs only that task, and sweeps,
`evaluate`, `export` and `pick` share what was measured.

While a task runs, its answers are stored beside, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.lm_eval_files import MeasuredTask, copy_tasks, read_task, write_task
from orchestrator.records.evaluation import EvaluationKeys, EvaluationResult, TaskResult
from orchestrator.workspace.errors import UserError


class EvaluationStore:
    """Results of tasks by key, in the workspace's folder `evaluations`."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        """Name the folder; `note` is called with a sentence for what cannot be read or written."""
        self._folder, self._note = folder, note

    def read(self, key: str) -> TaskResult | None:
        """Return a result; None if it is missing or damaged."""
        try:
            return read_task(self._folder / key)
        except UserError as error:
            self._note(str(error))
            return None

    def write(self, key: str, task: MeasuredTask, about: Mapping[str, Any]) -> None:
        """Store a task and delete its journal; a note if that fails, as the result is not lost.

        Args:
            about: Further keys of lm-eval's results, such as `config`.

        Raises:
            OSError: If the disk is full.
        """
        try:
            write_task(self._folder / key, task, about)
            self._journal_path(key).unlink(missing_ok=True)
        except OSError as error:
            self._fail(f"the result of {task.name}", error)

    def journal(self, key: str, name: str) -> AnswerJournal:
        """Return the answers to a task that is not finished; `name` is the task's, for notes."""
        failed = partial(self._fail, f"the answers to {name} while it runs")
        return AnswerJournal(self._journal_path(key), failed=failed)

    def load(self, keys: EvaluationKeys) -> EvaluationResult | None:
        """Return a whole evaluation; None if the result of a task is missing or damaged."""
        results = {name: self.read(key) for name, key in keys.tasks.items()}
        found = {name: result for name, result in results.items() if result}
        if len(found) < len(results):
            return None
        return EvaluationResult(results=found, groups=keys.groups, skipped=keys.skipped)

    def copy(self, keys: EvaluationKeys, target: Path, *, pretrained: str) -> None:
        """Copy lm-eval's files of an evaluation into a folder, as one run of lm-eval.

        Args:
            pretrained: The model's path.

        Raises:
            RunFailed: If a file is damaged, or the files cannot be written.
        """
        folders = {name: self._folder / key for name, key in keys.tasks.items()}
        copy_tasks(folders, target, groups=keys.groups, pretrained=pretrained)

    def _fail(self, what: str, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            raise error
        self._note(f"cannot store {what}: {error.strerror}")

    def _journal_path(self, key: str) -> Path:
        return self._folder / f"{key}.answers"
