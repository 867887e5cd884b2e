"""Each window occurs once per epoch, and a batch does not depend on the number of workers."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from orchestrator.data import store
from orchestrator.data.order import WindowOrder, check_even_split, permute, positions_of_step
from orchestrator.data.store import FileArray, TokenStore, gather
from orchestrator.workspace.errors import UserError


@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_permute_is_a_permutation(size, key):
    images = permute(np.arange(size), size, key)
    assert sorted(images.tolist()) == list(range(size))


def test_permutations_depend_on_the_key_and_mix():
    first, second = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.15
    # A huge size costs no more, because nothing is stored.
    assert permute(np.array([7]), 10**15, 3)[0] < 10**15


@given(st.integers(10, 60), st.integers(2, 10), st.integers(0, 5), st.integers(1, 6))
def test_an_epoch_visits_each_window_once(tokens, context, seed, batch):
    order = WindowOrder(tokens, context, seed)
    steps = range(math.ceil(3 * order.num_windows / batch))
    starts = np.concatenate(
        [order.starts(positions_of_step(step, global_batch=batch)) for step in steps]
    )
    for epoch in range(3):
        first = epoch * order.num_windows
        visited = np.sort(starts[first : first + order.num_windows])
        assert (np.diff(visited) == context).all()
        assert visited[0] >= 0
        assert visited[-1] + context <= tokens


def test_epochs_and_seeds_differ_in_order_and_offset():
    order = WindowOrder(10_000, 64)
    epochs = np.split(order.starts(np.arange(6 * order.num_windows)), 6)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({int(epoch[0]) % 64 for epoch in epochs}) > 2
    other_seed = WindowOrder(10_000, 64, seed=1).starts(np.arange(50))
    assert (other_seed != epochs[0][:50]).mean() > 0.9


def test_sequences_are_slices_of_the_tokens(tmp_path):
    tokens = in_files(tmp_path / "tokens", np.arange(2000, dtype=np.uint16), 900)
    rows = gather(tokens, WindowOrder(2000, 16).starts(np.arange(15, 20)), 16)
    assert rows.shape == (5, 16)
    assert rows.dtype == torch.int64
    assert (rows == rows[:, :1] + torch.arange(16)).all()
    assert WindowOrder(16, 16).starts(np.arange(10, 12)).tolist() == [0, 0]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_workers_share_a_step_as_evenly_as_possible(batch, workers, step):
    batch = max(batch, workers)
    shares = [
        positions_of_step(step, global_batch=batch, rank=rank, world_size=workers)
        for rank in range(workers)
    ]
    assert np.concatenate(shares).tolist() == list(range(step * batch, (step + 1) * batch))
    assert {len(share) for share in shares} <= {batch // workers, -(-batch // workers)}
    if batch % workers:
        with refused(UserError, workers):
            check_even_split(batch, workers)


def in_files(folder: Path, values: np.ndarray, *ends: int) -> FileArray:
    """Write values to files that end where `ends` say, and at the end."""
    folder.mkdir()
    files = [folder / str(number) for number in range(len(ends) + 1)]
    for file, part in zip(files, np.split(values, ends), strict=True):
        file.write_bytes(part.tobytes())
    return FileArray(files, values.dtype)


@given(st.lists(st.integers(0, 60)), st.integers(1, 60), st.integers(1, 60))
def test_an_array_in_any_files_is_one_array(ends, length, size):
    values = np.random.default_rng(size).integers(0, 999, size, dtype=np.uint16)
    length = min(length, size)
    starts = np.random.default_rng(length).integers(0, size - length + 1, 9)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "MAPS_KEPT", 2)
        array = in_files(Path(folder) / "files", values, *sorted(min(end, size) for end in ends))
        assert len(array) == size
        assert array[:].tolist() == values.tolist()
        assert array[3:-2].tolist() == values[3:-2].tolist()
        expected = values[starts[:, None] + np.arange(length)]
        assert array.windows(starts, length).tolist() == expected.tolist()


def test_files_that_are_not_read_are_not_open(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAPS_KEPT", 3)
    array = in_files(tmp_path / "files", np.arange(100, dtype=np.uint16), *range(5, 100, 5))
    before = psutil.Process().num_fds()
    array.windows(np.arange(0, 100, 5), 5)
    assert psutil.Process().num_fds() - before <= 3


def test_training_and_validation_read_their_own_tokens(tmp_path):
    manifest: Any = None
    train = in_files(tmp_path / "train", np.arange(600, dtype=np.uint16), 200)
    validation = in_files(tmp_path / "validation", np.arange(600, 1000, dtype=np.uint16))
    tokens = TokenStore(Path(), manifest, train, validation)
    held_out = torch.cat(
        [
            batch.input_ids
            for batch in tokens.validation_batches(context_length=10, num_tokens=400, batch_size=8)
        ]
    )
    assert held_out.flatten().tolist() == list(range(600, 1000))
    trained = tokens.sequences(np.arange(300), context_length=10, seed=0).input_ids
    assert int(trained.max()) < 600


def test_validation_is_spread_over_the_text_and_too_little_text_is_an_error(tmp_path):
    def batches(values: np.ndarray, **options: int) -> list[Any]:
        manifest: Any = None
        number = len([*tmp_path.iterdir()])
        tokens = in_files(tmp_path / str(number), values)
        return list(TokenStore(Path(), manifest, tokens, tokens).validation_batches(**options))

    tokens = np.arange(1000, dtype=np.uint16)
    selected = batches(tokens, context_length=10, num_tokens=100, batch_size=4)
    assert [len(batch) for batch in selected] == [4, 4, 2]
    assert torch.cat([b.input_ids for b in selected])[:, 0].tolist() == list(range(0, 1000, 100))
    assert all(torch.equal(b.targets[:, :-1], b.input_ids[:, 1:]) for b in selected)
    everything = batches(tokens, context_length=10, num_tokens=10**9, batch_size=64)
    assert torch.equal(torch.cat([b.input_ids for b in everything]).flatten(), torch.arange(1000))
    with refused(UserError, "15 tokens"):
        batches(tokens[:15], context_length=16, num_tokens=16, batch_size=1)
