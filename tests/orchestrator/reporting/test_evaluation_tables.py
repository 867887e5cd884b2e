"""Tables of evaluations side by side."""

from __future__ import annotations

from rich.console import Console

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.command_tables import (
    average_notes,
    evaluation_table,
    tasks_with_other_items,
)

RESULT = TaskResult(
    name="choices",
    version="1",
    num_items=2,
    num_fewshot=0,
    metrics={"acc": 0.25, "acc_stderr": 0.125, "acc_norm": 0.5, "perplexity": 123456.0},
    items=["one", "two"],
    values={},
    log_likelihoods=[],
)


def printed(*evaluations: EvaluationResult) -> list[list[str]]:
    """The table's rows, split at the spaces between columns."""
    console = Console(width=120)
    with console.capture() as captured:
        named = {f"model{number}": found for number, found in enumerate(evaluations)}
        console.print(evaluation_table(named))
    return [line.split() for line in captured.get().replace("\u00a0", "").splitlines()]


def test_one_row_a_metric_and_one_column_a_model() -> None:
    other = RESULT.model_copy(update={"metrics": {"acc": 0.75}})
    rows = printed(
        EvaluationResult(results={"choices": RESULT}),
        EvaluationResult(
            results={"choices": other, "more": RESULT.model_copy(update={"name": "more"})}
        ),
    )
    assert ["task", "metric", "model0", "model1", "items"] in rows
    assert ["choices", "acc", "0.2500±0.1250", "0.7500", "2"] in rows
    assert ["choices", "perplexity", "1.23e+05", "2"] in rows
    assert ["more", "acc", "0.2500±0.1250", "2"] in rows


def test_the_accuracy_metric_is_marked_and_averaged() -> None:
    rows = printed(EvaluationResult(results={"choices": RESULT}))
    assert ["choices", "acc_norm", "*", "0.5000", "2"] in rows
    assert ["choices", "acc", "0.2500±0.1250", "2"] in rows
    assert any(row[:4] == ["average", "accuracy", "*", "0.5000"] for row in rows)


def test_an_average_without_some_tasks_has_a_note() -> None:
    whole = EvaluationResult(results={"choices": RESULT})
    less = whole.model_copy(update={"skipped": {"piqa": "it needs the hub"}})
    assert average_notes({"a": whole}) == []
    assert average_notes({"a": less}) == ["the average is over choices, without piqa"]
    assert average_notes({"a": whole, "b": less}) == [
        "the average of b is over choices, without piqa"
    ]


def test_a_task_without_accuracy_has_no_average() -> None:
    plain = RESULT.model_copy(update={"metrics": {"bits_per_byte": 2.0}})
    rows = printed(EvaluationResult(results={"choices": plain}))
    assert not any("average" in row for row in rows)


def test_tasks_with_different_items_are_found() -> None:
    same = EvaluationResult(results={"choices": RESULT})
    other = EvaluationResult(
        results={"choices": RESULT.model_copy(update={"items": ["one", "three"]})}
    )
    assert tasks_with_other_items([same, same]) == []
    assert tasks_with_other_items([same, other]) == ["choices"]
