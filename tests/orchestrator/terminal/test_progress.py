"""What a person sees, at the width of the terminal: whole words, whole names, signs of life."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from iiet.influence import InfluenceTable
from orchestrator.cli.session import open_session
from orchestrator.evaluation.cost_measurement import (
    DECODING,
    FIRST_TOKEN,
    MeasuredCost,
    RelativeTime,
)
from orchestrator.evaluation.harness.suppressed_output import suppress_output
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.benchmark_tables import cost_and_share_tables
from orchestrator.reporting.evaluation_tables import evaluation_table
from orchestrator.reporting.influence_tables import influence_terminal_table
from orchestrator.terminal.layout import print_line
from orchestrator.terminal.progress import BarProgress, PlainProgress

WIDTHS = (60, 80, 200)
SUMMARY = "accuracy 44.5 ± 1.2 %, 2.345 bits per byte, 12,345 items of all the tasks together"


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return Text.from_ansi(console.file.getvalue()).plain


@pytest.mark.parametrize("width", WIDTHS)
def test_a_finished_line_breaks_between_words(width: int) -> None:
    console = terminal(width)
    with BarProgress(console) as bar:
        bar.start("evaluate")
        bar.finish(SUMMARY)
        bar.note(SUMMARY)
    lines = [line for line in written(console).splitlines() if line.strip()]
    words = " ".join(lines[-6:]).split()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert sum("44.5 ± 1.2 %," in line for line in lines) == 2
    for word in SUMMARY.split():
        assert words.count(word) >= 2, (word, lines)


def test_a_path_stays_whole_and_a_pipe_gets_one_line() -> None:
    path = "/a/folder/" + "x" * 90
    console = terminal(80)
    print_line(console, f"the file {path} is damaged")
    assert path in written(console).splitlines()[1]
    pipe = Console(file=io.StringIO(), width=80)
    print_line(pipe, SUMMARY)
    assert written(pipe).splitlines() == [SUMMARY]


@pytest.mark.parametrize("indent", ["", "  "])
def test_a_folded_line_goes_on_below_its_beginning(indent: str) -> None:
    console = terminal(60)
    print_line(console, f"{indent}{SUMMARY}\n{SUMMARY}")
    lines = written(console).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(indent) and line[len(indent)] != " " for line in lines[:2])
    assert all(len(line) <= 60 and line[0] != " " for line in lines[2:])
    assert " ".join(" ".join(lines).split()) == f"{SUMMARY} {SUMMARY}"


class Lines(io.StringIO):
    """Says when enough lines are written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.enough = number, threading.Event()

    def write(self, text: str) -> int:
        self.number -= text.count("\n")
        if self.number <= 0:
            self.enough.set()
        return super().write(text)


def test_a_stage_that_reports_nothing_is_seen_to_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("orchestrator.terminal.progress.POLL_SECONDS", 0.01)
    out = Lines(3)
    with PlainProgress(Console(file=out, width=80)) as progress:
        progress.start("evaluate", 12000)
        assert out.enough.wait(60)
    assert out.getvalue().startswith("  evaluate: 0/12,000, 0 s so far\n")


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0.0108, 5, "0.01/5"), (2.5, 5, "2.5/5"), (17410, 32768, "17,410/32,768")],
)
def test_a_part_of_a_trial_is_shown_as_people_read_it(
    monkeypatch: pytest.MonkeyPatch, done: float, total: float, shown: str
) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", 0.0)
    out = io.StringIO()
    with PlainProgress(Console(file=out, width=80)) as progress:
        progress.start("sweep", total)
        progress.advance(done)
    assert out.getvalue().startswith(f"  sweep: {shown}, ")


def test_what_is_told_while_libraries_are_quiet_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.terminal.progress.SECONDS_BETWEEN_LINES", -1.0)
    with open_session(tmp_path, "evaluate", verbose=True) as session:
        session.progress.start("evaluate", 10)
        with suppress_output():
            session.progress.advance(5)
    assert "evaluate: 5/10" in capsys.readouterr().out


def test_the_bar_shows_no_share_before_anything_is_done() -> None:
    console = terminal(100)
    with BarProgress(console) as bar:
        bar.start("pretrain", 100)
        bar.advance(0, "starting Ray")
        assert bar._bar is not None
        bar._bar.refresh()
        assert "starting Ray" in written(console)
        assert "%" not in written(console)
        bar.advance(25)
        bar._bar.refresh()
        assert "25%" in written(console)


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
def test_an_evaluation_breaks_no_name_and_no_number(models: list[str], width: int) -> None:
    console = terminal(width)
    console.print(evaluation_table(dict.fromkeys(models, EVALUATION)))
    text = written(console).replace("\u00a0", " ")
    wanted = ["lambada_openai", "heldout_continuation", "perplexity", "acc *", "bits_per_byte"]
    numbers = ["6.2e+07 ± 1.2e+06", "0.4432 ± 0.0155"]
    for part in [*wanted, *numbers, *(models if len(models) > 1 else [])]:
        assert part in text
    assert text.count(numbers[0]) == len(models)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_an_influence_of_many_corrections_is_shown_in_parts(width: int) -> None:
    rows = tuple(tuple(0.0123 / (r + 1) for r in range(6)) for _ in range(3))
    errors = tuple(tuple(value / 50 for value in row) for row in rows)
    table = InfluenceTable(metric="cosine", value_rows=rows, error_rows=errors, num_tokens=64)
    console = terminal(width)
    console.print(influence_terminal_table(table))
    text = written(console).replace("\u00a0", " ")
    assert all(f"correction {number}" in text for number in range(1, 7))
    assert text.count("0.01230 ± 0.00025") + text.count("0.0123 ± 0.00025") == 3
    assert text.count("Influence (cosine") == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_costs_break_no_name_and_no_number(width: int) -> None:
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
    text = written(console)
    for part in ("1234.50 ± 12.30", "123.40 ± 1.20", "64,321", "1,024.00", "50.0 ± 1.0"):
        assert part in text
    assert text.count("r=2,2,1,1,1,1") == text.count("8 x 1024") / 2 >= 3
