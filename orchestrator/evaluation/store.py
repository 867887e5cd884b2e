"""The store of evaluations, shared by all commands: each task is measured once for each model.

A file holds the result of one task, with a value for each item, under the hash of all that
determines it: weights and precision, configuration with its schedule, tokenizer, the task's items
and metrics, limit. The loss over held-out tokens is an entry like a task. So a further task costs
only that task, and sweeps, `evaluate`, `export` and `pick` share what was measured.

While a task runs, its answers are stored beside, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.records.evaluation import EvaluationKeys, EvaluationResult, TaskResult


class EvaluationStore:
    """Results of tasks by key, in the workspace's folder `evaluations`."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        """Name the folder; `note` is called with a sentence for what cannot be read or written."""
        self._folder, self._note = folder, note

    def read(self, key: str) -> TaskResult | None:
        """Return a result; None if it is missing or damaged."""
        return TaskResult.read_measured(self._path(key), self._note)

    def write(self, key: str, result: TaskResult) -> None:
        """Store a result and delete its journal; a note if that fails, as the result is not lost.

        Raises:
            OSError: If the disk is full.
        """
        try:
            result.write(self._path(key))
            self._journal_path(key).unlink(missing_ok=True)
        except OSError as error:
            self._fail(f"the result of {result.name}", error)

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

    def _fail(self, what: str, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            raise error
        self._note(f"cannot store {what}: {error.strerror}")

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def _journal_path(self, key: str) -> Path:
        return self._folder / f"{key}.answers"
