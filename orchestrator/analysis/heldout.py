"""The offline test suite: lm-eval tasks made from the documents that were held out of training.

In goes a folder of prepared tokens, out comes a folder `heldout-<key>` beside them with three tasks
as lm-eval wants them (a YAML file each, one group over them, a Python file that reads the items,
the items as JSON lines): `lastword`, `continuation` and `bits_per_byte`. Nothing in it knows this
program, so the stock command runs it too: `lm_eval run --include_path FOLDER --tasks heldout ...`.
`heldout_items` says how the items are chosen. A suite that exists is found again at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.analysis.heldout_items import ItemBuilder
from orchestrator.analysis.text_counts import TokenCounts, WordCounts
from orchestrator.console import Progress
from orchestrator.data.corpus import Document, hash_share
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.data.tokens import TokenStore, open_tokens
from orchestrator.errors import UserError
from orchestrator.provenance import content_key
from orchestrator.workspace import read_json, write_json, write_text

SUITE_VERSION = 1
"""Raised by hand when the same documents give other items; it is part of the tasks' version."""

GROUP = "heldout"
ACCURACY_TASKS = ("lastword", "continuation")
TASKS = (*ACCURACY_TASKS, "bits_per_byte")
SUITE_NAME = "suite.json"

MAX_ITEM_TOKENS = 64
"""Longest passage with its ending: the length of two or three sentences, whatever the context."""
MAX_ROLLING_BYTES = 80_000
SOURCE_BYTES_PER_ITEM = 400
"""Held-out text that is searched for an item; about a quarter of the sentences give one."""
KNOWN_TEXT_TOKENS = 2_000_000
LARGEST_STANDARD_ERROR = 0.02

_READER = '''"""Reads the items beside this file, for the `custom_dataset` of the task files."""

import json
from pathlib import Path

import datasets


def _read(name):
    lines = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def lastword(**settings):
    return _read("lastword")


def continuation(**settings):
    return _read("continuation")


def bits_per_byte(**settings):
    return _read("bits_per_byte")
'''

_TASK_FILES = {
    "lastword": """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{' ' + word}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "continuation": """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: endings
doc_to_target: label
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "bits_per_byte": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
}


@dataclass(frozen=True, kw_only=True)
class HeldoutSuite:
    """A folder of tasks."""

    folder: Path
    tasks: dict[str, int]
    """Name of each task to its number of items; a task without items is left out."""
    notes: tuple[str, ...]
    """What a reader of the results should know, such as too few items for a small error."""


def build_heldout(
    tokens: Path | str, *, num_items: int, context_length: int, progress: Progress | None = None
) -> HeldoutSuite:
    """Return the suite of a folder of tokens, made if it is missing.

    Args:
        tokens: Folder of prepared tokens.
        num_items: Most items of each accuracy task.
        context_length: Tokens that the model reads; every item fits.
        progress: Told what is going on when the suite is made.

    Raises:
        UserError: If the tokens are damaged, or the documents give not a single item.
    """
    store = open_tokens(tokens)
    max_tokens = min(context_length, MAX_ITEM_TOKENS)
    key = content_key("heldout", SUITE_VERSION, store.fingerprint, num_items, max_tokens)
    folder = store.folder / f"heldout-{key}"
    found = read_json(folder / SUITE_NAME)
    if found is None:
        progress = progress or Progress()
        progress.start("held-out tasks")
        items = _items(store, num_items, max_tokens)
        found = _write(folder, items, _notes(items))
        progress.finish(", ".join(f"{n:,} {name}" for name, n in found["tasks"].items()))
    return HeldoutSuite(folder=folder, tasks=found["tasks"], notes=tuple(found["notes"]))


def _items(store: TokenStore, num_items: int, max_tokens: int) -> dict[str, list[dict[str, Any]]]:
    documents = _sample(store, SOURCE_BYTES_PER_ITEM * num_items)
    tokenizer = load_tokenizer(store.tokenizer_path)
    known = store.train[:KNOWN_TEXT_TOKENS]
    builder = ItemBuilder(
        documents,
        words=WordCounts(tokenizer.decode(known.tolist())),
        tokens=TokenCounts(known, store.vocab_size),
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        max_tokens=max_tokens,
    )
    return {
        "lastword": [asdict(i) for i in builder.last_words(num_items)],
        "continuation": [asdict(i) for i in builder.continuations(num_items)],
        "bits_per_byte": [asdict(d) for d in _sample(store, MAX_ROLLING_BYTES)],
    }


def _sample(store: TokenStore, num_bytes: int) -> list[Document]:
    """Return about so much of the held-out text, chosen by hash, in its order."""
    share = min(1.0, num_bytes / store.num_validation_bytes)
    with store.validation_documents.open(encoding="utf-8") as lines:
        documents = (Document(**json.loads(line)) for line in lines)
        return [document for document in documents if hash_share(document.text, "test") < share]


def _notes(items: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    if not any(items[name] for name in ACCURACY_TASKS):
        raise UserError(
            "the held-out documents give no test items: they hold too little English prose; "
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
) -> dict[str, Any]:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    names = [name for name in TASKS if items[name]]
    for name in names:
        rows = "".join(json.dumps(row) + "\n" for row in items[name])
        write_text(temporary / f"{name}.jsonl", rows)
        head = f"task: {name}\ncustom_dataset: !function {GROUP}_reader.{name}\ntest_split: test\n"
        tail = f"metadata: {{version: {SUITE_VERSION}}}\n"
        write_text(temporary / f"{name}.yaml", head + _TASK_FILES[name] + tail)
    write_text(temporary / f"{GROUP}_reader.py", _READER)
    write_text(temporary / f"{GROUP}.yaml", f"group: {GROUP}\ntask: [{', '.join(names)}]\n")
    suite = {"tasks": {name: len(items[name]) for name in names}, "notes": notes}
    write_json(temporary / SUITE_NAME, suite)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return suite
