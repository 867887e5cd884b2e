"""Tables say the same in every form, fit the terminal, and are strict JSON and CSV for machines."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.analysis.pareto import Axes, Front, find_front
from orchestrator.analysis.tables import (
    csv_text,
    full_rows,
    json_text,
    markdown_table,
    short_schedule,
    terminal_table,
)
from orchestrator.trial import TrialResult


@pytest.fixture
def front(sample_results: list[TrialResult]) -> Front:
    return find_front(sample_results)


def printed(front: Front, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(terminal_table(front, width=width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (120, "schedule threshold evals FLOPs KV/token ms/token accuracy bits/byte of front"),
        (100, "schedule threshold evals FLOPs ms/token accuracy bits/byte of front"),
        (80, "schedule evals FLOPs ms/token accuracy of front"),
        (60, "schedule evals accuracy front"),
    ],
)
def test_the_terminal_table_fits_and_keeps_what_matters(
    front: Front, width: int, titles: str
) -> None:
    head, _, *rows = printed(front, width)
    assert max(len(line) for line in [head, *rows]) <= width
    assert [word for word in head.split() if word not in ("%", "full")] == titles.split()
    assert len(rows) == 12
    assert not any("…" in line for line in rows)
    costs = [float(row["cost/evaluations"]) for row in full_rows(front)]
    assert costs == sorted(costs)
    knee = next(line for line in rows if "knee" in line)
    assert knee.split()[0] == "0,1,1,1,1,1"
    assert "44.4 ± 1.2" in knee


def test_references_say_what_they_beat(front: Front) -> None:
    vanilla = next(line for line in printed(front, 100) if "vanilla" in line)
    assert "beats 1 ●" in vanilla


def test_long_schedules_are_counted(front: Front) -> None:
    assert short_schedule((2, 2, 1, 1, 1, 1)) == "2,2,1,1,1,1"
    assert short_schedule((3,) * 4 + (1,) * 19 + (0,)) == "3*4,1*19,0"
    assert short_schedule(None) == ""


def test_a_table_for_another_pair_of_numbers_shows_them(
    sample_results: list[TrialResult],
) -> None:
    axes = Axes("cost/flops_per_token", "quality/bits_per_byte")
    head = printed(find_front(sample_results, axes), 110)[0]
    assert "FLOPs/token" in head
    assert head.count("bits/byte") == 1
    assert "accuracy" not in head


def test_csv_and_json_hold_every_number(front: Front, sample_results: list[TrialResult]) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(front))))
    values = json.loads(json_text(front))
    by_key = {row["key"]: row for row in rows}
    for result in sample_results:
        for name, number in result.metrics().items():
            assert float(by_key[result.key][name]) == pytest.approx(number)
    assert {row["key"] for row in values["results"]} == set(by_key)
    assert values["picks"]["knee"] == next(r["key"] for r in rows if "knee" in r["verdict"])
    assert values["hypervolume"] == front.hypervolume
    assert values["results"][0]["details"] in [result.to_dict() for result in sample_results]


def test_what_was_not_measured_is_listed_and_null(sample_results: list[TrialResult]) -> None:
    lacking = replace(sample_results[1], key="lacking", quality={"accuracy": float("nan")})
    front = find_front([*sample_results, lacking])
    row = full_rows(front)[-1]
    assert row["verdict"] == "not measured"
    assert row["quality/accuracy"] is None
    assert "NaN" not in json_text(front)


def test_markdown_has_a_row_for_each_model_and_bold_members(front: Front) -> None:
    lines = markdown_table(front).splitlines()
    assert len(lines) == 2 + len(front.placed)
    assert len({line.count("|") for line in lines}) == 1
    assert sum(line.startswith("| **") for line in lines) == len(front.members)


def test_an_empty_front_has_tables_too() -> None:
    front = find_front([])
    assert full_rows(front) == []
    assert csv_text(front).strip() == ""
    assert json.loads(json_text(front))["front"] == []
    assert printed(front, 80)
