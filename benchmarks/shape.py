"""The shape that all benchmarks share: heads of 64, a feed-forward width of 2.75 d."""

from __future__ import annotations

import torch

from iiet.config import ModelConfig, preset
from iiet.decoder import Decoder


def shaped_config(
    dim: int,
    *,
    num_layers: int,
    vocab_size: int,
    context_length: int,
    method: str = "iiet",
    num_corrections: int | None = None,
) -> ModelConfig:
    """Return a config of that shape; below a width of 64 there is one head.

    `num_corrections` is per layer; None: the preset's.
    """
    schedule = {} if num_corrections is None else {"schedule": num_corrections}
    return preset(
        "tiny",
        method=method,
        dim=dim,
        num_layers=num_layers,
        num_heads=max(1, dim // 64),
        ffn_dim=dim * 11 // 4,
        vocab_size=vocab_size,
        context_length=context_length,
        **schedule,
    )


def fresh_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder with the same weights at each call."""
    torch.manual_seed(0)
    return Decoder(config)
