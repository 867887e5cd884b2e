"""A method is a kind of layer: a rule by which a layer advances the hidden state with its field.

A layer is a Llama block, whose field it evaluates, and what the method learns for it (norms, rows
of the mix, gates). State is passed, never kept: a layer gets the hidden state and what earlier
layers left, and returns both for the next one. What it costs beside its field is stated, not
measured (`iiet.model.facts`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iiet.model.config import ModelConfig
from iiet.model.facts import MethodFacts
from iiet.model.layers import Block, PassContext

__all__ = ["Advance", "Evaluate", "Evaluation", "Layer", "LayerCall", "Observer"]


class Evaluation(NamedTuple):
    """One evaluation of one field, as an observer sees it."""

    layer: int
    """The layer, the first being 0."""
    k: int
    """The evaluation within the layer: 0 is the prediction, i the i-th correction."""
    input: Tensor
    """x, (batch, time, dim)."""
    output: Tensor
    """F(x), (batch, time, dim)."""
    estimate: Tensor | None
    """The normalized output, g(e) for a correction, (batch, time, dim); None without a norm."""
    residual: Tensor | None
    """`g(e) - e`: how far the correction moves the previous estimate; None for predictions."""
    output_if_last: Callable[[], Tensor] | None = None
    """Where the output does not tell what the layer would leave if it ended here (a Runge-Kutta
    stage, a damped correction): computes that estimate, (batch, time, dim)."""


Observer = Callable[[Evaluation], None]


class Advance(NamedTuple):
    """What a layer returns."""

    hidden: Tensor
    """The hidden state `h_l`, (batch, time, dim)."""
    state: Any
    """What later layers need beside it, such as the history of estimates; None for nothing."""


class LayerCall(NamedTuple):
    """What a layer gets in one pass beside hidden state and state."""

    num_corrections: int
    """How many corrections the layer makes; 0 if its method makes none."""
    context: PassContext
    slots: tuple[int, ...] | None = None
    """The cache slot of each of its evaluations; None without a cache."""
    shared: nn.Module | None = None
    """What all layers of the method share."""
    recompute: bool = False
    """Whether the backward pass recomputes the layer; the forward pass then keeps only its
    inputs."""
    observe: Observer | None = None
    """Called after each evaluation."""
    first_evaluation: int = 0
    """Evaluations that the layer made in earlier runs of the stack, where the method repeats it."""


class Evaluate:
    """The field of one layer in one pass; every call is one evaluation."""

    def __init__(self, layer: Layer, call: LayerCall) -> None:
        self._layer = layer
        self._call = call
        self._k = call.first_evaluation

    def __call__(
        self,
        x: Tensor,
        norm: Callable[[Tensor], Tensor] | None = None,
        previous: Tensor | None = None,
        output_if_last: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return F(x), or norm(F(x)), for x of (batch, time, dim).

        For observers: `previous` is the estimate that this evaluation corrects, and
        `output_if_last` makes of the returned value what the layer would leave if it ended here.
        """
        call = self._call
        k = self._k
        self._k += 1
        slot = None if call.slots is None else call.slots[k]
        output: Tensor = self._layer.field(x, call.context, slot)
        estimate = None if norm is None else norm(output)
        result = output if estimate is None else estimate
        if call.observe is not None:
            moved = None if estimate is None or previous is None else estimate - previous
            if_last = None if output_if_last is None else partial(output_if_last, result)
            call.observe(Evaluation(self._layer.index, k, x, output, estimate, moved, if_last))
        return result

    def uncounted(self, x: Tensor) -> Tensor:
        """Return F(x) without counting: neither observers nor caches see this evaluation."""
        output: Tensor = self._layer.field(x, replace(self._call.context, cache=None), None)
        return output


class Layer(Block, ABC):
    """Base of all methods: one layer, the unit of activation checkpointing and of sharding.

    Args:
        config: sizes, and the options of the method.
        index: the layer, the first being 0.
    """

    facts: ClassVar[MethodFacts] = MethodFacts()
    """What is known of the method beside its formula."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.index = index
        self.options = config.options
        self.build(config)

    def build(self, config: ModelConfig) -> None:
        """Make the modules and parameters that the layer has beside its block."""

    @classmethod
    def make_shared(cls, _config: ModelConfig, /) -> nn.Module | None:
        """Make the module that all layers share; None for nothing."""
        return None

    @classmethod
    def start(cls, _embeddings: Tensor, /) -> Any:
        """Return the first layer's state, made from the embeddings, (batch, time, dim)."""
        return None

    @abstractmethod
    def advance(
        self,
        evaluate: Evaluate,
        hidden: Tensor,
        state: Any,
        *,
        num_corrections: int,
        shared: nn.Module | None,
    ) -> Advance:
        """Advance the hidden state, (batch, time, dim), by one layer. This is the method's formula.

        `state` comes from the layer before, `shared` from `make_shared`.
        """

    def reset_parameters(self) -> None:
        """Initialize the layer's own parameters, except those of norms and linear layers."""

    def gates(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that decide how much of the method's own work comes through. They
        have a learning rate of their own."""
        return iter(())

    def forward(self, hidden: Tensor, state: Any, call: LayerCall) -> Advance:
        """Run `advance`, recomputed in the backward pass where the call asks for it."""

        def advance(hidden: Tensor, state: Any) -> Advance:
            return self.advance(
                Evaluate(self, call),
                hidden,
                state,
                num_corrections=call.num_corrections,
                shared=call.shared,
            )

        if not call.recompute or call.observe is not None or not torch.is_grad_enabled():
            return advance(hidden, state)
        recomputed: Any = checkpoint(
            advance,
            hidden,
            state,
            use_reentrant=False,
            preserve_rng_state=self.facts.is_random,  # To copy it takes time.
        )
        return Advance(*recomputed)
