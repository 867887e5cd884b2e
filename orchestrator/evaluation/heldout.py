"""Held-out tasks: lm-eval tasks that are made from the held-out set of prepared data.

A text offers the last words of passages, like LAMBADA, and bits per byte; depth data offer one task
for each depth task; a mixture the tasks of all its components. `heldout-<key>/suite.json` next to
the data holds the items of each task. One more task exists for all data: the bits per byte of
English text that comes with every Python. By it, a sweep sees what a model has forgotten.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from orchestrator.data.depth import DepthStore
from orchestrator.data.mixture import open_data
from orchestrator.data.split import is_validation
from orchestrator.data.store import PreparedData, TokenStore
from orchestrator.data.text import read_documents, split_long, text_source
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.records.record import Record
from orchestrator.settings.data import DataSettings, is_depth_task
from orchestrator.settings.evaluation import PYTHON_BITS_TASK
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key

LAST_WORD = "lastword"
BITS_TASK = "bits_per_byte"
"""The task that measures the bits per byte of the held-out text."""
TEXT_TASKS = (LAST_WORD, BITS_TASK)
PYTHON_TEXT_BYTES = 40_000
PYTHON_PASSAGE_CHARACTERS = 1_000
"""Sizes of the task `PYTHON_BITS_TASK`, and of its items. Whole documents would be ten, too few
for a confidence interval."""
TEXT_VERSION = 2
DEPTH_VERSION = 1
"""Versions of the tasks; increase one if the same data give other items."""
SUITE_NAME = "suite.json"
MAX_ITEM_TOKENS = 64
"""Longest passage with its last word: two or three sentences, for any context length."""
MAX_ROLLING_BYTES = 80_000
"""Most bytes of held-out text whose bits per byte are measured."""
SOURCE_BYTES_PER_ITEM = 2_000
"""Bytes of held-out text that are searched per item."""
KNOWN_TEXT_TOKENS = 2_000_000
"""Training tokens by which the expectation of a word is estimated."""
MIN_WORDS_BEFORE = 8
"""Fewest words before the last word of a passage."""
MIN_SENTENCE_WORDS = 6
"""Fewest words of a sentence; shorter ones are mostly headings."""
MIN_EXPECTATION = 0.05
"""Least share of the last word among the words that follow the previous one in training text."""
MAX_WORD_TOKENS = 2
ITEMS_PER_SENTENCE = 2
MAX_SAME_WORD_SHARE = 0.02
"""Largest share of the items with the same last word."""
EXCLUDED_WORDS = frozenset(["a", "an", "the"])

Row = dict[str, Any]

_SENTENCE = re.compile(r"[A-Z][^.!?\n]*(?:[.!?](?!\s)[^.!?\n]*)*[.!?](?=\s|$)")
_ASKED_WORD = re.compile(r"(?<=[a-z] )[a-z]{2,}(?=[.,;:!?]?(?: |$))")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")


def _task(output_type: str, text: str, target: str, **metrics: str) -> Row:
    """Return the prompts and metrics of a task, in the form of lm-eval's task files.

    Args:
        text: Template of the text that the model reads.
        target: Template of the right answer.
        metrics: Name of a metric -> its aggregation.
    """
    return {
        "output_type": output_type,
        "doc_to_text": text,
        "doc_to_target": target,
        "metric_list": [
            {"metric": name, "aggregation": aggregation, "higher_is_better": name == "acc"}
            for name, aggregation in metrics.items()
        ],
    }


_TEXT_CONFIGS = {
    LAST_WORD: _task(
        "loglikelihood", "{{context}}", "{{' ' + word}}", acc="mean", perplexity="perplexity"
    ),
    BITS_TASK: _task(
        "loglikelihood_rolling",
        "",
        "{{text}}",
        bits_per_byte="bits_per_byte",
        byte_perplexity="weighted_perplexity",
        word_perplexity="weighted_perplexity",
    ),
}
_DEPTH_CONFIG = {
    **_task("multiple_choice", "{{context}}", "label", acc="mean"),
    "doc_to_choice": "choices",
    "target_delimiter": "",
}


def is_heldout_task(name: str) -> bool:
    """Return whether a name is that of a held-out task."""
    return name in TEXT_TASKS or is_depth_task(name)


def has_accuracy(name: str) -> bool:
    """Return whether a held-out task reports an accuracy."""
    return name == LAST_WORD or is_depth_task(name)


def offered_tasks(data: PreparedData) -> tuple[str, ...]:
    """Return the held-out tasks that data offer, those of text first."""
    has_text = any(isinstance(part, TokenStore) for part in data.parts)
    depths = [part for part in data.parts if isinstance(part, DepthStore)]
    names = [task.name for part in depths for task in part.tasks]
    return (*(TEXT_TASKS if has_text else ()), *dict.fromkeys(names))


def heldout_folder(
    tokens: Path | str,
    *,
    num_items: int,
    context_length: int,
    make_progress: Progress | None = None,
) -> Path:
    """Return the folder with the held-out tasks of prepared data.

    Args:
        tokens: Folder of the data.
        num_items: Largest number of items of each accuracy task.
        context_length: The model's context length; every item fits into it.
        make_progress: Shows the making of a missing suite; with None no suite is made.

    Raises:
        UserError: If the data or the suite are damaged, or the documents give no items.
    """
    data = open_data(tokens)
    version = TEXT_VERSION if isinstance(data, TokenStore) else f"{TEXT_VERSION} {DEPTH_VERSION}"
    max_tokens = min(context_length, MAX_ITEM_TOKENS)
    key = content_key("heldout items", version, data.fingerprint, num_items, max_tokens)
    path = data.folder / f"heldout-{key}"
    if make_progress is None or HeldoutItems.read(path / SUITE_NAME):
        return path

    make_progress.start("held-out tasks")
    rows: dict[str, list[Row]] = {}
    chances: dict[str, str] = {}
    if texts := [part for part in data.parts if isinstance(part, TokenStore)]:
        size = SOURCE_BYTES_PER_ITEM * num_items
        documents = chain.from_iterable(part.validation_texts() for part in texts)
        sample = _sampled(documents, max(size, MAX_ROLLING_BYTES))
        rows[LAST_WORD] = last_words(_sampled(sample, size), texts, num_items, max_tokens)
        rows[BITS_TASK] = [{"text": text} for text in _sampled(sample, MAX_ROLLING_BYTES)]
    depth_parts = [part for part in data.parts if isinstance(part, DepthStore)]
    for part in depth_parts:
        for task in part.tasks:
            choices = list(task.choices)
            rows[task.name] = [
                {"context": item.context, "choices": choices, "label": choices.index(item.answer)}
                for item in part.items(task, num_items)
            ]
            chances[task.name] = _chance_in_words(task.chance, rows[task.name])
    HeldoutItems(tasks=rows, chances=chances).write(path / SUITE_NAME)
    make_progress.finish(", ".join(f"{len(items):,} {name}" for name, items in rows.items()))
    return path


class HeldoutItems(Record):
    """The items of the held-out tasks of prepared data."""

    tasks: dict[str, list[dict[str, Any]]]
    """Name of a task -> its items."""
    chances: dict[str, str]
    """Name of a depth task -> chance level, in words."""


def heldout_chances(folder: Path | None) -> dict[str, str]:
    """Return the chance level in words for each depth task of a suite."""
    stored = HeldoutItems.read(folder / SUITE_NAME) if folder else None
    return stored.chances if stored else {}


def heldout_configs(folder: Path) -> dict[str, Row]:
    """Return the lm-eval configuration of each task of a suite, by name.

    Raises:
        UserError: If the folder holds no suite, or a damaged one.
    """
    stored = HeldoutItems.read(folder / SUITE_NAME)
    if stored is None:
        raise UserError(f"{folder} holds no held-out tasks; run the command again to make them")
    return {
        name: {
            "task": name,
            "custom_dataset": partial(item_set, rows),
            "test_split": "test",
            **_TEXT_CONFIGS.get(name, _DEPTH_CONFIG),
            "metadata": {"version": TEXT_VERSION if name in TEXT_TASKS else DEPTH_VERSION},
        }
        for name, rows in stored.tasks.items()
    }


def python_passages(tokens: Path) -> list[str]:
    """Return the passages of the task `PYTHON_BITS_TASK` for models of prepared data.

    They are from the held-out set of `data.source: python`. If the prepared data contain that text,
    they are from the documents that these data hold out.
    """
    settings = DataSettings(source="python")
    documents = [
        document.text
        for document in read_documents(text_source(settings), None)
        if is_validation(document.deciding_text, settings.validation_fraction)
    ]
    for part in open_data(tokens).parts:
        if isinstance(part, TokenStore) and part.manifest.settings.get("source") == "python":
            documents = list(part.validation_texts())
    passages = [
        passage for text in documents for passage in split_long(text, PYTHON_PASSAGE_CHARACTERS)
    ]
    return _sampled(passages, PYTHON_TEXT_BYTES)


def python_config(tokens: Path) -> Row:
    """Return the lm-eval configuration of the task `PYTHON_BITS_TASK`."""
    rows = [{"text": passage} for passage in python_passages(tokens)]
    return {
        "task": PYTHON_BITS_TASK,
        "custom_dataset": partial(item_set, rows),
        "test_split": "test",
        **_TEXT_CONFIGS[BITS_TASK],
        "metadata": {"version": TEXT_VERSION},
    }


def item_set(rows: Sequence[Row], **_settings: Any) -> Row:
    """Return the items of a task as lm-eval's `custom_dataset` does."""
    import datasets  # The import takes a second.

    return {"test": datasets.Dataset.from_list(list(rows))}


def _chance_in_words(chance: float, rows: Sequence[Row]) -> str:
    # Also the accuracy of repeating a symbol at the end, which is above chance if hops often lead
    # back to a symbol near their start.
    right = Counter[str]()
    for row in rows:
        answer = row["choices"][row["label"]]
        context = row["context"]
        last = next((symbol for symbol in row["choices"] if context.endswith(symbol)), "")
        right["last symbol"] += last == answer
        right["symbol before the last"] += context.removesuffix(last).endswith(answer)
    ((best, count),) = right.most_common(1)
    share = count / len(rows)
    error = math.sqrt(chance * (1 - chance) / len(rows))
    is_more = share > chance + 2 * error
    repeats = f", or {100 * share:.1f}% by repeating the {best}" if is_more else ""
    return f"{100 * chance:.1f}%{repeats}"


def last_words(
    texts: Iterable[str], stores: Sequence[TokenStore], num_items: int, max_tokens: int
) -> list[Row]:
    """Return passages of texts, each with its last word.

    A passage consists of unchanged sentences, up to a word that a reader could expect, because it
    often follows the previous word in the training text. Each sentence gives its rarest such words.
    The same texts always give the same items.

    Args:
        texts: Held-out documents.
        stores: Training text, of one tokenizer.
        num_items: Largest number of items.
        max_tokens: Longest passage with its last word.

    Raises:
        UserError: If the texts give none.
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

    def items_of(text: str) -> Iterator[Row]:
        sentences = list(_SENTENCE.finditer(text))
        for number, sentence in enumerate(sentences):
            if len(_WORD.findall(sentence[0])) < MIN_SENTENCE_WORDS:
                continue
            count = 0
            matches = sorted(_ASKED_WORD.finditer(sentence[0]), key=lambda w: singles[w[0]])
            for match in matches:  # Rarest words first.
                head = sentence[0][: match.start() - 1]
                word = match[0]
                word_before = _WORD.findall(head)[-1].lower()
                share = pairs[word_before, word] / (singles[word_before] + 2)
                if word in EXCLUDED_WORDS or share < MIN_EXPECTATION:
                    continue
                passage = ""  # Gets as many earlier sentences as fit.
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

    items: dict[str, Row] = {}
    for item in chain.from_iterable(map(items_of, texts)):
        # Passages that end in the same words are the same question.
        items.setdefault(" ".join([*item["context"].split()[-4:], item["word"]]), item)
    most_of_a_word = max(1, int(MAX_SAME_WORD_SHARE * num_items))
    num_of_word = Counter[str]()
    rows: list[Row] = []
    for item in sorted(items.values(), key=lambda item: _hash(item["context"] + item["word"])):
        num_of_word[item["word"]] += 1
        if num_of_word[item["word"]] <= most_of_a_word and len(rows) < num_items:
            rows.append(item)
    if not rows:
        raise UserError(
            "the held-out documents give no test items: they contain too little English prose; "
            "give more text, or set evaluation.suite to tasks of lm-eval"
        )
    return rows


def _sampled(texts: Iterable[str], size: int) -> list[str]:
    """Return the documents with the smallest hashes, in their order.

    Together they have at least `size` bytes; few other documents are in memory at a time.
    """
    sample: list[tuple[int, int, int, str]] = []
    total = 0
    for number, text in enumerate(texts):
        num_bytes = len(text.encode("utf-8", "replace"))
        heapq.heappush(sample, (-int.from_bytes(_hash(text)), -number, num_bytes, text))
        total += num_bytes
        while total - sample[0][2] >= size:  # Drop the document of the largest hash.
            total -= heapq.heappop(sample)[2]
    return [text for *_, text in sorted(sample, key=lambda document: -document[1])]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
