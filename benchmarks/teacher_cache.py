"""A distillation step that reads its teacher's stored outputs, against one that runs the teacher.

The teacher makes three corrections per layer, the students fewer. For a student of half the
teacher's evaluations, the teacher's forward pass is two fifths of a step's arithmetic; for cheaper
students it is more. A step is what the training loop does with a batch: outputs, loss, backward,
clipping and AdamW, at a learning rate of 0 so that all variants keep the same weights. The cache is
on disk as in a sweep, and each step reads other rows. They were written just before, so the
operating system still holds them in memory, as it does for all students of a sweep but the first.

Stored outputs must give a bitwise equal loss before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import Goal, Row, checked
from benchmarks.runner import Setup
from benchmarks.shape import fresh_decoder, random_tokens, shaped_config
from benchmarks.timing import stopwatch, take_turns
from iiet import Decoder, DistillationConfig, IterationSchedule, distillation_loss
from iiet.distillation import Model, frozen_teacher
from orchestrator.training.teacher_cache import CachedTeacher, CachePlan, open_cache, write_cache

_TEACHER_CORRECTIONS = 3
_STUDENTS = (0, 1, 2)
_HALF = 1
"""Corrections of the student that has half of the teacher's evaluations."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    dim: int
    num_layers: int
    vocab_size: int
    batch_size: int = 8
    num_tokens: int = 128
    """Tokens per row of the batch."""
    num_steps: int = 8
    """Steps that are stored and read in turn."""
    goal: Goal | None = None
    """Goal for students of at most half the evaluations."""


_FULL = (
    _Size(dim=128, num_layers=6, vocab_size=2048, goal=Goal("at least", 1.6)),
    _Size(dim=256, num_layers=12, vocab_size=8192, batch_size=2),
)
_QUICK = (_Size(dim=32, num_layers=2, vocab_size=64, batch_size=2, num_tokens=16, num_steps=2),)


def teacher_cache(setup: Setup) -> Iterator[Row]:
    """Measure steps of several students with and without a teacher cache."""
    sizes, repetitions = (_QUICK, 2) if setup.is_toy else (_FULL, 5)
    yield Row(
        what=f"IIET, teacher with {_TEACHER_CORRECTIONS} corrections a layer, heads of 64, ffn "
        f"2.75 d, float32, KL at T = 1; a step of loss, backward, clipping and AdamW, {repetitions}"
        " repetitions in turns; outputs memory-mapped, in the operating system's cache"
    )
    for size in sizes:
        yield from _measure_size(size, setup.folder / f"width-{size.dim}", repetitions)


def _measure_size(size: _Size, folder: Path, repetitions: int) -> Iterator[Row]:
    shape = size.dim, size.num_layers, size.vocab_size, size.num_tokens
    decoder = fresh_decoder(shaped_config(*shape, schedule=_TEACHER_CORRECTIONS))
    live = frozen_teacher(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, weight_decay=0.0)
    batches = random_tokens(size.vocab_size, size.num_steps, size.batch_size, size.num_tokens)
    stored = _stored(live, batches, size, folder)
    students = {
        r: decoder.with_schedule(IterationSchedule.uniform(size.num_layers, r)) for r in _STUDENTS
    }

    def loss(teacher: Model, r: int, batch: Tensor) -> Tensor:
        return distillation_loss(students[r], teacher, batch, config=DistillationConfig())[0]

    differences = [loss(live, _HALF, batch) - loss(stored, _HALF, batch) for batch in batches]
    what = f"losses of a live teacher and its stored outputs, d {size.dim},"
    yield checked(what, max(abs(each.item()) for each in differences), 0.0)

    def task(teacher: Model, r: int) -> Callable[[], float]:
        coming: Iterator[Tensor] = cycle(batches)

        def step() -> None:
            value = loss(teacher, r, next(coming))
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(students[r].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value.item()

        return stopwatch(step)

    tasks = {f"runs it, {r}": task(live, r) for r in _STUDENTS}
    tasks |= {f"reads it, {r}": task(stored, r) for r in _STUDENTS}
    seconds = take_turns(tasks, repetitions=repetitions)
    for r in _STUDENTS:
        times = {name: seconds[f"{name}, {r}"] for name in ("runs it", "reads it")}
        goal = size.goal if r <= _HALF else None
        yield Row.paired(f"d {size.dim}, student r = {r}", times, "runs it", "reads it", goal)


def _stored(teacher: Decoder, batches: Tensor, size: _Size, folder: Path) -> CachedTeacher:
    plan = CachePlan(
        origin={"benchmark": "teacher_cache"},
        num_steps=size.num_steps,
        num_sequences=size.batch_size,
        context_length=size.num_tokens,
        vocab_size=size.vocab_size,
    )

    @torch.no_grad()
    def answers(_: str) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch, teacher(batch)) for batch in batches)

    write_cache(plan, folder, answers)
    cache = open_cache(folder, plan)
    assert cache is not None
    return cache
