"""All sections, in the order of the report: what is right comes before what is fast."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from benchmarks.gpu import decoding, evaluation, parity, resume, speed, steps, sweep, workers
from benchmarks.gpu.finding import Finding, Section, SectionResult, Skipped
from benchmarks.gpu.setup import Setup

SECTIONS: dict[str, Section] = {
    section.name: section
    for section in (
        Section(
            name="parity",
            question="Are logits, loss and gradients those of the CPU?",
            measure=parity.parity,
            limit_minutes=4,
        ),
        Section(
            name="synchronizations",
            question="How often does a training step wait for the GPU?",
            measure=steps.synchronizations,
            limit_minutes=4,
        ),
        Section(
            name="compiled",
            question="Does the compiled model train equally, and how much faster?",
            measure=steps.compiled,
            limit_minutes=8,
        ),
        Section(
            name="speed",
            question="Tokens per second, MFU, and does memory agree with the plan?",
            measure=speed.speed,
            limit_minutes=14,
        ),
        Section(
            name="resume",
            question="Does a killed training resume to the same result?",
            measure=resume.resume,
            limit_minutes=6,
        ),
        Section(
            name="workers",
            question="Do two workers (DDP, FSDP) train as one, and how much faster?",
            measure=workers.workers,
            limit_minutes=6,
        ),
        Section(
            name="sweep",
            question="Does a sweep of two trials use its GPUs?",
            measure=sweep.sweep,
            limit_minutes=6,
        ),
        Section(
            name="decoding",
            question="How far is decoding from the memory bandwidth; does L2 keep a layer?",
            measure=decoding.decoding,
            limit_minutes=5,
        ),
        Section(
            name="evaluation",
            question="How many items per second does an evaluation score?",
            measure=evaluation.evaluation,
            limit_minutes=4,
        ),
    )
}


def run_section(
    section: Section, setup: Setup, keep: Callable[[Finding], None] | None = None
) -> SectionResult:
    """Run a section in this process; an error becomes part of its result.

    Args:
        keep: Called with each finding as soon as it is made.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    skipped = error = None
    details = ""
    try:
        for finding in section.measure(setup):
            findings.append(finding)
            if keep:
                keep(finding)
    except Skipped as reason:
        skipped = str(reason)
    except Exception as problem:  # The report shows it, and the other sections still run.
        error = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        details = traceback.format_exc()
    return SectionResult(
        name=section.name,
        question=section.question,
        findings=tuple(findings),
        seconds=time.monotonic() - started,
        skipped=skipped,
        error=error,
        details=details,
    )
