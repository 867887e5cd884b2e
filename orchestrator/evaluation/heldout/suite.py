"""The offline test suite: lm-eval tasks made from prepared data, of what training never sees.

Text offers `TEXT_TASKS`, depth data one task for each of their depth tasks, a mixture those of all
its parts. The folder `heldout-<key>` beside the data holds the items of each task as JSON lines,
and their checksums in `suite.json`. The YAML files are only for lm-eval's own command
(`lm_eval run --include_path . --tasks heldout ...` in the folder).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orchestrator.data.depth import DepthStore
from orchestrator.data.mixture import open_data
from orchestrator.data.store import PreparedData, TokenStore
from orchestrator.evaluation.heldout.depth_tasks import (
    DEPTH_CONFIG,
    DEPTH_VERSION,
    chance_in_words,
    depth_rows,
)
from orchestrator.evaluation.heldout.text_tasks import (
    MAX_ITEM_TOKENS,
    TEXT_ACCURACY_TASKS,
    TEXT_CONFIGS,
    TEXT_TASKS,
    TEXT_VERSION,
    text_rows,
)
from orchestrator.settings.data import is_depth_task
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    checksums_of,
    damaged_file,
    new_folder,
    read_json,
)
from orchestrator.workspace.provenance import content_key

GROUP = "heldout"
SUITE_NAME = "suite.json"
LARGEST_STANDARD_ERROR = 0.02


@dataclass(frozen=True, kw_only=True)
class HeldoutSuite:
    """A folder of held-out tasks."""

    folder: Path
    tasks: dict[str, int]
    """Name of a task -> number of its items; tasks without items are left out."""
    notes: tuple[str, ...]
    """Warnings for readers of the results, such as too few items for a small error."""
    chances: dict[str, str]
    """Depth task -> the accuracy of a guess, in words."""


def is_heldout_task(name: str) -> bool:
    """Return whether a task is one that some prepared data offer."""
    return name in TEXT_TASKS or is_depth_task(name)


def has_accuracy(name: str) -> bool:
    """Return whether a held-out task reports an accuracy."""
    return name in TEXT_ACCURACY_TASKS or is_depth_task(name)


def offered_tasks(data: PreparedData) -> tuple[str, ...]:
    """Return the held-out tasks that data can give."""
    names: list[str] = []
    for part in data.parts:
        names += [t.name for t in part.tasks] if isinstance(part, DepthStore) else TEXT_TASKS
    return tuple(dict.fromkeys(names))


def find_heldout(tokens: Path | str, *, num_items: int, context_length: int) -> HeldoutSuite:
    """Return the suite of prepared data; if it is not made, as it will be called, with all tasks.

    Args:
        tokens: Folder of the data.
        num_items: Largest number of items of each accuracy task.
        context_length: Tokens that the model reads; every item fits into them.

    Raises:
        UserError: If the data or the suite are damaged.
    """
    data = open_data(tokens)
    version = TEXT_VERSION if isinstance(data, TokenStore) else f"{TEXT_VERSION} {DEPTH_VERSION}"
    max_tokens = min(context_length, MAX_ITEM_TOKENS)
    key = content_key("heldout", version, data.fingerprint, num_items, max_tokens)
    folder = data.folder / f"heldout-{key}"
    tasks = dict.fromkeys(offered_tasks(data), 0)
    return _stored_suite(folder) or HeldoutSuite(folder=folder, tasks=tasks, notes=(), chances={})


def build_heldout(
    tokens: Path | str,
    *,
    num_items: int,
    context_length: int,
    progress: Progress | None = None,
) -> HeldoutSuite:
    """Return the suite of prepared data, made if it is missing; arguments as `find_heldout`.

    Raises:
        UserError: If the data or the suite are damaged, or the documents give no items.
    """
    suite = find_heldout(tokens, num_items=num_items, context_length=context_length)
    if (suite.folder / SUITE_NAME).exists():
        return suite
    progress = progress or Progress()
    progress.start("held-out tasks")
    data = open_data(tokens)
    rows = _rows(data, num_items, min(context_length, MAX_ITEM_TOKENS))
    suite = _write(suite.folder, rows, _notes(rows), _chances(data, rows))
    progress.finish(", ".join(f"{n:,} {name}" for name, n in suite.tasks.items()))
    return suite


def heldout_chances(folder: Path) -> dict[str, str]:
    """Return the accuracy of a guess in words, for each depth task of a suite."""
    suite = _stored_suite(folder)
    return suite.chances if suite else {}


def heldout_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the lm-eval configuration of each task of a suite, by name.

    Raises:
        UserError: If the folder holds no suite, or one of its files is damaged.
    """
    suite = _stored_suite(folder)
    if suite is None:
        raise UserError(
            f"{folder} holds no held-out tasks of this version; run the command again to make them"
        )
    return {
        name: {
            "task": name,
            "custom_dataset": partial(_read_items, _rows_path(suite.folder, name)),
            "test_split": "test",
            **copy.deepcopy(_task_config(name)),
        }
        for name in suite.tasks
    }


def _task_config(name: str) -> dict[str, Any]:
    """Return how a task asks and scores."""
    if name in TEXT_CONFIGS:
        return {**TEXT_CONFIGS[name], "metadata": {"version": TEXT_VERSION}}
    return {**DEPTH_CONFIG, "metadata": {"version": DEPTH_VERSION}}


def _read_items(path: Path, **_settings: Any) -> dict[str, Any]:
    """Read the items of a task, for lm-eval's `custom_dataset`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return item_sets({"test": [json.loads(line) for line in lines]})


def item_sets(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], **_settings: Any
) -> dict[str, Any]:
    """Return the items of a task by split, for lm-eval's `custom_dataset`."""
    import datasets  # The import takes a second.

    return {name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()}


def _rows_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _stored_suite(folder: Path) -> HeldoutSuite | None:
    """Return the suite of a folder after checking its files; None if there is no suite."""
    path = folder / SUITE_NAME
    found = read_json(path)
    if found is None:
        return None
    try:
        tasks = {name: int(number) for name, number in found["tasks"].items()}
        notes = tuple(str(note) for note in found["notes"])
        rows = [_rows_path(folder, name).name for name in tasks]
        checksums = {name: str(found["checksums"][name]) for name in rows}
        chances = {name: str(text) for name, text in found.get("chances", {}).items()}
        is_whole = all(map(is_heldout_task, tasks))
    except (KeyError, TypeError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is damaged; delete it and run the command again")
    if damage := damaged_file(folder, checksums):
        raise UserError(
            f"the held-out tasks are damaged: {damage}; delete the folder {folder} and run the "
            "command again, which makes the same tasks"
        )
    return HeldoutSuite(folder=folder, tasks=tasks, notes=notes, chances=chances)


def _rows(data: PreparedData, num_items: int, max_tokens: int) -> dict[str, list[dict[str, Any]]]:
    texts = [part for part in data.parts if isinstance(part, TokenStore)]
    rows = text_rows(texts, num_items, max_tokens) if texts else {}
    for part in data.parts:
        if isinstance(part, DepthStore):
            rows |= depth_rows(part, num_items)
    return rows


def _chances(data: PreparedData, rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, str]:
    stores = [part for part in data.parts if isinstance(part, DepthStore)]
    tasks = [task for store in stores for task in store.tasks]
    return {task.name: chance_in_words(task, rows[task.name]) for task in tasks}


def _notes(rows: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    notes = []
    for name in filter(has_accuracy, rows):
        error = 0.5 / math.sqrt(max(1, len(rows[name])))
        if error > LARGEST_STANDARD_ERROR:
            notes.append(
                f"{name} has only {len(rows[name])} items; one standard error may reach "
                f"{100 * error:.1f} points"
            )
    return notes


def _write(
    folder: Path,
    rows: Mapping[str, list[dict[str, Any]]],
    notes: list[str],
    chances: dict[str, str],
) -> HeldoutSuite:
    tasks = {name: len(found) for name, found in rows.items() if found}
    with new_folder(folder) as temporary:
        paths = {name: _rows_path(temporary, name) for name in tasks}
        for name, path in paths.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), "utf-8")
            (temporary / f"{name}.yaml").write_text(_task_file(name, path.name), "utf-8")
        group = yaml.safe_dump({"group": GROUP, "task": list(tasks)})
        (temporary / f"{GROUP}.yaml").write_text(group, "utf-8")
        checksums = checksums_of(temporary, [path.name for path in paths.values()])
        suite = {"tasks": tasks, "notes": notes, "chances": chances, "checksums": checksums}
        (temporary / SUITE_NAME).write_text(json.dumps(suite, indent=2) + "\n", "utf-8")
    return HeldoutSuite(folder=folder, tasks=tasks, notes=tuple(notes), chances=chances)


def _task_file(name: str, file_name: str) -> str:
    """Return the task file for lm-eval's own command, which reads items by a relative path."""
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file_name}},
        "test_split": "test",
        **_task_config(name),
    }
    return yaml.safe_dump(config, sort_keys=False)
