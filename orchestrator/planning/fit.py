"""Whether a run fits into memory and onto the disk, and if not, the nearest setting that does.

An estimate and what is free come in; nothing comes out, or one error that says how much is needed,
of what, how much there is, and what to type instead. The nearest setting is the first of these that
fits: fewer sequences in a pass (the same gradients), layers recomputed in the backward pass (more
time), a model shared by its workers, a smaller model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from iiet.config import PRESETS, ModelConfig
from iiet.cost import num_parameters
from orchestrator.planning.resources import FreeBytes
from orchestrator.planning.training_estimate import TrainingEstimate, estimate_training
from orchestrator.settings import ModelSettings, TrainingSettings
from orchestrator.terminal.formatting import format_bytes
from orchestrator.training.model_config import build_model_config
from orchestrator.workspace.errors import UserError

PROCESS_BYTES = 512 * 2**20
"""What PyTorch, Ray and kernels take in each worker beside tensors, roughly."""
ALLOCATOR_FACTOR = 1.1
"""Activations come and go; an allocator holds more than lives."""


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """A run as it was asked for."""

    config: ModelConfig
    recipe: TrainingSettings
    section: str = "training"
    """Where the recipe stands in the settings, for what to type."""
    num_workers: int = 1
    parallel: str | None = None
    """How several workers share the work; None where the settings give no choice."""
    on_gpus: bool = False
    """Whether the workers' memory is a GPU's."""
    model: ModelSettings | None = None
    """Settings of the model, where another size would do too."""
    teacher: ModelConfig | None = None
    """A frozen model that runs beside it."""

    def estimate(
        self,
        config: ModelConfig | None = None,
        *,
        parallel: str | None = None,
        **recipe: int | bool,
    ) -> TrainingEstimate:
        """Estimate it as it is, or with some of it changed."""
        return estimate_training(
            config or self.config,
            self.recipe.model_copy(update=recipe),
            num_workers=self.num_workers,
            parallel=parallel or self.parallel or "ddp",
            on_gpus=self.on_gpus,
            teacher=self.teacher,
        )


def needed_memory(estimate: TrainingEstimate) -> int:
    """Return the bytes that one worker needs, the process itself included."""
    memory = estimate.memory
    spare = int(memory.activations * (ALLOCATOR_FACTOR - 1))
    return memory.total + spare + estimate.snapshot_bytes + PROCESS_BYTES


def check_fit(
    request: ResourceRequest, free: FreeBytes, *, present_bytes: int = 0, new_bytes: int = 0
) -> None:
    """Refuse what would run out of memory or disk.

    Args:
        request: The run.
        free: What is free.
        present_bytes: Of checkpoints of this run, which new ones replace.
        new_bytes: That will be written beside the checkpoints.

    Raises:
        UserError: If it does not fit; says what would.
    """
    estimate = request.estimate()
    if free.memory is not None and needed_memory(estimate) > free.memory:
        raise UserError(_too_little_memory(request, estimate, free.memory, free.place))
    if free.disk is not None and estimate.disk_bytes + new_bytes > free.disk + present_bytes:
        raise UserError(_too_little_disk(request, estimate, free.disk + present_bytes, new_bytes))


def nearest_fit(request: ResourceRequest, fits: Callable[[TrainingEstimate], bool]) -> str | None:
    """Return what to type so that the run fits, or None if nothing known does."""
    for words, estimate in _alternatives(request):
        if fits(estimate):
            return words
    return None


def _alternatives(request: ResourceRequest) -> Iterator[tuple[str, TrainingEstimate]]:
    """Yield what to type and its estimate, the least change first."""
    yield from _leaner(request)
    if request.parallel not in (None, "fsdp") and request.num_workers > 1:
        yield from _leaner(request, "--set cluster.parallel=fsdp", parallel="fsdp")
    for name, config in _smaller(request):
        yield from _leaner(request, f"--preset {name}", config=config)


def _leaner(
    request: ResourceRequest,
    words: str = "",
    *,
    config: ModelConfig | None = None,
    parallel: str | None = None,
) -> Iterator[tuple[str, TrainingEstimate]]:
    """Yield a run as it is, with fewer sequences in a pass, and both with layers recomputed."""
    if words:
        yield words, request.estimate(config, parallel=parallel)
    per_pass = request.estimate(config).sequences_per_pass
    halves = [per_pass >> n for n in range(per_pass.bit_length())]
    key = f"--set {request.section}."
    for recomputes in (False, True):
        for sequences in halves:
            if sequences == per_pass and not recomputes:
                continue
            narrower = f"{key}num_sequences_per_pass={sequences}"
            texts = (
                words,
                f"{key}activation_checkpointing=true" if recomputes else "",
                narrower if sequences < per_pass else "",
            )
            estimate = request.estimate(
                config,
                parallel=parallel,
                num_sequences_per_pass=sequences,
                activation_checkpointing=recomputes or request.recipe.activation_checkpointing,
            )
            yield " ".join(filter(None, texts)), estimate


def _smaller(request: ResourceRequest) -> list[tuple[str, ModelConfig]]:
    """Return the presets that make the model smaller, the largest first."""
    found = []
    for name in PRESETS if request.model else ():
        assert request.model is not None
        changed = request.model.model_copy(update={"preset": name})
        try:
            config = build_model_config(changed, vocab_size=request.config.vocab_size)
            request.estimate(config)
        except UserError:
            continue  # sizes of the settings' own, or a step, that this preset cannot have
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
    words = nearest_fit(request, lambda other: needed_memory(other) <= free)
    way_out = f"the nearest setting that fits: {words}" if words else "no preset fits"
    return (
        f"training would take about {format_bytes(needed_memory(estimate))}{each} ({parts}), "
        f"and {place} has {format_bytes(free)} free{' for each' if each else ''}; {way_out}"
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
    words = f"--set {request.section}.num_checkpoints_kept={fewer}" if fewer else None
    words = words or nearest_fit(request, fits)
    way_out = f"the nearest setting that fits: {words}; or " if words else ""
    return (
        f"the run would write about {format_bytes(estimate.disk_bytes + new_bytes)} "
        f"(checkpoints of {format_bytes(estimate.checkpoint_bytes)}, {kept} kept and one in "
        f"writing{tokens}), and the workspace's disk has {format_bytes(free)} free; {way_out}"
        "choose another place with --workspace"
    )
