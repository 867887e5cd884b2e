"""What training a model takes in memory, counted from shapes before anything is built.

Four parts. Weights, their gradients and AdamW's two moments follow from the number of parameters.
Activations are what the forward pass keeps for the backward pass: so many hidden states, heads and
feed-forward values for each evaluation of a field, as the modules of this package keep them, then
the logits, which for a moment exist three times. The peak is the larger of two moments: the loss's
backward pass, and a field's.

An estimate, not a count: what kernels, allocators and libraries take beside it is not in it.
`tests/iiet/test_training_memory.py` holds it against the live tensors of real steps.
Source: shapes of `iiet.decoder`; this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iiet.config import ModelConfig
from iiet.cost import evaluations_per_layer, num_parameters
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule

__all__ = ["TrainingMemory", "training_memory"]

_FULL, _HALF = 4, 2
"""Bytes of a float32 and of a bfloat16 value."""
_FEED_FORWARD_TEMPORARIES = 4
"""Tensors of the inner width that the feed-forward network's backward pass holds at once."""
_LOGITS_AT_ONCE = 3
"""Log-probabilities and two gradients of their size, in float32, while the loss goes backward."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that one worker needs while it trains."""

    weights: int
    """Float32 weights, and their bfloat16 copies where the arithmetic is bfloat16."""
    gradients: int
    """Float32 gradients."""
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """What the forward pass keeps, and the backward pass's own at its peak."""

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    config: ModelConfig,
    schedule: IterationSchedule | None = None,
    *,
    num_sequences: int,
    precision: Literal["fp32", "bf16"] = "fp32",
    activation_checkpointing: bool = False,
    num_shards: int = 1,
    has_teacher: bool = False,
) -> TrainingMemory:
    """Estimate the memory of a training step.

    Args:
        config: sizes and method.
        schedule: the costliest one that is trained; the config's own when not given.
        num_sequences: sequences of one forward pass, each as long as the context.
        precision: of the arithmetic; weights, gradients and moments are float32.
        activation_checkpointing: whether each layer is recomputed in the backward pass.
        num_shards: workers that share weights, gradients and moments; 1 where each has all.
        has_teacher: whether a frozen model of the same size runs beside it.
    """
    parameters = num_parameters(config)
    # A layer is gathered from all shards while it runs, and the largest matrix too.
    gathered = 0 if num_shards == 1 else parameters // config.num_layers
    held = -(-parameters // num_shards) + gathered
    # The backward pass needs the copies of all layers, or of the one that is recomputed.
    copied = parameters // (config.num_layers if activation_checkpointing else 1)
    copies = copied if precision == "bf16" else 0
    tokens = num_sequences * config.context_length
    per_token = _bytes_per_token(
        config, schedule or config.corrections, precision, activation_checkpointing
    )
    head = config.vocab_size * config.dim * _FULL // num_shards
    if has_teacher:
        # Its logits, and the gradient that the divergence keeps.
        per_token += 2 * config.vocab_size * _FULL
    return TrainingMemory(
        weights=(held + (parameters if has_teacher else 0)) * _FULL + copies * _HALF,
        gradients=held * _FULL,
        optimizer=2 * (-(-parameters // num_shards)) * _FULL,
        activations=tokens * per_token + head,
    )


def _bytes_per_token(
    config: ModelConfig,
    schedule: IterationSchedule,
    precision: str,
    activation_checkpointing: bool,
) -> int:
    dim, layers = config.dim, config.num_layers
    has_mix = METHODS[config.method].has_mix
    evaluations = evaluations_per_layer(config, schedule)
    evaluation = _evaluation_bytes(config, precision)
    ends = 3 * dim * _FULL  # the embeddings, and the last hidden state before and after its norm
    logits = _LOGITS_AT_ONCE * config.vocab_size * _FULL
    width = _FULL if precision == "fp32" else _HALF
    field = _FEED_FORWARD_TEMPORARIES * config.ffn_dim * width + 3 * dim * _FULL
    # Each layer's estimate gets a gradient of its own while the later layers go backward.
    field += layers * dim * _FULL if has_mix else 0
    if activation_checkpointing:
        kept = layers * dim * _FULL * (2 if has_mix else 1)
        return ends + kept + max(logits, max(evaluations) * evaluation + field)
    return ends + sum(evaluations) * evaluation + max(logits, field)


def _evaluation_bytes(config: ModelConfig, precision: str) -> int:
    """Count what one evaluation keeps for each token.

    In float32: the point, its norm, and the state between attention and feed-forward. In the
    arithmetic's precision: queries, keys, values, what attention gives, the feed-forward network's
    input, gate and up. Beside the field: its output and its norm where the method has a mix, and
    one state more where stages of a Runge-Kutta method are summed.
    """
    method, dim = METHODS[config.method], config.dim
    kv_dim = config.num_kv_heads * config.head_dim
    width = _FULL if precision == "fp32" else _HALF
    is_staged = max(evaluations_per_layer(config, config.corrections)) > 1
    states = 3 + (2 if method.has_mix else 0) + (is_staged and not method.has_corrections)
    return states * dim * _FULL + (3 * dim + 2 * kv_dim + 2 * config.ffn_dim) * width
