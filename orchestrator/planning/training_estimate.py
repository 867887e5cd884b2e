"""What a training run will take, from its settings alone: nothing is built, nothing is started.

In: a model's configuration, its recipe, the number of workers. Out: tokens, passes, FLOPs, bytes on
disk and in memory, as plain numbers that a dry run prints, and that are compared with what the
machine has before a run starts. Hours follow from an assumed rate, which is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from iiet.config import ModelConfig
from iiet.cost import inference_cost, num_parameters, training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.training_memory import TrainingMemory, training_memory
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import sequences_per_step
from orchestrator.training.schedules import schedule_by_step
from orchestrator.workspace.errors import UserError

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""A float32 weight and AdamW's two moments."""


@dataclass(frozen=True, kw_only=True)
class TrainingStage:
    """Steps that are trained under one iteration schedule."""

    schedule: IterationSchedule
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """What one run takes."""

    config: ModelConfig
    recipe: TrainingSettings
    num_workers: int
    num_parameters: int
    """All of the model's."""
    num_tokens: int
    """Trained on, by all workers together."""
    sequences_per_worker: int
    """Of one step."""
    num_passes: int
    """Forward and backward passes of one worker in one step (gradient accumulation)."""
    sequences_per_pass: int
    """Most sequences of one such pass."""
    stages: tuple[TrainingStage, ...]
    """What is trained when."""
    training_flops: float
    """Of all steps, forward and backward, a teacher's forward passes included."""
    memory: TrainingMemory
    """Of one worker."""
    checkpoint_bytes: int
    """One checkpoint."""
    snapshot_bytes: int
    """This worker's part of the copy that a checkpoint is written from, beside the next steps; none
    on GPUs, where it lies in the machine's memory."""

    @property
    def kept_bytes(self) -> int:
        """All checkpoints that are kept."""
        return self._checkpoints(self.recipe.num_checkpoints_kept + self.recipe.keep_best)

    @property
    def disk_bytes(self) -> int:
        """All checkpoints that are kept, and the next one while it is written beside them."""
        return self._checkpoints(self.recipe.num_checkpoints_kept + self.recipe.keep_best + 1)

    def _checkpoints(self, most: int) -> int:
        """Return the bytes of so many checkpoints, or of as many as the run writes at all."""
        recipe = self.recipe
        if recipe.checkpoint_every_minutes is None:
            most = min(most, -(-recipe.num_steps // recipe.checkpoint_every_steps))
        return self.checkpoint_bytes * most

    def hours(self, flops_per_second: float) -> float:
        """Return the time of all steps at a rate of one worker."""
        return self.training_flops / (flops_per_second * self.num_workers) / 3600


def estimate_training(
    config: ModelConfig,
    recipe: TrainingSettings,
    *,
    num_workers: int = 1,
    parallel: str = "ddp",
    on_gpus: bool = False,
    teacher: ModelConfig | None = None,
) -> TrainingEstimate:
    """Estimate a training run.

    Args:
        config: The model, with the iteration schedule that is trained in the end.
        recipe: Steps, batch and precision.
        num_workers: Data-parallel workers.
        parallel: `ddp`, each worker has the whole model, or `fsdp`, they share it.
        on_gpus: Whether the workers' memory is a GPU's.
        teacher: A frozen model whose forward pass runs in each step.

    Raises:
        UserError: If the tokens of a step are no whole number of sequences for each worker.
    """
    share = _sequences_per_worker(config, recipe, num_workers)
    per_pass = min(share, recipe.num_sequences_per_pass or share)
    stages = _stretches(config, recipe)
    costliest = max(stages, key=lambda stage: stage.schedule.num_corrections)
    parameters = num_parameters(config)
    return TrainingEstimate(
        config=config,
        recipe=recipe,
        num_workers=num_workers,
        num_parameters=parameters,
        num_tokens=recipe.num_steps * recipe.num_tokens_per_step,
        sequences_per_worker=share,
        num_passes=-(-share // per_pass),
        sequences_per_pass=per_pass,
        stages=stages,
        training_flops=_training_flops(config, recipe, stages, teacher),
        memory=training_memory(
            config,
            costliest.schedule,
            num_sequences=per_pass,
            precision=recipe.precision,
            activation_checkpointing=recipe.activation_checkpointing,
            num_shards=num_workers if parallel == "fsdp" else 1,
            has_teacher=teacher is not None,
        ),
        checkpoint_bytes=CHECKPOINT_BYTES_PER_PARAMETER * parameters,
        # The first worker makes it, and all share the machine's memory.
        snapshot_bytes=0 if on_gpus else CHECKPOINT_BYTES_PER_PARAMETER * parameters // num_workers,
    )


def _sequences_per_worker(config: ModelConfig, recipe: TrainingSettings, num_workers: int) -> int:
    sequences = sequences_per_step(recipe, config)
    if sequences % num_workers:
        nearest = -(-sequences // num_workers) * num_workers * config.context_length
        raise UserError(
            f"a step has {sequences} sequences, which {num_workers} workers cannot share evenly; "
            f"type --set training.num_tokens_per_step={nearest}"
        )
    return sequences // num_workers


def _stretches(config: ModelConfig, recipe: TrainingSettings) -> tuple[TrainingStage, ...]:
    schedule_at = schedule_by_step(config.corrections, recipe)
    counts: dict[IterationSchedule, int] = {}
    for step in range(recipe.num_steps):
        schedule = schedule_at(step)
        counts[schedule] = counts.get(schedule, 0) + 1
    return tuple(TrainingStage(schedule=s, num_steps=count) for s, count in counts.items())


def _training_flops(
    config: ModelConfig,
    recipe: TrainingSettings,
    stages: tuple[TrainingStage, ...],
    teacher: ModelConfig | None,
) -> float:
    @lru_cache
    def per_token(schedule: IterationSchedule) -> float:
        return float(training_flops_per_token(config, schedule))

    forward = inference_cost(teacher).forward_flops_per_token if teacher else 0.0
    return float(
        sum(
            stage.num_steps * recipe.num_tokens_per_step * (per_token(stage.schedule) + forward)
            for stage in stages
        )
    )
