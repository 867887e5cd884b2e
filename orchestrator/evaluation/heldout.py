"""The offline test suite: lm-eval tasks made from prepared data, of what training never sees.

Text offers the last words of passages and bits per byte, depth data one task for each of their
depth tasks, a mixture those of all its parts. The folder `heldout-<key>` beside the data holds the
items of each task as JSON lines, and their checksums in `suite.json`. The YAML files are only for
lm-eval's own command (`lm_eval run --include_path . --tasks heldout ...` in the folder).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import yaml

from orchestrator.data.depth import DepthStore, DepthTask
from orchestrator.data.mixture import open_data
from orchestrator.data.store import PreparedData, TokenStore
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings.data import is_depth_task
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    checksums_of,
    damage_as_user_error,
    damaged_file,
    new_folder,
    read_json,
    write_json,
)
from orchestrator.workspace.provenance import content_key

LAST_WORD, BITS_PER_BYTE = "lastword", "bits_per_byte"
TEXT_TASKS = (LAST_WORD, BITS_PER_BYTE)
TEXT_VERSION, DEPTH_VERSION = 2, 1
"""Increase one if the same data give other items; it is part of the tasks' version."""
GROUP, SUITE_NAME = "heldout", "suite.json"
LARGEST_STANDARD_ERROR = 0.02
MAX_ITEM_TOKENS = 64
"""Longest passage with its last word: two or three sentences, for any context length."""

_CONFIGS = """
lastword:
  output_type: loglikelihood
  doc_to_text: "{{context}}"
  doc_to_target: "{{' ' + word}}"
  metric_list:
    - {metric: acc, aggregation: mean, higher_is_better: true}
    - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
bits_per_byte:
  output_type: loglikelihood_rolling
  doc_to_text: ""
  doc_to_target: "{{text}}"
  metric_list:
    - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
    - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
    - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
depth:
  output_type: multiple_choice
  doc_to_text: "{{context}}"
  doc_to_choice: choices
  doc_to_target: label
  target_delimiter: ""
  metric_list:
    - {metric: acc, aggregation: mean, higher_is_better: true}
"""
"""How a task asks and scores, in the form of lm-eval's task files."""


@dataclass(frozen=True, kw_only=True)
class HeldoutSuite:
    """A folder of held-out tasks."""

    folder: Path
    tasks: dict[str, int]
    """Name of a task -> number of its items."""
    notes: tuple[str, ...] = ()
    """Warnings for readers of the results, such as too few items for a small error."""
    chances: Mapping[str, str]
    """Depth task -> the accuracy of a guess, in words."""


def is_heldout_task(name: str) -> bool:
    """Return whether a task is one that some prepared data offer."""
    return name in TEXT_TASKS or is_depth_task(name)


def has_accuracy(name: str) -> bool:
    """Return whether a held-out task reports an accuracy."""
    return name == LAST_WORD or is_depth_task(name)


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
    return _stored_suite(folder) or HeldoutSuite(folder=folder, tasks=tasks, chances={})


def build_heldout(
    tokens: Path | str, *, num_items: int, context_length: int, progress: Progress | None = None
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
    data, chances, notes = open_data(tokens), dict[str, str](), list[str]()
    texts = [part for part in data.parts if isinstance(part, TokenStore)]
    rows: dict[str, Sequence[dict[str, Any]]] = {}
    if texts:
        rows |= text_rows(texts, num_items, min(context_length, MAX_ITEM_TOKENS))
    for part in (part for part in data.parts if isinstance(part, DepthStore)):
        for task in part.tasks:
            choices = list(task.symbols)
            rows[task.name] = [
                {"context": item.context, "choices": choices, "label": choices.index(item.answer)}
                for item in part.items(task, num_items)
            ]
            chances[task.name] = _chance_in_words(task, rows[task.name])
    for name in filter(has_accuracy, rows):
        error = 0.5 / math.sqrt(len(rows[name]))
        if error > LARGEST_STANDARD_ERROR:
            notes.append(
                f"{name} has only {len(rows[name])} items; one standard error may reach "
                f"{100 * error:.1f} points"
            )

    with new_folder(suite.folder) as folder:
        for name, found in rows.items():
            path = _rows_path(folder, name)
            path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
            # For lm-eval's own command, which reads items by a relative path.
            config = {
                "task": name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": path.name}},
                "test_split": "test",
                **_task_config(name),
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
        group = yaml.safe_dump({"group": GROUP, "task": list(rows)})
        (folder / f"{GROUP}.yaml").write_text(group, "utf-8")
        tasks = {name: len(found) for name, found in rows.items()}
        checksums = checksums_of(folder, [_rows_path(folder, name).name for name in rows])
        stored = {"tasks": tasks, "notes": notes, "chances": chances, "checksums": checksums}
        write_json(folder / SUITE_NAME, stored)
    progress.finish(", ".join(f"{count:,} {name}" for name, count in tasks.items()))
    return HeldoutSuite(folder=suite.folder, tasks=tasks, notes=tuple(notes), chances=chances)


def heldout_chances(folder: Path) -> Mapping[str, str]:
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
            **_task_config(name),
        }
        for name in suite.tasks
    }


def item_sets(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], **_settings: Any
) -> dict[str, Any]:
    """Return the items of a task by split, for lm-eval's `custom_dataset`."""
    import datasets  # The import takes a second.

    return {name: datasets.Dataset.from_list(list(rows)) for name, rows in splits.items()}


def _read_items(path: Path, **_settings: Any) -> dict[str, Any]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return item_sets({"test": [json.loads(line) for line in lines]})


def _task_config(name: str) -> dict[str, Any]:
    """Return how a task asks and scores."""
    is_text = name in TEXT_TASKS
    config = yaml.safe_load(_CONFIGS)[name if is_text else "depth"]
    return {**config, "metadata": {"version": TEXT_VERSION if is_text else DEPTH_VERSION}}


def _rows_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _stored_suite(folder: Path) -> HeldoutSuite | None:
    """Return the suite of a folder after checking its files; None if there is no suite."""
    path = folder / SUITE_NAME
    found = read_json(path)
    if found is None:
        return None
    with damage_as_user_error(path):
        notes, checksums = tuple(map(str, found["notes"])), dict(found["checksums"])
        suite = HeldoutSuite(
            folder=folder, tasks=dict(found["tasks"]), notes=notes, chances=dict(found["chances"])
        )
    if damage := damaged_file(folder, checksums):
        raise UserError(
            f"the held-out tasks are damaged: {damage}; delete the folder {folder} and run the "
            "command again, which makes the same tasks"
        )
    return suite


def _chance_in_words(task: DepthTask, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the accuracy that needs no answering, with that of repeating a symbol at the end.

    The latter is more than chance where hops often lead back to a symbol near their start.
    """
    chance = f"{100 * task.chance:.1f}%"
    right = {"last symbol": 0, "symbol before the last": 0}
    for row in rows:
        answer, context = row["choices"][row["label"]], row["context"]
        last = next((symbol for symbol in row["choices"] if context.endswith(symbol)), "")
        right["last symbol"] += last == answer
        right["symbol before the last"] += context.removesuffix(last).endswith(answer)
    best = max(right, key=right.__getitem__)
    share = right[best] / len(rows)
    error = math.sqrt(task.chance * (1 - task.chance) / len(rows))
    if share <= task.chance + 2 * error:
        return chance
    return f"{chance}, or {100 * share:.1f}% by repeating the {best}"


# Items of text

MAX_ROLLING_BYTES = 80_000
SOURCE_BYTES_PER_ITEM = 2_000
"""Held-out text searched per item."""
KNOWN_TEXT_TOKENS = 2_000_000
"""Training tokens that say which words a reader could expect."""
MIN_WORDS_BEFORE, MIN_SENTENCE_WORDS = 8, 6
MIN_EXPECTATION = 0.05
"""Share of the words after the one before, in the training text."""
MAX_WORD_TOKENS = 2
ITEMS_PER_SENTENCE = 2
MAX_SAME_WORD_SHARE = 0.02
EXCLUDED_WORDS = frozenset(["a", "an", "the"])

_SENTENCE = re.compile(r"[A-Z][^.!?\n]*(?:[.!?](?!\s)[^.!?\n]*)*[.!?](?=\s|$)")
_ASKED_WORD = re.compile(r"(?<=[a-z] )[a-z]{2,}(?=[.,;:!?]?(?: |$))")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def text_rows(
    stores: Sequence[TokenStore], num_items: int, max_tokens: int
) -> dict[str, Sequence[dict[str, Any]]]:
    """Return the items of each task, made from all texts together.

    An item of the first task is a passage without its last word (as in LAMBADA): unchanged
    sentences of a document, cut before a word that often follows the one before it in the training
    text, so that a reader could expect it. The same documents always give the same items.

    Args:
        stores: Texts of one tokenizer.
        num_items: Largest number of last words.
        max_tokens: Longest passage with its last word.

    Raises:
        UserError: If the documents give no last words.
    """
    tokenizer = load_tokenizer(stores[0].tokenizer_path)
    singles: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for store in stores:
        known = store.train[: KNOWN_TEXT_TOKENS // len(stores)].tolist()
        words = [word.lower() for word in _WORD.findall(tokenizer.decode(known))]
        singles.update(words)
        pairs.update(pairwise(words))

    def num_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    sources, texts = _sample(stores, SOURCE_BYTES_PER_ITEM * num_items, MAX_ROLLING_BYTES)
    found: dict[str, dict[str, Any]] = {}
    for text in sources:
        for item in _last_words(text, singles, pairs, num_tokens, max_tokens):
            # A passage that ends in the same words as another one is the same question.
            end = " ".join([*item["context"].split()[-4:], item["word"]])
            found.setdefault(end, item)
    most, asked = max(1, int(MAX_SAME_WORD_SHARE * num_items)), Counter[str]()
    rows: list[dict[str, Any]] = []
    for item in sorted(found.values(), key=lambda item: _hash(item["context"] + item["word"])):
        asked[item["word"]] += 1
        if asked[item["word"]] <= most and len(rows) < num_items:
            rows.append(item)
    if not rows:
        raise UserError(
            "the held-out documents give no test items: they contain too little English prose; "
            "give more text, or set evaluation.suite to tasks of lm-eval"
        )
    return {LAST_WORD: rows, BITS_PER_BYTE: [{"text": text} for text in texts]}


def _last_words(
    text: str,
    singles: Counter[str],
    pairs: Counter[tuple[str, str]],
    num_tokens: Callable[[str], int],
    max_tokens: int,
) -> Iterator[dict[str, Any]]:
    """Yield the items of a document: passage and word, those of a sentence's rarest words."""
    sentences = list(_SENTENCE.finditer(text))
    for number, sentence in enumerate(sentences):
        if len(_WORD.findall(sentence[0])) < MIN_SENTENCE_WORDS:
            continue
        count = 0
        for asked in sorted(_ASKED_WORD.finditer(sentence[0]), key=lambda word: singles[word[0]]):
            head, word = sentence[0][: asked.start() - 1], asked[0]
            before = _WORD.findall(head)[-1].lower()
            share = pairs[before, word] / (singles[before] + 2)
            if word in EXCLUDED_WORDS or share < MIN_EXPECTATION:
                continue
            passage = ""  # With as many sentences before this one as fit.
            for first in reversed(sentences[: number + 1]):
                longer = text[first.start() : sentence.start()] + head
                if num_tokens(f"{longer} {word}") > max_tokens:
                    break
                passage = longer
            has_words = len(_WORD.findall(passage)) >= MIN_WORDS_BEFORE
            if has_words and num_tokens(f" {word}") <= MAX_WORD_TOKENS:
                yield {"context": passage, "word": word}
                count += 1
            if count == ITEMS_PER_SENTENCE:
                break


def _sample(stores: Sequence[TokenStore], *sizes: int) -> list[list[str]]:
    """Return for each size the held-out documents with the smallest hashes, in their order.

    Together they have that many bytes or a little more; nothing else is kept in memory.
    """
    kept: list[tuple[int, int, int, str]] = []  # A heap: the document of the largest hash is first.
    total, numbers = 0, count()
    for store in stores:
        with store.validation_documents_path.open(encoding="utf-8") as lines:
            for line in lines:
                text = json.loads(line)["text"]
                size = len(text.encode("utf-8", "replace"))
                heappush(kept, (-int.from_bytes(_hash(text)), -size, next(numbers), text))
                total += size
                while total + kept[0][1] >= max(sizes):
                    total += heappop(kept)[1]
    samples = []
    for size in sizes:
        chosen, total = dict[int, str](), 0
        for _, minus_bytes, number, text in sorted(kept, reverse=True):
            if total < size:
                chosen[number] = text
                total -= minus_bytes
        samples.append([chosen[number] for number in sorted(chosen)])
    return samples


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
