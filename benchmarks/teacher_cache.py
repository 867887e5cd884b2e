"""A distillation step that reads its teacher's stored outputs, compared with one that runs the
teacher.

The teacher makes three corrections per layer, the students fewer. For a student of half the
teacher's evaluations, the teacher's forward pass is two fifths of a step's arithmetic; for cheaper
students it is more. A step is what the training loop does with a batch: outputs, loss, backward,
clipping and AdamW, at a learning rate of 0 so that all variants keep the same weights. The cache is
on disk as in a sweep, and each step reads other rows. They were written just before, so the
operating system still holds them in memory, as it does for all students of a sweep except the
first.

Exact outputs must give a bitwise equal loss before anything is timed. Coarse outputs give another
loss, so their times have no goal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns
from iiet import Decoder, DistillationConfig, IterationSchedule, distillation_loss
from iiet.coarse_distribution import coarsen
from iiet.distillation import Model, frozen_teacher
from orchestrator.training.teacher_cache import (
    CachedTeacher,
    CachePlan,
    TeacherOutput,
    open_cache,
    write_cache,
)

__all__ = ["measure"]

_TEACHER_CORRECTIONS = 3
_TOP_K = 64
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


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure a distillation step with and without a teacher cache.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    sizes, repetitions = (_QUICK, 2) if quick else (_FULL, 5)
    rows: list[Row] = []
    checks: list[str] = []
    for size in sizes:
        say(f"teacher_cache: d {size.dim}")
        with tempfile.TemporaryDirectory() as folder:
            bench = _Bench(size, Path(folder))
            checks.append(bench.check())
            rows += _rows(bench, repetitions)
    setting = (
        f"IIET, teacher with {_TEACHER_CORRECTIONS} corrections a layer, heads of 64, ffn 2.75 d, "
        f"float32, KL at T = 1; a step of loss, backward, clipping and AdamW, {repetitions} "
        "repetitions in turns; outputs memory-mapped, in the operating system's cache"
    )
    return Report(title="teacher_cache", setting=setting, rows=tuple(rows), checks=tuple(checks))


class _Bench:
    """A teacher, its outputs on disk in both forms, and students of its weights."""

    def __init__(self, size: _Size, folder: Path) -> None:
        self.size = size
        self.decoder = _decoder(size)
        self.teacher = frozen_teacher(self.decoder)
        self.optimizer = torch.optim.AdamW(self.decoder.parameters(), lr=0.0, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        shape = (size.num_steps, size.batch_size, size.num_tokens)
        self.batches = torch.randint(size.vocab_size, shape, generator=generator)
        self.exact = self._stored(folder, None)
        self.coarse = self._stored(folder, _TOP_K)

    def check(self) -> str:
        """Compare the losses of a live and an exact teacher over all steps."""
        student = self.student(_HALF)
        config = DistillationConfig()
        differences = [
            abs(distillation_loss(student, self.teacher, batch, config=config)[0].item()
                - distillation_loss(student, self.exact, batch, config=config)[0].item())
            for batch in self.batches
        ]  # fmt: skip
        return checked(
            f"losses of a live teacher and its stored outputs, d {self.size.dim},",
            max(differences),
            0.0,
        )

    def student(self, corrections: int) -> Decoder:
        """Return the teacher's weights under a cheaper schedule."""
        return self.decoder.with_schedule(
            IterationSchedule.uniform(self.size.num_layers, corrections)
        )

    def task(
        self, teacher: Model, corrections: int, top_k: int | None = None
    ) -> Callable[[], float]:
        """Return a task that runs one step on the next batch and returns its seconds."""
        student, config = self.student(corrections), DistillationConfig(top_k=top_k)
        batches: Iterator[Tensor] = cycle(self.batches)

        def step() -> None:
            loss, _ = distillation_loss(student, teacher, next(batches), config=config)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()

        return stopwatch(step)

    def _stored(self, folder: Path, top_k: int | None) -> CachedTeacher:
        size = self.size
        plan = CachePlan(
            origin={"benchmark": "teacher_cache"},
            num_steps=size.num_steps,
            num_sequences=size.batch_size,
            context_length=size.num_tokens,
            vocab_size=size.vocab_size,
            top_k=top_k,
        )

        @torch.no_grad()
        def outputs(step: int) -> tuple[Tensor, TeacherOutput]:
            logits = self.teacher(self.batches[step])
            return self.batches[step], logits if top_k is None else coarsen(logits, top_k)

        cache = open_cache(write_cache(plan, folder, outputs), plan)
        assert cache is not None
        return cache


def _decoder(size: _Size) -> Decoder:
    config = shaped_config(
        size.dim,
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        context_length=size.num_tokens,
        num_corrections=_TEACHER_CORRECTIONS,
    )
    return fresh_decoder(config)


def _rows(bench: _Bench, repetitions: int) -> list[Row]:
    tasks = {
        **{f"live {r}": bench.task(bench.teacher, r) for r in _STUDENTS},
        **{f"exact {r}": bench.task(bench.exact, r) for r in _STUDENTS},
        "coarse": bench.task(bench.coarse, _HALF, top_k=_TOP_K),
    }
    seconds = take_turns(tasks, repetitions=repetitions)
    rows = [
        _row(bench.size, f"exact, student r = {r}", seconds[f"live {r}"], seconds[f"exact {r}"], r)
        for r in _STUDENTS
    ]
    what = f"top {_TOP_K}, student r = {_HALF}"
    return [*rows, _row(bench.size, what, seconds[f"live {_HALF}"], seconds["coarse"], None)]


def _row(
    size: _Size, what: str, live: list[float], read: list[float], corrections: int | None
) -> Row:
    is_claimed = corrections is not None and corrections <= _HALF
    return Row(
        what=f"d {size.dim}, step that runs its teacher / reads it: {what}",
        quantities=(_milliseconds("runs", live), _milliseconds("reads", read)),
        ratio=paired_ratio(live, read),
        goal=size.goal if is_claimed else None,
    )


def _milliseconds(label: str, seconds: list[float]) -> Quantity:
    return Quantity(label, Spread.of([1e3 * value for value in seconds]), "ms")
