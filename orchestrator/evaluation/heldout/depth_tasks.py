"""Tasks made from depth data, one for each of its depth tasks: `phop_6`, `chain_8`.

A question is a generated sequence up to the position that is asked. The choices are all symbols of
the task, so the accuracy is that of the likeliest symbol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.data.depth import DepthStore, DepthTask

DEPTH_VERSION = 1
"""Increase it if the same data give other items; it is part of the tasks' version."""

DEPTH_CONFIG: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def chance_in_words(task: DepthTask, rows: Sequence[dict[str, Any]]) -> str:
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


def depth_rows(store: DepthStore, num_items: int) -> dict[str, list[dict[str, Any]]]:
    """Return `num_items` items of each task of the data."""
    rows = {}
    for task in store.tasks:
        choices = list(task.symbols)
        rows[task.name] = [
            {"context": item.context, "choices": choices, "label": choices.index(item.answer)}
            for item in store.items(task, num_items)
        ]
    return rows
