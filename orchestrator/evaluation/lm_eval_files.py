"""lm-eval's files are the record of an evaluation: read and write them.

A run of lm-eval with `--log_samples` writes `results_DATE.json` and, for each task,
`samples_TASK_DATE.jsonl`: one line per item and filter, with the document, the prompt, what the
model said and the value of each metric. Its hash of a document matches items between evaluations,
whoever measured them. Our folders hold one task each and, beside these files, `items.json`: hashes
and values of the items in one compact array, so that a report parses no samples.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
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
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import (
    checksums_of,
    damage_as_user_error,
    damaged_file,
    expand_user,
    new_folder,
    read_json,
    write_json,
    write_text,
)

ITEMS = "items.json"
_DATE = r"(\d{4}-\d\d-\d\dT[\d.\-]+)"
_SAMPLES = re.compile(rf"samples_(.+)_{_DATE}\.jsonl")
_RESULTS = re.compile(rf"(?:.+_)?{_DATE}\.json")
_LOG_AGAIN = "run lm_eval again with --log_samples"
_MEASURED_AGAIN = "it is measured again"


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


# Our own folders


def write_task(folder: Path, task: MeasuredTask, about: Mapping[str, Any]) -> None:
    """Write a task's files; the folder appears when all of them are whole.

    Args:
        about: Further keys of the results, such as `config`.
    """
    from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

    date, hashes, lines = _date_now(), [], []
    for sample in task.samples:
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
            for i, values in enumerate(sample["arguments"])
        }
        changed = {
            **sample,
            "resps": sanitize_list(sample["resps"]),
            "filtered_resps": sanitize_list(sample["filtered_resps"]),
            "arguments": arguments,
            "target": str(sample["target"]),
        }
        lines.append(json.dumps(changed, default=handle_non_serializable, ensure_ascii=False))
        hashes.append(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
    run = {
        **task.run,
        "task_hashes": {task.name: hash_string("".join(hashes))},
        "lm_eval_version": metadata.version("lm_eval"),
        "date": time.time(),
        **about,
    }
    # As it will be read: what is no JSON value becomes a text.
    run = json.loads(json.dumps(run, default=handle_non_serializable))
    with new_folder(folder) as temporary:
        write_json(temporary / f"results_{date}.json", run)
        if lines:
            samples = temporary / f"samples_{task.name}_{date}.jsonl"
            samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
        checksums = checksums_of(temporary, [path.name for path in temporary.glob("*.jsonl")])
        items = {"items": task.items, "values": task.values, "checksums": checksums}
        write_json(temporary / ITEMS, items)


def read_task(folder: Path) -> TaskResult | None:
    """Read a task without its samples; None if there is no such folder.

    Raises:
        UserError: If one of its files is missing or damaged.
    """
    if not folder.is_dir():
        return None
    _, run, stored = _opened(folder)
    with damage_as_user_error(folder / ITEMS, remedy=_MEASURED_AGAIN):
        (name,) = run["results"]
        task = MeasuredTask(name=name, run=run, items=stored["items"], values=stored["values"])
        return task.result


def copy_tasks(
    folders: Mapping[str, Path],
    target: Path,
    *,
    groups: Mapping[str, Sequence[str]],
    pretrained: str,
) -> None:
    """Copy tasks of one model into a folder, as one run of lm-eval.

    Args:
        folders: Folder of each task, by name.
        groups: Requested groups and their tasks.
        pretrained: The model's path.

    Raises:
        RunFailed: If a file is damaged, or the files cannot be written.
    """
    date, merged = _date_now(), dict[str, Any]()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for task, folder in folders.items():
            path, run, stored = _opened(folder)
            if damage := damaged_file(folder, stored["checksums"]):
                raise RunFailed(f"the stored samples of {task} are damaged: {folder}/{damage}")
            for key, value in run.items():
                merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
            source = path.name.replace("results_", f"samples_{task}_") + "l"
            shutil.copyfile(folder / source, target / f"samples_{task}_{date}.jsonl")
        merged["config"]["model_args"]["pretrained"] = pretrained
        merged["group_subtasks"] = {name: list(tasks) for name, tasks in groups.items()}
        merged["model_name"] = merged["model_name_sanitized"] = target.name
        write_text(target / f"results_{date}.json", json.dumps(merged, indent=2) + "\n")
    except OSError as error:
        raise RunFailed(f"cannot write lm-eval's files into {target}: {error.strerror}") from None


def _opened(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the path of a task's results, the results, and what `ITEMS` holds."""
    path = next(folder.glob("results_*.json"), folder / "results_*.json")
    run, stored = (read_json(file, remedy=_MEASURED_AGAIN) for file in (path, folder / ITEMS))
    if run is None or stored is None:
        raise UserError(f"{path if run is None else folder / ITEMS} is missing; {_MEASURED_AGAIN}")
    return path, run, stored


def _date_now() -> str:
    return datetime.now().isoformat(timespec="microseconds").replace(":", "-")


# Outputs of stock lm-eval


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
