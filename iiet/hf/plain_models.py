"""Plain models of transformers: `config.json` of each `model_type`, read into a config and written.

`MODEL_TYPES` is the whole of what is known of a type. Weights need nothing: a vanilla decoder has
transformers' names. What a type's own file would compute otherwise is refused, each by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from iiet.hf.weights import CONFIG_NAMES
from iiet.model.config import ModelConfig, RopeScaling

__all__ = [
    "MODEL_TYPES",
    "ModelType",
    "config_from_plain",
    "is_plain",
    "plain_config_json",
    "plain_form",
]

_FIELD_OF_KEY = {"num_hidden_layers": "num_layers"} | {
    key: CONFIG_NAMES[key]
    for key in (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
        "tie_word_embeddings",
        "rms_norm_eps",
        "initializer_range",
    )
}
"""Keys that every type has, and what `ModelConfig` calls them."""
_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
)  # fmt: skip
# Keys for which a null is a value, not a key left out.
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "no_rope_layers")
# Keys that change what some type computes; each is refused where the type does not read it, or
# where no decoder computes it.
_REFUSED_IF_SET = (
    "attention_bias", "attention_dropout", "layer_types", "mlp_bias", "no_rope_layers",
    "quantization_config", "sliding_window",
)  # fmt: skip
_FULL = "full_attention"
_SLIDING = "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """What transformers' code of one `model_type` reads and computes.

    `defaults` has a key for each that the type reads beside those that every type has.
    """

    architecture: str
    """The class of transformers."""
    defaults: Mapping[str, Any]
    """What its config class takes for a key that the file leaves out."""
    biases: Literal["none", "qkv", "attention_bias"] = "none"
    """Which projections of attention have a bias: none, those to queries, keys and values, or all
    four where the key `attention_bias` says so."""
    head_norms: bool = False
    """Whether queries and keys are normalized per head."""
    windows: Literal["none", "all", "last", "unrotated"] = "none"
    """Which layers have the sliding window: none, all, those from `max_window_layers` on, or those
    that do not rotate. `layer_types` of the last two says otherwise."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths that a file leaves out."""


_LAYER_TYPES = {"use_sliding_window": False, "layer_types": None}
MODEL_TYPES: Mapping[str, ModelType] = {
    "llama": ModelType(
        architecture="LlamaForCausalLM",
        biases="attention_bias",
        defaults={
            "num_key_value_heads": None, "max_position_embeddings": 2048,
            "tie_word_embeddings": False, "head_dim": None, "attention_bias": False,
        },
    ),
    "mistral": ModelType(
        architecture="MistralForCausalLM",
        windows="all",
        defaults={
            "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "tie_word_embeddings": False, "head_dim": None, "sliding_window": 4096,
        },
    ),
    "qwen2": ModelType(
        architecture="Qwen2ForCausalLM",
        biases="qkv",
        windows="last",
        defaults={
            "num_key_value_heads": 32, "max_position_embeddings": 32768,
            "tie_word_embeddings": False, "head_dim": None,
            "sliding_window": 4096, "max_window_layers": 28, **_LAYER_TYPES,
        },
    ),
    "qwen3": ModelType(
        architecture="Qwen3ForCausalLM",
        biases="attention_bias",
        head_norms=True,
        windows="last",
        defaults={
            "num_key_value_heads": 32, "max_position_embeddings": 32768,
            "tie_word_embeddings": False, "head_dim": 128, "attention_bias": False,
            "sliding_window": 4096, "max_window_layers": 28, **_LAYER_TYPES,
        },
    ),
    "smollm3": ModelType(
        architecture="SmolLM3ForCausalLM",
        biases="attention_bias",
        windows="unrotated",
        rope_theta=2000000.0,
        defaults={
            "num_key_value_heads": 4, "max_position_embeddings": 32768,
            "tie_word_embeddings": True, "head_dim": None, "attention_bias": False,
            "no_rope_layers": None, "no_rope_layer_interval": 4, "sliding_window": None,
            **_LAYER_TYPES,
        },
    ),
}  # fmt: skip
"""`model_type` -> what transformers' code of it does."""


# Read


def config_from_plain(config: Mapping[str, Any]) -> ModelConfig:
    """Read the values of a `config.json` whose `model_type` is one of `MODEL_TYPES`.

    Raises:
        ValueError: the type is another one, a key is missing, or asks for what no decoder does.
    """
    name = config.get("model_type") or "llama"
    if name not in MODEL_TYPES:
        raise ValueError(
            f"model_type must be one of {', '.join(MODEL_TYPES)} to be read, got {name!r}"
        )
    model_type = MODEL_TYPES[name]
    stated = {key: value for key, value in config.items() if value is not None or key in _NULLABLE}
    if missing := [key for key in _REQUIRED if key not in stated]:
        raise ValueError(
            f"config.json does not say {', '.join(missing)}; it has {', '.join(stated)}"
        )
    values = {**model_type.defaults, **stated}
    sizes = {field: values[key] for key, field in _FIELD_OF_KEY.items() if key in values}
    num_layers = sizes["num_layers"]
    problems = _unsupported(values, model_type)
    theta, scaling = _rope(values, model_type)
    rotary_layers = _rotary_layers(values, num_layers)
    windows, problems_of_windows = _windows(values, model_type, rotary_layers)
    problems += problems_of_windows
    if problems:
        raise ValueError(f"a decoder does not support, of {name}: {'; '.join(problems)}")
    has_bias = bool(values.get("attention_bias"))
    return ModelConfig(
        method="vanilla",
        **sizes,
        head_dim=values["head_dim"],
        qkv_bias=model_type.biases == "qkv" or has_bias,
        attention_out_bias=has_bias,
        head_norms=model_type.head_norms,
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_layers=rotary_layers,
        sliding_windows=windows,
    )


def _unsupported(values: Mapping[str, Any], model_type: ModelType) -> list[str]:
    problems: list[str] = []
    for key in _REFUSED_IF_SET:
        value = values.get(key)
        is_neutral = not value or (key == "layer_types" and set(value) == {_FULL})
        if key not in model_type.defaults and not is_neutral:
            problems.append(f"{key} {value!r}")
    if values.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {values['hidden_act']!r}")
    for place in (values, values.get("rope_parameters") or {}, values.get("rope_scaling") or {}):
        if place.get("partial_rotary_factor", 1) != 1:
            problems.append(f"partial_rotary_factor {place['partial_rotary_factor']!r}")
    return problems


def _rope(values: Mapping[str, Any], model_type: ModelType) -> tuple[float, RopeScaling | None]:
    """Return the base of the wavelengths, and how they are stretched."""
    # `rope_scaling` beside a `rope_theta` is the form before transformers 5.
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    parameters.pop("partial_rotary_factor", None)
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or model_type.rope_theta
    old_name = parameters.pop("type", None)
    rope_type = parameters.setdefault("rope_type", old_name or "default")
    if rope_type == "default":
        return float(theta), None
    if rope_type in ("llama3", "yarn") and not parameters.get("original_max_position_embeddings"):
        original = values.get("original_max_position_embeddings")
        parameters["original_max_position_embeddings"] = (
            original or values["max_position_embeddings"]
        )
    return float(theta), RopeScaling.from_dict(parameters)


def _rotary_layers(values: Mapping[str, Any], num_layers: int) -> tuple[bool, ...] | None:
    if "no_rope_layer_interval" not in values:
        return None
    flags = values["no_rope_layers"]  # 1 where a layer does rotate.
    if flags is None:
        interval = values["no_rope_layer_interval"]
        flags = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    return tuple(bool(flag) for flag in flags[:num_layers])


def _windows(
    values: Mapping[str, Any], model_type: ModelType, rotary_layers: tuple[bool, ...] | None
) -> tuple[tuple[int | None, ...] | None, list[str]]:
    """Return the window of each layer, and what of it is not supported."""
    window: int | None = values.get("sliding_window")
    num_layers: int = values["num_hidden_layers"]
    if model_type.windows == "none":
        return None, []
    if model_type.windows == "all":
        return (window,) * num_layers, []
    if not values["use_sliding_window"]:
        window = None
    layer_types = values["layer_types"]
    if layer_types is None:
        if model_type.windows == "last":
            slides = [layer >= values["max_window_layers"] for layer in range(num_layers)]
        else:
            slides = [not rotates for rotates in rotary_layers or ()]
        layer_types = [_SLIDING if slide and window else _FULL for slide in slides]
    problems: list[str] = []
    unknown = sorted({repr(name) for name in layer_types} - {repr(_FULL), repr(_SLIDING)})
    if unknown:
        problems.append(f"layer_types {', '.join(unknown)}")
    if window is None and _SLIDING in layer_types:
        problems.append(f"layer_types {_SLIDING!r} without use_sliding_window and sliding_window")
    windows = tuple(window if name == _SLIDING else None for name in layer_types)
    return windows, problems


# Write


def plain_form(config: ModelConfig) -> ModelConfig:
    """Return a vanilla config without what a plain folder does not say: schedule and LayerNorms."""
    return replace(config, schedule=None, layer_norm_eps=ModelConfig.layer_norm_eps)


def is_plain(config: ModelConfig) -> bool:
    """Whether a class of transformers computes what the config says."""
    return plain_config_json(config) is not None


def plain_config_json(config: ModelConfig, model_type: str | None = None) -> dict[str, Any] | None:
    """Return the values of a `config.json` that transformers' own class of a type reads.

    The type is `model_type` where that computes what the config says, otherwise the first of
    `MODEL_TYPES` that does; None if none does, or the method is not vanilla.
    """
    if config.method != "vanilla":
        return None
    plain = plain_form(config)
    for name in (model_type, *MODEL_TYPES):
        if name is not None:
            values = _values_of(plain, name)
            try:
                if config_from_plain(values) == plain:
                    return values
            except ValueError:  # The type has no such layers.
                continue
    return None


def _values_of(config: ModelConfig, name: str) -> dict[str, Any]:
    model_type = MODEL_TYPES[name]
    scaling = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling.to_dict()
    windows = config.sliding_windows or (None,) * config.num_layers
    window = next((size for size in windows if size is not None), None)
    values = {
        "architectures": [model_type.architecture],
        "model_type": name,
        "hidden_act": "silu",
        **{key: getattr(config, field) for key, field in _FIELD_OF_KEY.items()},
        "rope_theta": config.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        # Of a key that is left out, a type takes the token of the model that it was made for.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    optional = {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": [_FULL if size is None else _SLIDING for size in windows],
        "no_rope_layers": [int(config.rotates(layer)) for layer in range(config.num_layers)],
    }
    return {**values, **{key: optional[key] for key in optional if key in model_type.defaults}}
