"""Model folders that are not checkpoints of ours: read into a decoder.

Three kinds are known by their `config.json`: folders that `iiet-orch export` wrote, folders in the
published naming of IIET and PCformer, and plain Llama folders of transformers, which become vanilla
models. Weights are safetensors, in one file or in shards; a pickle is not opened. Nothing of a
folder's own code runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iiet.decoder import Decoder
from iiet.published import decoder_from_published
from iiet.weights import non_finite
from orchestrator.errors import UserError
from orchestrator.provenance import content_key, file_key
from orchestrator.training.checkpoint import CONFIG, TOKENIZER

SHARDS = "model.safetensors.index.json"
EXPORTED_TYPE = "iiet"


@dataclass(frozen=True)
class ForeignModel:
    """A model that came from elsewhere."""

    decoder: Decoder
    """In float32 and evaluation mode."""
    tokenizer_file: Path | None
    """The folder's `tokenizer.json`; None if it has none."""
    origin: str
    """Which kind of folder it was, in words."""


def read_foreign(folder: Path) -> ForeignModel:
    """Read a folder into a decoder.

    Args:
        folder: Holds `config.json` and safetensors.

    Raises:
        UserError: If the folder is none of the three kinds, asks for what a decoder does not do, or
            its weights are missing, left over, of the wrong shape or not finite.
    """
    config = _read_json(folder / CONFIG)
    try:
        if config.get("model_type") == EXPORTED_TYPE and "corrections" in config:
            decoder, origin = _exported(folder), "an exported folder"
        else:
            decoder = decoder_from_published(config, _weights(folder))
            is_llama = decoder.config.method == "vanilla"
            origin = "a Llama folder" if is_llama else "the published naming"
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    file = folder / TOKENIZER
    return ForeignModel(decoder.float().eval(), file if file.is_file() else None, origin)


def foreign_key(folder: Path) -> str:
    """Return the hash of all files that determine a folder's model: config and weights.

    Raises:
        UserError: If the folder has no config, or no safetensors.
    """
    _read_json(folder / CONFIG)
    return content_key([file_key(folder / name) for name in (CONFIG, *_weight_files(folder))])


def _exported(folder: Path) -> Decoder:
    """Load strictly: transformers would fill missing weights with fresh ones."""
    from iiet.huggingface import IIETConfig

    config = IIETConfig.from_pretrained(folder).to_model_config()
    weights = {name.removeprefix("decoder."): tensor for name, tensor in _weights(folder).items()}
    if problems := non_finite(weights):
        raise ValueError("; ".join(problems))
    decoder = Decoder(config)
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return decoder


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            weights |= load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from None
    return weights


def _weight_files(folder: Path) -> list[str]:
    """Name a folder's safetensors: those of the index where there is one, else all."""
    if (folder / SHARDS).is_file():
        names = sorted(set(_read_json(folder / SHARDS).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / SHARDS} names a file outside its folder: {name!r}")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(
            f"{folder} has no safetensors; where weights are pickled, load the model with "
            "transformers and save it with `save_pretrained`"
        )
    return names


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping")
    return found
