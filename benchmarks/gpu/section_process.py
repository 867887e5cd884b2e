"""A section in a process of its own: `python -m benchmarks.gpu.section_process NAME`, the setup on
standard input.

After an illegal memory access or a hanging collective operation, a process cannot use its GPU any
more, and what a section allocated is free for the next one only when its process has ended. Each
line of standard output is a finding, the last one the section's end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.gpu.finding import Finding, Section, SectionResult
from benchmarks.gpu.sections import SECTIONS, run_section
from benchmarks.gpu.setup import Setup

_ROOT = Path(__file__).resolve().parent.parent.parent
NUM_LINES_SHOWN = 20
"""Last lines of the output of a process that died."""


def run_in_process(
    section: Section, setup: Setup, *, limit_seconds: float | None = None
) -> SectionResult:
    """Run a section in a new process; after its time limit, end it and all that it started.

    Args:
        limit_seconds: The section's own limit if None.
    """
    limit = 60 * section.limit_minutes if limit_seconds is None else limit_seconds
    started = time.monotonic()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.section_process", section.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=_ROOT,
            env=_environment(setup),
        )
        timer = threading.Timer(limit, _end_family, [process.pid])
        timer.start()
        request = {**asdict(setup), "folder": str(setup.folder)}
        output, _ = process.communicate(json.dumps(request).encode())
        was_ended = not timer.is_alive()
        timer.cancel()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
    records = [json.loads(line) for line in output.splitlines() if line.endswith(b"}")]
    findings = tuple(Finding(**record["finding"]) for record in records if "finding" in record)
    end: dict[str, Any] = next((record["end"] for record in records if "end" in record), {})
    if not end:
        reason = f"its process ended with exit code {process.returncode}"
        if was_ended:
            reason = f"it took longer than {limit / 60:g} minutes and was ended"
        end = {"error": reason, "details": "\n".join(lines[-NUM_LINES_SHOWN:])}
    return SectionResult(
        name=section.name,
        question=section.question,
        findings=findings,
        seconds=time.monotonic() - started,
        **end,
    )


def _environment(setup: Setup) -> dict[str, str]:
    # Parts that use a GPU if there is one find none.
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if setup.device == "cpu" else {})}


def _end_family(pid: int) -> None:
    """Kill a process and its descendants, such as the processes of its Ray."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
        for member in [psutil.Process(pid), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def main(name: str) -> None:
    """Run a section and write its findings."""
    request = json.loads(sys.stdin.read())
    setup = Setup(**{**request, "folder": Path(request["folder"])})
    # Libraries print to standard output, too; they get standard error instead.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        result = run_section(SECTIONS[name], setup, lambda f: _write(lines, finding=asdict(f)))
        end = {"skipped": result.skipped, "error": result.error, "details": result.details}
        _write(lines, end=end)


def _write(lines: IO[str], **record: Any) -> None:
    lines.write(json.dumps(record) + "\n")
    lines.flush()


if __name__ == "__main__":
    main(sys.argv[1])
