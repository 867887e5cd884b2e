"""Read model folders from elsewhere into a decoder.

Four kinds: folders of `iiet-orch export`, of the published naming (IIET, PCformer), of Llama (they
become vanilla models), and checkpoints of another workspace. Pickles are not opened, and no code of
the folder runs. Special tokens and chat template are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iiet.decoder import Decoder
from iiet.published import decoder_from_published
from iiet.weights import CONFIG, non_finite
from orchestrator.data.tokenizer import (
    end_of_text_id,
    find_end_of_text_id,
    load_tokenizer,
    load_transformers_tokenizer,
)
from orchestrator.training.checkpoint import (
    GENERATION_CONFIG,
    PROVENANCE,
    TOKEN_IDS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_checkpoint,
    read_text_files,
)
from orchestrator.workspace.errors import UserError, shortened
from orchestrator.workspace.provenance import content_key, file_key

TOKEN_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")
SHARDS = "model.safetensors.index.json"
EXPORTED_TYPE = "iiet"
EXPORTED = "an exported folder"
CHECKPOINT = "a checkpoint"


@dataclass(frozen=True)
class ExternalModel:
    """A model that was read from a folder."""

    decoder: Decoder
    """In float32 and evaluation mode."""
    tokenizer_file: Path | None
    """The folder's `tokenizer.json`; None if it has none."""
    origin: str
    """Kind of folder, as text."""
    token_ids: dict[str, Any]
    """`bos_token_id`, `eos_token_id` (one or a list) and `pad_token_id` of `config.json`."""


def read_model_folder(folder: Path) -> ExternalModel:
    """Read a folder of `config.json` and safetensors into a decoder.

    Raises:
        UserError: If the folder is of another kind, needs what a decoder does not support, or its
            weights are missing, unknown, of the wrong shape or not finite.
    """
    config = _read_json(folder / CONFIG)
    try:
        if config.get("model_type") == EXPORTED_TYPE and "corrections" in config:
            decoder, origin = _exported(folder), EXPORTED
        elif "method" in config and "model_type" not in config:
            if (folder / PROVENANCE).is_file():
                check_checkpoint(folder)
            decoder, origin = Decoder.load(folder), CHECKPOINT
        else:
            decoder = decoder_from_published(config, _weights(folder))
            is_llama = decoder.config.method == "vanilla"
            origin = "a Llama folder" if is_llama else "the published naming"
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    file = folder / TOKENIZER
    return ExternalModel(
        decoder.float().eval(),
        file if file.is_file() else None,
        origin,
        {
            name: _valid_ids(_token_id(config, name, folder / CONFIG), decoder.config.vocab_size)
            for name in TOKEN_ID_NAMES
        },
    )


def model_folder_key(folder: Path) -> str:
    """Return the hash of the files that determine a folder's model: config and weights.

    Raises:
        UserError: If the folder has no config, or no safetensors.
    """
    _read_json(folder / CONFIG)
    return content_key([file_key(folder / name) for name in (CONFIG, *_weight_files(folder))])


def read_model_text_files(
    model: ExternalModel, folder: Path, tokenizer: Path | None
) -> dict[str, bytes]:
    """Return the `TEXT_FILES` for a checkpoint of this model, as name -> content.

    A model that was trained here needs none of them.

    Args:
        tokenizer: The `tokenizer.json` to use; the other files of the tokenizer are beside it.

    Raises:
        UserError: If one cannot be read, or the tokenizer cannot be loaded with them.
    """
    if model.origin == CHECKPOINT:
        return read_text_files(folder)
    token_ids = dict(model.token_ids)
    files: dict[str, bytes] = {}
    if (generation := folder / GENERATION_CONFIG).is_file():
        _token_id(_read_json(generation), "eos_token_id", generation)
        files[GENERATION_CONFIG] = generation.read_bytes()
    if tokenizer is None:
        was_trained_here = model.origin == EXPORTED and not any(token_ids.values())
    else:
        loaded, beside = _load_tokenizer(folder, tokenizer)
        files |= beside
        end = find_end_of_text_id(load_tokenizer(tokenizer))
        if token_ids["eos_token_id"] is None:
            token_ids["eos_token_id"] = end if loaded.eos_token_id is None else loaded.eos_token_id
        if token_ids["eos_token_id"] is None:
            end_of_text_id(load_tokenizer(tokenizer))  # Raises: says what is missing.
        has_own_tokens = loaded.bos_token_id is not None or loaded.chat_template
        is_usual = token_ids["eos_token_id"] == end and not has_own_tokens
        was_trained_here = model.origin == EXPORTED and is_usual
        files[TOKENIZER_CONFIG] = _tokenizer_config(loaded, beside, token_ids)
    return {} if was_trained_here else {**files, TOKEN_IDS: _json(token_ids)}


def _load_tokenizer(folder: Path, tokenizer: Path) -> tuple[Any, dict[str, bytes]]:
    """Load a tokenizer as transformers would; return it and the files beside it."""
    found = read_text_files(tokenizer.parent)
    files = {name: found[name] for name in TOKENIZER_FILES if name in found}
    if TOKENIZER_CONFIG in files:
        config = dict(_read_json(tokenizer.parent / TOKENIZER_CONFIG))
        config.pop("auto_map", None)  # No code of the folder runs.
        files[TOKENIZER_CONFIG] = _json(config)
    with TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copyfile(tokenizer, copy / TOKENIZER)
        for file, content in files.items():
            (copy / file).write_bytes(content)
        # The model's type may choose the tokenizer's class.
        model_type = _read_json(folder / CONFIG).get("model_type", "llama")
        (copy / CONFIG).write_bytes(_json({"model_type": model_type}))
        try:
            return load_transformers_tokenizer(copy), files
        except UserError as error:
            raise UserError(str(error).replace(name, str(tokenizer.parent))) from None


def _tokenizer_config(
    loaded: Any, beside: Mapping[str, bytes], token_ids: Mapping[str, Any]
) -> bytes:
    # A checkpoint's `config.json` names no tokenizer class; scoring needs a token before a text.
    config = json.loads(beside.get(TOKENIZER_CONFIG, b"{}"))
    config["tokenizer_class"] = type(loaded).__name__
    for name in ("bos_token", "eos_token"):
        token_id = token_ids[f"{name}_id"]
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if getattr(loaded, name) is None and type(token_id) is int and token_id < len(loaded):
            config[name] = loaded.convert_ids_to_tokens(token_id)
    return _json(config)


def stop_token_ids(checkpoint: Path) -> set[int]:
    """Return the tokens that end a text, from the files of an imported checkpoint.

    The set is empty if no file names one, as for a model that was trained here.

    Raises:
        UserError: If a file cannot be read.
    """
    stops: set[int] = set()
    for path in (checkpoint / TOKEN_IDS, checkpoint / GENERATION_CONFIG):
        if path.is_file():
            found = _token_id(_read_json(path), "eos_token_id", path)
            stops |= set(found if isinstance(found, list) else [] if found is None else [found])
    return {number for number in stops if number >= 0}


def _token_id(config: Mapping[str, Any], name: str, path: Path) -> int | list[int] | None:
    value: int | list[int] | None = config.get(name)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(type(number) is int for number in ids):
        raise UserError(
            f"{name} in {path} must be a token's number, or a list of them; got {value!r}"
        )
    return value


def _valid_ids(token_id: int | list[int] | None, num_tokens: int) -> int | list[int] | None:
    """Remove ids that are no tokens of the model: some configs write -1 for none."""
    if isinstance(token_id, list):
        return [number for number in token_id if 0 <= number < num_tokens] or None
    return token_id if token_id is not None and 0 <= token_id < num_tokens else None


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _exported(folder: Path) -> Decoder:
    # Not by transformers, which would replace missing weights with random ones.
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


def _weight_files(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors: those in its index if it has one, else all."""
    if (folder / SHARDS).is_file():
        names = sorted(_shard_names(folder / SHARDS))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / SHARDS} names a file outside its folder: {name!r}")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(
            f"{folder} has no safetensors; if its weights are pickled, load the model with "
            "transformers and save it with `save_pretrained`"
        )
    return names


def _shard_names(path: Path) -> set[str]:
    weight_map = _read_json(path).get("weight_map", {})
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} does not map the weights to files; copy the model again")
    return set(names)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} is no model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {shortened(str(error))}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no mapping")
    return found
