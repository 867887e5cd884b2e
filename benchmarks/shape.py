"""What several benchmarks share: one shape of models, and a check of decoded tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from iiet import Decoder, ModelConfig, preset

SHAPE = "heads of 64, ffn 2.75 d, float32"
"""What `shaped_config` does not take as an argument, for the reports."""


def shaped_config(
    dim: int,
    num_layers: int,
    vocab_size: int,
    context_length: int,
    *,
    method: str = "iiet",
    schedule: int | None = None,
) -> ModelConfig:
    """Return a config with heads of 64 (below that width one head) and a feed-forward of 2.75 d.

    `schedule`: corrections of each layer; None: the preset's.
    """
    return preset(
        "tiny",
        method=method,
        dim=dim,
        num_layers=num_layers,
        num_heads=max(1, dim // 64),
        ffn_dim=dim * 11 // 4,
        vocab_size=vocab_size,
        context_length=context_length,
        **({} if schedule is None else {"schedule": schedule}),
    )


def fresh_decoder(config: ModelConfig) -> Decoder:
    """Return a decoder with the same weights at each call."""
    torch.manual_seed(0)
    return Decoder(config)


def random_tokens(vocab_size: int, *shape: int) -> Tensor:
    """Return the same tokens at each call."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def largest_regret(decoder: Decoder, prompt: Tensor, new_tokens: int) -> float:
    """Return by how much a greedily decoded token's logit is below the largest one, at most.

    Logits are those of the full forward pass, the unit is their standard deviation. Rounding alone
    makes it positive where two tokens are almost equally likely.
    """
    tokens = decoder.eval().generate(prompt, max_new_tokens=new_tokens)
    with torch.inference_mode():
        logits = decoder(tokens)[:, prompt.size(1) - 1 : -1].float()
    chosen = logits.gather(-1, tokens[:, prompt.size(1) :, None])
    return float((logits.amax(-1, keepdim=True) - chosen).max() / logits.std())
