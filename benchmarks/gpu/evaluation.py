"""Items per second of the held-out tasks in float32 and bfloat16, by `orchestrator.evaluate`.

The model is trained for a few steps first. The time is that of the tasks: without loading the model
and opening MLflow's store. Accuracies may change by rounding; bits per byte must hardly change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.setup import Setup
from iiet.config import preset
from orchestrator.pipelines.evaluating import evaluate
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.settings.training import Precision
from orchestrator.terminal.progress import Progress
from orchestrator.training.run import run_job

BITS_TOLERANCE = 0.01
"""Largest difference of bits per byte from float32's."""
NUM_WARM_UP_ITEMS = 5


def evaluation(setup: Setup) -> Iterator[Finding]:
    """Evaluate one model in both precisions."""
    checkpoint = _trained(setup)
    _evaluate(setup, checkpoint, "fp32", limit=NUM_WARM_UP_ITEMS)
    exact = _evaluate(setup, checkpoint, "fp32")
    yield Finding(what="fp32", figures=exact)
    rounded = _evaluate(setup, checkpoint, "bf16")
    difference = abs(float(rounded["bits per byte"]) - float(exact["bits per byte"]))
    yield Finding(
        what="bf16",
        figures=rounded,
        problem=None
        if difference <= BITS_TOLERANCE
        else f"bits per byte differ by {difference:.2g} from those in fp32",
    )


class _Timer(Progress):
    """Takes the time from the start of the tasks to their end."""

    def start(self, *_: Any, **__: Any) -> None:
        self._started = self._ended = time.perf_counter()

    def advance(self, *_: Any, **__: Any) -> None:
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._ended - self._started


def _trained(setup: Setup) -> Path:
    toy = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64, "vocab_size": 400}
    model = preset("tiny", **toy) if setup.is_toy else preset("55m")
    steps, sequences = (4, 2) if setup.is_toy else (50, 8)
    num_tokens = sequences * model.context_length
    job = setup.job("evaluated", model, num_steps=steps, num_tokens_per_step=num_tokens)
    return Path(str(run_job(job, world=setup.world).checkpoint))


def _evaluate(
    setup: Setup, checkpoint: Path, precision: Precision, limit: int | None = None
) -> dict[str, Figure]:
    timer = _Timer()
    num_items = 20 if setup.is_toy else EvaluationSettings().num_items
    settings = EvaluationSettings(num_items=num_items, precision=precision, limit=limit)
    found = evaluate(
        Settings(evaluation=settings), workspace=setup.folder, models=[checkpoint], progress=timer
    )
    [result] = found.evaluations.values()
    quality = result.quality()
    return {
        "items": result.num_items,
        "items/s": result.num_items / timer.seconds,
        "accuracy": quality["accuracy"],
        "bits per byte": quality["bits_per_byte"],
    }
