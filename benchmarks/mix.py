"""The learned mix in training: its memory, its time, and its share of a step.

Claims: compared with a stack of all estimates, the lean mix needs less memory (that of a stack
grows with the square of the depth) and less time; with checkpointing it needs little memory; and
the mix takes a small share of a step. Each memory is measured in a fresh process, times in one
process in turns, the share within a step. The stack must first give the same loss and the same
gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.mix_memory import peak_bytes
from benchmarks.mix_share import mix_share
from benchmarks.mix_variants import (
    VARIANTS,
    StepSize,
    Variant,
    build,
    largest_difference,
    step,
    written_as,
)
from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns

_FULL = tuple(StepSize(num_layers=layers) for layers in (12, 24, 48))
_MAX_TIMED_LAYERS = 24
"""Deeper models take minutes; only their memory is measured."""
_QUICK = (StepSize(num_layers=4, dim=64, num_tokens=128, vocab_size=256),)
_GOAL_LAYERS = 24
_TOLERANCE = 1e-9
_MEGABYTE = 1e6


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure memory and time of training steps.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    sizes, repetitions = (_QUICK, 2) if quick else (_FULL, 3)
    rows: list[Row] = []
    # One depth is enough: the code is the same for all.
    checks = (_check(sizes[0], "stacked"), _check(sizes[0], "checkpointed"))
    for size in sizes:
        say(f"mix: memory at {size.num_layers} layers")
        rows += _memory_rows(size)
        if size.num_layers <= _MAX_TIMED_LAYERS:
            say(f"mix: time at {size.num_layers} layers")
            rows += _time_rows(size, repetitions)
    one = sizes[0]
    setting = (
        f"IIET, {one.num_corrections} corrections per layer, d {one.dim}, "
        f"ffn {one.dim * 11 // 4}, vocabulary {one.vocab_size}, {one.batch_size} x "
        f"{one.num_tokens} tokens, float32; memory beyond weights and gradients, one fresh process "
        f"each; time of forward and backward, {repetitions} repetitions in turns"
    )
    return Report(title="mix", setting=setting, rows=tuple(rows), checks=checks)


def _check(size: StepSize, variant: Variant) -> str:
    what = f"loss and gradients of lean and {variant}, {size.num_layers} layers in float64,"
    return checked(what, largest_difference(size, variant), _TOLERANCE)


def _memory_rows(size: StepSize) -> list[Row]:
    stacked = peak_bytes(size, "stacked")
    rows: list[Row] = []
    limits: tuple[tuple[Variant, float], ...] = (("lean", 0.6), ("checkpointed", 0.2))
    for variant, limit in limits:
        own = peak_bytes(size, variant)
        rows.append(
            Row(
                what=f"peak memory, {variant}, {size.num_layers} layers",
                quantities=(_megabytes(variant, own), _megabytes("stacked", stacked)),
                ratio=Spread.of([own / stacked]),
                goal=_goal(size, limit),
            )
        )
    return rows


def _time_rows(size: StepSize, repetitions: int) -> list[Row]:
    decoder, input_ids = build(size)

    def task(variant: Variant) -> Callable[[], float]:
        def run() -> None:
            with written_as(variant, decoder):
                step(decoder, input_ids)

        return stopwatch(run)

    seconds = take_turns({v: task(v) for v in VARIANTS}, repetitions=repetitions)
    rows = [
        Row(
            what=f"step time, {variant}, {size.num_layers} layers",
            quantities=(_milliseconds(variant, seconds), _milliseconds("stacked", seconds)),
            ratio=paired_ratio(seconds[variant], seconds["stacked"]),
            goal=_goal(size, limit),
        )
        for variant, limit in (("lean", 0.97), ("checkpointed", None))
    ]
    return [*rows, _share_row(size, [mix_share(decoder, input_ids) for _ in range(repetitions)])]


def _share_row(size: StepSize, shares: list[float]) -> Row:
    percent = Spread.of([100 * share for share in shares])
    return Row(
        what=f"the mix's share of a step, {size.num_layers} layers",
        quantities=(Quantity("lean", percent, "%"),),
        ratio=Spread.of(shares),
        goal=_goal(size, 0.05),
    )


def _goal(size: StepSize, limit: float | None) -> Goal | None:
    if limit is None or size.num_layers != _GOAL_LAYERS:
        return None
    return Goal("at most", limit)


def _megabytes(label: str, num_bytes: int) -> Quantity:
    return Quantity(label, Spread.of([num_bytes / _MEGABYTE]), "MB")


def _milliseconds(label: str, seconds: dict[str, list[float]]) -> Quantity:
    return Quantity(label, Spread.of([1e3 * value for value in seconds[label]]), "ms")
