"""Read what stock lm-eval writes with `--log_samples`: results, and one line per item and filter.

A run writes `results_DATE.json` and, for each task, `samples_TASK_DATE.jsonl`. Its hash of a
document is the one that our results have, so evaluations of both kinds match item by item. Of each
task the newest samples count, with the version in the results of the same run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
from orchestrator.workspace.files import damage_as_user_error, expand_user, read_json

_DATE = r"(\d{4}-\d\d-\d\dT[\d.\-]+)"
_SAMPLES = re.compile(rf"samples_(.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf"(?:.+_)?{_DATE}\.json")
_REMEDY = "run lm_eval again with --log_samples"


@dataclass(frozen=True)
class LoggedRun:
    """Files of one or several runs of lm-eval on one model."""

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
            date: read_json(self.results[date], remedy=_REMEDY) or {}
            for date in dict.fromkeys(date for date, _ in self.samples.values())
        }
        # In the order in which lm-eval ran them.
        named = [name for run in runs.values() for name in run.get("results") or ()]
        tasks = {}
        for name in dict.fromkeys([*(n for n in named if n in self.samples), *self.samples]):
            date, path = self.samples[name]
            with damage_as_user_error(path, remedy=_REMEDY):
                tasks[name] = _task_result(name, path, runs[date])
        groups: dict[str, tuple[str, ...]] = {}
        for date, run in runs.items():
            with damage_as_user_error(self.results[date], remedy=_REMEDY):
                groups |= _groups(run.get("group_subtasks") or {})
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
        raise UserError(f"{folder} has results of lm-eval but no samples of them; {_REMEDY}")
    return LoggedRun(results, samples)


def _task_result(name: str, path: Path, run: Mapping[str, Any]) -> TaskResult:
    by_filter: dict[str, list[dict[str, Any]]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if "doc_hash" not in sample:
                raise UserError(f"{path} has no `doc_hash`: it is of an old lm-eval; {_REMEDY}")
            sample = {key: sample[key] for key in _kept_keys(sample)}
            by_filter.setdefault(sample["filter"], []).append(sample)
    for samples in by_filter.values():
        samples.sort(key=lambda sample: int(sample["doc_id"]))
    items = [[s["doc_hash"][:HASH_LENGTH] for s in samples] for samples in by_filter.values()]
    if not items or any(hashes != items[0] for hashes in items):
        raise ValueError("its filters have different items" if items else "it is empty")
    values = {}
    for filter_name, samples in by_filter.items():
        for metric in samples[0]["metrics"]:
            found = [plain_value(sample.get(metric)) for sample in samples]
            if None not in found:
                values[metric_label(metric, filter_name)] = found
    return TaskResult(
        name=name,
        version=str(run["versions"].get(name)),
        num_items=len(items[0]),
        num_fewshot=int(run["n-shot"].get(name) or 0),
        metrics=_metrics(run["results"].get(name) or {}),
        items=items[0],
        values=values,
    )


def _kept_keys(sample: Mapping[str, Any]) -> list[str]:
    """Return what is read of a sample; prompts and documents need much memory."""
    return ["doc_id", "doc_hash", "filter", "metrics", *sample["metrics"]]


def _metrics(results: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for key, value in results.items():
        metric, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float):
            plain = metric.removesuffix(STDERR_SUFFIX)
            label = metric_label(plain, filter_name)
            metrics[label + metric.removeprefix(plain)] = float(value)
    return metrics


def _groups(subtasks: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Return the groups that are part of no other group, each with all tasks below it."""

    def tasks_below(name: str) -> list[str]:
        members = subtasks.get(name) or []
        return [t for member in members for t in tasks_below(member)] if members else [name]

    inner = {member for members in subtasks.values() for member in members}
    tops = [name for name, members in subtasks.items() if members and name not in inner]
    return {name: tuple(dict.fromkeys(tasks_below(name))) for name in tops}
