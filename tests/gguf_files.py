"""Writes tiny GGUF files as llama.cpp does: its names, its order of rows, its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiny_llama(*, tied: bool = True, **changes: Any) -> LlamaForCausalLM:
    """Make a Llama whose sizes are multiples of the blocks of quantized numbers."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "initializer_range": 0.2, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values | changes)).eval()


def write_llama(
    path: Path,
    llama: LlamaForCausalLM,
    *,
    kind: str = "F32",
    tokenizer: Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    left_out: Sequence[str] = (),
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """Write a model; matrices as `kind`, vectors as float32.

    The package gguf cannot quantize to every type; then matrices are random blocks of the type.

    Args:
        tokenizer: A byte-level `tokenizer.json`, which gets `SPECIAL_TOKENS` and `CHAT`.
        metadata: Other values; None leaves a key out.
        left_out: Tensors to leave out.
        tensors: More tensors, as they are.
    """
    import gguf

    config = llama.config
    values: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.vocab_size": config.vocab_size,
    }
    values |= tokenizer_values(tokenizer, config.vocab_size) if tokenizer else {}
    values |= metadata or {}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for name, value in values.items():
        _add(writer, name, value)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for name, weight in llama.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        gguf_name = _llama_cpp_name(name)
        array = weight.float().numpy()
        if gguf_name in left_out:
            continue
        if (part := gguf_name.rpartition("attn_")[2].removesuffix(".weight")) in heads:
            rows = array.reshape(heads[part], 2, -1, array.shape[-1])
            array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
        stored = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(gguf_name, _blocks(array, stored), raw_dtype=stored)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _blocks(array: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    import gguf

    try:
        quantized: np.ndarray[Any, Any] = gguf.quantize(array, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = (*array.shape[:-1], array.shape[-1] // block * size)
        # As the upper byte of a float16, none of these makes it infinite or no number.
        quantized = np.random.default_rng(0).integers(0, 0x3C, shape).astype(np.uint8)
    return quantized


def _llama_cpp_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_PARTS[part.removesuffix('.weight')]}.weight"


def tokenizer_values(file: Path, vocab_size: int) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    numbers = tokenizer.get_vocab()
    tokens = sorted(numbers, key=numbers.__getitem__)
    is_special = [token in (*SPECIAL_TOKENS, "<|endoftext|>") for token in tokens]
    unused = [f"[PAD{number}]" for number in range(len(tokens), vocab_size)]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + unused,
        "tokenizer.ggml.token_type": [3 if special else 1 for special in is_special]
        + [5] * len(unused),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": numbers["<|im_start|>"],
        "tokenizer.ggml.eos_token_id": numbers["<|im_end|>"],
        "tokenizer.ggml.unknown_token_id": numbers["<|endoftext|>"],
        "tokenizer.ggml.padding_token_id": numbers["<|im_end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT,
    }


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):  # First, as a bool is an int, too.
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)
