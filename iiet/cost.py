"""What a model costs, exactly, from its config and iteration schedule; nothing is built or run.

In: sizes and a schedule. Out: evaluations, floating-point operations, bytes and parameters. A field
evaluation is the unit; everything else follows from shapes. So a sweep can order its schedules by
cost before the first training step, and only their quality has to be measured.

Counted: matrix products of m x k by k x n at 2 m k n (projections, feed-forward, head), attention's
scores and weighted values over the tokens that a token really sees, and what a method says that its
layers do beside their fields (the mix's weighted sums, gates). Not counted: norms, activations,
softmax, rotary angles, residual and Runge-Kutta sums, together about a hundredth of the rest. The
backward pass is taken as two forward passes of what is differentiated.

Bytes are what a decoding step has to read from memory: weights once per step, whatever the batch,
keys and values for each of its rows. An evaluation reads its layer's weights from the processor's
cache where the one before it left them there.

`iiet.training_memory` counts what training takes. Source: shapes of `iiet.decoder`; this project.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from iiet.cache import KvStrategy
from iiet.config import ModelConfig
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule

__all__ = ["InferenceCost", "inference_cost", "num_parameters", "training_flops_per_token"]


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
    """Keys and values that decoding stores for each token."""
    kv_bytes_read_per_token: int
    """Keys and values read to decode one token that sees the whole context (itself included): by
    each evaluation those of its slot. Every row of a batch reads its own."""
    weight_bytes_per_token: float
    """Weights read from memory to decode one token: the step's, a field once per evaluation or, if
    it stays in the processor's cache, once per layer, shared by the rows of the batch. The
    method's own (norms, mix, gates) are left out, under a thousandth at the published sizes."""
    num_parameters: int
    """All parameters, the method's own included; the same for all schedules."""


def inference_cost(
    config: ModelConfig,
    schedule: IterationSchedule | None = None,
    *,
    context_length: int | None = None,
    batch_size: int = 1,
    bytes_per_value: int = 4,
    kv_strategy: KvStrategy = "exact",
    processor_cache_bytes: int = 0,
) -> InferenceCost:
    """Count the cost of a model under a schedule.

    Args:
        config: sizes and method.
        schedule: the config's own when not given.
        context_length: tokens read (prefill) or seen (decode); the config's when not given.
        batch_size: rows that a decoding step decodes together.
        bytes_per_value: of weights, keys and values: 4 for float32, 2 for bfloat16.
        kv_strategy: `exact`, a slot per evaluation, or `last`, a slot per layer.
        processor_cache_bytes: cache between memory and arithmetic (an H100's L2: 50 MB). A layer's
            weights stay in it from one evaluation to the next if there is room for them beside the
            keys and values that an evaluation reads. 0 is for none.

    Raises:
        ValueError: a schedule that the method cannot serve, a context that is not within the
            config's, an unknown strategy, no row, or a cache of negative size.
    """
    config, context_length = _checked(config, schedule, context_length)
    if kv_strategy not in ("exact", "last"):
        raise ValueError(f"KV strategy must be 'exact' or 'last', got {kv_strategy!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if processor_cache_bytes < 0:
        raise ValueError(f"processor_cache_bytes must be at least 0, got {processor_cache_bytes}")
    evaluations, num_layers = sum(config.evaluations_per_layer()), config.num_layers
    head = 2 * config.dim * config.vocab_size
    body = _body_flops(config, evaluations, mean_tokens_seen=(context_length + 1) / 2)
    kv_bytes = bytes_per_value * 2 * config.num_kv_heads * config.head_dim  # of a token in a slot
    kv_bytes_seen = context_length * kv_bytes
    field_bytes = bytes_per_value * _field_parameters(config)
    field_stays = field_bytes + batch_size * kv_bytes_seen <= processor_cache_bytes
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
    schedule: IterationSchedule | None = None,
    *,
    context_length: int | None = None,
) -> float:
    """Count forward and backward (twice what is differentiated) of a training step, per token.

    Args:
        config: sizes and method.
        schedule: the config's own when not given.
        context_length: tokens per sequence; the config's when not given.

    Raises:
        ValueError: as `inference_cost`.
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


def num_parameters(config: ModelConfig, *, include_mix: bool = True) -> int:
    """Count the parameters.

    Args:
        config: sizes and method; the schedule has no say.
        include_mix: whether to count what the method has beside the fields (mix, norms, stages);
            published sizes leave it out (and the norms' weights, under a thousandth).
    """
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    fields = config.num_layers * _field_parameters(config)
    own = METHODS[config.method].num_parameters(config.num_layers, config.dim, config.options)
    return embeddings + fields + config.dim + (own if include_mix else 0)


def _checked(
    config: ModelConfig, schedule: IterationSchedule | None, context_length: int | None
) -> tuple[ModelConfig, int]:
    """Put the schedule into the config, whose own checks then apply, and settle the context."""
    if schedule is not None:
        config = dataclasses.replace(config, schedule=schedule)
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


def _field_parameters(config: ModelConfig) -> int:
    """Matrices and both RMSNorms of one layer."""
    return _projection_values(config) + 2 * config.dim


def _field_flops(config: ModelConfig, *, mean_tokens_seen: float) -> float:
    """Count one evaluation of a field for one token."""
    return 2 * _projection_values(config) + 4 * config.dim * mean_tokens_seen


def _body_flops(config: ModelConfig, evaluations: int, *, mean_tokens_seen: float) -> float:
    """Count fields and what the method adds for one token; all but the head."""
    method = METHODS[config.method]
    own = sum(
        method.flops_beside_fields(config.corrections, layer, config.dim, config.options)
        for layer in range(config.num_layers)
    )
    return evaluations * _field_flops(config, mean_tokens_seen=mean_tokens_seen) + own
