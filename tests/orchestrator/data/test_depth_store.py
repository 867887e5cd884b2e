"""Depth data are generated from seed and position; a model sees only what it must answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from iiet.batch import NO_TARGET
from orchestrator.data.depth.store import DepthStore
from orchestrator.data.preparation import expected_tokens, find_prepared, prepare
from orchestrator.data.shares import SourceOrder
from orchestrator.data.sources import open_data
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace


def data_settings(*tasks: str, **changes: int) -> DataSettings:
    options = {f"data.depth.{name}": value for name, value in changes.items()}
    return resolve_settings(
        {}, options={"data.source": "depth", "data.depth.tasks": tasks, **options}
    ).data


def opened(folder: Path, *tasks: str, **changes: int) -> DepthStore:
    data = open_data(prepare(data_settings(*tasks, **changes), Workspace(folder)))
    assert isinstance(data, DepthStore)
    return data


def test_prepared_once_and_found_again(tmp_path: Path) -> None:
    workspace, settings = Workspace(tmp_path), data_settings("phop_3", length=32)
    expected = expected_tokens(settings, None)
    assert find_prepared(settings, workspace.tokens) is None
    folder = prepare(settings, workspace)
    assert find_prepared(settings, workspace.tokens) == folder == prepare(settings, workspace)
    data = open_data(folder)
    assert (
        (data.vocab_size, data.fingerprint)
        == (expected.vocab_size, folder.name)
        == (5, folder.name)
    )
    assert expected.context_length == 32
    assert prepare(data_settings("phop_4", length=32), workspace) != folder


def test_sequences_depend_on_seed_and_position_alone(tmp_path: Path) -> None:
    data = opened(tmp_path, "phop_3", "chain_2", "s5_6", length=16)
    several = data.sequences(np.arange(40), context_length=20, seed=3)
    for place in (0, 7, 39):
        one = data.sequences(np.array([place]), context_length=20, seed=3)
        assert torch.equal(one.input_ids[0], several.input_ids[place])
        assert torch.equal(one.targets[0], several.targets[place])
    others = data.sequences(np.arange(40), context_length=20, seed=4)
    assert not torch.equal(others.input_ids, several.input_ids)
    (held_out,) = data.validation_batches(context_length=20, num_tokens=800, batch_size=64)
    rows = {tuple(row.tolist()) for row in several.input_ids}
    assert len(held_out) == 40
    assert not rows & {tuple(row.tolist()) for row in held_out.input_ids}


def test_a_step_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    data = opened(tmp_path, "phop_3", "s5_6", length=16)
    options = {"context_length": 17, "seed": 1, "global_batch": 12}
    whole = data.batch(5, **options)
    parts = [data.batch(5, **options, rank=rank, world_size=3) for rank in range(3)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_targets_are_answers_and_padding_has_none(tmp_path: Path) -> None:
    data = opened(tmp_path, "s5_4")
    batch = data.sequences(np.arange(8), context_length=10, seed=0)
    assert (batch.targets[:, :4] != NO_TARGET).all()
    assert torch.equal(batch.targets[:, 0], batch.input_ids[:, 0])  # a product of one factor
    assert (batch.targets[:, 4:] == NO_TARGET).all()
    assert (batch.input_ids[:, 4:] == data.manifest.end_of_text_id).all()
    assert batch.num_targets == batch.num_positions == 32


def test_each_of_several_tasks_begins_with_its_name(tmp_path: Path) -> None:
    data = opened(tmp_path, "phop_2", "s5_4", length=16)
    tokenizer = load_tokenizer(data.tokenizer_path)
    batch = data.sequences(np.arange(1000), context_length=data.sequence_length, seed=0)
    first = [tokenizer.id_to_token(number) for number in batch.input_ids[:, 0].tolist()]
    assert first.count("<|phop_2|>") == first.count("<|s5_4|>") == 500
    assert data.sequence_length == 17


def test_items_are_texts_that_the_tokenizer_reads_back(tmp_path: Path) -> None:
    data = opened(tmp_path, "phop_3", "chain_2", length=16)
    tokenizer = load_tokenizer(data.tokenizer_path)
    for task in data.tasks:
        items = list(data.items(task, 300))
        assert len(items) == 300
        assert items[:10] == list(data.items(task, 10))
        for item in items[:20]:
            ids = tokenizer.encode(item.context, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == item.context
            assert tokenizer.id_to_token(ids[0]) == f"<|{task.name}|>"
            assert len(ids) <= task.length + 1
            assert item.answer in task.symbols


def test_items_go_on_after_sequences_without_an_answer(tmp_path: Path) -> None:
    # One sequence in 416 has no symbol twice.
    data = opened(tmp_path, "phop_1", num_symbols=8, length=8)
    (task,) = data.tasks
    items = list(data.items(task, 2000))
    assert len(items) == 2000
    runs = {tuple(items[first : first + 5]) for first in range(len(items) - 4)}
    assert len(runs) == len(items) - 4, "sequences come again"


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"tasks": ["phop_0"]}, "phop_0 has depth 0"),
        ({"tasks": ["hops_3"]}, "is not a depth task"),
        ({"tasks": ["phop_3", "phop_3"]}, "a task is given twice"),
        ({"tasks": ["phop_3"], "num_symbols": 1}, "data.depth.num_symbols"),
        ({"tasks": ["chain_3"], "num_chains": 1}, "data.depth.num_chains"),
    ],
)
def test_bad_settings_are_errors(tree: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        resolve_settings({"data": {"source": "depth", "depth": tree}})


def test_no_tasks_and_tasks_that_do_not_fit_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.depth\.tasks is empty"):
        prepare(data_settings(), Workspace(tmp_path))
    with pytest.raises(UserError, match="length=64 is too short for phop_20"):
        prepare(data_settings("phop_20"), Workspace(tmp_path))
    with pytest.raises(UserError, match=r"64 tokens, more than model\.context_length=32"):
        opened(tmp_path, "phop_6").check_length(32)


def test_shares_are_exact_in_each_block_and_numbers_follow_each_other() -> None:
    order = SourceOrder.of_shares([0.7, 0.2, 0.1])
    positions = np.arange(3000)
    for share, (own, numbers) in zip((0.7, 0.2, 0.1), order.split(positions, 9), strict=True):
        assert own.sum() == round(3000 * share)
        assert sorted(numbers.tolist()) == list(range(len(numbers)))
        assert own[:200].sum() == pytest.approx(200 * share, abs=25)
