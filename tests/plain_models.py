"""Tiny random models of the plain types of transformers that decoders read."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
    "initializer_range": 0.2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SCALED = {"factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED}
_YARN = {"rope_type": "yarn", **_SCALED}
_WINDOW = {"use_sliding_window": True, "sliding_window": 6}
_EVERY_OTHER = ["sliding_attention", "full_attention"] * 2
CASES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama3": {"rope_parameters": _LLAMA3, "head_dim": 16, "tie_word_embeddings": True},
    "llama biases": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2 windows": {**_WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "qwen3 yarn": {"head_dim": 8, "rope_parameters": _YARN},
    "qwen3 layer types": {"head_dim": 8, **_WINDOW, "layer_types": _EVERY_OTHER},
    "smollm3": {},
    "smollm3 windows": {
        **_WINDOW, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Name, whose first word is the `model_type`, and what its config has beside the sizes."""


def random_values(model_type: str, draw: Random) -> dict[str, Any]:
    """Return sizes and options of a config of the type, any that a decoder reads."""
    num_kv_heads = draw.choice([1, 2, 3])
    num_heads = num_kv_heads * draw.choice([1, 2, 3])
    num_layers = draw.randint(1, 4)
    head_dim = draw.choice([4, 8, 12])
    values: dict[str, Any] = {
        "vocab_size": draw.randint(30, 80), "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "hidden_size": num_heads * head_dim, "intermediate_size": draw.randint(5, 40),
        "rms_norm_eps": draw.choice([1e-6, 1e-5]), "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": 0.1,
    }  # fmt: skip
    if model_type in ("llama", "mistral", "qwen3"):
        values["head_dim"] = draw.choice([4, 8, 16])
    if model_type in ("llama", "qwen3", "smollm3"):
        values["attention_bias"] = draw.random() < 0.5
    theta = draw.choice([100.0, 10000.0, 500000.0])
    original = draw.choice([8, 16, 32])
    length = {"factor": draw.uniform(1.5, 8.0), "original_max_position_embeddings": original}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": draw.uniform(2.0, 6.0), **length}
    rope = {
        "default": {}, "linear": {"factor": length["factor"]}, "llama3": llama3,
        "yarn": {**length, "beta_fast": draw.uniform(8.0, 40.0), "beta_slow": draw.uniform(0.5, 2)},
    }  # fmt: skip
    rope_type = draw.choice(list(rope))
    values["rope_parameters"] = {"rope_type": rope_type, "rope_theta": theta, **rope[rope_type]}
    if model_type == "mistral":
        values["sliding_window"] = draw.choice([None, draw.randint(2, 20)])
    if model_type == "smollm3":
        values["no_rope_layers"] = [draw.randint(0, 1) for _ in range(num_layers)]
    if model_type in ("qwen2", "qwen3", "smollm3") and draw.random() < 0.7:
        values |= {"use_sliding_window": True, "sliding_window": draw.randint(2, 20)}
        if model_type != "smollm3":
            values["max_window_layers"] = draw.randint(0, num_layers)
    return values


def config_of(case: str, **changes: Any) -> Any:
    """Return transformers' config of a case."""
    model_type = "llama" if case == "llama3" else case.split()[0]
    return AutoConfig.for_model(model_type, **{**SIZES, **CASES[case], **changes})


def random_model(case: str, seed: int = 0, **changes: Any) -> Any:
    """Return transformers' model of a case; biases and norms are random, too."""
    # Of the CPU alone: `torch.manual_seed` formats a traceback for each kind of GPU.
    torch.default_generator.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(case, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
