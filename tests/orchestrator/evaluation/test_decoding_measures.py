"""Drafts and cache strategies on tiny models: cases whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.decode_timing import sweep_prompt_length
from orchestrator.evaluation.draft_speed import measure_draft


def make_decoder(tiny_model: dict[str, Any], seed: int = 0, **changes: Any) -> Decoder:
    torch.manual_seed(seed)
    config = {**tiny_model, "initializer_std": 0.5, **changes}
    return Decoder(ModelConfig.from_dict(config)).eval()


@pytest.fixture
def texts(tiny_model: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (8, tiny_model["context_length"])
    return torch.randint(tiny_model["vocab_size"], size, generator=generator)


def test_of_a_draft_with_the_same_weights_and_schedule_all_tokens_are_kept(
    tiny_model: dict[str, Any], texts: torch.Tensor
) -> None:
    speed = measure_draft(make_decoder(tiny_model), make_decoder(tiny_model), texts)
    assert speed.acceptance == 1.0
    assert speed.ms_per_token > 0
    assert speed.speed_up > 0


def test_acceptance_is_the_share_of_tokens_that_both_choose(
    tiny_model: dict[str, Any], texts: torch.Tensor
) -> None:
    full = make_decoder(tiny_model)
    none = IterationSchedule.none(len(full.schedule))
    speed = measure_draft(full, none, texts)
    # After the same tokens, the same weights without corrections choose some of the same tokens.
    length = sweep_prompt_length(full.config.context_length)
    continued = generate(full, texts[:, :length], max_new_tokens=texts.size(1) - length)
    with torch.no_grad():
        choices = full(continued[:, :-1], schedule=none).argmax(-1)
    same = (choices == continued[:, 1:])[:, length - 1 :].float().mean().item()
    assert 0 < same < 1
    # Not every token is drafted, and a draft reads the full model's slots; so it is near.
    assert speed.acceptance == pytest.approx(same, abs=0.2)
