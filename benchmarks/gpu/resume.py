"""A training that is killed after its first checkpoint and resumed, against one that is not.

Both are `iiet-orch pretrain`. The second run gets SIGKILL, and the same command again. On a CPU its
losses and weights must be bitwise those of the first; on a GPU they agree up to rounding, because
some kernels add in another order each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.gpu.commands import Commands, RunRecord
from benchmarks.gpu.finding import Finding
from benchmarks.gpu.setup import Setup
from iiet.weights import WEIGHTS
from orchestrator.workspace.layout import find_checkpoints

LOSS_TOLERANCE = 2e-2
"""On GPUs: largest difference of the two runs' losses, in nats."""
WEIGHT_TOLERANCE = 1e-2
"""On GPUs: relative difference of the weights after the last step."""


def resume(setup: Setup) -> Iterator[Finding]:
    """Compare losses and last weights of both runs."""
    commands = Commands(setup.folder / "resume")
    settings = {**setup.command_settings, **_steps(setup)}
    # Ray takes seconds to start, which a toy does not have.
    place = ["--gpus", "1"] if setup.device == "cuda" else ["--local"]
    commands.run("pretrain", "--name", "whole", *place, settings=settings)
    whole, killed = commands.run_record("whole"), commands.run_record("killed")
    again = ["pretrain", "--name", "killed", *place]
    commands.kill_when(lambda: bool(find_checkpoints(killed.folder)), *again, settings=settings)
    seconds = commands.run(*again, settings=settings)
    resumed = [event["step"] for event in killed.events("resumed")]
    if not resumed:
        yield Finding(what="resumed", problem="it started from the beginning, or never stopped")
        return
    yield Finding(
        what="resumed", figures={"after step": resumed[0], "whole second command (s)": seconds}
    )
    yield _losses(setup, whole, killed)
    yield _weights(setup, whole.folder, killed.folder)


def _losses(setup: Setup, whole: RunRecord, killed: RunRecord) -> Finding:
    ours, theirs = killed.values("train/loss"), whole.values("train/loss")
    if ours.keys() != theirs.keys():
        return Finding(what="losses", problem="the runs recorded other steps")
    difference = max(abs(ours[step] - theirs[step]) for step in theirs)
    tolerance = LOSS_TOLERANCE if setup.device == "cuda" else 0.0
    return Finding(
        what=f"losses of {len(theirs)} steps",
        figures={"largest difference": difference, "tolerance": tolerance},
        problem=None if difference <= tolerance else f"they differ by {difference:.2g} nats",
    )


def _weights(setup: Setup, whole: Path, killed: Path) -> Finding:
    ours, theirs = (load_file(find_checkpoints(run)[-1] / WEIGHTS) for run in (killed, whole))
    flat = [torch.cat([w[name].double().flatten() for name in theirs]) for w in (ours, theirs)]
    difference = ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
    tolerance = WEIGHT_TOLERANCE if setup.device == "cuda" else 0.0
    return Finding(
        what="weights after the last step",
        figures={"relative difference": difference, "tolerance": tolerance},
        problem=None if difference <= tolerance else f"they differ by {difference:.2g}",
    )


def _steps(setup: Setup) -> dict[str, int]:
    steps, every = (120, 30) if setup.is_toy else (60, 20)
    return {
        "training.num_steps": steps,
        "training.checkpoint_every_steps": every,
        "training.validate_every_steps": steps,
    }
