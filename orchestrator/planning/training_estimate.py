"""What a training takes (passes, FLOPs, memory, disk), computed from its settings alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from iiet.config import ModelConfig
from iiet.cost import inference_cost, num_parameters, training_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.training_memory import TrainingMemory, training_memory
from orchestrator.settings import TrainingSettings
from orchestrator.training.job import sequences_per_step
from orchestrator.training.learning_rate import stable_steps
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
    """What one training takes."""

    config: ModelConfig
    recipe: TrainingSettings
    num_workers: int
    num_parameters: int
    num_tokens: int
    """All tokens that are read."""
    sequences_per_worker: int
    """Sequences of one step."""
    num_passes: int
    """Forward and backward passes of one worker in one step (gradient accumulation)."""
    sequences_per_pass: int
    """Largest number of sequences in one pass."""
    stages: tuple[TrainingStage, ...]
    training_flops: float
    """FLOPs of all steps, forward and backward, including a teacher's forward passes."""
    memory: TrainingMemory
    """Bytes of one worker."""
    checkpoint_bytes: int
    """Bytes of one checkpoint."""
    snapshot_bytes: int
    """This worker's share of the copy that a checkpoint is written from while training continues;
    0 on GPUs, where the copy is in the machine's memory."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of all checkpoints that are kept."""
        return self._bytes_of(self.recipe.num_checkpoints_kept)

    @property
    def disk_bytes(self) -> int:
        """Bytes of all checkpoints that are kept, and of the one being written."""
        return self._bytes_of(self.recipe.num_checkpoints_kept + 1)

    def _bytes_of(self, num_newest: int) -> int:
        recipe = self.recipe
        has_stable = 0 < stable_steps(recipe) < recipe.num_steps
        num_checkpoints = num_newest + recipe.keep_best + has_stable
        if recipe.checkpoint_every_minutes is None:
            num_written = -(-recipe.num_steps // recipe.checkpoint_every_steps) + has_stable
            num_checkpoints = min(num_checkpoints, num_written)
        return self.checkpoint_bytes * num_checkpoints

    def hours(self, flops_per_second: float) -> float:
        """Return the hours of all steps; the rate is that of one worker."""
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
    """Estimate a training.

    Args:
        parallel: `ddp`: each worker has the whole model; `fsdp`: the workers share it.
        on_gpus: Whether the workers use GPU memory.
        teacher: A frozen model whose forward pass runs in each step.

    Raises:
        UserError: If a step's sequences cannot be divided evenly among the workers.
    """
    sequences = sequences_per_step(recipe, config)
    if sequences % num_workers:
        nearest = -(-sequences // num_workers) * num_workers * config.context_length
        raise UserError(
            f"a step has {sequences} sequences, which {num_workers} workers cannot share evenly; "
            f"type --set training.num_tokens_per_step={nearest}"
        )
    per_worker = sequences // num_workers
    per_pass = min(per_worker, recipe.num_sequences_per_pass or per_worker)
    schedule_at = schedule_by_step(config.corrections, recipe)
    counts = Counter(schedule_at(step) for step in range(recipe.num_steps))
    stages = tuple(TrainingStage(schedule=s, num_steps=count) for s, count in counts.items())
    costliest = max(stages, key=lambda stage: stage.schedule.num_corrections)
    parameters = num_parameters(config)
    teacher_flops = inference_cost(teacher).forward_flops_per_token if teacher else 0.0
    return TrainingEstimate(
        config=config,
        recipe=recipe,
        num_workers=num_workers,
        num_parameters=parameters,
        num_tokens=recipe.num_steps * recipe.num_tokens_per_step,
        sequences_per_worker=per_worker,
        num_passes=-(-per_worker // per_pass),
        sequences_per_pass=per_pass,
        stages=stages,
        training_flops=recipe.num_tokens_per_step
        * sum(
            stage.num_steps * (training_flops_per_token(config, stage.schedule) + teacher_flops)
            for stage in stages
        ),
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
        # The first worker makes the copy, and all workers share the machine's memory.
        snapshot_bytes=0 if on_gpus else CHECKPOINT_BYTES_PER_PARAMETER * parameters // num_workers,
    )
