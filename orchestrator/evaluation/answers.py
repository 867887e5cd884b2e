"""Generated answers: texts that continue contexts, until a stop text or a stop token.

Contexts of one batch are padded on the left and decoded together with the key/value cache. A batch
changes no answer: padding is masked, and each sampled context has a seed of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from iiet.cache import KvStrategy
from iiet.decoder import Decoder
from iiet.generation import stream
from iiet.sampling import LogitsNotFinite
from orchestrator.evaluation.scoring import BatchLimit
from orchestrator.evaluation.store import AnswerJournal
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.workspace.errors import RunFailed
from orchestrator.workspace.provenance import content_key

Decode = Callable[..., Iterator[Tensor]]

_TAIL_MARGIN = 8
"""Tokens read before a possible stop text: the first ones may be parts of characters."""


@dataclass(frozen=True, kw_only=True)
class TokenChoice:
    """How tokens are chosen, and which texts end them."""

    stop: tuple[str, ...] = ()
    """Texts that end the answer, and are no part of it."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among this many likeliest tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    kv_strategy: KvStrategy = "exact"
    """A cache slot per evaluation, or one per layer."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(TokenChoice):
    """How an answer is generated, and when it ends."""

    max_new_tokens: int = 256
    """Largest number of tokens of an answer."""


@dataclass(frozen=True)
class Question:
    """What is to be answered."""

    context: tuple[int, ...]
    """Tokens before the answer, at least one. A context that leaves no place for the answer loses
    its beginning."""
    settings: AnswerSettings
    seed: int = 0
    """Random seed of a sampled answer."""

    @property
    def key(self) -> str:
        """A hash of all that determines the answer of a model."""
        return content_key("answer", self.context, asdict(self.settings), self.seed)


def generate_answers(
    decoder: Decoder,
    tokenizer: ModelTokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    on_answered: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
    journal: AnswerJournal | None = None,
    decode: Decode = stream,
) -> list[str]:
    """Return the answer to each question, without the text that ended it.

    Args:
        decoder: The model in evaluation mode, under its own schedule.
        tokenizer: Its tokenizer; its end tokens end an answer, too.
        questions: In any order; those of the same settings and similar lengths are one batch.
        batch_size: Largest number of contexts that are decoded together.
        on_answered: Called after each batch with the number of answers so far.
        note: As `BatchLimit`.
        journal: Gets the answers of each batch; questions that it holds are not asked again.
        decode: Yields the tokens of a batch, step by step, as `iiet.generation.stream` does.

    Raises:
        DeviceError: If the memory is too small for one question.
        ValueError: If a setting is out of range.
    """
    journal = journal or AnswerJournal()
    answers = {number: journal.get(question.key) for number, question in enumerate(questions)}
    left: defaultdict[AnswerSettings, list[int]] = defaultdict(list)
    for number in sorted(answers, key=lambda number: -len(questions[number].context)):
        if answers[number] is None:
            left[questions[number].settings].append(number)
    limit = BatchLimit(batch_size, "questions", note)
    for numbers in left.values():
        while batch := numbers[: limit.size]:
            asked = [questions[number] for number in batch]
            work = partial(_answer, decoder, tokenizer, asked, decode)
            texts = limit.run(work, size=len(batch), can_split=len(batch) > 1)
            if texts is not None:
                del numbers[: len(batch)]
                answers |= zip(batch, texts, strict=True)
                journal.add({questions[number].key: answers[number] for number in batch})
                if on_answered:
                    on_answered(sum(answer is not None for answer in answers.values()))
    return [str(answers[number]) for number in range(len(questions))]


def _answer(
    decoder: Decoder, tokenizer: ModelTokenizer, questions: Sequence[Question], decode: Decode
) -> list[str]:
    """Decode contexts of the same settings together, until all rows have ended."""
    settings, device = questions[0].settings, decoder.device
    room = decoder.config.context_length - settings.max_new_tokens
    contexts = [question.context[-room:] for question in questions]
    length = max(map(len, contexts))
    missing = [length - len(context) for context in contexts]
    padded = [[0] * num + [*context] for num, context in zip(missing, contexts, strict=True)]
    is_token = torch.arange(length) >= torch.tensor(missing)[:, None]
    steps = decode(
        decoder,
        torch.tensor(padded, device=device),
        attention_mask=is_token.to(device) if any(missing) else None,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        kv_strategy=settings.kv_strategy,
        seed=[question.seed for question in questions],
        stop_tokens=tokenizer.end_ids,
    )
    stops = [text for text in settings.stop if text]
    # A token stands for at least one byte.
    tail = max((len(text.encode()) for text in stops), default=0) + _TAIL_MARGIN
    answers: list[list[int]] = [[] for _ in questions]
    unfinished = set(range(len(questions)))
    try:
        for step in steps:
            tokens = step.tolist()
            for row in sorted(unfinished):
                if tokens[row] in tokenizer.end_ids:
                    unfinished.remove(row)
                    continue
                answers[row].append(tokens[row])
                if stops:
                    # A stop text may be a special token, and may begin inside of a token.
                    end = tokenizer.decode(answers[row][-tail:], skip_special_tokens=False)
                    if any(stop in end for stop in stops):
                        unfinished.remove(row)
            if not unfinished:
                break
    except LogitsNotFinite as error:
        raise RunFailed(str(error)) from None
    texts = [tokenizer.decode(tokens) for tokens in answers]
    for stop in stops:
        texts = [text.partition(stop)[0] for text in texts]
    return texts
