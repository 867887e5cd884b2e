"""The files of a model folder: their content, their checksums, and the keys of a model.

A checkpoint, an export and a published model have the same form: `config.json`, safetensors, and
tokenizer files as `tokenizers` and transformers write them. A checkpoint adds its training state,
and `provenance.json` with the SHA-256 of every other file, which finds later damage. Nothing is
unpickled, and no code of a folder runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open

from iiet.extensions import ExtensionError
from iiet.hf.weights import CONFIG, MODEL_TYPE, WEIGHTS, WEIGHTS_INDEX, config_from_json
from iiet.model.config import ModelConfig
from iiet.model.facts import METHODS, facts_of
from iiet.model.schedule import IterationSchedule
from orchestrator.workspace.errors import DamagedFile, UserError, shortened
from orchestrator.workspace.files import (
    INVALID_VALUE_ERRORS,
    damage_named,
    damaged_file,
    read_json,
    resolve_path,
)
from orchestrator.workspace.layout import CHECKPOINT_NAME, PROVENANCE, find_checkpoints, step_of
from orchestrator.workspace.provenance import KEY_LENGTH, content_key, file_key

TOKENIZER = "tokenizer.json"
TRAINING_STATE = "training_state.pt"
MOMENTS_PREFIX = "moments"
"""Prefix of the files with the moments of a sharded training, one file per worker."""
METHOD_PACKAGE = "method_package"
"""Entry of the provenance: the package that adds the model's method, if any."""
ELASTIC = "elastic"
"""Entry of the provenance: the cheaper schedules that elastic weights learned."""
JOB_KEY = "job"
"""Entry of the provenance: the key of the training that wrote the checkpoint."""

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
MANIFEST = "MANIFEST.sha256"
"""File of an export: the checksums of its files, for `sha256sum --check`."""
StoredPrecision = Literal["fp32", "bf16", "fp16"]
"""Types of stored weights."""
_SAFETENSORS_NAMES: dict[str, StoredPrecision] = {"BF16": "bf16", "F16": "fp16"}
TEXT_FILES = (
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
)
"""Files of transformers, besides `TOKENIZER`, that determine how an imported model reads text. A
model that was trained here has none."""
MODEL_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py")
"""Files of a model: configuration, weights, tokenizer, code."""

# Any model folder


def read_config(folder: Path, name: str = CONFIG) -> Mapping[str, Any]:
    """Read a JSON file of a model folder.

    Raises:
        UserError: If it is missing.
        DamagedFile: If it is damaged.
    """
    try:
        values = read_json(folder / name)
    except NotADirectoryError:
        values = None
    if values is None:
        raise UserError(f"{folder} is not a model folder: it has no {name}")
    return values


def load_config(folder: Path) -> ModelConfig:
    """Read the configuration of a checkpoint or an export.

    Raises:
        UserError: If the file is missing, damaged, or not valid for this version of the program; or
            if the package of its method is not installed, or broken.
    """
    values = read_config(folder)
    try:
        return config_from_json(values)
    except ExtensionError as error:  # The method is unknown, or its package is broken.
        package = load_provenance(folder).get(METHOD_PACKAGE)
        if package is None or values.get("method") in METHODS:
            raise UserError(f"cannot use {folder}: {shortened(str(error))}") from None
        raise UserError(
            f"{folder} is a model of the method {values.get('method')!r}, which the package "
            f"{package} adds; install that package, and run the command again"
        ) from None
    except INVALID_VALUE_ERRORS as error:
        reason = shortened(str(error))
        raise UserError(f"cannot read the model's configuration in {folder}: {reason}") from None


class NoDecoder(UserError):
    """A model folder that only transformers can run; says why."""


def decoder_config(folder: Path, *, needs_weights: bool = True) -> ModelConfig:
    """Return the configuration of any model folder that a decoder can run.

    Args:
        needs_weights: Whether the folder must have weights; a plan needs none.

    Raises:
        UserError: If required weights are missing, or cannot be read.
        NoDecoder: If only transformers can run the model.
    """
    config = read_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        return load_config(folder)
    from iiet.hf.published import config_from_published  # Imports torch.

    # Names of weights show what the configuration does not, such as biases.
    reads_weights = needs_weights or any(folder.glob("*.safetensors"))
    tensors = stored_tensors(folder) if reads_weights else {}
    try:
        return config_from_published(config, dict.fromkeys(tensors))
    except (ValueError, TypeError) as error:  # For example, biases.
        raise NoDecoder(
            f"only transformers can run {folder}: `evaluate` takes it, and `benchmark` if it is a "
            "looped model of a known kind; everything else needs its import, which is refused: "
            f"{error}"
        ) from None


def is_export(folder: Path) -> bool:
    """Return whether a model folder is an export of this program.

    Exports of iterative methods have their own model type; exports of plain models have a list of
    checksums.
    """
    return read_config(folder).get("model_type") == MODEL_TYPE or (folder / MANIFEST).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files: those with transformers' names, else all.

    Raises:
        UserError: If there are none, or a file that the index names is missing.
    """
    if not (folder / WEIGHTS).is_file() and (folder / WEIGHTS_INDEX).is_file():
        return _indexed_files(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} has no weights beside its {CONFIG} (*.safetensors); if they are pickled, "
            "load the model with transformers and save it with `save_pretrained`"
        )
    return files


def _indexed_files(folder: Path) -> list[Path]:
    file_by_tensor = read_config(folder, WEIGHTS_INDEX).get("weight_map")
    names = sorted(set(file_by_tensor.values())) if isinstance(file_by_tensor, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise DamagedFile(f"{folder / WEIGHTS_INDEX} is damaged: weight_map names no files")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names; copy or download "
            "the folder again"
        )
    return [folder / name for name in names]


class StoredTensor(NamedTuple):
    """A weight in a file."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as `BF16`."""


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return name -> shape and type of all weights, reading only the headers of the files.

    Raises:
        UserError: If there are no weights, or they cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in list(weights.keys()):
                    tensor = weights.get_slice(name)
                    tensors[name] = StoredTensor(tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {file}: {error}") from None
    return tensors


def weights_precision(folder: Path) -> StoredPrecision:
    """Return the type of the weights in a folder's files; raises what `stored_tensors` raises."""
    return precision_of(stored_tensors(folder))


def precision_of(tensors: Mapping[str, StoredTensor]) -> StoredPrecision:
    """Return the type of weights: that of the largest one.

    Mixes and norms of a method stay float32, also if other weights have half precision.
    """
    largest = max(tensors.values(), key=lambda tensor: math.prod(tensor.shape), default=None)
    return _SAFETENSORS_NAMES.get(largest.dtype, "fp32") if largest else "fp32"


def model_files_key(folder: Path) -> str:
    """Return the hash of the files that determine a model: configuration, weights, tokenizer, code.

    Hashing the files takes less time than loading the weights.
    """
    patterns = (*MODEL_PATTERNS, "additional_chat_templates/*.jinja")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return content_key([(path.name, file_key(path)) for path in files])


def tokenizer_file(folder: Path) -> Path:
    """Return the `tokenizer.json` of a model.

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
    files = [folder / name for name in TEXT_FILES]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def text_files_key(folder: Path) -> str | None:
    """Return the hash of a model's `TEXT_FILES`; None if it has none."""
    files = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
    return content_key([(file.name, file_key(file)) for file in files]) if files else None


# Checkpoints


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, intact or damaged, and not a run folder."""
    return (path / PROVENANCE).is_file() or bool(CHECKPOINT_NAME.fullmatch(path.name))


def resolve_checkpoint(path: Path) -> Path:
    """Return a checkpoint, or the newest one of a run.

    Raises:
        UserError: If there is none, or the newest one is damaged, as an older one would be another
            model. For a model folder from elsewhere, the message says how to import it, or why
            that is impossible.
    """
    path = resolve_path(path)
    hint = ""
    if not is_checkpoint(path):
        checkpoints = find_checkpoints(path)
        if not checkpoints and (path / CONFIG).is_file():
            decoder_config(path)  # Raises if the import would refuse it.
            raise UserError(
                f"{path} is a model folder, not a checkpoint; `iiet-orch import {path}` makes one "
                "of it"
            )
        if not checkpoints:
            raise UserError(f"{path} holds no checkpoint; `iiet-orch pretrain` makes one")
        path = checkpoints[-1]
        if len(checkpoints) > 1:
            hint = f"; restore it, or name an older model: {checkpoints[-2]}"
    try:
        check_checkpoint(path)
    except UserError as error:
        raise type(error)(f"{error}{hint}") from None
    return path


def load_provenance(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `provenance.json`.

    Raises:
        UserError: If the file is missing or damaged.
    """
    provenance = read_json(folder / PROVENANCE)
    if provenance is None:
        raise UserError(f"{folder} is not a checkpoint: it has no {PROVENANCE}")
    return provenance


def served_schedules(folder: Path) -> tuple[IterationSchedule, ...]:
    """Return the schedules that a checkpoint's weights learned, costliest first.

    These are the checkpoint's own schedule and, for elastic weights, the cheaper ones. A method
    without corrections has none, and for a model from elsewhere they are unknown.

    Raises:
        UserError: If the checkpoint is damaged.
    """
    if not is_checkpoint(folder):
        return ()
    config = load_config(folder)
    family = load_provenance(folder).get(ELASTIC, [])
    if not facts_of(config.method).has_corrections:
        return ()
    parse = partial(IterationSchedule.parse, num_layers=config.num_layers)
    with damage_named(folder / PROVENANCE):
        return (config.corrections, *map(parse, family))


def stored_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe of a checkpoint's training; empty if it was trained elsewhere.

    Raises:
        UserError: If the folder is not a checkpoint, or its provenance is damaged.
    """
    with damage_named(folder / PROVENANCE):
        return dict(load_provenance(folder).get("recipe") or {})


def trained_sequence_length(folder: Path) -> int | None:
    """Return the sequence length of a checkpoint's training; None if it was the context length, or
    if the model was trained elsewhere.

    Raises:
        UserError: If the folder is not a checkpoint, or its provenance is damaged.
    """
    length = stored_recipe(folder).get("sequence_length")
    with damage_named(folder / PROVENANCE):
        return None if length is None else int(length)


def weights_key(folder: Path) -> str:
    """Return the short hash of a checkpoint's weights from its `provenance.json`.

    Raises:
        UserError: If the folder is not a checkpoint, or the file is damaged.
    """
    return _stored_checksums(folder).get(WEIGHTS, "")[:KEY_LENGTH]


def _stored_checksums(folder: Path) -> dict[str, str]:
    """Return name -> SHA-256 of a checkpoint's files as they were written."""
    provenance = load_provenance(folder)
    with damage_named(folder / PROVENANCE):
        return {name: str(digest) for name, digest in provenance["checksums"].items()}


def check_if_checkpoint(folder: Path) -> None:
    """Verify the checksums of a model folder if it is a checkpoint; see `check_checkpoint`."""
    if any((folder / name).exists() for name in (PROVENANCE, TRAINING_STATE)):
        check_checkpoint(folder, remember=True)


def check_checkpoint(
    folder: Path, *, with_training_state: bool = False, remember: bool = False
) -> None:
    """Verify the checksums; a file that is unchanged since it was last verified is not read.

    Args:
        with_training_state: Also verify the files that only a resumed training reads, which have
            most of the bytes.
        remember: As in `files.damaged_file`.

    Raises:
        UserError: If the folder is not a checkpoint.
        DamagedFile: If a file is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no checkpoint folder {folder}")
    checksums = _stored_checksums(folder)
    # Configuration and weights without a checksum count as damaged.
    names = {CONFIG, WEIGHTS, *checksums}
    if with_training_state:
        names.add(TRAINING_STATE)
    else:
        names = {name for name in names if not _is_training_state(name)}
    if damage := damaged_file(folder, checksums, names=sorted(names), remember=remember):
        raise DamagedFile(f"the checkpoint {folder} is damaged: {damage}")


def _is_training_state(name: str) -> bool:
    """Return whether only a resumed training reads a file."""
    return name == TRAINING_STATE or name.startswith(MOMENTS_PREFIX)


def newest_checkpoint(
    run_folder: Path,
    warn: Callable[[str], None] = lambda _: None,
    *,
    up_to_step: float = math.inf,
    with_training_state: bool = False,
) -> Path | None:
    """Return the newest intact checkpoint of a run, or None; warn of each damaged newer one."""
    problems: list[str] = []
    newest = None
    for folder in reversed(find_checkpoints(run_folder)):
        if step_of(folder) <= up_to_step:
            try:
                check_checkpoint(folder, with_training_state=with_training_state)
            except UserError as error:
                problems.append(str(error))
            else:
                newest = folder
                break
    # After the search, because a warning names the checkpoint that is used instead.
    for problem in problems:
        warn(f"{problem}; {f'{newest} is used instead' if newest else 'no older one is left'}")
    return newest
