"""lm-eval's files of an evaluation, and what is read of them.

A run of lm-eval with `--log_samples` writes `results_DATE.json` and, for each task,
`samples_TASK_DATE.jsonl`: one line per item and filter, with the document, the prompt, what the
model said and the value of each metric. Its hash of a document matches items between evaluations,
whoever measured them. The store writes such files, too; outputs of stock lm-eval are read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iiet.weights import CONFIG
from orchestrator.records.evaluation import (
    HASH_LENGTH,
    STDERR_SUFFIX,
    EvaluationResult,
    TaskResult,
    metric_label,
    plain_value,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    damage_as_user_error,
    expand_user,
    read_json,
)

_DATE = r"(\d{4}-\d\d-\d\dT[\d.\-]+)"
_SAMPLES = re.compile(rf"samples_(.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf"(?:.+_)?{_DATE}\.json")
_LOG_AGAIN = "run lm_eval again with --log_samples"


@dataclass(frozen=True, kw_only=True)
class MeasuredTask:
    """One task under one model: lm-eval's results and samples, and the values of the items."""

    name: str
    run: dict[str, Any]
    """What lm-eval writes as `results_DATE.json`."""
    samples: Sequence[dict[str, Any]] = ()
    items: list[str] = field(default_factory=list)
    """A hash of each document."""
    values: dict[str, list[Any]] = field(default_factory=dict)
    """Metric to one value per item."""

    @property
    def result(self) -> TaskResult:
        """What tables and reports read of it."""
        run = self.run
        metrics = {}
        for key, value in (run["results"].get(self.name) or {}).items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, int | float):
                plain = metric.removesuffix(STDERR_SUFFIX)
                label = metric_label(plain, filter_name)
                metrics[label + metric.removeprefix(plain)] = float(value)
        return TaskResult(
            name=self.name,
            version=str(run["versions"].get(self.name)),
            num_items=len(self.items),
            num_fewshot=int(run["n-shot"].get(self.name) or 0),
            metrics=metrics,
            items=self.items,
            values=self.values,
        )


def item_values(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the hashes of the items, and each metric's value per item.

    Metrics over texts, such as those that BLEU compares, have no values.

    Raises:
        ValueError: If the filters of the task have different items, or there is none.
    """
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    hashes, values = [], {}
    for filter_name, of_filter in by_filter.items():
        of_filter.sort(key=lambda sample: int(sample["doc_id"]))
        hashes.append([sample["doc_hash"][:HASH_LENGTH] for sample in of_filter])
        for metric in of_filter[0]["metrics"]:
            found = [plain_value(sample.get(metric)) for sample in of_filter]
            if None not in found:
                values[metric_label(metric, filter_name)] = found
    if not hashes or any(others != hashes[0] for others in hashes):
        raise ValueError("its filters have different items" if hashes else "it is empty")
    return hashes[0], values


@dataclass(frozen=True)
class LoggedRun:
    """Files of one or several runs of lm-eval on one model; of each task the newest count."""

    results: Mapping[str, Path]
    """Date in the name -> results of that run."""
    samples: Mapping[str, tuple[str, Path]]
    """Task -> date in the name, and the newest samples."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return list(self.samples)

    def read(self) -> EvaluationResult:
        """Read the newest samples of each task.

        Raises:
            UserError: If a file is damaged, or of a version of lm-eval without hashes.
        """
        runs = {
            date: read_json(self.results[date], remedy=_LOG_AGAIN) or {}
            for date in dict.fromkeys(date for date, _ in self.samples.values())
        }
        # In the order in which lm-eval ran them.
        named = [name for run in runs.values() for name in run.get("results") or ()]
        tasks = {}
        for name in dict.fromkeys([*(n for n in named if n in self.samples), *self.samples]):
            date, path = self.samples[name]
            with damage_as_user_error(path, remedy=_LOG_AGAIN):
                items, values = item_values(_read_samples(path))
                task = MeasuredTask(name=name, run=runs[date], items=items, values=values)
                tasks[name] = task.result
        groups: dict[str, tuple[str, ...]] = {}
        for date, run in runs.items():
            with damage_as_user_error(self.results[date], remedy=_LOG_AGAIN):
                groups |= top_groups(run.get("group_subtasks") or {})
        return EvaluationResult(results=tasks, groups=groups)


def find_logged_run(path: Path) -> LoggedRun | None:
    """Return the run of lm-eval at a path; None if there is none, as in a model's folder.

    Args:
        path: A results file, its folder, or the folder that was given to lm-eval as `--output_path`
            if it holds results of one model.

    Raises:
        UserError: If there are several models, or results without samples.
    """
    path = expand_user(path)
    if path.is_file():
        found = _RESULTS.fullmatch(path.name)
        return _run_in(path.parent, {found[1]: path}) if found else None
    if not path.is_dir() or (path / CONFIG).is_file():
        return None
    if results := _results_in(path):
        return _run_in(path, results)
    folders = [f for f in sorted(path.iterdir()) if f.is_dir() and _results_in(f)]
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise UserError(f"{path} has results of several models; name one of its folders: {names}")
    return _run_in(folders[0], _results_in(folders[0])) if folders else None


def top_groups(subtasks: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Return the groups that are part of no other group, each with all tasks below it."""

    def tasks_below(name: str) -> list[str]:
        members = subtasks.get(name) or []
        return [t for member in members for t in tasks_below(member)] if members else [name]

    inner = {member for members in subtasks.values() for member in members}
    tops = [name for name, members in subtasks.items() if members and name not in inner]
    return {name: tuple(dict.fromkeys(tasks_below(name))) for name in tops}


def _results_in(folder: Path) -> dict[str, Path]:
    named = {path: _RESULTS.fullmatch(path.name) for path in sorted(folder.glob("*.json"))}
    return {found[1]: path for path, found in named.items() if found}


def _run_in(folder: Path, results: Mapping[str, Path]) -> LoggedRun:
    samples: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        found = _SAMPLES.fullmatch(path.name)
        if found and found[2] in results:
            samples[found[1]] = max(samples.get(found[1], ("", path)), (found[2], path))
    if not samples:
        raise UserError(f"{folder} has results of lm-eval but no samples of them; {_LOG_AGAIN}")
    return LoggedRun(results, samples)


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """Read of each sample what items need; prompts and documents need much memory."""
    samples = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if "doc_hash" not in sample:
                raise UserError(f"{path} has no `doc_hash`: it is of an old lm-eval; {_LOG_AGAIN}")
            kept = ("doc_id", "doc_hash", "filter", "metrics", *sample["metrics"])
            samples.append({key: sample[key] for key in kept})
    return samples
