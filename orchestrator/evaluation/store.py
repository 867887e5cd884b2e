"""The store of evaluations, shared by all commands: each task is measured once for each model.

A folder holds lm-eval's files of one task under the hash of all that determines it: weights and
precision, configuration with its schedule, tokenizer, the task's items and metrics, limit. Beside
them, `items.json` has hashes and values of the items in one compact array, so that a report parses
no samples. The loss over held-out tokens is an entry like a task. So a further task costs only that
task, and sweeps, `evaluate`, `export` and `pick` share what was measured.

While a task runs, its answers are stored beside, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.lm_eval_files import MeasuredTask
from orchestrator.records.evaluation import EvaluationKeys, EvaluationResult, TaskResult
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import (
    checksums_of,
    damage_as_user_error,
    damaged_file,
    new_folder,
    read_json,
    write_json,
    write_text,
)

ITEMS = "items.json"
REMEDY = "it is measured again"


class EvaluationStore:
    """Results of tasks by key, in the workspace's folder `evaluations`."""

    def __init__(self, folder: Path, note: Callable[[str], None] = lambda _: None) -> None:
        """Name the folder; `note` is called with a sentence for what cannot be read or written."""
        self._folder, self._note = folder, note

    def read(self, key: str) -> TaskResult | None:
        """Return a result; None if it is missing or damaged. No samples are read."""
        folder = self._folder / key
        if not folder.is_dir():
            return None
        try:
            _, run, stored = _opened(folder)
            with damage_as_user_error(folder / ITEMS, remedy=REMEDY):
                (name,) = run["results"]
                items, values = stored["items"], stored["values"]
                return MeasuredTask(name=name, run=run, items=items, values=values).result
        except UserError as error:
            self._note(str(error))
            return None

    def load(self, keys: EvaluationKeys) -> EvaluationResult | None:
        """Return a whole evaluation; None if the result of a task is missing or damaged."""
        results = {name: self.read(key) for name, key in keys.tasks.items()}
        found = {name: result for name, result in results.items() if result}
        if len(found) < len(results):
            return None
        return EvaluationResult(results=found, groups=keys.groups, skipped=keys.skipped)

    def journal(self, key: str, name: str) -> AnswerJournal:
        """Return the answers to a task that is not finished; `name` is the task's, for notes."""
        failed = partial(self._fail, f"the answers to {name} while it runs")
        return AnswerJournal(self._journal_path(key), failed=failed)

    def write(self, key: str, task: MeasuredTask, about: Mapping[str, Any]) -> None:
        """Store a task and delete its journal; a note if that fails, as the result is not lost.

        Args:
            about: Further keys of lm-eval's results, such as `config`.

        Raises:
            OSError: If the disk is full.
        """
        from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list

        date, hashes, lines = _date_now(), [], []
        for sample in task.samples:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(values)}
                for i, values in enumerate(sample["arguments"])
            }
            said = {part: sanitize_list(sample[part]) for part in ("resps", "filtered_resps")}
            changed = {**sample, **said, "arguments": arguments, "target": str(sample["target"])}
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
        try:
            with new_folder(self._folder / key) as folder:
                write_json(folder / f"results_{date}.json", run)
                if lines:
                    samples = folder / f"samples_{task.name}_{date}.jsonl"
                    samples.write_text("\n".join(lines) + "\n", encoding="utf-8")
                checksums = checksums_of(folder, [path.name for path in folder.glob("*.jsonl")])
                items = {"items": task.items, "values": task.values, "checksums": checksums}
                write_json(folder / ITEMS, items)
            self._journal_path(key).unlink(missing_ok=True)
        except OSError as error:
            self._fail(f"the result of {task.name}", error)

    def copy(self, keys: EvaluationKeys, target: Path, *, pretrained: str) -> None:
        """Copy lm-eval's files of an evaluation into a folder, as one run of lm-eval.

        Args:
            pretrained: The model's path.

        Raises:
            RunFailed: If a file is damaged, or the files cannot be written.
        """
        date, merged = _date_now(), dict[str, Any]()
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name, key in keys.tasks.items():
                path, run, stored = _opened(folder := self._folder / key)
                if damage := damaged_file(folder, stored["checksums"]):
                    raise RunFailed(f"the stored samples of {name} are damaged: {folder}/{damage}")
                for part, value in run.items():
                    is_dict = isinstance(value, dict)
                    merged[part] = merged.get(part, {}) | value if is_dict else value
                source = path.name.replace("results_", f"samples_{name}_") + "l"
                shutil.copyfile(folder / source, target / f"samples_{name}_{date}.jsonl")
            merged["config"]["model_args"]["pretrained"] = pretrained
            merged["group_subtasks"] = {name: list(tasks) for name, tasks in keys.groups.items()}
            merged["model_name"] = merged["model_name_sanitized"] = target.name
            write_text(target / f"results_{date}.json", json.dumps(merged, indent=2) + "\n")
        except OSError as error:
            reason = f"cannot write lm-eval's files into {target}: {error.strerror}"
            raise RunFailed(reason) from None

    def _fail(self, what: str, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            raise error
        self._note(f"cannot store {what}: {error.strerror}")

    def _journal_path(self, key: str) -> Path:
        return self._folder / f"{key}.answers"


def _opened(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Return the path of a task's results, the results, and what `ITEMS` holds."""
    path = next(folder.glob("results_*.json"), folder / "results_*.json")
    run, stored = (read_json(file, remedy=REMEDY) for file in (path, folder / ITEMS))
    if run is None or stored is None:
        raise UserError(f"{path if run is None else folder / ITEMS} is missing; {REMEDY}")
    return path, run, stored


def _date_now() -> str:
    return datetime.now().isoformat(timespec="microseconds").replace(":", "-")
