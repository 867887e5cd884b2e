"""Scores equal a direct computation, whatever is shared, batched, split or resumed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from method_schedules import schedule_for
from torch import Tensor, nn

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.methods import METHODS
from orchestrator.evaluation import scoring
from orchestrator.evaluation.decode_timing import peak_bytes
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.evaluation.scoring import Score, Segment, make_rows, score_continuations
from orchestrator.evaluation.store import AnswerJournal
from orchestrator.workspace.errors import DeviceError

VOCAB, CONTEXT = 60, 24


def make_decoder(method: str = "iiet") -> Decoder:
    torch.manual_seed(3)
    config = ModelConfig(
        method=method,
        vocab_size=VOCAB,
        dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=48,
        context_length=CONTEXT,
        schedule=schedule_for(method, (2, 0, 1)),
        initializer_std=0.3,
    )
    return Decoder(config).double()


@pytest.fixture
def small() -> Decoder:
    return make_decoder()


@torch.no_grad()
def directly(decoder: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score each segment by one plain forward pass, after as many earlier tokens as fit."""
    total, greedy = 0.0, True
    for start in range(0, len(continuation), CONTEXT):
        part = continuation[start : start + CONTEXT]
        before = (context + continuation[:start])[-(CONTEXT + 1 - len(part)) :]
        logits = decoder(torch.tensor([(before + part)[:-1]]))[0, -len(part) :]
        for log_probabilities, token in zip(logits.log_softmax(-1), part, strict=True):
            total += float(log_probabilities[token])
            greedy &= int(log_probabilities.argmax()) == token
    return total, greedy


def tokens(draw: random.Random, least: int, most: int) -> list[int]:
    return [draw.randrange(VOCAB) for _ in range(draw.randint(least, most))]


def mixed_pairs() -> list[tuple[list[int], list[int]]]:
    """Questions with several choices, single pairs, repeats, short and one-token continuations."""
    draw = random.Random(0)
    pairs = []
    for _ in range(6):
        context = tokens(draw, 8, 18)
        pairs += [(context, tokens(draw, 1, 6)) for _ in range(4)]
    one_token = tokens(draw, 12, 12)
    pairs += [(one_token, [draw.randrange(VOCAB)]) for _ in range(3)]
    pairs += [(tokens(draw, 1, 16), tokens(draw, 1, 8)) for _ in range(8)]
    pairs += [pairs[0], pairs[-1], (pairs[0][0], [])]
    draw.shuffle(pairs)
    return pairs


def assert_equal(found: Sequence[Score], expected: Sequence[tuple[float, bool]]) -> None:
    for score, (log_likelihood, is_greedy) in zip(found, expected, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-9)
        assert score.is_greedy == is_greedy


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_equals_a_direct_computation(method: str) -> None:
    decoder, pairs = make_decoder(method), mixed_pairs()
    assert_equal(score_continuations(decoder, pairs), [directly(decoder, *pair) for pair in pairs])


def test_long_contexts_are_cut_and_long_continuations_split(small: Decoder) -> None:
    draw = random.Random(1)
    context = tokens(draw, 40, 40)
    pairs = [(context, tokens(draw, n, n)) for n in (1, 5, 5, 24, 25, 60)]
    pairs += [([7], tokens(draw, 24, 24)), (tokens(draw, 24, 24), tokens(draw, 24, 24))]
    assert_equal(score_continuations(small, pairs), [directly(small, *pair) for pair in pairs])


@pytest.mark.parametrize("keys_per_token", [0, 4, 64])
@pytest.mark.parametrize("max_tokens", [1, 40, 1000])
def test_every_segment_is_in_one_row_that_is_not_too_long(
    keys_per_token: int, max_tokens: int
) -> None:
    draw = random.Random(0)
    segments = {
        Segment(tuple(draw.choices((1, 2), k=draw.randint(1, 4))), tuple(draw.choices((1, 2), k=k)))
        for k in draw.choices(range(1, 9), k=200)
    }
    rows = make_rows(segments, max_tokens, keys_per_token)
    assert sorted(s for row in rows for s in row.segments) == sorted(segments)
    keys = [(row.is_shared, -row.num_tokens) for row in rows]
    assert keys == sorted(keys)
    longest = max(len(context) + len(rest) - 1 for context, rest in segments)
    for row in rows:
        assert row.num_tokens <= max(max_tokens, longest)
        assert {segment.context for segment in row.segments} == {row.context}


def test_what_is_shared_is_evaluated_once_where_that_pays(small: Decoder) -> None:
    context, choices = list(range(16)), [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]]
    shapes: list[tuple[int, ...]] = []
    small.embedding.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    score_continuations(small, [(context, choice) for choice in choices])
    assert shapes == [(1, 22)]
    heads: list[int] = []
    small.norm.register_forward_hook(lambda _, args, __: heads.append(len(args[0])))
    # Choices of one token: one column, and no logits of a position that is not scored.
    score_continuations(small, [(range(16), (end,)) for end in (3, 4, 5)])
    assert (shapes[1:], heads) == ([(1, 16)], [1])
    # A short context is not worth a long row.
    endings = [Segment((1,), (*[n] * 50, 1)) for n in range(2, 30)]
    rows = make_rows(endings, 10_000, 256)
    assert [len(row.segments) for row in rows] == [1] * len(endings)


def limit_tokens(decoder: Decoder, most: int) -> list[int]:
    """Let passes of more tokens run out of memory; return the sizes of the passes, as they come."""
    sizes: list[int] = []

    def check(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        sizes.append(arguments[0].numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. 1 GiB is free. And more")

    decoder.embedding.register_forward_pre_hook(check)
    return sizes


def test_batches_do_not_change_scores_also_where_they_do_not_fit(
    small: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, seen = mixed_pairs(), list[tuple[int, int]]()
    usual = score_continuations(small, pairs)
    monkeypatch.setattr(scoring, "MAX_LOGITS_AT_ONCE", 3 * VOCAB)
    for batch_size in (1, 2, 64):
        again = score_continuations(
            small, pairs, batch_size=batch_size, on_scored=lambda *done: seen.append(done)
        )
        assert_equal(again, usual)
        assert len(seen) > 1 or batch_size == 64
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]
        seen.clear()
    assert score_continuations(small, []) == []
    for most in (120, 40, 24):
        narrow, notes = make_decoder(), list[str]()
        sizes = limit_tokens(narrow, most)
        assert_equal(score_continuations(narrow, pairs, note=notes.append), usual)
        too_large = [size for size in sizes if size > most]
        assert len(notes) == len(too_large) < 10, "each halves the limit for all that follow"
        assert "from here on, it has at most" in notes[0]
    limit_tokens(small, 10)
    with pytest.raises(DeviceError, match=r"one sequence ran out .* \(.* 1 GiB is free\); use"):
        score_continuations(small, pairs)


def test_scoring_resumes_to_the_same_bits(small: Decoder, tmp_path: Path) -> None:
    decoder, pairs, path = small.float(), mixed_pairs(), tmp_path / "answers"
    usual = score_continuations(decoder, pairs, batch_size=2)
    passes: list[int] = []
    decoder.embedding.register_forward_hook(lambda *_: passes.append(1))

    def stop(done: int, total: int) -> None:
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_continuations(
            decoder, pairs, batch_size=2, on_scored=stop, journal=AnswerJournal(path)
        )
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], lines[3][:-9], *lines[4:]]))
    again = score_continuations(decoder, pairs, batch_size=2, journal=AnswerJournal(path))
    assert again == usual
    num_batches, passes[:] = len(passes) - 1, []
    score_continuations(decoder, pairs, batch_size=2)
    assert len(passes) == num_batches, "only the batch whose line was cut off runs again"


def test_the_output_of_greedy_decoding_is_greedy_and_a_scored_decoder_can_be_trained(
    small: Decoder,
) -> None:
    prompt = [5, 9, 3, 40, 2, 2, 8, 30, 1, 17]
    written = generate(small, torch.tensor([prompt]), max_new_tokens=4)[0, 10:].tolist()
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    scores = score_continuations(small, [(prompt, written), (prompt, other)])
    assert [score.is_greedy for score in scores] == [True, False]
    small(torch.tensor([[1, 2, 3]])).sum().backward()
    assert small.embedding.weight.grad is not None


def test_the_validation_loss_of_smaller_batches_is_the_same(
    decoder: Decoder, tiny_tokens: Path
) -> None:
    usual = heldout_loss(decoder, tiny_tokens)
    sizes, notes = limit_tokens(decoder, 4 * 48), list[str]()
    assert heldout_loss(decoder, tiny_tokens, note=notes.append) == pytest.approx(usual, rel=1e-6)
    assert max(sizes) > 4 * 48
    assert notes


def test_scoring_keeps_the_last_hidden_state_only(tiny_model: dict[str, Any]) -> None:
    sizes = {"num_layers": 16, "method": "pcformer", "schedule": None, "context_length": 64}
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
