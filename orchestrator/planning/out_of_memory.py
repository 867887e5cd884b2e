"""What to change after a training ran out of a GPU's memory although its plan fitted.

The plan left something out, so a proposal must take clearly less than the plan that failed. Trying
again would end the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch

from orchestrator.planning.fit import nearest_fit
from orchestrator.planning.planned_training import PlannedTraining, planned_training
from orchestrator.records.training import TrainingJob
from orchestrator.settings import SETTINGS_NAME, read_settings
from orchestrator.terminal.render import format_byte_parts, format_bytes
from orchestrator.training.distributed import World
from orchestrator.workspace.errors import DeviceError, out_of_memory_text

LARGEST_SHARE = 0.8
"""Share of the failed plan's bytes that a proposal may take."""


@contextmanager
def out_of_memory_explained(
    job: TrainingJob, world: World, parallel: Literal["ddp", "fsdp"] | None = None
) -> Iterator[None]:
    """Turn PyTorch's out-of-memory error in the block, which trains a job, into a `DeviceError`.

    Args:
        parallel: How the workers share the model; None if the settings offer no choice.

    Raises:
        DeviceError: Says what was planned, and the nearest setting that takes clearly less.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        path = job.folder / SETTINGS_NAME
        model = read_settings(path).model if path.exists() else None
        training = replace(
            planned_training(job),
            num_workers=world.size,
            on_gpus=world.device != "cpu",
            parallel=parallel,
            shards=world.shards,
            model=model,
        )
        raise DeviceError(
            f"training ran out of memory on {world.device} ({out_of_memory_text(error)}); "
            f"{describe_smaller(training)}"
        ) from None


def describe_smaller(training: PlannedTraining) -> str:
    """Say what a training that ran out of memory was planned to take, and what takes less."""
    most = int(LARGEST_SHARE * training.worker_bytes)
    change = nearest_fit(training, lambda other: other.worker_bytes <= most)
    advice = "no setting takes less; use a smaller model or a GPU with more memory"
    if change:
        advice = f"the nearest setting that takes clearly less: {change}"
    return (
        f"its plan was {format_bytes(training.worker_bytes)} "
        f"({format_byte_parts(training.worker_memory)}); {advice}; the checkpoints are kept"
    )
