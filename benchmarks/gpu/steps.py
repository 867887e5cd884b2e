"""Fifty training steps, eager and compiled: host synchronizations, equal losses, speed.

The same data and weights in both. While the host waits for the GPU it starts no kernels, and the
GPU is idle after the wait. The loop reads the numbers of a step once, at its end; the limit allows
one wait more for each pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.synchronizations import counted_synchronizations
from benchmarks.gpu.training_steps import Steps, run_steps
from iiet.config import ModelConfig, preset
from orchestrator.records.training import TrainingJob

NUM_PASSES = 2
"""Forward and backward passes of one step."""
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest mean difference of eager and compiled losses over all steps, in nats."""
NUM_COMPARED = 10
"""First steps whose losses are compared one by one: later, rounding has been amplified."""


def synchronizations(setup: Setup) -> Iterator[Finding]:
    """Count the waits of each step of an eager training, against passes + 1."""
    allowed = NUM_PASSES + 1
    with counted_synchronizations() as counted:
        steps = run_steps(setup, steps_job(setup, "synchronizations"), on_step=counted.end_step)
    what = f"{len(steps.losses)} steps of {NUM_PASSES} passes"
    if setup.device == "cpu":
        yield Finding(what=what, skipped="the CPU has no queue to wait for; the steps ran")
        return
    later = counted.by_step[1:]  # The first step allocates and loads kernels.
    most = max(later)
    places = counted.places[1 + later.index(most)]
    yield Finding(
        what=what,
        figures={
            "waits of a step, most": most,
            "allowed": allowed,
            "first step": counted.by_step[0],
            "where": ", ".join(f"{place} ({count})" for place, count in places.most_common(8)),
        },
        problem=None if most <= allowed else f"{most} waits in a step, allowed are {allowed}",
    )


def compiled(setup: Setup) -> Iterator[Finding]:
    """Compare losses and speed of the same steps, eager and compiled."""
    eager = run_steps(setup, steps_job(setup, "eager", compile=False))
    yield _speed("eager", eager)
    fast = run_steps(setup, steps_job(setup, "compiled", compile=True))
    if fast.compiler_problem:
        yield Finding(what="compiled", problem=fast.compiler_problem)
        return
    yield _speed("compiled", fast, eager)
    differences = [abs(a - b) for a, b in zip(eager.losses, fast.losses, strict=True)]
    tolerance = LOSS_TOLERANCE[setup.precision]
    mean = fmean(differences)
    yield Finding(
        what="losses, compiled - eager",
        figures={
            "mean difference (nats)": mean,
            f"largest of the first {NUM_COMPARED}": max(differences[:NUM_COMPARED]),
            "tolerance": tolerance,
        },
        problem=None if mean <= tolerance else f"they differ by {mean:.2g} nats on average",
    )


def steps_job(setup: Setup, name: str, **recipe: object) -> TrainingJob:
    """Return the training of these sections; 50 steps unless it is a toy."""
    model, sequences = _model(setup)
    return setup.job(
        name,
        model,
        num_steps=6 if setup.is_toy else 50,
        num_tokens_per_step=sequences * model.context_length,
        num_sequences_per_pass=sequences // NUM_PASSES,
        **recipe,
    )


def _model(setup: Setup) -> tuple[ModelConfig, int]:
    """Return the model and the sequences of a step."""
    if setup.is_toy:
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 400}
        return preset("tiny", **sizes, schedule=1, context_length=32), 4
    return preset("55m"), 8


def _speed(what: str, steps: Steps, eager: Steps | None = None) -> Finding:
    figures: dict[str, float] = {
        "first step (s)": steps.first_seconds,
        "step (ms)": 1e3 * steps.settled_seconds,
    }
    if eager:
        figures["compile time (s)"] = steps.compile_seconds
        figures["eager / compiled"] = eager.settled_seconds / steps.settled_seconds
    return Finding(what=what, figures=figures)
