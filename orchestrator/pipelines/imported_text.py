"""The text files of an imported model's checkpoint: tokenizer, special tokens, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iiet.weights import CONFIG
from orchestrator.data.tokenizer import (
    end_of_text_id,
    find_end_of_text_id,
    load_tokenizer,
    load_transformers_tokenizer,
)
from orchestrator.evaluation.model_tokenizer import read_token_ids
from orchestrator.training.checkpoint import (
    GENERATION_CONFIG,
    TOKEN_IDS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_text_files,
)
from orchestrator.training.model_loading import CHECKPOINT, EXPORTED, folder_kind, read_config
from orchestrator.workspace.errors import UserError

TOKEN_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja")


def read_model_text_files(
    folder: Path, tokenizer: Path | None, *, vocab_size: int
) -> dict[str, bytes]:
    """Return the `TEXT_FILES` for a checkpoint of a folder's model, as name -> content.

    A model that was trained here needs none of them.

    Args:
        folder: Model folder of any kind.
        vocab_size: Number of tokens of the model.
        tokenizer: The `tokenizer.json` to use; the other files of the tokenizer are beside it.

    Raises:
        UserError: If one cannot be read, or the tokenizer cannot be loaded with them.
    """
    kind = folder_kind(folder)
    if kind == CHECKPOINT:
        return read_text_files(folder)
    token_ids: dict[str, Any] = {}
    for name in TOKEN_ID_NAMES:
        # Some configurations write -1 for none.
        ids = [n for n in read_token_ids(folder / CONFIG, name) if 0 <= n < vocab_size]
        is_list = isinstance(read_config(folder)[name], list) if ids else False
        token_ids[name] = (ids if is_list else ids[0]) if ids else None
    files: dict[str, bytes] = {}
    if (generation := folder / GENERATION_CONFIG).is_file():
        read_token_ids(generation, "eos_token_id")  # Raises if it is damaged.
        files[GENERATION_CONFIG] = generation.read_bytes()
    if tokenizer is None:
        was_trained_here = kind == EXPORTED and not any(token_ids.values())
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
        was_trained_here = kind == EXPORTED and is_usual
        files[TOKENIZER_CONFIG] = _tokenizer_config(loaded, beside, token_ids)
    return {} if was_trained_here else {**files, TOKEN_IDS: _json(token_ids)}


def _load_tokenizer(folder: Path, tokenizer: Path) -> tuple[Any, dict[str, bytes]]:
    """Load a tokenizer as transformers would; return it and the files beside it."""
    found = read_text_files(tokenizer.parent)
    files = {name: found[name] for name in TOKENIZER_FILES if name in found}
    if TOKENIZER_CONFIG in files:
        config = dict(read_config(tokenizer.parent, TOKENIZER_CONFIG))
        config.pop("auto_map", None)  # No code of the folder runs.
        files[TOKENIZER_CONFIG] = _json(config)
    with TemporaryDirectory() as name:
        copy = Path(name)
        shutil.copyfile(tokenizer, copy / TOKENIZER)
        for file, content in files.items():
            (copy / file).write_bytes(content)
        # The model's type may choose the tokenizer's class.
        model_type = read_config(folder).get("model_type", "llama")
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


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
