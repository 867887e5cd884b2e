"""Log-likelihoods of continuations under a decoder: what lm-eval's tasks need from a model.

A context that several continuations share (the choices of one question) is run once, and they reuse
its keys and values. A repeated pair is scored once, and the head is applied only where a token is
scored. None of this changes a number beyond rounding: the cache has a slot for every evaluation.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.decoder import Decoder
from orchestrator.evaluation.batch_limit import BatchLimit

Tokens = tuple[int, ...]

MIN_SHARED_CONTEXT = 8
"""Tokens; for shorter contexts, a second pass costs more than it saves."""

MAX_TOKENS_ON_CPU = 2048
"""Tokens of one pass on a CPU; more do not fit its caches and run a third slower."""

MAX_LOGITS_AT_ONCE = 1 << 24
"""64 MiB in float32, for any vocabulary."""


class Score(NamedTuple):
    """Score of one continuation."""

    log_likelihood: float
    """Sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens had the highest probability."""


class Segment(NamedTuple):
    """A part of a continuation that fits into one forward pass."""

    context: Tokens
    continuation: Tokens


@torch.no_grad()
def score_continuations(
    decoder: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    on_scored: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Score]:
    """Score each continuation given its context, in the order of `pairs`.

    If a context is too long, its beginning is cut, as in lm-eval. A continuation longer than the
    decoder's context is scored in segments, each after as many of the tokens before it as fit.

    Args:
        decoder: The model; it uses its own schedule, and its mode (train or eval) is restored.
        pairs: Context, at least one token, and continuation, which may be empty.
        batch_size: Sequences of full length in one forward pass; of shorter sequences, as many as
            have the same number of tokens. On a CPU at most `MAX_TOKENS_ON_CPU` tokens.
        on_scored: Called after each pass with the number of segments done and their total.
        note: Called with a sentence if a batch runs out of a GPU's memory; smaller ones follow.

    Raises:
        DeviceError: If the memory is too small for one sequence.
        ValueError: If a context is empty.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        split = [_segments(tuple(a), tuple(b), decoder.config.context_length) for a, b in pairs]
        scores: dict[Segment, Score] = {}
        distinct = list(dict.fromkeys(segment for segments in split for segment in segments))
        limit = BatchLimit(_max_tokens(decoder, batch_size), "tokens", note)
        for scored in _score_segments(decoder, distinct, limit):
            scores.update(scored)
            if on_scored:
                on_scored(len(scores), len(distinct))
    finally:
        decoder.train(was_training)
    return [
        Score(
            sum(scores[segment].log_likelihood for segment in segments),
            all(scores[segment].is_greedy for segment in segments),
        )
        for segments in split
    ]


def _segments(context: Tokens, continuation: Tokens, context_length: int) -> list[Segment]:
    if not context:
        raise ValueError("a context needs at least one token, such as the end-of-text token")
    segments = []
    before = context
    for start in range(0, len(continuation), context_length):
        part = continuation[start : start + context_length]
        # The last token is predicted, never read, so it takes no place in the context.
        segments.append(Segment(before[-(context_length + 1 - len(part)) :], part))
        before += part
    return segments


def _max_tokens(decoder: Decoder, batch_size: int) -> int:
    num_tokens = batch_size * decoder.config.context_length
    return min(num_tokens, MAX_TOKENS_ON_CPU) if decoder.device.type == "cpu" else num_tokens


def _score_segments(
    decoder: Decoder, segments: list[Segment], limit: BatchLimit
) -> Iterator[dict[Segment, Score]]:
    by_context: defaultdict[Tokens, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_context[segment.context].append(segment)
    single: list[Segment] = []
    groups: list[list[Segment]] = []
    for context, group in by_context.items():
        if len(group) > 1 and len(context) >= MIN_SHARED_CONTEXT:
            groups.append(group)
        else:
            single += group
    single.sort(key=lambda segment: -_length(segment))
    # Sort by continuation first: a context has several, so their padding costs most.
    groups.sort(key=lambda group: (-_longest(group), -len(group[0].context)))
    while single:  # The first of a batch is its longest.
        batch = single[: max(1, limit.size // _length(single[0]))]
        size = len(batch) * _length(single[0])
        score = partial(_score_whole, decoder, batch)
        if scores := limit.run(score, size=size, can_split=len(batch) > 1):
            single = single[len(batch) :]
            yield scores
    while groups:
        first = groups[: _num_groups_at_once(groups, decoder.config.context_length, limit.size)]
        num_segments = sum(map(len, first))
        size = num_segments * (max(len(g[0].context) for g in first) + _longest(first[0]) - 1)
        if limit.was_halved and size > limit.size and num_segments > 1:
            middle = len(first[0]) // 2  # One group, or it would have been a smaller batch.
            groups = [first[0][:middle], first[0][middle:], *groups[1:]]
            continue
        score = partial(_score_groups, decoder, first)
        if scores := limit.run(score, size=size, can_split=num_segments > 1):
            groups = groups[len(first) :]
            yield scores


def _length(segment: Segment) -> int:
    return len(segment.context) + len(segment.continuation) - 1


def _num_groups_at_once(groups: list[list[Segment]], context_length: int, max_tokens: int) -> int:
    """Count the first groups whose padded contexts and continuations fit together; at least 1."""
    longest, context, num_segments = _longest(groups[0]), 0, 0
    for count, group in enumerate(groups):
        context = max(context, len(group[0].context))
        num_segments += len(group)
        length = context + longest - 1
        if count and (num_segments * length > max_tokens or length > context_length):
            return count
    return len(groups)


def _longest(group: list[Segment]) -> int:
    return max(len(segment.continuation) for segment in group)


def _score_whole(decoder: Decoder, batch: list[Segment]) -> dict[Segment, Score]:
    """Run each segment as one sequence, padded on the right, which causal attention ignores."""
    inputs = _padded([(*p.context, *p.continuation)[:-1] for p in batch], decoder.device)
    hidden = _last_hidden(decoder, inputs)
    starts = torch.tensor([len(segment.context) - 1 for segment in batch], device=decoder.device)
    return _scores(decoder, batch, hidden, starts)


def _score_groups(decoder: Decoder, groups: list[list[Segment]]) -> dict[Segment, Score]:
    """Run each context once, then all continuations with the contexts' keys and values."""
    device = decoder.device
    contexts = [group[0].context for group in groups]
    batch = [segment for group in groups for segment in group]
    context_rows = [row for row, group in enumerate(groups) for _ in group]
    cache = _PrefixCache(torch.tensor(context_rows, device=device))
    at_context = _last_hidden(decoder, _padded(contexts, device), cache=cache)
    ends = [len(context) - 1 for context in contexts]
    first = at_context[list(range(len(contexts))), ends][context_rows]
    tails = [segment.continuation[:-1] for segment in batch]
    starts = torch.zeros(len(batch), dtype=torch.long, device=device)
    if not any(tails):
        return _scores(decoder, batch, first[:, None], starts)
    cache.start_continuations(at_context.size(1))
    inputs = _padded(tails, device)
    # Padding after a shorter context is masked; positions count unmasked tokens.
    lengths = torch.tensor(ends, device=device)[context_rows] + 1
    is_context = torch.arange(at_context.size(1), device=device) < lengths[:, None]
    mask = torch.cat([is_context, torch.ones_like(inputs, dtype=torch.bool)], 1)
    hidden = _last_hidden(decoder, inputs, cache=cache, attention_mask=mask)
    return _scores(decoder, batch, torch.cat([first[:, None], hidden], 1), starts)


def _padded(sequences: Sequence[Tokens], device: torch.device) -> Tensor:
    """Return (batch, time), padded with zeros on the right; at least one column."""
    time = max(1, max(map(len, sequences)))
    rows = [[*sequence, *[0] * (time - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


def _last_hidden(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    cache: _PrefixCache | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return `h_L`, (batch, time, dim), without applying the head at each position."""
    states = decoder.hidden_states(
        decoder.embedding(input_ids), cache=cache, attention_mask=attention_mask
    )
    # One after the other, so that those of earlier layers are freed.
    (last,) = deque(states, maxlen=1)
    return last


def _scores(
    decoder: Decoder, batch: list[Segment], hidden: Tensor, starts: Tensor
) -> dict[Segment, Score]:
    """Score segments from hidden states, (segments, time, dim).

    The first token of segment i is predicted at column `starts[i]`, the others at the next columns.
    """
    counts = torch.tensor([len(segment.continuation) for segment in batch], device=hidden.device)
    columns = torch.arange(hidden.size(1), device=hidden.device)
    is_scored = (columns >= starts[:, None]) & (columns < (starts + counts)[:, None])
    selected = hidden[is_scored]  # (tokens, dim), segment after segment
    targets = torch.tensor([t for p in batch for t in p.continuation], device=hidden.device)
    num_at_once = max(1, MAX_LOGITS_AT_ONCE // decoder.config.vocab_size)
    losses: list[float] = []
    hits: list[bool] = []
    for start in range(0, len(targets), num_at_once):
        wanted = targets[start : start + num_at_once]
        logits = decoder.logits(selected[start : start + num_at_once])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
        hits += (logits.argmax(-1) == wanted).tolist()
    scores: dict[Segment, Score] = {}
    start = 0
    for segment in batch:
        own = slice(start, start + len(segment.continuation))
        scores[segment] = Score(-math.fsum(losses[own]), all(hits[own]))
        start = own.stop
    return scores


class _PrefixCache:
    """Prefix cache: stores each context's keys and values, then reuses them for its continuations.

    Args:
        rows: (continuations,), the row of each continuation's context.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def start_continuations(self, length: int) -> None:
        """Stop storing contexts and start reusing them; padded, they have `length` tokens."""
        self._length = length

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self._length

    def update(self, keys: Tensor, values: Tensor, slot: int, /) -> tuple[Tensor, Tensor]:
        """Store a slot's keys and values, or put those of the contexts before them."""
        if not self._length:
            self._stored[slot] = keys, values
            return keys, values
        context_keys, context_values = self._stored.pop(slot)
        return (
            torch.cat([context_keys[self._rows], keys], 2),
            torch.cat([context_values[self._rows], values], 2),
        )
