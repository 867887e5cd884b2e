"""Each window occurs once per epoch, and a batch does not depend on the number of workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.batches import (
    WindowOrder,
    check_even_split,
    gather,
    positions_of_step,
    validation_batches,
)
from orchestrator.data.keyed_random import permute
from orchestrator.workspace.errors import UserError


@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    images = permute(np.arange(size), size, key)
    assert sorted(images.tolist()) == list(range(size))


def test_permutations_depend_on_the_key_and_mix() -> None:
    first, second = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.15
    # A huge size costs no more, because nothing is stored.
    assert permute(np.array([7]), 10**15, 3)[0] < 10**15


@given(st.integers(10, 200), st.integers(2, 10), st.integers(0, 5), st.integers(1, 6))
def test_an_epoch_visits_each_window_once(tokens: int, context: int, seed: int, batch: int) -> None:
    order = WindowOrder(tokens, context, seed)
    steps = range(3 * order.num_windows)
    starts = np.concatenate(
        [order.starts(positions_of_step(step, global_batch=batch)) for step in steps]
    )
    for epoch in range(3):
        first = epoch * order.num_windows
        visited = np.sort(starts[first : first + order.num_windows])
        assert (np.diff(visited) == context).all()
        assert visited[0] >= 0
        assert visited[-1] + context <= tokens


def test_epochs_differ_in_order_and_offset() -> None:
    order = WindowOrder(10_000, 64)
    epochs = np.split(order.starts(np.arange(6 * order.num_windows)), 6)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({int(epoch[0]) % 64 for epoch in epochs}) > 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_workers_share_one_batch(world_size: int) -> None:
    parts = [
        positions_of_step(17, global_batch=12, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert np.concatenate(parts).tolist() == list(range(17 * 12, 18 * 12))


def test_sequences_are_slices_of_the_tokens() -> None:
    tokens = np.arange(2000, dtype=np.uint16)
    rows = gather(tokens, WindowOrder(2000, 16).starts(np.arange(15, 20)), 16)
    assert rows.shape == (5, 16)
    assert rows.dtype == torch.int64
    assert (rows == rows[:, :1] + torch.arange(16)).all()


def test_seeds_differ() -> None:
    first, second = (WindowOrder(9999, 16, seed).starts(np.arange(50)) for seed in (0, 1))
    assert (first != second).mean() > 0.9


def test_validation_batches_are_spread_over_the_text() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = list(validation_batches(tokens, context_length=10, num_tokens=100, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.cat([b.input_ids for b in batches])[:, 0].tolist() == list(range(0, 1000, 100))
    assert all(torch.equal(b.targets[:, :-1], b.input_ids[:, 1:]) for b in batches)
    every = list(validation_batches(tokens, context_length=10, num_tokens=10**9, batch_size=64))
    assert torch.equal(torch.cat([b.input_ids for b in every]).flatten(), torch.arange(1000))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 7])
def test_workers_share_a_step_as_evenly_as_possible(num_workers: int) -> None:
    shares = [
        positions_of_step(3, global_batch=7, rank=rank, world_size=num_workers)
        for rank in range(num_workers)
    ]
    assert np.concatenate(shares).tolist() == list(range(21, 28))
    assert {len(share) for share in shares} <= {7 // num_workers, -(-7 // num_workers)}


def test_too_little_text_and_uneven_workers_are_errors() -> None:
    with pytest.raises(
        UserError, match="training text has 15 tokens, fewer than one sequence of 16"
    ):
        WindowOrder(15, 16)
    assert WindowOrder(16, 16).starts(np.arange(10, 12)).tolist() == [0, 0]
    with pytest.raises(UserError, match="validation text has 3 tokens"):
        list(validation_batches(np.zeros(3), context_length=4, num_tokens=8, batch_size=1))
    with pytest.raises(UserError, match="5 sequences, which 2 workers cannot share evenly"):
        check_even_split(5, 2)
