"""Tasks of lm-eval as a user writes them: a YAML file, its items, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

KINDS: dict[str, dict[str, Any]] = {
    "lastword": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + word}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        ],
    },
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "questions": {
        "output_type": "generate_until",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
"""How a task asks and scores: the last word, choices, a whole text, a generated answer."""

_READER = """\
import datasets, json, pathlib

def read(**settings):
    lines = pathlib.Path(__file__).with_name("{name}.jsonl").read_text().splitlines()
    return {{"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}}
"""


def write_task(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    kind: str | None = None,
    **changes: Any,
) -> Path:
    """Write a task of a kind (its name, when unset) into a folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "task": name,
        "test_split": "test",
        **KINDS[kind or name],
        "metadata": {"version": 2.0},
        **changes,
    }
    text = f"custom_dataset: !function {name}_reader.read\n" + yaml.safe_dump(config)
    (folder / f"{name}.yaml").write_text(text)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}_reader.py").write_text(_READER.format(name=name))
    return folder


def write_choices(folder: Path, name: str, words: Sequence[str]) -> Path:
    """Write a task with an item for each word, of which the first ending is right."""
    rows = [{"context": word, "endings": ["bag", "fog"], "label": 0} for word in words]
    return write_task(folder, name, rows, kind="choices")


def logged_responses(folder: Path) -> dict[str, list[list[Any]]]:
    """Return by task and item what the model said: log-likelihoods, or generated answers.

    Args:
        folder: Holds `samples_TASK_DATE.jsonl`, such as a stored evaluation.
    """
    responses_by_task = {}
    for path in sorted(folder.glob("samples_*.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        is_generated = "until" in str(samples[0]["arguments"])
        responses_by_task[path.name.removeprefix("samples_").rpartition("_")[0]] = [
            [
                response
                if is_generated
                else float(response[0] if isinstance(response, list) else response)
                for responses in sample["resps"]
                for response in responses
            ]
            for sample in samples
            if sample["filter"] == samples[0]["filter"]
        ]
    return responses_by_task
