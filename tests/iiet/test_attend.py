"""Query heads that share key heads equal repeated heads, and use a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iiet.attention import _CPU_SHARES_HEADS, attend

HEADS, KEY_HEADS, WIDTH, TOKENS = 8, 2, 8, 64


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation makes."""

    num_values = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.num_values = max(self.num_values, held)
        return result


def heads(time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, KEY_HEADS, TOKENS, WIDTH).to(dtype)
    return torch.randn(1, HEADS, time, WIDTH).to(dtype), keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_are_repeated_heads_and_no_scores_are_kept(
    dtype: torch.dtype, masked: bool
) -> None:
    queries, keys, values = heads(TOKENS, dtype)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if masked else None
    with Largest() as largest:
        mixed = attend(queries, keys, values, mask=mask, is_causal=not masked)
    repeated = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (keys, values))
    expected = attend(queries, *repeated, mask=mask, is_causal=not masked)
    torch.testing.assert_close(mixed, expected)
    assert largest.num_values < HEADS * TOKENS * TOKENS


@pytest.mark.skipif(not _CPU_SHARES_HEADS, reason="before torch 2.9 a CPU repeats shared heads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decoded_token_copies_no_keys(dtype: torch.dtype) -> None:
    queries, keys, values = heads(1, dtype)
    with Largest() as largest:
        attend(queries, keys, values, mask=None, is_causal=False)
    assert largest.num_values < keys.numel()
