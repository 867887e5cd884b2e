"""The random weights of a new decoder, drawn in its constructor or one module at a time.

A sharded model is made on the meta device, and no worker has room for all of its weights. So
`initial_weights` draws what the constructor would have drawn, from the same random numbers, and
holds one module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["draw_weights", "initial_weights", "make_embedding"]


def make_embedding(num_rows: int, dim: int) -> nn.Embedding:
    """Return an embedding on the current device; weights are not drawn on the meta device.

    Drawing there would import PyTorch's compiler, which takes a second.
    """
    if torch.get_default_device().type == "meta":
        weight = torch.empty(num_rows, dim)
        made: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        return made
    return nn.Embedding(num_rows, dim)


def draw_weights(module: nn.Module, std: float) -> None:
    """Draw a linear layer's or an embedding's weights from a normal distribution; zero its bias.

    On the meta device there is nothing to draw.
    """
    if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def initial_weights(decoder: nn.Module, std: float) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight), drawn as by the constructor of a decoder, on the CPU.

    Args:
        decoder: on the meta device, and so afterwards.
        std: the config's `initializer_std`.
    """
    drawn = (nn.Linear, nn.Embedding)
    # PyTorch's constructors draw weights that the decoder's replaces; they take random numbers.
    for module in decoder.modules():
        if isinstance(module, drawn):
            _reset_on_cpu(module)
            module.to_empty(device="meta", recurse=False)
    for prefix, module in decoder.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, drawn):
            draw_weights(module.to_empty(device="cpu", recurse=False), std)
        else:
            _reset_on_cpu(module)
        for name in own:
            yield f"{prefix}.{name}", getattr(module, name).detach()
        module.to_empty(device="meta", recurse=False)


def _reset_on_cpu(module: nn.Module) -> None:
    module.to_empty(device="cpu", recurse=False)
    module.reset_parameters()  # type: ignore[operator]
