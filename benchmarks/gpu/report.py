"""A section of the report, the process that it runs in, and the report as Markdown and JSON.

After an illegal memory access or a hanging collective operation, a process cannot use its GPU any
more, and what a section allocated is free for the next one only when its process has ended. So
each section has a process of its own and a time limit, and sends each finding as soon as it is
made: what it found before a crash is in the report.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from orchestrator.data.preparation import prepare
from orchestrator.reporting.sections import bullets, markdown_table
from orchestrator.settings import DataSettings
from orchestrator.training.devices import World
from orchestrator.workspace.errors import first_line
from orchestrator.workspace.layout import open_workspace

Figure = float | int | str
TOY_MODEL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 400}
ROUNDED_LOSS = 2e-2
"""Largest difference of losses, in nats, of trainings that differ by bf16's rounding."""
NUM_COMPARED = 10
"""First steps whose losses are compared one by one: later, rounding has been amplified."""
NUM_LINES_SHOWN = 20
"""Last lines of the output of a process that died."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and at which size all sections run."""

    device: Literal["cpu", "cuda"]
    num_gpus: int
    """GPUs of this machine; 0 if the sections run on the CPU."""
    is_toy: bool
    """Tiny sizes, which only test the sections."""
    folder: Path
    """Workspace of all sections."""

    @property
    def world(self) -> World:
        """A single worker on the device."""
        return World(device="cuda:0" if self.device == "cuda" else "cpu")

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """Arithmetic of trainings on this device, as settings choose it."""
        return "bf16" if self.device == "cuda" else "fp32"

    @property
    def data(self) -> DataSettings:
        """The English texts that come with Python."""
        return DataSettings(max_documents=250, vocab_size=400) if self.is_toy else DataSettings()

    def tokens(self) -> Path:
        """Return the folder of prepared tokens; the first call prepares them."""
        return prepare(self.data, open_workspace(self.folder))


class Skipped(Exception):
    """A section cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One measurement: a row of its section's table."""

    what: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Column, with its unit, to value."""
    problem: str | None = None
    """Why the measurement fails; None if it is as it must be."""
    skipped: str | None = None
    """Why it was not made."""


def problem_unless(difference: float, tolerance: float, problem: str) -> str | None:
    """Return the problem unless the difference is within the tolerance; NaN is not."""
    return None if difference <= tolerance else problem


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report."""

    name: str
    question: str
    measure: Callable[[Setup], Iterator[Finding]]
    """Yields findings one by one; raises `Skipped`."""
    limit_minutes: float
    """Time after which it is ended."""


@dataclass(frozen=True, kw_only=True)
class SectionResult:
    """What became of a section."""

    name: str
    question: str
    findings: tuple[Finding, ...]
    seconds: float
    skipped: str | None = None
    error: str | None = None
    """Why it did not come to its end, in one line."""
    details: str = ""
    """The traceback, or the end of the process's output."""

    @property
    def problems(self) -> list[str]:
        """What failed: the section's own error last."""
        found = [f"{f.what}: {f.problem}" for f in self.findings if f.problem]
        return [*found, self.error] if self.error else found

    @property
    def status(self) -> Literal["passed", "failed", "skipped"]:
        """`failed` with any problem; `skipped` if nothing was measured."""
        if self.problems:
            return "failed"
        return "skipped" if all(finding.skipped for finding in self.findings) else "passed"

    @property
    def reasons(self) -> list[str]:
        """Why it failed, or what was skipped."""
        skipped = dict.fromkeys(f.skipped for f in self.findings if f.skipped)
        return self.problems or [*([self.skipped] if self.skipped else []), *skipped]


def run_section(
    section: Section, setup: Setup, keep: Callable[[Finding], None] = lambda _: None
) -> SectionResult:
    """Run a section in this process; an error becomes part of its result.

    Args:
        keep: Called with each finding as soon as it is made.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    outcome: dict[str, str] = {}
    try:
        for finding in section.measure(setup):
            findings.append(finding)
            keep(finding)
    except Skipped as reason:
        outcome["skipped"] = str(reason)
    except Exception as error:  # The report shows it, and the other sections still run.
        outcome["error"] = first_line(error, with_type=True)
        outcome["details"] = traceback.format_exc()
    return _result(section, findings, started, **outcome)


def _result(
    section: Section, findings: Sequence[Finding], started: float, **outcome: str
) -> SectionResult:
    return SectionResult(
        name=section.name,
        question=section.question,
        findings=tuple(findings),
        seconds=time.monotonic() - started,
        **outcome,
    )


def run_in_process(
    section: Section, setup: Setup, *, limit_seconds: float | None = None
) -> SectionResult:
    """Run a section in a new process; after its time limit, end it and all that it started.

    Args:
        limit_seconds: The section's own limit if None.
    """
    limit = 60 * section.limit_minutes if limit_seconds is None else limit_seconds
    started = time.monotonic()
    output = setup.folder / f"{section.name}.log"
    spawning = multiprocessing.get_context("spawn")  # A forked process cannot use CUDA.
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_run_and_send, args=(section, setup, output, sender))
    process.start()
    sender.close()

    messages: list[Finding | SectionResult] = []
    error = f"it took longer than {limit / 60:g} minutes and was ended"
    try:
        while receiver.poll(max(0.0, started + limit - time.monotonic())):
            messages.append(receiver.recv())
    except EOFError:
        process.join(timeout=60)
        error = f"its process ended with exit code {process.exitcode}"
    _end_family(process.pid)
    process.join()
    if messages and isinstance(messages[-1], SectionResult):
        return messages[-1]
    lines = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    details = "\n".join(lines.splitlines()[-NUM_LINES_SHOWN:])
    findings = [message for message in messages if isinstance(message, Finding)]
    return _result(section, findings, started, error=error, details=details)


def _run_and_send(section: Section, setup: Setup, output: Path, sender: Connection) -> None:
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sender.send(run_section(section, setup, keep=sender.send))


def _end_family(pid: int | None) -> None:
    """Kill a process and its descendants, such as the processes of its Ray."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for member in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def to_dict(results: Sequence[SectionResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain JSON values; a figure that is not finite is a string."""
    sections = [
        {**asdict(result), "status": result.status, "problems": result.problems}
        for result in results
    ]
    for finding in (finding for section in sections for finding in section["findings"]):
        finding["figures"] = {
            name: value if isinstance(value, str) or math.isfinite(value) else str(value)
            for name, value in finding["figures"].items()
        }
    return {"machine": dict(facts), "sections": sections}


def to_markdown(results: Sequence[SectionResult], facts: Mapping[str, Any]) -> str:
    """Return the report: facts, one table of verdicts, then a table for each section."""
    verdicts = [
        [
            f"[{result.name}](#{result.name})",
            result.question,
            result.status,
            f"{result.seconds:.0f}",
            "; ".join(result.reasons),
        ]
        for result in results
    ]
    heads = ["section", "question", "verdict", "seconds", "reason"]
    parts = [
        f"# GPU report: {facts['name']}",
        bullets(f"{name}: {value}" for name, value in facts.items()),
        markdown_table(heads, verdicts, left=(0, 1, 2, 4)),
    ]
    for result in results:
        parts += [f"## {result.name}", result.question]
        # One table for the findings of equal columns, so that no cell is empty.
        tables: dict[tuple[str, ...], list[list[str]]] = {}
        for finding in (finding for finding in result.findings if finding.figures):
            figures = map(_three_digits, finding.figures.values())
            row = [finding.what, *figures, "failed" if finding.problem else ""]
            tables.setdefault(tuple(finding.figures), []).append(row)
        parts += [markdown_table(["", *heads, ""], rows) for heads, rows in tables.items()]
        notes = [f"{f.what}: not measured, {f.skipped}" for f in result.findings if f.skipped]
        notes += [f"**{problem}**" for problem in result.problems]
        notes += [result.skipped] if result.skipped else []
        parts += [bullets(notes)] if notes else []
        parts += [f"```text\n{result.details.strip()}\n```"] if result.details else []
    return "\n\n".join(parts) + "\n"


def _three_digits(value: Figure) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
