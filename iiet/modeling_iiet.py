"""The decoder as a model of transformers, in one file that needs torch and transformers alone.

An exported folder contains this file, so `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` works where the package is not installed. It computes what `iiet.Decoder`
computes, under the same names of weights, in plain formulas.

A layer's *field* F is its whole Llama block. A *method* says how the layer advances the hidden
state with evaluations of F; IIET predicts once, then corrects as often as the *iteration schedule*
(`config.corrections`) says. Each layer leaves an *estimate* s_l, and every later layer reads all of
them through learned rows, the *mix*.
"""

# No `from __future__ import annotations`: as strings they would turn the config's type checks off.

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls the cache; until 5.23 the latter."""

__all__ = ["IIETConfig", "IIETForCausalLM"]

Evaluate = Callable[[Tensor], Tensor]
"""A layer's field in one pass, (batch, time, dim) to the same; each call is one evaluation."""
Advance = tuple[Tensor, Tensor | None]
"""What a layer returns: the hidden state, and its estimate where the method has a mix."""


@strict
class IIETConfig(PreTrainedConfig):
    """Method, sizes and iteration schedule. A ValueError says what does not fit together when a
    model is built, because `from_pretrained(folder, corrections=[...])` overrides values later.
    """

    model_type = "iiet"
    # So that config.json states every value, whatever the defaults of the version that reads it.
    has_no_defaults_at_init = True

    method: str = "iiet"
    """How a layer advances the hidden state: a key of `LAYERS`."""
    method_options: dict[str, Any] | None = None
    """Options of the method that are not at their defaults; see `ImplicitEuler`."""
    corrections: list[int] | tuple[int, ...] | int | None = None
    """The iteration schedule: corrections per layer (PCformer: levels, None for the full one), or
    one number for all layers; None for methods without corrections."""
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    """Width of a head; None for `hidden_size / num_attention_heads`."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    head_norms: bool = False
    """Whether queries and keys are normalized per head, before the rotation."""
    intermediate_size: int = 1408
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    rope_theta: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    """How rotary angles are stretched: `rope_type` is linear, llama3 or yarn, with the keys that
    they have in transformers' `rope_parameters`."""
    rotary_layers: list[bool] | tuple[bool, ...] | None = None
    """Whether each layer rotates; None: all do."""
    sliding_windows: list[int | None] | tuple[int | None, ...] | None = None
    """How many tokens a token of each layer sees, itself included; None: all earlier ones."""
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Corrections per layer, zeros for methods without corrections."""
        full = LAYERS[self.method].full_level if self.corrections is None else self.corrections
        return full_schedule(full or 0, self.num_hidden_layers)

    def check(self) -> None:
        """Raise a ValueError for values that do not fit together."""
        layer = LAYERS.get(self.method)
        if layer is None:
            raise ValueError(f"method must be one of {', '.join(LAYERS)}, got {self.method!r}")
        if self.head_dim is None or self.head_dim % 2:
            raise ValueError(
                "hidden_size must be a multiple of twice num_attention_heads, or head_dim even"
            )
        for name in ("rotary_layers", "sliding_windows"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                raise ValueError(f"{name} must have a value for each of the layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if unknown := set(self.method_options or {}) - set(layer.options):
            raise ValueError(f"method {self.method!r} has no option {', '.join(sorted(unknown))}")
        if layer.has_corrections and not layer.full_level and self.corrections is None:
            raise ValueError(f"method {self.method!r} needs corrections")
        if not layer.has_corrections and any(self.schedule):
            raise ValueError(f"method {self.method!r} makes no corrections")
        if layer.full_level and max(self.schedule) > layer.full_level:
            raise ValueError(f"method {self.method!r} has levels 0 to {layer.full_level}")
        if layer.repeats_stack and len(set(self.schedule)) > 1:
            raise ValueError(f"all layers of method {self.method!r} make the same corrections")
        check_attention(self._attn_implementation, self.output_attentions)


def check_attention(implementation: Any, output_attentions: bool | None) -> None:
    """Raise a ValueError for kinds and outputs of attention that this file does not compute."""
    if output_attentions:
        raise ValueError(
            "output_attentions must be false, got True: sdpa computes no attention weights"
        )
    if implementation not in (None, "sdpa"):
        raise ValueError(f"attn_implementation must be 'sdpa', got {implementation!r}")


def full_schedule(
    corrections: int | list[int] | tuple[int, ...], num_layers: int
) -> tuple[int, ...]:
    """Return the corrections of each layer, from one number for all layers or one for each.

    Anything else is a ValueError.
    """
    is_for_each = isinstance(corrections, list | tuple)
    numbers = list(corrections) if is_for_each else [corrections] * num_layers
    are_counts = all(isinstance(number, int) and number >= 0 for number in numbers)
    if len(numbers) != num_layers or not are_counts:
        raise ValueError(
            f"corrections must be one number from 0, or one for each of {num_layers} layers, got "
            f"{corrections!r}"
        )
    return tuple(numbers)


def rotary_tables(config: IIETConfig, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions, (batch, time), each (batch, time, 1, head_dim)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels = torch.arange(0, config.head_dim, 2, dtype=dtype, device=x.device) / config.head_dim
    frequencies, size = 1.0 / config.rope_theta**channels, 1.0
    if config.rotary_scaling is not None:
        frequencies, size = scaled(frequencies, config.rope_theta, config.rotary_scaling)
    angles = positions[..., None, None].to(dtype) * frequencies
    angles = torch.cat([angles, angles], -1)
    return size * angles.cos(), size * angles.sin()


def scaled(frequencies: Tensor, theta: float, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """Return the frequencies, (head_dim / 2,), under a scaling, and what multiplies cosines and
    sines. Each is `(1 - kept) frequency / factor + kept * frequency`."""
    factor, size = scaling["factor"], 1.0
    if scaling["rope_type"] == "linear":
        return frequencies / factor, size
    context = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequencies * context / (2 * math.pi)  # Within the earlier context.
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif scaling["rope_type"] == "yarn":
        num_pairs = len(frequencies)
        bounds = [scaling.get("beta_fast") or 32.0, scaling.get("beta_slow") or 1.0]
        first, last = (
            num_pairs * math.log(context / (times * 2 * math.pi)) / math.log(theta)
            for times in bounds
        )
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * num_pairs - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(num_pairs, dtype=frequencies.dtype, device=frequencies.device)
        kept = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
        growth = 0.1 * math.log(factor)
        size = 1 + growth
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            size = (1 + mscale * growth) / (1 + mscale_all_dim * growth)
        size = scaling.get("attention_factor") or size
    else:
        raise ValueError(f"rotary_scaling has an unknown rope_type {scaling['rope_type']!r}")
    return (1 - kept) * frequencies / factor + kept * frequencies, size


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads, (batch, time, heads, head_dim); computed in float32, rounded once."""
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat([-second, first], -1) * sin).to(heads.dtype)


class Pass(NamedTuple):
    """What all evaluations of one forward pass share."""

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: Cache | None
    slots: Iterator[int]
    """Numbers the evaluations: each has a slot of the cache."""
    window_masks: dict[int, Tensor | None]
    """Sliding window -> the mask of layers that have it."""


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    is_causal = True

    def __init__(self, config: IIETConfig, index: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rotates = config.rotary_layers is None or config.rotary_layers[index]
        self.window = None if config.sliding_windows is None else config.sliding_windows[index]
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = self.k_norm = None
        if config.head_norms:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, call: Pass) -> Tensor:
        """Attend within `x`, (batch, time, dim), and to the tokens in the cache's next slot."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        queries, keys = self.q_proj(x).view(by_head), self.k_proj(x).view(by_head)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if self.rotates:
            queries, keys = rotate(queries, *call.rope), rotate(keys, *call.rope)
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
        values = self.v_proj(x).view(by_head).transpose(1, 2)
        if call.cache is not None:
            keys, values = call.cache.update(keys, values, next(call.slots))
        mask = call.mask if self.window is None else call.window_masks[self.window]
        mixed, _ = sdpa_attention_forward(self, queries, keys, values, mask)
        return self.o_proj(mixed.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate) * up)`."""

    def __init__(self, config: IIETConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def at_least_float32(x: Tensor) -> Tensor:
    """Return a float32 or float64 tensor as it is, and any other as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class KeepsFloat32(nn.Module):
    """A module whose own parameters stay float32 when the model is moved to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFloat32":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            half = (torch.bfloat16, torch.float16)
            is_rounded = result.dtype in half and tensor.dtype not in half
            return tensor.to(result.device, torch.float32) if is_rounded else result

        return super()._apply(moved, recurse)


class EstimateNorm(KeepsFloat32, nn.LayerNorm):
    """The LayerNorm that makes an estimate of a field's output, at least in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.layer_norm(at_least_float32(x), self.normalized_shape, weight, bias, self.eps)


class Mix(KeepsFloat32):
    """A layer's rows of two matrices: the inner one gives the field's points, the outer h_l."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.empty(index + 2))
        self.outer = nn.Parameter(torch.empty(index + 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both rows as the mean."""
        for row in (self.inner, self.outer):
            nn.init.constant_(row, 1.0 / len(row))

    @staticmethod
    def sum(row: Tensor, estimates: Sequence[Tensor]) -> Tensor:
        """Sum the estimates, each (batch, time, dim), by the first weights of a row."""
        weights = at_least_float32(row).unbind()
        total = weights[0] * estimates[0]
        for weight, estimate in zip(weights[1:], estimates[1:], strict=False):
            total = torch.addcmul(total, weight, estimate)
        return total


class Layer(GradientCheckpointingLayer):
    """Base of all methods: a Llama block, and what the method learns for this layer.

    `forward` takes the hidden state and, where the method `has_mix`, the estimates of all earlier
    layers, each (batch, time, dim).
    """

    num_evaluations: ClassVar[int] = 1
    """Field evaluations beside the corrections of the schedule."""
    has_corrections: ClassVar[bool] = False
    full_level: ClassVar[int | None] = None
    """Highest level of a layer, where the schedule gives levels."""
    has_mix: ClassVar[bool] = False
    repeats_stack: ClassVar[bool] = False
    predictor_order: ClassVar[int] = 0
    """Order of the predictor that all layers share; 0 for none."""
    options: ClassVar[dict[str, Any]] = {}
    """Options of the method, and their defaults."""

    def __init__(self, config: IIETConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.index = index
        self.chosen = {**self.options, **(config.method_options or {})}
        self.build(config)

    def build(self, config: IIETConfig) -> None:
        """Make what the layer has beside its block."""

    def field(self, x: Tensor, call: Pass) -> Tensor:
        """Evaluate F(x), (batch, time, dim)."""
        x = x + self.self_attn(self.input_layernorm(x), call)
        return x + self.mlp(self.post_attention_layernorm(x))


class ExplicitEuler(Layer):
    """h = F(h): the plain decoder."""

    def forward(self, hidden: Tensor, *_: Tensor, evaluate: Evaluate, **__: Any) -> Advance:
        return evaluate(hidden), None


class Looped(ExplicitEuler):
    """The plain decoder, run `1 + r` times."""

    has_corrections = True
    repeats_stack = True


def runge_kutta_stages(stage: Callable[[int, Tensor], Tensor], h: Tensor, order: int) -> list[Any]:
    """RK2: k1 = K(h), k2 = K(h + k1). RK4: k2 = K(h + k1/2), k3 = K(h + k2/2), k4 = K(h + k3)."""
    stages = [stage(0, h)]
    for number, step in enumerate({1: (), 2: (1.0,), 4: (0.5, 0.5, 1.0)}[order], start=1):
        stages.append(stage(number, h + step * stages[-1]))
    return stages


class ExplicitRK2(Layer):
    """h = h + sum_j b_j k_j, with K(x) = F(x) - x."""

    num_evaluations = 2
    coefficients: ClassVar[tuple[float, ...]] = (1 / 2, 1 / 2)

    def forward(self, hidden: Tensor, *_: Tensor, evaluate: Evaluate, **__: Any) -> Advance:
        stages = runge_kutta_stages(lambda _, x: evaluate(x) - x, hidden, self.num_evaluations)
        return self.combine(hidden, stages), None

    def combine(self, hidden: Tensor, stages: list[Tensor]) -> Tensor:
        """Add the stages to the hidden state."""
        for coefficient, stage in zip(self.coefficients, stages, strict=True):
            hidden = hidden + coefficient * stage
        return hidden


class ExplicitRK4(ExplicitRK2):
    """The classical Runge-Kutta method of order 4."""

    num_evaluations = 4
    coefficients = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class GatedRK2(ExplicitRK2):
    """h = h + g k1 + (1 - g) k2, with a gate g for each token: sigmoid(W [k1, k2] + b)."""

    def build(self, config: IIETConfig) -> None:
        self.gate = nn.Linear(2 * config.hidden_size, 1)

    def combine(self, hidden: Tensor, stages: list[Tensor]) -> Tensor:
        first, second = stages
        gate = torch.sigmoid(self.gate(torch.cat(stages, -1)))
        return hidden + torch.lerp(second, first, gate.to(first.dtype))


class MixedLayer(Layer):
    """Base of the methods that read the earlier layers' estimates."""

    has_mix = True

    def build(self, config: IIETConfig) -> None:
        self.prediction_norm = EstimateNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.correction_norm = EstimateNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mix = Mix(self.index)


class ImplicitEuler(MixedLayer):
    """IIET: predict once, then correct `r` times towards the fixed point.

        e = P(F(h_{l-1}))                                       prediction
        e = N(F(sum_{k<l} A[l,k] s_k + A[l,l] e))               correction, r times
        s_l = e;   h_l = sum_{k<=l} C[l,k] s_k

    Options: `damping`, the share of each correction that is applied, perhaps learned; training
    differentiates the last `differentiated_corrections`; `reinject_prediction` adds the prediction.
    """

    has_corrections = True
    options: ClassVar[dict[str, Any]] = {
        "damping": 1.0,
        "learn_damping": False,
        "differentiated_corrections": None,
        "reinject_prediction": False,
    }

    def build(self, config: IIETConfig) -> None:
        super().build(config)
        chosen = self.chosen
        self.damping = nn.Parameter(torch.empty(1)) if chosen["learn_damping"] else None
        self.reinjection = nn.Parameter(torch.empty(1)) if chosen["reinject_prediction"] else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.damping is not None:
            nn.init.constant_(self.damping, self.chosen["damping"])
        if self.reinjection is not None:
            nn.init.zeros_(self.reinjection)

    def forward(
        self, hidden: Tensor, *estimates: Tensor, evaluate: Evaluate, corrections: int, **_: Any
    ) -> Advance:
        last, has_gradients = self.chosen["differentiated_corrections"], torch.is_grad_enabled()
        num_constant = 0 if last is None else max(0, corrections - last)
        damping = self.chosen["damping"] if self.damping is None else self.damping
        with torch.set_grad_enabled(has_gradients and not num_constant):
            estimate = prediction = self.prediction_norm(evaluate(hidden))
        if corrections:
            earlier = self.mix.sum(self.mix.inner, estimates)
            if self.reinjection is not None:
                earlier = earlier + at_least_float32(self.reinjection) * prediction
            own = at_least_float32(self.mix.inner)[-1]
        for number in range(corrections):
            if number == num_constant > 0:
                torch.clear_autocast_cache()  # It holds weights that were cast without gradients.
            with torch.set_grad_enabled(has_gradients and number >= num_constant):
                point = (earlier + own * estimate).to(hidden.dtype)
                corrected = self.correction_norm(evaluate(point))
                if self.damping is None and damping == 1.0:
                    estimate = corrected
                else:
                    estimate = estimate + damping * (corrected - estimate)
        return self.mix.sum(self.mix.outer, [*estimates, estimate]).to(hidden.dtype), estimate


class MovingAverageRungeKutta(KeepsFloat32):
    """PCformer's predictor, shared by all layers: p = h + sum_j a (1-a)^(order-j) R_j(k_j)."""

    def __init__(self, config: IIETConfig, order: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            EstimateNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(order)
        )
        self.alpha = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start a at one half."""
        nn.init.constant_(self.alpha, 0.5)

    def forward(self, evaluate: Evaluate, hidden: Tensor, order: int) -> Tensor:
        """Return the prediction, (batch, time, dim)."""

        def stage(number: int, point: Tensor) -> Tensor:
            return self.norms[number](evaluate(point.to(hidden.dtype)))

        prediction = hidden
        for number, k in enumerate(runge_kutta_stages(stage, hidden, order), start=1):
            prediction = prediction + self.alpha * (1 - self.alpha) ** (order - number) * k
        return prediction


class PredictorCorrectorRK2(MixedLayer):
    """PCformer: a Runge-Kutta prediction, corrected once through the mix (level 2). At level 1 the
    prediction has order 1; at level 0 it is not corrected."""

    has_corrections = True
    full_level = 2
    predictor_order = 2

    def forward(
        self,
        hidden: Tensor,
        *estimates: Tensor,
        evaluate: Evaluate,
        corrections: int,
        shared: nn.Module,
    ) -> Advance:
        level = corrections if self.has_corrections else 2
        order = self.predictor_order if level == 2 else 1
        estimate = self.prediction_norm(shared(evaluate, hidden, order))
        if level > 0:
            point = self.mix.sum(self.mix.inner, [*estimates, estimate]).to(hidden.dtype)
            estimate = self.correction_norm(evaluate(point))
        return self.mix.sum(self.mix.outer, [*estimates, estimate]).to(hidden.dtype), estimate


class PredictorCorrectorRK4(PredictorCorrectorRK2):
    """The same with a prediction of order 4, and without levels."""

    num_evaluations = 5
    has_corrections = False
    full_level = None
    predictor_order = 4


LAYERS: dict[str, type[Layer]] = {
    "vanilla": ExplicitEuler,
    "iiet": ImplicitEuler,
    "pcformer": PredictorCorrectorRK2,
    "pcformer_rk4": PredictorCorrectorRK4,
    "ode_rk2": ExplicitRK2,
    "ode_rk4": ExplicitRK4,
    "ode_rk2_gated": GatedRK2,
    "looped": Looped,
}
"""Methods by the names of the papers."""


class Backbone(nn.Module):
    """All of a model but its head."""

    def __init__(self, config: IIETConfig) -> None:
        super().__init__()
        method = LAYERS[config.method]
        order = method.predictor_order
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            method(config, index) for index in range(config.num_hidden_layers)
        )
        self.shared = MovingAverageRungeKutta(config, order) if order else None
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class IIETForCausalLM(PreTrainedModel, GenerationMixin):
    """Embed, advance L times, norm, logits.

    Its caches have a slot for each field evaluation, so that correction i of a new token attends to
    correction i of earlier ones; then cached decoding equals the full forward.
    """

    config_class = IIETConfig
    config: IIETConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Layers read each other's estimates, so a model stays on one device.
    _no_split_modules = ("IIETForCausalLM",)
    # What from_pretrained(dtype=torch.bfloat16) leaves in float32.
    _keep_in_fp32_modules_strict = ("prediction_norm", "correction_norm", "mix", "shared")

    def __init__(self, config: IIETConfig) -> None:
        config.check()
        super().__init__(config)
        if LAYERS[config.method].has_corrections:
            config.corrections = list(config.schedule)
        self.model = Backbone(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits and, given labels, (batch, time) as the tokens, the loss.

        The arguments are those of a Llama. Three things differ: positions never count padding;
        a cache is made only if `use_cache` is true, because scoring would fill a slot per
        evaluation and throw them away; and it must be used under the schedule that filled it.
        `past_key_values` is the older name of `cache`, `kwargs` go to the loss. More tokens than
        the context, a cache of another schedule, or `output_attentions`, are a ValueError.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        check_attention(self.config._attn_implementation, output_attentions)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        hidden: Any = inputs_embeds
        if inputs_embeds is None:
            hidden = self.model.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past, time = 0, hidden.shape[1]
        if cache is not None:
            past = int(cache.get_seq_length())
            self._prepare_cache(cache, is_empty=past == 0)
        if (position_ids is None or past) and past + time > self.config.max_position_embeddings:
            raise ValueError(
                f"{past + time} tokens do not fit the context of "
                f"{self.config.max_position_embeddings} tokens"
            )
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -time:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + time, device=hidden.device)[None]
        make_mask = partial(
            create_causal_mask,
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        call = Pass(
            rotary_tables(self.config, position_ids, hidden),
            make_mask(),
            cache,
            count(),
            {
                window: make_mask(and_mask_function=sliding_window_overlay(window))
                for window in set(self.config.sliding_windows or ())
                if window is not None
            },
        )
        schedule, method = self.config.schedule, LAYERS[self.config.method]
        states, estimates = [hidden], [at_least_float32(hidden)] if method.has_mix else []
        for _ in range(1 + max(schedule) if method.repeats_stack else 1):
            del states[1:]
            for layer, corrections in zip(self.model.layers, schedule, strict=True):
                hidden, estimate = layer(
                    hidden,
                    *estimates,
                    evaluate=partial(layer.field, call=call),
                    corrections=corrections,
                    shared=self.model.shared,
                )
                states.append(hidden)
                if method.has_mix:
                    estimates.append(estimate)

        hidden = self.model.norm(hidden)
        if not isinstance(logits_to_keep, Tensor):
            logits_to_keep = slice(-(logits_to_keep or 0), None)
        kept = hidden[:, logits_to_keep]
        if self.lm_head is None:
            logits = F.linear(kept, self.model.embed_tokens.weight)
        else:
            logits = self.lm_head(kept)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _prepare_cache(self, cache: Cache, *, is_empty: bool) -> None:
        """Give a cache, which transformers makes with a slot per layer, one per evaluation."""
        made_for: Any = (self.config.method, *self.config.schedule)
        if is_empty:
            cache.iiet_schedule = made_for
        elif getattr(cache, "iiet_schedule", None) != made_for:
            raise ValueError("the cache was filled by another model or iteration schedule")
        if cache.layer_class_to_replicate is None:  # Other caches grow by themselves.
            each = LAYERS[self.config.method].num_evaluations
            num_slots = sum(each + corrections for corrections in self.config.schedule)
            missing = range(num_slots - len(cache.layers))
            cache.layers += [copy.deepcopy(cache.layers[0]) for _ in missing]

    def with_schedule(self, schedule: int | list[int] | tuple[int, ...]) -> "IIETForCausalLM":
        """Return a model with the same weights, shared, under another iteration schedule.

        A cheaper one drafts: `generate(..., assistant_model=model.with_schedule(0))`.
        """
        twin = copy.copy(self)
        for name, value in self.__dict__.items():  # A hook or module set on one is not the other's.
            twin.__dict__[name] = value.copy() if isinstance(value, dict) else value
        twin.config = copy.deepcopy(self.config)
        twin.config.corrections = list(full_schedule(schedule, self.config.num_hidden_layers))
        twin.config.check()
        twin.generation_config = copy.deepcopy(self.generation_config)
        return twin

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing for sdpa, which is in use; anything else is a ValueError."""
        check_attention(attn_implementation, output_attentions=False)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers does not know the modules of methods. While it loads weights, its versions of
        # torch's functions leave loaded ones alone.
        reset = getattr(module, "reset_parameters", None)
        if callable(reset) and not type(module).__module__.startswith("torch."):
            reset()


if __name__ == "iiet.modeling_iiet":  # Not in an exported copy, which transformers registers.
    AutoConfig.register(IIETConfig.model_type, IIETConfig)
    AutoModelForCausalLM.register(IIETConfig, IIETForCausalLM)
