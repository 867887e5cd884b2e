"""Sections that train in their own process: parity with the CPU, and speed."""

from __future__ import annotations

import gc
import shutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import MEMORY_TOLERANCE, NUM_COMPARED, ROUNDED_LOSS, TOY_MODEL
from benchmarks.report import Figure, Row, problem_unless
from benchmarks.runner import Setup
from iiet.decoder import Decoder
from iiet.iiad.distillation import frozen_teacher
from iiet.methods import METHODS
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig, ModelConfig, preset
from iiet.model.schedule import IterationSchedule
from orchestrator.planning.devices import Devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.machine import installed_gpus
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import autocast, frozen_dtype
from orchestrator.training.objective import make_objective
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.journal import read_journal

GIB = 2**30


def training_job(
    setup: Setup, name: str, model: ModelConfig, num_steps: int, **recipe: Any
) -> TrainingJob:
    """Return a training in a new folder: corrections from the first step, no checkpoint."""
    rest = {
        "precision": setup.precision,
        "compile": False,
        "iterate_from_fraction": 0.0,
        "warmup_steps": 10,
        "learning_rate": 1e-3,
        "validate_every_steps": num_steps,
        "num_validation_tokens": model.context_length,
        "checkpoint_every_steps": num_steps,
    }
    return TrainingJob(
        run_folder=str(setup.folder / "trainings" / name.replace(" ", "-")),
        tokens_folder=str(setup.tokens()),
        model=model,
        recipe=TrainingSettings(num_steps=num_steps, **{**rest, **recipe}),
    )


PARITY_TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
"""Arithmetic to the largest relative error of logits and gradients; their unit in the last place is
1e-7, 1e-3 and 8e-3. A CPU's bf16 has errors of 0.7 to 1.1 % at these sizes."""
LOSS_SHARE = 0.1
"""The loss is a mean over many tokens: its tolerance is this share of theirs."""


class Outputs(NamedTuple):
    """What a model computes for one batch."""

    logits: Tensor
    loss: Tensor
    gradient: Tensor
    """Of all parameters, (parameters,)."""


def parity(setup: Setup) -> Iterator[Row]:
    """Compare every method, and a distillation, in every arithmetic of the device.

    The CPU's formulas agree with the published code (`tests/iiet/test_parity.py`), so a device that
    agrees with the CPU is right. Errors are those of the whole tensor: the norm of the difference
    divided by the norm.
    """
    # TF32 is an arithmetic of GPUs; on them it is what `fp32` means in a training.
    kinds = ["fp32", "tf32", "bf16"] if setup.device == "cuda" else ["fp32", "bf16"]
    for method, distills in [*((method, False) for method in METHODS), ("iiet", True)]:
        # Heads of 128, as in the published sizes.
        sizes: dict[str, int] = {**TOY_MODEL, "context_length": 32}
        if not setup.is_toy:
            sizes = {"dim": 512, "num_layers": 4, "num_heads": 4, "ffn_dim": 1408}
            sizes |= {"context_length": 512, "vocab_size": 2048}
        config = preset("tiny", method=method, **sizes)
        expected = model_outputs(config, World(), "fp32", distills=distills)
        for kind in kinds:
            found = model_outputs(config, setup.world, kind, distills=distills)
            errors = {
                name: float((a - b).norm() / b.norm())
                for name, a, b in zip(Outputs._fields, found, expected, strict=True)
            }
            tolerance = PARITY_TOLERANCES[kind]
            allowed = dict.fromkeys(errors, tolerance) | {"loss": LOSS_SHARE * tolerance}
            # A comparison with NaN is false.
            wrong = [name for name, error in errors.items() if not error <= allowed[name]]
            yield Row(
                what=f"{method}{', distilled' if distills else ''}, {kind}",
                figures={**errors, "tolerance": tolerance},
                problem=f"wrong {' and '.join(wrong)}" if wrong else None,
            )


def model_outputs(config: ModelConfig, world: World, kind: str, *, distills: bool) -> Outputs:
    """Compute logits, loss and gradient of a model on a device; all are float64 on the CPU.

    Args:
        config: The model; its weights are the same at each call.
        world: The device.
        kind: The arithmetic, one of `PARITY_TOLERANCES`.
        distills: With the loss of a student without corrections instead of the model's own.
    """
    torch.manual_seed(0)
    precision = "bf16" if kind == "bf16" else "fp32"
    decoder = Decoder(config).to(world.device)
    teacher = None
    if distills:
        dtype = frozen_dtype(precision, world.device)
        teacher = frozen_teacher(Decoder(config).to(world.device, dtype))
    schedule = IterationSchedule.none(config.num_layers) if distills else config.corrections
    objective = make_objective(lambda _: schedule, teacher, DistillationConfig())
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (2, config.context_length), generator=generator)
    batch = Batch.of_text(tokens.to(world.device))

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        with autocast(precision, world):
            logits = decoder(batch.input_ids, schedule=schedule)
            loss, _ = objective(decoder, batch, 0)
        torch.autograd.backward(loss)
    finally:
        torch.set_float32_matmul_precision(before)
    gradients = [p.grad.flatten() for p in decoder.parameters() if p.grad is not None]
    outputs = (logits.detach(), loss.detach(), torch.cat(gradients))
    return Outputs(*(tensor.double().cpu() for tensor in outputs))


NUM_PASSES = 2
"""Forward and backward passes of one step."""
USABLE_SHARE = 0.9
"""Share of the GPU's memory that a plan may take here."""
_FULL_MODELS = (("vanilla", 0), ("iiet", 3))
"""Method and corrections."""


@dataclass
class _Steps:
    """The measurements of a training."""

    losses: list[float]
    seconds: list[float]
    """Seconds of each step, validation not included; the first from the call on."""
    metrics: list[Mapping[str, float]]
    """What the training reported at each step."""
    waits: list[Counter[str]]
    """Where each step waited for the GPU, file and line to number of times."""
    compile_seconds: float = 0.0
    compiler_problem: str = ""
    """Why a training that was to be compiled was not; empty if there was no problem."""

    @property
    def settled_seconds(self) -> float:
        """Median seconds of a step in the second half."""
        return statistics.median(self.seconds[1 + len(self.seconds[1:]) // 2 :])

    def settled(self, metric: str) -> float | None:
        """Median of a metric in the second half; None if it was not reported."""
        values = [found[metric] for found in self.metrics if metric in found]
        return statistics.median(values[len(values) // 2 :]) if values else None


def _run_steps(setup: Setup, job: TrainingJob) -> _Steps:
    """Train a job of at least three steps, and delete what it wrote (gigabytes at full size)."""
    times: list[float] = [time.perf_counter()]
    metrics: list[Mapping[str, float]] = []
    with counted_waits() as (waits, end_step):

        def report(_: int, numbers: Mapping[str, float]) -> None:
            # Reported before the validation of the step.
            if "train/loss" in numbers:
                times.append(time.perf_counter())
                metrics.append(numbers)
                end_step()

        run_job(job, world=setup.world, report=report)
    losses = [numbers["train/loss"] for numbers in metrics]
    steps = _Steps(losses, [after - before for before, after in pairwise(times)], metrics, waits)
    for event in read_journal(job.folder)[0]:
        if event.get("name") == "compiled":
            steps.compile_seconds += event["seconds"]
        elif event.get("name") == "not compiled":
            steps.compiler_problem += event["text"]
    shutil.rmtree(job.folder)
    return steps


@contextmanager
def counted_waits() -> Iterator[tuple[list[Counter[str]], Callable[[], None]]]:
    """Count the operations of a block that wait for the GPU (`.item()`, a blocking copy).

    PyTorch warns of them and names the line of Python; waits inside libraries are not seen. While
    the host waits it starts no kernels, and the GPU is idle after the wait.

    Yields:
        Where each step waited, file and line to number of times; and a function that ends a step.
    """
    is_gpu = torch.cuda.is_available()
    before = torch.cuda.get_sync_debug_mode() if is_gpu else 0
    steps: list[Counter[str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def end_step() -> None:
            places = (
                f"{Path(warning.filename).name}:{warning.lineno}"
                for warning in caught
                if "synchronizing CUDA operation" in str(warning.message)
            )
            steps.append(Counter(places))
            caught.clear()

        if is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield steps, end_step
        finally:
            if is_gpu:
                torch.cuda.set_sync_debug_mode(before)


def speed(setup: Setup) -> Iterator[Row]:
    """Train each size for some steps, eagerly and compiled: tokens/s, MFU, waits, peak memory.

    The plan (`orchestrator/planning/training_memory.py`) counts the tensors of an eager step, which
    must agree with it; a compiled step may take less. The loop reads the numbers of a step once; an
    eager step may wait once more for each pass. Compiled losses must be the eager ones up to
    rounding. MFU is the share of the GPU's peak FLOP/s; where it is not in
    `orchestrator/training/monitor.py`, it is left out.
    """
    models = [("vanilla", 0), ("iiet", 1)] if setup.is_toy else [*_FULL_MODELS]
    sizes = {"tiny": 2} if setup.is_toy else {"55m": 16, "340m": 4}
    for size, most_sequences in sizes.items():
        for method, r in models:
            toy = {**TOY_MODEL, "context_length": 32} if setup.is_toy else {}
            corrections = {"schedule": r} if method == "iiet" else {}
            config = preset(size, method=method, **corrections, **toy)
            label = f"{size} {method}" + (f", r = {r}" if method == "iiet" else "")
            eager: _Steps | None = None
            # A toy measures nothing, and compiling takes minutes on a CPU.
            for compiles in (False,) if setup.is_toy else (False, True):
                name = f"{label}, {'compiled' if compiles else 'eager'}"
                try:
                    row, steps = _trained(setup, config, name, most_sequences, compiles=compiles)
                    yield row
                    if eager and steps and not steps.compiler_problem:
                        yield _compared(label, eager, steps)
                    eager = steps
                except torch.OutOfMemoryError as error:
                    problem = f"out of memory: {str(error).splitlines()[0]}"
                    yield Row(what=name, problem=problem)
                gc.collect()
                if setup.device == "cuda":
                    torch.cuda.empty_cache()


def _trained(
    setup: Setup, config: ModelConfig, label: str, sequences: int, *, compiles: bool
) -> tuple[Row, _Steps | None]:
    def job() -> TrainingJob:
        return training_job(
            setup,
            label,
            config,
            num_steps=4 if setup.is_toy else 30,
            num_tokens_per_step=sequences * config.context_length,
            num_sequences_per_pass=max(1, sequences // NUM_PASSES),
            compile=compiles,
        )

    def planned_bytes() -> int:
        estimate = Estimate(config=config, recipe=job().recipe, devices=Devices(on_gpus=True))
        return sum(size for name, size in estimate.worker_memory.items() if name != "PyTorch")

    gpus = installed_gpus() if setup.device == "cuda" else []
    usable = USABLE_SHARE * (gpus[0].free_bytes if gpus else float("inf"))
    while sequences > 1 and planned_bytes() > usable:
        sequences //= 2
    planned = planned_bytes()
    if planned > usable:
        reason = f"needs {planned / GIB:.1f} GiB, and {usable / GIB:.1f} GiB are usable"
        return Row(what=label, skipped=reason), None

    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = _run_steps(setup, job())
    figures: dict[str, Figure] = {
        "sequences": sequences,
        "tokens/s": steps.settled("train/tokens_per_second") or 0.0,
        "step (ms)": 1e3 * steps.settled_seconds,
        "plan (GiB)": planned / GIB,
    }
    if (mfu := steps.settled("train/mfu")) is not None:
        figures["MFU (%)"] = 100 * mfu
    problem = steps.compiler_problem or None
    if setup.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        most = max(steps.waits[1:], key=Counter.total)  # The first step loads kernels.
        figures |= {"peak (GiB)": peak / GIB, "peak / plan": peak / planned}
        figures["most waits of a step"] = most.total()
        if not compiles and most.total() > NUM_PASSES + 1:
            problem = f"{most.total()} waits, allowed are {NUM_PASSES + 1}: {most.most_common(8)}"
        elif peak / planned > 1 + MEMORY_TOLERANCE or (
            not compiles and peak / planned < 1 - MEMORY_TOLERANCE
        ):
            problem = f"the peak is {peak / planned:.2f} of the plan's {planned / GIB:.1f} GiB"
    return Row(what=label, figures=figures, problem=problem), steps


def _compared(label: str, eager: _Steps, compiled: _Steps) -> Row:
    pairs = zip(eager.losses, compiled.losses, strict=True)
    differences = [abs(a - b) for a, b in pairs]
    mean = statistics.fmean(differences)
    return Row(
        what=f"{label}, compiled and eager",
        figures={
            "compile time (s)": compiled.compile_seconds,
            "eager / compiled": eager.settled_seconds / compiled.settled_seconds,
            "mean difference of losses": mean,
            f"largest of the first {NUM_COMPARED}": max(differences[:NUM_COMPARED]),
        },
        problem=problem_unless(mean, ROUNDED_LOSS, f"they differ by {mean:.2g} nats on average"),
    )
