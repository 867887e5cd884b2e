"""Scores equal a direct computation, with any sharing, cutting, splitting and batching."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from method_schedules import schedule_for

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.methods import METHODS
from orchestrator.evaluation import scoring
from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.scoring import score_continuations

VOCAB, CONTEXT = 60, 24


def make_decoder(method: str = "iiet") -> Decoder:
    torch.manual_seed(3)
    schedule = schedule_for(method, (2, 0, 1))
    decoder = Decoder(
        ModelConfig(
            method=method,
            vocab_size=VOCAB,
            dim=32,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=48,
            context_length=CONTEXT,
            schedule=schedule,
            initializer_std=0.3,
        )
    )
    return decoder.double()


@pytest.fixture
def decoder() -> Decoder:
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


@pytest.mark.parametrize("method", METHODS)
def test_every_pair_equals_a_direct_computation(method: str) -> None:
    decoder = make_decoder(method)
    pairs = mixed_pairs()
    for (context, continuation), score in zip(
        pairs, score_continuations(decoder, pairs), strict=True
    ):
        total, greedy = directly(decoder, context, continuation)
        assert score.log_likelihood == pytest.approx(total, abs=1e-9)
        assert score.is_greedy == greedy


def test_long_contexts_are_cut_and_long_continuations_split(
    decoder: Decoder,
) -> None:
    draw = random.Random(1)
    context = tokens(draw, 40, 40)
    pairs = [(context, tokens(draw, n, n)) for n in (1, 5, 5, 24, 25, 60)]
    pairs += [([7], tokens(draw, 24, 24)), (tokens(draw, 24, 24), tokens(draw, 24, 24))]
    for pair, score in zip(pairs, score_continuations(decoder, pairs), strict=True):
        assert score.log_likelihood == pytest.approx(directly(decoder, *pair)[0], abs=1e-9)


def test_batches_do_not_change_scores(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = mixed_pairs()
    usual = score_continuations(decoder, pairs)
    monkeypatch.setattr(scoring, "MAX_LOGITS_AT_ONCE", 3 * VOCAB)
    for batch_size in (1, 2, 64):
        again = score_continuations(decoder, pairs, batch_size=batch_size)
        for one, other in zip(usual, again, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-10)
            assert one.is_greedy == other.is_greedy


def test_scoring_resumes_to_the_same_bits(decoder: Decoder, tmp_path: Path) -> None:
    decoder, pairs, path = decoder.float(), mixed_pairs(), tmp_path / "answers"
    usual = score_continuations(decoder, pairs, batch_size=2)
    passes: list[int] = []
    decoder.embedding.register_forward_hook(lambda *_: passes.append(1))

    def stop(done: int, total: int) -> None:
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), AnswerJournal(path) as journal:
        score_continuations(decoder, pairs, batch_size=2, on_scored=stop, journal=journal)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], lines[2][:-9], *lines[3:]]))
    with AnswerJournal(path) as journal:
        again = score_continuations(decoder, pairs, batch_size=2, journal=journal)
    assert again == usual
    num_batches, passes[:] = len(passes) - 1, []
    score_continuations(decoder, pairs, batch_size=2)
    assert len(passes) == num_batches, "only the batch whose line was cut off runs again"


def test_no_logits_of_a_position_that_is_not_scored(decoder: Decoder) -> None:
    rows: list[int] = []
    decoder.norm.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    # Choices that begin with the same two tokens: these have three columns together.
    score_continuations(decoder, [(range(16), (1, 2, end)) for end in (3, 4, 5)])
    assert rows == [3]


def test_the_output_of_greedy_decoding_is_greedy(decoder: Decoder) -> None:
    prompt = [5, 9, 3, 40, 2, 2, 8, 30, 1, 17]
    written = generate(decoder, torch.tensor([prompt]), max_new_tokens=4)[0, 10:].tolist()
    other = [*written[:-1], (written[-1] + 1) % VOCAB]
    scores = score_continuations(decoder, [(prompt, written), (prompt, other)])
    assert [score.is_greedy for score in scores] == [True, False]


def test_a_shared_context_and_a_repeated_pair_are_run_once(decoder: Decoder) -> None:
    context, choices = list(range(16)), [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]]
    shapes: list[tuple[int, ...]] = []
    decoder.embedding.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    score_continuations(decoder, [(context, choice) for choice in choices])
    assert shapes == [(1, 22)]


def test_progress_reaches_its_end_and_the_mode_is_restored(decoder: Decoder) -> None:
    decoder.train()
    seen: list[tuple[int, int]] = []
    score_continuations(
        decoder,
        mixed_pairs(),
        batch_size=2,
        on_scored=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1][0] == seen[-1][1]
    assert decoder.training


def test_a_decoder_can_be_trained_after_it_was_scored(decoder: Decoder) -> None:
    score_continuations(decoder, [([1, 2], [3])])
    decoder(torch.tensor([[1, 2, 3]])).sum().backward()
    assert decoder.embedding.weight.grad is not None


def test_an_empty_context_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        score_continuations(decoder, [([], [1])])


def test_no_pairs_give_no_scores(decoder: Decoder) -> None:
    assert score_continuations(decoder, []) == []
