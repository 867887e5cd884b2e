"""One training before it starts: passes, tokens, FLOPs, memory and disk follow from its settings.

It needs neither prepared tokens nor a trained teacher, so that a dry run can describe trainings
that have no `TrainingJob` yet.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from iiet.config import ModelConfig
from iiet.cost import num_parameters, training_flops_per_token
from iiet.distillation import DistillationConfig
from iiet.elastic import member_flops_per_token
from iiet.schedule import IterationSchedule
from iiet.training_memory import TrainingMemory, training_memory
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ModelSettings, TrainingSettings
from orchestrator.training.checkpoint import load_config, load_provenance
from orchestrator.training.checkpoint_lookup import newest_checkpoint
from orchestrator.training.first_stage import FirstStage, first_stage_of
from orchestrator.training.job import sequences_per_step
from orchestrator.training.learning_rate import stable_steps
from orchestrator.training.schedules import (
    drawn_by_step,
    elastic_family,
    members_read_full,
    schedule_by_step,
)
from orchestrator.training.teacher_cache import CachePlan, cache_plan
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import find_checkpoints, step_of

CHECKPOINT_BYTES_PER_PARAMETER = 12
"""A float32 weight and AdamW's two moments."""
PROCESS_BYTES = 512 * 2**20
"""Roughly what PyTorch, Ray and kernels take in each worker beside tensors."""
HOST_PROCESS_BYTES = 2 * 2**30
"""Roughly what PyTorch with CUDA and NCCL takes of the machine's memory in each worker on a GPU."""
ALLOCATOR_FACTOR = 1.1
"""The allocator holds more than the activations that exist at one time."""


@dataclass(frozen=True, kw_only=True)
class PlannedTraining:
    """A training that may start, or resume, on workers of its own."""

    config: ModelConfig
    recipe: TrainingSettings
    section: str = "training"
    """Section of the settings that holds the recipe, for messages."""
    teacher: ModelConfig | None = None
    """A frozen model whose forward pass runs in the steps that `loss` names."""
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    cache: CachePlan | None = None
    """The teacher's outputs, if they may be stored."""
    first_stage: FirstStage | None = None
    """Its first stage, if it may be shared; trainings with the same folder train it once."""
    steps_done: int = 0
    """Steps that it resumes after."""
    present_bytes: int = 0
    """Bytes of its checkpoints, which new ones replace."""
    num_workers: int = 1
    parallel: Literal["ddp", "fsdp"] | None = None
    """`fsdp`: the workers share the model; None if the settings offer no choice."""
    shards: int | None = None
    """With `fsdp`, workers that share one copy of the model, if not all."""
    on_gpus: bool = False
    """Whether each worker has a GPU."""
    model: ModelSettings | None = None
    """Settings of the model, if an error may propose a smaller one."""
    storage: str | None = None
    """URI for copies of its checkpoints."""

    def with_recipe(self, **changes: Any) -> PlannedTraining:
        """Return the same training with other fields of the recipe."""
        return replace(self, recipe=self.recipe.model_copy(update=changes))

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.config)

    @property
    def steps_left(self) -> range:
        """The steps that are still trained."""
        return range(self.steps_done, self.recipe.num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of these steps."""
        return len(self.steps_left) * self.recipe.num_tokens_per_step

    @cached_property
    def num_teacher_tokens(self) -> int:
        """Tokens that a teacher which runs in this training reads in these steps."""
        steps = sum(map(self.loss.uses_teacher, self.steps_left)) if self.teacher else 0
        return steps * self.recipe.num_tokens_per_step

    @cached_property
    def stages(self) -> dict[IterationSchedule, int]:
        """Iteration schedule -> number of the steps that are left under it."""
        schedule_at = schedule_by_step(self.config.corrections, self.recipe)
        return dict(Counter(map(schedule_at, self.steps_left)))

    @cached_property
    def flops(self) -> float:
        """Training FLOPs of these steps, without a teacher's."""
        trained = [
            times * training_flops_per_token(self.config, schedule)
            for schedule, times in self.stages.items()
        ]
        if self.recipe.elastic:
            drawn_at = drawn_by_step(self.config.corrections, self.recipe)
            reads_full = members_read_full(self.recipe.elastic, has_teacher=bool(self.teacher))
            drawn = Counter(chain.from_iterable(map(drawn_at, self.steps_left)))
            trained += [
                times * member_flops_per_token(self.config, member, reads_full=reads_full)
                for member, times in drawn.items()
            ]
        return self.recipe.num_tokens_per_step * sum(trained)

    @property
    def num_members(self) -> int:
        """Schedules of an elastic training that a step trains beside the full one."""
        family = elastic_family(self.config.corrections, self.recipe.elastic)
        return min(len(family), self.recipe.elastic.num_drawn) if self.recipe.elastic else 0

    @property
    def sequences_per_worker(self) -> int:
        """Sequences of one step.

        Raises:
            UserError: If the workers cannot share a step's sequences evenly.
        """
        sequences = sequences_per_step(self.recipe, self.config, section=self.section)
        if sequences % self.num_workers:
            nearest = -(-sequences // self.num_workers) * self.num_workers
            raise UserError(
                f"a step has {sequences} sequences, which {self.num_workers} workers cannot share "
                f"evenly; type --set {self.section}.num_tokens_per_step="
                f"{nearest * self.config.context_length}"
            )
        return sequences // self.num_workers

    @property
    def sequences_per_pass(self) -> int:
        """Largest number of sequences in one forward and backward pass."""
        per_worker = self.sequences_per_worker
        return min(per_worker, self.recipe.num_sequences_per_pass or per_worker)

    @property
    def num_passes(self) -> int:
        """Passes of one worker in one step (gradient accumulation)."""
        return -(-self.sequences_per_worker // self.sequences_per_pass)

    @cached_property
    def memory(self) -> TrainingMemory:
        """Bytes of one worker's tensors."""
        schedule_at = schedule_by_step(self.config.corrections, self.recipe)
        return training_memory(
            self.config,
            schedule_at(self.recipe.num_steps - 1),  # No earlier one makes more corrections.
            num_sequences=self.sequences_per_pass,
            precision=self.recipe.precision,
            on_gpus=self.on_gpus,
            activation_checkpointing=self.recipe.activation_checkpointing,
            num_shards=(self.shards or self.num_workers) if self.parallel == "fsdp" else 1,
            num_passes=self.num_passes * (1 + self.num_members),
            has_teacher=self.teacher is not None,
            has_members=self.num_members > 0,
        )

    @cached_property
    def worker_memory(self) -> dict[str, int]:
        """What takes memory -> bytes that one worker needs for it."""
        memory = self.memory
        # The first worker copies a checkpoint while training continues, and all workers share the
        # machine's memory. With GPUs, the copy is not in theirs.
        copy = 0 if self.on_gpus else self.checkpoint_bytes // self.num_workers
        parts = {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "AdamW": memory.optimizer,
            "activations": memory.activations,
            "a copy for the checkpoint": copy,
            "PyTorch": PROCESS_BYTES + int(memory.activations * (ALLOCATOR_FACTOR - 1)),
        }
        return {name: value for name, value in parts.items() if value}

    @property
    def worker_bytes(self) -> int:
        """Memory that one worker needs."""
        return sum(self.worker_memory.values())

    @cached_property
    def host_memory(self) -> dict[str, int]:
        """What takes the machine's memory beside the GPUs' -> bytes of all workers together.

        Tokens, checkpoints that are read, and a teacher's stored outputs are mapped from files, and
        the system drops them if it needs memory. Each worker draws its weights tensor by tensor.
        """
        return {
            "PyTorch": self.num_workers * HOST_PROCESS_BYTES,
            "pinned buffers for checkpoints": _pinned_bytes(self.config),
        }

    @property
    def host_bytes(self) -> int:
        """Memory of the machine that all workers on GPUs need together."""
        return sum(self.host_memory.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return CHECKPOINT_BYTES_PER_PARAMETER * self.num_parameters

    def new_bytes(self, most_kept: int | None = None) -> int:
        """Bytes of all checkpoints that are kept, beside those that exist."""
        return max(0, self._bytes_of(0, most_kept) - self.present_bytes)

    def bytes_in_writing(self, most_kept: int | None = None) -> int:
        """Bytes of the checkpoint that is written while all others are still kept."""
        return self._bytes_of(1, most_kept) - self._bytes_of(0, most_kept)

    def _bytes_of(self, num_more: int, most_kept: int | None) -> int:
        recipe = self.recipe
        kept = min(recipe.num_checkpoints_kept, most_kept or recipe.num_checkpoints_kept)
        has_stable = 0 < stable_steps(recipe) < recipe.num_steps
        number = kept + num_more + recipe.keep_best + has_stable
        if recipe.checkpoint_every_minutes is None:
            num_written = -(-recipe.num_steps // recipe.checkpoint_every_steps) + has_stable
            number = min(number, num_written)
        return self.checkpoint_bytes * number


def _pinned_bytes(config: ModelConfig) -> int:
    """Bytes of the buffers of a checkpoint, each of which PyTorch rounds up to a power of two."""
    dim, kv_dim = config.dim, config.num_kv_heads * config.head_dim
    field = [dim * (dim + 2 * kv_dim), dim * dim, 2 * dim * config.ffn_dim, dim * config.ffn_dim]
    embeddings = [config.vocab_size * dim] * (1 if config.tie_embeddings else 2)
    matrices = [*embeddings, *(config.num_layers * field)]
    others = num_parameters(config) - sum(matrices)
    rounded = sum(1 << (size - 1).bit_length() for size in matrices) + 2 * others
    return CHECKPOINT_BYTES_PER_PARAMETER * rounded


def planned_training(job: TrainingJob) -> PlannedTraining:
    """Return what is left of a job that is not finished, on one CPU worker.

    Raises:
        UserError: If its teacher is missing or damaged.
    """
    teacher = job.teacher_folder if job.objective == "distill" else None
    checkpoints, stage = find_checkpoints(job.folder), first_stage_of(job)
    newest = newest_checkpoint(job.folder) if job.tokens_folder else None
    steps_done = int(load_provenance(newest)["step"]) if newest else 0
    if stage and stage.exists:
        steps_done = max(steps_done, stage.num_steps)
    if job.continued_from:
        steps_done = max(steps_done, step_of(Path(job.continued_from)))
    files = (path for checkpoint in checkpoints for path in checkpoint.iterdir())
    return PlannedTraining(
        config=job.model,
        recipe=job.recipe,
        section=job.section,
        teacher=load_config(Path(teacher)) if teacher else None,
        loss=job.distillation or DistillationConfig(),
        cache=cache_plan(job),
        first_stage=stage,
        steps_done=steps_done,
        present_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        storage=job.storage,
    )
