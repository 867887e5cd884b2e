"""Tables of commands: cells, marks, notes and digits; no width breaks a name or a number."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from iiet.influence import InfluenceTable
from orchestrator.evaluation.cost_measurement import (
    DECODING,
    FIRST_TOKEN,
    MeasuredCost,
    RelativeTime,
)
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.command_tables import (
    average_notes,
    cost_and_share_tables,
    evaluation_table,
    influence_markdown,
    influence_terminal_table,
    tasks_with_other_items,
)

WIDTHS = (60, 80, 200)


def printed(*shown: RenderableType, width: int = 120) -> str:
    """Return what a terminal of some width shows."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    for one in shown:
        console.print(one)
    return Text.from_ansi(file.getvalue()).plain


def rows(shown: RenderableType) -> list[list[str]]:
    """Return the rows, split at the spaces between columns."""
    return [line.split() for line in printed(shown).replace("\u00a0", "").splitlines()]


def task(name: str, num_items: int = 2, **metrics: float) -> TaskResult:
    return TaskResult(
        name=name, version="1", num_items=num_items, metrics=metrics, items=["one", "two"]
    )


def evaluation(*tasks: TaskResult) -> EvaluationResult:
    return EvaluationResult(results={result.name: result for result in tasks})


CHOICES = {"acc": 0.25, "acc_stderr": 0.125, "acc_norm": 0.5, "perplexity": 123456.0}


def test_one_row_a_metric_and_one_column_a_model() -> None:
    other = evaluation(task("choices", acc=0.75), task("more", **CHOICES))
    found = rows(
        evaluation_table({"model0": evaluation(task("choices", **CHOICES)), "model1": other})
    )
    assert ["task", "metric", "model0", "model1", "items"] in found
    assert ["choices", "acc", "0.2500±0.1250", "0.7500", "2"] in found
    assert ["choices", "perplexity", "1.23e+05", "2"] in found
    assert ["more", "acc", "0.2500±0.1250", "2"] in found


def test_the_accuracy_metric_is_marked_and_averaged() -> None:
    found = rows(evaluation_table({"model": evaluation(task("choices", **CHOICES))}))
    assert ["choices", "acc_norm", "*", "0.5000", "2"] in found
    assert ["choices", "acc", "0.2500±0.1250", "2"] in found
    assert any(row[:4] == ["average", "accuracy", "*", "0.5000"] for row in found)


def test_an_average_without_some_tasks_has_a_note() -> None:
    whole = evaluation(task("choices", **CHOICES))
    less = whole.model_copy(update={"skipped": {"piqa": "it needs the hub"}})
    assert average_notes({"a": whole}) == []
    assert average_notes({"a": less}) == ["the average is over choices, without piqa"]
    assert average_notes({"a": whole, "b": less}) == [
        "the average of b is over choices, without piqa"
    ]


def test_a_task_without_accuracy_has_no_average() -> None:
    found = rows(evaluation_table({"model": evaluation(task("text", bits_per_byte=2.0))}))
    assert not any("average" in row for row in found)


def test_tasks_with_different_items_are_found() -> None:
    one = task("choices", **CHOICES)
    same, other = evaluation(one), evaluation(one.model_copy(update={"items": ["one", "three"]}))
    assert tasks_with_other_items([same, same]) == []
    assert tasks_with_other_items([same, other]) == ["choices"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "models",
    [
        ["teacher"],
        ["teacher", "SmolLM2-135M-Instruct"],
        ["r=3,3,3,3,3,3", "r=2,2,1,1,1,1", "r=0", "a-model-with-a-long-name"],
    ],
)
def test_an_evaluation_table_breaks_no_name_or_number(models: list[str], width: int) -> None:
    measured = evaluation(
        task("lambada_openai", 5153, perplexity=6.2e7, perplexity_stderr=1.2e6, acc=0.37),
        task("heldout_continuation", 1028, acc=0.4432, acc_stderr=0.0155, bits_per_byte=2.2),
    )
    text = printed(evaluation_table(dict.fromkeys(models, measured)), width=width)
    text = text.replace("\u00a0", " ")
    wanted = ["lambada_openai", "heldout_continuation", "perplexity", "acc *", "bits_per_byte"]
    numbers = ["6.2e+07 ± 1.2e+06", "0.4432 ± 0.0155"]
    for part in [*wanted, *numbers, *(models if len(models) > 1 else [])]:
        assert part in text
    assert text.count(numbers[0]) == len(models)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_cost_tables_break_no_name_or_number(width: int) -> None:
    predicted = {"FLOPs": 0.51, "evaluations": 0.48}
    share = RelativeTime(measured=0.5, spread=0.01, predicted=predicted)
    costs = [
        MeasuredCost(
            model=model, batch_size=8, context=1024, first_token_ms=1234.5, first_token_spread=12.3,
            decode_ms=123.4, decode_spread=1.2, tokens_per_second=64321.0, kv_bytes=2**28,
            weight_bytes=2**20, peak_bytes=2**30, shares={DECODING: share, FIRST_TOKEN: share},
        )
        for model in ("r=3,3,3,3,3,3", "r=2,2,1,1,1,1")
    ]  # fmt: skip
    text = printed(*cost_and_share_tables(costs), width=width)
    for part in ("1234.50 ± 12.30", "123.40 ± 1.20", "64,321", "1,024.00", "50.0 ± 1.0"):
        assert part in text
    assert text.count("r=2,2,1,1,1,1") == text.count("8 x 1024") / 2 >= 3


def test_an_influence_has_the_digits_of_its_error() -> None:
    table = InfluenceTable(
        metric="loss",
        value_rows=((0.05234, 3e-5), (0.5, 0.0123)),
        error_rows=((0.00021, 2e-6), (0.0, math.nan)),
        num_tokens=64,
    )
    found = rows(influence_terminal_table(table))
    assert ["1", "0.05234±0.00021", "3e-05±2e-06"] in found
    assert ["2", "0.5±0", "0.012"] in found, "a single batch has no error"


def test_residuals_and_contraction_factors_follow_the_influence() -> None:
    influence = ((0.04, 0.02, 0.01), (0.5,))
    residuals = ((0.8, 0.4, 0.2), (0.25,))
    table = InfluenceTable("cosine", influence, influence, 64, residuals)
    assert max(map(len, printed(influence_terminal_table(table), width=80).splitlines())) <= 80
    found = rows(influence_terminal_table(table))
    assert ["1", "0.8", "0.4", "0.2", "0.5"] in found
    assert ["2", "0.25"] in found
    assert "Residual" not in printed(influence_terminal_table(replace(table, residual_rows=())))


def test_the_block_influence_of_whole_layers_has_a_column() -> None:
    influence = ((0.04, 0.02), (0.5,))
    table = InfluenceTable("cosine", influence, influence, 64, influence, (0.31, 0.024))
    assert ["2", "0.5±0.5", "0.024"] in rows(influence_terminal_table(table))
    heads, _, first, second = influence_markdown(table).splitlines()
    assert heads.endswith("| contraction | whole layer |")
    assert (first.endswith("| 0.31 |"), second) == (True, "| 2 | 0.5 |  |  | 0.024 |")


def test_markdown_has_the_contraction_factors() -> None:
    influence = ((0.04, 0.02, 0.01), (0.5,))
    table = InfluenceTable("cosine", influence, influence, 64, ((0.8, 0.4, 0.2), (0.25,)))
    assert influence_markdown(table).splitlines() == [
        "| layer | correction 1 | correction 2 | correction 3 | contraction |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 1 | 0.04 | 0.02 | 0.01 | 0.5 |",
        "| 2 | 0.5 |  |  |  |",
    ]
    without = influence_markdown(replace(table, residual_rows=()))
    assert without.splitlines()[2] == "| 1 | 0.04 | 0.02 | 0.01 |  |"


@pytest.mark.parametrize("width", WIDTHS)
def test_an_influence_table_of_many_corrections_is_split(width: int) -> None:
    values = tuple(tuple(0.0123 / (r + 1) for r in range(6)) for _ in range(3))
    errors = tuple(tuple(value / 50 for value in row) for row in values)
    table = InfluenceTable(metric="cosine", value_rows=values, error_rows=errors, num_tokens=64)
    text = printed(influence_terminal_table(table), width=width).replace("\u00a0", " ")
    assert all(f"correction {number}" in text for number in range(1, 7))
    assert text.count("0.01230 ± 0.00025") + text.count("0.0123 ± 0.00025") == 3
    assert text.count("Influence (cosine") == 1
