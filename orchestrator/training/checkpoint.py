"""Write, verify and read checkpoints: folders `step_00000100/` that are complete or absent.

`provenance.json` holds the SHA-256 of every other file, which finds later damage. Nothing is
unpickled: weights are safetensors, the training state loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.extensions import ExtensionError
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule
from iiet.weights import CONFIG, WEIGHTS, config_from_json, write_folder
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.files import (
    INVALID_VALUE_ERRORS,
    checksums_of,
    damaged_file,
    new_folder,
    read_json,
)
from orchestrator.workspace.layout import PROVENANCE, checkpoint_name
from orchestrator.workspace.provenance import KEY_LENGTH, content_key, file_key

TOKENIZER = "tokenizer.json"
TRAINING_STATE = "training_state.pt"
METHOD_PACKAGE = "method_package"
"""Entry of the provenance: the package that adds the model's method, if one does."""
ELASTIC = "elastic"
"""Entry of the provenance: the schedules that elastic weights learned beside the full one."""
JOB_KEY = "job"
"""Entry of the provenance: the key of the training that wrote the checkpoint."""

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
"""Special tokens and chat template of an imported model. All but `TOKEN_IDS` (from the model's own
`config.json`) are files of transformers."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Precision in the settings -> dtype."""

REMEDY = (
    "copy the checkpoint here again, or move its folder away; a run that is started again resumes "
    "from the previous checkpoint"
)


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


def load_config(folder: Path) -> ModelConfig:
    """Read a checkpoint's model configuration.

    Raises:
        UserError: If the file is missing, damaged, or not valid for this version of the program; or
            if the package of its method is not installed, or broken.
    """
    values = read_json(folder / CONFIG, remedy=REMEDY)
    if values is None:
        raise UserError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    try:
        return config_from_json(values)
    except ExtensionError as error:
        raise UserError(_method_problem(folder, values.get("method"), error)) from None
    except INVALID_VALUE_ERRORS as error:
        raise UserError(
            f"cannot read the model's configuration in {folder}: {shortened(str(error))}"
        ) from None


def _method_problem(folder: Path, method: Any, error: ExtensionError) -> str:
    package = load_provenance(folder).get(METHOD_PACKAGE)
    if package is None or method in METHODS:
        return f"cannot use {folder}: {shortened(str(error))}"
    return (
        f"{folder} is a model of the method {method!r}, which the package {package} adds; install "
        "that package, and run the command again"
    )


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


def load_provenance(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `provenance.json`.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        provenance = read_json(folder / PROVENANCE, remedy=REMEDY)
    except UserError as error:
        raise UserError(f"the checkpoint {folder} is damaged: {PROVENANCE}: {error}") from None
    if provenance is None:
        raise UserError(f"{folder} is not a checkpoint: it has no {PROVENANCE}")
    if not isinstance(provenance.get("checksums", {}), dict):
        raise UserError(
            f"the checkpoint {folder} is damaged: {PROVENANCE}: checksums is no object; {REMEDY}"
        )
    return provenance


def served_schedules(folder: Path) -> tuple[IterationSchedule, ...]:
    """Return the schedules that a checkpoint's weights learned, costliest first.

    These are the model's own, and of elastic weights the family; none for a method without
    corrections.

    Raises:
        UserError: If the folder is not a checkpoint, or the file is damaged.
    """
    config, members = load_config(folder), load_provenance(folder).get(ELASTIC, [])
    if not METHODS[config.method].has_corrections:
        return ()
    parse = partial(IterationSchedule.parse, num_layers=config.num_layers)
    try:
        return (config.corrections, *map(parse, members))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint {folder} is damaged: {PROVENANCE}: {ELASTIC}: "
            f"{shortened(str(error))}; {REMEDY}"
        ) from None


def weights_key(folder: Path) -> str:
    """Return the short hash of a checkpoint's weights from its `provenance.json`.

    Raises:
        UserError: If the folder is not a checkpoint, or the file is damaged.
    """
    return str(load_provenance(folder).get("weights", ""))


def check_checkpoint(
    folder: Path, *, with_training_state: bool = False, remember: bool = False
) -> None:
    """Verify the checksums; a file that is unchanged since it was last verified is not read.

    `with_training_state` adds the file that only a resumed training reads, most of the bytes.
    `remember` as in `files.damaged_file`.

    Raises:
        UserError: If the folder is not a checkpoint, or a file is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    provenance = load_provenance(folder)
    checksums = provenance.get("checksums", {})
    if provenance.get("weights") != str(checksums.get(WEIGHTS))[:KEY_LENGTH]:
        raise UserError(f"the checkpoint {folder} is damaged: {PROVENANCE} contradicts itself")
    names = [name for name in {CONFIG: 0, WEIGHTS: 0, **checksums} if name != TRAINING_STATE]
    if with_training_state:
        names.append(TRAINING_STATE)
    if damage := damaged_file(folder, checksums, names=names, remember=remember):
        raise UserError(f"the checkpoint {folder} is damaged: {damage}")


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
    """Return the `TEXT_FILES` in a folder: name -> content."""
    return {file.name: file.read_bytes() for file in _text_files(folder)}


def text_files_key(folder: Path) -> str | None:
    """Return the hash of a checkpoint's `TEXT_FILES`; None if it has none."""
    files = _text_files(folder)
    return content_key([(file.name, file_key(file)) for file in files]) if files else None


def _text_files(folder: Path) -> list[Path]:
    return [folder / name for name in TEXT_FILES if (folder / name).is_file()]
