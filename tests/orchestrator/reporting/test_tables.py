"""Tables: the same content in all formats, and no terminal's width breaks a name or a number."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType
from rich.text import Text
from sample_trials import sample_front
from stored_texts import assert_as_stored

from iiet.iiad.pruning import InfluenceTable
from orchestrator.evaluation.decode_timing import (
    DECODING,
    FIRST_TOKEN,
    MeasuredCost,
    RelativeTime,
)
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.command_tables import (
    average_notes,
    cost_and_share_tables,
    difference_notes,
    evaluation_table,
    influence_table,
    influence_tables,
    tasks_with_other_items,
)
from orchestrator.reporting.comparison import Difference
from orchestrator.reporting.findings import confidence_note, describe_pick, findings
from orchestrator.reporting.front import Front, FrontAxes, with_confidence
from orchestrator.reporting.mlflow_report import front_metrics
from orchestrator.reporting.statistics import Interval
from orchestrator.reporting.tables import (
    confidence_text,
    cost_text,
    front_values,
    model_rows,
    models_csv,
    models_table,
    task_tables,
)

WIDTHS = (60, 80, 200)


def printed(*shown: RenderableType, width: int = 120) -> str:
    """Return what a terminal of some width shows."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    for renderable in shown:
        console.print(renderable)
    return Text.from_ansi(file.getvalue()).plain


def lines(front: Front, width: int) -> list[str]:
    text = printed(models_table(front), width=width)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def rows(*shown: RenderableType) -> list[list[str]]:
    """Return the rows, split at the spaces between columns."""
    return [line.replace(" ± ", "±").split() for line in printed(*shown).splitlines()]


@pytest.fixture
def front(sample_results) -> Front:
    return sample_front(sample_results)


@pytest.fixture
def sure_front(front, sample_evaluations) -> Front:
    return with_confidence(front, sample_evaluations)


def test_a_front_reads_as_stored(sample_results, front, sure_front, tmp_path):
    in_ms = sample_front(sample_results, FrontAxes(cost="cost/decode_ms_per_token"))
    axes = FrontAxes("cost/flops_per_token", "quality/bits_per_byte")
    picks = sure_front.picks.items()
    parts = {
        "without items": findings(front),
        "with items": [*findings(sure_front), *confidence_note(sure_front)],
        "picks": [f"{name}: {describe_pick(sure_front, row)}" for name, row in picks],
        "metrics": [f"{name}: {value:.6g}" for name, value in front_metrics(sure_front).items()],
        "56 columns": lines(front, 56),
        "80 columns": lines(front, 80),
        "100 columns, with items": lines(sure_front, 100),
        "163 columns, with items": lines(sure_front, 163),
        "60 columns, in ms": lines(in_ms, 60),
        "110 columns, in FLOPs and bits": lines(sample_front(sample_results, axes), 110),
    }
    for table in (models_table(sure_front), *task_tables(sure_front)):
        parts[table.title or "models"] = table.to_markdown().splitlines()
    assert_as_stored("front.txt", parts, tmp_path)


def test_the_terminal_table_fits_any_width_and_keeps_names_and_numbers(front, sure_front):
    for width in range(56, 200, 24):
        for shown in (front, sure_front):
            head, _, *body = lines(shown, width)
            assert max(len(line) for line in [head, *body]) <= width
            assert len(body) == len(shown.placed)
            assert not any("…" in line for line in body)
            knee = next(line for line in body if "knee" in line)
            assert knee.split()[0] == "0,1,1,1,1,1"
            assert "44.4 ± 1." in knee


def test_sizes_and_sweeps_have_columns_if_they_differ(sample_results, front):
    assert " layers" not in "\n".join(lines(front, 160))
    last = sample_results[-1]
    deep = replace(last.model, method="vanilla", num_layers=99, schedule=None)
    results = [*sample_results[:-1], last.model_copy(update={"model": deep})]
    head, _, *body = lines(sample_front(results), 160)
    assert " layers " in head
    assert sum(" 99 " in row for row in body) == 1

    def sized(last: int) -> str:
        counts = [1_480_000] * (len(sample_results) - 1) + [last]
        pairs = zip(sample_results, counts, strict=True)
        results = [r.with_numbers("cost", {"num_parameters": count}) for r, count in pairs]
        return "\n".join(lines(sample_front(results), 120))

    assert "parameters" not in sized(1_490_000), "the mix of a method is no other size"
    assert "parameters" in sized(3_210_000)
    assert sized(3_210_000).count(" 1.48 M ") == len(sample_results) - 1
    assert sized(3_210_000).count(" 3.21 M ") == 1

    sweep_of = {r.key: "first" if n % 2 else "second" for n, r in enumerate(sample_results)}
    several = sample_front(sample_results, sweep_of=sweep_of)
    head, _, *body = lines(several, 120)
    assert head.split()[:2] == ["schedule", "sweep"]
    assert all(("first" in row) != ("second" in row) for row in body)
    assert {row["sweep"] for row in model_rows(several)} == {"first", "second"}


def test_csv_and_json_hold_every_number(front, sure_front, sample_results):
    csv_rows = list(csv.DictReader(io.StringIO(models_csv(front))))
    values = json.loads(json.dumps(front_values(front), allow_nan=False))
    by_key = {row["key"]: row for row in csv_rows}
    for result in sample_results:
        for name, number in result.metrics().items():
            assert float(by_key[result.key][name]) == pytest.approx(number)
    assert {row["key"] for row in values["results"]} == set(by_key)
    assert values["picks"]["knee"] == next(r["key"] for r in csv_rows if "knee" in r["verdict"])
    assert values["results"][0]["details"] in [
        result.model_dump(mode="json", exclude={"job", "suite"}) for result in sample_results
    ]
    changes = {"key": "lacking", "numbers": {"cost/evaluations": 1.0}}
    lacking = sample_results[1].model_copy(update=changes)
    with_gap = sample_front([*sample_results, lacking])
    row = model_rows(with_gap)[-1]
    assert (row["verdict"], row["quality/accuracy"]) == ("not measured", None)
    assert "NaN" not in json.dumps(front_values(with_gap), allow_nan=False)
    empty = sample_front([])
    assert (model_rows(empty), task_tables(empty), front_values(empty)["front"]) == ([], [], [])
    assert lines(empty, 80)
    values = json.loads(json.dumps(front_values(sure_front), allow_nan=False))
    assert values["confidence_basis"]["num_items"] == 2000
    assert "paired/lastword/vs_r_0_from_scratch_high" in model_rows(sure_front)[0]


def test_numbers_are_written_with_the_digits_that_matter():
    assert [confidence_text(p) for p in (None, 0.0, 0.62, 1.0)] == ["", "<0.01", "0.62", ">0.99"]
    costs = {11.0: "11", 6.2745: "6.274", 16384.0: "16,384", 8.94e6: "8,940,000", 2.5e9: "2.5e+09"}
    assert [cost_text(cost) for cost in costs] == list(costs.values())


# Tables of single commands


def task(name: str, num_items: int = 2, **metrics: float) -> TaskResult:
    return TaskResult(
        name=name, version="1", num_items=num_items, metrics=metrics, items=["one", "two"]
    )


def evaluation(*tasks: TaskResult) -> EvaluationResult:
    return EvaluationResult(results={result.name: result for result in tasks})


CHOICES = {"acc": 0.25, "acc_stderr": 0.125, "acc_norm": 0.5, "perplexity": 123456.0}


def test_tables_of_evaluations_read_as_stored(tmp_path):
    evaluated = evaluation(task("choices", **CHOICES))
    of_two_tasks = evaluation(task("choices", acc=0.75), task("more", **CHOICES))
    of_text = evaluation(task("text", bits_per_byte=2.0))
    # Beside the score of the second model stands its difference to the first.
    interval = Interval(0.25, -0.125, 0.5)
    difference = Difference(
        model="b", against="a", task="choices", metric="acc_norm", num_items=2, interval=interval
    )
    tables = {
        "two models": evaluation_table({"model0": evaluated, "model1": of_two_tasks}),
        "one model": evaluation_table({"model": evaluated}),
        "without an accuracy": evaluation_table({"model": of_text}),
        "differences": evaluation_table(
            {"a": evaluated, "b": evaluated}, [difference], {"a": 1024, "b": None}
        ),
    }
    parts = {title: printed(table).splitlines() for title, table in tables.items()}
    parts["notes"] = difference_notes([difference])
    assert_as_stored("evaluation.txt", parts, tmp_path)


def test_notes_say_what_an_average_or_a_comparison_lacks():
    evaluated = evaluation(task("choices", **CHOICES))
    without_piqa = evaluated.model_copy(update={"skipped": {"piqa": "it needs the hub"}})
    assert average_notes({"a": evaluated}) == []
    assert average_notes({"a": without_piqa}) == ["the average is over choices, without piqa"]
    assert average_notes({"a": evaluated, "b": without_piqa}) == [
        "the average of b is over choices, without piqa"
    ]
    assert difference_notes([]) == []
    changed = evaluation(task("choices", **CHOICES).model_copy(update={"items": ["one", "three"]}))
    assert tasks_with_other_items([evaluated, evaluated]) == []
    assert tasks_with_other_items([evaluated, changed]) == ["choices"]


@pytest.mark.parametrize("width", WIDTHS)
def test_no_width_breaks_a_name_or_a_number(width):
    measured = evaluation(
        task("lambada_openai", 5153, perplexity=6.2e7, perplexity_stderr=1.2e6, acc=0.37),
        task("heldout_continuation", 1028, acc=0.4432, acc_stderr=0.0155, bits_per_byte=2.2),
    )
    several = ["r=3,3,3,3,3,3", "r=2,2,1,1,1,1", "r=0", "a-model"]
    for models in (["teacher"], ["teacher", "SmolLM2-135M-Instruct"], several):
        text = printed(evaluation_table(dict.fromkeys(models, measured)), width=width)
        names = ["lambada_openai", "heldout_continuation", "perplexity", "acc *", "bits_per_byte"]
        numbers = ["6.2e+07 ± 1.2e+06", "0.4432 ± 0.0155"]
        for part in [*names, *numbers, *(models if len(models) > 1 else [])]:
            assert part in text
        assert text.count(numbers[0]) == len(models)
        assert all(len(line.rstrip()) <= width for line in text.splitlines())

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
    assert all(len(line.rstrip()) <= width for line in text.splitlines())

    values = tuple(tuple(0.0123 / (r + 1) for r in range(6)) for _ in range(3))
    errors = tuple(tuple(value / 50 for value in row) for row in values)
    table = InfluenceTable(metric="cosine", value_rows=values, error_rows=errors, num_tokens=64)
    text = printed(*influence_tables(table), width=width)
    assert all(f"correction {number}" in text for number in range(1, 7))
    assert text.count("0.01230 ± 0.00025") + text.count("0.0123 ± 0.00025") == 3
    assert text.count("Influence (cosine") == 1


def test_tables_of_influence_read_as_stored(tmp_path):
    values = ((0.05234, 3e-5), (0.5, 0.0123))
    errors = ((0.00021, 2e-6), (0.0, math.nan))  # A single batch has no error.
    influence = ((0.04, 0.02, 0.01), (0.5,))
    residuals = ((0.8, 0.4, 0.2), (0.25,))
    of_layers = InfluenceTable("cosine", influence, influence, 64, residuals, (0.31, 0.024))
    tables = {
        "errors": InfluenceTable("loss", values, errors, 64),
        "residuals and whole layers": of_layers,
        "neither": replace(of_layers, residual_rows=(), layer_values=()),
    }
    parts = {}
    for title, table in tables.items():
        parts[title] = printed(*influence_tables(table), width=80).splitlines()
        parts[f"{title}, Markdown"] = influence_table(table).to_markdown().splitlines()
    assert_as_stored("influence.txt", parts, tmp_path)


def test_the_table_says_which_layers_are_left_out_where_the_label_says_how_many(sample_results):
    which = {"27 of 30 layers": "0*4,x*3,0*23", "0,x,0": "0,x,0"}
    results = [
        trial.model_copy(update={"label": label, "teacher_schedule": schedule})
        for trial, (label, schedule) in zip(sample_results[1:], which.items(), strict=False)
    ]
    table = models_table(sample_front([sample_results[0], *results])).to_markdown().splitlines()
    head, _, *rows = [line.split(" | ") for line in table if " | " in line]
    column = head.index("left out (x)")
    cells = {row[0].strip("|* "): row[column].strip("* ") for row in rows}
    assert cells["27 of 30 layers"] == "0*4,x*3,0*23"
    assert cells["0,x,0"] == cells["teacher"] == "", "its label says it"
    assert "left out" not in models_table(sample_front(sample_results)).to_markdown()
