"""Read and write GGUF files, llama.cpp's format of one file for a whole model.

To read one, transformers reads weights and tokenizer; the file may be quantized, and each weight
becomes the float32 number that it stands for. Three things are added here. Missing weights, and
settings that transformers ignores, such as scaled rotary angles, are errors. And of the rule that
cuts text into words before the merges, the file has only a name: where transformers does not know
it, it silently cuts by GPT-2's, so the rules that are known stand here, and others are refused. A
file is written for the models that llama.cpp can compute: vanilla and looped ones.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers

from iiet.config import ATTENTION_OPTIONS
from iiet.decoder import Decoder, decoder_from_published
from iiet.weights import CONFIG
from orchestrator.models.hub import offline
from orchestrator.models.labels import model_name
from orchestrator.models.tokenizer import ModelTokenizer, token_ids
from orchestrator.workspace.errors import UserError, first_line, quoted

_PREFIX = "llama."
# For a missing entry, transformers takes a default; without the heads it reads weights wrongly.
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

# How a token is used, as `gguf.TokenType` numbers it; the package is optional.
_NORMAL = 1
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5

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
    gguf = _import_gguf(f"reading {path}")
    try:
        reader = gguf.GGUFReader(path)
        metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # A damaged file fails in many ways.
        raise UserError(
            f"cannot read {path}: it is not a GGUF file, is damaged, or is newer than the "
            f"installed package gguf ({first_line(error, with_type=True)})"
        ) from None

    # What transformers would ignore: unknown entries, missing ones, and heads of other sizes.
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
        # It says how the file is packed; these weights are unpacked.
        del model_values["quantization_config"]
        return decoder_from_published(model_values, model.state_dict())
    except Exception as error:  # Types that cannot be unpacked, shapes that do not fit.
        reason = first_line(error, with_type=not isinstance(error, ValueError))
        raise UserError(f"cannot use {path}: {reason}") from None


def _import_gguf(task: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError(
            f"{task} needs the package gguf, which is not installed; "
            "`pip install 'iiet-orch[gguf]'` installs it"
        ) from None
    return gguf


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


def write_gguf(path: Path, decoder: Decoder, folder: Path) -> None:
    """Write a decoder as a file that llama.cpp runs, with float32 weights.

    A vanilla decoder is llama.cpp's `llama`. A looped one is its `nanbeige`, which runs the stack
    `num_loops` times with key/value slots for each run; its norm between two runs is switched off.

    Args:
        path: The file to write.
        decoder: The model, under the schedule that the file shall have.
        folder: Model folder with its tokenizer.

    Raises:
        UserError: If llama.cpp has no counterpart of the method or the tokenizer.
    """
    config = decoder.config
    if config.method not in ("vanilla", "looped"):
        raise UserError(
            f"llama.cpp cannot run a model of the method {config.method!r}: it has no counterpart "
            "of what a method computes beside the layers, such as mix and norms; only vanilla and "
            "looped models have a GGUF file"
        )
    # A configuration writes an option only if it is not that of a plain Llama.
    config_values = config.to_dict()
    if options := [name for name in ("head_dim", *ATTENTION_OPTIONS) if name in config_values]:
        raise UserError(
            f"a GGUF file is written of models with the attention of a plain Llama; this one has "
            f"{', '.join(options)}; export it for transformers instead"
        )
    gguf = _import_gguf(f"writing {path}")
    # A looped model has the same number of corrections in all layers.
    num_loops = 1 + config.schedule[0] if config.schedule else 1
    writer = gguf.GGUFWriter(path, "llama" if num_loops == 1 else "nanbeige")
    writer.add_name(model_name(folder))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if num_loops > 1:
        writer.add_uint32("nanbeige.num_loops", num_loops)
        writer.add_bool("nanbeige.skip_loop_final_norm", True)
    _add_tokenizer(writer, folder, config.vocab_size)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, weight in decoder.state_dict().items():
        module, _, suffix = name.rpartition(".")
        rows = weight.float()
        if num_heads := heads.get(module.rpartition(".")[2]):
            # llama.cpp turns neighbouring numbers of a head together, this project its halves.
            halves = rows.reshape(num_heads, 2, -1, config.dim)
            rows = halves.transpose(1, 2).reshape(rows.shape)
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", rows.contiguous().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    model_tokenizer = ModelTokenizer(folder)
    tokenizer: Any = model_tokenizer.tokenizer
    model = {"type": "unknown"}
    rule = None
    if tokenizer:
        model = json.loads(tokenizer.to_str())["model"]
        # Two rules that cut text in the same way are equal by their state, not by `==`.
        state = tokenizer.pre_tokenizer.__getstate__() if tokenizer.pre_tokenizer else None
        rule = next((name for name, cut in _RULES.items() if cut.__getstate__() == state), None)
    if model["type"] != "BPE" or rule is None or tokenizer.normalizer is not None:
        raise UserError(
            f"llama.cpp cannot read text as the tokenizer of {folder} does, which is of the kind "
            f"{model['type']}; a GGUF file can have a byte-level BPE, as models trained on text "
            "have here, or SmolLM's, but not the words of a depth task"
        )
    # Rows of the embedding beyond the vocabulary get names, too.
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    added_tokens = tokenizer.get_added_tokens_decoder()
    for token, number in tokenizer.get_vocab().items():
        tokens[number] = token
        if number not in added_tokens:
            kinds[number] = _NORMAL
        elif added_tokens[number].special:
            kinds[number] = _CONTROL
        else:
            kinds[number] = _USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    end_ids = token_ids(folder, "eos_token_id") or sorted(model_tokenizer.end_ids)
    writer.add_eos_token_id(end_ids[0])
    if len(end_ids) > 1:
        writer.add_eot_token_id(end_ids[1])
    writer.add_bos_token_id(model_tokenizer.prefix_id)
    # As `generate` reads a prompt: models that were trained here begin after the end of a text.
    text_alone = model_tokenizer.encode("a", add_special_tokens=False)
    writer.add_add_bos_token(model_tokenizer.encode_document("a") != text_alone)
    loaded = model_tokenizer.loaded
    if loaded is not None and isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
