"""How fast trainings of a workspace were, as their journals say.

A plan takes these speeds for trainings of the same sizes on the same devices, in place of assumed
ones. The training's own speed counts most: a training that is resumed has the hours of its first
steps. A busy machine makes a training slower, so these speeds are no benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean, quantiles
from typing import Any

from iiet.model.config import ModelConfig
from orchestrator.planning.estimate import Estimate
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import (
    GFLOPS_METRIC,
    JOURNAL_NAME,
    JournalRecord,
    read_journal,
)
from orchestrator.workspace.layout import Workspace

MOST_READ = 20
"""Journals that a plan reads, the newest ones: a sweep may have thousands."""
SPREAD = 1.25
"""A training takes up to this many times more or less than an equal one did: between the students
of one sweep, on a machine that did nothing else, it was that much."""
_SIZES = ("dim", "ffn_dim", "num_heads", "vocab_size")
"""Sizes of a model on which its FLOP/s depend; layers and corrections only repeat what they are."""
_RECIPE = (
    "num_tokens_per_step", "sequence_length", "num_sequences_per_pass", "optimizer", "precision",
    "trained_layers", "activation_checkpointing", "compile",
)  # fmt: skip
"""Fields of a recipe on which they depend."""


@dataclass(frozen=True)
class Speed:
    """How fast a training was in its last process."""

    folder: Path
    """Of the run or trial."""
    sizes: tuple[Any, ...]
    """What `sizes_of` says of it."""
    processor: str
    """Name of its CPU or GPU."""
    num_workers: int
    num_devices: int
    """Its GPUs, or the CPUs that it had."""
    flops_per_second: float
    """Of all devices together."""


def sizes_of(config: ModelConfig, recipe: TrainingSettings) -> tuple[Any, ...]:
    """Return that on which the FLOP/s of a training depend, beside its devices."""
    sizes = [getattr(config, name) for name in _SIZES]
    return (*sizes, *(getattr(recipe, name) for name in _RECIPE))


def measured_speeds(workspace: Workspace) -> list[Speed]:
    """Return the speeds of the newest trainings of a workspace; what cannot be read has none."""
    journals: list[tuple[float, Path]] = []
    for parent in (workspace.runs, workspace.trials):
        for path in parent.glob(f"*/{JOURNAL_NAME}"):
            with suppress(OSError):  # Deleted meanwhile.
                journals.append((path.stat().st_mtime, path.parent))
    newest = [folder for _, folder in sorted(journals, reverse=True)[:MOST_READ]]
    return [speed for folder in newest if (speed := _speed_in(folder))]


def _speed_in(folder: Path) -> Speed | None:
    """Return the speed of the training in a folder; None if it has made no steps, or was made by a
    version that did not record the processor."""
    job = None
    with suppress(UserError):
        job = TrainingJob.of_folder(folder)
    if job is None:
        return None
    last_start: JournalRecord = {}
    gflops_per_second: list[float] = []
    for record in read_journal(folder)[0]:
        if record["kind"] == "event" and record["name"] in ("started", "resumed"):
            last_start = record
            gflops_per_second = []
        elif record["kind"] == "metrics" and record["values"].get(GFLOPS_METRIC, 0) > 0:
            gflops_per_second.append(record["values"][GFLOPS_METRIC])
    del gflops_per_second[:1]  # The first one of a process includes what is done once.
    match last_start:
        case {
            "processor": str() as processor,
            "device": str() as device,
            "num_workers": int() as num_workers,
            "num_threads": int() as num_threads,
        } if gflops_per_second:
            return Speed(
                folder=folder,
                sizes=sizes_of(job.model, job.recipe),
                processor=processor,
                num_workers=num_workers,
                num_devices=num_workers * (num_threads if device == "cpu" else 1),
                flops_per_second=1e9 * harmonic_mean(gflops_per_second),
            )
    return None


def speed_range(
    training: Estimate, speeds: Sequence[Speed], processor: str, num_devices: int
) -> tuple[float, float] | None:
    """Return the lowest and highest FLOP/s of a training by the quartiles of measured speeds; None
    if none fits.

    Args:
        processor: Name of its CPU or GPU.
        num_devices: GPUs or CPUs that it gets.
    """
    sizes = sizes_of(training.config, training.recipe)
    wanted = (sizes, processor, training.devices.num_workers, num_devices)
    fitting = [
        speed
        for speed in speeds
        if (speed.sizes, speed.processor, speed.num_workers, speed.num_devices) == wanted
    ]
    own = [speed for speed in fitting if speed.folder == training.folder]
    flops_per_second = [speed.flops_per_second for speed in own or fitting]
    if not flops_per_second:
        return None
    slow = fast = flops_per_second[0]
    if len(flops_per_second) > 1:  # A training beside which the machine was busy is an exception.
        slow, _, fast = quantiles(flops_per_second, n=4, method="inclusive")
    return slow / SPREAD, fast * SPREAD
