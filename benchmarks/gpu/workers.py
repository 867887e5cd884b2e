"""Two workers (DDP and FSDP) against one, by `iiet-orch pretrain` with the same global batch.

The losses of the first steps must agree up to rounding; the speed-up is that of the same step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from benchmarks.gpu.commands import Commands, RunRecord
from benchmarks.gpu.finding import Finding, Skipped
from benchmarks.gpu.setup import Setup

NUM_WORKERS = 2
LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Largest difference of the compared losses, in nats."""
NUM_COMPARED = 10
"""First steps whose losses are compared; later, rounding has been amplified."""


def workers(setup: Setup) -> Iterator[Finding]:
    """Train with one worker, and with two that share the model in either way.

    Raises:
        Skipped: If there is one GPU.
    """
    if setup.device == "cuda" and setup.num_gpus < NUM_WORKERS:
        raise Skipped(f"needs {NUM_WORKERS} GPUs, and this machine has {setup.num_gpus}")
    commands = Commands(setup.folder / "workers")
    count = "--gpus" if setup.device == "cuda" else "--workers"
    steps = 6 if setup.is_toy else 40
    settings = setup.command_settings | {
        "training.num_steps": steps,
        "training.validate_every_steps": steps,
        "training.checkpoint_every_steps": steps,
    }
    commands.run("pretrain", "--name", "one", count, "1", settings=settings)
    one = commands.run_record("one")
    yield Finding(what="one worker", figures={"tokens/s": _tokens_per_second(one)})
    for parallel in ("ddp", "fsdp"):
        shared = settings | {"cluster.parallel": parallel}
        arguments = ["pretrain", "--name", parallel, count, str(NUM_WORKERS)]
        commands.run(*arguments, settings=shared)
        yield _compare(setup, parallel, commands.run_record(parallel), one)


def _compare(setup: Setup, parallel: str, run: RunRecord, one: RunRecord) -> Finding:
    ours, alone = run.values("train/loss"), one.values("train/loss")
    compared = sorted(alone)[:NUM_COMPARED]
    difference = max(abs(ours[step] - alone[step]) for step in compared)
    tolerance = LOSS_TOLERANCE[setup.device]
    num_workers = run.events("started")[0]["num_workers"]
    problem = None
    if num_workers != NUM_WORKERS:
        problem = f"it ran with {num_workers} workers"
    elif not difference <= tolerance:
        problem = f"losses differ by {difference:.2g} nats from those of one worker"
    speed = _tokens_per_second(run)
    return Finding(
        what=f"{NUM_WORKERS} workers, {parallel}",
        figures={
            "tokens/s": speed,
            "two / one": speed / _tokens_per_second(one),
            f"largest loss difference, {len(compared)} steps": difference,
            "tolerance": tolerance,
        },
        problem=problem,
    )


def _tokens_per_second(run: RunRecord) -> float:
    values = list(run.values("train/tokens_per_second").values())
    return statistics.median(values[len(values) // 2 :])
