"""Write checkpoints: folders `step_00000100/` that are complete or absent.

`provenance.json` holds the SHA-256 of every other file, which finds later damage. Nothing is
unpickled: weights are safetensors, the training state loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.methods import METHODS
from iiet.weights import WEIGHTS, write_folder
from orchestrator.models.folder import METHOD_PACKAGE, REMEDY, TOKENIZER, TRAINING_STATE
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import checksums_of, new_folder
from orchestrator.workspace.layout import PROVENANCE, checkpoint_name
from orchestrator.workspace.provenance import KEY_LENGTH


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    training_state: Mapping[str, Any],
    tokenizer_path: Path | None,
    provenance: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a checkpoint completely, or raise and leave nothing; return its folder.

    An existing checkpoint of that step is replaced. The training state consists of tensors,
    numbers, strings and containers of them. `text_files` are an imported model's `TEXT_FILES`.
    """
    folder = run_folder / checkpoint_name(step)
    with new_folder(folder) as temporary:
        write_folder(temporary, config, weights)
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, temporary / TOKENIZER)
        for name, content in (text_files or {}).items():
            (temporary / name).write_bytes(content)
        torch.save(dict(training_state), temporary / TRAINING_STATE)
        checksums = checksums_of(temporary)
        key = checksums[WEIGHTS][:KEY_LENGTH]
        record = {**provenance, "step": step, "weights": key, "checksums": checksums}
        if package := METHODS.names.package(config.method):
            record[METHOD_PACKAGE] = package
        text = json.dumps(record, indent=2) + "\n"
        (temporary / PROVENANCE).write_text(text, encoding="utf-8")
    return folder


def load_training_state(folder: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Load the state of the optimizer and the loop from a verified checkpoint.

    Args:
        mapped: Leave the tensors in the file until they are read. If they are copied to a GPU, its
            workers then need no memory of the machine for them.

    Raises:
        UserError: If it holds objects that are neither tensors nor plain values.
    """
    file = folder / TRAINING_STATE
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    except UnpicklingError:
        raise UserError(
            f"{file} holds objects that are neither tensors nor plain values, which could run "
            f"code, so it is not loaded; {REMEDY}"
        ) from None
    return state
