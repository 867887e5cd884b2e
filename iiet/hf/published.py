"""Reads the published naming (IIET, PCformer), and plain models of transformers: a decoder's config
and weights by its names.

The published modelling code follows transformers' Llama, as a decoder does: only what a method adds
has other names there. The matrices A and C are whole in the published files, and here they are cut
into the rows of the layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from iiet.backbone import Backbone
from iiet.hf.plain_models import config_from_plain
from iiet.hf.weights import LazyTensor, non_finite
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule

__all__ = [
    "config_from_published",
    "misfits",
    "renamed_from_published",
    "weights_from_published",
]

WeightT = TypeVar("WeightT", Tensor, LazyTensor)

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

# Published names of what a method adds, and those of a decoder.
_NAMES = {
    r"model\.history\.rouge_predictions_norm\.(\d+)": r"model.layers.\1.prediction_norm",
    r"model\.history\.layer_norms\.(\d+)": r"model.layers.\1.correction_norm",
    r"model\.RK_norm\.(\d+)": r"model.shared.norms.\1",
    r"model\.alpha": "model.shared.alpha",
}
# Lower-triangular matrices, and what a layer calls its row.
_MATRICES = {"model.history.weight": "mix.inner", "model.history.weight_c": "mix.outer"}
# Weights that show the kind; PCformer has both.
_KIND_OF_WEIGHT = {"model.alpha": "pcformer", "model.history.weight": "iiet"}
_METHOD_OF_ORDER = {2: "pcformer", 4: "pcformer_rk4"}


def config_from_published(
    config: Mapping[str, Any], weight_names: Mapping[str, Any]
) -> ModelConfig:
    """Read a published configuration, or one of a plain model of transformers.

    Args:
        config: keys that do not concern the model are ignored. `kind` is the method (vanilla, iiet,
            pcformer); without it, the names of the weights show the method, and a model that is
            plain has a `model_type` of `iiet.hf.plain_models.MODEL_TYPES`.
        weight_names: the published names of the weights.

    Raises:
        ValueError: a key is missing, or asks for what the decoder does not do.
    """
    if config.get("model_type") and not _is_published(config, weight_names):
        return config_from_plain(config)
    method = _method_of(config, weight_names)
    values: dict[str, Any] = {}
    for field, keys in _KEYS.items():
        stated = [config[key] for key in keys if config.get(key) is not None]
        if stated:
            values[field] = stated[0]
    if missing := [name for name in _REQUIRED if name not in values]:
        raise ValueError(
            f"the published config does not say {', '.join(missing)}; it has {', '.join(config)}"
        )
    _refuse_unsupported(config, values)
    rope = config.get("rope_parameters") or {}
    values.setdefault("rope_theta", rope.get("rope_theta", ModelConfig.rope_theta))
    values["rope_theta"] = float(values["rope_theta"])
    if method == "iiet":
        if config.get("corrections") is None:
            raise ValueError("the published config of kind 'iiet' does not say corrections")
        values["schedule"] = IterationSchedule.parse(
            config["corrections"], num_layers=values["num_layers"]
        )
    return ModelConfig(method=method, **_DEFAULTS | values)


def _is_published(config: Mapping[str, Any], weight_names: Mapping[str, Any]) -> bool:
    """Whether the config or the weights have names that only the published code has."""
    return config.get("kind") is not None or any(name in weight_names for name in _KIND_OF_WEIGHT)


def _method_of(config: Mapping[str, Any], weight_names: Mapping[str, Any]) -> str:
    kind = config.get("kind")
    order = config.get("predictor_order")
    if kind is None:
        shown = (shows for name, shows in _KIND_OF_WEIGHT.items() if name in weight_names)
        kind = next(shown, "vanilla")
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
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        if rope_type != "default":
            problems.append(f"{key} of type {rope_type!r}")
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


def weights_from_published(
    config: Mapping[str, Any], weights: Mapping[str, WeightT]
) -> tuple[ModelConfig, dict[str, WeightT]]:
    """Return the configuration of a decoder, and its weights by its names.

    Weights that are not read yet are not read here, except a head that is said to be that of the
    embedding; so their values may still not be finite.

    Args:
        config: as for `config_from_published`.
        weights: by published name; used as they are, with their dtype and device.

    Raises:
        ValueError: the config cannot be read, or weights are missing, left over, of the wrong
            shape, or not finite; all named at once.
    """
    model_config = config_from_published(config, weights)
    renamed = renamed_from_published(weights, model_config.num_layers)
    problems: list[str] = []
    if model_config.tie_embeddings and "lm_head.weight" in renamed:
        # Some programs store a tied head a second time.
        head = renamed.pop("lm_head.weight")
        if not torch.equal(head[...], renamed.get("model.embed_tokens.weight", head)[...]):
            problems.append(
                "lm_head.weight differs from model.embed_tokens.weight, though the config says "
                "tie_word_embeddings=true; set it to false in config.json to keep both, or remove "
                "lm_head.weight"
            )
    problems += misfits(model_config, renamed)
    if problems:
        raise ValueError("the published weights do not fit: " + "; ".join(problems))
    return model_config, renamed


def misfits(config: ModelConfig, weights: Mapping[str, Tensor | LazyTensor]) -> list[str]:
    """Describe how weights, by a decoder's names, are not those of a decoder: missing, left over,
    not finite, or of another shape."""
    with torch.device("meta"):
        wanted: dict[str, Tensor] = Backbone(config).state_dict(prefix="model.")
        if not config.tie_embeddings:
            wanted["lm_head.weight"] = torch.empty(config.vocab_size, config.dim)
    read = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    return [
        *(f"missing {name}" for name in sorted(wanted.keys() - weights)),
        *(f"unexpected {name}" for name in sorted(weights.keys() - wanted)),
        *non_finite(read),
        *(
            f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ),
    ]


def renamed_from_published(tensors: Mapping[str, WeightT], num_layers: int) -> dict[str, WeightT]:
    """Return tensors by a decoder's names, which differ for what a method adds to a Llama.

    Row 0 of the matrices A and C, and what lies right of their diagonal, belong to no layer.
    """
    renamed: dict[str, WeightT] = {}
    for name, tensor in tensors.items():
        if row_name := _MATRICES.get(name):
            for layer in range(num_layers):
                renamed[f"model.layers.{layer}.{row_name}"] = _row(tensor, layer)
        elif not name.endswith("rotary_emb.inv_freq"):  # Older versions of transformers stored it.
            new_name = name
            for pattern, replacement in _NAMES.items():
                new_name = re.sub(rf"^{pattern}(?=\.|$)", replacement, new_name)
            renamed[new_name] = tensor if isinstance(tensor, LazyTensor) else tensor.detach()
    return renamed


def _row(matrix: WeightT, layer: int) -> WeightT:
    """Return what a layer reads of a lower-triangular matrix."""
    if isinstance(matrix, Tensor):
        return matrix[layer + 1 : layer + 2, : layer + 2].flatten().clone()
    return LazyTensor((layer + 2,), matrix.dtype, lambda part: _row(matrix[...], layer)[part])
