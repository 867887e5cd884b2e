"""The offline test suite: lm-eval tasks made from the documents that were held out of training.

The folder `heldout-<key>` beside the tokens holds the items of each task as JSON lines, and their
checksums in `suite.json`. `TASK_CONFIGS` says how a task asks and scores; the YAML files are only
for lm-eval's own command (`lm_eval run --include_path . --tasks heldout ...` in the folder).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orchestrator.data.corpus import Document, hash_fraction
from orchestrator.data.token_store import TokenStore, open_tokens
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.evaluation.heldout.items import ItemBuilder
from orchestrator.evaluation.heldout.ngrams import TokenBigrams, WordTrigrams
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.provenance import content_key
from orchestrator.workspace.whole_folders import (
    checksums_of,
    damaged_file,
    mark_verified,
    new_folder,
)

SUITE_VERSION = 1
"""Increase it if the same documents give other items; it is part of the tasks' version."""

GROUP = "heldout"
ACCURACY_TASKS = ("lastword", "continuation")
TASKS = (*ACCURACY_TASKS, "bits_per_byte")
SUITE_NAME = "suite.json"

MAX_ITEM_TOKENS = 64
"""Longest passage with its ending: two or three sentences, for any context length."""
MAX_ROLLING_BYTES = 80_000
SOURCE_BYTES_PER_ITEM = 400
"""Held-out text searched per item; about a quarter of the sentences give one."""
KNOWN_TEXT_TOKENS = 2_000_000
LARGEST_STANDARD_ERROR = 0.02

TASK_CONFIGS: dict[str, dict[str, Any]] = {
    "lastword": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "continuation": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "bits_per_byte": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": False}
            for name, aggregation in (
                ("bits_per_byte", "bits_per_byte"),
                ("byte_perplexity", "weighted_perplexity"),
                ("word_perplexity", "weighted_perplexity"),
            )
        ],
    },
}


@dataclass(frozen=True, kw_only=True)
class HeldoutSuite:
    """A folder of held-out tasks."""

    folder: Path
    tasks: dict[str, int]
    """Name of a task -> number of its items; tasks without items are left out."""
    notes: tuple[str, ...]
    """Warnings for readers of the results, such as too few items for a small error."""


def build_heldout(
    tokens: Path | str,
    *,
    num_items: int,
    context_length: int,
    progress: Progress | None = None,
    make: bool = True,
) -> HeldoutSuite:
    """Return the suite of a folder of tokens; make it if it is missing.

    Args:
        tokens: Folder of prepared tokens.
        num_items: Largest number of items of each accuracy task.
        context_length: Tokens that the model reads; every item fits into them.
        make: If not, a missing suite is returned as it will be called, with all tasks.

    Raises:
        UserError: If the tokens or the suite are damaged, or the documents give no items.
    """
    store = open_tokens(tokens)
    max_tokens = min(context_length, MAX_ITEM_TOKENS)
    key = content_key("heldout", SUITE_VERSION, store.fingerprint, num_items, max_tokens)
    folder = store.folder / f"heldout-{key}"
    suite = _stored_suite(folder)
    if suite is None and not make:
        return HeldoutSuite(folder=folder, tasks=dict.fromkeys(TASKS, 0), notes=())
    if suite is None:
        progress = progress or Progress()
        progress.start("held-out tasks")
        items = _items(store, num_items, max_tokens)
        suite = _write(folder, items, _notes(items))
        progress.finish(", ".join(f"{n:,} {name}" for name, n in suite.tasks.items()))
    return suite


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
            **copy.deepcopy(TASK_CONFIGS[name]),
            "metadata": {"version": SUITE_VERSION},
        }
        for name in suite.tasks
    }


def _read_items(path: Path, **_settings: Any) -> dict[str, Any]:
    """Read the items of a task, for lm-eval's `custom_dataset`."""
    import datasets  # The import takes a second.

    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


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
        is_whole = set(tasks) <= set(TASKS)
    except (KeyError, TypeError, ValueError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is damaged; delete it and run the command again")
    if damage := damaged_file(folder, checksums):
        raise UserError(
            f"the held-out tasks are damaged: {damage}; delete the folder {folder} and run the "
            "command again, which makes the same tasks"
        )
    return HeldoutSuite(folder=folder, tasks=tasks, notes=notes)


def _items(store: TokenStore, num_items: int, max_tokens: int) -> dict[str, list[dict[str, Any]]]:
    documents = _sample(store, SOURCE_BYTES_PER_ITEM * num_items)
    tokenizer = load_tokenizer(store.tokenizer_path)
    known = store.train[:KNOWN_TEXT_TOKENS]
    builder = ItemBuilder(
        documents,
        words=WordTrigrams(tokenizer.decode(known.tolist())),
        tokens=TokenBigrams(known, store.vocab_size),
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        max_tokens=max_tokens,
    )
    return {
        "lastword": [asdict(i) for i in builder.last_words(num_items)],
        "continuation": [asdict(i) for i in builder.continuations(num_items)],
        "bits_per_byte": [asdict(d) for d in _sample(store, MAX_ROLLING_BYTES)],
    }


def _sample(store: TokenStore, num_bytes: int) -> list[Document]:
    """Return about `num_bytes` of held-out documents, chosen by hash, in their order."""
    share = min(1.0, num_bytes / store.manifest.validation.bytes)
    with store.validation_documents_path.open(encoding="utf-8") as lines:
        documents = (Document(**json.loads(line)) for line in lines)
        return [document for document in documents if hash_fraction(document.text, "test") < share]


def _notes(items: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    if not any(items[name] for name in ACCURACY_TASKS):
        raise UserError(
            "the held-out documents give no test items: they contain too little English prose; "
            "give more text, or set evaluation.suite to tasks of lm-eval"
        )
    notes = []
    for name in ACCURACY_TASKS:
        error = 0.5 / math.sqrt(max(1, len(items[name])))
        if error > LARGEST_STANDARD_ERROR:
            notes.append(
                f"{name} has only {len(items[name])} items; one standard error may reach "
                f"{100 * error:.1f} points"
            )
    return notes


def _write(
    folder: Path, items: Mapping[str, list[dict[str, Any]]], notes: list[str]
) -> HeldoutSuite:
    tasks = {name: len(items[name]) for name in TASKS if items[name]}
    with new_folder(folder) as temporary:
        rows = {name: _rows_path(temporary, name) for name in tasks}
        for name, path in rows.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in items[name]), "utf-8")
            (temporary / f"{name}.yaml").write_text(_task_file(name, path.name), "utf-8")
        group = yaml.safe_dump({"group": GROUP, "task": list(tasks)})
        (temporary / f"{GROUP}.yaml").write_text(group, "utf-8")
        checksums = checksums_of(temporary, [path.name for path in rows.values()])
        suite = {"tasks": tasks, "notes": notes, "checksums": checksums}
        (temporary / SUITE_NAME).write_text(json.dumps(suite, indent=2) + "\n", "utf-8")
        mark_verified(temporary, checksums)
    return HeldoutSuite(folder=folder, tasks=tasks, notes=tuple(notes))


def _task_file(name: str, file_name: str) -> str:
    """Return the task file for lm-eval's own command, which reads items by a relative path."""
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file_name}},
        "test_split": "test",
        **TASK_CONFIGS[name],
        "metadata": {"version": SUITE_VERSION},
    }
    return yaml.safe_dump(config, sort_keys=False)
