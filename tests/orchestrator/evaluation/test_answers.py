"""Generated answers: a batch says what each context says alone, and stops where the text does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from refusals import refused

from iiet.decoder import Decoder
from iiet.decoding.sampling import Sampler, row_keys
from orchestrator.evaluation.answers import (
    Sampling,
    answer_settings,
    check_answer_settings,
    generate_answers,
)
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.workspace.errors import UserError

CONTEXTS = ["a bag", "the hen had gone and", "cab", "face the deaf pig and feed", "x", "dad had"]


@torch.no_grad()
def plain_answer(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    context: tuple[int, ...],
    settings: Sampling,
    seed: int = 0,
) -> str:
    """Answer without cache, batch or padding; look for the stop texts in the whole answer."""
    room = decoder.config.context_length - settings.max_new_tokens
    tokens = list(context[-room:])
    answer = list[int]()
    sampler = Sampler(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        row_keys=row_keys(seed, 1),
    )
    for position in range(settings.max_new_tokens):
        logits = decoder(torch.tensor([tokens]))[:, -1]
        token = int(sampler(logits, position))
        if token in tokenizer.end_ids:
            break
        tokens.append(token)
        answer.append(token)
        text = tokenizer.decode(answer)
        if places := [text.index(stop) for stop in settings.stop if stop in text]:
            return text[: min(places)]
    return tokenizer.decode(answer)


def test_a_batch_answers_as_each_context_alone_and_stops_where_the_text_does(decoder, tokenizer):
    long = "one two three " * 20  # Loses its beginning.
    contexts = [tokenizer.encode(text, add_special_tokens=False) for text in [*CONTEXTS, long]]
    assert len(contexts[-1]) > decoder.config.context_length
    seeds = range(len(contexts))
    different_answers = set[str]()
    greedy = Sampling(max_new_tokens=8)
    unstopped = [plain_answer(decoder, tokenizer, context, greedy) for context in contexts]
    # The middle of each answer: from within one token into others.
    across = tuple(text[len(text) // 2 : len(text) // 2 + 5] for text in unstopped)
    assert all(len(tokenizer.encode(stop, add_special_tokens=False)) > 1 for stop in across)
    stopped = replace(greedy, stop=("never there", *across))
    for settings in (
        greedy,
        stopped,
        Sampling(max_new_tokens=4, temperature=1.0),
        Sampling(max_new_tokens=4, temperature=1.3, top_k=20, top_p=0.8),
    ):
        answers = generate_answers(decoder, tokenizer, contexts, settings, seeds)
        alone = zip(contexts, seeds, strict=True)
        assert answers == [plain_answer(decoder, tokenizer, a, settings, seed) for a, seed in alone]
        different_answers |= set(answers)
    assert len(different_answers) > 12
    for answer, text in zip(
        generate_answers(decoder, tokenizer, contexts, stopped, seeds), unstopped, strict=True
    ):
        assert text.startswith(answer)
        assert len(answer) < len(text)
        assert not any(stop in answer for stop in across)


def test_a_stop_text_of_many_tokens_ends_an_answer_where_it_ends(decoder, tokenizer):
    context = tokenizer.encode("a bag", add_special_tokens=False)
    num_read: list[int] = []

    def answer(max_new_tokens: int, stop: tuple[str, ...] = ()) -> str:
        settings = Sampling(max_new_tokens=max_new_tokens, temperature=1.0, stop=stop)
        num_read.append(0)

        def counted(*arguments: Any, **options: Any) -> Iterator[torch.Tensor]:
            for tokens in Decoder.stream(*arguments, **options):
                num_read[-1] += 1
                yield tokens

        return generate_answers(decoder, tokenizer, [context], settings, [0], counted)[0]

    text = answer(24)
    stop = text[2:]
    assert len(tokenizer.encode(stop, add_special_tokens=False)) > 12
    assert answer(40, (stop,)) == text[:2]
    assert num_read == [24, 24], "nothing is generated after the stop text"


def test_a_special_token_can_be_the_stop_text(decoder, tokenizer):
    settings = Sampling(max_new_tokens=8, temperature=1.0)
    context = tokenizer.encode("a bag", add_special_tokens=False)
    ids = torch.tensor([context])
    tokens = decoder.generate(ids, max_new_tokens=8, temperature=1.0, seed=0)[0, ids.size(1) :]
    stop = int(tokens[4])
    before = tokens[: tokens.tolist().index(stop)].tolist()
    tokenizer.tokenizer.add_special_tokens([tokenizer.tokenizer.id_to_token(stop)])
    assert tokenizer.decode([stop]) == ""
    name = tokenizer.decode([stop], skip_special_tokens=False)
    assert name not in tokenizer.decode(before)
    stopped = replace(settings, stop=(name,))
    assert generate_answers(decoder, tokenizer, [context], stopped, [0]) == [
        tokenizer.decode(before)
    ]


def test_settings_of_a_task_become_those_of_the_generator():
    greedy = answer_settings({"until": ["\n", "Q:"], "do_sample": False, "temperature": 0.8}, 1024)
    assert greedy == Sampling(stop=("\n", "Q:"), max_new_tokens=256)
    assert answer_settings({"until": "."}, 100) == Sampling(stop=(".",), max_new_tokens=50)
    sampled = answer_settings({"until": [], "max_gen_toks": 7, "do_sample": True, "top_p": 0.9}, 64)
    assert sampled == Sampling(max_new_tokens=7, temperature=1.0, top_p=0.9)
    assert answer_settings({"temperature": 0.5, "top_k": 3, "num_beams": 1}, 64).temperature == 0.5
    for options, named in (
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 64}, "64 tokens (max_gen_toks)"),
    ):
        task: Any = SimpleNamespace(
            OUTPUT_TYPE="generate_until", get_config={"generation_kwargs": options}.get
        )
        with refused(UserError, "asked", named):
            check_answer_settings({"asked": task}, 64)
