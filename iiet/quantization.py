"""Quantize a decoder's weights for decoding on a CPU: less to read for each token.

Quantized are the matrices of all fields and the head. The embedding, which is looked up and not
multiplied, norms and the mix stay as they are, so a tied head becomes a copy of its own.
"""

from __future__ import annotations

import copy

from torch import nn

from iiet.cpu_kernels import is_bare
from iiet.decoder import Decoder
from iiet.quantized_linear import QuantizedLinear, WeightFormat, check_weight_format

__all__ = ["quantize_weights"]


def quantize_weights(decoder: Decoder, weight_format: WeightFormat) -> Decoder:
    """Return a decoder for inference whose products use quantized copies of the weights.

    The given decoder is not changed; what is not quantized is shared with it. The result is neither
    trained nor saved.

    Raises:
        ValueError: the CPU lacks the instructions, the decoder is on a GPU, or one of its linear
            layers is replaced, wrapped or hooked.
    """
    check_weight_format(weight_format)
    if decoder.device.type != "cpu":
        raise ValueError(f"weights in {weight_format} are for CPUs, got {decoder.device}")
    shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    quantized = copy.deepcopy(decoder, shared)  # Copies modules, and no weight.
    for field in quantized.fields:
        for part in list(field.modules()):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, _quantized(module, weight_format))
    if quantized.head is None:
        quantized.head = QuantizedLinear(decoder.embedding.weight, weight_format)
    else:
        quantized.head = _quantized(quantized.head, weight_format)
    return quantized.eval()


def _quantized(linear: nn.Module, weight_format: WeightFormat) -> QuantizedLinear:
    if not is_bare(linear, nn.Linear):
        raise ValueError(f"only plain linear layers can be quantized, got {linear}")
    weight = linear.weight
    assert isinstance(weight, nn.Parameter)
    return QuantizedLinear(weight, weight_format)
