"""The weights of a model folder of any kind, by a decoder's names, read tensor by tensor.

What needs a whole model calls `load_model`. An import and the workers of a training need it in
parts, and a large model does not fit the memory of one process.
"""

from __future__ import annotations

from pathlib import Path
from types import EllipsisType

import torch

from iiet.config import ModelConfig
from iiet.published import misfits, weights_from_published
from iiet.weights import MODEL_TYPE, LazyTensor, lazy_tensors
from orchestrator.models.folder import (
    check_if_checkpoint,
    load_config,
    read_config,
    weight_files,
)
from orchestrator.workspace.errors import UserError


def open_weights(folder: Path, *, check: bool = True) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Return the configuration of a model that a decoder can run, and its weights as float32.

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
