"""What one training takes before it starts: tokens, FLOPs, memory and checkpoints.

An `Estimate` follows from the settings of one training, so it needs neither prepared tokens nor a
trained teacher. Nothing is measured. `price.py` makes hours of several, `fit.py` says whether they
fit a machine. A frozen model that runs beside the trained one is the `teacher`: its FLOPs are
`teacher_flops`, and its weights and their share of the loss are in `worker_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from iiet import cost
from iiet.model.config import DistillationConfig, ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import decoder_config, newest_checkpoint
from orchestrator.planning.devices import Devices
from orchestrator.records.training import TrainingJob
from orchestrator.settings import BASELINE_METHOD, TrainingSettings
from orchestrator.terminal.render import format_bytes
from orchestrator.training import schedules
from orchestrator.training.continuing import first_step
from orchestrator.training.job import sequences_per_step
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import DONE_NAME, find_checkpoints, step_of

if TYPE_CHECKING:
    from orchestrator.planning.training_memory import Forms

ONE_CPU_WORKER = Devices()
WEIGHT_BYTES = 4
"""Bytes in a checkpoint of a weight, which is float32."""
MOMENTS_BYTES = 8
"""Bytes in a checkpoint of AdamW's two moments of a weight that is trained."""
BUFFER_BYTES = 4
"""Bytes in a checkpoint of Muon's buffer of such a weight, in place of the moments."""
PROCESS_BYTES = 512 * 2**20
"""Roughly what PyTorch, Ray and kernels take in each worker in addition to tensors."""
ALLOCATOR_FACTOR = 1.1
"""The allocator reserves more than the activations that exist at one time."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a new or a resumed training takes."""

    config: ModelConfig
    recipe: TrainingSettings
    folder: Path | None = None
    """Folder of the run or trial; None if it is not known."""
    section: str = "training"
    """Section of the settings that holds the recipe, for messages."""
    teacher: ModelConfig | None = None
    """A frozen model whose forward pass runs in the steps that `loss` names."""
    loss: DistillationConfig = field(default_factory=DistillationConfig)
    steps_done: int = 0
    """Steps that it resumes after."""
    present_bytes: int = 0
    """Bytes of its checkpoints on the disk, which new ones replace."""
    devices: Devices = ONE_CPU_WORKER
    """Where it runs."""

    @staticmethod
    def of(job: TrainingJob) -> Estimate:
        """Return what is left of a job that is not finished, on one CPU worker.

        Raises:
            UserError: If its teacher is missing or damaged.
        """
        saved_step = 0
        if job.tokens_folder and (newest := newest_checkpoint(job.folder)):
            saved_step = step_of(newest)
        teacher = None
        if job.frozen_teacher:
            folder = Path(job.frozen_teacher)
            # A source that is trained first is a plain model of the same sizes.
            is_only_planned = not job.tokens_folder and not folder.exists()
            plain = replace(job.model, method=BASELINE_METHOD, method_options=None, schedule=None)
            teacher = plain if is_only_planned else decoder_config(folder)
        files = chain.from_iterable(folder.iterdir() for folder in find_checkpoints(job.folder))
        return Estimate(
            config=job.model,
            recipe=job.recipe,
            folder=job.folder,
            section=job.section,
            teacher=teacher,
            loss=job.teaching or DistillationConfig(),
            steps_done=first_step(job, saved_step),
            present_bytes=sum(path.stat().st_size for path in files if path.is_file()),
        )

    @property
    def steps_left(self) -> range:
        """The steps that are left."""
        return range(self.steps_done, self.recipe.num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens of these steps."""
        return len(self.steps_left) * self.recipe.num_tokens_per_step

    @cached_property
    def num_teacher_tokens(self) -> int:
        """Tokens that the teacher reads in them."""
        steps = self.loss.steps_with_teacher(self.steps_left) if self.teacher else range(0)
        return len(steps) * self.recipe.num_tokens_per_step

    @cached_property
    def stages(self) -> dict[IterationSchedule, int]:
        """Iteration schedule -> number of these steps under it."""
        return {schedule: len(steps) for schedule, steps in self._steps_of_stages.items()}

    @cached_property
    def _steps_of_stages(self) -> dict[IterationSchedule, range]:
        return schedules.stages_of(self.config.corrections, self.recipe, self.steps_left)

    @cached_property
    def num_evaluations(self) -> int:
        """Field evaluations of one worker's passes in these steps, of the trained model alone.

        Raises:
            UserError: As `check_workers`.
        """
        evaluations = sum(
            num_steps * cost.inference_cost(self.config, schedule).evaluations_per_token
            for schedule, num_steps in self.stages.items()
        )
        return self.num_passes * evaluations

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.recipe.tokens_per_sequence(self.config)

    @cached_property
    def flops(self) -> float:
        """Training FLOPs of these steps, without a teacher's."""
        # Cheaper schedules of a retrofit learn from its full schedule, also with a source model.
        is_student = self.teacher is not None and not self.recipe.source_kl_weight
        flops_at = schedules.model_flops_by_step(self.config, self.recipe, is_student=is_student)
        if self.recipe.elastic:  # Each step draws its own cheaper schedules.
            flops_per_token = math.fsum(map(flops_at, self.steps_left))
        else:
            flops_per_token = math.fsum(
                len(steps) * flops_at(steps.start) for steps in self._steps_of_stages.values()
            )
        return self.recipe.num_tokens_per_step * flops_per_token

    @cached_property
    def teacher_flops(self) -> float:
        """FLOPs of the teacher in these steps, 0 without one."""
        if self.teacher is None:
            return 0.0
        read = cost.inference_cost(self.teacher, context_length=self.sequence_length)
        return self.num_teacher_tokens * read.forward_flops_per_token

    @property
    def total_flops(self) -> float:
        """FLOPs of these steps, with a teacher's."""
        return self.flops + self.teacher_flops

    @property
    def num_cheaper(self) -> int:
        """Cheaper schedules that a step of an elastic training trains."""
        family = schedules.elastic_family(self.config.corrections, self.recipe.elastic)
        return min(len(family), self.recipe.elastic.num_drawn) if self.recipe.elastic else 0

    @property
    def sequences_per_worker(self) -> int:
        """Sequences of each worker in one step.

        Raises:
            UserError: If the workers cannot share a step's sequences evenly.
        """
        self.check_workers()
        sequences = sequences_per_step(self.recipe, self.config, section=self.section)
        return sequences // self.devices.num_workers

    def check_workers(self) -> None:
        """Check that the workers can share a step's sequences evenly.

        Raises:
            UserError: If they cannot; says how many tokens a step may have.
        """
        sequences = sequences_per_step(self.recipe, self.config, section=self.section)
        workers = self.devices.num_workers
        if sequences % workers:
            nearest = -(-sequences // workers) * workers * self.sequence_length
            raise UserError(
                f"a step has {sequences} sequences, which {workers} workers cannot share evenly; "
                f"type --set {self.section}.num_tokens_per_step={nearest}"
            )

    @property
    def sequences_per_pass(self) -> int:
        """Largest number of sequences in one forward and backward pass."""
        per_worker = self.sequences_per_worker
        return min(per_worker, self.recipe.num_sequences_per_pass or per_worker)

    @property
    def num_passes(self) -> int:
        """Passes of one worker in one step (gradient accumulation)."""
        return -(-self.sequences_per_worker // self.sequences_per_pass)

    @property
    def forms(self) -> Forms:
        """How fields are computed: on a GPU they are compiled unless the recipe says otherwise."""
        if not self.devices.on_gpus:
            return "fast"
        return "plain" if self.recipe.compile is False else "compiled"

    @cached_property
    def worker_memory(self) -> dict[str, int]:
        """What takes memory -> bytes that one worker needs for it."""
        from orchestrator.planning.training_memory import (  # Imports PyTorch.
            TrainingStep,
            training_memory,
        )

        devices = self.devices
        schedule_at = schedules.schedule_by_step(self.config.corrections, self.recipe)
        step = TrainingStep(
            num_sequences=self.sequences_per_pass,
            sequence_length=self.sequence_length,
            num_passes=self.num_passes * (1 + self.num_cheaper),
            # No step before the last makes more corrections.
            schedule=schedule_at(self.recipe.num_steps - 1),
            trained=self.recipe.trained_layers,
            optimizer=self.recipe.optimizer,
            frozen=self.teacher,
            has_cheaper=self.num_cheaper > 0,
            compares_hidden=self.teacher is not None and self.loss.hidden_weight > 0,
            precision=self.recipe.precision,
            on_gpus=devices.on_gpus,
            num_shards=devices.num_shards,
            activation_checkpointing=self.recipe.activation_checkpointing,
            forms=self.forms,
        )
        parts = training_memory(self.config, step)
        if not devices.on_gpus and devices.num_shards > 1:
            # Each worker copies its rows, and makes a file of them before it is written.
            parts["a copy for the checkpoint"] = 2 * (self.checkpoint_bytes // devices.num_shards)
        elif not devices.on_gpus:
            # By the first worker, while training continues; workers on CPUs share memory.
            parts["a copy for the checkpoint"] = self.checkpoint_bytes // devices.num_workers
        kept_free = int(parts["activations"] * (ALLOCATOR_FACTOR - 1))
        return {**parts, "PyTorch": PROCESS_BYTES + kept_free}

    @property
    def worker_bytes(self) -> int:
        """Memory that one worker needs."""
        return sum(self.worker_memory.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return checkpoint_bytes(self.config, self.recipe)

    @property
    def new_checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints that are kept at the end, beside those that exist."""
        kept = min(self._num_kept, self._most_checkpoints)
        return max(0, self.checkpoint_bytes * kept - self.present_bytes)

    @property
    def bytes_in_writing(self) -> int:
        """Bytes on the disk while a checkpoint is written, beside those that are kept.

        It is complete before an old one is deleted, if the training writes more than it keeps. The
        rows of a sharded model are deleted when its whole weights are written.
        """
        rows = WEIGHT_BYTES * cost.num_parameters(self.config) * (self.devices.num_shards > 1)
        return rows + (self.checkpoint_bytes if self._most_checkpoints > self._num_kept else 0)

    @property
    def _has_stable_part(self) -> bool:
        # The checkpoint before the decay is kept, too.
        return 0 < schedules.stable_steps(self.recipe) < self.recipe.num_steps

    @property
    def _num_kept(self) -> int:
        return self.recipe.num_checkpoints_kept + self._has_stable_part

    @property
    def _most_checkpoints(self) -> int:
        recipe = self.recipe
        if recipe.checkpoint_every_minutes is not None:
            return self._num_kept + 1  # How many are written, depends on the speed.
        return math.ceil(recipe.num_steps / recipe.checkpoint_every_steps) + self._has_stable_part


def checkpoint_bytes(config: ModelConfig, recipe: TrainingSettings) -> int:
    """Return the bytes of one checkpoint."""
    trained = recipe.trained_layers
    by_adamw = cost.num_trained_parameters(config, trained)
    by_muon = 0
    if recipe.optimizer == "muon":
        by_muon = cost.num_trained_matrix_parameters(config, trained)
        by_adamw -= by_muon
    weights = WEIGHT_BYTES * cost.num_parameters(config)
    return weights + MOMENTS_BYTES * by_adamw + BUFFER_BYTES * by_muon


def note_saving(jobs: Iterable[TrainingJob], note: Callable[[str], None] | None) -> None:
    """Say how much the jobs that train save now that a stop was requested, and how to skip it."""
    unfinished = [job for job in jobs if not (job.folder / DONE_NAME).is_file()]
    num_bytes = sum(checkpoint_bytes(job.model, job.recipe) for job in unfinished)
    if note and num_bytes:
        note(f"saving {format_bytes(num_bytes)}; a second Ctrl-C ends without it")
