"""A section for a whole node: all of its GPUs in one training, and what ends one.

On a machine without GPUs, two CPU workers rehearse it. Each training is a command as a user types
it, in a process of its own; a rank fails by what a machine does to it: a killed process, or a file
that it cannot write.
"""

from __future__ import annotations

import resource
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from benchmarks.gpu.commands import Commands, Run
from benchmarks.gpu.report import (
    NUM_COMPARED,
    ROUNDED_LOSS,
    Finding,
    Setup,
    Skipped,
    problem_unless,
)
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints

END_SECONDS = 60
"""Longest time until the failure of one rank has ended or restarted all."""


def node(setup: Setup) -> Iterator[Finding]:
    """Train on all GPUs, lose a rank, and stop.

    Raises:
        Skipped: If there is one GPU.
    """
    on_gpus = setup.device == "cuda"
    number = setup.num_gpus if on_gpus else 2
    if number < 2:
        raise Skipped("needs 2 GPUs, and this machine has 1")
    commands, count = Commands(setup, "node"), "--gpus" if on_gpus else "--workers"
    steps = 6 if setup.is_toy else 50
    short = _steps(steps)
    commands.run("pretrain", "--name", "one", count, "1", settings=short)
    one = commands.run_record("one")
    alone, compared = one.values("train/loss"), sorted(one.values("train/loss"))[:NUM_COMPARED]
    yield Finding(what="one worker", figures={"tokens/s": _tokens_per_second(one)})
    all_workers = ["pretrain", count, str(number)]
    for parallel in ("ddp", "fsdp"):
        settings = {**short, "cluster.parallel": parallel}
        commands.run(*all_workers, "--name", parallel, settings=settings)
        run = commands.run_record(parallel)
        ours, tolerance = run.values("train/loss"), ROUNDED_LOSS if on_gpus else 1e-4
        difference = max(abs(ours[step] - alone[step]) for step in compared)
        differ = f"losses differ by {difference:.2g} nats from those of one worker"
        problem = problem_unless(difference, tolerance, differ)
        if (started := run.events("started")[0]["num_workers"]) != number:
            problem = f"it ran with {started} workers"
        yield Finding(
            what=f"{number} workers, {parallel}",
            figures={
                "tokens/s": _tokens_per_second(run),
                "all / one": _tokens_per_second(run) / _tokens_per_second(one),
                "largest loss difference": difference,
                "checkpoint (s)": max(event["seconds"] for event in run.events("checkpoint")),
            },
            problem=problem,
        )
    # A toy step takes a millisecond, and the training must not end before it is disturbed.
    long = _steps(steps * (100 if setup.is_toy else 6), steps)
    yield from _failures(commands, [*all_workers, "--name"], long)


def _steps(steps: int, every: int | None = None) -> dict[str, Any]:
    settings = {f"training.{name}": steps for name in ("num_steps", "validate_every_steps")}
    return {**settings, "training.checkpoint_every_steps": every or steps}


def _tokens_per_second(run: Run) -> float:
    values = list(run.values("train/tokens_per_second").values())
    return statistics.median(values[len(values) // 2 :])


class _Once:
    """Acts once on the workers of a command that runs, and says when."""

    def __init__(
        self, run: Run, act: Callable[[subprocess.Popen[bytes], list[psutil.Process]], None]
    ) -> None:
        self.run, self.act, self.at = run, act, 0.0

    def __call__(self, command: subprocess.Popen[bytes]) -> None:
        if self.at or not find_checkpoints(self.run.folder):
            return
        first = {event["pid"] for event in self.run.events("started")}
        children = psutil.Process(command.pid).children(recursive=True)
        workers = [child for child in children if "TrainWorker" in " ".join(child.cmdline())]
        self.at = time.monotonic()
        self.act(command, sorted(workers, key=lambda worker: worker.pid not in first))

    @property
    def seconds(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.at


def _failures(commands: Commands, call: list[str], settings: dict[str, Any]) -> Iterator[Finding]:
    """Kill one rank, which resumes; let another fail; and end a training by SIGTERM."""

    def kill(_: subprocess.Popen[bytes], workers: list[psutil.Process]) -> None:
        workers[-1].kill()

    def refuse_files(_: subprocess.Popen[bytes], workers: list[psutil.Process]) -> None:
        # The first rank writes checkpoints, so its next one is an error.
        workers[0].rlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    def terminate(command: subprocess.Popen[bytes], _: list[psutil.Process]) -> None:
        command.send_signal(signal.SIGTERM)

    for what, act, code in (
        ("one rank killed", kill, 0),
        ("an error on one rank", refuse_files, 1),
        ("SIGTERM", terminate, 130),
    ):
        run = commands.run_record(what.replace(" ", "-"))
        once = _Once(run, act)
        arguments = [*call, run.folder.name]
        commands.run(*arguments, settings=settings, watch=once, expected=code)
        figures: dict[str, Any] = {"until the end (s)": once.seconds}
        resumed = run.events("resumed")
        if code == 0:
            figures = {"resumed after step": resumed[0]["step"] if resumed else "never"}
        problem = None
        if not once.at:
            problem = "the training ended before anything was done to it"
        elif code == 0 and not resumed:
            problem = "no worker resumed"
        elif code and once.seconds > END_SECONDS:
            problem = f"it took longer than {END_SECONDS} s"
        elif code and (run.folder / DONE_NAME).exists():
            problem = "it trained to its end"
        elif not find_checkpoints(run.folder):
            problem = "nothing was saved"
        yield Finding(what=what, figures=figures, problem=problem)
