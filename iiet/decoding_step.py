"""One token per row through a field, in as few operations as it takes.

A decoding step on a CPU reads every weight once, which evicts the interpreter from the processor's
cache: each operation, view and module call after it costs several times what it costs in a loop of
its own. So this path repeats the field's formulas without modules, checks and transposes. A tenth
of a step's time at width 256; the shared test suite holds it to the full forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iiet.attend import attend
from iiet.linear import MAX_ROWS, add_few_rows_product, few_rows_product, is_plain
from iiet.norm import RMSNorm, normalize
from iiet.rope import rotate_

if TYPE_CHECKING:
    from iiet.context import AttentionContext
    from iiet.field import Field

__all__ = ["evaluate_token", "is_plain_field", "is_token_step"]


def is_token_step(hidden: Tensor, *, cached: bool) -> bool:
    """Tell whether `evaluate_token` serves this hidden state, (batch, time, dim)."""
    return (
        cached
        and hidden.size(1) == 1
        and hidden.size(0) <= MAX_ROWS
        and hidden.is_cpu
        and hidden.dtype in (torch.float32, torch.float64)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain_field(field: nn.Module) -> bool:
    """Tell whether a field's weights may be read instead of calling its modules."""
    for name, module in field._modules.items():  # Attribute access would take three times as long.
        assert module is not None
        if not is_plain(module, RMSNorm if name.endswith("norm") else type(module)):
            return False
        for linear in module._modules.values():
            if linear is None or not is_plain(linear, nn.Linear):
                return False
    return True


def evaluate_token(field: Field, x: Tensor, context: AttentionContext, slot: int) -> Tensor:
    """Evaluate a field as `Field.forward` does, for one token per row.

    Args:
        field: the layer's block.
        x: (batch, 1, dim), at most `MAX_ROWS` rows.
        context: of this pass; it has a cache.
        slot: the cache slot of this evaluation.

    Returns:
        F(x), (batch, 1, dim).
    """
    attention, network = field.attention, field.feed_forward
    batch, num_heads, num_kv_heads = x.size(0), attention.num_heads, attention.num_kv_heads
    normed = normalize(x, field.attention_norm.weight, field.norm_eps)
    qkv = few_rows_product(normed, attention.qkv.weight, batch)
    # With one token, heads before time is the same memory as time before heads.
    heads = qkv.view(batch, -1, 1, attention.head_dim)
    rotate_(heads.narrow(1, 0, num_heads + num_kv_heads), context.rope.cos, context.rope.sin)
    queries, keys, values = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), 1)
    assert context.cache is not None
    keys, values = context.cache.update(keys, values, slot)
    if keys.size(2) != context.total:
        keys, values = keys[:, :, : context.total], values[:, :, : context.total]
    mixed = attend(queries, keys, values, mask=context.mask)
    u = add_few_rows_product(x, mixed, attention.out.weight, batch)
    normed = normalize(u, field.feed_forward_norm.weight, field.norm_eps)
    gate, up = few_rows_product(normed, network.gate_up.weight, batch).chunk(2, -1)
    inner = F.silu(gate).mul_(up)
    return add_few_rows_product(u, inner, network.down.weight, batch)
