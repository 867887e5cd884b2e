"""Inference and training cost, computed from config and schedule; nothing is run.

FLOPs are those of matrix products (m x k by k x n: 2 m k n), of attention over the tokens that a
token really sees, and of the mix or gates, which the method states. Norms, activations, softmax,
rotary angles, residual and Runge-Kutta sums are left out, together about a hundredth of the rest.
Bytes are what a decoding step reads from memory: weights once per step, whatever the batch, keys
and values for each row. Source: this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from iiet.cache import KvStrategy, check_kv_strategy
from iiet.config import ModelConfig
from iiet.methods import METHODS
from iiet.schedule import ScheduleLike

__all__ = [
    "InferenceCost",
    "inference_cost",
    "member_flops_per_token",
    "num_parameters",
    "training_flops_per_token",
]


@dataclass(frozen=True, kw_only=True)
class InferenceCost:
    """The cost of one schedule at one context length and batch size."""

    evaluations_per_token: int
    """Field evaluations, over all layers."""
    forward_flops_per_token: float
    """Mean over a context read at once, with logits for every token (scoring, training forward)."""
    prefill_flops_per_token: float
    """The same with logits for the last token only, as generation reads its prompt."""
    decode_flops_per_token: float
    """One token decoded with a cache, when it sees the whole context (itself included)."""
    kv_bytes_per_token: int
    """Keys and values that decoding stores."""
    kv_bytes_read_per_token: int
    """Keys and values that decoding such a token reads: each evaluation reads its own slot."""
    weight_bytes_per_token: float
    """Weights that a decoding step reads, divided by the rows of the batch. A field is read once
    per evaluation, or once per layer if it stays in the processor's cache between the evaluations
    (with the other fields, where a method repeats the stack). The method's own weights
    (norms, mix, gates) are left out: under a thousandth at the published sizes."""
    num_parameters: int
    """All parameters, including the method's own."""


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
        schedule: the config's own if None.
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
    config, context_length = _checked(config, schedule, context_length)
    check_kv_strategy(kv_strategy)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if processor_cache_bytes < 0:
        raise ValueError(f"processor_cache_bytes must be at least 0, got {processor_cache_bytes}")
    evaluations, num_layers = sum(config.evaluations_per_layer()), config.num_layers
    head = 2 * config.dim * config.vocab_size
    body = _body_flops(config, evaluations, mean_tokens_seen=(context_length + 1) / 2)
    kv_bytes = bytes_per_value * 2 * config.num_kv_heads * config.head_dim  # of a token in a slot
    kv_bytes_seen = context_length * kv_bytes
    field_bytes = bytes_per_value * field_parameters(config)
    num_held = num_layers if METHODS[config.method].repeats_stack else 1
    field_stays = num_held * field_bytes + batch_size * kv_bytes_seen <= processor_cache_bytes
    step_bytes = field_bytes * (num_layers if field_stays else evaluations)
    step_bytes += bytes_per_value * config.dim * (config.vocab_size + 1)  # head and its norm
    return InferenceCost(
        evaluations_per_token=evaluations,
        forward_flops_per_token=body + head,
        prefill_flops_per_token=body + head / context_length,
        decode_flops_per_token=head
        + _body_flops(config, evaluations, mean_tokens_seen=context_length),
        kv_bytes_per_token=kv_bytes * (evaluations if kv_strategy == "exact" else num_layers),
        kv_bytes_read_per_token=kv_bytes_seen * evaluations,
        # Each row reads the embedding of its own token.
        weight_bytes_per_token=step_bytes / batch_size + bytes_per_value * config.dim,
        num_parameters=num_parameters(config),
    )


def training_flops_per_token(
    config: ModelConfig,
    schedule: ScheduleLike | None = None,
    *,
    context_length: int | None = None,
) -> float:
    """Count forward and backward pass of a training step, per token; see `inference_cost`.

    The backward pass costs two forward passes of the evaluations that are differentiated.
    """
    forward = inference_cost(config, schedule, context_length=context_length)
    config, context_length = _checked(config, schedule, context_length)
    method = METHODS[config.method]
    differentiated = sum(
        method.num_differentiated(config.corrections, layer, config.options)
        for layer in range(config.num_layers)
    )
    constant = _field_flops(config, mean_tokens_seen=(context_length + 1) / 2) * (
        forward.evaluations_per_token - differentiated
    )
    return 3 * forward.forward_flops_per_token - 2 * constant


def member_flops_per_token(config: ModelConfig, member: ScheduleLike, *, reads_full: bool) -> float:
    """Count the forward and backward pass of a member of an elastic family.

    `reads_full`: it learns from the full schedule, whose logits are computed once more.
    """
    again = 2 * config.dim * config.vocab_size if reads_full else 0
    return training_flops_per_token(config, member) + again


def num_parameters(config: ModelConfig, *, include_mix: bool = True) -> int:
    """Count the parameters, the same for all schedules.

    `include_mix=False` leaves out the method's own (mix, norms, stages), as published sizes do.
    """
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    fields = config.num_layers * field_parameters(config)
    own = 0
    if include_mix:
        own = _method_parameters(config.method, config.num_layers, config.dim, config.options)
    return embeddings + fields + config.dim + own


@lru_cache
def _method_parameters(name: str, num_layers: int, dim: int, options: Any) -> int:
    """Count the parameters beside the fields, of layers that are built without memory."""
    method = METHODS[name]
    sizes: dict[str, Any] = {"dim": dim, "layer_norm_eps": 1e-5, "options": options}
    with torch.device("meta"):
        parts = [method(nn.Identity(), layer, **sizes) for layer in range(num_layers)]
        shared = method.make_shared(**sizes)
    modules = nn.ModuleList([*parts, shared] if shared else parts)
    return sum(parameter.numel() for parameter in modules.parameters())


def _checked(
    config: ModelConfig, schedule: ScheduleLike | None, context_length: int | None
) -> tuple[ModelConfig, int]:
    if schedule is not None:  # The config's own checks then apply.
        config = config.with_schedule(schedule)
    if context_length is None:
        context_length = config.context_length
    if not 1 <= context_length <= config.context_length:
        raise ValueError(
            f"context_length must be between 1 and the model's {config.context_length} tokens, "
            f"got {context_length}"
        )
    return config, context_length


def _projection_values(config: ModelConfig) -> int:
    """Entries of a field's matrices: query, key, value, output, gate, up, down."""
    kv_dim = config.num_kv_heads * config.head_dim
    return config.dim * (2 * config.dim + 2 * kv_dim + 3 * config.ffn_dim)


def field_parameters(config: ModelConfig) -> int:
    return _projection_values(config) + 2 * config.dim  # matrices and both RMSNorms


def _field_flops(config: ModelConfig, *, mean_tokens_seen: float) -> float:
    """Count one evaluation for one token; attention's are its scores and weighted values."""
    return 2 * _projection_values(config) + 4 * config.dim * mean_tokens_seen


def _body_flops(config: ModelConfig, evaluations: int, *, mean_tokens_seen: float) -> float:
    """Count all but the head, for one token."""
    method = METHODS[config.method]
    own = sum(
        method.flops_beside_fields(config.corrections, layer, config.dim, config.options)
        for layer in range(config.num_layers)
    )
    return evaluations * _field_flops(config, mean_tokens_seen=mean_tokens_seen) + own
