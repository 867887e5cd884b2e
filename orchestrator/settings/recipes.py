"""The sections that say how a model is trained: the recipe of a run, and the distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.settings.section import Section

MAX_STEPS = 1_000_000
"""Plans look at each step; a number beyond this is a slip of the keyboard and would look like a
hang."""


class TrainingSettings(Section):
    """One recipe: how many tokens, which learning rates, how it is watched and saved."""

    num_steps: int = Field(default=500, gt=0, le=MAX_STEPS)
    """Optimizer steps."""
    num_tokens_per_step: int = Field(default=1024, gt=0)
    """Tokens of the global batch; the same whatever the number of workers."""
    num_sequences_per_pass: int | None = Field(default=None, gt=0)
    """Most sequences in one forward pass of one worker (gradient accumulation); all at once when
    unset."""
    learning_rate: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    decay: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: cosine to the final rate, stable then linear (wsd), or constant."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of the steps in which `wsd` decays."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Last learning rate as a share of the peak."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """AdamW's decay of matrices; norms, the mix and embeddings are not decayed."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's second moment."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    iterate_from_fraction: float = Field(default=0.6, ge=0.0, lt=1.0)
    """Two-stage training: no corrections (r = 0) before this share of the steps, the full schedule
    after."""
    iterate_ramp_fraction: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the steps behind it over which corrections grow: 1, 2, ... up to the full schedule,
    each for as long; 0 makes all of them at once."""
    spike_factor: float | None = Field(default=None, gt=1.0)
    """A step is bad, too, if its gradient's norm is more than so many times the median of the
    steps before; spikes are not watched for if unset."""
    skip_bad_steps: int = Field(default=0, ge=0)
    """Most bad steps in a row (loss or gradient not finite, or a spike) that may pass without
    touching the weights; one more ends the training, as the first does at 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: fp32, or bf16 autocast with fp32 weights."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the layers' fields with `torch.compile`: a minute before the first step, then less
    time on GPUs; needs a C++ compiler."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of the data order."""
    validate_every_steps: int = Field(default=100, gt=0)
    """Steps between validation losses."""
    num_validation_tokens: int = Field(default=16384, gt=0)
    """Tokens of one validation loss."""
    checkpoint_every_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints."""
    checkpoint_every_minutes: float | None = Field(default=None, gt=0.0)
    """Minutes after which there is a checkpoint at the latest; steps alone decide when unset."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints kept on disk."""
    keep_best: bool = False
    """Keep, beside them, the checkpoint with the lowest validation loss, which `best.json` names;
    of those at whose step there was one."""

    @field_validator("iterate_ramp_fraction")
    @classmethod
    def _ramp_ends_with_the_training(cls, ramp: float, info: ValidationInfo) -> float:
        before = info.data.get("iterate_from_fraction", 0.0)
        if before + ramp > 1.0 + 1e-9:
            raise PydanticCustomError(
                "ramp_too_long",
                "the ramp must end within the training; with iterate_from_fraction={before} it may "
                "be {longest} at most",
                {"before": before, "longest": round(1.0 - before, 9)},
            )
        return ramp


def _distillation_training() -> TrainingSettings:
    return TrainingSettings(
        num_steps=60,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.0,
        iterate_from_fraction=0.0,
    )


class DistillationSettings(Section):
    """How a pruned student learns from its teacher (IIAD)."""

    control: Literal["distill", "cross_entropy", "pruned", "scratch"] = "distill"
    """`distill`, or a control: cross-entropy only, pruned as it is, or trained from scratch."""
    kl_weight: float = Field(default=1.0, ge=0.0)
    """Weight of KL(teacher || student) beside the cross-entropy."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Softmax temperature of both distributions; the loss is scaled by its square."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """Which divergence: KL(teacher || student), its reverse, or Jensen-Shannon."""
    hidden_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the error of the layers' hidden states; 0 leaves it out."""
    teacher_from_step: int = Field(default=0, ge=0)
    """First step, counted from 0, in which the teacher has a say; plain cross-entropy before."""
    teacher_until_step: int | None = Field(default=None, gt=0)
    """First step in which it has none any more; plain cross-entropy from there on. To the end if
    unset."""
    teacher_cache: Literal["auto", "live", "exact", "top_k"] = "auto"
    """Where a sweep's students find what their teacher says: `live` runs it in each, `exact` stores
    its logits once for all (the same losses), `top_k` its likeliest tokens and the others as one
    (another loss); `auto` is exact where that pays and the disk can spare it, and deletes it after
    the sweep; else live."""
    cache_top_k: int = Field(default=64, gt=0)
    """Likeliest tokens of `teacher_cache: top_k`."""
    training: TrainingSettings = Field(default_factory=_distillation_training)
    """The recipe of the distillation."""

    @field_validator("teacher_until_step")
    @classmethod
    def _window_is_not_empty(cls, until: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("teacher_from_step", 0)
        if until is not None and until <= first:
            raise PydanticCustomError(
                "empty_window",
                "the teacher must have a say in a step at least; with teacher_from_step={first} "
                "it must be above {first}, or unset",
                {"first": first},
            )
        return until
