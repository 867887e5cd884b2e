"""Tables fit the terminal at several widths and break no name or number."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
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
    cost_and_share_tables,
    evaluation_table,
    influence_terminal_table,
)

WIDTHS = (60, 80, 200)


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return Text.from_ansi(console.file.getvalue()).plain


def task(name: str, num_items: int, **metrics: float) -> TaskResult:
    return TaskResult(
        name=name, version="1", num_items=num_items, num_fewshot=0, metrics=metrics, items=[],
        values={}, log_likelihoods=[],
    )  # fmt: skip


TASKS = [
    task("lambada_openai", 5153, perplexity=6.2e7, perplexity_stderr=1.2e6, acc=0.37),
    task("heldout_continuation", 1028, acc=0.4432, acc_stderr=0.0155, bits_per_byte=2.2),
]
EVALUATION = EvaluationResult(results={result.name: result for result in TASKS})


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
    console = terminal(width)
    console.print(evaluation_table(dict.fromkeys(models, EVALUATION)))
    text = printed(console).replace("\u00a0", " ")
    wanted = ["lambada_openai", "heldout_continuation", "perplexity", "acc *", "bits_per_byte"]
    numbers = ["6.2e+07 ± 1.2e+06", "0.4432 ± 0.0155"]
    for part in [*wanted, *numbers, *(models if len(models) > 1 else [])]:
        assert part in text
    assert text.count(numbers[0]) == len(models)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_an_influence_table_of_many_corrections_is_split(width: int) -> None:
    rows = tuple(tuple(0.0123 / (r + 1) for r in range(6)) for _ in range(3))
    errors = tuple(tuple(value / 50 for value in row) for row in rows)
    table = InfluenceTable(metric="cosine", value_rows=rows, error_rows=errors, num_tokens=64)
    console = terminal(width)
    console.print(influence_terminal_table(table))
    text = printed(console).replace("\u00a0", " ")
    assert all(f"correction {number}" in text for number in range(1, 7))
    assert text.count("0.01230 ± 0.00025") + text.count("0.0123 ± 0.00025") == 3
    assert text.count("Influence (cosine") == 1


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
    console = terminal(width)
    for table in cost_and_share_tables(costs):
        console.print(table)
    text = printed(console)
    for part in ("1234.50 ± 12.30", "123.40 ± 1.20", "64,321", "1,024.00", "50.0 ± 1.0"):
        assert part in text
    assert text.count("r=2,2,1,1,1,1") == text.count("8 x 1024") / 2 >= 3
