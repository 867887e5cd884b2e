"""Sections and the processes that they run in.

After an illegal memory access or a hanging collective operation, a process cannot use its GPU any
more; on a CPU, what ran before changes times and memory. So each section has a process of its own
and a time limit, and sends each row as soon as it is measured: what it found before a crash is in
the report.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import psutil
import torch

from benchmarks.report import Row, SectionResult
from orchestrator.data.preparation import prepare
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.training.world import World
from orchestrator.workspace.errors import first_line
from orchestrator.workspace.layout import open_workspace

NUM_LINES_SHOWN = 20
"""Last lines of the output of a process that died."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Where and at which size all sections run."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_gpus: int = 0
    """GPUs of this machine; 0 if the sections run on the CPU."""
    is_toy: bool = False
    """Tiny sizes, which only test the sections; they have no goals."""
    num_threads: int = 1
    """Threads of PyTorch."""
    gguf: Path | None = None
    """The model that `decoding` measures instead of random weights."""
    folder: Path
    """Workspace of all sections."""
    report_folder: Path = Path()
    """Where the report is written, and what is kept with it."""

    @property
    def num_ranks(self) -> int:
        """Workers that train as one: as many as there are GPUs, or 2 on the CPU.

        Raises:
            Skipped: If there is one GPU.
        """
        if self.device == "cpu":
            return 2
        if self.num_gpus < 2:
            raise Skipped("needs 2 GPUs, and this machine has 1")
        return self.num_gpus

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

    def tokens(self, data: DataSettings | None = None) -> Path:
        """Return the folder of prepared tokens; the first call prepares them."""
        return prepare(data or self.data, open_workspace(self.folder), Progress())


class Skipped(Exception):
    """A section cannot run here; the message says why."""


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    measure: Callable[[Setup], Iterator[Row]]
    """Yields rows one by one; raises `Skipped`."""
    limit_minutes: float
    """Time after which it is ended."""
    question: str

    @property
    def name(self) -> str:
        return self.measure.__name__


def run_section(
    section: Section, setup: Setup, keep: Callable[[Row], None] = lambda _: None
) -> SectionResult:
    """Run a section in this process; an error becomes part of its result.

    Args:
        keep: Called with each row as soon as it is measured.
    """
    started = time.monotonic()
    rows: list[Row] = []
    outcome: dict[str, str] = {}
    try:
        for row in section.measure(setup):
            rows.append(row)
            keep(row)
    except Skipped as reason:
        outcome["skipped"] = str(reason)
    except Exception as error:  # The report shows it, and the other sections still run.
        outcome["error"] = first_line(error, with_type=True)
        outcome["details"] = traceback.format_exc()
    return _result(section, rows, started, **outcome)


def _result(section: Section, rows: Sequence[Row], started: float, **outcome: str) -> SectionResult:
    return SectionResult(
        name=section.name,
        question=section.question,
        rows=tuple(rows),
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

    messages: list[Row | SectionResult] = []
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
    rows = [message for message in messages if isinstance(message, Row)]
    return _result(section, rows, started, error=error, details=details)


def _run_and_send(section: Section, setup: Setup, output: Path, sender: Connection) -> None:
    with output.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(setup.num_threads)
    sender.send(run_section(section, setup, keep=sender.send))


def _end_family(pid: int | None) -> None:
    """Kill a process and its descendants, such as the processes of its Ray."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for member in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
