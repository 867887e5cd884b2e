"""Read a GGUF file, llama.cpp's format of one file for a whole model.

transformers reads weights and tokenizer; the file may be quantized, and each weight becomes the
float32 number that it stands for. Three things are added here. Missing weights, and settings that
transformers ignores, such as scaled rotary angles, are errors. And of the rule that cuts text into
words before the merges, the file has only a name: where transformers does not know it, it silently
cuts by GPT-2's, so the rules that are known stand here, and others are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from iiet.decoder import Decoder
from iiet.published import decoder_from_published
from iiet.weights import CONFIG
from orchestrator.models.hub import offline
from orchestrator.workspace.errors import UserError, first_line, quoted

_PREFIX = "llama."
# transformers takes its own defaults for missing ones, and reads weights wrongly without the heads.
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
"""Value of `tokenizer.ggml.pre` -> how text is cut. Source: llama.cpp, `llama-vocab.cpp`."""


def read_gguf(path: Path, texts: Path | None = None, *, with_tokenizer: bool = True) -> Decoder:
    """Return the model of a file as a vanilla decoder with float32 weights.

    Args:
        path: The file.
        texts: Folder that gets what a model folder says about text: `config.json` with the tokens
            that begin and end one, and the files of the tokenizer.
        with_tokenizer: Whether these files are wanted.

    Raises:
        UserError: If it is not a GGUF file, is damaged, holds another architecture or what the
            decoder does not do, or has no tokenizer of a known kind.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(
            f"reading {path} needs the package gguf, which is not installed; "
            "`pip install 'iiet-orch[gguf]'` installs it"
        ) from None
    try:
        reader = GGUFReader(path)
        metadata: dict[str, Any] = {n: field.contents() for n, field in reader.fields.items()}
    except Exception as error:  # A damaged file fails in many ways.
        raise UserError(
            f"cannot read {path}: it is not a GGUF file, is damaged, or is newer than the "
            f"installed package gguf ({first_line(error, with_type=True)})"
        ) from None

    # What transformers would ignore.
    values = {n.removeprefix(_PREFIX): v for n, v in metadata.items() if n.startswith(_PREFIX)}
    wrong = {n: v for n, v in values.items() if n not in _KNOWN and v not in _SWITCHED_OFF}
    wrong |= {n: values.get(n) for n in _REQUIRED if not isinstance(values.get(n), int | float)}
    if not wrong:
        size = values["embedding_length"] // values["attention.head_count"]
        wrong = {name: values[name] for name in _HEAD_SIZES if values.get(name, size) != size}
    problems = [f"{_PREFIX}{name}={value!r}" for name, value in sorted(wrong.items())]
    names = [tensor.name for tensor in reader.tensors]
    problems += [f"the tensor {name}" for name in names if not _KNOWN_TENSORS.fullmatch(name)]
    if (architecture := metadata.get("general.architecture")) != "llama":
        problems = [f"the architecture {architecture!r}"]
    if problems:
        raise UserError(f"{path} needs what the decoder does not do: {', '.join(problems[:5])}")

    if texts:
        tokens = ("bos", "eos", "eot", "padding")
        first, *ends, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in tokens)
        ends = [number for number in dict.fromkeys(ends) if number is not None]
        ids = {"bos_token_id": first, "eos_token_id": ends or None, "pad_token_id": pad}
        (texts / CONFIG).write_text(json.dumps({"model_type": "llama", **ids}))
        if with_tokenizer:
            _write_tokenizer(path, metadata, texts)
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with offline():
            model, found = load(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
        # It fills missing weights with random numbers.
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"missing {', '.join(missing)}")
        return decoder_from_published(model.config.to_dict(), model.state_dict())
    except Exception as error:  # Types that cannot be unpacked, shapes that do not fit.
        line = first_line(error, with_type=not isinstance(error, ValueError))
        raise UserError(f"cannot use {path}: {line}") from None


def _write_tokenizer(path: Path, metadata: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    kind, rule = (metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
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
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"cannot build the tokenizer of {path}: {first_line(error)}; give the model's own "
            "tokenizer.json with --tokenizer FILE"
        ) from None
