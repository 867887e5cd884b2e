"""The store of evaluations, shared by all commands: each task is measured once for each model.

A folder holds lm-eval's files of one task, `results_DATE.json` and `samples_TASK_DATE.jsonl`, under
the hash of everything that determines the result: weights and precision, configuration with its
schedule, tokenizer, the task's items and metrics, limit. `items.json` has hashes and values of the
items, so that a report parses no samples. The loss over held-out tokens is an entry like a task.
The answers of a running task are stored next to it, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.records.evaluation import (
    HASH_LENGTH,
    MAX_PERPLEXITY,
    EvaluationKeys,
    EvaluationResult,
    TaskResult,
    metric_label,
    plain_value,
)
from orchestrator.records.metrics import STDERR_SUFFIX
from orchestrator.records.record import Record
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.files import (
    damage_named,
    new_folder,
    read_json,
    write_json,
    write_text,
)

ITEMS = "items.json"


class StoredItems(Record):
    """Content of `items.json` in the folder of a task's result."""

    items: list[str]
    """A hash of each document."""
    values: dict[str, list[Any]]
    """Metric -> one value per item."""


@dataclass(frozen=True, kw_only=True)
class MeasuredTask:
    """Results of one task for one model: lm-eval's files, and the values of the items."""

    name: str
    output: dict[str, Any]
    """Content of lm-eval's `results_DATE.json`."""
    samples: Sequence[dict[str, Any]] = ()
    items: list[str] = field(default_factory=list)
    """A hash of each document."""
    values: dict[str, list[Any]] = field(default_factory=dict)
    """Metric to one value per item."""

    @property
    def result(self) -> TaskResult:
        """The result for tables and reports."""
        metrics = {}
        numbers = self.output["results"].get(self.name) or {}
        for key, value in numbers.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, int | float):
                measured = metric.removesuffix(STDERR_SUFFIX)
                is_perplexity = measured.endswith("perplexity")
                if is_perplexity and numbers[f"{measured},{filter_name}"] > MAX_PERPLEXITY:
                    continue
                # The suffix of a standard error follows the filter's name.
                label = metric_label(measured, filter_name)
                metrics[label + metric.removeprefix(measured)] = float(value)
        return TaskResult(
            name=self.name,
            version=str(self.output["versions"].get(self.name)),
            num_items=len(self.items),
            num_fewshot=int(self.output["n-shot"].get(self.name) or 0),
            metrics=metrics,
            items=self.items,
            values=self.values,
        )


def item_values(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the hashes of the items, and each metric's value per item.

    A task with several filters has one sample per item and filter. Metrics of whole texts, such as
    BLEU, have no values per item.
    """
    by_filter: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_filter.setdefault(sample["filter"], []).append(sample)
    hashes: list[str] = []
    values: dict[str, list[Any]] = {}
    for filter_name, filtered_samples in by_filter.items():
        filtered_samples.sort(key=lambda sample: int(sample["doc_id"]))
        hashes = [sample["doc_hash"][:HASH_LENGTH] for sample in filtered_samples]
        for metric in filtered_samples[0]["metrics"]:
            by_item = [plain_value(sample.get(metric)) for sample in filtered_samples]
            if None not in by_item:
                values[metric_label(metric, filter_name)] = by_item
    return hashes, values


class EvaluationStore:
    """Results of tasks by key, in the workspace's folder `evaluations`."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        """Take the folder; `note` is called with a sentence for each file that cannot be read or
        written."""
        self._folder = folder
        self._note = note

    def read(self, key: str) -> TaskResult | None:
        """Return a result without reading samples; None if it is missing.

        Raises:
            DamagedFile: If one of its files is damaged.
        """
        result = _read_result(self._folder / key)
        if result is None:
            return None
        path, output, stored = result
        with damage_named(path):
            [name] = output["results"]
            task = MeasuredTask(name=name, output=output, items=stored.items, values=stored.values)
            return task.result

    def load(self, keys: EvaluationKeys) -> EvaluationResult | None:
        """Return a whole evaluation; None if the result of a task is missing."""
        results = {name: self.read(key) for name, key in keys.tasks.items()}
        stored = {name: result for name, result in results.items() if result}
        if len(stored) < len(results):
            return None
        return EvaluationResult(
            results=stored, groups=keys.groups, skipped=keys.skipped, unaveraged=keys.unaveraged
        )

    def journal(self, key: str, name: str) -> AnswerJournal:
        """Return the stored answers of an unfinished task; `name` is its name in notes."""
        on_failure = partial(self._fail, f"the answers to {name} while it runs")
        return AnswerJournal(self._journal_path(key), on_failure=on_failure)

    def write(self, key: str, task: MeasuredTask, run_description: Mapping[str, Any]) -> None:
        """Store a task and delete its journal; a failure is only noted, as the result still exists.

        Args:
            run_description: Further keys of lm-eval's results, such as `config`.

        Raises:
            OSError: If the disk is full.
        """
        from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

        date = _date_now()
        hashes: list[str] = []
        lines: list[str] = []
        for sample in task.samples:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
                for i, values in enumerate(sample["arguments"])
            }
            as_lm_eval_writes = {
                **sample,
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "arguments": arguments,
                "target": str(sample["target"]),
            }
            line = json.dumps(
                as_lm_eval_writes, default=handle_non_serializable, ensure_ascii=False
            )
            lines.append(line)
            hashes.append(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"])
        output = {
            **task.output,
            "task_hashes": {task.name: hash_string("".join(hashes))},
            "lm_eval_version": metadata.version("lm_eval"),
            "date": time.time(),
            **run_description,
        }
        # Compare in the stored form, in which values of other types are text.
        output = json.loads(json.dumps(output, default=handle_non_serializable))
        try:
            with new_folder(self._folder / key) as folder:
                write_json(folder / f"results_{date}.json", output)
                if lines:
                    samples = folder / f"samples_{task.name}_{date}.jsonl"
                    samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
                StoredItems(items=task.items, values=task.values).write(folder / ITEMS)
            self._journal_path(key).unlink(missing_ok=True)
        except OSError as error:
            self._fail(f"the result of {task.name}", error)

    def copy(self, keys: EvaluationKeys, target: Path, *, pretrained: str) -> None:
        """Copy lm-eval's files of an evaluation into a folder, like one run of lm-eval.

        Args:
            pretrained: The model's path.

        Raises:
            DamagedFile: If a file cannot be read.
            RunFailed: If a result is missing, or the files cannot be written.
        """
        date = _date_now()
        merged: dict[str, Any] = {}
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, key in keys.tasks.items():
                folder = self._folder / key
                result = _read_result(folder)
                if result is None:
                    raise RunFailed(f"the result of {name} is not in {folder}")
                path, output, _ = result
                for part, value in output.items():
                    # Entries by task are merged; other entries are those of the last task.
                    is_by_task = isinstance(value, dict)
                    merged[part] = merged.get(part, {}) | value if is_by_task else value
                results_name = path.with_suffix(".jsonl").name
                samples_name = results_name.replace("results_", f"samples_{name}_")
                shutil.copyfile(folder / samples_name, target / f"samples_{name}_{date}.jsonl")
            merged["config"]["model_args"]["pretrained"] = pretrained
            merged["group_subtasks"] = {name: list(tasks) for name, tasks in keys.groups.items()}
            merged["model_name"] = target.name
            merged["model_name_sanitized"] = target.name
            write_text(target / f"results_{date}.json", json.dumps(merged, indent=2) + "\n")
        except OSError as error:
            problem = f"{error.strerror}: {error.filename}"
            raise RunFailed(f"cannot write lm-eval's files into {target} ({problem})") from None

    def _fail(self, noun: str, error: OSError) -> None:
        """Raise the error of a full disk, which ends the command; note any other error."""
        if error.errno == errno.ENOSPC:
            raise error
        self._note(f"cannot store {noun}: {error.strerror}")

    def _journal_path(self, key: str) -> Path:
        return self._folder / f"{key}.answers"


def _read_result(folder: Path) -> tuple[Path, dict[str, Any], StoredItems] | None:
    """Return path and content of a task's results, and the values of its items; None if one of the
    two files is missing.

    Raises:
        DamagedFile: If one of them is damaged.
    """
    path = next(folder.glob("results_*.json"), None)
    output = read_json(path) if path else None
    stored = StoredItems.read(folder / ITEMS)
    if path is None or output is None or stored is None:
        return None
    return path, output, stored


def _date_now() -> str:
    return datetime.now().isoformat(timespec="microseconds").replace(":", "-")


# Answers of an unfinished task


class AnswerJournal:
    """Answers of one task for one model, stored in a file while the task runs.

    A line is a JSON object: the answers of a batch, or of some questions, under the hash of the
    questions. A line that a crash cut off counts as missing. Answers of a batch are reused only for
    the same batch, so a resumed evaluation has bitwise the result of an uninterrupted one. Without
    a file nothing is stored.

    lm-eval's own cache (`CachingLM`) is not used: it reads pickles, which could run code, stores no
    sampled answers, and forms new batches of the remaining requests.
    """

    def __init__(
        self, path: Path | None = None, on_failure: Callable[[OSError], None] = lambda _: None
    ) -> None:
        """Read the file.

        Args:
            path: The file, which need not exist; None to store nothing.
            on_failure: Called once if the file cannot be written, after which nothing is written.
        """
        self._path = path
        self._on_failure = on_failure
        self._stored: dict[str, Any] = {}
        try:
            lines = path.read_bytes().splitlines() if path else []
        except OSError:
            lines = []
        for line in lines:
            with suppress(ValueError, RecursionError):  # A crash cut it off.
                answers = json.loads(line)
                if isinstance(answers, dict):
                    self._stored |= answers

    @property
    def num_answers(self) -> int:
        """Number of answers that the file had at the start."""
        return sum(len(value) if isinstance(value, list) else 1 for value in self._stored.values())

    def get(self, key: str) -> Any | None:
        """Return the JSON value that the file had under a key at the start, if any."""
        return self._stored.get(key)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Add JSON values by key to the file."""
        if self._path is None:
            return
        text = json.dumps(answers, separators=(",", ":"))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                # After a line break, because a crash may have cut off the last line.
                file.write(f"\n{text}\n".encode())
        except OSError as error:
            self._path = None
            self._on_failure(error)
