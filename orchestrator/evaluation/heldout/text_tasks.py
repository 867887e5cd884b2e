"""Tasks made from held-out documents: the last word, a phrase's continuation, bits per byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from orchestrator.data.corpus import Document, hash_fraction
from orchestrator.data.store import TokenStore
from orchestrator.evaluation.heldout.ngrams import TokenBigrams, WordTrigrams
from orchestrator.evaluation.heldout.text_items import ItemBuilder
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.workspace.errors import UserError

TEXT_VERSION = 1
"""Increase it if the same documents give other items; it is part of the tasks' version."""

TEXT_ACCURACY_TASKS = ("lastword", "continuation")
TEXT_TASKS = (*TEXT_ACCURACY_TASKS, "bits_per_byte")

MAX_ITEM_TOKENS = 64
"""Longest passage with its ending: two or three sentences, for any context length."""
MAX_ROLLING_BYTES = 80_000
SOURCE_BYTES_PER_ITEM = 400
"""Held-out text searched per item; about a quarter of the sentences give one."""
KNOWN_TEXT_TOKENS = 2_000_000

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
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


def text_rows(
    stores: Sequence[TokenStore], num_items: int, max_tokens: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the items of each task, made from all texts together.

    Args:
        stores: Texts of one tokenizer.
        num_items: Largest number of items of each accuracy task.
        max_tokens: Longest passage with its ending.

    Raises:
        UserError: If the documents give no items.
    """
    documents = _sample(stores, SOURCE_BYTES_PER_ITEM * num_items)
    tokenizer = load_tokenizer(stores[0].tokenizer_path)
    known = np.concatenate([store.train[: KNOWN_TEXT_TOKENS // len(stores)] for store in stores])
    builder = ItemBuilder(
        documents,
        words=WordTrigrams(tokenizer.decode(known.tolist())),
        tokens=TokenBigrams(known, stores[0].vocab_size),
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        max_tokens=max_tokens,
    )
    rows = {
        "lastword": [asdict(i) for i in builder.last_words(num_items)],
        "continuation": [asdict(i) for i in builder.continuations(num_items)],
        "bits_per_byte": [asdict(d) for d in _sample(stores, MAX_ROLLING_BYTES)],
    }
    if not any(rows[name] for name in TEXT_ACCURACY_TASKS):
        raise UserError(
            "the held-out documents give no test items: they contain too little English prose; "
            "give more text, or set evaluation.suite to tasks of lm-eval"
        )
    return rows


def _sample(stores: Sequence[TokenStore], num_bytes: int) -> list[Document]:
    """Return about `num_bytes` of held-out documents, chosen by hash, in their order."""
    share = min(1.0, num_bytes / sum(store.manifest.validation.bytes for store in stores))
    documents: list[Document] = []
    for store in stores:
        with store.validation_documents_path.open(encoding="utf-8") as lines:
            read = (Document(**json.loads(line)) for line in lines)
            documents += [each for each in read if hash_fraction(each.text, "test") < share]
    return documents
