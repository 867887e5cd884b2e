"""One training step of an IIET with its mix written in several ways, all else the same.

`lean` is the project's. `stacked` is what one writes at first: stack all estimates, multiply by the
row; autograd then keeps one stack per evaluation. It is the leanest of the straightforward forms
(an einsum needs the same memory, a product and a sum need more). `checkpointed` is lean with each
layer recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args
from unittest import mock

import torch
from torch import Tensor

from benchmarks.shape import fresh_decoder, shaped_config
from iiet import Decoder, next_token_loss
from iiet.methods.implicit_euler import ImplicitEuler

__all__ = ["VARIANTS", "StepSize", "Variant", "build", "largest_difference", "step", "written_as"]

Variant = Literal["lean", "stacked", "checkpointed"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """The size of a training step, heads of 64 or a single one."""

    num_layers: int
    dim: int = 256
    batch_size: int = 2
    num_tokens: int = 256
    """Per row of the batch."""
    vocab_size: int = 2048
    num_corrections: int = 3
    """Of each layer."""


def build(size: StepSize) -> tuple[Decoder, Tensor]:
    """Return a decoder, the rows of its mix unlike each other, and a batch of random tokens."""
    config = shaped_config(
        size.dim,
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        context_length=size.num_tokens,
        num_corrections=size.num_corrections,
    )
    decoder = fresh_decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "mix.inner" in name or "mix.outer" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return decoder, torch.randint(size.vocab_size, (size.batch_size, size.num_tokens))


def step(decoder: Decoder, input_ids: Tensor) -> float:
    """Run forward and backward, then zero the gradients in place; return the loss."""
    loss = next_token_loss(decoder(input_ids), input_ids)
    loss.backward()  # type: ignore[no-untyped-call]
    decoder.zero_grad(set_to_none=False)
    return loss.item()


@contextmanager
def written_as(variant: Variant, decoder: Decoder) -> Iterator[None]:
    """Make a decoder's steps follow one variant while the context lasts."""
    decoder.activation_checkpointing = variant == "checkpointed"
    try:
        if variant == "stacked":
            with mock.patch.object(ImplicitEuler, "start", _stacked_start):
                yield
        else:
            yield
    finally:
        decoder.activation_checkpointing = False


def largest_difference(size: StepSize, variant: Variant) -> float:
    """Compare loss and gradients with lean's, in float64 and on few tokens.

    Returns:
        The largest difference of a parameter's gradient, in units of that gradient's largest entry,
        or of the loss, relative.
    """
    decoder, input_ids = build(size)
    decoder.double()
    few = input_ids[:1, :16]
    wanted, found = (_loss_and_gradients(decoder, few, v) for v in ("lean", variant))
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(wanted, found, strict=True)
    )


def _loss_and_gradients(decoder: Decoder, input_ids: Tensor, variant: Any) -> list[Tensor]:
    decoder.zero_grad()
    with written_as(variant, decoder):
        loss = next_token_loss(decoder(input_ids), input_ids)
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in decoder.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


@dataclass(frozen=True)
class _StackedHistory:
    """A history that stacks all estimates anew for each sum, and multiplies them by a whole row."""

    estimates: tuple[Tensor, ...]

    def sums(self, rows: Tensor) -> tuple[_StackedHistory, tuple[Tensor, ...]]:
        return self, tuple(rows)  # Nothing is summed before the layer's own estimate is there.

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor) -> Tensor:
        row = torch.cat([base, weight[None]])
        mixed: Tensor = torch.tensordot(row, torch.stack([*self.estimates, estimate]), dims=1)
        return mixed

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor
    ) -> tuple[Tensor, _StackedHistory]:
        hidden = self.add(base, estimate, weight)
        return hidden, _StackedHistory((*self.estimates, estimate))


def _stacked_start(embeddings: Tensor, num_layers: int) -> _StackedHistory:  # noqa: ARG001
    return _StackedHistory((embeddings,))
