"""Front tables: the same content in all formats, terminal widths, strict JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from sample_trials import sample_front

from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.trial import Trial
from orchestrator.reporting.confidence import with_confidence
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.reporting.front_tables import (
    confidence_text,
    cost_text,
    front_values,
    model_rows,
    model_table,
    models_table,
    task_tables,
)
from orchestrator.reporting.pareto import Front
from orchestrator.terminal.render import format_schedule


def _strict_json(front: Front) -> str:
    return json.dumps(front_values(front), allow_nan=False)


@pytest.fixture
def front(sample_results: list[Trial]) -> Front:
    return sample_front(sample_results)


def printed(front: Front, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(models_table(front))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (120, "schedule threshold NFE FLOPs KV/token ms/token accuracy bits/byte of front"),
        (100, "schedule threshold NFE FLOPs ms/token accuracy bits/byte of front"),
        (80, "schedule NFE FLOPs ms/token accuracy of front"),
        (56, "schedule NFE accuracy front"),
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
    costs = [float(row["cost/evaluations"]) for row in model_rows(front)]
    assert costs == sorted(costs)
    knee = next(line for line in rows if "knee" in line)
    assert knee.split()[0] == "0,1,1,1,1,1"
    assert "44.4 ± 1.2" in knee


def test_layers_have_a_column_if_they_differ(sample_results: list[Trial]) -> None:
    assert " layers" not in "\n".join(printed(sample_front(sample_results), 160))
    last = sample_results[-1]
    assert last.role == "baseline"
    deep = replace(last.model, method="vanilla", num_layers=99, schedule=None)
    results = [*sample_results[:-1], last.model_copy(update={"model": deep})]
    head, _, *rows = printed(sample_front(results), 160)
    assert " layers " in head
    assert sum(" 99 " in row for row in rows) == 1


def test_parameters_have_a_column_if_models_are_of_different_sizes(
    sample_results: list[Trial],
) -> None:
    def sized(last: int) -> str:
        counts = [1_480_000] * (len(sample_results) - 1) + [last]
        results = [
            result.with_numbers("cost", {"num_parameters": count})
            for result, count in zip(sample_results, counts, strict=True)
        ]
        return "\n".join(printed(sample_front(results), 120))

    assert "parameters" not in sized(1_490_000), "the mix of a method is no other size"
    table = sized(3_210_000)
    assert "parameters" in table
    assert table.count(" 1.48 M ") == len(sample_results) - 1
    assert table.count(" 3.21 M ") == 1


def test_baselines_say_what_they_beat(front: Front) -> None:
    vanilla = next(line for line in printed(front, 100) if "vanilla" in line)
    assert "beats 1 ●" in vanilla


def test_long_schedules_count_repetitions(front: Front) -> None:
    assert format_schedule((2, 2, 1, 1, 1, 1)) == "2,2,1,1,1,1"
    assert format_schedule((3,) * 4 + (1,) * 19 + (0,)) == "3*4,1*19,0"
    assert format_schedule(None) == ""


def test_a_table_on_other_axes_shows_them(
    sample_results: list[Trial],
) -> None:
    axes = FrontAxes("cost/flops_per_token", "quality/bits_per_byte")
    head = printed(sample_front(sample_results, axes), 110)[0]
    assert "FLOPs/token" in head
    assert head.count("bits/byte") == 1
    assert "accuracy" not in head


def test_csv_and_json_hold_every_number(front: Front, sample_results: list[Trial]) -> None:
    rows = list(csv.DictReader(io.StringIO(model_table(front).to_csv(index=False))))
    values = json.loads(_strict_json(front))
    by_key = {row["key"]: row for row in rows}
    for result in sample_results:
        for name, number in result.metrics().items():
            assert float(by_key[result.key][name]) == pytest.approx(number)
    assert {row["key"] for row in values["results"]} == set(by_key)
    assert values["picks"]["knee"] == next(r["key"] for r in rows if "knee" in r["verdict"])
    assert values["hypervolume"] == front.hypervolume
    assert values["results"][0]["details"] in [
        result.model_dump(mode="json", exclude={"job", "suite"}) for result in sample_results
    ]


def test_an_unmeasured_result_is_listed_with_null(sample_results: list[Trial]) -> None:
    lacking = (
        sample_results[1]
        .model_copy(update={"key": "lacking", "numbers": {"cost/evaluations": 1.0}})
        .with_numbers("quality", {"accuracy": float("nan")})
    )
    front = sample_front([*sample_results, lacking])
    row = model_rows(front)[-1]
    assert row["verdict"] == "not measured"
    assert row["quality/accuracy"] is None
    assert "NaN" not in _strict_json(front)


def test_markdown_has_a_row_for_each_model_and_bold_members(front: Front) -> None:
    lines = models_table(front).to_markdown().splitlines()
    assert len(lines) == 2 + len(front.points)
    assert len({line.count("|") for line in lines}) == 1
    assert sum(line.startswith("| **") for line in lines) == len(front.members)


def test_an_empty_front_has_tables_too() -> None:
    front = sample_front([])
    assert model_rows(front) == []
    assert len(model_table(front)) == 0
    assert json.loads(_strict_json(front))["front"] == []
    assert printed(front, 80)


@pytest.fixture
def sure_front(front: Front, sample_evaluations: dict[str, EvaluationResult]) -> Front:
    return with_confidence(front, sample_evaluations, num_resamples=500)


def test_confidence_columns_are_dropped_first(sure_front: Front) -> None:
    head, _, *rows = printed(sure_front, 160)
    assert "vs teacher  P(99%)  P(front)  front" in head
    knee = next(line for line in rows if "knee" in line)
    assert "-0.3 (-0.5 to -0.1)" in knee
    teacher = next(line for line in rows if line.startswith(" teacher") or "teacher" in line)
    assert " to " not in teacher
    assert "P(front)" not in printed(sure_front, 145)[0]
    assert "vs teacher" not in printed(sure_front, 110)[0]
    assert "vs teacher" in models_table(sure_front).to_markdown()


def test_confidences_of_zero_and_one_are_not_printed() -> None:
    assert [confidence_text(p) for p in (None, 0.0, 0.62, 1.0)] == ["", "<0.01", "0.62", ">0.99"]


def test_costs_have_four_digits_or_all() -> None:
    assert [cost_text(cost) for cost in (11.0, 6.2745, 16384.0, 8.94e6, 2.5e9)] == [
        "11",
        "6.274",
        "16,384",
        "8,940,000",
        "2.5e+09",
    ]


def test_each_task_has_a_table_with_intervals_and_differences(sure_front: Front) -> None:
    tables = task_tables(sure_front)
    assert [table.title for table in tables] == [
        "Accuracy",
        "lastword (acc)",
        "continuation (acc)",
    ]
    for table in tables:
        heads = [column.title for column in table.columns[3:]]
        assert heads == ["vs teacher", "vs vanilla", "vs r = 0 from scratch"]
        assert len(table.rows) == 12
    lines = tables[1].to_markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    knee = next(line for line in lines if "0,1,1,1,1,1" in line)
    assert knee.split(" | ")[1] == "32.4"
    assert knee.split(" | ")[3].startswith("-0.3 (-0.7 to ")
    assert task_tables(sample_front([])) == []


def test_csv_and_json_have_the_paired_numbers(sure_front: Front) -> None:
    values = json.loads(_strict_json(sure_front))
    row = next(r for r in values["results"] if r["schedule"] == "0,1,1,1,1,1")
    assert row["paired/vs_teacher"] == pytest.approx(-0.003)
    assert row["paired/vs_teacher_low"] < row["paired/vs_teacher"] < row["paired/vs_teacher_high"]
    assert 0 < row["paired/confidence_keeps_99"] < 1
    assert values["confidence_basis"]["num_items"] == 2000
    header = model_table(sure_front).to_csv(index=False).splitlines()[0]
    assert "paired/lastword/vs_r_0_from_scratch_high" in header


def test_several_sweeps_have_a_column_and_full_names(sample_results: list[Trial]) -> None:
    sweep_of = {r.key: "first" if n % 2 else "second" for n, r in enumerate(sample_results)}
    front = sample_front(sample_results, sweep_of=sweep_of)
    head, _, *rows = printed(front, 120)
    assert head.split()[:2] == ["schedule", "sweep"]
    assert all(("first" in row) != ("second" in row) for row in rows)
    assert {row["sweep"] for row in model_rows(front)} == {"first", "second"}


def test_the_cost_axis_is_never_dropped(
    sample_results: list[Trial],
) -> None:
    for cost, title in (("kv_bytes_per_token", "KV/token"), ("decode_ms_per_token", "ms/token")):
        front = sample_front(sample_results, FrontAxes(cost=f"cost/{cost}"))
        assert title in printed(front, 60)[0]
