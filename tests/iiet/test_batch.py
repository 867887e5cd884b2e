"""A batch's targets and counted positions, and those of its parts."""

import dataclasses

import pytest
import torch
from refusals import refused

from iiet.model.batch import NO_TARGET, Batch

TOKENS = torch.arange(12).view(3, 4)
MASK = torch.tensor([[True, False, True, True], [False, True, False, False], [False] * 4])


def test_the_targets_of_text_are_the_next_tokens():
    batch = Batch.of_text(TOKENS)
    assert batch.targets.tolist() == [
        [1, 2, 3, NO_TARGET],
        [5, 6, 7, NO_TARGET],
        [9, 10, 11, NO_TARGET],
    ]
    assert batch.num_targets == 9
    assert batch.teacher_mask is None
    assert batch.num_positions == 12, "a teacher has something to teach at the last ones"


def test_a_mask_of_text_names_the_tokens_that_are_targets():
    batch = Batch.of_text(TOKENS, MASK)
    assert batch.mask.tolist() == [
        [False, True, True, True],
        [True, False, False, False],
        [False] * 4,
    ]
    assert torch.equal(batch.targets, Batch.of_text(TOKENS).targets)
    assert (batch.num_targets, batch.num_positions) == (3, 4)
    everything = Batch.of_text(TOKENS, torch.ones_like(TOKENS))
    assert (everything.num_targets, everything.num_positions) == (9, 12)


def test_outside_text_only_positions_with_a_target_count():
    targets = TOKENS.masked_fill(~MASK, NO_TARGET)
    batch = Batch(TOKENS, targets)
    assert torch.equal(batch.teacher_mask, MASK)
    assert (batch.num_targets, batch.num_positions) == (4, 4)
    masked = Batch(TOKENS, targets, torch.tensor([[True, True, False, True]] * 3))
    assert masked.teacher_mask.tolist() == [
        [True, False, False, True],
        [False, True, False, False],
        [False] * 4,
    ]
    assert (masked.num_targets, masked.num_positions) == (3, 3)


def test_parts_have_their_rows_and_their_share_of_the_counts():
    whole = Batch.of_text(TOKENS, MASK).counted_as(3, 6)
    parts = whole.split(2)
    assert [len(part) for part in parts] == [2, 1]
    for name in ("input_ids", "targets", "mask"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name
    assert [(part.target_count, part.position_count) for part in parts] == [(2, 4), (1, 2)]
    assert all(part.is_text for part in parts)
    (only_part,) = Batch.of_text(TOKENS).split(99)
    assert (only_part.target_count, only_part.position_count, only_part.mask) == (None, None, None)


def test_a_batch_moves_as_a_whole_and_does_not_change():
    batch = Batch.of_text(TOKENS, MASK).counted_as(1.0, 2.0)
    moved = batch.to("meta")
    for values in (moved.input_ids, moved.targets, moved.mask):
        assert values.device.type == "meta"
    assert (moved.is_text, moved.target_count, moved.position_count) == (True, 1.0, 2.0)
    assert batch.to("cpu").mask is batch.mask
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.mask = None


def test_wrong_shapes_are_named():
    with refused(ValueError, "input_ids", "(4,)"):
        Batch.of_text(TOKENS[0])
    with refused(ValueError, "targets", "(3, 3)"):
        Batch(TOKENS, TOKENS[:, 1:])
    with refused(ValueError, "mask", "(1, 4)"):
        Batch(TOKENS, TOKENS, MASK[:1])
