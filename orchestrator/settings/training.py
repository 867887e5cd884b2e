"""Settings of a training and of a distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from orchestrator.settings.section import Section

MAX_STEPS = 1_000_000
"""Plans loop over the steps; a larger number is a typing error and would look like a hang."""

MAX_DRAWN = 100
"""Each drawn schedule costs a forward and a backward pass per step."""


class ElasticSettings(Section):
    """Elastic training: one set of weights learns every schedule of a family.

    A step minimizes the loss of the full schedule, plus `weight` times that of each drawn member.
    In a distillation these are the losses of students. Without a teacher, the full schedule learns
    from the targets, and a member also from what the full schedule predicts in the same step: its
    loss is cross-entropy + `kl_weight` times KL(full schedule || member).
    """

    schedules: tuple[int | str, ...] = ()
    """The family, without the full schedule: schedules within the model's, as `2,2,1,1`, `3..0` or
    one number for all layers (default: one for each number k below the largest, in which layer l
    makes `min(r_l, k)` corrections). A sweep with `sweep.elastic` sets them by influence."""
    num_drawn: int = Field(default=1, gt=0, le=MAX_DRAWN)
    """Members of each step, drawn without repetition from seed and step, in proportion to the
    corrections that they leave out; all, if the family has no more. Steps without corrections have
    none."""
    weight: float = Field(default=1.0, ge=0.0)
    """Weight of each member's loss; the full schedule's has weight 1. At 0 none is drawn."""
    kl_weight: float = Field(default=1.0, ge=0.0)
    """Weight of the divergence in a member's loss, whose cross-entropy has weight 1. In a
    distillation, `distillation.kl_weight` has its place."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Softmax temperature of both distributions; the divergence is scaled by its square. In a
    distillation, `distillation.temperature` has its place."""


class TrainingSettings(Section):
    """Recipe of a training: tokens, learning rates, validation and checkpoints."""

    num_steps: int = Field(default=500, gt=0, le=MAX_STEPS)
    """Optimizer steps."""
    num_tokens_per_step: int = Field(default=1024, gt=0)
    """Tokens of the global batch, for any number of workers."""
    num_sequences_per_pass: int | None = Field(default=None, gt=0)
    """At most this many sequences in one forward pass of one worker (gradient accumulation;
    default: all at once)."""
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
    """Share of the steps, after `iterate_from_fraction`, in which corrections grow: 1, 2, ... up to
    the full schedule, each for the same time; 0 starts all of them at once."""
    elastic: ElasticSettings | None = None
    """Also learn cheaper schedules in each step (default: only the full one). `elastic: {}` takes
    the defaults of its section."""
    spike_factor: float | None = Field(default=None, gt=1.0)
    """A step also counts as bad if its gradient norm exceeds this factor times the median of the
    steps before (default: off)."""
    skip_bad_steps: int = Field(default=0, ge=0)
    """At most this many bad steps in a row (loss or gradient not finite, or a spike) are skipped
    without changing the weights; one more ends the training. At 0, the first bad step ends it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass: fp32 (as TF32 on GPUs that have it), or bf16 autocast with
    fp32 weights (default in a file: bf16 if GPUs are named, else fp32)."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    compile: bool | None = None
    """Compile the layers' fields with `torch.compile`: about a minute in the first step, then
    faster; needs a C++ compiler (default: on GPUs only)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and of the data order."""
    validate_every_steps: int = Field(default=100, gt=0)
    """Steps between validation losses."""
    num_validation_tokens: int = Field(default=16384, gt=0)
    """Tokens of one validation loss."""
    checkpoint_every_steps: int = Field(default=200, gt=0)
    """Steps between checkpoints."""
    checkpoint_every_minutes: float | None = Field(default=None, gt=0.0)
    """Longest time in minutes without a checkpoint (default: only steps count)."""
    num_checkpoints_kept: int = Field(default=2, ge=1)
    """Newest checkpoints kept on disk."""
    profile_steps: int = Field(default=0, ge=0)
    """Steps to record with PyTorch's profiler, in the run's folder `profile`; 0 records none."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss, which `best.json` names; only
    checkpoints of steps with a validation loss are compared."""

    @field_validator("iterate_ramp_fraction")
    @classmethod
    def _refuse_ramp_after_the_end(cls, ramp: float, info: ValidationInfo) -> float:
        before = info.data.get("iterate_from_fraction", 0.0)
        if before + ramp > 1.0 + 1e-9:
            raise ValueError(
                f"the ramp must end within the training; with iterate_from_fraction={before} it "
                f"may be {round(1.0 - before, 9)} at most"
            )
        return ramp


class DistillationSettings(Section):
    """How a pruned student learns from its teacher (IIAD)."""

    control: Literal["distill", "cross_entropy", "pruned", "scratch"] = "distill"
    """`distill`, or a control: cross-entropy only, pruned without training, or trained from
    scratch."""
    kl_weight: float = Field(default=1.0, ge=0.0)
    """Weight of KL(teacher || student); the cross-entropy has weight 1."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Softmax temperature of both distributions; the loss is scaled by its square."""
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """KL(teacher || student), its reverse, or Jensen-Shannon."""
    hidden_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the error of the layers' hidden states; 0 leaves it out."""
    teacher_from_step: int = Field(default=0, ge=0)
    """First step with the teacher, counted from 0; plain cross-entropy before."""
    teacher_until_step: int | None = Field(default=None, gt=0)
    """First step without the teacher; plain cross-entropy from there on (default: never)."""
    teacher_cache: Literal["auto", "live", "exact", "top_k"] = "auto"
    """Source of the teacher's outputs for a sweep's students. `live`: each student runs the
    teacher; `exact`: its logits are stored once (the same losses); `top_k`: its most likely tokens
    are stored, all others as one (another loss); `auto`: exact if that saves time and the disk has
    space, and deleted after the sweep, else live."""
    cache_top_k: int = Field(default=64, gt=0)
    """Most likely tokens stored by `teacher_cache: top_k`."""
    training: TrainingSettings = TrainingSettings(
        num_steps=60,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.0,
        iterate_from_fraction=0.0,
    )
    """The recipe of the distillation."""

    @field_validator("teacher_until_step")
    @classmethod
    def _refuse_empty_window(cls, until: int | None, info: ValidationInfo) -> int | None:
        first = info.data.get("teacher_from_step", 0)
        if until is not None and until <= first:
            raise ValueError(
                f"the teacher must take part in at least one step; with teacher_from_step={first} "
                f"it must be above {first}, or unset"
            )
        return until
