"""The benchmarks run, check what they compare, and judge goals correctly; times are not tested."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_llama, write_llama

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.mix import StepSize, largest_difference
from benchmarks.report import Goal, Quantity, Row, checked
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns

START_PROCESSES = ("mix", "training", "evaluation", "sweep")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in START_PROCESSES)) for n in BENCHMARKS]
)
def test_a_quick_run_checks_measures_and_stores(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, more = tmp_path / "numbers.json", []
    if name == "decoding":
        more = ["--gguf", str(write_llama(tmp_path / "tiny.gguf", tiny_llama()))]
    assert main([name, "--quick", "--json", str(file), *more]) == 0
    stored = json.loads(file.read_text())
    assert (stored["quick"], stored["machine"]["threads"]) == (True, 1)
    [report] = stored["benchmarks"].values()
    assert report["checks"], "nothing was checked to be equal"
    assert report["rows"]
    for row in report["rows"]:
        assert (row["goal"], row["met"]) == (None, None), "a tiny size has no goal"
        for quantity in row["quantities"]:
            spread = quantity["spread"]
            assert spread["low"] <= spread["median"] <= spread["high"]
        if row["ratio"] is not None:
            assert 0 < row["ratio"]["low"] <= row["ratio"]["high"] < math.inf
    if name == "decoding":
        assert "2 layers, weights of tiny.gguf" in report["setting"]
    assert report["setting"][:40] in capsys.readouterr().out


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


def test_turns_rotate_and_paired_ratios_ignore_a_machine_that_slows_down() -> None:
    ran, slowness, now = "", [1.0, 1.0, 9.0, 2.0, 4.0], 0.0  # Of the machine, by repetition.

    def task(name: str, work: float) -> Callable[[], float]:
        pace = iter(slowness)

        def run() -> None:
            nonlocal ran, now
            ran += name
            now += work * next(pace)

        return stopwatch(run, lambda: now)

    tasks = {"a": task("a", 2.0), "b": task("b", 3.0), "c": task("c", 1.0)}
    seconds = take_turns(tasks, repetitions=4, warm_ups=1)
    assert ran == "abc" + "abc" + "bca" + "cab" + "abc"
    ratio = paired_ratio(seconds["b"], seconds["a"])
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)


def test_a_goal_judges_the_median() -> None:
    one = Quantity("one", Spread.of([1.0]), "ms")
    for goal, met in (
        (Goal("at most", 0.6), True),
        (Goal("at most", 0.59), False),
        (Goal("at least", 0.6), True),
        (Goal("at least", 0.61), False),
        (None, None),
    ):
        row = Row(what="", quantities=(one,), ratio=Spread(0.6, 0.1, 0.9), goal=goal)
        assert row.met is met


def test_programs_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "1.0e-12" in checked("a and b", 1e-12, 1e-9)
    for difference in (1e-6, math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="a and b differ"):
            checked("a and b", difference, 1e-9)
    size = StepSize(num_layers=3, dim=16, num_tokens=16, vocab_size=32)
    assert max(largest_difference(size, name) for name in ("stacked", "checkpointed")) < 1e-9
    monkeypatch.setattr(
        "benchmarks.mix.torch.tensordot",
        lambda weights, stacked, dims: torch.einsum("k,k...->...", weights.flip(0), stacked),
    )
    assert largest_difference(size, "stacked") > 1e-3
