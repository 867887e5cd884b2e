"""Tasks made from depth data, one for each of its depth tasks: `phop_6`, `chain_8`.

A question is a generated sequence up to the position that is asked. The choices are all symbols of
the task, so the accuracy is that of the likeliest symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.data.depth.store import DepthStore
from orchestrator.data.depth.task import DepthTask

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
    """Return the accuracy that needs no answering, with that of repeating the last symbol.

    The latter is more than chance where hops often end at a symbol equal to the last one.
    """
    answers = [row["choices"][row["label"]] for row in rows]
    repeated = sum(row["context"].endswith(a) for row, a in zip(rows, answers, strict=True))
    chance, share = f"{100 * task.chance:.1f}%", repeated / len(rows)
    if share <= task.chance:
        return chance
    return f"{chance}, or {100 * share:.1f}% by repeating the last symbol"


def depth_rows(store: DepthStore, num_items: int) -> dict[str, list[dict[str, Any]]]:
    """Return `num_items` items of each task of the data."""
    return {
        task.name: [
            {
                "context": item.context,
                "choices": list(task.symbols),
                "label": task.symbols.index(item.answer),
            }
            for item in store.items(task, num_items)
        ]
        for task in store.tasks
    }
