"""Tiny random models of the plain types of transformers that decoders read."""

from __future__ import annotations

from collections.abc import Mapping
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


def config_of(case: str, **changes: Any) -> Any:
    """Return transformers' config of a case."""
    model_type = "llama" if case == "llama3" else case.split()[0]
    return AutoConfig.for_model(model_type, **{**SIZES, **CASES[case], **changes})


def random_model(case: str, **changes: Any) -> Any:
    """Return transformers' model of a case; biases and norms are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
