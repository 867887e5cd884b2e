"""Inference and training cost, from config and schedule; the model itself is never run.

FLOPs are those of matrix products (m x k by k x n: 2 m k n), of attention over the tokens that a
token really sees, and of the weighted sums of the method. Norms, activations, softmax, rotary
angles and plain sums are left out, together about a hundredth of the rest. Bytes are what a
decoding step reads from memory: weights once per step, whatever the batch, keys and values for each
row.

What a method does beside its fields has closed forms (`iiet.model.facts`). Parameters are counted
on a decoder without values, which loads torch when the first cost is asked for. Source: this
project.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from iiet.checks import check_rules, is_nan, is_number_from
from iiet.freezing import TrainedLayers, freeze, trained_part
from iiet.model.config import ModelConfig
from iiet.model.facts import LayerCounts, facts_of
from iiet.model.schedule import IterationSchedule, ScheduleLike

if TYPE_CHECKING:
    from iiet.model.cache import KvStrategy

__all__ = [
    "InferenceCost",
    "field_parameters",
    "inference_cost",
    "layer_counts",
    "member_flops_per_token",
    "num_parameters",
    "num_trained_matrix_parameters",
    "num_trained_parameters",
    "training_flops_per_token",
]


@dataclass(frozen=True, kw_only=True)
class InferenceCost:
    """The cost of one schedule at one context length and batch size.

    Raises:
        ValueError: naming every value that is negative or no number.
    """

    evaluations_per_token: int
    """Field evaluations, over all layers."""
    forward_flops_per_token: float
    """Mean over a context read at once, with logits for every token (scoring, training forward)."""
    prefill_flops_per_token: float
    """The same with logits for the last token only, as generation reads its prompt."""
    decode_flops_per_token: float
    """One token decoded with a cache, when it sees the whole context (itself included)."""
    kv_bytes_per_token: int
    """Keys and values that decoding stores, also those that a window has left behind."""
    kv_bytes_read_per_token: int
    """Keys and values that decoding such a token reads: each evaluation reads its own slot, as far
    as the layer's window reaches."""
    weight_bytes_per_token: float
    """Weights that a decoding step reads, divided by the rows of the batch. A field is read once
    per evaluation, or once per layer if it stays in the processor's cache between the evaluations
    (with the other fields, where a method repeats the stack). The method's own weights
    (norms, mix, gates) are left out: under a thousandth at the published sizes."""
    num_parameters: int
    """All parameters, including the method's own."""

    def __post_init__(self) -> None:
        rules = {}
        for field in fields(self):
            value = getattr(self, field.name)
            rule = f"{field.name} must be a number from 0, or NaN where it is unknown"
            rules[rule] = is_number_from(0, value) or is_nan(value)
        check_rules("inference cost", self, rules)


def inference_cost(
    config: ModelConfig,
    schedule: ScheduleLike | None = None,
    *,
    context_length: int | None = None,
    batch_size: int = 1,
    bytes_per_value: int = 4,
    kv_strategy: KvStrategy = "exact",
    processor_cache_bytes: int = 0,
) -> InferenceCost:
    """Count the cost of a model under a schedule.

    Args:
        config: the model.
        schedule: the config's own if None. One that leaves layers out costs what the model of the
            kept layers does.
        context_length: tokens read (prefill) or seen (decode); the config's if None.
        batch_size: rows of a decoding step.
        bytes_per_value: of weights, keys and values: 4 for float32, 2 for bfloat16.
        kv_strategy: `exact`, a slot per evaluation, or `last`, a slot per layer.
        processor_cache_bytes: cache between memory and arithmetic (an H100's L2: 50 MB), 0 for
            none. A layer's weights stay in it between evaluations if they fit beside the keys and
            values that an evaluation reads.

    Raises:
        ValueError: a schedule that the method cannot serve, or a setting out of range.
    """
    from iiet.model.cache import check_kv_strategy

    config, context_length = _checked(config, schedule, context_length)
    check_kv_strategy(kv_strategy)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    evaluations = sum(config.evaluations_per_layer())
    num_layers = config.num_layers
    head = 2 * config.dim * config.vocab_size
    body = _body_flops(config, _mean_tokens_seen(config, context_length))
    kv_bytes = bytes_per_value * 2 * config.num_kv_heads * config.head_dim  # of a token in a slot
    tokens_seen = _last_tokens_seen(config, context_length)
    seen_by_evaluations = sum(map(operator.mul, tokens_seen, config.evaluations_per_layer()))
    kv_bytes_seen = max(tokens_seen) * kv_bytes  # by one evaluation
    field_bytes = bytes_per_value * field_parameters(config)
    num_held = num_layers if facts_of(config.method).repeats_stack else 1
    field_stays = num_held * field_bytes + batch_size * kv_bytes_seen <= processor_cache_bytes
    step_bytes = field_bytes * (num_layers if field_stays else evaluations)
    step_bytes += bytes_per_value * config.dim * (config.vocab_size + 1)  # head and its norm
    return InferenceCost(
        evaluations_per_token=evaluations,
        forward_flops_per_token=body + head,
        prefill_flops_per_token=body + head / context_length,
        decode_flops_per_token=head + _body_flops(config, tokens_seen),
        kv_bytes_per_token=kv_bytes * (evaluations if kv_strategy == "exact" else num_layers),
        kv_bytes_read_per_token=kv_bytes * seen_by_evaluations,
        # Each row reads the embedding of its own token.
        weight_bytes_per_token=step_bytes / batch_size + bytes_per_value * config.dim,
        num_parameters=num_parameters(config),
    )


def training_flops_per_token(
    config: ModelConfig,
    schedule: ScheduleLike | None = None,
    *,
    context_length: int | None = None,
    trained: TrainedLayers = "all",
) -> float:
    """Count forward and backward pass of a training step, per token; see `inference_cost`.

    The backward pass costs two forward passes of the evaluations that are differentiated: one for
    the gradients of inputs, one for those of weights. Frozen parts save one or both.

    Args:
        config: the model; its own schedule says which layers are trained.
        schedule: that of the step; the config's own if None. One that leaves layers out is that of
            a model of the kept layers, whose own it is.
        context_length: tokens read; the config's if None.
        trained: which weights are trained.
    """
    if schedule is not None:
        schedule = IterationSchedule.parse(schedule, num_layers=config.num_layers)
        if schedule.left_out_layers:
            config = config.of_kept_layers(schedule)
            schedule = None
    part = trained_part(config.corrections, trained)
    forward = inference_cost(config, schedule, context_length=context_length)
    config, context_length = _checked(config, schedule, context_length)
    evaluations = config.evaluations_per_layer()
    left_out = 0.0 if part.has_ends else 2 * config.dim * config.vocab_size
    for layer, tokens_seen in enumerate(_mean_tokens_seen(config, context_length)):
        counts = layer_counts(config, layer)
        differentiated = counts.num_differentiated
        field_flops = _field_flops(config, tokens_seen)
        left_out += 2 * field_flops * (evaluations[layer] - differentiated)
        if layer < part.first_layer:
            left_out += 2 * field_flops * differentiated + 2 * 2 * config.dim * counts.num_terms
        elif not part.has_field[layer]:
            left_out += 2 * _sizes(config).matrices * differentiated
        is_first = layer == part.first_layer and not part.has_field[layer]
        if is_first and differentiated == evaluations[layer]:
            # A frozen field's prediction at a constant point is a constant, too.
            left_out += 2 * field_flops - 2 * _sizes(config).matrices
    return 3 * forward.forward_flops_per_token - left_out


def member_flops_per_token(
    config: ModelConfig,
    member: ScheduleLike,
    *,
    reads_full: bool,
    context_length: int | None = None,
    trained: TrainedLayers = "all",
) -> float:
    """Count the forward and backward pass of a member of an elastic family.

    Args:
        config: the model.
        member: the schedule of the family.
        reads_full: it learns from the full schedule, whose logits are computed once more.
        context_length: tokens read; the config's if None.
        trained: which weights are trained.
    """
    again = 2 * config.dim * config.vocab_size if reads_full else 0
    trained_member = training_flops_per_token(
        config, member, context_length=context_length, trained=trained
    )
    return trained_member + again


def num_parameters(config: ModelConfig, *, include_mix: bool = True) -> int:
    """Count the parameters, the same for all schedules.

    `include_mix=False` leaves out the method's own (mix, norms, stages), as published sizes do.
    """
    sizes = _sizes(config)
    return sizes.all - (0 if include_mix else sizes.of_method)


@lru_cache(maxsize=64)
def num_trained_parameters(config: ModelConfig, trained: TrainedLayers = "all") -> int:
    """Count the parameters that a training changes, under the config's own schedule as the full
    one."""
    if trained == "all":
        return num_parameters(config)
    import torch

    from iiet.backbone import Backbone

    with torch.device("meta"):
        backbone = Backbone(config)
    freeze(backbone, trained_part(config.corrections, trained))
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


def num_trained_matrix_parameters(config: ModelConfig, trained: TrainedLayers = "all") -> int:
    """Count the parameters of the fields' matrices that a training changes."""
    part = trained_part(config.corrections, trained)
    return sum(part.has_field) * _sizes(config).matrices


def field_parameters(config: ModelConfig) -> int:
    """Count the parameters of one field."""
    return _sizes(config).field


def layer_counts(config: ModelConfig, layer: int) -> LayerCounts:
    """Count what the config's method does in a layer, the first being 0, under its schedule."""
    return facts_of(config.method).layer_counts(config.corrections, layer, config.options)


class _Sizes(NamedTuple):
    """Numbers of parameters, the same for all schedules."""

    all: int
    of_method: int
    field: int
    matrices: int
    """Parameters of a field's matrices; its norms have the others."""


@lru_cache(maxsize=1024)  # `with_schedule` checks the whole config anew.
def _sizes(config: ModelConfig) -> _Sizes:
    return _counted_sizes(config if config.schedule is None else config.with_schedule(0))


@lru_cache(maxsize=64)
def _counted_sizes(config: ModelConfig) -> _Sizes:
    """Count the parameters of a decoder on the meta device."""
    import torch

    from iiet.backbone import Backbone

    with torch.device("meta"):
        backbone = Backbone(config)
    head = 0 if config.tie_embeddings else config.dim * config.vocab_size
    first_layer: Any = backbone.layers[0]
    field = list(first_layer.field_parameters())
    return _Sizes(
        all=sum(p.numel() for p in backbone.parameters()) + head,
        of_method=sum(p.numel() for p in backbone.method_parameters().values()),
        field=sum(p.numel() for p in field),
        matrices=sum(p.numel() for p in field if p.dim() == 2),
    )


def _under(config: ModelConfig, schedule: ScheduleLike) -> ModelConfig:
    """Return the config under a schedule, of the kept layers where it leaves some out."""
    schedule = IterationSchedule.parse(schedule, num_layers=config.num_layers)
    if schedule.left_out_layers:
        return config.of_kept_layers(schedule)
    return config.with_schedule(schedule)  # Its own checks then apply.


def _checked(
    config: ModelConfig, schedule: ScheduleLike | None, context_length: int | None
) -> tuple[ModelConfig, int]:
    if schedule is not None:
        config = _under(config, schedule)
    if context_length is None:
        context_length = config.context_length
    if not 1 <= context_length <= config.context_length:
        raise ValueError(
            f"context_length must be between 1 and the model's {config.context_length} tokens, "
            f"got {context_length}"
        )
    return config, context_length


def _last_tokens_seen(config: ModelConfig, context_length: int) -> list[int]:
    """Return for each layer how many tokens the last of a context sees, itself included."""
    windows = (config.window_of(layer) for layer in range(config.num_layers))
    return [min(window or context_length, context_length) for window in windows]


def _mean_tokens_seen(config: ModelConfig, context_length: int) -> list[float]:
    """Return for each layer how many tokens a token of a context sees in the mean."""
    # Token t sees t tokens, until a window is full.
    return [
        (full * (full + 1) / 2 + (context_length - full) * full) / context_length
        for full in _last_tokens_seen(config, context_length)
    ]


def _field_flops(config: ModelConfig, tokens_seen: float) -> float:
    """Count one evaluation for one token; attention's are its scores and weighted values."""
    return 2 * _sizes(config).matrices + 4 * config.num_heads * config.head_dim * tokens_seen


def _body_flops(config: ModelConfig, tokens_seen: Sequence[float]) -> float:
    """Count all but the head, for one token; `tokens_seen` in each layer."""
    num_terms = sum(layer_counts(config, layer).num_terms for layer in range(config.num_layers))
    fields_flops = sum(
        count * _field_flops(config, seen)
        for count, seen in zip(config.evaluations_per_layer(), tokens_seen, strict=True)
    )
    return fields_flops + 2 * config.dim * num_terms
