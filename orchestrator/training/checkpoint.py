"""Checkpoints that are whole or absent, and that say so themselves.

A checkpoint is a folder `step_00000100/` with `config.json`, `model.safetensors`, `tokenizer.json`,
`training_state.pt` and `provenance.json`; only an imported one may lack the tokenizer, and it has
more files beside it (`TEXT_FILES`). It is written under another name, flushed to disk and renamed,
so a crash leaves either nothing or all of it. `provenance.json` holds the SHA-256 of every other
file; whatever else can damage a file afterwards (a full disk, a copy that stopped) is found on
reading and named. A training goes on from the checkpoint before. Commands that read a model warn
when they use an older one, and refuse where something would be made of it. Nothing is unpickled:
weights are safetensors, and the training state loads with `weights_only=True`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.weights import CONFIG, WEIGHTS, write_folder
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import INVALID_VALUE_ERRORS, read_json_object
from orchestrator.workspace.provenance import KEY_LENGTH, content_key, file_digest, file_key

TOKENIZER = "tokenizer.json"
TRAINING_STATE = "training_state.pt"
PROVENANCE = "provenance.json"

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKEN_IDS = "token_ids.json"
TEXT_FILES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
    TOKEN_IDS,
)
"""What an imported model says about text beside its `tokenizer.json`: which tokens open, end and
pad one, how a chat is written. All but `TOKEN_IDS` (those of the model's own `config.json`) are
files of transformers; models that are trained here have none of them."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of a precision, as settings name it."""

REMEDY = (
    "copy the checkpoint here again, or move its folder away; a run that is started again goes on "
    "from the checkpoint before"
)
_NEEDED = (CONFIG, WEIGHTS, TRAINING_STATE)


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written, as the name of its folder says."""
    return int(checkpoint.name.rpartition("_")[2])


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    decoder: Decoder,
    training_state: Mapping[str, Any],
    tokenizer_path: Path | None,
    provenance: Mapping[str, Any],
    text_files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a decoder's checkpoint as a whole; see `write_checkpoint`."""
    return write_checkpoint(
        run_folder,
        step,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state=training_state,
        tokenizer_path=tokenizer_path,
        provenance=provenance,
        text_files=text_files,
    )


def write_checkpoint(
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
    """Write a checkpoint as a whole, or raise and leave nothing.

    Args:
        run_folder: Where the checkpoint's folder goes.
        step: Optimizer steps done.
        config: The model's shape.
        weights: The decoder's state.
        training_state: Tensors, numbers, texts and containers of them; nothing that needs pickling
        of classes.
        tokenizer_path: File that is copied beside the weights; None where there is none to copy.
        provenance: JSON-able; the weights' key and all checksums are added.
        text_files: Name to content of those `TEXT_FILES` that an imported model has.

    Returns:
        The checkpoint's folder. One that exists already is replaced.
    """
    folder = run_folder / checkpoint_name(step)
    temporary = run_folder / f"{folder.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_folder(temporary, config, weights)
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, temporary / TOKENIZER)
        for name, content in (text_files or {}).items():
            (temporary / name).write_bytes(content)
        torch.save(dict(training_state), temporary / TRAINING_STATE)
        checksums = {path.name: file_digest(path) for path in sorted(temporary.iterdir())}
        key = checksums[WEIGHTS][:KEY_LENGTH]
        _write(
            temporary / PROVENANCE,
            {**provenance, "step": step, "weights": key, "checksums": checksums},
        )
        for path in [*temporary.iterdir(), temporary]:
            _flush_to_disk(path)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush_to_disk(run_folder)
    return folder


def load_decoder(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    check: bool = True,
    frozen: bool = False,
) -> Decoder:
    """Load a checkpoint's decoder, in evaluation mode.

    Args:
        folder: The checkpoint's folder.
        device: Where the weights go.
        dtype: What they are cast to, whatever the file holds.
        check: Compare checksums first; for checkpoints that were not checked a moment ago.
        frozen: Without gradients. On the CPU its weights stay mapped into memory, so that all
            processes of a machine share what was read; else they are a copy, to be trained.

    Raises:
        UserError: If the folder is no checkpoint, is damaged, or has weights that are no numbers.
    """
    if check:
        check_checkpoint(folder)
    try:
        decoder = Decoder.load(folder)
    except ValueError as error:
        raise UserError(f"this version of the program cannot use {folder}: {error}") from None
    decoder = decoder.to(device, dtype)
    if not frozen and decoder.device.type == "cpu":  # Elsewhere they are a copy already.
        decoder = copy.deepcopy(decoder)
    return decoder.requires_grad_(not frozen).eval()


def load_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's model configuration, without its weights.

    Raises:
        UserError: If the file is missing, or not one of this version of the program.
    """
    try:
        values = read_json_object(folder / CONFIG, remedy=REMEDY)
        if values is not None:
            return ModelConfig.from_dict(values)
    except UserError:
        raise
    except INVALID_VALUE_ERRORS as error:
        raise UserError(
            f"cannot read the model's configuration in {folder}: {shortened(str(error))}"
        ) from None
    raise UserError(f"{folder} is no checkpoint: it has no {CONFIG}")


def load_training_state(folder: Path) -> dict[str, Any]:
    """Load what the optimizer and the loop need to go on; checked by `check_checkpoint` before.

    Raises:
        UserError: If the optimizer's numbers belong to parameters that have changed places since.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        is_older = any(name.startswith("method.") for name in weights.keys())  # noqa: SIM118
    if is_older:
        raise UserError(
            f"the training of {folder.parent} cannot go on: {folder.name} was written before "
            "version 0.2, and its optimizer state is for the parameters of that version; train "
            f"anew under another name, and take its model along with `iiet-orch import {folder}`"
        )
    state: dict[str, Any] = torch.load(
        folder / TRAINING_STATE, weights_only=True, map_location="cpu"
    )
    return state


def load_provenance(folder: Path) -> dict[str, Any]:
    """Return what produced a checkpoint.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        provenance = read_json_object(folder / PROVENANCE, remedy=REMEDY)
    except UserError as error:
        raise UserError(f"the checkpoint {folder} is damaged: {PROVENANCE}: {error}") from None
    if provenance is None:
        raise UserError(f"{folder} is no checkpoint: it has no {PROVENANCE}")
    if not isinstance(provenance.get("checksums", {}), dict):
        raise UserError(
            f"the checkpoint {folder} is damaged: {PROVENANCE}: checksums are no mapping of names; "
            f"{REMEDY}"
        )
    return provenance


def weights_key(folder: Path) -> str:
    """Return the short hash of a checkpoint's weights, as recorded when it was written.

    Raises:
        UserError: If the folder is no checkpoint or its record is damaged.
    """
    return str(load_provenance(folder).get("weights", ""))


def check_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum.

    Raises:
        UserError: If the folder is no checkpoint, or a file is missing or differs from what was
        written.
    """
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    provenance = load_provenance(folder)
    checksums = provenance.get("checksums", {})
    if provenance.get("weights") != str(checksums.get(WEIGHTS))[:KEY_LENGTH]:
        raise UserError(f"the checkpoint {folder} is damaged: {PROVENANCE} contradicts itself")
    for name in {**dict.fromkeys(_NEEDED), **checksums}:
        path = folder / name
        if not path.is_file():
            raise UserError(f"the checkpoint {folder} is damaged: {name} is missing")
        if path.parent != folder or file_digest(path) != checksums.get(name):
            raise UserError(f"the checkpoint {folder} is damaged: {name} is not what was written")


def tokenizer_file(folder: Path) -> Path:
    """Return a checkpoint's `tokenizer.json`.

    Raises:
        UserError: If it was imported without one.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{folder} has no {TOKENIZER}, and text needs one; "
            "`iiet-orch import FOLDER --tokenizer FILE` imports a model with its tokenizer"
        )
    return path


def read_text_files(folder: Path) -> dict[str, bytes]:
    """Return those `TEXT_FILES` that a folder has, by name."""
    files = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
    return {file.name: file.read_bytes() for file in files}


def text_files_key(folder: Path) -> str | None:
    """Return the hash of a checkpoint's `TEXT_FILES`; None if it has none of them."""
    files = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
    return content_key([(file.name, file_key(file)) for file in files]) if files else None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
