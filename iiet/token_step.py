"""A field for one token per row, in few operations: what a decoding step computes.

On a CPU, a step reads every weight once, which evicts the interpreter from the processor's cache,
so each operation, view and module call then costs several times as much. On a GPU, a step of one
row is bound by the launches of its kernels. So `evaluate_token` repeats `Field.forward` without
modules and transposes: on a GPU by 13 kernels, where the modules launch 17.

    both    keys and values are appended as one tensor
    CPU     products near the speed at which memory delivers the weights
    GPU     rotation by two kernels; the last product adds to the residual in place
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iiet.cpu_kernels import cached_scalar, is_bare, may_read_weights, rms_norm, rotate_
from iiet.rope import turn_

__all__ = [
    "evaluate_token",
    "few_rows_product",
    "is_bare_linear",
    "serves_fields",
    "serves_token_step",
    "uses_cpu_forms",
]

MAX_ROWS: Final = 8  # On a CPU; for more tokens `F.linear` is as fast.


def serves_token_step(hidden: Tensor, *, cached: bool) -> bool:
    """Tell whether `evaluate_token` may compute a pass over (batch, time, dim)."""
    return (
        cached
        and hidden.size(1) == 1
        and (not uses_cpu_forms(hidden) or _serves_cpu(hidden))
        and not torch.is_grad_enabled()
        and may_read_weights()
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def uses_cpu_forms(x: Tensor) -> bool:
    """Tell whether the forms for CPUs compute this tensor."""
    return x.is_cpu


def _serves_cpu(hidden: Tensor) -> bool:
    return hidden.size(0) <= MAX_ROWS and hidden.dtype in (torch.float32, torch.float64)


def serves_fields(fields: Iterable[nn.Module]) -> bool:
    """Tell whether `evaluate_token` may read the weights of all these fields."""
    return all(map(_is_bare_field, fields))


def _is_bare_field(field: nn.Module) -> bool:
    kinds = getattr(type(field), "bare_parts", None)
    if kinds is None or not is_bare(field, type(field)):
        return False
    for name, module in field._modules.items():  # Attribute access would take three times as long.
        if module is None or not is_bare(module, kinds[name]):
            return False
        for linear in module._modules.values():
            if linear is None or not is_bare_linear(linear):
                return False
    return True


def is_bare_linear(linear: nn.Module) -> bool:
    """Tell whether `few_rows_product` may compute this linear layer."""
    return is_bare(linear, nn.Linear)


def evaluate_token(field: Any, x: Tensor, context: Any, slot: int | None) -> Tensor:
    """Compute `Field.forward` for one token per row, (batch, 1, dim).

    Args:
        field: an `iiet.layers.Field` that `serves_fields` allows.
        x: on a CPU at most `MAX_ROWS` rows.
        context: the pass's `iiet.context.PassContext`.
        slot: the cache slot of this evaluation.
    """
    compute = _evaluate_on_cpu if uses_cpu_forms(x) else _evaluate_on_gpu
    return compute(field, x, context, slot)


def _evaluate_on_cpu(field: Any, x: Tensor, context: Any, slot: int | None) -> Tensor:
    attention, network = field.attention, field.feed_forward
    batch, num_turned = x.size(0), attention.num_heads + attention.num_kv_heads
    normed = _normalized(x, field.attention_norm)
    qkv = few_rows_product(normed, attention.qkv, batch)
    # With one token, heads before time is the same memory as time before heads.
    heads = qkv.view(batch, -1, 1, attention.head_dim)
    rotate_(heads.narrow(1, 0, num_turned), *context.rope)
    mixed = context.attend_heads(heads, attention.num_heads, slot)
    u = _add_few_rows_product(x, mixed, attention.out, batch)
    normed = _normalized(u, field.feed_forward_norm)
    gate, up = few_rows_product(normed, network.gate_up, batch).chunk(2, -1)
    return _add_few_rows_product(u, F.silu(gate).mul_(up), network.down, batch)


def _evaluate_on_gpu(field: Any, x: Tensor, context: Any, slot: int | None) -> Tensor:
    attention, network = field.attention, field.feed_forward
    batch, num_turned = x.size(0), attention.num_heads + attention.num_kv_heads
    qkv = F.linear(_fused_norm(x, field.attention_norm), attention.qkv.weight)
    heads = qkv.view(batch, -1, 1, attention.head_dim)
    turn_(heads.narrow(1, 0, num_turned), context.turns)
    mixed = context.attend_heads(heads, attention.num_heads, slot)
    u = x + F.linear(mixed.reshape(batch, 1, -1), attention.out.weight)
    gate_up = F.linear(_fused_norm(u, field.feed_forward_norm), network.gate_up.weight)
    gate, up = gate_up.view(batch, -1).chunk(2, -1)
    # Out of place, this product would begin with a copy of u.
    u.view(batch, -1).addmm_(F.silu(gate).mul_(up), network.down.weight.t())
    return u


def _fused_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _normalized(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    if len(x) > 1:
        return rms_norm(x, norm.weight, norm.eps)
    x = x.view(-1)
    rstd = (torch.dot(x, x).item() / len(x) + norm.eps) ** -0.5
    return torch.addcmul(cached_scalar(0.0, x), x, norm.weight, value=rstd)


def few_rows_product(x: Tensor, linear: nn.Module, rows: int) -> Tensor:
    """Compute `x @ weight.T` near the speed at which memory delivers the weight.

    Args:
        x: `rows` contiguous vectors, in any shape.
        linear: holds the weight, (out, in); one that `is_bare_linear` allows, or an embedding.
        rows: at most `MAX_ROWS`.

    Returns:
        (rows, out), or (out,) for one row; contiguous.
    """
    weight: Tensor = linear.weight  # type: ignore[assignment]
    if rows == 1:
        return torch.mv(weight, x.view(-1))
    x = x.view(rows, -1)
    if _is_faster_on_the_right(weight, rows):
        return F.linear(x, weight)
    return torch.mm(weight, x.t()).t().contiguous()


def _is_faster_on_the_right(weight: Tensor, rows: int) -> bool:
    """Tell whether two to eight rows take less time as `x @ W.T` than as `W @ x.T`.

    PyTorch's matrix library has other kernels for Intel's processors. There, two rows take half the
    time on the right, and eight rows if a processor's second cache holds the weight. On an AMD
    EPYC, four rows take half the time on the left. The choice is made by the processor, not by
    timing, so that a machine always computes the same.
    """
    if _is_intel():
        return rows <= MAX_ROWS // 2 or weight.numel() <= _NUMBERS_IN_SECOND_CACHE
    return rows > MAX_ROWS // 2 and weight.size(0) < weight.size(1)


_NUMBERS_IN_SECOND_CACHE: Final = 2**19  # 2 MiB of float32.


@cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # Not Linux.
        return "GenuineIntel" in platform.processor()


def _add_few_rows_product(base: Tensor, x: Tensor, linear: nn.Module, rows: int) -> Tensor:
    """Compute `base + x @ weight.T`, (rows, 1, out); one operation for one row."""
    if rows == 1 and type(linear) is nn.Linear:
        return torch.addmv(base.view(-1), linear.weight, x.view(-1)).view_as(base)
    return base + few_rows_product(x, linear, rows).view_as(base)
