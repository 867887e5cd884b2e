"""Weights in the published naming to a decoder and back.

The published modelling code follows Hugging Face's Llama names and adds those of the mix, so a
plain Llama checkpoint is the case without them. Two things differ here: queries, keys and values
are one matrix, gate and up another. The tables below are the whole translation, in both directions;
nothing is renamed anywhere else. The published matrices A and C are cut into the rows of their
layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from iiet.weights import non_finite

__all__ = [
    "config_from_published",
    "decoder_from_published",
    "published_from_decoder",
    "published_gradients",
]

_BASE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
}
_HEAD = {"head.weight": "lm_head.weight"}
_FIELD = {
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
_FUSED = {
    "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
_MIX = {"mix.inner": "model.history.weight", "mix.outer": "model.history.weight_c"}
"""Rows of a layer -> the lower-triangular matrix that holds them."""
_MIX_NORMS = {
    "prediction_norm": "model.history.rouge_predictions_norm",
    "correction_norm": "model.history.layer_norms",
}
_STAGE_NORMS = {"shared.norms": "model.RK_norm"}
_ALPHA = {"shared.alpha": "model.alpha"}

_METHOD_OF_ORDER = {2: "pcformer", 4: "pcformer_rk4"}
_DEFAULT_CONTEXT_LENGTH = 2048


def _names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Map each parameter of a decoder to its published name, or to those whose rows it joins."""
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in _BASE.items()}
    if not config.tie_embeddings:
        names |= {ours: (theirs,) for ours, theirs in _HEAD.items()}
    for layer in range(config.num_layers):
        here, there = f"layers.{layer}.field.", f"model.layers.{layer}."
        names |= {here + ours: (there + theirs,) for ours, theirs in _FIELD.items()}
        names |= {
            here + ours: tuple(there + part for part in parts) for ours, parts in _FUSED.items()
        }
    return names | _method_names(config)


def _method_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    if config.method == "vanilla":
        return {}
    if config.method not in ("iiet", *_METHOD_OF_ORDER.values()):
        raise ValueError(f"there is no published naming for method {config.method!r}")
    if config.options != METHODS[config.method].Options():
        raise ValueError(f"there is no published naming for the options {config.options}")
    names: dict[str, tuple[str, ...]] = {}
    norms = {
        f"layers.{layer}.{ours}": f"{theirs}.{layer}"
        for layer in range(config.num_layers)
        for ours, theirs in _MIX_NORMS.items()
    }
    for order, method in _METHOD_OF_ORDER.items():
        if config.method == method:
            names |= {ours: (theirs,) for ours, theirs in _ALPHA.items()}
            for ours, theirs in _STAGE_NORMS.items():
                norms |= {f"{ours}.{stage}": f"{theirs}.{stage}" for stage in range(order)}
    for ours, theirs in norms.items():
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
    return names


def _rows_of_mix(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Map each row of the mix to its published matrix and the row's number there.

    Row 0 of a matrix, and what lies right of the diagonal, belong to no layer.
    """
    if config.method == "vanilla":
        return {}
    return {
        f"layers.{layer}.{ours}": (theirs, layer + 1)
        for layer in range(config.num_layers)
        for ours, theirs in _MIX.items()
    }


def _first(config: Mapping[str, Any], *keys: str, default: Any = None) -> Any:
    """Return the value of the first key that is there and not None."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return default


def config_from_published(
    config: Mapping[str, Any], weight_names: Mapping[str, Any]
) -> ModelConfig:
    """Read a published configuration, or one of a plain Llama.

    Args:
        config: `num_layers` or `num_hidden_layers`, `num_heads` or `num_attention_heads`, and so
            on. Keys that say nothing about the model are ignored. Without `kind`, the names of the
            weights tell the method.
        weight_names: anything keyed by the published names.

    Raises:
        ValueError: a key is missing, or asks for what the decoder does not do (rope scaling,
        biases).
    """
    kind = _first(config, "kind", default=_kind_by_names(weight_names))
    model_type = _first(config, "model_type", default="llama")
    if kind == "vanilla" and "kind" not in config and model_type != "llama":
        raise ValueError(
            f"of plain transformers only Llama can be read; model_type is {model_type!r}"
        )
    num_layers = _first(config, "num_layers", "num_hidden_layers")
    num_heads = _first(config, "num_heads", "num_attention_heads")
    sizes = {
        "vocab_size": _first(config, "vocab_size"),
        "dim": _first(config, "hidden_size", "dim"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "ffn_dim": _first(config, "intermediate_size", "ffn_dim"),
    }
    missing = [name for name, value in sizes.items() if value is None]
    if missing:
        raise ValueError(
            f"the published config does not say {', '.join(missing)}; it has {', '.join(config)}"
        )
    _refuse_unsupported(config, sizes)
    schedule = None
    if kind == "iiet":
        corrections = _first(config, "corrections")
        if corrections is None:
            raise ValueError("the published config of kind 'iiet' does not say corrections")
        schedule = IterationSchedule.parse(corrections, num_layers=num_layers)
    return ModelConfig(
        method=_method_of(kind, _first(config, "predictor_order")),
        **sizes,
        num_kv_heads=_first(config, "num_kv_heads", "num_key_value_heads", default=num_heads),
        context_length=_first(
            config, "context_length", "max_position_embeddings", default=_DEFAULT_CONTEXT_LENGTH
        ),
        schedule=schedule,
        tie_embeddings=_first(config, "tie_word_embeddings", default=False),
        rope_theta=float(_rope_theta(config)),
        rms_norm_eps=_first(config, "rms_norm_eps", default=1e-6),
        layer_norm_eps=_first(config, "layer_norm_eps", default=1e-5),
        initializer_std=_first(config, "initializer_range", default=0.02),
    )


def _kind_by_names(names: Mapping[str, Any]) -> str:
    if "model.alpha" in names:
        return "pcformer"
    return "iiet" if "model.history.weight" in names else "vanilla"


def _method_of(kind: str, order: int | None) -> str:
    if kind in ("vanilla", "llama"):
        return "vanilla"
    if kind == "iiet":
        return "iiet"
    if kind == "pcformer":
        if order not in (None, *_METHOD_OF_ORDER):
            raise ValueError(f"predictor_order must be 2 or 4, got {order!r}")
        return _METHOD_OF_ORDER[order or 2]
    raise ValueError(f"kind must be vanilla, iiet or pcformer, got {kind!r}")


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    theta: float = _first(config, "rope_theta", default=parameters.get("rope_theta", 10000.0))
    return theta


def _refuse_unsupported(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise for settings that would load without an error and compute something else."""
    problems: list[str] = []
    for key in ("rope_scaling", "rope_parameters"):
        kind = (config.get(key) or {}).get(
            "rope_type", (config.get(key) or {}).get("type", "default")
        )
        if kind != "default":
            problems.append(f"{key} of type {kind!r}")
    problems += [f"{key}=true" for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if config.get("sliding_window") is not None:
        problems.append(f"sliding_window {config['sliding_window']}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {config['hidden_act']!r}")
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * sizes["num_heads"] != sizes["dim"]:
        problems.append(f"head_dim {head_dim} (heads that do not make up hidden_size)")
    if problems:
        raise ValueError(f"the decoder does not support: {'; '.join(problems)}")


def decoder_from_published(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Decoder:
    """Build a decoder from a published configuration and its weights.

    Args:
        config: as for `config_from_published`.
        weights: by published name; copied, their dtype and device kept.

    Raises:
        ValueError: the config cannot be read, or weights are missing, left over, of the wrong
        shape, or not finite; all
            named at once.
    """
    model_config = config_from_published(config, weights)
    with torch.device("meta"):
        decoder = Decoder(model_config)
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not re.search(r"rotary_emb\.inv_freq$", name)
    }
    names = _names(model_config)
    _check_weights(decoder, names, weights)
    state = {
        ours: torch.cat([weights[name].detach() for name in theirs])
        for ours, theirs in names.items()
    }
    for ours, (matrix, row) in _rows_of_mix(model_config).items():
        state[ours] = weights[matrix][row, : row + 1].detach().clone()
    decoder.load_state_dict(state, assign=True)
    return decoder


def _check_weights(
    decoder: Decoder, names: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor]
) -> None:
    matrices = {matrix for matrix, _ in _rows_of_mix(decoder.config).values()}
    wanted = {name for theirs in names.values() for name in theirs} | matrices
    # Some writers store the tied head once more.
    ignored = {"lm_head.weight"} if decoder.config.tie_embeddings else set()
    problems = [f"missing {name}" for name in sorted(wanted - set(weights))]
    problems += [f"unexpected {name}" for name in sorted(set(weights) - wanted - ignored)]
    problems += non_finite(weights)
    if not problems:
        shapes = dict(_split_shapes(decoder, names))
        problems = [
            f"{name} has shape {tuple(weights[name].shape)}, expected {shape}"
            for name, shape in shapes.items()
            if tuple(weights[name].shape) != shape
        ]
    if not problems and ignored & set(weights):
        embedding = weights["model.embed_tokens.weight"]
        if not torch.equal(weights["lm_head.weight"], embedding):
            problems.append(
                "lm_head.weight differs from model.embed_tokens.weight, though the config says "
                "tie_word_embeddings=true; set it to false in config.json to keep both, or remove "
                "lm_head.weight"
            )
    if problems:
        raise ValueError("the published weights do not fit: " + "; ".join(problems))


def _split_shapes(
    decoder: Decoder, names: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, tuple[int, ...]]]:
    size = decoder.config.num_layers + 1
    matrices = {matrix for matrix, _ in _rows_of_mix(decoder.config).values()}
    shapes: list[tuple[str, tuple[int, ...]]] = [(name, (size, size)) for name in sorted(matrices)]
    for ours, parameter in decoder.state_dict().items():
        if ours not in names:  # A row of one of the matrices.
            continue
        rows = _rows(decoder.config, ours, parameter.size(0))
        shapes += [
            (name, (count, *parameter.shape[1:]))
            for name, count in zip(names[ours], rows, strict=True)
        ]
    return shapes


def _rows(config: ModelConfig, name: str, num_rows: int) -> list[int]:
    """Return how many rows each published part of a parameter has."""
    if name.endswith("attention.qkv.weight"):
        kv_rows = config.num_kv_heads * config.head_dim
        return [config.dim, kv_rows, kv_rows]
    if name.endswith("gate_up.weight"):
        return [config.ffn_dim, config.ffn_dim]
    return [num_rows]


def _to_published(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names, rows_of_mix = _names(config), _rows_of_mix(config)
    published: dict[str, Tensor] = {}
    size = config.num_layers + 1
    for ours, tensor in tensors.items():
        if ours in rows_of_mix:
            matrix, row = rows_of_mix[ours]
            whole = published.setdefault(matrix, tensor.new_zeros(size, size))
            whole[row, : row + 1] = tensor.detach()
            continue
        parts = torch.split(tensor.detach(), _rows(config, ours, tensor.size(0)))
        published |= {name: part.clone() for name, part in zip(names[ours], parts, strict=True)}
    return published


def published_from_decoder(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of a decoder's weights under their published names; a tied head is not stored
    twice.

    Raises:
        ValueError: the method has no published naming.
    """
    published = _to_published(decoder.config, decoder.state_dict())
    for matrix in {matrix for matrix, _ in _rows_of_mix(decoder.config).values()}:
        published[matrix][0, 0] = 1.0  # Row 0, which nothing reads, as it starts.
    return published


def published_gradients(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of the gradients under the weights' published names; parameters without one are
    left out.

    Raises:
        ValueError: the method has no published naming.
    """
    gradients = {
        name: parameter.grad
        for name, parameter in decoder.named_parameters()
        if parameter.grad is not None
    }
    return _to_published(decoder.config, gradients)
