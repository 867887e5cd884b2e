"""A model folder: `config.json` and `model.safetensors`, with transformers' names.

Checkpoints, exports and imported models are such folders with more files. Loading refuses
non-finite values and names the tensor: one NaN makes every output NaN, which does not show where it
came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiet.config import ATTENTION_OPTIONS, ModelConfig
from iiet.facts import facts_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CONFIG",
    "CONFIG_NAMES",
    "MODEL_TYPE",
    "WEIGHTS",
    "config_from_json",
    "config_to_json",
    "non_finite",
    "read_folder",
    "write_config",
    "write_files",
    "write_folder",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MODEL_TYPE = "iiet"
CONFIG_NAMES = {
    "method": "method",
    "method_options": "method_options",
    "corrections": "schedule",
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_range": "initializer_std",
}
"""Names of transformers, and what `ModelConfig` calls them."""
_OPTIONAL = ("head_dim", *(name for name in ATTENTION_OPTIONS if name != "rope_scaling"))
"""Options of attention, which have their names here in a file, too, if it says them."""


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the values of `config.json`.

    Caches and servers keep keys and values for each of `num_hidden_layers`, so that counts the
    field evaluations, one `layer_types` for each; the number of layers is `num_layers`.
    """
    values = config.to_dict()
    scaling = values.get("rope_scaling") or {"rope_type": "default"}
    layer_types = _attention_of_evaluations(config)
    return {
        "architectures": ["IIETForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: values.get(field) for key, field in CONFIG_NAMES.items()},
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        **{name: values[name] for name in _OPTIONAL if name in values},
    }


def _attention_of_evaluations(config: ModelConfig) -> list[str]:
    """Return `full_attention` or `sliding_attention` for each field evaluation, in their order.

    Windows of several sizes have no name in transformers; the exported model makes their masks.
    """
    windows = config.sliding_windows or (None,) * config.num_layers
    has_one_size = len(set(windows) - {None}) == 1
    types = [
        "sliding_attention" if window is not None and has_one_size else "full_attention"
        for window in windows
    ]
    counts = config.evaluations_per_layer()
    if facts_of(config.method).repeats_stack:
        return types * counts[0]
    return [name for name, count in zip(types, counts, strict=True) for _ in range(count)]


def config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Read the values of `config.json`; those that do not concern the model are ignored.

    Raises:
        ValueError: they describe another architecture, lack something, or do not fit together.
    """
    model_type = values.get("model_type")
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"model_type must be {MODEL_TYPE!r}, got {model_type!r}; weights of the published "
            "naming, and those of plain models, are read by decoder_from_published"
        )
    values = _with_defaults(values)
    missing = [name for name in (*CONFIG_NAMES, "rope_parameters") if name not in values]
    if missing:
        raise ValueError(f"it does not say {', '.join(missing)}")
    fields = {field: values[key] for key, field in CONFIG_NAMES.items()}
    for name in _OPTIONAL:
        if values.get(name) is not None:
            fields[name] = values[name]
    scaling = dict(values["rope_parameters"])
    fields["rope_theta"] = scaling.pop("rope_theta")
    if scaling.get("rope_type") != "default":
        fields["rope_scaling"] = scaling
    return ModelConfig.from_dict(fields)


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those that `IIETConfig`, too, takes from others if they are missing.

    These are `num_key_value_heads`, `num_layers`, which `num_hidden_layers` is if no evaluations
    were counted yet, and `rope_parameters`, beside which `rope_theta` stood before transformers 5.
    """
    values = {"num_key_value_heads": None, **values}
    if "num_hidden_layers" in values:
        values.setdefault("num_layers", values["num_hidden_layers"])
    if "rope_theta" in values:
        rope_parameters = {"rope_type": "default", "rope_theta": values["rope_theta"]}
        values.setdefault("rope_parameters", rope_parameters)
    return values


def non_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Describe each tensor that holds NaN or infinite values, and how many."""
    return [
        f"{name} has {int((~tensor.isfinite()).sum())} values that are NaN or infinite"
        for name, tensor in weights.items()
        # Of the smallest and the largest value: `isfinite` of all takes memory for a second tensor.
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax())
    ]


def write_folder(
    folder: str | PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    **further_values: Any,
) -> None:
    """Write both files; makes the folder, replaces files of these names.

    `further_values` are those of `config.json` that transformers reads.

    Raises:
        ImportError: safetensors is not installed.
    """
    write_files(folder, {**config_to_json(config), **further_values}, weights)


def write_files(
    folder: str | PathLike[str], values: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> None:
    """Write `config.json` with these values, and the weights.

    Raises:
        ImportError: safetensors is not installed.
    """
    save_file = _safetensors().torch.save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    # Write and rename: the weights may be memory-mapped from the file that is replaced.
    temporary = folder / f"{WEIGHTS}.{os.getpid()}.tmp"
    save_file(whole, temporary)
    temporary.replace(folder / WEIGHTS)
    write_config(folder, values)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes for the owner alone.


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `config.json` with these values."""
    text = json.dumps(dict(values), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def read_folder(folder: str | PathLike[str]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read the config and the weights by name, which stay mapped from the file until changed.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a file is missing or damaged, or has values that are not finite.
    """
    safetensors = _safetensors()
    file = Path(folder) / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        config = config_from_json(values)
        file = Path(folder) / WEIGHTS
        weights = safetensors.torch.load_file(file)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot load {file}: {error}") from None
    if problems := non_finite(weights):
        raise ValueError(f"cannot load {file}: {'; '.join(problems)}")
    return config, weights


def _safetensors() -> Any:
    """Return the library, which nothing else in this package needs."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "Decoder.save_pretrained and Decoder.from_pretrained need safetensors, which is not "
            "installed; type pip install safetensors"
        ) from error
    return safetensors
