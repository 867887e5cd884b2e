"""What costs are counted from: the sizes of a decoder, and what a method does beside its fields.

Sizes are those of a decoder on the meta device. What a method computes and keeps beside its fields
is counted by running its layers, without fields, on a few tokens. `iiet.cost` makes costs of both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.methods.base import LayerCall

__all__ = ["LayerCounts", "Sizes", "counted_layers", "sizes_of"]


class LayerCounts(NamedTuple):
    """What a layer does and keeps beside its field."""

    num_differentiated: int
    """Evaluations that training differentiates."""
    flops: int
    """For one token."""
    num_kept: int
    """Tensors of the hidden state's size that the layer keeps for its backward pass, without what
    it leaves for later layers."""


class Sizes(NamedTuple):
    """Numbers of parameters, the same for all schedules."""

    all: int
    of_method: int
    field: int
    matrices: int
    """Those of the matrices of a field."""


@lru_cache(maxsize=64)
def sizes_of(config: ModelConfig) -> Sizes:
    """Count the parameters of a decoder."""
    with torch.device("meta"):
        decoder = Decoder(config)
    first: Any = decoder.model.layers[0]
    field = list(first.field_parameters())
    return Sizes(
        sum(p.numel() for p in decoder.parameters()),
        sum(p.numel() for p in decoder.method_parameters().values()),
        sum(p.numel() for p in field),
        sum(p.numel() for p in field if p.dim() == 2),
    )


@lru_cache(maxsize=256)
def counted_layers(
    name: str, options: Any, dim: int, num_layers: int, num_corrections: int
) -> tuple[LayerCounts, ...]:
    """Run layers without fields, each with as many corrections; count what each one does."""
    method = METHODS[name]
    schedule: Any = num_corrections if method.has_corrections else None
    config = ModelConfig(
        method=name,
        method_options=options,
        dim=dim,
        num_layers=num_layers,
        vocab_size=1,
        num_heads=1,
        num_kv_heads=1,
        ffn_dim=1,
        context_length=1,
        schedule=schedule,
    )
    counter, counts = _Counter(dim), []
    with (
        torch.random.fork_rng(devices=[]),  # Whoever asks for a cost keeps the random numbers.
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        saved_tensors_hooks(counter.keep, lambda tensor: tensor),
        counter,
    ):
        layers = [_without_field(method, config, number) for number in range(num_layers)]
        shared = method.make_shared(config)
        hidden = torch.zeros(1, _NUM_TOKENS, dim, requires_grad=True)
        # One layer more, so that the last one, too, leaves its estimate for a later one.
        state = method.start(hidden, num_layers + 1)
        for layer in layers:
            counter.start()
            call: Any = LayerCall(num_corrections, counter, shared=shared)  # type: ignore[arg-type]
            hidden, state = layer(hidden, state, call)
            counts.append(counter.counts())
    # A method that repeats the stack runs each layer once for each correction more.
    times = 1 + num_corrections if method.repeats_stack else 1
    return tuple(LayerCounts(*(times * value for value in each)) for each in counts)


_NUM_TOKENS = 16  # So that hidden states are larger than all else that a layer keeps.


def _without_field(method: Any, config: ModelConfig, number: int) -> Any:
    """Return a layer whose field needs nothing for its gradient, and which has no block."""
    with torch.device("meta"):
        layer = method(config, number)
    for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
        delattr(layer, name)
    layer.to_empty(device="cpu")

    def field(x: Tensor, counter: _Counter, _: int | None) -> Tensor:
        counter.num_differentiated += torch.is_grad_enabled()
        return x + torch.zeros((), requires_grad=True)

    layer.field = field
    return layer


class _Counter(TorchFunctionMode):
    """Counts the FLOPs of a layer, and the values that it keeps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._num_values = _NUM_TOKENS * dim
        self.start()

    def start(self) -> None:
        """Begin with another layer."""
        self.num_differentiated = self._flops = 0
        self._kept: dict[int, Tensor] = {}

    def counts(self) -> LayerCounts:
        """Return the counts since the start."""
        kept = sum(tensor.numel() // self._num_values for tensor in self._kept.values())
        return LayerCounts(self.num_differentiated, self._flops // _NUM_TOKENS, kept)

    def keep(self, tensor: Tensor) -> Tensor:
        """Take a tensor that autograd saves, which may be another's memory."""
        self._kept[tensor.data_ptr()] = tensor
        return tensor

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        # A product of (..., k) makes each number of its result from k pairs.
        match function.__name__:
            case "matmul" | "mm" | "linear":
                self._flops += 2 * args[0].size(-1) * result.numel()
            case "addcmul":
                self._flops += 2 * result.numel()
        return result
