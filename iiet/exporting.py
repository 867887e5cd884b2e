"""Export a decoder to a folder that transformers and lm-eval load without this package.

A vanilla decoder becomes a folder of a `model_type` of transformers, without code
(`iiet.hf.plain_models`). That of another method is a model folder (`iiet.hf.weights`) with
`modeling_iiet.py`, the decoder as a model of transformers in one file, a copy of that of the
method's family. `transformers_model` makes such a model here. Both have tokenizer files.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.hf.plain_models import plain_config_json
from iiet.hf.weights import LazyTensor, config_to_json, write_files
from iiet.methods import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["CODE", "export", "fast_tokenizer", "transformers_model"]

CODE = "modeling_iiet.py"
"""The file of an exported folder that transformers loads, if the model is not plain."""
_AUTO_MAP = {
    "AutoConfig": "modeling_iiet.IIETConfig",
    "AutoModel": "modeling_iiet.IIETModel",
    "AutoModelForCausalLM": "modeling_iiet.IIETForCausalLM",
    "AutoModelForSequenceClassification": "modeling_iiet.IIETForSequenceClassification",
    # `transformers serve` looks for the name in `architectures` among its own classes alone, but
    # asks this one first, and it takes a class of the folder.
    "AutoModelForDecision": "modeling_iiet.IIETForCausalLM",
}
_FAMILIES = {
    "iiet": "modeling_iiet",
    "pcformer": "modeling_pcformer",
    "pcformer_rk4": "modeling_pcformer",
    "looped": "modeling_looped",
    "vanilla": "modeling_explicit",
    "ode_rk2": "modeling_explicit",
    "ode_rk4": "modeling_explicit",
    "ode_rk2_gated": "modeling_explicit",
}
"""Method of this package -> the module here that computes it with transformers. Vanilla has one for
options of attention that no `model_type` of transformers has together."""
TokenIds = Mapping[str, int | list[int] | None]


def export(
    decoder: Decoder,
    folder: str | PathLike[str],
    tokenizer_file: str | PathLike[str] | None = None,
    *,
    end_of_text: str = "<|endoftext|>",
    token_ids: TokenIds | None = None,
    text_files: Mapping[str, bytes] | None = None,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int | None = None,
) -> Path:
    """Write everything that `AutoModelForCausalLM.from_pretrained(folder)` needs.

    Args:
        decoder: exported with its own iteration schedule as the default.
        folder: made if missing; files of the same names are overwritten.
        tokenizer_file: a `tokenizer.json`; without it no tokenizer is written.
        end_of_text: the tokenizer's token that ends a document.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, instead of `end_of_text`.
        text_files: name to content of the model's own files for tokenizer and generation, as
            transformers writes them; made from `end_of_text` when not given.
        model_type: of the model that a vanilla decoder comes from; the folder has this type where
            it can, else the first of `iiet.hf.plain_models.MODEL_TYPES` that computes the same.
        dtype: of the stored weights, except those that a method keeps in float32; the decoder's
            when not given. Each weight is converted when it is written.
        max_file_bytes: more weights are written to several files.

    Raises:
        OverflowError: a weight is too large for the dtype.
        ValueError: the tokenizer has no such token, or the method is of another package and brings
            no code for transformers.
    """
    folder = Path(folder)
    plain_values = plain_config_json(decoder.config, model_type)
    code = modeling_file(decoder.config.method) if plain_values is None else None
    tokenizer = None
    if tokenizer_file is not None and not text_files:
        tokenizer = fast_tokenizer(
            tokenizer_file,
            end_of_text=end_of_text,
            context_length=decoder.config.context_length,
        )
        end = tokenizer.eos_token_id
        token_ids = token_ids or {"eos_token_id": end, "pad_token_id": end}
    weights: Mapping[str, Tensor | LazyTensor] = decoder.state_dict()
    if dtype is not None:
        weights = _converted(decoder, dtype)
    stored_dtype = dtype or decoder.model.embed_tokens.weight.dtype
    further_values = {"dtype": str(stored_dtype).removeprefix("torch."), **(token_ids or {})}
    if plain_values is not None:
        values = {**plain_values, **further_values}
    else:
        assert code is not None, "a decoder that is not plain has code"
        values = {**config_to_json(decoder.config), "auto_map": _AUTO_MAP, **further_values}
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(code, folder / CODE)
    write_files(folder, values, weights, max_file_bytes=max_file_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    for name, content in (text_files or {}).items():
        (folder / name).write_bytes(content)
    return folder


def _converted(decoder: Decoder, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Return the weights as they are in a decoder of this dtype, converted when they are read."""
    with torch.device("meta"):
        pattern = Decoder(decoder.config).to(dtype).state_dict()

    def convert(name: str, tensor: Tensor) -> LazyTensor:
        def read(rows: slice | EllipsisType) -> Tensor:
            converted = tensor[rows].to(pattern[name].dtype)
            if not converted.isfinite().all():
                raise OverflowError(f"{name} has values that are too large for {dtype}")
            return converted

        return LazyTensor(tuple(tensor.shape), pattern[name].dtype, read)

    return {name: convert(name, tensor) for name, tensor in decoder.state_dict().items()}


def modeling_file(method: str) -> Path:
    """Return the file of transformers code that computes a method.

    Raises:
        ValueError: the method is of another package, which has none.
    """
    if method in _FAMILIES:
        return Path(__file__).parent / "hf" / f"{_FAMILIES[method]}.py"
    layer = METHODS[method]
    if layer.facts.modeling_file is None:
        raise ValueError(
            f"method {method!r} of another package cannot be exported: its facts have no "
            "modeling_file, a file like iiet/hf/modeling_iiet.py that also computes this method"
        )
    return Path(inspect.getfile(layer)).parent / layer.facts.modeling_file


def transformers_model(decoder: Decoder, *, token_ids: TokenIds | None = None) -> PreTrainedModel:
    """Return a model of transformers that shares the decoder's weights.

    `token_ids` are `bos_token_id`, `eos_token_id` and `pad_token_id`. A method of another package
    is a KeyError.
    """
    module = importlib.import_module(f"iiet.hf.{_FAMILIES[decoder.config.method]}")
    values: dict[str, Any] = {**config_to_json(decoder.config), **(token_ids or {})}
    config = module.IIETConfig(**values)
    with torch.device("meta"):  # The weights made here are thrown away, so they take no memory.
        model: Any = module.IIETForCausalLM(config)
    # No weights, so the decoder does not have them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(decoder.device)
    model.load_state_dict(decoder.state_dict(), assign=True, strict=decoder.lm_head is not None)
    model.tie_weights()
    made: PreTrainedModel = model.train(decoder.training)
    return made


def fast_tokenizer(
    tokenizer_file: str | PathLike[str], *, end_of_text: str, context_length: int
) -> PreTrainedTokenizerFast:
    """Wrap a `tokenizer.json`, written by the tokenizers library, for transformers and lm-eval.

    Args:
        tokenizer_file: the file.
        end_of_text: the token that ends a document; it also pads, and opens an empty context. A
            tokenizer without it is a ValueError.
        context_length: longest input of the model, in tokens.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(tokenizer_file),
        model_max_length=context_length,
        padding_side="left",
    )
    # Looked up first: setting it as a special token would add it, beyond the model's embeddings.
    if end_of_text not in tokenizer.get_vocab():
        raise ValueError(f"the tokenizer {tokenizer_file} has no token {end_of_text!r}")
    tokenizer.eos_token = end_of_text
    tokenizer.pad_token = end_of_text
    return tokenizer
