"""Linear layers with weights in bf16 or int8, for inference on a CPU.

    bf16    weights rounded to bf16, in the order in which oneDNN reads them
    int8    weights as integers from -127 to 127, with a scale for each output channel

The input is rounded to bf16 and the result is as well; sums are float32. A product of few rows
takes the time of reading the weights, which are half or a quarter of float32's. Not to be confused
with a model in bf16: hidden states, norms, mix and cache stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QuantizedLinear", "WeightFormat", "check_weight_format"]

WeightFormat = Literal["bf16", "int8"]

# For more rows, int8 weights are turned into bf16 ones, which then is faster.
_MAX_INT8_ROWS: Final = 16


def check_weight_format(weight_format: str) -> None:
    """Check that a CPU like this one can compute with weights of a format.

    Raises:
        ValueError: no such format, or the CPU or this PyTorch lacks the instructions.
    """
    known = get_args(WeightFormat)
    if weight_format not in known:
        raise ValueError(f"weights must be one of {', '.join(known)}, got {weight_format!r}")
    if not (torch._C._has_mkldnn and torch.cpu._is_avx512_bf16_supported()):
        raise ValueError(
            f"weights in {weight_format} need a CPU with the instructions AVX512-BF16, and PyTorch "
            "with oneDNN; use float32 weights here"
        )


class QuantizedLinear(nn.Module):
    """Compute `x @ W.T` with a quantized copy of W, (out, in)."""

    def __init__(self, weight: Tensor, weight_format: WeightFormat) -> None:
        super().__init__()
        check_weight_format(weight_format)
        self.weight_format = weight_format
        self.product: Callable[[Tensor], Tensor]
        """Maps float32 (rows, in) to (rows, out)."""
        with torch.inference_mode(False), torch.no_grad():
            self.product = (_bf16 if weight_format == "bf16" else _int8)(weight.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.product(x.reshape(-1, x.size(-1))).view(*x.shape[:-1], -1)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError(
            f"weights in {self.weight_format} are not saved; save the model before quantizing it"
        )


def _bf16(weight: Tensor) -> Callable[[Tensor], Tensor]:
    # Plain `F.linear` would reorder the weight in each call, which costs a third of the time.
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    multiply = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor) -> Tensor:
        result: Tensor = multiply(x.bfloat16(), ordered, None, "none", [], "")
        return result.float()

    return product


def _int8(weight: Tensor) -> Callable[[Tensor], Tensor]:
    largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    # The scale is rounded before dividing by it, so that its rounding adds no error.
    scale = (largest / 127).bfloat16()
    integers = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    scale = scale.squeeze(1)

    def product(x: Tensor) -> Tensor:
        if len(x) <= _MAX_INT8_ROWS:
            return torch._weight_int8pack_mm(x.bfloat16(), integers, scale).float()
        return F.linear(x.bfloat16(), integers.bfloat16()).float() * scale

    return product
