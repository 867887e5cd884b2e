"""A `Trainer` of a model and batches that a test gives it: it reads and writes no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from iiet.decoder import Decoder
from iiet.iiad.distillation import Model
from iiet.model.batch import Batch
from iiet.model.config import DistillationConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.settings import TrainingSettings
from orchestrator.training.checkpoint import Position
from orchestrator.training.devices import Replicas
from orchestrator.training.objective import Objective
from orchestrator.training.trainer import Trainer
from orchestrator.training.world import World
from orchestrator.workspace.journal import VALIDATION_METRIC


def no_batch(step: int) -> Batch:
    raise AssertionError(f"nobody gave a batch for step {step}")


class BareTrainer(Trainer):
    """Trains from `step` on, and keeps what it would write to the journal."""

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        recipe: TrainingSettings,
        *,
        cheaper: Sequence[IterationSchedule] = (),
        teacher: Model | None = None,
        distillation: DistillationConfig | None = None,
        batch: Callable[[int], Batch] = no_batch,
        optimizer: torch.optim.Optimizer | None = None,
        world: World | None = None,
        step: int = 0,
    ) -> None:
        self.model = self.decoder = decoder
        self.optimizer = optimizer or torch.optim.SGD(decoder.parameters(), lr=0.1)
        self.objective = objective
        self.recipe = recipe
        self.drawn_at = lambda _: tuple(cheaper)
        self.frozen_teacher = None
        self.teacher = teacher
        self.distillation = distillation
        self.world = world or World()
        self.position = Position(step=step)
        self.replicas = Replicas(decoder, self.world)
        self.schedule_at = lambda _: decoder.schedule
        self.cheaper_at = self.drawn_at
        self.sequences_per_pass = recipe.num_sequences_per_pass
        self.batch = batch
        self.profiler = None
        self.writer: Any = SimpleNamespace(save=lambda *_: None)
        self.meter: Any = SimpleNamespace(measure=lambda _: {})
        self.flops_per_token = lambda _: 0.0
        self.reported: list[Mapping[str, float]] = []

    def gradients(self, batch: Batch) -> dict[str, float]:
        """Compute the gradients of one batch, all of whose targets are on this worker."""
        batch = batch.counted_as(batch.num_targets, batch.num_positions)
        return {name: float(value) for name, value in self.compute_gradients(batch, 0).items()}

    def requests(self, step: int) -> dict[str, float]:
        return {"stop": 0.0, "save": 0.0}

    def validate(self) -> dict[str, float]:
        return {VALIDATION_METRIC: 0.0}

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        self.reported.append(numbers)

    def event(self, name: str, **details: Any) -> None:
        pass
