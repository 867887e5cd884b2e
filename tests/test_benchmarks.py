"""The benchmarks run at toy size, check what they compare, and judge correctly.

Times are not tested. Sections of a GPU machine run on a CPU; verdicts follow from their rows.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import CONTEXT, ONE_THREAD
from gguf_files import tiny_llama, write_llama

from benchmarks.__main__ import CPU_SECTIONS, GPU_SECTIONS, main
from benchmarks.gpu.training import counted_waits
from benchmarks.mix import StepSize, largest_difference
from benchmarks.report import RATIO, Goal, Row, SectionResult, checked, to_dict, to_markdown
from benchmarks.runner import Section, Setup, Skipped, run_in_process, run_section
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns

LONG = ("cpu training", "cpu saving", "cpu sweep", "gpu evaluation")
LONG += ("gpu resume", "gpu node", "gpu sweep", "gpu recipes", "gpu retrofit", "gpu network")
"""Sections that train much, or start processes."""
SLOW = ("gpu speed", "cpu mix", "gpu tokenizing")
SLOW += ("cpu decoding", "gpu decoding", "cpu speculation", "gpu parity")
SECTIONS = {f"cpu {name}": section for name, section in CPU_SECTIONS.items()}
SECTIONS |= {f"gpu {name}": section for name, section in GPU_SECTIONS.items()}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Setup:
    folder = tmp_path_factory.mktemp("report")
    return Setup(is_toy=True, folder=folder, report_folder=folder)


@pytest.fixture
def _forked(monkeypatch) -> None:
    """Let processes be forked from one that has imported everything, where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.update(ONE_THREAD)
        monkeypatch.setattr(multiprocessing, "get_context", lambda *_: CONTEXT)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long if n in LONG else [pytest.mark.slow] * (n in SLOW))
        for n in SECTIONS
    ],
)
def test_a_section_checks_and_measures_at_toy_size(name, toy):
    result = run_section(SECTIONS[name], toy)
    assert (result.status, result.problems) == ("passed", []), result.details
    measured = [row for row in result.rows if row.figures]
    assert measured
    assert all(row.met is None for row in measured), "a tiny size has no goal"
    if name.startswith("cpu"):
        checks = [row for row in result.rows if row.what.startswith("checked: ")]
        assert checks, "nothing was checked to be equal"
        for spread in (row.figures[RATIO] for row in measured if RATIO in row.figures):
            assert isinstance(spread, Spread)
            assert 0 < spread.low <= spread.median <= spread.high < math.inf


@pytest.mark.parametrize("skipped", [{"network", "node"}, {"resume"}])
def test_the_sections_of_a_gpu_machine_take_less_than_an_hour(skipped):
    """With one GPU no workers talk; with several, one of them is killed instead of a whole run."""
    limits = [s.limit_minutes for name, s in GPU_SECTIONS.items() if name not in skipped]
    assert sum(limits) < 60


@pytest.mark.slow
@pytest.mark.usefixtures("_forked")
def test_the_command_measures_a_file_and_writes_both_reports(tmp_path, capsys):
    file = write_llama(tmp_path / "tiny.gguf", tiny_llama())
    assert main(["decoding", "--quick", "--gguf", str(file), "--to", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "cpu-report.json").read_text())
    [section] = stored["sections"]
    assert (section["name"], section["status"]) == ("decoding", "passed")
    assert (stored["machine"]["torch"], stored["machine"]["PyTorch threads"]) == (
        torch.__version__,
        1,
    )
    report = (tmp_path / "cpu-report.md").read_text()
    printed_text = capsys.readouterr().out
    assert "| [decoding](#decoding) |" in report
    for text in (report, printed_text):
        assert "2 layers, weights of tiny.gguf" in text
    assert main(["parity", "--gpu", "--quick", "--to", str(tmp_path)]) == 0
    assert "mean nothing" in (tmp_path / "gpu-report.md").read_text()


def test_mistakes_are_named_before_anything_runs(tmp_path, capsys):
    cases = [
        (["mixx"], ("mixx", *CPU_SECTIONS)),
        (["--gpu", "--quick", "sped"], ("sped", *GPU_SECTIONS)),
        (["--threads", "0"], ("--threads", "0")),
        (["--to", str(tmp_path / "missing")], ("--to", "missing")),
        (["decoding", "--gguf", str(tmp_path / "missing.gguf")], ("--gguf", "no such file")),
        (["mix", "--gguf", str(Path(__file__))], ("benchmarks decoding --gguf",)),
    ]
    if not torch.cuda.is_available():
        cases.append((["--gpu"], ("CUDA", "--gpu --quick")))
    for arguments, words in cases:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        printed_text = capsys.readouterr().err
        assert all(word in printed_text for word in words), printed_text


def test_turns_rotate_and_paired_ratios_ignore_a_machine_that_slows_down():
    ran = ""
    slowness = [1.0, 1.0, 9.0, 2.0, 4.0]  # Of the machine, by repetition.
    now = 0.0

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


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("at most", 0.6), True),
        (Goal("at most", 0.59), False),
        (Goal("at least", 0.6), True),
        (Goal("at least", 0.61), False),
        (None, None),
    ],
)
def test_a_goal_judges_the_median(goal, met):
    row = Row(what="", figures={RATIO: Spread(0.6, 0.1, 0.9)}, goal=goal)
    assert row.met is met
    assert ("missed" in row.verdict) == (met is False)


def test_programs_that_differ_are_not_timed(monkeypatch):
    assert "1.0e-12" in checked("a and b", 1e-12, 1e-9).what
    for difference in (1e-6, math.nan, math.inf):
        with pytest.raises(ArithmeticError, match="a and b differ"):
            checked("a and b", difference, 1e-9)
    size = StepSize(num_layers=3, dim=16, num_tokens=16, vocab_size=32)
    assert (
        max(largest_difference(size, name) for name in ("stacked", "summed", "checkpointed")) < 1e-9
    )
    monkeypatch.setattr(
        "benchmarks.mix.torch.tensordot",
        lambda weights, stacked, dims: torch.einsum("k,k...->...", weights.flip(0), stacked),
    )
    assert largest_difference(size, "stacked") > 1e-3


def test_a_gradient_that_differs_fails_the_section(toy, monkeypatch):
    backward = torch.autograd.backward
    calls = iter(range(100))

    def spoiled(loss: torch.Tensor) -> None:
        is_bf16_of_vanilla = next(calls) == 2
        backward(-loss if is_bf16_of_vanilla else loss)

    monkeypatch.setattr(torch.autograd, "backward", spoiled)
    result = run_section(GPU_SECTIONS["parity"], toy)
    assert result.status == "failed"
    assert result.problems == ["vanilla, bf16: wrong gradient"]


def section(measure: object) -> Section:
    return Section(measure, limit_minutes=1, question="?")


def failing(_: Setup) -> Iterator[Row]:
    yield Row(what="first", figures={"value": 1.0})
    raise RuntimeError("an illegal memory access\nand a long explanation")


def skipping(_: Setup) -> Iterator[Row]:
    raise Skipped("needs 2 GPUs, and this machine has 1")
    yield


def killed(_: Setup) -> Iterator[Row]:
    yield Row(what="first", figures={"value": 1.0})
    print("a last word", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_found_before_an_error_is_kept_and_a_skipped_section_says_why(toy):
    result = run_section(section(failing), toy)
    assert [row.what for row in result.rows] == ["first"]
    assert result.status == "failed"
    assert result.reasons == ["RuntimeError: an illegal memory access"]
    assert "Traceback" in result.details
    result = run_section(section(skipping), toy)
    assert result.status == "skipped"
    assert "2 GPUs" in result.reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("_forked")
def test_a_section_whose_process_dies_or_takes_too_long_keeps_what_it_found(toy):
    result = run_in_process(section(killed), toy)
    assert [row.what for row in result.rows] == ["first"]
    assert result.reasons[0].endswith("exit code -9")
    assert "a last word" in result.details
    result = run_in_process(GPU_SECTIONS["parity"], toy, limit_seconds=0.2)
    assert result.status == "failed"
    assert "took longer than" in result.reasons[-1]


def test_waits_are_counted_by_step_and_place():
    text = "called a synchronizing CUDA operation"
    with counted_waits() as (steps, end_step):
        for number in (2, 0, 3):
            for _ in range(number):
                warnings.warn(text, stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
            end_step()
    assert [step.total() for step in steps] == [2, 0, 3]
    [(place, count)] = steps[2].items()
    assert place.startswith(f"{Path(__file__).name}:")
    assert count == 3


def test_the_report_shows_verdicts_first_and_every_problem():
    rows = (
        Row(what="a", figures={"ms": 12.345, "GB/s": 2345.6}),
        Row(what="b", figures={"ms": 1.0}, problem="too | slow"),
        Row(what="c", skipped="no memory"),
        Row(what="d", figures={"nats": 0.5, "bits": math.nan}),
    )
    result = SectionResult(name="speed", question="How fast?", rows=rows, seconds=3.2)
    text = to_markdown([result], {"name": "A card", "driver": "1.2"})
    lines = text.splitlines()
    assert lines[0] == "# Report of A card"
    verdict = next(line for line in lines if line.startswith("| [speed](#speed)"))
    assert "| failed | 3 |" in verdict
    assert "b: too \\| slow" in verdict
    assert "| a | 12.3 | 2,346 |  |" in lines
    assert "| b | 1 | failed |" in lines
    assert "- c: not measured, no memory" in lines
    assert "| d | 0.5 | nan |  |" in lines, "other columns are another table"
    [stored] = to_dict([result], {})["sections"]
    assert (stored["status"], stored["problems"]) == ("failed", ["b: too | slow"])
    assert "NaN" not in json.dumps(stored), "JSON has no such number"
