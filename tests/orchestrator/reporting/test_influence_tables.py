"""Influence tables: digits of the errors, residuals, contraction factors."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console

from iiet.influence import InfluenceTable
from orchestrator.reporting.command_tables import influence_markdown, influence_terminal_table


def test_an_influence_has_the_digits_of_its_error() -> None:
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


def test_residuals_and_contraction_factors_follow_the_influence() -> None:
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
    assert "Residual" not in captured.get(), "a table of an earlier version has no residuals"


def test_the_block_influence_of_whole_layers_has_a_column() -> None:
    rows = ((0.04, 0.02), (0.5,))
    table = InfluenceTable("cosine", rows, rows, 64, rows, (0.31, 0.024))
    console = Console(width=80)
    with console.capture() as captured:
        console.print(influence_terminal_table(table))
    printed = [line.replace("\u00a0", "").split() for line in captured.get().splitlines()]
    assert ["2", "0.5±0.5", "0.024"] in printed
    heads, _, first, second = influence_markdown(table).splitlines()
    assert heads.endswith("| contraction | whole layer |")
    assert (first.endswith("| 0.31 |"), second) == (True, "| 2 | 0.5 |  |  | 0.024 |")


def test_markdown_has_the_contraction_factors() -> None:
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
