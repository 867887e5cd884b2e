"""Load a model folder: as a decoder on a device and in a precision, or its weights one by one.

A decoder runs checkpoints, exports, folders of the published naming (IIET, PCformer), and plain
models of transformers (`iiet.hf.plain_models`), which become vanilla models. No code of a folder
runs, and missing weights are errors. An import and the workers of a training read tensor by tensor,
as a large model does not fit the memory of one process.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from iiet.decoder import Decoder, decoder_from_published
from iiet.hf.published import misfits, weights_from_published
from iiet.hf.weights import MODEL_TYPE, LazyTensor, lazy_tensors
from iiet.iiad.left_out import decoder_of_kept_layers
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import (
    check_if_checkpoint,
    load_config,
    read_config,
    weight_files,
)
from orchestrator.settings.training import Precision, default_precision
from orchestrator.workspace.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision in the settings -> dtype."""
STORED_DTYPES: dict[str, torch.dtype] = {**DTYPES, "fp16": torch.float16}
"""Type of weights in a file -> dtype."""
FIRST_WITH_BF16 = (8, 0)
"""Compute capability from which GPUs have bfloat16."""


def best_device() -> str:
    """Return the name of a GPU if there is one, else that of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_precision(device: str | torch.device) -> Precision:
    """Return the precision that a model on this device is evaluated in if none is set."""
    return default_precision(on_gpus=torch.device(device).type == "cuda" and has_bf16(device))


def has_bf16(device: str | torch.device) -> bool:
    """Return whether a GPU has bfloat16; PyTorch emulates it slowly on older ones."""
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16


def use_tf32(device: str | torch.device) -> None:
    """Let float32 matrix products on GPUs run as TF32, in this process; CPUs compute as before."""
    # On CPUs the same switch allows bfloat16 products.
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high")


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
        device: Device of the weights.
        dtype: Dtype of the weights, whatever the files hold.
        schedule: Iteration schedule, instead of the model's own; it may leave layers out.
        check: Verify the checksums of a checkpoint first.
        frozen: Without gradients. A checkpoint then stays memory-mapped on the CPU, so that all
            processes of a machine share its weights; otherwise weights are copied and trainable.

    Raises:
        UserError: If the folder is not a model folder, is damaged, or needs features that a decoder
            lacks; if weights are missing, unknown or not finite; or if the schedule does not fit.
    """
    if check:
        check_if_checkpoint(folder)
    is_ours = read_config(folder).get("model_type") == MODEL_TYPE
    try:
        if is_ours:
            load_config(folder)  # Names the package of a method that is not installed.
            decoder = Decoder.from_pretrained(folder)
        else:
            decoder = decoder_from_published(read_config(folder), _weights(folder, dtype))
        if schedule is not None:
            decoder = decoder_of_kept_layers(decoder, schedule)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _unusable(folder, error) from None
    use_tf32(device)
    decoder = decoder.to(device, dtype)
    if is_ours and not frozen and decoder.device.type == "cpu":
        decoder = copy.deepcopy(decoder)  # Its weights are mapped from the file.
    return decoder.requires_grad_(not frozen).eval()


def _weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read all weights in a dtype; takes the memory of the model and of one tensor."""
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
            for name in names:
                # Opened for each tensor, because pages that were read stay in memory until the file
                # is closed.
                with safe_open(file, framework="pt") as tensors:
                    weights[name] = tensors.get_tensor(name).to(dtype)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    return weights


def open_weights(folder: Path, *, check: bool = True) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Return the configuration of a model that a decoder can run, and its weights as float32, by
    the decoder's names.

    Args:
        folder: Holds `config.json` and the weights.
        check: Verify the checksums of a checkpoint first.

    Raises:
        UserError: If the folder is not a model folder, is damaged, needs what a decoder does not
            support, or has missing or unknown weights; later, when a weight is read that is damaged
            or not finite.
    """
    if check:
        check_if_checkpoint(folder)
    values = read_config(folder)
    try:
        stored = lazy_tensors(weight_files(folder))
        if values.get("model_type") == MODEL_TYPE:
            config = load_config(folder)  # Names the package of a method that is not installed.
            weights = stored
            if problems := misfits(config, weights):
                raise ValueError("the weights do not fit: " + "; ".join(problems))
        else:
            config, weights = weights_from_published(values, stored)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise _unusable(folder, error) from None
    return config, {name: _as_float32(folder, tensor) for name, tensor in weights.items()}


def _as_float32(folder: Path, tensor: LazyTensor) -> LazyTensor:
    def read(rows: slice | EllipsisType) -> torch.Tensor:
        try:
            return tensor[rows].to(torch.float32)
        except ValueError as error:
            raise _unusable(folder, error) from None

    return LazyTensor(tensor.shape, torch.float32, read)


def _unusable(folder: Path, error: ValueError) -> UserError:
    return UserError(f"this version of the program cannot use {folder}: {error}")
