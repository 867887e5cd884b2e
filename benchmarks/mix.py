"""The learned mix in training: its memory and its time.

Claims: compared with a stack of all estimates, the lean mix needs less memory (that of a stack
grows with the square of the depth) and less time; with checkpointing it needs little memory. All
forms must first give the same loss and gradients.

`lean` is the project's form: sums over a list of estimates, those over the earlier layers' once per
layer. `stacked` stacks all estimates and multiplies by the row, as the published code does;
autograd then keeps one stack per evaluation. (An einsum needs the same memory, a product and a sum
need more.) `summed` is Python's `sum` over the list, anew for each point. `checkpointed` is `lean`
with each layer recomputed in the backward pass. Memory is that of the tensors that are alive at
once, beyond weights and gradients. They are counted as they are made and freed; the memory that a
fresh process takes from the system is larger by one percent.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import RATIO, Goal, Row, checked
from benchmarks.runner import Setup
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, stopwatch, take_turns
from iiet import Decoder, next_token_loss
from iiet.model.mix import Mix

_COMPARED = ("lean", "summed", "checkpointed")
"""Variants that are compared with `stacked`."""
_GOALS = {"memory, lean": 0.6, "memory, checkpointed": 0.2, "time, lean": 0.97}
_GOAL_LAYERS = 24


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


_FULL = tuple(StepSize(num_layers=layers) for layers in (12, 24))
_QUICK = (StepSize(num_layers=4, dim=64, num_tokens=128, vocab_size=256),)


def mix(setup: Setup) -> Iterator[Row]:
    """Measure memory and time of training steps."""
    sizes, repetitions = (_QUICK, 2) if setup.is_toy else (_FULL, 3)
    one = sizes[0]  # One depth is enough for the check: the code is the same for all.
    yield Row(
        what=f"IIET, {one.num_corrections} corrections per layer, d {one.dim}, ffn "
        f"{one.dim * 11 // 4}, vocabulary {one.vocab_size}, {one.batch_size} x {one.num_tokens} "
        f"tokens, float32; time of forward and backward, {repetitions} repetitions in turns"
    )
    for variant in ("stacked", "summed", "checkpointed"):
        what = f"loss and gradients of lean and {variant}, {one.num_layers} layers in float64,"
        yield checked(what, largest_difference(one, variant), 1e-9)
    for size in sizes:
        peaks = {name: peak_bytes(size, name) / 1e6 for name in (*_COMPARED, "stacked")}
        for name in _COMPARED:
            ratio = Spread.of([peaks[name] / peaks["stacked"]])
            yield Row(
                what=f"peak memory, {name}, {size.num_layers} layers",
                figures={
                    "this (MB)": peaks[name], "stacked (MB)": peaks["stacked"], RATIO: ratio
                },
                goal=_goal(size, f"memory, {name}"),
            )  # fmt: skip
        seconds = take_turns(
            {name: stopwatch(_step_of(size, name)) for name in peaks}, repetitions=repetitions
        )
        for name in _COMPARED:
            what = f"step time, {name}, {size.num_layers} layers"
            yield Row.paired(what, seconds, name, "stacked", _goal(size, f"time, {name}"))


def _goal(size: StepSize, claim: str) -> Goal | None:
    if size.num_layers != _GOAL_LAYERS or claim not in _GOALS:
        return None
    return Goal("at most", _GOALS[claim])


def _build(size: StepSize) -> tuple[Decoder, Tensor]:
    """Return a decoder whose rows of the mix all differ, and a batch of random tokens."""
    config = shaped_config(
        size.dim, size.num_layers, size.vocab_size, size.num_tokens, schedule=size.num_corrections
    )
    decoder = fresh_decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "mix.inner" in name or "mix.outer" in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return decoder, torch.randint(size.vocab_size, (size.batch_size, size.num_tokens))


def _step_of(size: StepSize, variant: str) -> Callable[[], None]:
    """Return a training step of a new decoder that already has gradients."""
    decoder, input_ids = _build(size)

    def step(input_ids: Tensor = input_ids) -> None:
        with _written_as(variant, decoder):
            torch.autograd.backward(next_token_loss(decoder(input_ids), input_ids))
            decoder.zero_grad(set_to_none=False)

    step(input_ids[:1, :8])
    return step


@contextmanager
def _written_as(variant: str, decoder: Decoder) -> Iterator[None]:
    """Run a decoder's steps as one variant within the context."""
    decoder.activation_checkpointing = variant == "checkpointed"
    form = {"stacked": _Stacked, "summed": _Summed}.get(variant)
    try:
        with mock.patch.object(Mix, "sums", Mix.sums if form is None else _whole_sums(form)):
            yield
    finally:
        decoder.activation_checkpointing = False


class _WholeSum:
    """A row and the earlier estimates; nothing is computed before the layer's own is there."""

    def __init__(self, row: Tensor, estimates: tuple[Tensor, ...]) -> None:
        self.row = row
        self.estimates = estimates

    def plus(self, estimate: Tensor, dtype: torch.dtype) -> Tensor:
        return self.total((*self.estimates, estimate)).to(dtype)

    def total(self, estimates: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError


class _Stacked(_WholeSum):
    """Stacks all estimates again for each sum, and multiplies them by the row."""

    def total(self, estimates: tuple[Tensor, ...]) -> Tensor:
        mixed: Tensor = torch.tensordot(self.row, torch.stack(estimates), dims=1)
        return mixed


class _Summed(_WholeSum):
    """Adds up a product for each estimate."""

    def total(self, estimates: tuple[Tensor, ...]) -> Tensor:
        products = [weight * s for weight, s in zip(self.row.unbind(), estimates, strict=True)]
        return sum(products[1:], start=products[0])


def _whole_sums(form: type[_WholeSum]) -> Callable[..., tuple[_WholeSum, _WholeSum]]:
    """Return a `Mix.sums` that waits for each estimate of the layer."""

    def sums(
        mix: Mix, estimates: tuple[Tensor, ...], *, corrects: bool
    ) -> tuple[_WholeSum, _WholeSum]:
        assert corrects
        return form(mix.inner, estimates), form(mix.outer, estimates)

    return sums


def largest_difference(size: StepSize, variant: str) -> float:
    """Return the largest relative difference of loss and gradients from those of `lean`.

    Computed in float64 on few tokens; a gradient's difference is relative to its largest entry.
    """
    decoder, input_ids = _build(size)
    decoder.double()
    few = input_ids[:1, :16]

    def loss_and_gradients(variant: str) -> list[Tensor]:
        with _written_as(variant, decoder):
            loss = next_token_loss(decoder(few), few)
            return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]

    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(loss_and_gradients("lean"), loss_and_gradients(variant), strict=True)
    )


def peak_bytes(size: StepSize, variant: str) -> int:
    """Return the most bytes of tensors that a step makes and that are alive at once."""
    step = _step_of(size, variant)
    live = _LiveTensors()
    with live:
        step()
    return live.peak


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # What an operation gets and was not made by one was there before: weights, gradients.
        for storage in _storages((args, kwargs)):
            self._sizes.setdefault(storage._cdata, 0)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
