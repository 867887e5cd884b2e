"""Leave whole layers out of a decoder: the model of the layers that an iteration schedule keeps.

A layer d that is left out passes the hidden state on and repeats the estimate before it:

    h_d = h_{d-1};   s_d = s_{d-1}

So in each later row of A and C the weight of s_d moves to the last kept estimate before it (`s_0`,
the embeddings, if no layer before d is kept), and every row keeps its sum:

    A'[l,k] = sum of A[l,j] over the kept k and the left-out j that follow it

Methods without a mix lose the layer and nothing else. The result is a model like any other: passes,
caches, costs and exports know nothing of layers that were left out. Which layers to leave out,
`iiet.iiad.pruning` says. Source: Men et al. 2024 (ShortGPT); the rule for the mix: this project.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.model.mix import Mix
from iiet.model.schedule import IterationSchedule, ScheduleLike

__all__ = ["decoder_of_kept_layers"]


def decoder_of_kept_layers(decoder: Decoder, schedule: ScheduleLike) -> Decoder:
    """Return the decoder that consists of the layers that a schedule keeps.

    The mix is folded; all other weights share the memory of the decoder's. `copy()` of the result
    has weights of its own, as a training needs.

    Args:
        decoder: keeps its own layers.
        schedule: relative to these layers; the kept ones make as many corrections as it says.

    Raises:
        ValueError: the schedule does not fit the number of layers or the method, or the method has
            other weights beside the mix whose shapes depend on the layer.
    """
    schedule = IterationSchedule.parse(schedule, num_layers=decoder.config.num_layers)
    config = decoder.config.of_kept_layers(schedule)
    kept_layers = schedule.kept_layers
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
            weights[name] = tensor
        elif int(layer[1]) in kept_layers:
            new_name = f"model.layers.{kept_layers.index(int(layer[1]))}.{name[layer.end() :]}"
            is_row = name in rows_of_mix
            weights[new_name] = _folded_row(tensor, kept_layers) if is_row else tensor
    with torch.device("meta"):
        smaller = Decoder(config)
    try:
        smaller.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"method {config.method!r} cannot leave layers out: {error}") from None
    return smaller.train(decoder.training)


def _folded_row(row: Tensor, kept_layers: Sequence[int]) -> Tensor:
    """Move the weight of each left-out estimate to the last kept one before it.

    Column 0 of a row is that of the embeddings, column k that of layer k - 1.
    """
    kept = [layer + 1 for layer in kept_layers if layer + 1 < len(row)]
    owners = torch.tensor([bisect_right(kept, column) for column in range(len(row))])
    return row.new_zeros(len(kept) + 1).index_add_(0, owners.to(row.device), row.detach())
