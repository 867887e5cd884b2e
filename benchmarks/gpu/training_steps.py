"""Runs a training in this process as `iiet-orch pretrain` does, and times its steps."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.gpu.setup import Setup
from orchestrator.records.training import TrainingJob
from orchestrator.training.run import run_job
from orchestrator.workspace.journal import read_journal


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The measurements of a training."""

    losses: list[float]
    seconds: list[float]
    """Seconds of each step except the first, validation not included."""
    first_seconds: float
    """Seconds from the call to the end of the first step."""
    metrics: list[Mapping[str, float]]
    """What the training reported at each step."""
    compile_seconds: float
    """Seconds that the compiler took, by the journal; 0 without one."""
    compiler_problem: str
    """Why a training that was to be compiled was not; empty if there was no problem."""

    @property
    def settled_seconds(self) -> float:
        """Median seconds of a step in the second half."""
        return statistics.median(self.seconds[len(self.seconds) // 2 :])

    def settled(self, metric: str) -> float | None:
        """Median of a metric in the second half; None if it was not reported."""
        values = [found[metric] for found in self.metrics if metric in found]
        return statistics.median(values[len(values) // 2 :]) if values else None


def run_steps(
    setup: Setup, job: TrainingJob, *, on_step: Callable[[], None] | None = None
) -> Steps:
    """Train a job of at least three steps, and delete what it wrote (gigabytes at full size).

    Args:
        on_step: Called at the end of each step.
    """
    times: list[float] = [time.perf_counter()]
    metrics: list[Mapping[str, float]] = []

    def report(_: int, numbers: Mapping[str, float]) -> None:
        # Reported before the validation of the step.
        if "train/loss" in numbers:
            times.append(time.perf_counter())
            metrics.append(numbers)
            if on_step:
                on_step()

    run_job(job, world=setup.world, report=report)
    events = [record for record in read_journal(job.folder)[0] if "name" in record]
    problems = [event["text"] for event in events if event["name"] == "not compiled"]
    compilations = [event["seconds"] for event in events if event["name"] == "compiled"]
    shutil.rmtree(job.folder)
    each = [after - before for before, after in pairwise(times)]
    return Steps(
        losses=[numbers["train/loss"] for numbers in metrics],
        seconds=each[1:],
        first_seconds=each[0],
        metrics=metrics,
        compile_seconds=sum(compilations),
        compiler_problem="".join(problems),
    )
