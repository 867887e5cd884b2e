"""The fields of a decoder in bfloat16, with copies of their float32 weights.

Autocast casts a weight again whenever a field is evaluated, forward and backward. Here all weights
of the fields are cast once per pass, or once per optimizer step where a trainer keeps the copies.
Within a field everything is bfloat16; what is between fields stays float32: estimates, their norms,
the mix. The gradients of a weight are summed in float32 over all evaluations of a pass, before any
rounding where the hand-written backward passes add products to the sum.

The decoder does this under bfloat16 autocast on a GPU. CPUs keep autocast's arithmetic, unless
`Decoder.half_weights` is set. Source: mixed precision as in Micikevicius et al. 2018; sums in
float32 as in Megatron-LM's fused gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from iiet.context import PassContext
from iiet.plain import needs_all_derivatives

__all__ = ["FieldWeights", "GradientSum", "HalfWeights", "are_float32", "half_is_wanted"]

_ADDS_PRODUCTS = torch.version.hip is None and tuple(
    map(int, torch.__version__.split(".")[:2])
) >= (2, 12)
"""Whether GPUs can add products of bfloat16 matrices to a float32 matrix."""


def half_is_wanted(x: Tensor) -> bool:
    """Tell whether autocast asks for bfloat16 arithmetic on float32 hidden states."""
    kind = x.device.type
    return (
        x.dtype == torch.float32
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) == HalfWeights.dtype
        and not torch.compiler.is_compiling()
        and not needs_all_derivatives()
    )


def are_float32(fields: Iterable[nn.Module]) -> bool:
    """Tell whether all weights of some fields are float32; those of a gathered shard may not be."""
    return all(p.dtype == torch.float32 for field in fields for p in field.parameters())


class HalfWeights:
    """Copies of all weights of some fields; `refresh` them whenever the weights have changed."""

    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def __init__(self, fields: Iterable[nn.Module]) -> None:
        self._fields = [_Copies(field) for field in fields]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights as they are now."""
        copies = [copy for field in self._fields for copy in field.copies]
        torch._foreach_copy_(copies, [master for field in self._fields for master in field.masters])

    def of_pass(self) -> list[FieldWeights]:
        """Return the weights of each field for one forward pass and its backward pass."""
        return [FieldWeights(field) for field in self._fields]


class _Copies:
    """The parameters of one field, where their modules keep them, and their copies."""

    def __init__(self, field: nn.Module) -> None:
        self.places: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name)
            for module in field.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self.masters: list[Tensor] = [parameters[name] for parameters, name in self.places]
        self.copies = [
            torch.empty_like(master, dtype=HalfWeights.dtype, requires_grad=False)
            for master in self.masters
        ]


class FieldWeights:
    """The copies of one field's weights in one pass, through which its parameters get gradients."""

    def __init__(self, field: _Copies) -> None:
        self._field = field
        self._trained = [n for n, m in enumerate(field.masters) if m.requires_grad]
        self._sums = [GradientSum() for _ in self._trained]
        self._link: Tensor | None = None
        if self._trained and torch.is_grad_enabled():
            masters = [field.masters[n] for n in self._trained]
            self._link = _Masters.apply(self._sums, *masters)  # type: ignore[no-untyped-call]

    def evaluate(self, field: nn.Module, x: Tensor, context: PassContext, **options: Any) -> Tensor:
        """Evaluate the field with the copies for its parameters, in bfloat16."""
        with _lent(self._field.places, self._tensors()):
            output: Tensor = field(x.to(HalfWeights.dtype), context, **options)
        return output

    def _tensors(self) -> Sequence[Tensor]:
        copies = self._field.copies
        if self._link is None or not torch.is_grad_enabled():
            return copies
        trained = [copies[n] for n in self._trained]
        used = _Use.apply(self._link, self._sums, *trained)  # type: ignore[no-untyped-call]
        tensors = list(copies)
        for n, tensor, total in zip(self._trained, used, self._sums, strict=True):
            tensor.gradient_sum = total
            tensors[n] = tensor
        return tensors


@contextmanager
def _lent(
    places: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Let modules see these tensors as their parameters."""
    own = [parameters[name] for parameters, name in places]
    for (parameters, name), tensor in zip(places, tensors, strict=True):
        parameters[name] = tensor
    try:
        yield
    finally:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = parameter


class GradientSum:
    """The float32 sum of a weight's gradients over its uses in one backward pass."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._backward_pass = -1

    def add(self, gradient: Tensor) -> None:
        """Add a gradient, of any dtype."""
        total = self._current()
        self._value = gradient.float() if total is None else total.add_(gradient)

    def add_product(self, grad: Tensor, x: Tensor) -> None:
        """Add `grad.T @ x`, the gradient of a linear layer's weight.

        Args:
            grad: gradient of the layer's output, (..., out).
            x: its input, (..., in).
        """
        a, b = grad.flatten(0, -2).t(), x.flatten(0, -2)
        total = self._current()
        if not (a.is_cuda and _ADDS_PRODUCTS):
            self.add(a @ b)
        elif total is None:
            self._value = torch.mm(a, b, out_dtype=torch.float32)
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    def take(self) -> Tensor | None:
        """Return the sum, None if there is none, and start again from zero."""
        value, self._value = self._current(), None
        return value

    def _current(self) -> Tensor | None:
        # A backward pass that did not go on to the parameters left a sum behind.
        now = torch._C._current_graph_task_id()
        if self._backward_pass != now:
            self._value, self._backward_pass = None, now
        return self._value


class _Masters(torch.autograd.Function):
    """Hands the sums to the parameters, after the last evaluation has gone backward."""

    @staticmethod
    def forward(ctx: Any, sums: list[GradientSum], *masters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return masters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(total.take() for total in ctx.sums)


class _Use(torch.autograd.Function):
    """One evaluation's view of the copies; adds the gradients that autograd brings to the sums."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, sums: list[GradientSum], *copies: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums = sums
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        for total, gradient in zip(ctx.sums, gradients, strict=True):
            if gradient is not None:
                total.add(gradient)
        return (None, None, *(None for _ in gradients))
