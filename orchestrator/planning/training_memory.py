"""Memory of a training step, estimated from shapes before anything is built.

Weights, gradients, AdamW's two moments and Muon's one buffer follow from the number of parameters.
Activations are what the forward pass keeps, plus the larger of two peaks: the loss's backward pass,
or a field's. Muon's update of one matrix at a time takes less than they did, so it does not count.
Left out: what kernels, allocators and libraries take, and a GPU's float32 copies of shared keys and
values. Gradients are counted during the whole step, and once: replicas have them where they send
them. What an evaluation keeps depends on the form in which its field is computed.
`tests/orchestrator/planning/test_training_memory.py` compares with the live tensors of real steps
of the fast forms, and with what AOTAutograd's graphs of the others keep.
Source: this project.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from iiet.cost import (
    field_parameters,
    layer_counts,
    num_parameters,
    num_trained_matrix_parameters,
    num_trained_parameters,
)
from iiet.freezing import TrainedLayers, TrainedPart, trained_part
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of
from iiet.model.losses import CHUNK_ELEMENTS
from iiet.model.schedule import IterationSchedule

Forms = Literal["fast", "plain", "compiled"]
"""How fields are computed: by the fast forms of a CPU, by plain formulas as on a GPU without a
compiler, or compiled."""

_FULL = 4  # bytes of a float32 value
_HALF = 2  # bytes of a bfloat16 value
_FEED_FORWARD_TEMPORARIES = 4  # tensors of width ffn_dim at once in its backward pass
# Tensors like the logits of a chunk, float32: log-probabilities and two gradients; with a teacher,
# its distribution, the divergence's terms and its gradient.
_LOGITS_AT_ONCE = 3
_LOGITS_WITH_TEACHER = 6


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """What one worker computes in a step of a training, and how."""

    num_sequences: int
    """Sequences of one forward pass."""
    sequence_length: int | None = None
    """Tokens of a sequence; as many as the context has if None."""
    num_passes: int = 1
    """Passes of a step; a sharded model stays gathered between them."""
    schedule: IterationSchedule | None = None
    """The costliest one that is trained; the config's own if None."""
    trained: TrainedLayers = "all"
    """Which weights are trained, by the config's own schedule."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the fields' matrices; AdamW has the other weights in any case."""
    frozen: ModelConfig | None = None
    """A model that is not trained and whose answers the loss reads; sharded, if the trained one
    is."""
    has_cheaper: bool = False
    """Whether cheaper schedules learn from the costliest in the same step."""
    compares_hidden: bool = False
    """Whether the loss compares the hidden states of all layers with a teacher's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    on_gpus: bool = False
    """With bf16, a frozen model's weights are then bfloat16; all others are float32."""
    num_shards: int = 1
    """Workers that share weights, gradients and moments; 1 if each has all."""
    activation_checkpointing: bool = False
    forms: Forms = "fast"
    """How fields are computed."""

    @property
    def value_bytes(self) -> int:
        """Bytes of a value in the arithmetic; hidden states are float32 in any case."""
        return _FULL if self.precision == "fp32" else _HALF

    @property
    def compares_distributions(self) -> bool:
        """Whether the loss compares two distributions."""
        return self.frozen is not None or self.has_cheaper


def training_memory(config: ModelConfig, step: TrainingStep) -> dict[str, int]:
    """Return the bytes of weights, gradients, the optimizers' state and activations of one
    worker."""
    part = trained_part(config.corrections, step.trained)
    trained_share = num_trained_parameters(config, step.trained) / num_parameters(config)
    num_matrix_parameters = num_trained_matrix_parameters(config, step.trained)
    config = config if step.schedule is None else replace(config, schedule=step.schedule)
    parameters = num_parameters(config)
    width = step.value_bytes
    shard = -(-parameters // step.num_shards) * _FULL
    weights = shard
    gradients = int(shard * trained_share)
    if step.num_shards > 1:
        # What belongs to no field stays for the whole step, in float32. So do the fields of a step
        # of several passes; in a single pass, the next layer is gathered while one runs.
        layer = field_parameters(config)
        outside_fields = (parameters - config.num_layers * layer) * _FULL
        gathered = config.num_layers if step.num_passes > 1 else min(2, config.num_layers)
        weights += outside_fields + gathered * layer * width
        # A layer's gradients are copied to float32 to be summed over the workers. Where the stack
        # repeats, those of all layers wait for their earlier runs (`_peak_bytes`).
        gradients += int((outside_fields + layer * (width + _FULL)) * trained_share)
    if step.precision == "bf16":
        # The backward pass needs the copies of all layers, or of the one that is recomputed; a
        # compiled field makes its own again. Of a sharded model, layers are gathered as bfloat16,
        # and the head is copied.
        is_copied_again = step.activation_checkpointing or step.forms == "compiled"
        copied = parameters // (config.num_layers if is_copied_again else 1)
        weights += (copied if step.num_shards == 1 else config.vocab_size * config.dim) * _HALF
    if step.frozen is not None:
        frozen_width = width if step.on_gpus else _FULL
        weights += _frozen_weights(step.frozen, step.num_shards) * frozen_width
    tokens = step.num_sequences * (step.sequence_length or config.context_length)
    peak = _peak_bytes(config, step, part, tokens)
    # The last hidden states of the full schedule stay for the cheaper schedules.
    kept = tokens * config.dim * _FULL if step.has_cheaper else 0
    if step.compares_hidden:  # Those of the teacher stay until the student's loss.
        kept += tokens * config.dim * _FULL * config.num_layers
    memory = {"weights": weights, "gradients": gradients, "AdamW": int(2 * shard * trained_share)}
    if step.optimizer == "muon":
        memory["AdamW"] -= 2 * _FULL * num_matrix_parameters
        memory["Muon"] = _FULL * num_matrix_parameters
    return {**memory, "activations": peak + kept}


def _frozen_weights(config: ModelConfig, num_shards: int) -> int:
    """Count the weights of a frozen model that a worker holds at once, at most."""
    parameters = num_parameters(config)
    if num_shards == 1:
        return parameters
    # What belongs to no field stays gathered until the end of a step. Of the fields there are the
    # one that runs, the buffer in which it came, and that of the one before.
    field = field_parameters(config)
    others = parameters - config.num_layers * field
    return -(-parameters // num_shards) + others + min(3, config.num_layers) * field


def _peak_bytes(config: ModelConfig, step: TrainingStep, part: TrainedPart, tokens: int) -> int:
    """Count activations at the peak; `tokens` are those of one forward pass."""
    width = step.value_bytes
    method = facts_of(config.method)
    state = config.dim * _FULL
    num_runs = method.num_runs(config.corrections)
    # A layer before the first trained one keeps nothing.
    of_layers = [
        _layer_bytes(config, layer, step, is_frozen=not part.has_field[layer])
        if layer >= part.first_layer
        else 0
        for layer in range(config.num_layers)
    ]
    # What layers leave for later ones, and as much for its gradient while they go backward.
    left_for_later = method.num_left * config.num_layers * state
    # The last hidden state, its norm and the norm's gradient; the head's gradient so far, and that
    # of a chunk.
    logits = min(tokens * config.vocab_size, CHUNK_ELEMENTS)
    at_once = _LOGITS_WITH_TEACHER if step.compares_distributions else _LOGITS_AT_ONCE
    loss = at_once * logits * _FULL + tokens * 3 * state
    if part.has_ends:
        loss += config.vocab_size * config.dim * (_FULL + width)
    # Gradients of its output, of the state between attention and feed-forward network, and of what
    # its output is added to.
    field = _FEED_FORWARD_TEMPORARIES * config.ffn_dim * width + 3 * state
    if step.activation_checkpointing:
        # Of a layer, its input stays.
        kept = num_runs * (config.num_layers - part.first_layer) * state + left_for_later
        field += max(of_layers) // num_runs - state + left_for_later
    else:
        kept = sum(of_layers) + left_for_later
        # The first layer to go backward needs no gradient of `left`, and frees what it kept.
        field += max(0, left_for_later - of_layers[-1])
    # The gradient of a matrix before it is added up; the head's waits for the embeddings'.
    matrices = config.ffn_dim * config.dim if any(part.has_field) else 0
    if part.has_ends:
        matrices += config.vocab_size * config.dim // step.num_shards
    at_start = tokens * kept + max(loss, tokens * field + matrices * _FULL)
    # Where the stack repeats, a field's gradients wait for those of the field's earlier runs.
    waiting = config.num_layers * field_parameters(config) * width if num_runs > 1 else 0
    after_run = tokens * (kept - kept // num_runs + field) + matrices * _FULL + waiting
    return max(at_start, after_run)


def _layer_bytes(config: ModelConfig, layer: int, step: TrainingStep, *, is_frozen: bool) -> int:
    """Count what a layer's evaluations keep of each token for the backward pass."""
    width = step.value_bytes
    dim = config.dim
    ffn_dim = config.ffn_dim
    counts = layer_counts(config, layer)
    q_dim = config.num_heads * config.head_dim
    kv_dim = config.num_kv_heads * config.head_dim
    # All keep the point, and queries, keys, values, attention's output, gate and up in the
    # arithmetic's precision.
    evaluation = dim * _FULL + (2 * q_dim + 2 * kv_dim + 2 * ffn_dim) * width
    # What the matrices multiply beside attention's output, which attention keeps in any case.
    if step.forms == "fast":  # The point's norm, and the network's input.
        inputs = dim * _FULL + dim * width
    elif (
        step.forms == "plain"
    ):  # Both inputs in the arithmetic's precision, and what is mapped back.
        inputs = (2 * dim + ffn_dim) * width
    else:  # Both inputs, if they are not computed again like what is mapped back.
        inputs = 2 * dim * width
    if not is_frozen:  # Kept for the matrices' gradients alone.
        evaluation += inputs
    # The state between attention and feed-forward network, or what it is computed from.
    evaluation += dim * (width if step.forms == "compiled" else _FULL)
    if step.forms == "plain":  # The activation of the gate.
        evaluation += ffn_dim * width
    if config.head_norms:  # Queries and keys before their norm.
        evaluation += (q_dim + kv_dim) * width
    return counts.num_differentiated * evaluation + counts.num_kept * dim * _FULL
