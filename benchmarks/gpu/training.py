"""Sections that train in this process: parity, waits for the GPU, compiled steps, speed."""

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

from benchmarks.gpu.report import (
    NUM_COMPARED,
    ROUNDED_LOSS,
    TOY_MODEL,
    Figure,
    Finding,
    Setup,
    problem_unless,
)
from iiet.batch import Batch
from iiet.config import ModelConfig, preset
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, frozen_teacher
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from orchestrator.planning.estimate import Devices, Estimate
from orchestrator.planning.machine import installed_gpus
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training.devices import World, autocast, frozen_dtype
from orchestrator.training.objective import make_objective
from orchestrator.training.trainer import run_job
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


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """The measurements of a training."""

    losses: list[float]
    seconds: list[float]
    """Seconds of each step, validation not included; the first from the call on."""
    metrics: list[Mapping[str, float]]
    """What the training reported at each step."""
    compile_seconds: float
    compiler_problem: str
    """Why a training that was to be compiled was not; empty if there was no problem."""

    @property
    def settled_seconds(self) -> float:
        """Median seconds of a step in the second half."""
        return statistics.median(self.seconds[1 + len(self.seconds[1:]) // 2 :])

    def settled(self, metric: str) -> float | None:
        """Median of a metric in the second half; None if it was not reported."""
        values = [found[metric] for found in self.metrics if metric in found]
        return statistics.median(values[len(values) // 2 :]) if values else None


def _run_steps(setup: Setup, job: TrainingJob, on_step: Callable[[], None] | None = None) -> _Steps:
    """Train a job of at least three steps, and delete what it wrote (gigabytes at full size)."""
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
    shutil.rmtree(job.folder)
    return _Steps(
        losses=[numbers["train/loss"] for numbers in metrics],
        seconds=[after - before for before, after in pairwise(times)],
        metrics=metrics,
        compile_seconds=sum(e["seconds"] for e in events if e["name"] == "compiled"),
        compiler_problem="".join(e["text"] for e in events if e["name"] == "not compiled"),
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


def parity(setup: Setup) -> Iterator[Finding]:
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
            yield Finding(
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


@contextmanager
def counted_waits() -> Iterator[tuple[list[Counter[str]], Callable[[], None]]]:
    """Count the operations of a block that wait for the GPU (`.item()`, a blocking copy).

    PyTorch warns of them and names the line of Python; waits inside libraries are not seen.

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


def _fifty_steps(setup: Setup, name: str, **recipe: Any) -> TrainingJob:
    toy = preset("tiny", **TOY_MODEL, schedule=1, context_length=32)
    model, sequences = (toy, 4) if setup.is_toy else (preset("55m"), 8)
    return training_job(
        setup,
        name,
        model,
        num_steps=6 if setup.is_toy else 50,
        num_tokens_per_step=sequences * model.context_length,
        num_sequences_per_pass=sequences // NUM_PASSES,
        **recipe,
    )


def synchronizations(setup: Setup) -> Iterator[Finding]:
    """Count the waits of each step of an eager training, against passes + 1.

    While the host waits for the GPU it starts no kernels, and the GPU is idle after the wait. The
    loop reads the numbers of a step once; the limit allows one wait more for each pass.
    """
    allowed = NUM_PASSES + 1
    with counted_waits() as (waits, end_step):
        steps = _run_steps(setup, _fifty_steps(setup, "waits"), on_step=end_step)
    what = f"{len(steps.losses)} steps of {NUM_PASSES} passes"
    if setup.device == "cpu":
        yield Finding(what=what, skipped="the CPU has no queue to wait for; the steps ran")
        return
    # The first step allocates and loads kernels.
    most = max(waits[1:], key=Counter.total)
    yield Finding(
        what=what,
        figures={
            "waits of a step, most": most.total(),
            "allowed": allowed,
            "first step": waits[0].total(),
            "where": ", ".join(f"{place} ({count})" for place, count in most.most_common(8)),
        },
        problem=problem_unless(
            most.total(), allowed, f"{most.total()} waits in a step, allowed are {allowed}"
        ),
    )


def compiled(setup: Setup) -> Iterator[Finding]:
    """Compare losses and speed of the same steps, eager and compiled."""
    eager = _run_steps(setup, _fifty_steps(setup, "eager", compile=False))
    times = {"first step (s)": eager.seconds[0], "step (ms)": 1e3 * eager.settled_seconds}
    yield Finding(what="eager", figures=times)
    fast = _run_steps(setup, _fifty_steps(setup, "compiled", compile=True))
    if fast.compiler_problem:
        yield Finding(what="compiled", problem=fast.compiler_problem)
        return
    times = {
        "first step (s)": fast.seconds[0],
        "step (ms)": 1e3 * fast.settled_seconds,
        "compile time (s)": fast.compile_seconds,
        "eager / compiled": eager.settled_seconds / fast.settled_seconds,
    }
    yield Finding(what="compiled", figures=times)
    differences = [abs(a - b) for a, b in zip(eager.losses, fast.losses, strict=True)]
    tolerance = ROUNDED_LOSS if setup.precision == "bf16" else 1e-3
    mean = statistics.fmean(differences)
    yield Finding(
        what="losses, compiled - eager",
        figures={
            "mean difference (nats)": mean,
            f"largest of the first {NUM_COMPARED}": max(differences[:NUM_COMPARED]),
            "tolerance": tolerance,
        },
        problem=problem_unless(mean, tolerance, f"they differ by {mean:.2g} nats on average"),
    )


MEMORY_TOLERANCE = 0.1
"""Allowed relative difference of an eager step's peak memory from the plan."""
USABLE_SHARE = 0.9
"""Share of the GPU's memory that a plan may take here."""


def speed(setup: Setup) -> Iterator[Finding]:
    """Train each size for some steps, eagerly and compiled: tokens/s, MFU, and peak memory.

    The plan (`orchestrator/planning/training_memory.py`) counts the tensors of an eager step, so
    only that one must agree with it. MFU is the share of the GPU's peak FLOP/s
    (`orchestrator/training/monitor.py`); where the GPU is not listed there, it is left out.
    """
    models = [("vanilla", 0), ("iiet", 1)] if setup.is_toy else [*_FULL_MODELS]
    sizes = {"tiny": 2} if setup.is_toy else {"55m": 16, "340m": 4}
    for size, most_sequences in sizes.items():
        for method, r in models:
            toy = {**TOY_MODEL, "context_length": 32} if setup.is_toy else {}
            corrections = {"schedule": r} if method == "iiet" else {}
            config = preset(size, method=method, **corrections, **toy)
            # A toy measures nothing, and compiling takes minutes on a CPU.
            for compiles in (False,) if setup.is_toy else (False, True):
                label = f"{size} {method}" + (f", r = {r}" if method == "iiet" else "")
                label += ", compiled" if compiles else ", eager"
                try:
                    yield _measured_speed(setup, config, label, most_sequences, compiles=compiles)
                except torch.OutOfMemoryError as error:
                    problem = f"out of memory: {str(error).splitlines()[0]}"
                    yield Finding(what=label, problem=problem)
                gc.collect()
                if setup.device == "cuda":
                    torch.cuda.empty_cache()


_FULL_MODELS = (("vanilla", 0), ("iiet", 1), ("iiet", 3))
"""Method and corrections."""


def _measured_speed(
    setup: Setup, config: ModelConfig, label: str, sequences: int, *, compiles: bool
) -> Finding:
    def job() -> TrainingJob:
        num_tokens = sequences * config.context_length
        num_steps = 4 if setup.is_toy else 20
        return training_job(
            setup, label, config, num_steps, num_tokens_per_step=num_tokens, compile=compiles
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
        return Finding(what=label, skipped=reason)

    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = _run_steps(setup, job())
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
