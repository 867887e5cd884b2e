"""A batch that does not fit a GPU's memory is split; results stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from iiet import Decoder, ModelConfig
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.evaluation.cost_measurement import peak_bytes
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.evaluation.scoring import score_continuations
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.workspace.errors import DeviceError


def limit_tokens(decoder: Decoder, most: int) -> list[int]:
    """Let passes of more tokens run out of memory; return the sizes of the passes, as they come."""
    sizes: list[int] = []

    def check(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sizes.append(arguments[0].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. 1 GiB is free. And more")

    decoder.embedding.register_forward_pre_hook(check)
    return sizes


def pairs() -> list[tuple[list[int], list[int]]]:
    """Return single pairs, and questions of one context and several choices."""
    numbers = torch.randint(300, (40, 20), generator=torch.Generator().manual_seed(0)).tolist()
    single = [(row[:5], row[5:12]) for row in numbers[:20]]
    shared = [(row[:10], row[10 + n : 14 + n]) for row in numbers[20:] for n in range(6)]
    return single + shared


@pytest.mark.parametrize("most", [120, 40, 13])
def test_scores_of_smaller_batches_are_the_same(decoder: Decoder, most: int) -> None:
    decoder = decoder.double()
    usual = score_continuations(decoder, pairs())
    sizes, notes = limit_tokens(decoder, most), list[str]()
    scores = score_continuations(decoder, pairs(), note=notes.append)
    for score, expected in zip(scores, usual, strict=True):
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-10)
        assert score.is_greedy == expected.is_greedy
    too_large = [size for size in sizes if size > most]
    assert len(notes) == len(too_large) < 10, "each halves the limit for all that follow"
    assert "from here on, it has at most" in notes[0]


def test_one_sequence_that_does_not_fit_ends_the_evaluation(decoder: Decoder) -> None:
    limit_tokens(decoder, 10)
    with pytest.raises(DeviceError, match=r"one sequence ran out .* \(.* 1 GiB is free\); use"):
        score_continuations(decoder, pairs())


def test_answers_of_smaller_batches_are_the_same(
    decoder: Decoder, tokenizer: ModelTokenizer
) -> None:
    settings = AnswerSettings(max_new_tokens=9, temperature=1.0)
    asked = [Question(tuple(range(5, 10 + n)), settings, seed=n) for n in range(8)]
    usual = generate_answers(decoder, tokenizer, asked)
    limit_tokens(decoder, 30)
    notes: list[str] = []
    assert generate_answers(decoder, tokenizer, asked, note=notes.append) == usual
    assert [note.partition("at most ")[2] for note in notes] == ["4 questions", "2 questions"]


def test_the_validation_loss_of_smaller_batches_is_the_same(
    decoder: Decoder, tiny_tokens: Path
) -> None:
    usual = heldout_loss(decoder, tiny_tokens)
    sizes, notes = limit_tokens(decoder, 4 * 48), list[str]()
    assert heldout_loss(decoder, tiny_tokens, note=notes.append) == pytest.approx(usual, rel=1e-6)
    assert max(sizes) > 4 * 48
    assert notes


@pytest.mark.parametrize("method", ["vanilla", "pcformer"])
def test_scoring_keeps_the_last_hidden_state_only(tiny_model: dict[str, Any], method: str) -> None:
    sizes = {"num_layers": 16, "method": method, "schedule": None, "context_length": 64}
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, **sizes})).eval()
    one_state = 32 * 64 * decoder.config.dim * 4
    ids = torch.zeros(32, 64, dtype=torch.long)
    segments = [([n] * 64, [2]) for n in range(32)]

    def measured(work: Callable[[], object]) -> int:
        with torch.no_grad():
            return peak_bytes(work)

    all_states = measured(lambda: decoder(ids, last_only=True, return_hidden=True))
    scored = measured(lambda: score_continuations(decoder, segments))
    assert all_states - scored > 12 * one_state
