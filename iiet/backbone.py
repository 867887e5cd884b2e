"""All of a decoder but its head: embedding, layers, what the layers share, and the last norm.

It comes before the decoder, because costs are counted on it (`iiet.cost`), and drafts need costs.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from iiet.methods import METHODS, Layer
from iiet.model.config import ModelConfig
from iiet.model.layers import RMSNorm, make_embedding

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """The modules that transformers' Llama calls `model`; `iiet.decoder` runs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        method = METHODS[config.method]
        self.embed_tokens = make_embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(method(config, layer) for layer in range(config.num_layers))
        self.shared = method.make_shared(config)
        self.norm = RMSNorm(config.dim, eps=config.rms_norm_eps)

    def method_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that a plain Llama of the same sizes does not have, by name."""
        llama = {self.embed_tokens.weight, *self.norm.parameters()}
        for layer in self.layers:
            llama.update(cast("Layer", layer).field_parameters())
        return {name: p for name, p in self.named_parameters() if p not in llama}
