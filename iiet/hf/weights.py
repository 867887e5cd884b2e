"""A model folder: `config.json` and `model.safetensors`, with transformers' names.

Checkpoints, exports and imported models are such folders with more files. Large weights may be in
several files, which an index names. Loading refuses non-finite values and names the tensor: one NaN
makes every output NaN, which does not show where it came from.

A model need not be in memory as a whole: a `LazyTensor` is read when it is asked for, and weights
are written one after the other.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, BinaryIO, final

from iiet.model.config import ATTENTION_OPTIONS, ModelConfig
from iiet.model.facts import facts_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "CONFIG",
    "CONFIG_NAMES",
    "MODEL_TYPE",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "LazyTensor",
    "config_from_json",
    "config_to_json",
    "lazy_tensors",
    "non_finite",
    "read_folder",
    "safetensors_head",
    "write_config",
    "write_files",
    "write_folder",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
"""Name of the file that says which tensor is in which file, of weights in several files."""
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
_TYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Type in safetensors -> in PyTorch; in the order of the tensors in a file."""
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
            f"model_type must be {MODEL_TYPE!r}, got {model_type!r}; Decoder.from_pretrained reads "
            "folders of other types, too"
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


@final
@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read each time it is asked for: `tensor[first:end]` reads these rows,
    `tensor[...]` all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[slice | EllipsisType], Tensor]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | EllipsisType) -> Tensor:
        return self.read(rows)


def lazy_tensors(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """Return the tensors in some safetensors by name; only the heads of the files are read.

    A later read of values that are not finite, or of a damaged file, is a ValueError.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a file cannot be read, or holds values of a type that PyTorch has not.
    """
    import torch

    safetensors = _safetensors()
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as stored:
                for name in list(stored.keys()):
                    head = stored.get_slice(name)
                    kind = head.get_dtype()
                    if kind not in _TYPES:
                        raise ValueError(f"{file} has {name} in the type {kind}")
                    dtype = getattr(torch, _TYPES[kind])
                    read = partial(_read_tensor, file, name)
                    tensors[name] = LazyTensor(tuple(head.get_shape()), dtype, read)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"cannot read {file}: {error}") from None
    return tensors


def _read_tensor(file: Path, name: str, rows: slice | EllipsisType) -> Tensor:
    safetensors = _safetensors()
    try:
        # Opened for each tensor: what was read of a file stays in memory until it is closed.
        with safetensors.safe_open(file, framework="pt") as stored:
            is_whole = isinstance(rows, EllipsisType)
            tensor: Tensor = stored.get_tensor(name) if is_whole else stored.get_slice(name)[rows]
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if problems := non_finite({name: tensor}):
        raise ValueError(f"cannot load {file}: {'; '.join(problems)}")
    return tensor


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
    weights: Mapping[str, Tensor | LazyTensor],
    **further_values: Any,
) -> None:
    """Write both files; makes the folder, replaces files of these names.

    `further_values` are those of `config.json` that transformers reads.
    """
    write_files(folder, {**config_to_json(config), **further_values}, weights)


def write_files(
    folder: str | PathLike[str],
    values: Mapping[str, Any],
    weights: Mapping[str, Tensor | LazyTensor],
    *,
    max_file_bytes: int | None = None,
) -> None:
    """Write `config.json` with these values, and the weights; of these, one is in memory at a time.

    Args:
        folder: made if missing; files of the same names are replaced.
        values: of `config.json`.
        weights: by name.
        max_file_bytes: more are written to several files with an index, as transformers reads it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(weights, max_file_bytes)
    names = [WEIGHTS]
    if len(parts) > 1:
        stem = Path(WEIGHTS).stem
        numbers = range(1, len(parts) + 1)
        names = [f"{stem}-{number:05}-of-{len(parts):05}.safetensors" for number in numbers]
    for name, part in zip(names, parts, strict=True):
        # Write and rename: the weights may be memory-mapped from the file that is replaced.
        temporary = folder / f"{name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            _write_tensors(file, part)
        temporary.replace(folder / name)
    if len(parts) > 1:
        (folder / WEIGHTS).unlink(missing_ok=True)  # Readers would take it for the weights.
        index = {
            "metadata": {"total_size": sum(map(_num_bytes, weights.values()))},
            "weight_map": {
                weight: name for name, part in zip(names, parts, strict=True) for weight in part
            },
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / WEIGHTS_INDEX).write_text(text, encoding="utf-8")
    write_config(folder, values)


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Write `config.json` with these values."""
    text = json.dumps(dict(values), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _parts(
    weights: Mapping[str, Tensor | LazyTensor], max_file_bytes: int | None
) -> list[dict[str, Tensor | LazyTensor]]:
    """Return the weights of each file, in their order."""
    parts: list[dict[str, Tensor | LazyTensor]] = [{}]
    part_bytes = 0
    for name, tensor in weights.items():
        num_bytes = _num_bytes(tensor)
        if max_file_bytes is not None and parts[-1] and part_bytes + num_bytes > max_file_bytes:
            parts.append({})
            part_bytes = 0
        parts[-1][name] = tensor
        part_bytes += num_bytes
    return parts


def _num_bytes(tensor: Tensor | LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def safetensors_head(
    forms: Mapping[str, tuple[torch.dtype, Sequence[int]]],
) -> tuple[list[str], bytes]:
    """Return what a file of safetensors needs before its values, as the library's `save_file` does.

    Args:
        forms: name -> dtype and shape of each tensor.

    Returns:
        The names in the order of the tensors' values, and the bytes before the first value.
    """
    import torch

    kinds = {getattr(torch, name): kind for kind, name in _TYPES.items()}
    ranks = {kind: rank for rank, kind in enumerate(_TYPES)}

    def place(name: str) -> tuple[int, str]:
        dtype, _ = forms[name]
        return ranks[kinds[dtype]], name

    entries: dict[str, Any] = {}
    start = 0
    for name in sorted(forms, key=place):
        dtype, shape = forms[name]
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": kinds[dtype], "shape": [*shape], "data_offsets": [start, end]
        }  # fmt: skip
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [*entries], len(text).to_bytes(8, "little") + text


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor | LazyTensor]) -> None:
    """Write safetensors one after the other: the bytes of the library's `save_file`, which takes
    all at once."""
    names, head = safetensors_head({name: (t.dtype, t.shape) for name, t in tensors.items()})
    file.write(head)
    for name in names:
        values = tensors[name][...].detach().cpu().contiguous()
        if values.nbytes:
            # A view of its memory, for which PyTorch would need NumPy.
            file.write((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the values of `config.json`, and the weights by the names in the files, from which they
    stay mapped until changed.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a file is missing or damaged, or has values that are not finite.
    """
    safetensors = _safetensors()
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        weights: dict[str, Tensor] = {}
        file = folder / WEIGHTS_INDEX  # Read first, where there is one.
        for file in _weight_files(folder):
            weights_of_file = safetensors.torch.load_file(file)
            if problems := non_finite(weights_of_file):
                raise ValueError("; ".join(problems))
            weights |= weights_of_file
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot load {file}: {error}") from None
    return values, weights


def _weight_files(folder: Path) -> list[Path]:
    """Return the file of the weights, or those that the index names."""
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    places = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise ValueError("it names no files")
    return [folder / name for name in names]


def _safetensors() -> Any:
    """Return the library, which nothing else in this package needs."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "Decoder.from_pretrained needs safetensors, which is not installed; type pip install "
            "safetensors"
        ) from error
    return safetensors
