"""Costs of drafts are counted, and the schedules to choose from are within the model's own."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iiet import Decoder, DraftCosts, IterationSchedule, preset
from iiet.draft_choice import cheaper_schedules, counted_costs, named_drafts


def test_counted_costs_fall_with_corrections_and_rise_with_rows():
    full, none = preset("tiny", schedule=3), preset("tiny", schedule=0)
    one, many = (counted_costs(full, none, num_tokens=64, batch_size=rows) for rows in (1, 8))
    assert 0.2 < one.draft < 0.6
    assert 0.1 < one.further_token < many.further_token < 1
    assert counted_costs(full, full, num_tokens=64).draft == 1
    assert counted_costs(full, None, num_tokens=64).draft == 0
    on_gpu = counted_costs(full, none, num_tokens=64, device="cuda")
    assert on_gpu.further_token < 0.05
    with pytest.raises(ValueError, match="costs must be 0 or larger"):
        DraftCosts(-1.0, 0.0)


def test_schedules_that_may_draft():
    full = IterationSchedule((3, 1, 2))
    assert [str(s) for s in cheaper_schedules(full)] == ["0,0,0", "1,1,1", "2,1,2"]
    family = [IterationSchedule(s) for s in ((3, 1, 2), (3, 0, 0), (0, 0, 0), (0, 3, 0))]
    assert [str(s) for s in cheaper_schedules(full, family)] == ["0,0,0", "3,0,0"]
    assert cheaper_schedules(IterationSchedule.none(3)) == []


def test_a_gpu_drafts_only_what_is_asked_for():
    """Shown with a pretended GPU, as `auto` decides by the device of the weights alone."""
    decoder = Decoder(preset("tiny", num_layers=2, schedule=1))
    assert list(named_drafts(decoder, "auto", (), 8)) == ["0,0"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoder.embedding.weight = nn.Parameter(torch.empty(8, 8, device="cuda"))
    assert decoder.device.type == "cuda"
    assert named_drafts(decoder, "auto", (), 8) == {}
    assert list(named_drafts(decoder, "0", (), 8)) == ["0,0"]
