# Made by `make modeling` of iiet-orch from modeling/pcformer.py.jinja; change that file.
"""PCformer as a model of transformers, in one file that needs torch and transformers alone.

An exported folder contains this file as `modeling_iiet.py`, so
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works where the package is
not installed. It computes what `iiet.Decoder` computes, under the same names of weights.

A layer's *field* F is its whole Llama block. PCformer predicts with a Runge-Kutta step over F and
corrects the prediction once. Each layer leaves an *estimate* s_l, and every later layer reads all
of them through learned rows, the *mix*.

Each evaluation attends to what the same evaluation left for earlier tokens, so it has a *slot* of
keys and values of its own. Caches and servers find it as a layer: `config.num_hidden_layers` counts
the evaluations, `config.num_layers` the layers.
"""

# No `from __future__ import annotations`: as strings they would turn the config's type checks off.

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import RopeParameters
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

FULL_LEVEL = 2
"""The highest level of a layer of `pcformer`, at which it is the published method."""
EVALUATIONS_OF_RK4 = 5


@strict
class IIETConfig(PreTrainedConfig):
    """Sizes, options and iteration schedule. Values that do not fit together are a ValueError."""

    model_type = "iiet"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # No pipeline plan: it would divide the evaluations, as if each were a layer.

    method: str = "pcformer"
    """`pcformer`, or `pcformer_rk4` with a prediction of order 4."""
    method_options: dict[str, Any] | None = None
    corrections: list[int] | tuple[int, ...] | int | None = None
    """The iteration schedule: levels per layer, or one for all layers; None for the full one. There
    are none of `pcformer_rk4`."""
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_layers: int | None = None
    """Number of layers. Where it is not set, `num_hidden_layers` is that, as for other models."""
    num_hidden_layers: int = 12
    """Number of field evaluations: what caches and servers make a layer of keys and values for."""
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    rotary_layers: list[bool] | tuple[bool, ...] | None = None
    """Whether each layer rotates queries and keys; None: all do."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_dropout: int | float = 0.0
    head_norms: bool = False
    """Whether queries and keys are normalized per head, before the rotation."""
    mlp_bias: bool = False
    sliding_windows: list[int | None] | tuple[int | None, ...] | None = None
    """How many tokens a token of each layer sees, itself included; None: all earlier ones."""
    sliding_window: int | None = None
    """The window of the evaluations whose `layer_types` is `sliding_attention`."""
    layer_types: list[str] | None = None
    """`full_attention` or `sliding_attention` for each evaluation."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_layers is None:
            self.num_layers = self.num_hidden_layers
        self.set_corrections(self.corrections)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # After the first time, which is before the number of layers is known.
        if name == "corrections" and vars(self).get("num_layers") is not None:
            self.set_corrections(value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # The base class sets keyword arguments on a config that has counted its evaluations.
        if "corrections" in kwargs:
            config_dict = {**config_dict, "corrections": kwargs.pop("corrections")}
        return super().from_dict(config_dict, **kwargs)

    def set_corrections(self, corrections: int | Sequence[int] | None) -> None:
        """Take an iteration schedule: one level for all layers, or one for each.

        At level 0 a layer is its prediction of order 1, at level 1 this is corrected, and at level
        2 the prediction has order 2: one, two and three evaluations.
        """
        highest = FULL_LEVEL if self.method == "pcformer" else 0
        if corrections is None:
            corrections = highest
        if isinstance(corrections, list | tuple):
            schedule = list(corrections)
        else:
            schedule = [corrections] * self.num_layers
        are_levels = all(isinstance(level, int) and 0 <= level <= highest for level in schedule)
        if len(schedule) != self.num_layers or not are_levels:
            raise ValueError(
                f"corrections must be one level from 0 to {highest}, or one for each of "
                f"{self.num_layers} layers, got {corrections!r}"
            )
        super().__setattr__("corrections", schedule)
        self.set_slots()

    @property
    def evaluations_per_layer(self) -> list[int]:
        """The stages of the prediction and the correction of each layer."""
        if self.method == "pcformer_rk4":
            return [EVALUATIONS_OF_RK4] * self.num_layers
        return [1 + level for level in self.corrections]

    def set_slots(self) -> None:
        """Count the evaluations, and say what each attends to."""
        for name in ("rotary_layers", "sliding_windows"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_layers:
                raise ValueError(f"{name} must have a value for each of {self.num_layers} layers")
        windows = self.sliding_windows or [None] * self.num_layers
        # A config of transformers has one window; `IIETModel` makes the masks of several itself.
        self.sliding_window = self.window_sizes[0] if len(self.window_sizes) == 1 else None
        self.num_hidden_layers = sum(self.evaluations_per_layer)
        self.layer_types = [
            "sliding_attention" if window and self.sliding_window else "full_attention"
            for window, count in zip(windows, self.evaluations_per_layer, strict=True)
            for _ in range(count)
        ]

    @property
    def window_sizes(self) -> list[int]:
        """The sizes of the sliding windows, each once."""
        return sorted(set(self.sliding_windows or ()) - {None})

    def validate_architecture(self) -> None:
        """Part of the validation that `@strict` runs."""
        if self.method not in ("pcformer", "pcformer_rk4"):
            raise ValueError(f"this file computes pcformer and pcformer_rk4, not {self.method!r}")
        if self.method_options:
            raise ValueError(
                f"method {self.method!r} has no option {', '.join(self.method_options)}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for the rotary halves, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")


class IIETAttention(nn.Module):
    """Causal attention. One module serves all evaluations of its layer."""

    def __init__(self, config: IIETConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rotates = config.rotary_layers is None or config.rotary_layers[layer_idx]
        self.sliding_window = config.sliding_windows[layer_idx] if config.sliding_windows else None

        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * self.head_dim, bias=config.qkv_bias
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * self.head_dim, bias=config.qkv_bias
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * self.head_dim, bias=config.qkv_bias
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_out_bias,
        )
        if config.head_norms:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        slot: int,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        # Servers read it from the module: vLLM looks up the attention of this evaluation by it.
        self.layer_idx = slot
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)

        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        if self.config.head_norms:
            query_states = self.q_norm(query_states)
            key_states = self.k_norm(key_states)
        query_states = query_states.transpose(1, 2)
        key_states = key_states.transpose(1, 2)
        if self.rotates:
            cos, sin = position_embeddings
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if cache is not None:
            # A paged cache changes `kwargs`, which are this evaluation's own.
            key_states, value_states = cache.update(
                key_states, value_states, self.layer_idx, kwargs=kwargs
            )

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


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


class IIETEstimateNorm(KeepsFloat32, nn.LayerNorm):
    """The LayerNorm that makes an estimate of a field's output, at least in float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)
        bias = at_least_float32(self.bias)
        return nn.functional.layer_norm(
            at_least_float32(hidden_states), self.normalized_shape, weight, bias, self.eps
        )


class IIETMix(KeepsFloat32):
    """A layer's rows of two matrices: the inner one gives the field's points, the outer h_l."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.full((layer_idx + 2,), 1.0 / (layer_idx + 2)))
        self.outer = nn.Parameter(torch.full((layer_idx + 2,), 1.0 / (layer_idx + 2)))

    @staticmethod
    def sum(row: Tensor, estimates: Sequence[Tensor]) -> Tensor:
        """Sum the estimates, each (batch, time, dim), by the first weights of a row."""
        weights = at_least_float32(row).unbind()
        total = weights[0] * estimates[0]
        for weight, estimate in zip(weights[1:], estimates[1:], strict=False):
            total = torch.addcmul(total, weight, estimate)
        return total


class IIETPredictor(KeepsFloat32):
    """The prediction from the stages of a Runge-Kutta step, which all layers share.

    p = h + sum_j a (1 - a)^(n - j) k_j,   k_j = R_j(F(...)),   n stages
    """

    def __init__(self, config: IIETConfig) -> None:
        super().__init__()
        order = 2 if config.method == "pcformer" else 4
        self.norms = nn.ModuleList(
            IIETEstimateNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(order)
        )
        self.alpha = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, hidden_states: Tensor, stages: list[Tensor]) -> Tensor:
        prediction = hidden_states
        for number, stage in enumerate(stages, start=1):
            weight = self.alpha * (1 - self.alpha) ** (len(stages) - number)
            prediction = prediction + weight * stage
        return prediction


STEPS = {1: (0.0,), 2: (0.0, 1.0), 4: (0.0, 0.5, 0.5, 1.0)}
"""Number of stages -> how much of the stage before is added to h where each one is evaluated."""


class IIETDecoderLayer(GradientCheckpointingLayer):
    """Predict with a Runge-Kutta step, correct once.

        k1  = R_1(F(h_{l-1}));   k2 = R_2(F(h_{l-1} + k1))
        p   = h_{l-1} + a (1-a) k1 + a k2                       prediction
        s_l = N(F(sum_{k<l} A[l,k] s_k + A[l,l] P(p)))          correction
        h_l = sum_{k<=l} C[l,k] s_k

    That has three evaluations. With two, the prediction is h + a k1; with one, it is not corrected.
    With five it has the four stages of the classical method.
    """

    def __init__(self, config: IIETConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = IIETAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.prediction_norm = IIETEstimateNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.correction_norm = IIETEstimateNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mix = IIETMix(layer_idx)

    def field(self, hidden_states: Tensor, slot: int, **kwargs: Any) -> Tensor:
        """Evaluate F, the Llama block, with keys and values in a slot."""
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states, slot=slot, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states

    def forward(
        self,
        hidden_states: Tensor,
        *estimates: Tensor,
        slots: range,
        predictor: IIETPredictor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden state and the estimate of this layer.

        Args:
            hidden_states: h_{l-1}, (batch, time, dim).
            estimates: s_0, ..., s_{l-1}. Positional, so that checkpointing differentiates them.
            slots: those of the stages, and of the correction if there are two or more.
            predictor: shared by all layers.
            kwargs: of `IIETAttention`.
        """
        is_corrected = len(slots) > 1
        stage_slots = slots[:-1] if is_corrected else slots
        stages: list[Tensor] = []
        for slot, step, norm in zip(
            stage_slots, STEPS[len(stage_slots)], predictor.norms, strict=False
        ):
            point = hidden_states + step * stages[-1] if stages else hidden_states
            stages.append(norm(self.field(point.to(hidden_states.dtype), slot, **kwargs)))
        estimate = self.prediction_norm(predictor(hidden_states, stages))
        if is_corrected:
            point = self.mix.sum(self.mix.inner, [*estimates, estimate]).to(hidden_states.dtype)
            estimate = self.correction_norm(self.field(point, slots[-1], **kwargs))
        mixed = self.mix.sum(self.mix.outer, [*estimates, estimate])
        return mixed.to(hidden_states.dtype), estimate


class IIETPreTrainedModel(PreTrainedModel):
    """What the models have in common."""

    config: IIETConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Layers read each other's estimates, so a model stays on one device.
    _no_split_modules = ["IIETModel"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True

    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(IIETDecoderLayer, num_hidden_layers_key="num_layers"),
        "attentions": IIETAttention,
    }
    # What from_pretrained(dtype=torch.bfloat16) leaves in float32.
    _keep_in_fp32_modules_strict = ("prediction_norm", "correction_norm", "mix", "shared")

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, IIETMix):
            for row in (module.inner, module.outer):
                init.constant_(row, 1.0 / len(row))
        elif isinstance(module, IIETPredictor):
            init.constant_(module.alpha, 0.5)


class IIETModel(IIETPreTrainedModel):
    """All of the model but its head."""

    def __init__(self, config: IIETConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            IIETDecoderLayer(config, layer_idx) for layer_idx in range(config.num_layers)
        )
        self.shared = IIETPredictor(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False

        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Compute the last hidden states; arguments and results are those of a Llama.

        `hidden_states` has the embeddings and one entry for each layer, `attentions` one for each
        evaluation. A cache is used under the iteration schedule that filled it.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + past_seen_tokens).unsqueeze(0)

        attention_instances = kwargs.get("attention_instances")  # Of vLLM: slot -> its attention.
        if attention_instances is not None:
            self.check_server(attention_instances)
        causal_masks = self.make_causal_masks(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        estimates = [at_least_float32(inputs_embeds)]
        first_slot = 0
        for decoder_layer, num_evaluations in zip(
            self.layers, self.config.evaluations_per_layer, strict=True
        ):
            slots = range(first_slot, first_slot + num_evaluations)
            layer_type = self.config.layer_types[first_slot]
            hidden_states, estimate = decoder_layer(
                hidden_states,
                *estimates,
                slots=slots,
                predictor=self.shared,
                attention_mask=causal_masks.get(
                    decoder_layer.self_attn.sliding_window, causal_masks[layer_type]
                ),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
            estimates.append(estimate)
            first_slot = slots.stop

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)

    def make_causal_masks(
        self, attention_mask: Tensor | dict[str, Tensor | None] | None, **mask_kwargs: Any
    ) -> dict[str | int | None, Tensor | None]:
        """Return the mask of each type in `layer_types`, and of each window if they are several."""
        is_finished = isinstance(attention_mask, dict) or getattr(attention_mask, "ndim", 2) == 4
        if is_finished:
            self.check_one_window()
        if isinstance(attention_mask, dict):
            return attention_mask
        mask_kwargs.update(config=self.config, attention_mask=attention_mask)
        causal_masks = {}
        if "full_attention" in self.config.layer_types:
            causal_masks["full_attention"] = create_causal_mask(**mask_kwargs)
        if "sliding_attention" in self.config.layer_types:
            causal_masks["sliding_attention"] = create_sliding_window_causal_mask(**mask_kwargs)
        if self.config.sliding_window is None:
            for size in self.config.window_sizes:
                causal_masks[size] = create_causal_mask(
                    **mask_kwargs, and_mask_function=sliding_window_overlay(size)
                )
        return causal_masks

    def check_one_window(self) -> None:
        """Raise a ValueError for windows of several sizes, where masks are made elsewhere."""
        if len(self.config.window_sizes) > 1:
            raise ValueError(
                f"sliding_windows of several sizes, {self.config.window_sizes}, work with a "
                "dynamic cache and a mask of two dimensions alone, not in a batching server"
            )

    def check_server(self, attention_instances: dict[int, Any]) -> None:
        """Raise a ValueError for what vLLM, which brings an attention for each slot, cannot run."""
        self.check_one_window()
        if len(attention_instances) < self.config.num_hidden_layers:
            raise ValueError(
                "the model cannot be split into stages of a pipeline, which have some of its "
                "evaluations each: --pipeline-parallel-size must be 1"
            )


class IIETForCausalLM(IIETPreTrainedModel, GenerationMixin):
    """The model and its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: IIETConfig) -> None:
        super().__init__(config)
        self.model = IIETModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Compute logits and, given labels, (batch, time) as the tokens, the loss."""
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def with_schedule(self, corrections: int | Sequence[int]) -> "IIETForCausalLM":
        """Return a model with the same weights, shared, under another iteration schedule.

        A cheaper one drafts: `generate(..., assistant_model=model.with_schedule(0))`.
        """
        config = copy.deepcopy(self.config)
        config.set_corrections(corrections)
        # Copies of the modules around the same tensors, all of them with the new config.
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return copy.deepcopy(self, {id(self.config): config, **shared})


class IIETForSequenceClassification(GenericForSequenceClassification, IIETPreTrainedModel):
    """The model and a linear layer that scores classes, at the last token."""

    def __init__(self, config: IIETConfig) -> None:
        # The generic class asks `AutoModel`, which does not know the classes of a folder.
        IIETPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = IIETModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)

        self.post_init()


__all__ = [
    "IIETConfig",
    "IIETForCausalLM",
    "IIETForSequenceClassification",
    "IIETModel",
    "IIETPreTrainedModel",
]
