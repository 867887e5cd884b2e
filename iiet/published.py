"""Converts weights with published names to a decoder and back.

The published modelling code follows Hugging Face's Llama names and adds those of the mix, so a
plain Llama checkpoint is the case without them. Three things differ here: queries, keys and values
are one matrix, so are gate and up, and the matrices A and C are cut into the rows of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.facts import facts_of
from iiet.schedule import IterationSchedule
from iiet.weights import non_finite

__all__ = [
    "config_from_published",
    "decoder_from_published",
    "published_from_decoder",
]

# Field of ModelConfig -> published keys; the first one that exists counts.
_KEYS = {
    "vocab_size": ("vocab_size",),
    "dim": ("hidden_size", "dim"),
    "num_layers": ("num_layers", "num_hidden_layers"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "num_kv_heads": ("num_kv_heads", "num_key_value_heads"),
    "ffn_dim": ("intermediate_size", "ffn_dim"),
    "context_length": ("context_length", "max_position_embeddings"),
    "tie_embeddings": ("tie_word_embeddings",),
    "rope_theta": ("rope_theta",),
    "rms_norm_eps": ("rms_norm_eps",),
    "layer_norm_eps": ("layer_norm_eps",),
    "initializer_std": ("initializer_range",),
}
_REQUIRED = ("vocab_size", "dim", "num_layers", "num_heads", "ffn_dim")
# Llama's defaults where ModelConfig has others.
_DEFAULTS = {"context_length": 2048, "tie_embeddings": False}

# Weight of a field -> the published weights that are concatenated to it.
_FIELD = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "feed_forward_norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down.weight": ("mlp.down_proj.weight",),
}
_MIX_NORMS = {
    "prediction_norm": "model.history.rouge_predictions_norm",
    "correction_norm": "model.history.layer_norms",
}
# Row of a layer -> the lower-triangular matrix that holds it.
_MIX_ROWS = {"mix.inner": "model.history.weight", "mix.outer": "model.history.weight_c"}
_METHOD_OF_ORDER = {2: "pcformer", 4: "pcformer_rk4"}
_ORDER_OF_METHOD = {method: order for order, method in _METHOD_OF_ORDER.items()}


def config_from_published(
    config: Mapping[str, Any], weight_names: Mapping[str, Any]
) -> ModelConfig:
    """Read a published configuration, or one of a plain Llama.

    Args:
        config: keys that do not concern the model are ignored. `kind` is the method (vanilla, iiet,
            pcformer); without it, the names of the weights show the method.
        weight_names: the published names of the weights.

    Raises:
        ValueError: a key is missing, or asks for what the decoder does not do (rope scaling).
    """
    method = _method_of(config, weight_names)
    values: dict[str, Any] = {}
    for field, keys in _KEYS.items():
        found = [config[key] for key in keys if config.get(key) is not None]
        if found:
            values[field] = found[0]
    if missing := [name for name in _REQUIRED if name not in values]:
        raise ValueError(
            f"the published config does not say {', '.join(missing)}; it has {', '.join(config)}"
        )
    _refuse_unsupported(config, values)
    rope = config.get("rope_parameters") or {}
    values.setdefault("rope_theta", rope.get("rope_theta", ModelConfig.rope_theta))
    values["rope_theta"] = float(values["rope_theta"])
    values.setdefault("num_kv_heads", values["num_heads"])
    if method == "iiet":
        if config.get("corrections") is None:
            raise ValueError("the published config of kind 'iiet' does not say corrections")
        values["schedule"] = IterationSchedule.parse(
            config["corrections"], num_layers=values["num_layers"]
        )
    return ModelConfig(method=method, **_DEFAULTS | values)


def _method_of(config: Mapping[str, Any], weight_names: Mapping[str, Any]) -> str:
    kind, order = config.get("kind"), config.get("predictor_order")
    if kind is None:
        if "model.alpha" in weight_names:
            kind = "pcformer"
        elif "model.history.weight" in weight_names:
            kind = "iiet"
        elif (model_type := config.get("model_type") or "llama") == "llama":
            kind = "vanilla"
        else:
            raise ValueError(
                f"of plain transformers only Llama can be read; model_type is {model_type!r}"
            )
    if kind == "pcformer":
        if order not in (None, *_METHOD_OF_ORDER):
            raise ValueError(f"predictor_order must be 2 or 4, got {order!r}")
        return _METHOD_OF_ORDER[order or 2]
    if kind not in ("vanilla", "llama", "iiet"):
        raise ValueError(f"kind must be vanilla, iiet or pcformer, got {kind!r}")
    return "iiet" if kind == "iiet" else "vanilla"


def _refuse_unsupported(config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raise for settings that would load without an error and compute something else."""
    problems: list[str] = []
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
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
        shape, or not finite; all named at once.
    """
    model_config = config_from_published(config, weights)
    with torch.device("meta"):
        decoder = Decoder(model_config)
    weights = {
        name: tensor.detach()
        for name, tensor in weights.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    # Some programs store a tied head a second time.
    head = weights.pop("lm_head.weight", None) if model_config.tie_embeddings else None
    wanted = _to_published(model_config, decoder.state_dict())
    problems = [f"missing {name}" for name in sorted(wanted.keys() - weights)]
    problems += [f"unexpected {name}" for name in sorted(weights.keys() - wanted)]
    problems += non_finite(weights)
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if head is not None and not torch.equal(head, weights.get("model.embed_tokens.weight", head)):
        problems.append(
            "lm_head.weight differs from model.embed_tokens.weight, though the config says "
            "tie_word_embeddings=true; set it to false in config.json to keep both, or remove "
            "lm_head.weight"
        )
    if problems:
        raise ValueError("the published weights do not fit: " + "; ".join(problems))
    state = {
        ours: torch.cat([weights[name] for name in theirs])
        for ours, theirs in _names(model_config).items()
    }
    for ours, (matrix, row) in _rows_of_mix(model_config).items():
        state[ours] = weights[matrix][row, : row + 1].clone()
    decoder.load_state_dict(state, assign=True)
    return decoder


def published_from_decoder(decoder: Decoder) -> dict[str, Tensor]:
    """Return copies of the weights by published name; a tied head is not stored twice.

    Raises:
        ValueError: the method, or its options, have no published naming.
    """
    published = _to_published(decoder.config, decoder.state_dict())
    for matrix in published.keys() & _MIX_ROWS.values():
        published[matrix][0, 0] = 1.0  # Nothing reads row 0; published files hold its start.
    return published


def _to_published(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names, rows_of_mix = _names(config), _rows_of_mix(config)
    kv_dim, size = config.num_kv_heads * config.head_dim, config.num_layers + 1
    # Rows of q, k and v; of gate and up.
    num_rows = {3: [config.dim, kv_dim, kv_dim], 2: [config.ffn_dim, config.ffn_dim]}
    published: dict[str, Tensor] = {}
    for ours, tensor in tensors.items():
        if ours in rows_of_mix:
            matrix, row = rows_of_mix[ours]
            whole = published.setdefault(matrix, tensor.new_zeros(size, size))
            whole[row, : row + 1] = tensor.detach()
            continue
        theirs = names[ours]
        parts = torch.split(tensor.detach(), num_rows.get(len(theirs), len(tensor)))
        published |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return published


def _names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Map each weight of a decoder, except rows of the mix, to the published ones that it joins."""
    order, has_mix = _ORDER_OF_METHOD.get(config.method), config.method != "vanilla"
    if order is None and config.method not in ("vanilla", "iiet"):
        raise ValueError(f"there is no published naming for method {config.method!r}")
    if config.options != facts_of(config.method).Options():
        raise ValueError(f"there is no published naming for the options {config.options}")
    names: dict[str, tuple[str, ...]] = {
        "embedding.weight": ("model.embed_tokens.weight",),
        "norm.weight": ("model.norm.weight",),
    }
    if not config.tie_embeddings:
        names["head.weight"] = ("lm_head.weight",)
    norms: dict[str, str] = {}
    for layer in range(config.num_layers):
        for ours, theirs in _FIELD.items():
            names[f"layers.{layer}.field.{ours}"] = tuple(
                f"model.layers.{layer}.{part}" for part in theirs
            )
        if has_mix:
            for norm, published_norm in _MIX_NORMS.items():
                norms[f"layers.{layer}.{norm}"] = f"{published_norm}.{layer}"
    if order is not None:
        names["shared.alpha"] = ("model.alpha",)
        norms |= {f"shared.norms.{stage}": f"model.RK_norm.{stage}" for stage in range(order)}
    for norm, published_norm in norms.items():
        for kind in ("weight", "bias"):
            names[f"{norm}.{kind}"] = (f"{published_norm}.{kind}",)
    return names


def _rows_of_mix(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Map each row of the mix to its published matrix and the row's number there.

    Row 0 of a matrix, and what lies right of the diagonal, belong to no layer.
    """
    if config.method == "vanilla":
        return {}
    return {
        f"layers.{layer}.{ours}": (matrix, layer + 1)
        for layer in range(config.num_layers)
        for ours, matrix in _MIX_ROWS.items()
    }
