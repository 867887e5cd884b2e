"""Speed and memory of trainings against the plan: tokens/s, MFU, and peak memory.

Each size trains eagerly and compiled. The plan (`iiet/training_memory.py`) counts the tensors of an
eager step, so only that one must agree with it. MFU is the share of the GPU's peak FLOP/s
(`orchestrator/training/peak_flops.py`); where the GPU is not listed there, it is left out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.training_steps import run_steps
from iiet.config import ModelConfig, preset
from orchestrator.planning.estimate import Devices, Estimate
from orchestrator.planning.machine import installed_gpus
from orchestrator.records.training import TrainingJob

MEMORY_TOLERANCE = 0.1
"""Allowed relative difference of an eager step's peak memory from the plan."""
USABLE_SHARE = 0.9
"""Share of the GPU's memory that a plan may take here."""
NUM_STEPS = 20
GIB = 2**30


@dataclass(frozen=True)
class _Case:
    size: str
    method: str
    corrections: int
    most_sequences: int
    """Sequences of a step, fewer if the GPU's memory is small."""

    @property
    def label(self) -> str:
        r = f", r = {self.corrections}" if self.method == "iiet" else ""
        return f"{self.size} {self.method}{r}"


_CASES = tuple(
    _Case(size, method, corrections, sequences)
    for size, sequences in (("55m", 16), ("340m", 4))
    for method, corrections in (("vanilla", 0), ("iiet", 1), ("iiet", 3))
)
_TOY_CASES = (_Case("tiny", "vanilla", 0, 2), _Case("tiny", "iiet", 1, 2))


def speed(setup: Setup) -> Iterator[Finding]:
    """Train each size for some steps, eagerly and compiled."""
    for case in _TOY_CASES if setup.is_toy else _CASES:
        # A toy measures nothing, and compiling takes minutes on a CPU.
        for compiles in (False,) if setup.is_toy else (False, True):
            label = f"{case.label}, {'compiled' if compiles else 'eager'}"
            try:
                yield _measure(setup, case, label, compiles=compiles)
            except torch.OutOfMemoryError as error:
                yield Finding(what=label, problem=f"out of memory: {str(error).splitlines()[0]}")
            gc.collect()
            if setup.device == "cuda":
                torch.cuda.empty_cache()


def _measure(setup: Setup, case: _Case, label: str, *, compiles: bool) -> Finding:
    config = _config(setup, case)
    job = _job(setup, config, label, case.most_sequences, compiles=compiles)
    usable = USABLE_SHARE * _free_bytes(setup)
    sequences = case.most_sequences
    while sequences > 1 and _planned_bytes(job) > usable:
        sequences //= 2
        job = _job(setup, config, label, sequences, compiles=compiles)
    planned = _planned_bytes(job)
    if planned > usable:
        return Finding(
            what=label,
            skipped=f"needs {planned / GIB:.1f} GiB, and {usable / GIB:.1f} GiB are usable",
        )
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = run_steps(setup, job)
    figures: dict[str, Figure] = {
        "sequences": sequences,
        "tokens/s": steps.settled("train/tokens_per_second") or 0.0,
        "step (ms)": 1e3 * steps.settled_seconds,
    }
    if (mfu := steps.settled("train/mfu")) is not None:
        figures["MFU (%)"] = 100 * mfu
    problem = steps.compiler_problem or None
    if compiles:
        figures["compile time (s)"] = steps.compile_seconds
    if setup.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        figures |= {"peak (GiB)": peak / GIB, "peak / plan": peak / planned}
        if not compiles and abs(peak / planned - 1) > MEMORY_TOLERANCE:
            problem = f"the peak is {peak / planned:.2f} of the plan's {planned / GIB:.1f} GiB"
    figures["plan (GiB)"] = planned / GIB
    return Finding(what=label, figures=figures, problem=problem)


def _free_bytes(setup: Setup) -> float:
    gpus = installed_gpus() if setup.device == "cuda" else []
    return gpus[0].free_bytes if gpus else float("inf")


def _config(setup: Setup, case: _Case) -> ModelConfig:
    corrections = {"schedule": case.corrections} if case.method == "iiet" else {}
    toy = {"vocab_size": 400, "dim": 32, "num_heads": 2, "ffn_dim": 64, "context_length": 32}
    return preset(case.size, method=case.method, **corrections, **(toy if setup.is_toy else {}))


def _job(
    setup: Setup, config: ModelConfig, label: str, sequences: int, *, compiles: bool
) -> TrainingJob:
    return setup.job(
        label.replace(" ", "-"),
        config,
        num_steps=4 if setup.is_toy else NUM_STEPS,
        num_tokens_per_step=sequences * config.context_length,
        compile=compiles,
    )


def _planned_bytes(job: TrainingJob) -> int:
    planned = Estimate(config=job.model, recipe=job.recipe, devices=Devices(on_gpus=True))
    return sum(size for name, size in planned.worker_memory.items() if name != "PyTorch")
