"""What models read in this process, seen where PyTorch embeds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@dataclass
class ReadTokens:
    """The tokens of each forward pass, of shape (batch, time)."""

    trained: list[Tensor] = field(default_factory=list)
    """Those of passes with gradients."""
    others: list[Tensor] = field(default_factory=list)
    """Those of passes without, such as a validation's."""


@contextmanager
def noted_tokens() -> Iterator[ReadTokens]:
    """Note what models read in the block."""
    read = ReadTokens()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Embedding):
            (read.trained if torch.is_grad_enabled() else read.others).append(inputs[0])

    with register_module_forward_pre_hook(note):
        yield read
