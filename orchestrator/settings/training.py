"""Settings of the model's shape, of a training, and of a distillation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from iiet.model.config import PRESETS, ModelConfig, preset
from iiet.model.facts import METHODS, facts_of
from iiet.model.schedule import IterationSchedule
from orchestrator.settings.effects import Effect, KeyForm
from orchestrator.settings.section import OneOf, Section
from orchestrator.workspace.errors import UserError

DEFAULT_METHOD = "iiet"
PCFORMER = "pcformer"
BASELINE_METHOD = "vanilla"
METHOD = OneOf(METHODS)
MAX_LAYERS = 1000
"""A larger number is a typing error and would only fill the memory."""
MAX_STEPS = 1_000_000
"""Plans loop over the steps; a larger number is a typing error and would look like a hang."""
MAX_DRAWN = 100
"""Each drawn schedule costs a forward and a backward pass per step."""
Precision = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "muon"]
Control = Literal["distill", "cross_entropy", "pruned", "scratch"]


def default_precision(*, on_gpus: bool) -> Precision:
    """Return the precision that is used where none is set."""
    return "bf16" if on_gpus else "fp32"


class ModelSettings(Section):
    """Shape of the model: a preset, and what differs from it."""

    preset: str = "tiny"
    """Name of a preset: tiny, 55m, 340m, 740m, 1.3b."""
    method: Annotated[str, METHOD] = DEFAULT_METHOD
    """How a layer advances the hidden state: iiet, vanilla, pcformer, looped, or another method."""
    corrections: StrictInt | str | tuple[StrictInt, ...] = 2
    """Corrections of each layer (the schedule): `3` for all layers, or `2,2,1,1,1,1`. For looped,
    one number: how often the stack of layers is repeated; for pcformer, a level from 0 to 2 (the
    whole method). Other methods do not read it."""
    method_options: dict[str, Any] = Field(default={})
    """Options of the method by name, such as `damping` of iiet (default: the method's defaults).
    Models of other methods in the same sweep use their defaults."""
    dim: StrictInt | None = Field(default=None, gt=0)
    """Width of the hidden state (default here and below: the preset's)."""
    num_layers: StrictInt | None = Field(default=None, gt=0, le=MAX_LAYERS)
    """Number of layers."""
    num_heads: StrictInt | None = Field(default=None, gt=0)
    """Query heads."""
    num_kv_heads: StrictInt | None = Field(default=None, gt=0)
    """Key and value heads (default: as many as query heads)."""
    head_dim: StrictInt | None = Field(default=None, gt=0)
    """Width of a head, an even number (default: `dim / num_heads`)."""
    qkv_bias: StrictBool | None = None
    """Whether the projections to queries, keys and values add a bias (default: no)."""
    attention_out_bias: StrictBool | None = None
    """Whether attention's output projection adds a bias (default: no)."""
    head_norms: StrictBool | None = None
    """Whether queries and keys are normalized per head, before the rotation (default: no)."""
    rope_scaling: dict[str, Any] | None = None
    """Scaling of the rotary embedding for a longer context, as transformers' `rope_parameters`:
    `{rope_type: llama3, factor: 8.0, ...}`, of type linear, llama3 or yarn (default: none)."""
    rotary_layers: tuple[StrictBool, ...] | None = None
    """Whether a layer has the rotary embedding, a value for each layer (default: all have)."""
    sliding_windows: tuple[Annotated[StrictInt, Field(gt=0)] | None, ...] | None = None
    """Width of the attention window in tokens, for each layer; null for all earlier tokens
    (default: null everywhere)."""
    ffn_dim: StrictInt | None = Field(default=None, gt=0)
    """Width of the feed-forward layer."""
    context_length: StrictInt | None = Field(default=None, gt=1)
    """Longest sequence in tokens; also the length of training sequences, unless
    `training.sequence_length` is set."""
    tie_embeddings: StrictBool | None = None
    """Whether the output head shares the embedding's weights."""

    def build(self, *, vocab_size: int, context_length: int | None = None) -> ModelConfig:
        """Return the configuration of the model for a tokenizer of `vocab_size` entries.

        Args:
            context_length: Length of the data's sequences, where they have one; the model gets it
                unless another one is set.

        Raises:
            UserError: If the preset is unknown, or the sizes do not fit together.
        """
        if self.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise UserError(f"model.preset: {self.preset!r} is unknown; known: {known}")
        no_sizes = {"preset", "method", "corrections", "method_options"}
        sizes = self.model_dump(exclude=no_sizes, exclude_none=True)
        if context_length is not None:
            sizes.setdefault("context_length", context_length)
        num_layers = sizes.get("num_layers", PRESETS[self.preset]["num_layers"])
        corrections = self.corrections if facts_of(self.method).has_corrections else 0
        try:
            schedule = IterationSchedule.parse(corrections, num_layers=num_layers)
        except ValueError as error:
            raise UserError(f"model.corrections: {error}") from None
        if schedule.left_out_layers:
            raise UserError(
                f"model.corrections={corrections}: x leaves out a layer of a teacher that exists; "
                "model.num_layers says how many layers a new model has"
            )
        try:
            return preset(
                self.preset,
                method=self.method,
                method_options=self.method_options or None,
                vocab_size=vocab_size,
                schedule=schedule,
                **sizes,
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from None


class ElasticSettings(Section):
    """Elastic training: one set of weights learns several schedules.

    Each step adds to the loss of the full schedule `weight` times the loss of each cheaper schedule
    that is drawn. In a distillation, these are losses of students. Without a teacher, the loss of a
    cheaper schedule is cross-entropy + `kl_weight` times KL(full schedule || cheaper schedule).
    """

    schedules: Annotated[tuple[StrictInt | str, ...], Effect.WEIGHTS] = ()
    """The cheaper schedules: `2,2,1,1`, `3..0`, or a number for all layers (default: for each k
    below the largest number of corrections, at most k in each layer). With `sweep.elastic`, the
    sweep chooses them by influence."""
    num_drawn: Annotated[StrictInt, Effect.WEIGHTS] = Field(default=1, gt=0, le=MAX_DRAWN)
    """Cheaper schedules of each step, drawn by seed and step in proportion to the corrections that
    they leave out."""
    weight: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=1.0, ge=0.0)
    """Weight of the loss of each cheaper schedule; that of the full schedule is 1."""
    kl_weight: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=1.0, ge=0.0)
    """Weight of the KL divergence in that loss; the cross-entropy has weight 1. A distillation
    reads `distillation.kl_weight` instead."""
    temperature: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=1.0, ge=1e-3, le=1e3)
    """Softmax temperature of both distributions; the divergence is scaled by its square. A
    distillation reads `distillation.temperature` instead."""


class TrainingSettings(Section):
    """Recipe of a training: tokens, learning rates, validation and checkpoints.

    The mark of each field says what another value changes, and so whether it is part of the key.
    """

    num_steps: Annotated[StrictInt, Effect.LATER_WEIGHTS] = Field(default=500, gt=0, le=MAX_STEPS)
    """Optimizer steps."""
    num_tokens_per_step: Annotated[StrictInt, Effect.WEIGHTS] = Field(default=1024, gt=0)
    """Tokens of the global batch, for any number of workers."""
    source: Annotated[str | None, Effect.FILES] = None
    """Source model whose weights, sizes and tokenizer the training starts from: a run, a trial, a
    checkpoint, a model folder or `hub:NAME` (default: random weights). It changes two defaults:
    `iterate_from_fraction` is 0, and `learning_rate` that of the source's training, else 5e-5."""
    source_kl_weight: Annotated[StrictFloat, Effect.WEIGHTS, KeyForm.ABSENT_AT_DEFAULT] = Field(
        default=0.0, ge=0.0
    )
    """With a source model: weight of KL(source || model) in the loss, which keeps the source's
    predictions. Above 0, the source runs in each step, too."""
    trained_layers: Annotated[
        Literal["all", "corrected", "added"] | tuple[StrictInt, ...],
        Effect.WEIGHTS,
        KeyForm.ABSENT_AT_DEFAULT,
    ] = "all"
    """What is trained; the rest is frozen. `all`; `corrected`: layers with corrections, and what
    the method adds from the first of them on; `added`: only what the method adds there; or layers
    by number from 1 on, `[3, 4]`. All but `all` need a model that starts equal to its source model:
    `model.method_options.start: identity`, or the method of the source."""
    sequence_length: Annotated[StrictInt | None, Effect.WEIGHTS, KeyForm.ABSENT_AT_DEFAULT] = Field(
        default=None, gt=1
    )
    """Tokens of a sequence in training and validation, at most the context length (default: the
    context length, or the tokens of a step if a source model's context is longer than that)."""
    num_sequences_per_pass: Annotated[StrictInt | None, Effect.JOURNAL] = Field(default=None, gt=0)
    """Micro-batch: most sequences in one forward pass of a worker (default: all; fewer need less
    memory, by gradient accumulation)."""
    optimizer: Annotated[Optimizer, Effect.WEIGHTS, KeyForm.ABSENT_AT_DEFAULT] = "adamw"
    """`adamw` for all weights, or `muon` (`torch.optim.Muon`) for the matrices of attention and
    feed-forward networks, and AdamW for the rest. `muon` needs `cluster.parallel: ddp`."""
    learning_rate: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=2e-3, gt=0.0)
    """Peak learning rate of AdamW; those of gates and of Muon's matrices are multiples of it."""
    muon_rate_factor: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=4.0, gt=0.0)
    """Learning rate of Muon's matrices, as a multiple of `learning_rate`. Only `optimizer: muon`
    reads it, and `muon_momentum`."""
    muon_momentum: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=0.95, ge=0.0, lt=1.0)
    """Nesterov momentum of Muon."""
    gate_rate_factor: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=30.0, gt=0.0)
    """Learning rate of gates, as a multiple of `learning_rate`. Models have gates by a learned
    damping, or by `method_options.start: identity`."""
    warmup_steps: Annotated[StrictInt, Effect.WEIGHTS] = Field(default=50, ge=0)
    """Steps of linear warm-up."""
    decay: Annotated[Literal["cosine", "wsd", "constant"], Effect.LATER_WEIGHTS] = "cosine"
    """Learning rate after the warm-up: `cosine` to the final rate, `wsd` (stable, then linear) or
    `constant`."""
    decay_fraction: Annotated[StrictFloat, Effect.LATER_WEIGHTS] = Field(
        default=0.2, gt=0.0, le=1.0
    )
    """Share of the steps in which `wsd` decays."""
    final_learning_rate_fraction: Annotated[StrictFloat, Effect.LATER_WEIGHTS] = Field(
        default=0.1, ge=0.0, le=1.0
    )
    """Last learning rate as a share of the peak."""
    weight_decay: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=0.1, ge=0.0)
    """Weight decay of matrices; norms, the mix and embeddings have none."""
    beta1: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay rate of the first moment."""
    beta2: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay rate of the second moment."""
    clip_norm: Annotated[StrictFloat, Effect.WEIGHTS] = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    iterate_from_fraction: Annotated[StrictFloat, Effect.LATER_WEIGHTS] = Field(
        default=0.6, ge=0.0, lt=1.0
    )
    """Two-stage training: no corrections (r = 0) before this share of the steps, the full schedule
    after. A pcformer is trained at its own levels from the first step on."""
    iterate_ramp_fraction: Annotated[StrictFloat, Effect.LATER_WEIGHTS] = Field(
        default=0.0, ge=0.0, le=1.0
    )
    """Share of the steps, after `iterate_from_fraction`, in which corrections grow by one at a time
    up to the full schedule; 0 starts all of them at once."""
    elastic: Annotated[ElasticSettings | None, Effect.LATER_WEIGHTS, KeyForm.ABSENT_AT_DEFAULT] = (
        None
    )
    """Learn cheaper schedules in each step, too (default: only the full one); `elastic: {}` takes
    the defaults of its section."""
    spike_factor: Annotated[StrictFloat | None, Effect.WEIGHTS] = Field(default=None, gt=1.0)
    """A step is a spike if its gradient norm exceeds this many times the median of earlier steps
    (default: off)."""
    skip_bad_steps: Annotated[StrictInt, Effect.JOURNAL] = Field(default=0, ge=0)
    """Most bad steps in a row that are skipped without changing the weights; one more ends the
    training. A step is bad if its loss or gradient is not finite, or if it is a spike."""
    precision: Annotated[Precision, Effect.WEIGHTS] = "fp32"
    """Arithmetic of the forward pass: fp32 (as TF32 on GPUs that have it), or bf16 autocast with
    fp32 weights (default: bf16 if the settings name GPUs, else fp32)."""
    activation_checkpointing: Annotated[StrictBool, Effect.JOURNAL] = False
    """Recompute each layer in the backward pass: less memory, more time."""
    compile: Annotated[StrictBool | None, Effect.JOURNAL] = None
    """Compile layers with `torch.compile`: the first step takes about a minute, later ones less;
    needs a C++ compiler (default: on GPUs only)."""
    seed: Annotated[StrictInt, Effect.WEIGHTS] = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of the data."""
    validate_every_steps: Annotated[StrictInt, Effect.JOURNAL] = Field(default=100, gt=0)
    """Steps between validation losses."""
    num_validation_tokens: Annotated[StrictInt, Effect.JOURNAL] = Field(default=16384, gt=0)
    """Tokens of one validation loss."""
    checkpoint_every_steps: Annotated[StrictInt, Effect.FILES] = Field(default=200, gt=0)
    """Steps between checkpoints."""
    checkpoint_every_minutes: Annotated[StrictFloat | None, Effect.FILES] = Field(
        default=None, gt=0.0
    )
    """Longest time between checkpoints in minutes (default: no limit)."""
    num_checkpoints_kept: Annotated[StrictInt, Effect.FILES] = Field(default=2, ge=1)
    """Newest checkpoints kept on disk."""
    profile_steps: Annotated[StrictInt, Effect.FILES] = Field(default=0, ge=0)
    """Steps to record with PyTorch's profiler, in the run's folder `profile`; 0 records none."""

    def tokens_per_sequence(self, model: ModelConfig) -> int:
        """Return the tokens of a training sequence of a model."""
        return self.sequence_length or model.context_length

    def without_source(self) -> TrainingSettings:
        """Return the recipe from random weights: all that is about a source is at its default."""
        usual = TrainingSettings()
        return self.model_copy(update={name: getattr(usual, name) for name in FIELDS_OF_A_SOURCE})


FIELDS_OF_A_SOURCE = ("source", "source_kl_weight", "trained_layers")
"""Fields of `TrainingSettings` that say which model a training starts from, and what it keeps."""


class DistillationSettings(Section):
    """How a pruned student learns from its teacher (IIAD)."""

    control: Control = "distill"
    """`distill`, or an ablation: `cross_entropy` (no teacher), `pruned` (no training), or `scratch`
    (random weights)."""
    kl_weight: StrictFloat = Field(default=1.0, ge=0.0)
    """Weight of KL(teacher || student); the cross-entropy has weight 1."""
    temperature: StrictFloat = Field(default=1.0, ge=1e-3, le=1e3)
    """Softmax temperature of both distributions; the loss is scaled by its square."""
    divergence: Literal["forward", "reverse"] = "forward"
    """KL(teacher || student), or its reverse."""
    hidden_weight: StrictFloat = Field(default=0.0, ge=0.0)
    """Weight of the relative squared error of the layers' hidden states; 0 leaves it out."""
    teacher_from_step: StrictInt = Field(default=0, ge=0)
    """First step with the teacher, counted from 0; plain cross-entropy before."""
    teacher_until_step: StrictInt | None = Field(default=None, gt=0)
    """First step without the teacher; plain cross-entropy from there on (default: never)."""
    training: TrainingSettings = TrainingSettings(
        num_steps=60,
        learning_rate=5e-4,
        warmup_steps=10,
        weight_decay=0.0,
        iterate_from_fraction=0.0,
    )
    """The recipe of the distillation."""
