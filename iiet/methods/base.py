"""What a method is: the rule by which a layer advances the hidden state with its field.

A method owns whatever it learns beside the fields (norms, mixes, coefficients), for all layers
together. State is passed, never kept: a layer gets the hidden state and the estimates of the layers
before it, and returns the next hidden state and its own estimate. The class says what a layer
costs, so that cost follows from a config alone.
"""

# ruff: noqa: ARG002 - all methods share their signatures

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from iiet.schedule import IterationSchedule

__all__ = ["Advance", "Evaluate", "Method"]

Evaluate = Callable[[Tensor], Tensor]
"""The field of one layer, (batch, time, dim) to (batch, time, dim); every call is one evaluation.
"""


class Advance(NamedTuple):
    """What a layer leaves behind."""

    hidden: Tensor
    """The hidden state `h_l`, (batch, time, dim)."""
    estimate: Tensor | None
    """The estimate `s_l` for later layers; None where the method has no mix, so that nothing is
    kept alive.
    """


class Method(nn.Module, ABC):
    """The base of all methods.

    Args:
        num_layers: number of layers L.
        dim: width of the hidden state.
        layer_norm_eps: epsilon of the method's LayerNorms.
    """

    has_corrections: ClassVar[bool] = False
    """Whether an iteration schedule says how often a layer corrects its prediction."""
    has_mix: ClassVar[bool] = False
    """Whether layers read earlier estimates through the learned mix (and have its two LayerNorms
    each).
    """
    num_stage_norms: ClassVar[int] = 0
    """LayerNorms of Runge-Kutta stages, shared by all layers."""

    def __init__(self, num_layers: int, dim: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.num_layers = num_layers

    @classmethod
    @abstractmethod
    def evaluations_per_layer(cls, schedule: IterationSchedule, layer: int) -> int:
        """Count the field evaluations of a layer, the first layer being 0."""

    @classmethod
    @abstractmethod
    def num_parameters(cls, num_layers: int, dim: int) -> int:
        """Count the parameters that the method has beside the fields."""

    @abstractmethod
    def advance(
        self,
        layer: int,
        field: Evaluate,
        hidden: Tensor,
        estimates: Sequence[Tensor],
        num_corrections: int,
    ) -> Advance:
        """Advance the hidden state by one layer.

        Args:
            layer: the layer, the first being 0.
            field: the layer's field.
            hidden: what the layer before left, (batch, time, dim).
            estimates: `s_0` (the embeddings) to that of the layer before; empty where the method
                has no mix.
            num_corrections: how many corrections this layer makes; 0 where the method makes none.
        """
