"""Query heads that share key heads equal repeated heads, and use a fused kernel."""

from __future__ import annotations

import pytest
import torch
from live_tensors import LargestTensor
from torch import Tensor

from iiet.model.layers import attend

HEADS = 8
KEY_HEADS = 2
WIDTH = 8
TOKENS = 64


def heads(time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, KEY_HEADS, TOKENS, WIDTH).to(dtype)
    return torch.randn(1, HEADS, time, WIDTH).to(dtype), keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_shared_heads_are_repeated_heads_and_no_scores_are_kept(dtype, masked):
    queries, keys, values = heads(TOKENS, dtype)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if masked else None
    with LargestTensor() as largest:
        mixed = attend(queries, keys, values, mask=mask, is_causal=not masked)
    repeated = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (keys, values))
    expected = attend(queries, *repeated, mask=mask, is_causal=not masked)
    torch.testing.assert_close(mixed, expected)
    assert largest.num_values < HEADS * TOKENS * TOKENS


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="before torch 2.9 a CPU repeats shared heads",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decoded_token_copies_no_keys(dtype):
    queries, keys, values = heads(1, dtype)
    with LargestTensor() as largest:
        attend(queries, keys, values, mask=None, is_causal=False)
    assert largest.num_values < keys.numel()
