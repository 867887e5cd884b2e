"""Drop whole layers of a decoder: the plain way to make a model cheaper, and a baseline for IIAD.

A dropped layer d passes the hidden state on and repeats the estimate before it:

    h_d = h_{d-1};   s_d = s_{d-1}

So in each later row of A and C the weight of s_d moves to the last kept estimate before it (`s_0`,
the embeddings, if all layers before d are dropped), and every row keeps its sum:

    A'[l,k] = sum of A[l,j] over the kept k and the dropped j that follow it

Methods without a mix lose the layer and nothing else. Kept layers make as many corrections as
before. Which layers to drop is chosen by block influence (`InfluenceTable.layer_values`). Source:
Men et al. 2024 (ShortGPT) for the choice; the rule for the mix: this project.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from iiet.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from iiet.decoder import Decoder

__all__ = ["drop_layers", "kept_config", "most_important_layers"]


def drop_layers(decoder: Decoder, kept_layers: Sequence[int]) -> Decoder:
    """Return a decoder of the kept layers only, with copies of the weights.

    Args:
        decoder: keeps its own layers.
        kept_layers: numbers of the kept layers in ascending order, the first layer being 0.

    Raises:
        ValueError: the numbers are not layers in ascending order, or the method has other weights
            beside the mix whose shapes depend on the layer.
    """
    import torch

    from iiet.decoder import Decoder
    from iiet.mix import Mix

    config = kept_config(decoder.config, kept_layers)
    rows_of_mix = {
        f"{name}.{row}"
        for name, module in decoder.named_modules()
        if isinstance(module, Mix)
        for row in ("inner", "outer")
    }
    weights: dict[str, Tensor] = {}
    for name, tensor in decoder.state_dict().items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            weights[name] = tensor.clone()
        elif int(layer[1]) in kept_layers:
            new_name = f"model.layers.{kept_layers.index(int(layer[1]))}.{name[layer.end() :]}"
            folded = _folded_row(tensor, kept_layers) if name in rows_of_mix else tensor.clone()
            weights[new_name] = folded
    with torch.device("meta"):
        smaller = Decoder(config)
    try:
        smaller.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"method {config.method!r} cannot drop layers: {error}") from None
    return smaller.train(decoder.training)


def kept_config(config: ModelConfig, kept_layers: Sequence[int]) -> ModelConfig:
    """Return the config of a decoder of the kept layers only; errors are those of `drop_layers`."""
    layers = list(kept_layers)
    if not layers or layers != sorted(set(layers) & set(range(config.num_layers))):
        raise ValueError(
            f"kept layers must be numbers from 0 to {config.num_layers - 1} in ascending order, at "
            f"least one, got {layers}"
        )
    changes: dict[str, Any] = {}
    for name in ("schedule", "rotary_layers", "sliding_windows"):  # A value for each layer.
        values = getattr(config, name)
        if values is not None:
            changes[name] = tuple(values[layer] for layer in layers)
    return replace(config, num_layers=len(layers), **changes)


def most_important_layers(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the numbers of the `count` layers of highest importance, in ascending order.

    Of equal layers the earlier ones count as more important, so the choices are nested.
    """
    ranked = sorted(range(len(importance)), key=lambda layer: (-importance[layer], layer))
    return tuple(sorted(ranked[:count]))


def _folded_row(row: Tensor, kept_layers: Sequence[int]) -> Tensor:
    """Move the weight of each dropped estimate to the last kept one before it.

    Column 0 of a row is that of the embeddings, column k that of layer k - 1.
    """
    import torch

    kept = [layer + 1 for layer in kept_layers if layer + 1 < len(row)]
    owners = torch.tensor([bisect_right(kept, column) for column in range(len(row))])
    return row.new_zeros(len(kept) + 1).index_add_(0, owners.to(row.device), row.detach())
