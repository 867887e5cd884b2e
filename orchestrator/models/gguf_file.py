"""Read a GGUF file, llama.cpp's format of one file for a whole model, as a decoder.

The file may be quantized: blocks of small integers with a scale. Each weight becomes the float32
number that it stands for, so nothing is lost beyond what the file has lost. The package `gguf` of
llama.cpp reads the file and unpacks blocks; here the names become those of a Llama folder.
transformers can read these files, too, but gives missing weights random values and ignores settings
that it does not know, such as scaled rotary angles. Here both are errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.published import decoder_from_published
from orchestrator.workspace.errors import UserError, first_line

ARCHITECTURE = "llama"
"""The only one that becomes a decoder; Mistral's first models have it, too."""

MAX_PROBLEMS_SHOWN = 5

_MAGIC = b"GGUF"

# Key after `llama.` -> key of transformers' config.json.
_CONFIG = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = {"attention.head_count_kv", "rope.freq_base"}
_HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# These do not change what the model computes.
_NOTES = {"vocab_size", "tensor_data_layout"}
_NONE = (0, False, "", "none")

# Name of a tensor -> that of transformers; before those of a layer stands its number.
_WEIGHTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_WEIGHTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


class GgufFile:
    """The metadata and weights of a file.

    Raises:
        UserError: If it is no GGUF file, is damaged or cut off, or `gguf` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _read(path)
        try:
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except Exception as error:  # A damaged file fails in many ways.
            raise _damaged(path, error) from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def decoder(self) -> Decoder:
        """Return the model as a vanilla decoder with float32 weights.

        Raises:
            UserError: If it has another architecture, needs what the decoder does not do, or
                weights are missing, unknown, of another shape, or quantized in an unknown way.
        """
        config = self._config()
        try:
            return decoder_from_published(config, self._weights(config))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"cannot use {self.path}: {error}") from None

    def _weights(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights under the names of transformers."""
        num_heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        weights: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            values = self._unpacked(tensor)
            part = name.split(".")[-2]
            if part in num_heads:
                values = _halves_of_heads(values, config[num_heads[part]])
            weights[_published_name(name)] = torch.from_numpy(np.array(values, dtype=np.float32))
        return weights

    def _config(self) -> dict[str, Any]:
        """Return the configuration under the names of transformers."""
        architecture = self.metadata.get("general.architecture")
        if architecture != ARCHITECTURE:
            raise UserError(
                f"{self.path} holds a model of the architecture {architecture!r}; only "
                f"{ARCHITECTURE!r} can be imported"
            )
        prefix = f"{ARCHITECTURE}."
        values = {
            name.removeprefix(prefix): value
            for name, value in self.metadata.items()
            if name.startswith(prefix)
        }
        if missing := [name for name in _CONFIG if name not in values.keys() | _OPTIONAL]:
            raise UserError(f"{self.path} does not say {prefix}{f', {prefix}'.join(missing)}")
        values.setdefault("attention.head_count_kv", values["attention.head_count"])
        if problems := self._unsupported(values):
            more = len(problems) - MAX_PROBLEMS_SHOWN
            shown = problems[:MAX_PROBLEMS_SHOWN] + ([f"{more} more"] if more > 0 else [])
            raise UserError(f"{self.path} needs what the decoder does not do: {', '.join(shown)}")
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{self.path} has no embeddings (the tensor token_embd.weight)")
        return {
            **{_CONFIG[name]: _shortest(values[name]) for name in _CONFIG.keys() & values.keys()},
            "model_type": ARCHITECTURE,
            "vocab_size": int(self._tensors["token_embd.weight"].shape[-1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
        }

    def _unsupported(self, values: dict[str, Any]) -> list[str]:
        """Return the settings and tensors that would change what the model computes."""
        problems = [
            f"{ARCHITECTURE}.{name}={value!r}"
            for name, value in values.items()
            if name not in _CONFIG.keys() | _NOTES | set(_HEAD_SIZES) and value not in _NONE
        ]
        for name in _CONFIG.keys() & values.keys():
            if not isinstance(values[name], int | float) or values[name] <= 0:
                problems.append(f"{ARCHITECTURE}.{name}={values[name]!r}")
        if problems:
            return sorted(problems)
        head_size = values["embedding_length"] // values["attention.head_count"]
        problems += [
            f"{ARCHITECTURE}.{name}={values[name]!r} with heads of {head_size}"
            for name in _HEAD_SIZES
            if values.get(name, head_size) != head_size
        ]
        return problems + [
            f"the tensor {name}" for name in self._tensors if not _published_name(name)
        ]

    def _unpacked(self, tensor: Any) -> np.ndarray[Any, Any]:
        from gguf import dequantize

        try:
            values: np.ndarray[Any, Any] = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: the package gguf cannot unpack the type {tensor.tensor_type.name} "
                f"of {tensor.name}; use a file of another type, such as Q8_0, Q4_K or F16"
            ) from None
        return values


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise UserError(
            f"{path} is no GGUF file, as it begins with {start!r} and not with {_MAGIC!r}; "
            "import takes a GGUF file or a model folder"
        )
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"reading {path} needs the package gguf, which is not installed; "
            "`pip install 'iiet-orch[gguf]'` installs it"
        ) from None
    try:
        return GGUFReader(path)
    except Exception as error:  # A damaged file fails in many ways.
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path}, which is damaged, not complete, or newer than the installed package "
        f"gguf ({first_line(error, with_type=True)}); copy it again"
    )


def _published_name(name: str) -> str:
    """Return the name that transformers gives a tensor; empty if it is unknown."""
    if name in _WEIGHTS:
        return _WEIGHTS[name]
    start, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    is_known = start == "blk" and layer.isdecimal() and part in _LAYER_WEIGHTS
    return f"model.layers.{int(layer)}.{_LAYER_WEIGHTS[part]}" if is_known else ""


def _halves_of_heads(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Put the rows of each head into Llama's order: first channels of all pairs, then the second.

    llama.cpp stores the two channels that rotate together side by side.
    """
    rows = values.reshape(num_heads, -1, 2, values.shape[-1])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _shortest(value: Any) -> Any:
    # 1e-5 is stored as the nearest float32, 9.999999747378752e-06; both are the same float32.
    return float(str(np.float32(value))) if isinstance(value, float) else value
