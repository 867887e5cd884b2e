"""The learned mix in training: its memory and its time.

Claims: compared with a stack of all estimates, the lean mix needs less memory (that of a stack
grows with the square of the depth) and less time; with checkpointing it needs little memory. The
stack must first give the same loss and gradients.

`lean` is the project's form. `stacked` stacks all estimates and multiplies by the row; autograd
then keeps one stack per evaluation. Of the straightforward forms it needs the least memory (an
einsum needs the same, a product and a sum need more). `checkpointed` is `lean` with each layer
recomputed in the backward pass.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args
from unittest import mock

import torch
from torch import Tensor

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, stopwatch, take_turns
from iiet import Decoder, next_token_loss
from iiet.methods.implicit_euler import ImplicitEuler

Variant = Literal["lean", "stacked", "checkpointed"]
_VARIANTS: tuple[Variant, ...] = get_args(Variant)
_COMPARED: tuple[Variant, ...] = ("lean", "checkpointed")
"""Variants that are compared with `stacked`."""
_MAX_TIMED_LAYERS = 24
"""Deeper models take minutes; only their memory is measured."""
_GOALS = {"memory, lean": 0.6, "memory, checkpointed": 0.2, "time, lean": 0.97}
_GOAL_LAYERS = 24


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """The size of a training step; heads have width 64, or there is a single one."""

    num_layers: int
    dim: int = 256
    batch_size: int = 2
    num_tokens: int = 256
    """Tokens per row of the batch."""
    vocab_size: int = 2048
    num_corrections: int = 3
    """Corrections of each layer."""


_FULL = tuple(StepSize(num_layers=layers) for layers in (12, 24, 48))
_QUICK = (StepSize(num_layers=4, dim=64, num_tokens=128, vocab_size=256),)


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure memory and time of training steps."""
    sizes, repetitions = (_QUICK, 2) if quick else (_FULL, 3)
    one = sizes[0]  # One depth is enough for the check: the code is the same for all.
    what = f"{one.num_layers} layers in float64,"
    checks = [
        checked(f"loss and gradients of lean and {v}, {what}", largest_difference(one, v), 1e-9)
        for v in ("stacked", "checkpointed")
    ]
    rows: list[Row] = []
    for size in sizes:
        say(f"mix: memory at {size.num_layers} layers")
        peaks = {variant: peak_bytes(size, variant) for variant in _VARIANTS}
        rows += [
            Row(
                what=f"peak memory, {variant}, {size.num_layers} layers",
                quantities=tuple(
                    Quantity.one(name, peaks[name] / 1e6, "MB") for name in (variant, "stacked")
                ),
                ratio=Spread.of([peaks[variant] / peaks["stacked"]]),
                goal=_goal(size, f"memory, {variant}"),
            )
            for variant in _COMPARED
        ]
        if size.num_layers <= _MAX_TIMED_LAYERS:
            say(f"mix: time at {size.num_layers} layers")
            rows += _time_rows(size, repetitions)
    setting = (
        f"IIET, {one.num_corrections} corrections per layer, d {one.dim}, "
        f"ffn {one.dim * 11 // 4}, vocabulary {one.vocab_size}, {one.batch_size} x "
        f"{one.num_tokens} tokens, float32; memory beyond weights and gradients, one fresh process "
        f"each; time of forward and backward, {repetitions} repetitions in turns"
    )
    return Report(title="mix", setting=setting, rows=rows, checks=checks)


def _time_rows(size: StepSize, repetitions: int) -> list[Row]:
    decoder, input_ids = build(size)

    def task(variant: Variant) -> Callable[[], float]:
        def run() -> None:
            with written_as(variant, decoder):
                _step(decoder, input_ids)

        return stopwatch(run)

    seconds = take_turns({v: task(v) for v in _VARIANTS}, repetitions=repetitions)
    return [
        Row.paired(
            f"step time, {variant}, {size.num_layers} layers",
            seconds,
            variant,
            "stacked",
            _goal(size, f"time, {variant}"),
        )
        for variant in _COMPARED
    ]


def _goal(size: StepSize, claim: str) -> Goal | None:
    if size.num_layers != _GOAL_LAYERS or claim not in _GOALS:
        return None
    return Goal("at most", _GOALS[claim])


# The step, and its variants.


def build(size: StepSize) -> tuple[Decoder, Tensor]:
    """Return a decoder whose rows of the mix all differ, and a batch of random tokens."""
    config = shaped_config(
        size.dim, size.num_layers, size.vocab_size, size.num_tokens, schedule=size.num_corrections
    )
    decoder = fresh_decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "mix.inner" in name or "mix.outer" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return decoder, torch.randint(size.vocab_size, (size.batch_size, size.num_tokens))


def _step(decoder: Decoder, input_ids: Tensor) -> None:
    torch.autograd.backward(next_token_loss(decoder(input_ids), input_ids))
    decoder.zero_grad(set_to_none=False)


@contextmanager
def written_as(variant: Variant, decoder: Decoder) -> Iterator[None]:
    """Run a decoder's steps as one variant within the context."""
    decoder.activation_checkpointing = variant == "checkpointed"
    try:
        if variant == "stacked":
            with mock.patch.object(
                ImplicitEuler, "start", lambda embeddings, _: _StackedHistory((embeddings,))
            ):
                yield
        else:
            yield
    finally:
        decoder.activation_checkpointing = False


@dataclass(frozen=True)
class _StackedHistory:
    """A history that stacks all estimates again for each sum and multiplies them by a whole row."""

    estimates: tuple[Tensor, ...]

    def sums(self, rows: Tensor) -> tuple[_StackedHistory, tuple[Tensor, ...]]:
        return self, tuple(rows)  # Sums wait for the layer's own estimate.

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        row = torch.cat([base, weight[None]])
        mixed: Tensor = torch.tensordot(row, torch.stack([*self.estimates, estimate]), dims=1)
        return mixed.to(dtype)

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, _StackedHistory]:
        hidden = self.add(base, estimate, weight, dtype)
        return hidden, _StackedHistory((*self.estimates, estimate))


def largest_difference(size: StepSize, variant: Variant) -> float:
    """Return the largest relative difference of loss and gradients from those of `lean`.

    Computed in float64 on few tokens; a gradient's difference is relative to its largest entry.
    """
    decoder, input_ids = build(size)
    decoder.double()
    few = input_ids[:1, :16]

    def loss_and_gradients(variant: Variant) -> list[Tensor]:
        with written_as(variant, decoder):
            loss = next_token_loss(decoder(few), few)
            return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]

    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(loss_and_gradients("lean"), loss_and_gradients(variant), strict=True)
    )


# Peak memory. Resident memory is read, because it is what the machine must have; it includes the
# kernels' workspace, which a sum of tensor sizes does not. A process's peak never falls, and its
# allocator depends on what ran before, so each measurement has a fresh process. With these settings
# of glibc's allocator, free large blocks return to the system at once, and the peak is that of live
# memory, without fragments.

_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_STATUS = Path("/proc/self/status")


def peak_bytes(size: StepSize, variant: Variant) -> int:
    """Return the bytes by which a step raises the resident memory of a fresh process.

    Raises:
        RuntimeError: the process failed; the message holds the end of its error output.
    """
    arguments = json.dumps(asdict(size)), variant, str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mix", *arguments],
        env={**os.environ, **_ALLOCATOR},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed: {done.stderr[-2000:]}")
    return int(done.stdout)


def _measure_memory_here(size: StepSize, variant: Variant) -> int:
    decoder, input_ids = build(size)
    with written_as(variant, decoder):
        _step(decoder, input_ids[:1, :8])  # Makes the gradients.
        before = _resident_bytes("VmRSS:")
        _step(decoder, input_ids)
    return _resident_bytes("VmHWM:") - before


def _resident_bytes(key: str) -> int:
    if not _STATUS.exists():  # On Linux `getrusage` would start at the parent's peak.
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    print(_measure_memory_here(StepSize(**json.loads(sys.argv[1])), sys.argv[2]))  # type: ignore[arg-type]
