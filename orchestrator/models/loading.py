"""Load a decoder from a model folder of any kind; every command uses `load_model`.

A decoder reads checkpoints of this program, folders of `iiet-orch export`, folders of the published
naming (IIET, PCformer), and plain Llama folders (they become vanilla models). Pickles are not
opened, no code of a folder runs, and missing weights are errors. transformers runs all other
architectures; they can only be evaluated.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.published import config_from_published, decoder_from_published
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG, config_from_json, non_finite
from orchestrator.models.folder import TRAINING_STATE, check_checkpoint, load_config
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.layout import PROVENANCE
from orchestrator.workspace.provenance import content_key, file_key

CHECKPOINT = "a checkpoint"
EXPORTED = "an exported folder"
PUBLISHED = "the published naming"

EXPORTED_TYPE = "iiet"
"""`model_type` of an exported folder."""

AUTO = "auto"
"""A GPU if there is one."""

_SHARDS = "model.safetensors.index.json"


def load_model(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    schedule: IterationSchedule | None = None,
    check: bool = True,
    frozen: bool = False,
) -> Decoder:
    """Load the decoder in a model folder, in evaluation mode.

    Args:
        folder: Holds `config.json` and the weights.
        device: Device of the weights; `AUTO` for a GPU if there is one.
        dtype: Dtype of the weights, whatever the files hold.
        schedule: Iteration schedule, instead of the model's own.
        check: Verify the checksums of a checkpoint first.
        frozen: Without gradients. A checkpoint's weights stay memory-mapped on the CPU, so that all
            processes of a machine share them; otherwise they are a copy that can be trained.

    Raises:
        UserError: If the folder is not a model folder, is damaged, needs what a decoder does not
            support, has missing, unknown or not finite weights, or the schedule does not fit it.
    """
    if check and any((folder / name).exists() for name in (PROVENANCE, TRAINING_STATE)):
        check_checkpoint(folder, remember=True)
    kind = folder_kind(folder)
    try:
        if kind == CHECKPOINT:
            if (folder / PROVENANCE).exists():
                load_config(folder)  # Names the package of a method that is not installed.
            decoder = Decoder.load(folder)
        elif kind == EXPORTED:
            decoder = _exported(folder)
        else:
            decoder = decoder_from_published(read_config(folder), _weights(folder))
        if schedule is not None:
            decoder = decoder.with_schedule(schedule)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"this version of the program cannot use {folder}: {error}") from None
    device = best_device(device)
    use_tf32(device)
    decoder = decoder.to(device, dtype)
    if kind == CHECKPOINT and not frozen and decoder.device.type == "cpu":
        decoder = copy.deepcopy(decoder)  # Its weights are mapped from the file.
    return decoder.requires_grad_(not frozen).eval()


def best_device(device: str | torch.device = AUTO) -> str | torch.device:
    """Return a GPU for `AUTO` if there is one, else the CPU; any other device unchanged."""
    if device != AUTO:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_tf32(device: str | torch.device) -> None:
    """Let float32 matrix products on GPUs run as TF32, in this process; CPUs compute as before."""
    # On CPUs the same switch allows bfloat16 products.
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")


def folder_kind(folder: Path) -> str:
    """Return `CHECKPOINT`, `EXPORTED`, or `PUBLISHED` for any other model folder.

    Raises:
        UserError: If the folder has no configuration that can be read.
    """
    config = read_config(folder)
    if config.get("model_type") == EXPORTED_TYPE and "corrections" in config:
        return EXPORTED if "auto_map" in config else CHECKPOINT
    return PUBLISHED


def read_config(folder: Path, name: str = CONFIG) -> Mapping[str, Any]:
    """Read a JSON file of a model folder.

    Raises:
        UserError: If it is missing or damaged.
    """
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a model folder: it has no {name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {shortened(str(error))}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping")
    return found


def decoder_config(folder: Path) -> ModelConfig | None:
    """Return the configuration of a folder from elsewhere; None if only transformers can run it.

    Raises:
        UserError: If the folder has no weights, or they cannot be read.
    """
    config, files = read_config(folder), sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("pytorch_model*.bin")):
            return None
        raise UserError(
            f"{folder} has a {CONFIG} of transformers but no weights beside it (*.safetensors)"
        )
    is_exported = folder_kind(folder) == EXPORTED
    is_known = config.get("model_type") == "llama" or bool({"kind", "num_heads"} & set(config))
    if not is_exported and not is_known:
        return None
    names = [name for file in files for name in _weight_names(file)]
    try:
        if is_exported:
            return _exported_config(folder)
        return config_from_published(config, dict.fromkeys(names))
    except (ValueError, TypeError):
        return None  # For example scaled rotary angles or biases; transformers supports them.


def model_folder_key(folder: Path) -> str:
    """Return the hash of the files that determine a folder's model: config and weights.

    Raises:
        UserError: If the folder has no config, or no safetensors.
    """
    read_config(folder)
    return content_key([file_key(folder / name) for name in (CONFIG, *_weight_files(folder))])


def _exported_config(folder: Path) -> ModelConfig:
    return config_from_json(read_config(folder))


def _exported(folder: Path) -> Decoder:
    # Not by transformers, which would replace missing weights with random ones.
    weights = _weights(folder)
    if problems := non_finite(weights):
        raise ValueError("; ".join(problems))
    decoder = Decoder(_exported_config(folder))
    try:
        decoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from None
    return decoder


def _weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            found = load_file(folder / name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {folder / name}: {error}") from None
        if duplicates := sorted(set(weights) & set(found)):
            raise UserError(
                f"{folder} holds {duplicates[0]} in several files, the last of which is {name}; "
                "keep the files of one model there"
            )
        weights |= found
    return weights


def _weight_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors: those in its index if it has one, else all."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if (folder / _SHARDS).is_file():
        weight_map = read_config(folder, _SHARDS).get("weight_map")
        listed = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
        if not all(isinstance(name, str) for name in listed):
            raise UserError(
                f"{folder / _SHARDS} does not map the weights to files; copy the model again"
            )
        names = sorted(set(map(str, listed)))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / _SHARDS} names a file outside its folder: {name!r}")
    if not names:
        raise UserError(
            f"{folder} has no safetensors; if its weights are pickled, load the model with "
            "transformers and save it with `save_pretrained`"
        )
    return names
