"""Whether a training fits into memory and onto the disk, and if not, the nearest setting that does.

The nearest setting is the first of these that fits: fewer sequences per pass (same gradients),
layers recomputed in the backward pass (slower), a model shared by its workers, a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from iiet.config import PRESETS, ModelConfig
from iiet.cost import num_parameters
from orchestrator.planning.resources import FreeBytes
from orchestrator.planning.training_estimate import TrainingEstimate, estimate_training
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ModelSettings, TrainingSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.checkpoint import load_config
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import UserError

PROCESS_BYTES = 512 * 2**20
"""Roughly what PyTorch, Ray and kernels take in each worker beside tensors."""
ALLOCATOR_FACTOR = 1.1
"""The allocator holds more than the activations that exist at one time."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """What a training asks for."""

    config: ModelConfig
    recipe: TrainingSettings
    section: str = "training"
    """Section of the settings that holds the recipe, for messages."""
    num_workers: int = 1
    parallel: str | None = None
    """`ddp` or `fsdp`; None if the settings offer no choice."""
    on_gpus: bool = False
    """Whether the workers use GPU memory."""
    model: ModelSettings | None = None
    """Settings of the model, if a smaller model may be proposed."""
    teacher: ModelConfig | None = None
    """A frozen model whose forward pass runs in each step."""

    def estimate(
        self,
        config: ModelConfig | None = None,
        *,
        parallel: str | None = None,
        **recipe: int | bool,
    ) -> TrainingEstimate:
        """Estimate the training, optionally with another model, parallelism or recipe fields."""
        return estimate_training(
            config or self.config,
            self.recipe.model_copy(update=recipe),
            num_workers=self.num_workers,
            parallel=parallel or self.parallel or "ddp",
            on_gpus=self.on_gpus,
            teacher=self.teacher,
        )


def request_of(job: TrainingJob) -> ResourceRequest:
    """Return what a job asks for, on one CPU worker."""
    return ResourceRequest(
        config=job.model,
        recipe=job.recipe,
        section=job.section,
        teacher=load_config(Path(job.teacher_folder)) if job.teacher_folder else None,
    )


def needed_memory(estimate: TrainingEstimate) -> int:
    """Return the bytes that one worker needs, including the process itself."""
    memory = estimate.memory
    spare = int(memory.activations * (ALLOCATOR_FACTOR - 1))
    return memory.total + spare + estimate.snapshot_bytes + PROCESS_BYTES


def check_fit(
    request: ResourceRequest, free: FreeBytes, *, present_bytes: int = 0, new_bytes: int = 0
) -> None:
    """Refuse a training that would run out of memory or disk.

    Args:
        present_bytes: Bytes of this run's checkpoints, which new ones replace.
        new_bytes: Bytes that will be written beside the checkpoints.

    Raises:
        UserError: If it does not fit; says what would.
    """
    estimate = request.estimate()
    if free.memory is not None and needed_memory(estimate) > free.memory:
        raise UserError(_too_little_memory(request, estimate, free.memory, free.place))
    if free.disk is not None and estimate.disk_bytes + new_bytes > free.disk + present_bytes:
        raise UserError(_too_little_disk(request, estimate, free.disk + present_bytes, new_bytes))


def _nearest_fit(request: ResourceRequest, fits: Callable[[TrainingEstimate], bool]) -> str | None:
    return next((text for text, estimate in _alternatives(request) if fits(estimate)), None)


def _alternatives(request: ResourceRequest) -> Iterator[tuple[str, TrainingEstimate]]:
    """Yield what to type and the estimate for it, the smallest change first."""
    yield from _with_less_memory(request)
    if request.parallel not in (None, "fsdp") and request.num_workers > 1:
        yield from _with_less_memory(request, "--set cluster.parallel=fsdp", parallel="fsdp")
    for name, config in _smaller_presets(request):
        yield from _with_less_memory(request, f"--preset {name}", config=config)


def _with_less_memory(
    request: ResourceRequest,
    text: str = "",
    *,
    config: ModelConfig | None = None,
    parallel: str | None = None,
) -> Iterator[tuple[str, TrainingEstimate]]:
    """Yield `text` alone, with fewer sequences per pass, and both with layers recomputed."""
    if text:
        yield text, request.estimate(config, parallel=parallel)
    per_pass = request.estimate(config).sequences_per_pass
    key = f"--set {request.section}."
    for recomputes in (False, True):
        for sequences in (per_pass >> halvings for halvings in range(per_pass.bit_length())):
            if sequences == per_pass and not recomputes:
                continue
            parts = (
                text,
                f"{key}activation_checkpointing=true" if recomputes else "",
                f"{key}num_sequences_per_pass={sequences}" if sequences < per_pass else "",
            )
            estimate = request.estimate(
                config,
                parallel=parallel,
                num_sequences_per_pass=sequences,
                activation_checkpointing=recomputes or request.recipe.activation_checkpointing,
            )
            yield " ".join(filter(None, parts)), estimate


def _smaller_presets(request: ResourceRequest) -> list[tuple[str, ModelConfig]]:
    """Return the presets that make the model smaller, the largest first."""
    if request.model is None:
        return []
    found = []
    for name in PRESETS:
        changed = request.model.model_copy(update={"preset": name})
        try:
            config = build_model_config(changed, vocab_size=request.config.vocab_size)
            request.estimate(config)
        except UserError:
            continue  # The settings' own sizes, or the step, do not go with this preset.
        if num_parameters(config) < num_parameters(request.config):
            found.append((name, config))
    return sorted(found, key=lambda entry: -num_parameters(entry[1]))


def _too_little_memory(
    request: ResourceRequest, estimate: TrainingEstimate, free: int, place: str
) -> str:
    memory = estimate.memory
    each = f" for each of {request.num_workers} workers" if request.num_workers > 1 else ""
    parts = ", ".join(
        f"{name} {format_bytes(value)}"
        for name, value in (
            ("weights", memory.weights), ("gradients", memory.gradients),
            ("AdamW", memory.optimizer), ("activations", memory.activations),
            ("a copy for the checkpoint", estimate.snapshot_bytes),
        )
        if value
    )  # fmt: skip
    change = _nearest_fit(request, lambda other: needed_memory(other) <= free)
    advice = f"the nearest setting that fits: {change}" if change else "no preset fits"
    return (
        f"training would take about {format_bytes(needed_memory(estimate))}{each} ({parts}), "
        f"and {place} has {format_bytes(free)} free{' for each' if each else ''}; {advice}"
    )


def _too_little_disk(
    request: ResourceRequest, estimate: TrainingEstimate, free: int, new_bytes: int
) -> str:
    kept = request.recipe.num_checkpoints_kept
    tokens = f", tokens {format_bytes(new_bytes)}" if new_bytes else ""

    def fits(other: TrainingEstimate) -> bool:
        return other.disk_bytes + new_bytes <= free

    fewer = next(
        (n for n in range(kept - 1, 0, -1) if fits(request.estimate(num_checkpoints_kept=n))), None
    )
    change = f"--set {request.section}.num_checkpoints_kept={fewer}" if fewer else None
    change = change or _nearest_fit(request, fits)
    advice = f"the nearest setting that fits: {change}; or " if change else ""
    return (
        f"the run would write about {format_bytes(estimate.disk_bytes + new_bytes)} "
        f"(checkpoints of {format_bytes(estimate.checkpoint_bytes)}, {kept} kept and one in "
        f"writing{tokens}), and the workspace's disk has {format_bytes(free)} free; {advice}"
        "choose another place with --workspace"
    )
