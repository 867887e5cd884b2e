"""Generated answers: a batch says what each context says alone, and stops where the text does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.sampling import Sampler, row_keys
from orchestrator.evaluation.answers import AnswerSettings, Question, generate_answers
from orchestrator.models.tokenizer import ModelTokenizer

CONTEXTS = ["a bag", "the hen had gone and", "cab", "face the deaf pig and feed", "x", "dad had"]


def questions(
    tokenizer: ModelTokenizer, settings: AnswerSettings, texts: Sequence[str] = CONTEXTS
) -> list[Question]:
    return [
        Question(tokenizer.encode(text, add_special_tokens=False), settings, seed=number)
        for number, text in enumerate(texts)
    ]


@torch.no_grad()
def slowly(decoder: Decoder, tokenizer: ModelTokenizer, question: Question) -> str:
    """Answer without cache, batch or padding; look for the stop texts in the whole answer."""
    settings = question.settings
    room = decoder.config.context_length - settings.max_new_tokens
    tokens, answer = list(question.context[-room:]), []
    sampler = Sampler(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        row_keys=row_keys(question.seed, 1),
    )
    for position in range(settings.max_new_tokens):
        logits = decoder(torch.tensor([tokens]))[:, -1]
        token = int(sampler(logits, position))
        if token in tokenizer.end_ids:
            break
        tokens.append(token)
        answer.append(token)
        text = tokenizer.decode(answer)
        if found := [text.index(stop) for stop in settings.stop if stop in text]:
            return text[: min(found)]
    return tokenizer.decode(answer)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_batch_answers_as_each_context_alone(
    decoder: Decoder, tokenizer: ModelTokenizer, batch_size: int
) -> None:
    asked = [
        question
        for settings in (
            AnswerSettings(max_new_tokens=12),
            AnswerSettings(max_new_tokens=12, temperature=1.0),
            AnswerSettings(max_new_tokens=9, temperature=0.7, top_k=20),
            AnswerSettings(max_new_tokens=9, temperature=1.3, top_p=0.8),
        )
        for question in questions(tokenizer, settings)
    ]
    answers = generate_answers(decoder, tokenizer, asked, batch_size=batch_size)
    assert answers == [slowly(decoder, tokenizer, question) for question in asked]
    assert len(set(answers)) > 12


def test_stop_texts_end_an_answer_also_across_tokens(
    decoder: Decoder, tokenizer: ModelTokenizer
) -> None:
    free = questions(tokenizer, AnswerSettings(max_new_tokens=16))
    whole = [slowly(decoder, tokenizer, question) for question in free]
    across = []
    for text in whole:
        # The middle of the answer: from within one token into others.
        stop = text[len(text) // 2 : len(text) // 2 + 5]
        assert len(tokenizer.encode(stop, add_special_tokens=False)) > 1
        across.append(stop)
    settings = AnswerSettings(max_new_tokens=16, stop=("never there", *across))
    asked = questions(tokenizer, settings)
    answers = generate_answers(decoder, tokenizer, asked, batch_size=3)
    assert answers == [slowly(decoder, tokenizer, question) for question in asked]
    for answer, text in zip(answers, whole, strict=True):
        assert text.startswith(answer)
        assert len(answer) < len(text)
        assert not any(stop in answer for stop in across)


def test_a_special_token_can_be_the_stop_text(decoder: Decoder, tokenizer: ModelTokenizer) -> None:
    free = AnswerSettings(max_new_tokens=8, temperature=1.0)
    (asked,) = questions(tokenizer, free, ["a bag"])
    ids = torch.tensor([asked.context])
    tokens = generate(decoder, ids, max_new_tokens=8, temperature=1.0, seed=0)[0, ids.size(1) :]
    stop = int(tokens[4])
    before = tokens[: tokens.tolist().index(stop)].tolist()
    tokenizer.tokenizer.add_special_tokens([tokenizer.tokenizer.id_to_token(stop)])
    assert tokenizer.decode([stop]) == ""
    name = tokenizer.decode([stop], skip_special_tokens=False)
    assert name not in tokenizer.decode(before)
    stopped = replace(asked, settings=replace(free, stop=(name,)))
    assert generate_answers(decoder, tokenizer, [stopped]) == [tokenizer.decode(before)]


def test_a_long_context_loses_its_beginning(decoder: Decoder, tokenizer: ModelTokenizer) -> None:
    (asked,) = questions(tokenizer, AnswerSettings(max_new_tokens=20), ["one two three " * 20])
    assert len(asked.context) > 48
    kept = replace(asked, context=asked.context[-28:])
    other = replace(asked, context=(1, 2, *asked.context[-28:]))
    assert len(set(generate_answers(decoder, tokenizer, [asked, kept, other]))) == 1


def test_answers_of_batches_that_do_not_fit_are_the_same(
    decoder: Decoder, tokenizer: ModelTokenizer
) -> None:
    settings = AnswerSettings(max_new_tokens=9, temperature=1.0)
    asked = [Question(tuple(range(5, 10 + n)), settings, seed=n) for n in range(8)]
    usual = generate_answers(decoder, tokenizer, asked)

    def check(_: object, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].numel() > 30:
            raise torch.OutOfMemoryError("CUDA out of memory. 1 GiB is free. And more")

    decoder.embedding.register_forward_pre_hook(check)
    notes: list[str] = []
    assert generate_answers(decoder, tokenizer, asked, note=notes.append) == usual
    assert [note.partition("at most ")[2] for note in notes] == ["4 questions", "2 questions"]
