"""The benchmarks run, check what they compare, and judge goals correctly; times are not tested."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_llama, write_llama

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.mix import StepSize, build, largest_difference, written_as
from benchmarks.report import Goal, Quantity, Row, checked
from benchmarks.timing import Line, Spread, paired_ratio, stopwatch, take_turns
from iiet.methods.implicit_euler import ImplicitEuler

NUM_ROWS = {
    "mix": 4,
    "decoding": 6,
    "schedules": 8,
    "speculation": 6,
    "teacher_cache": 3,
    "training": 4,
    "evaluation": 2,
    "sweep": 4,
}
"""Rows of a quick run."""
MARKS = {
    **dict.fromkeys(("mix", "training", "evaluation"), pytest.mark.slow),  # They start processes.
    "sweep": pytest.mark.long,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=MARKS.get(n, ())) for n in BENCHMARKS],
)
def test_a_quick_run_checks_measures_and_stores(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "numbers.json"
    threads = torch.get_num_threads()
    assert main([name, "--quick", "--json", str(file)]) == 0
    assert torch.get_num_threads() == threads
    stored = json.loads(file.read_text())
    assert stored["quick"] is True
    assert stored["machine"]["threads"] == 1
    assert list(stored["benchmarks"]) == [name]
    report = stored["benchmarks"][name]
    assert len(report["rows"]) == NUM_ROWS[name]
    assert report["checks"], "nothing was checked to be equal"
    for row in report["rows"]:
        assert (row["goal"], row["met"]) == (None, None), "a tiny size has no goal"
        for quantity in row["quantities"]:
            spread = quantity["spread"]
            assert spread["low"] <= spread["median"] <= spread["high"]
        if row["ratio"] is not None:
            assert 0 < row["ratio"]["low"] <= row["ratio"]["high"] < math.inf
    printed = capsys.readouterr().out
    assert report["setting"][:40] in printed
    assert "PyTorch threads: 1" in printed


def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["mixx"], ("mixx", *BENCHMARKS)),
        (["--threads", "0"], ("--threads", "0")),
        (["--json", str(tmp_path / "missing" / "file.json")], ("--json", "missing")),
        (["decoding", "--gguf", str(tmp_path / "missing.gguf")], ("--gguf", "no such file")),
        (["mix", "--gguf", str(Path(__file__))], ("benchmarks decoding --gguf",)),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said


def test_decoding_measures_the_model_of_a_file(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", tiny_llama())
    assert main(["decoding", "--quick", "--gguf", str(file), "--json", str(tmp_path / "n")]) == 0
    report = json.loads((tmp_path / "n").read_text())["benchmarks"]["decoding"]
    assert "2 layers, weights of tiny.gguf" in report["setting"]
    assert len(report["rows"]) == 6
    assert [check.split(",")[1:3] for check in report["checks"]] == [
        [" d 64", f" batch {size}"] for size in (1, 2)
    ]


def test_tasks_take_turns_and_the_start_rotates() -> None:
    ran: list[str] = []

    def task(name: str) -> Callable[[], int]:
        def run() -> int:
            ran.append(name)
            return len(ran)

        return run

    results = take_turns({name: task(name) for name in "abc"}, repetitions=3, warm_ups=1)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"
    assert results == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_paired_ratio_ignores_a_machine_that_slows_down() -> None:
    slowness = [1.0, 1.0, 9.0, 2.0, 4.0]  # Of the whole machine, by repetition.
    now = 0.0

    def clock() -> float:
        return now

    def task(work: float) -> Callable[[], float]:
        pace: Iterator[float] = iter(slowness)

        def run() -> None:
            nonlocal now
            now += work * next(pace)

        return stopwatch(run, clock)

    seconds = take_turns({"ours": task(2.0), "theirs": task(3.0)}, repetitions=5, warm_ups=0)
    ratio = paired_ratio(seconds["theirs"], seconds["ours"])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert Spread.of(seconds["ours"]).median == pytest.approx(4.0)


def test_spread_holds_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_line_finds_start_slope_and_the_largest_residual() -> None:
    exact = Line.through([12, 18, 24], [2.5 + 0.5 * x for x in (12, 18, 24)])
    assert (exact.start, exact.slope) == pytest.approx((2.5, 0.5))
    assert exact.largest_relative_residual == pytest.approx(0.0, abs=1e-12)
    # Least squares through (0, 1), (1, 4), (2, 1) is the constant 2.
    bent = Line.through([0, 1, 2], [1, 4, 1])
    assert (bent.start, bent.slope) == pytest.approx((2.0, 0.0))
    assert bent.largest_relative_residual == pytest.approx(1.0)


def test_a_goal_judges_the_median() -> None:
    one = Quantity("one", Spread.of([1.0]), "ms")

    def row(ratio: Spread | None, goal: Goal | None) -> Row:
        return Row(what="", quantities=(one,), ratio=ratio, goal=goal)

    spread = Spread(0.6, 0.1, 0.9)
    assert row(spread, Goal("at most", 0.6)).met is True
    assert row(spread, Goal("at most", 0.59)).met is False
    assert row(spread, Goal("at least", 0.6)).met is True
    assert row(spread, Goal("at least", 0.61)).met is False
    assert row(spread, None).met is None
    assert row(None, Goal("at most", 1.0)).met is None


def test_programs_that_differ_are_not_timed() -> None:
    assert "1.0e-12" in checked("a and b", 1e-12, 1e-9)
    for difference in (1e-6, math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="a and b differ"):
            checked("a and b", difference, 1e-9)


def test_the_check_of_the_mix_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    size = StepSize(num_layers=3, dim=16, num_tokens=16, vocab_size=32)
    assert largest_difference(size, "stacked") < 1e-9
    assert largest_difference(size, "checkpointed") < 1e-9
    monkeypatch.setattr(
        "benchmarks.mix.torch.tensordot",
        lambda weights, stacked, dims: torch.einsum("k,k...->...", weights.flip(0), stacked),
    )
    assert largest_difference(size, "stacked") > 1e-3


def test_a_variant_ends_with_its_context() -> None:
    decoder, _ = build(StepSize(num_layers=2, dim=16, num_tokens=16, vocab_size=32))
    lean = ImplicitEuler.start
    for variant in ("stacked", "checkpointed"):
        with written_as(variant, decoder):
            assert (ImplicitEuler.start != lean) or decoder.activation_checkpointing
        assert ImplicitEuler.start == lean
        assert not decoder.activation_checkpointing
