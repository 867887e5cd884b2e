"""What is printed beside the front: evaluations side by side."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console

from iiet.influence import InfluenceTable
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.evaluation_tables import (
    average_notes,
    evaluation_table,
    tasks_with_other_items,
)
from orchestrator.reporting.influence_tables import influence_markdown, influence_terminal_table

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
    other = replace(RESULT, metrics={"acc": 0.75})
    rows = printed(
        EvaluationResult(results={"choices": RESULT}),
        EvaluationResult(results={"choices": other, "more": replace(RESULT, name="more")}),
    )
    assert ["task", "metric", "model0", "model1", "items"] in rows
    assert ["choices", "acc", "0.2500±0.1250", "0.7500", "2"] in rows
    assert ["choices", "perplexity", "1.23e+05", "2"] in rows
    assert ["more", "acc", "0.2500±0.1250", "2"] in rows


def test_the_metric_that_counts_is_marked_and_averaged() -> None:
    rows = printed(EvaluationResult(results={"choices": RESULT}))
    assert ["choices", "acc_norm", "*", "0.5000", "2"] in rows
    assert ["choices", "acc", "0.2500±0.1250", "2"] in rows
    assert any(row[:4] == ["average", "accuracy", "*", "0.5000"] for row in rows)


def test_an_average_over_less_than_was_asked_for_says_so() -> None:
    whole = EvaluationResult(results={"choices": RESULT})
    less = replace(whole, skipped={"piqa": "it needs the hub"})
    assert average_notes({"a": whole}) == []
    assert average_notes({"a": less}) == ["the average is over choices, without piqa"]
    assert average_notes({"a": whole, "b": less}) == [
        "the average of b is over choices, without piqa"
    ]


def test_a_task_without_accuracy_has_no_average() -> None:
    plain = replace(RESULT, metrics={"bits_per_byte": 2.0})
    rows = printed(EvaluationResult(results={"choices": plain}))
    assert not any("average" in row for row in rows)


def test_other_items_are_found() -> None:
    same = EvaluationResult(results={"choices": RESULT})
    other = EvaluationResult(results={"choices": replace(RESULT, items=["one", "three"])})
    assert tasks_with_other_items([same, same]) == []
    assert tasks_with_other_items([same, other]) == ["choices"]


def test_an_influence_is_written_as_far_as_its_error_reaches() -> None:
    table = InfluenceTable(
        metric="loss",
        value_rows=((0.05234, 3e-5), (0.5, 0.0123)),
        error_rows=((0.00021, 2e-6), (0.0, math.nan)),
        num_tokens=64,
    )
    console = Console(width=80)
    with console.capture() as captured:
        console.print(influence_terminal_table(table))
    rows = [line.replace("\u00a0", "").split() for line in captured.get().splitlines()]
    assert ["1", "0.05234±0.00021", "3e-05±2e-06"] in rows
    assert ["2", "0.5±0", "0.012"] in rows, "a single batch has no error"


def test_residuals_and_contraction_factors_stand_under_the_influence() -> None:
    rows = ((0.04, 0.02, 0.01), (0.5,))
    residuals = ((0.8, 0.4, 0.2), (0.25,))
    table = InfluenceTable("cosine", rows, rows, 64, residuals)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(influence_terminal_table(table))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    printed = [line.split() for line in lines]
    assert ["1", "0.8", "0.4", "0.2", "0.5"] in printed
    assert ["2", "0.25"] in printed
    with console.capture() as captured:
        console.print(influence_terminal_table(replace(table, residual_rows=())))
    assert "Residual" not in captured.get(), "a table of before there were residuals has none"


def test_reports_write_the_contraction_factors_beside_the_influence() -> None:
    rows = ((0.04, 0.02, 0.01), (0.5,))
    table = InfluenceTable("cosine", rows, rows, 64, ((0.8, 0.4, 0.2), (0.25,)))
    assert influence_markdown(table).splitlines() == [
        "| layer | correction 1 | correction 2 | correction 3 | contraction |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 1 | 0.04 | 0.02 | 0.01 | 0.5 |",
        "| 2 | 0.5 |  |  |  |",
    ]
    older = influence_markdown(replace(table, residual_rows=()))
    assert older.splitlines()[2] == "| 1 | 0.04 | 0.02 | 0.01 |  |"
