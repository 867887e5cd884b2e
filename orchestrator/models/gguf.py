"""Read GGUF files, llama.cpp's format of one file for a whole model.

transformers reads weights and tokenizer; quantized weights are converted to float32. This module
adds checks. Missing weights are errors, and so are settings that transformers ignores, such as
scaled rotary angles. A file has only the name of the rule that splits text into words before the
BPE merges. For an unknown name, transformers silently uses GPT-2's rule; so the known rules are
listed here, and others are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from iiet.decoder import Decoder, decoder_from_published
from iiet.hf.weights import CONFIG
from orchestrator.models.hub import offline
from orchestrator.workspace.errors import UserError, first_line, quoted

_PREFIX = "llama."
# transformers has defaults for missing entries; without the heads it reads weights wrongly.
_REQUIRED = {
    *("embedding_length", "block_count", "feed_forward_length", "context_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
}
_HEAD_SIZES = {"rope.dimension_count", "attention.key_length", "attention.value_length"}
_KNOWN = {*_REQUIRED, *_HEAD_SIZES, "rope.freq_base", "vocab_size", "tensor_data_layout"}
_SWITCHED_OFF = (0, False, "", "none")
_KNOWN_TENSORS = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))"
    r"\.weight"
)

_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS_AND_WORDS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])
_RULES = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS_AND_WORDS),
}
"""Value of `tokenizer.ggml.pre` -> how text is split. Source: llama.cpp, `llama-vocab.cpp`."""


def read_gguf(path: Path, texts: Path | None = None, *, with_tokenizer: bool = True) -> Decoder:
    """Return the model of a file as a vanilla decoder with float32 weights.

    Args:
        path: The file.
        texts: Folder for a model folder's text files: `config.json` with the tokens that begin and
            end a text, and the files of the tokenizer.
        with_tokenizer: Whether these files are wanted.

    Raises:
        UserError: If it is not a GGUF file, is damaged, has another architecture or features that
            the decoder lacks, or has no tokenizer of a known kind.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"reading {path} needs the package gguf, which is not installed; "
            "`pip install 'iiet-orch[gguf]'` installs it"
        ) from None
    try:
        reader = gguf.GGUFReader(path)
        metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # A damaged file fails in many ways.
        raise UserError(
            f"cannot read {path}: it is not a GGUF file, is damaged, or is newer than the "
            f"installed package gguf ({first_line(error, with_type=True)})"
        ) from None

    # Find what transformers would ignore: unknown or missing entries, and heads of other sizes.
    values = {
        name.removeprefix(_PREFIX): value
        for name, value in metadata.items()
        if name.startswith(_PREFIX)
    }
    wrong_values = {
        name: value
        for name, value in values.items()
        if name not in _KNOWN and value not in _SWITCHED_OFF
    }
    for name in _REQUIRED:
        if not isinstance(values.get(name), int | float):
            wrong_values[name] = values.get(name)
    if not wrong_values:
        head_size = values["embedding_length"] // values["attention.head_count"]
        for name in _HEAD_SIZES:
            if values.get(name, head_size) != head_size:
                wrong_values[name] = values[name]
    problems = [f"{_PREFIX}{name}={value!r}" for name, value in sorted(wrong_values.items())]
    for tensor in reader.tensors:
        if not _KNOWN_TENSORS.fullmatch(tensor.name):
            problems.append(f"the tensor {tensor.name}")
    if (architecture := metadata.get("general.architecture")) != "llama":
        problems = [f"the architecture {architecture!r}"]
    if problems:
        raise UserError(f"{path} needs what the decoder does not do: {', '.join(problems[:5])}")

    if texts:
        special_ids = {
            name: metadata.get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "eot", "padding")
        }
        # A chat model may end a turn (eot) otherwise than a text (eos).
        end_ids = dict.fromkeys([special_ids["eos"], special_ids["eot"]])
        config = {
            "model_type": "llama",
            "bos_token_id": special_ids["bos"],
            "eos_token_id": [number for number in end_ids if number is not None] or None,
            "pad_token_id": special_ids["padding"],
        }
        (texts / CONFIG).write_text(json.dumps(config))
        if with_tokenizer:
            _write_tokenizer(path, metadata, texts)
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with offline():
            model, loading_info = load(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        # transformers fills missing weights with random numbers.
        if missing := sorted(loading_info["missing_keys"]):
            raise ValueError(f"missing {', '.join(missing)}")
        model_values = model.config.to_dict()
        # Describes quantization, but these weights are float32.
        del model_values["quantization_config"]
        return decoder_from_published(model_values, model.state_dict())
    except Exception as error:  # Types that cannot be unpacked, shapes that do not fit.
        reason = first_line(error, with_type=not isinstance(error, ValueError))
        raise UserError(f"cannot use {path}: {reason}") from None


def _write_tokenizer(path: Path, metadata: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    kind = metadata.get("tokenizer.ggml.model")
    rule = metadata.get("tokenizer.ggml.pre")
    is_sentencepiece = kind == "llama" and metadata.get("tokenizer.ggml.add_space_prefix", True)
    try:
        if not is_sentencepiece and (kind != "gpt2" or rule not in _RULES):
            raise ValueError(
                f"it is of the kind {quoted(kind)} and cuts by the rule {quoted(rule)}; known are "
                f"gpt2 with the rules {', '.join(sorted(_RULES))}, and llama with a space "
                "before each text"
            )
        with offline():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if not is_sentencepiece:
            tokenizer.backend_tokenizer.pre_tokenizer = _RULES[str(rule)]
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises plain `Exception`.
        raise UserError(
            f"cannot build the tokenizer of {path}: {first_line(error)}; give the model's own "
            "tokenizer.json with --tokenizer FILE"
        ) from None
