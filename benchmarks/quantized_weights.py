"""Decoding on a CPU with weights in bf16 and int8: time per step, and the change in quality.

The time is that of a step after the prefill, on random weights. The quality is in bits per byte of
held-out text under a small model that is trained here, on the text of this repository: on random
weights, all formats would be equally bad.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, take_turns
from iiet import Decoder, next_token_loss, quantize_weights, stream
from iiet.quantized_linear import WeightFormat, check_weight_format

__all__ = ["measure"]

_FORMATS: Final[tuple[WeightFormat, ...]] = get_args(WeightFormat)
_GOALS: Final = {
    ("int8", 512, 1): Goal("at least", 1.3),
    ("bf16", 512, 8): Goal("at least", 1.3),
}
_MOST_BITS: Final = Goal("at most", 1.005)
_SEQUENCE_BYTES: Final = 256
_TOLERANCE: Final = 0.1
"""Root mean square, in standard deviations of the logits."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 12
    vocab_size: int = 8192
    prompt_tokens: int = 128
    new_tokens: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5
    trained_dim: int = 256
    trained_layers: int = 4
    training_steps: int = 200
    num_sequences: int = 8


_FULL = _Size()
_QUICK = _Size(
    dims=(64,),
    num_layers=2,
    vocab_size=256,
    prompt_tokens=8,
    new_tokens=6,
    batch_sizes=(1, 2),
    repetitions=2,
    trained_dim=64,
    trained_layers=1,
    training_steps=3,
    num_sequences=2,
)


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure steps and bits per byte with each format of the weights.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    try:
        for weight_format in _FORMATS:
            check_weight_format(weight_format)
    except ValueError as error:
        return Report(title="quantized weights", setting=f"not measured: {error}", rows=())
    checks: list[str] = []
    rows = [
        row
        for dim in size.dims
        for batch_size in size.batch_sizes
        for row in _step_rows(size, dim, batch_size, say, checks)
    ]
    say(f"quantized weights: training for {size.training_steps} steps")
    rows += _quality_rows(size, has_goals=not quick)
    setting = (
        f"time: IIET, r = 0, {size.num_layers} layers, heads of 64, ffn 2.75 d, vocabulary "
        f"{size.vocab_size}, prompt {size.prompt_tokens}, {size.new_tokens} new tokens, greedy, "
        f"{size.repetitions} repetitions in turns; quality: IIET, r = 1, d {size.trained_dim}, "
        f"{size.trained_layers} layers, trained on bytes of this repository for "
        f"{size.training_steps} steps of {size.num_sequences} x {_SEQUENCE_BYTES}"
    )
    return Report(
        title="quantized weights", setting=setting, rows=tuple(rows), checks=tuple(checks)
    )


def _step_rows(
    size: _Size, dim: int, batch_size: int, say: Callable[[str], None], checks: list[str]
) -> list[Row]:
    say(f"quantized weights: d {dim}, batch {batch_size}")
    config = shaped_config(
        dim,
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        context_length=size.prompt_tokens + size.new_tokens,
        num_corrections=0,
    )
    decoder = fresh_decoder(config).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, size.prompt_tokens)
    prompt = torch.randint(size.vocab_size, shape, generator=generator)
    tasks = {"float32": partial(_milliseconds, decoder, prompt, size.new_tokens)}
    for name in _FORMATS:
        quantized = quantize_weights(decoder, name)
        tasks[name] = partial(_milliseconds, quantized, prompt, size.new_tokens)
        what = f"logits of float32 and {name}, d {dim}, batch {batch_size},"
        checks.append(checked(what, _difference(quantized, decoder, prompt), _TOLERANCE))
    found = take_turns(tasks, repetitions=size.repetitions)
    return [
        Row(
            what=f"a step with float32 weights / {name}, d {dim}, batch {batch_size}",
            quantities=(
                Quantity("float32", Spread.of(found["float32"]), "ms"),
                Quantity(name, Spread.of(found[name]), "ms"),
                Quantity(
                    name,
                    Spread.of([1e3 * batch_size / t for t in found[name]]),
                    "tokens per second",
                ),
            ),
            ratio=paired_ratio(found["float32"], found[name]),
            goal=_GOALS.get((name, dim, batch_size)),
        )
        for name in _FORMATS
    ]


@torch.inference_mode()
def _difference(quantized: Decoder, decoder: Decoder, prompt: Tensor) -> float:
    exact = decoder(prompt)
    return float((quantized(prompt) - exact).square().mean().sqrt() / exact.std())


def _milliseconds(decoder: Decoder, prompt: Tensor, new_tokens: int) -> float:
    """Return milliseconds per step after the prefill."""
    steps = stream(decoder, prompt, max_new_tokens=new_tokens)
    next(steps)
    started = time.perf_counter()
    for _ in steps:
        pass
    return 1e3 * (time.perf_counter() - started) / (new_tokens - 1)


def _quality_rows(size: _Size, *, has_goals: bool) -> list[Row]:
    training, heldout = _texts()
    decoder = _trained(size, training)
    exact = _bits_per_byte(decoder, heldout)
    rows = []
    for name in _FORMATS:
        bits = _bits_per_byte(quantize_weights(decoder, name), heldout)
        rows.append(
            Row(
                what=f"bits per byte of held-out text, {name} / float32 ({bits - exact:+.5f})",
                quantities=(
                    Quantity(name, Spread.of([bits]), "bits per byte"),
                    Quantity("float32", Spread.of([exact]), "bits per byte"),
                ),
                ratio=paired_ratio([bits], [exact]),
                goal=_MOST_BITS if has_goals else None,
            )
        )
    return rows


def _texts() -> tuple[Tensor, Tensor]:
    """Return this repository's Python and Markdown files as sequences of bytes, the last tenth
    apart."""
    root = Path(__file__).resolve().parent.parent
    folders = ("iiet", "orchestrator", "docs")
    files = sorted(f for d in folders for end in ("py", "md") for f in (root / d).rglob(f"*.{end}"))
    content = bytearray(b"".join(file.read_bytes() for file in files))
    sequences = torch.frombuffer(content, dtype=torch.uint8).long()
    sequences = sequences[: len(sequences) // _SEQUENCE_BYTES * _SEQUENCE_BYTES]
    order = torch.randperm(
        len(sequences) // _SEQUENCE_BYTES, generator=torch.Generator().manual_seed(0)
    )
    shuffled = sequences.view(-1, _SEQUENCE_BYTES)[order]
    return shuffled[: len(shuffled) * 9 // 10], shuffled[len(shuffled) * 9 // 10 :]


def _trained(size: _Size, sequences: Tensor) -> Decoder:
    config = shaped_config(
        size.trained_dim,
        num_layers=size.trained_layers,
        vocab_size=256,
        context_length=_SEQUENCE_BYTES,
        num_corrections=1,
    )
    decoder = fresh_decoder(config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=size.training_steps)
    for step in range(size.training_steps):
        first = step * size.num_sequences % (len(sequences) - size.num_sequences)
        batch = sequences[first : first + size.num_sequences]
        loss = next_token_loss(decoder(batch), batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
    return decoder.eval()


@torch.inference_mode()
def _bits_per_byte(decoder: Decoder, sequences: Tensor) -> float:
    """Return the mean over at most 128 sequences."""
    parts = torch.split(sequences[:128], 16)
    losses = [next_token_loss(decoder(part), part) for part in parts]
    return float(torch.stack(losses).mean()) / math.log(2)
