"""The learned multistep mix: how a layer reads the estimates of all earlier layers.

Each layer leaves an estimate `s_l`; `s_0` are the embeddings. Layer l owns its rows of two
lower-triangular matrices, which start as means. A gives the points x where the layer evaluates its
field, with its current estimate e in place of s_l; C gives the hidden state:

    x   = sum_{k<l} A[l,k] s_k + A[l,l] e
    h_l = sum_{k<l} C[l,k] s_k + C[l,l] s_l

The sums over k < l do not change while the layer iterates, so they are computed once per layer, one
estimate after the other. Autograd then keeps each estimate once, however many layers read it: the
memory of training grows with the depth, where stacks of all estimates would grow with its square.
Estimates, rows and sums are at least float32; x and h_l are rounded once.
Source: the PCformer and IIET papers; the order of the sums: this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from iiet.model.facts import StartKind
from iiet.model.layers import KeepsFloat32, at_least_float32

__all__ = ["BlendedNorm", "EstimateNorm", "History", "Mix", "PartialSum"]


@dataclass(frozen=True)
class History:
    """The estimates `s_0, ..., s_{l-1}` that layer l reads, each (batch, time, dim).

    One object instead of a tuple: FSDP would give each tensor that it finds in a layer's arguments
    and results a node and a hook of its own, in every layer, and needs those of the hidden state
    alone.
    """

    estimates: tuple[Tensor, ...]

    @classmethod
    def started(cls, embeddings: Tensor) -> History:
        """Return the history before the first layer; it holds `s_0`."""
        return cls((at_least_float32(embeddings),))

    def followed_by(self, estimate: Tensor) -> History:
        """Return the history with one more estimate."""
        return History((*self.estimates, estimate))


class PartialSum(NamedTuple):
    """A weighted sum of estimates that lacks its last term, the layer's own estimate."""

    earlier: Tensor
    """`sum_{k<l} row[k] s_k`, (batch, time, dim)."""
    own_weight: Tensor
    """`row[l]`, a scalar."""

    def plus(self, estimate: Tensor, dtype: torch.dtype) -> Tensor:
        """Add the last term for an estimate, (batch, time, dim); round the sum to `dtype`."""
        return torch.addcmul(self.earlier, self.own_weight, estimate).to(dtype)

    def with_term(self, weight: Tensor, value: Tensor) -> PartialSum:
        """Return the sum with one term more, `weight * value`; the weight has one element."""
        return self._replace(earlier=torch.addcmul(self.earlier, weight, value))


class Mix(KeepsFloat32):
    """The rows of A and C of one layer, the first layer being 0."""

    def __init__(self, layer: int, *, start: StartKind = "mean") -> None:
        super().__init__()
        self.start = start
        self.inner = nn.Parameter(torch.empty(layer + 2))  # row of A
        self.outer = nn.Parameter(torch.empty(layer + 2))  # row of C
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start both rows as the mean, or as reading the newest estimate alone."""
        for row in (self.inner, self.outer):
            if self.start == "mean":
                nn.init.constant_(row, 1.0 / len(row))
            else:
                nn.init.zeros_(row)
                nn.init.ones_(row[-1:])

    def sums(
        self, estimates: Sequence[Tensor], *, corrects: bool
    ) -> tuple[PartialSum | None, PartialSum]:
        """Sum the estimates of the earlier layers by the rows of A and of C.

        A layer that makes no corrections needs no points: its first sum is None.
        """
        rows = [self.inner, self.outer] if corrects else [self.outer]
        weights = [at_least_float32(row).unbind() for row in rows]
        totals = [row[0] * estimates[0] for row in weights]
        for start in range(1, len(estimates), TERMS_AT_ONCE):
            block = slice(start, min(start + TERMS_AT_ONCE, len(estimates)))
            totals = self.add_terms(totals, [row[block] for row in weights], estimates[block])
        sums = [PartialSum(total, row[-1]) for total, row in zip(totals, weights, strict=True)]
        points = sums[0] if corrects else None
        hidden = sums[-1]
        return points, hidden

    @staticmethod
    def add_terms(
        totals: list[Tensor], weights: Sequence[Sequence[Tensor]], estimates: Sequence[Tensor]
    ) -> list[Tensor]:
        """Add a few estimates to each sum, by a weight of its own for each."""
        for number, estimate in enumerate(estimates):
            totals = [
                torch.addcmul(total, row[number], estimate)
                for total, row in zip(totals, weights, strict=True)
            ]
        return totals


TERMS_AT_ONCE: Final = 3
"""Terms of one call of `Mix.add_terms`, which training on GPUs compiles. A compiler makes a graph
for each number of tensors, and gives up after eight: so there are three for layers that correct and
three for others, however many layers there are."""


class EstimateNorm(KeepsFloat32, nn.LayerNorm):
    """The LayerNorm that makes an estimate of a field's output, at least in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = at_least_float32(self.weight)
        bias = at_least_float32(self.bias)
        return torch.layer_norm(at_least_float32(x), self.normalized_shape, weight, bias, self.eps)


class BlendedNorm(EstimateNorm):
    """`x + b (norm(x) - x)`: an estimate's norm, blended in by a learned b per channel from 0."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self.blend = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "blend"):  # The base's constructor resets what it has made.
            nn.init.zeros_(self.blend)

    def forward(self, x: Tensor) -> Tensor:
        # At b = 0, lerp returns x to the last bit.
        return torch.lerp(at_least_float32(x), super().forward(x), at_least_float32(self.blend))
