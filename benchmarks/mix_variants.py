"""One training step of an IIET with its mix written in several ways, all else the same.

`lean` is the project's form. `stacked` is the straightforward one: stack all estimates and multiply
by the row; autograd then keeps one stack per evaluation. Of the straightforward forms it needs the
least memory (an einsum needs the same, a product and a sum need more). `checkpointed` is `lean`
with each layer recomputed in the backward pass.
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
    """The size of a training step; heads have width 64, or there is a single one."""

    num_layers: int
    dim: int = 256
    batch_size: int = 2
    num_tokens: int = 256
    """Tokens per row of the batch."""
    vocab_size: int = 2048
    num_corrections: int = 3
    """Corrections of each layer."""


def build(size: StepSize) -> tuple[Decoder, Tensor]:
    """Return a decoder whose rows of the mix all differ, and a batch of random tokens."""
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
    """Run a decoder's steps as one variant within the context."""
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
    """Return the largest relative difference of loss and gradients from those of `lean`.

    Computed in float64 on few tokens; a gradient's difference is relative to its largest entry.
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
    """A history that stacks all estimates again for each sum and multiplies them by a whole row."""

    estimates: tuple[Tensor, ...]

    def sums(self, rows: Tensor) -> tuple[_StackedHistory, tuple[Tensor, ...]]:
        return self, tuple(rows)  # Sums wait for the layer's own estimate.

    def add(self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        row = torch.cat([base, weight[None]])
        mixed: Tensor = torch.tensordot(row, torch.stack([*self.estimates, estimate]), dims=1)
        return mixed.to(dtype)

    def leave(
        self, base: Tensor, estimate: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, _StackedHistory]:
        hidden = self.add(base, estimate, weight, dtype)
        return hidden, _StackedHistory((*self.estimates, estimate))


def _stacked_start(embeddings: Tensor, num_layers: int) -> _StackedHistory:  # noqa: ARG001
    return _StackedHistory((embeddings,))
