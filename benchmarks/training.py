"""The overhead of the orchestrator's training loop.

Four questions, at steps of about half a second: how much longer is a step than that of a plain
PyTorch loop on the same weights and batches; what does a checkpoint cost at a given interval; what
share of a step waits for its batch; how much faster are two workers than one with the same global
batch. The losses of both loops must be bitwise equal before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.timing import Spread, paired_ratio, take_turns
from benchmarks.training_runs import Runs, RunSize, Steps

__all__ = ["measure"]

_FULL = RunSize(
    dim=256, num_layers=6, vocab_size=4096, context_length=128, num_sequences=4, num_steps=9
)
_QUICK = RunSize(
    dim=32, num_layers=2, vocab_size=512, context_length=16, num_sequences=4, num_steps=5
)
_CHECKPOINT_EVERY = 2
"""Steps between checkpoints in the measured runs."""
_INTERVAL = 200
"""Steps between checkpoints for which the share is computed; the recipe's default."""


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure the overhead of the loop.

    `quick`: a tiny size, which only tests the benchmark. `say` reports progress.
    """
    size, repetitions = (_QUICK, 2) if quick else (_FULL, 4)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(size, Path(folder))
        say("training: bare loop and whole loop")
        checks = [_same_losses(runs)]
        rows = _rows(runs, repetitions, has_goals=not quick)
        say("training: one worker and two")
        row, check = _workers(runs, 1 if quick else 3)
    setting = (
        f"IIET r = 1, d {size.dim}, {size.num_layers} layers, vocabulary {size.vocab_size}, "
        f"{size.num_sequences} x {size.context_length} tokens a step, float32, runs of "
        f"{size.num_steps} steps in turns, {repetitions} repetitions; a step is from one report of "
        "the loss to the next, without validation; workers average by gloo, one thread each"
    )
    return Report(title="training", setting=setting, rows=(*rows, row), checks=(*checks, check))


def _same_losses(runs: Runs) -> str:
    ours, bare = runs.ours().losses, runs.bare().losses
    largest = max(abs(a - b) for a, b in zip(ours, bare, strict=True))
    return checked("losses of the whole loop and of a bare one", largest, 0.0)


def _rows(runs: Runs, repetitions: int, *, has_goals: bool) -> list[Row]:
    tasks: dict[str, Callable[[], Steps]] = {
        "ours": runs.ours,
        "bare": runs.bare,
        "saving": lambda: runs.ours(checkpoint_every_steps=_CHECKPOINT_EVERY),
    }
    found = take_turns(tasks, repetitions=repetitions, warm_ups=1)
    # The median over a run's steps is robust against steps that the system disturbed.
    step = {
        name: [statistics.median(steps.seconds) for steps in turns] for name, turns in found.items()
    }
    whole = {name: [sum(steps.seconds) for steps in turns] for name, turns in found.items()}
    # The last checkpoint comes after the last step's report.
    num_saved = (runs.size.num_steps - 1) // _CHECKPOINT_EVERY
    stalls = [
        (saving - ours) / num_saved
        for saving, ours in zip(whole["saving"], whole["ours"], strict=True)
    ]
    with_saves = [
        _INTERVAL * seconds + max(stall, 0.0)
        for seconds, stall in zip(step["ours"], stalls, strict=True)
    ]
    loading = [runs.loading() for _ in range(repetitions)]
    return [
        Row(
            what="a step of the whole loop / of a bare PyTorch loop",
            quantities=(_milliseconds("whole", step["ours"]), _milliseconds("bare", step["bare"])),
            ratio=paired_ratio(step["ours"], step["bare"]),
            goal=Goal("at most", 1.03) if has_goals else None,
        ),
        Row(
            what=f"{_INTERVAL} steps with one checkpoint / without",
            quantities=(_milliseconds("checkpoint", stalls), _milliseconds("step", step["ours"])),
            ratio=paired_ratio(with_saves, [_INTERVAL * seconds for seconds in step["ours"]]),
        ),
        Row(
            what="a step's batch from the tokens / the step",
            quantities=(_milliseconds("batch", loading), _milliseconds("step", step["ours"])),
            ratio=paired_ratio(loading, step["ours"]),
            goal=Goal("at most", 0.01) if has_goals else None,
        ),
    ]


def _workers(runs: Runs, repetitions: int) -> tuple[Row, str]:
    tasks = {"one": lambda: runs.workers(1), "two": lambda: runs.workers(2)}
    found = take_turns(tasks, repetitions=repetitions, warm_ups=0)
    pairs = zip(found["one"][0].losses, found["two"][0].losses, strict=True)
    check = checked("losses of one worker and of two", max(abs(a - b) for a, b in pairs), 1e-4)
    one, two = (
        [statistics.median(steps.seconds) for steps in found[name]] for name in ("one", "two")
    )
    row = Row(
        what="a step of one worker / of two, the same global batch",
        quantities=(_milliseconds("one", one), _milliseconds("two", two)),
        ratio=paired_ratio(one, two),
    )
    return row, check


def _milliseconds(label: str, seconds: list[float]) -> Quantity:
    return Quantity(label, Spread.of([1e3 * value for value in seconds]), "ms")
