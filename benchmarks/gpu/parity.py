"""Logits, loss and gradients of a small model on the device, against float32 on the CPU.

The CPU's formulas agree with the published code (`tests/iiet/test_parity.py`), so a device that
agrees with the CPU is right. Errors are those of the whole tensor: the norm of the difference
divided by the norm. The gradient is that of all parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.finding import Finding
from benchmarks.gpu.setup import Setup
from iiet.batch import Batch
from iiet.config import ModelConfig, preset
from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig, frozen_teacher
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from orchestrator.training.distributed import World, autocast
from orchestrator.training.objective import make_objective
from orchestrator.training.precision import frozen_dtype

TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
"""Arithmetic to the largest relative error of logits and gradients; their unit in the last place is
1e-7, 1e-3 and 8e-3. A CPU's bf16 has errors of 0.7 to 1.1 % at these sizes."""
LOSS_SHARE = 0.1
"""The loss is a mean over many tokens: its tolerance is this share of theirs."""
CPU = World()


class _Outputs(NamedTuple):
    logits: Tensor
    loss: Tensor
    gradient: Tensor
    """Of all parameters, (parameters,)."""


def parity(setup: Setup) -> Iterator[Finding]:
    """Compare every method, and a distillation, in every arithmetic of the device."""
    # TF32 is an arithmetic of GPUs; on them it is what `fp32` means in a training.
    kinds = ["fp32", "tf32", "bf16"] if setup.device == "cuda" else ["fp32", "bf16"]
    for method in METHODS:
        yield from _compare(setup, method, kinds, distills=False)
    yield from _compare(setup, "iiet", kinds, distills=True)


def _compare(setup: Setup, method: str, kinds: list[str], *, distills: bool) -> Iterator[Finding]:
    config = _config(setup, method)
    expected = _outputs(config, CPU, "fp32", distills=distills)
    for kind in kinds:
        found = _outputs(config, setup.world, kind, distills=distills)
        errors = {
            name: _relative_error(getattr(found, name), getattr(expected, name))
            for name in _Outputs._fields
        }
        tolerance = TOLERANCES[kind]
        allowed = dict.fromkeys(errors, tolerance) | {"loss": LOSS_SHARE * tolerance}
        # A comparison with NaN is false.
        wrong = [name for name, error in errors.items() if not error <= allowed[name]]
        yield Finding(
            what=f"{method}{', distilled' if distills else ''}, {kind}",
            figures={**errors, "tolerance": tolerance},
            problem=f"wrong {' and '.join(wrong)}" if wrong else None,
        )


def _outputs(config: ModelConfig, world: World, kind: str, *, distills: bool) -> _Outputs:
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
    shape = (2, config.context_length)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    batch = Batch.of_text(tokens.to(world.device))
    with _tf32(allowed=kind == "tf32"):
        with autocast(precision, world):
            logits = decoder(batch.input_ids, schedule=schedule)
            loss, _ = objective(decoder, batch, 0)
        torch.autograd.backward(loss)
    gradients = [p.grad.flatten() for p in decoder.parameters() if p.grad is not None]
    outputs = (logits.detach(), loss.detach(), torch.cat(gradients))
    return _Outputs(*(tensor.double().cpu() for tensor in outputs))


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _config(setup: Setup, method: str) -> ModelConfig:
    corrections = {"schedule": 3} if METHODS[method].has_corrections else {}
    if setup.is_toy:
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "context_length": 32}
        return preset("tiny", method=method, vocab_size=400, **sizes, **corrections)
    # Heads of 128, as in the published sizes.
    sizes = {"dim": 512, "num_layers": 4, "num_heads": 4, "ffn_dim": 1408, "context_length": 512}
    return preset("tiny", method=method, vocab_size=2048, **sizes, **corrections)
