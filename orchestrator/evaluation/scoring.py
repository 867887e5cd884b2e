"""Log-likelihoods of continuations under a decoder: what lm-eval's tasks need from a model.

A context that several continuations share (the choices of one question) is run once, and they reuse
its keys and values. A repeated pair is scored once, and the head is applied only where a token is
scored. None of this changes a number beyond rounding: the cache has a slot for every evaluation.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.decoder import Decoder

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

    Raises:
        ValueError: If a context is empty.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        split = [_segments(tuple(a), tuple(b), decoder.config.context_length) for a, b in pairs]
        scores: dict[Segment, Score] = {}
        distinct = list(dict.fromkeys(segment for segments in split for segment in segments))
        for scored in _score_segments(decoder, distinct, _max_tokens(decoder, batch_size)):
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
    decoder: Decoder, segments: list[Segment], max_tokens: int
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
    start = 0
    while start < len(single):  # the first of a batch is its longest
        count = max(1, max_tokens // _length(single[start]))
        yield _score_whole(decoder, single[start : start + count])
        start += count
    for batch in _group_batches(groups, decoder.config.context_length, max_tokens):
        yield _score_groups(decoder, batch)


def _length(segment: Segment) -> int:
    return len(segment.context) + len(segment.continuation) - 1


def _group_batches(
    groups: list[list[Segment]], context_length: int, max_tokens: int
) -> Iterator[list[list[Segment]]]:
    """Batch groups of similar lengths, so that padded contexts and continuations fit together."""
    # Sort by continuation first: a context has several, so their padding costs most.
    groups = sorted(groups, key=lambda f: (-_longest(f), -len(f[0].context)))
    batch: list[list[Segment]] = []
    for group in groups:
        together = [*batch, group]
        length = max(len(f[0].context) for f in together) + _longest(together[0]) - 1
        too_many = sum(map(len, together)) * length > max_tokens
        if batch and (too_many or length > context_length):
            yield batch
            together = [group]
        batch = together
    if batch:
        yield batch


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
    output = decoder(
        input_ids, cache=cache, attention_mask=attention_mask, last_only=True, return_hidden=True
    )
    hidden: Tensor = output[1][-1]
    return hidden


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
