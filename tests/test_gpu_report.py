"""The GPU report's sections run on a CPU at toy size, and its verdicts follow from its findings."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import training
from benchmarks.gpu.__main__ import SECTIONS
from benchmarks.gpu.report import (
    Finding,
    Section,
    SectionResult,
    Setup,
    Skipped,
    run_in_process,
    run_section,
    to_dict,
    to_markdown,
)

SKIPPED_ON_CPUS = {"synchronizations"}
START_PROCESSES = ("evaluation", "compiled", "resume", "node", "sweep")
"""Sections that start processes or a compiler."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("report")
    return Setup(device="cpu", num_gpus=0, is_toy=True, folder=folder)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n in START_PROCESSES)) for n in SECTIONS],
)
def test_a_section_passes_on_a_cpu_or_says_why_it_is_skipped(name: str, toy: Setup) -> None:
    result = run_section(SECTIONS[name], toy)
    assert result.problems == [], result.details
    assert result.status == ("skipped" if name in SKIPPED_ON_CPUS else "passed")
    if result.status == "skipped":
        assert result.reasons
    for finding in result.findings:
        assert finding.skipped or finding.figures


@pytest.mark.slow
def test_the_command_writes_both_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "parity,speed"
    arguments = ["--device", "cpu", "--size", "toy", "--sections", names, "--to", str(tmp_path)]
    assert program.main(arguments) == 0
    stored = json.loads((tmp_path / "gpu-report.json").read_text())
    assert [section["name"] for section in stored["sections"]] == names.split(",")
    assert {section["status"] for section in stored["sections"]} == {"passed"}
    assert stored["machine"]["torch"] == torch.__version__
    text = (tmp_path / "gpu-report.md").read_text()
    assert "| [parity](#parity) |" in text
    assert "pcformer" in text
    assert "toy: the figures mean nothing" in text
    assert "speed: passed" in capsys.readouterr().out


def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = ["--device", "cpu", "--size", "toy"]
    cases = [
        ([*cpu, "--sections", "sped"], ("sped", *SECTIONS)),
        ([*cpu, "--to", str(tmp_path / "missing")], ("--to", "missing")),
    ]
    if not torch.cuda.is_available():
        cases.append(([], ("CUDA", "--device cpu --size toy")))
    for arguments, words in cases:
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said


def test_a_gradient_that_differs_fails_the_section(
    toy: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = training.model_outputs
    calls = iter(range(100))

    def spoiled(*arguments: object, **options: object) -> training.Outputs:
        outputs = computed(*arguments, **options)  # type: ignore[arg-type]
        is_bf16_of_vanilla = next(calls) == 2
        return outputs._replace(gradient=-outputs.gradient) if is_bf16_of_vanilla else outputs

    monkeypatch.setattr(training, "model_outputs", spoiled)
    result = run_section(SECTIONS["parity"], toy)
    assert result.status == "failed"
    assert result.problems == ["vanilla, bf16: wrong gradient"]


def section(measure: object) -> Section:
    return Section(name="one", question="?", measure=measure, limit_minutes=1)  # type: ignore[arg-type]


def failing(_: Setup) -> Iterator[Finding]:
    yield Finding(what="first", figures={"value": 1.0})
    raise RuntimeError("an illegal memory access\nand a long explanation")


def skipping(_: Setup) -> Iterator[Finding]:
    raise Skipped("needs 2 GPUs, and this machine has 1")
    yield


def killed(_: Setup) -> Iterator[Finding]:
    yield Finding(what="first", figures={"value": 1.0})
    print("a last word", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_found_before_an_error_is_kept_and_a_skipped_section_says_why(toy: Setup) -> None:
    result = run_section(section(failing), toy)
    assert [finding.what for finding in result.findings] == ["first"]
    assert result.status == "failed"
    assert result.reasons == ["RuntimeError: an illegal memory access"]
    assert "Traceback" in result.details
    result = run_section(section(skipping), toy)
    assert (result.status, result.reasons) == ("skipped", ["needs 2 GPUs, and this machine has 1"])


@pytest.mark.slow
def test_a_section_whose_process_dies_or_takes_too_long_keeps_what_it_found(toy: Setup) -> None:
    result = run_in_process(section(killed), toy)
    assert [finding.what for finding in result.findings] == ["first"]
    assert result.reasons == ["its process ended with exit code -9"]
    assert "a last word" in result.details
    result = run_in_process(SECTIONS["parity"], toy, limit_seconds=0.2)
    assert result.status == "failed"
    assert "took longer than" in result.reasons[-1]


def test_waits_are_counted_by_step_and_place() -> None:
    text = "called a synchronizing CUDA operation"
    with training.counted_waits() as (steps, end_step):
        for number in (2, 0, 3):
            for _ in range(number):
                warnings.warn(text, stacklevel=1)
            warnings.warn("another warning", stacklevel=1)
            end_step()
    assert [step.total() for step in steps] == [2, 0, 3]
    [(place, count)] = steps[2].items()
    assert place.startswith(f"{Path(__file__).name}:")
    assert count == 3


def test_the_report_shows_verdicts_first_and_every_problem() -> None:
    findings = (
        Finding(what="a", figures={"ms": 12.345, "GB/s": 2345.6}),
        Finding(what="b", figures={"ms": 1.0}, problem="too | slow"),
        Finding(what="c", skipped="no memory"),
        Finding(what="d", figures={"nats": 0.5, "bits": math.nan}),
    )
    result = SectionResult(name="speed", question="How fast?", findings=findings, seconds=3.2)
    text = to_markdown([result], {"name": "A card", "driver": "1.2"})
    lines = text.splitlines()
    assert lines[0] == "# GPU report: A card"
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
