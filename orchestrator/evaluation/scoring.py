"""Log-likelihoods of continuations under a decoder: what lm-eval's tasks need from a model.

Sequences that begin alike share a row, in which each token is evaluated once (`prefix_trees`). A
repeated pair is scored once, and the head is applied only where a token is scored. None of this
changes a number beyond rounding.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from iiet.decoder import Decoder
from orchestrator.evaluation.answer_journal import AnswerJournal
from orchestrator.evaluation.batch_limit import BatchLimit
from orchestrator.evaluation.prefix_trees import PrefixTree, Segment, Tokens, prefix_trees
from orchestrator.workspace.provenance import content_key

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


@torch.no_grad()
def score_continuations(
    decoder: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
    on_scored: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
    journal: AnswerJournal | None = None,
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
        journal: Gets the scores of each batch; batches that it holds are not run again.

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
        for scored in _score_segments(decoder, distinct, limit, journal or AnswerJournal()):
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
    decoder: Decoder, segments: list[Segment], limit: BatchLimit, journal: AnswerJournal
) -> Iterator[dict[Segment, Score]]:
    left = dict.fromkeys(segments)
    while left:
        for rows in _batches(decoder, left, limit.size):
            batch = [segment for row in rows for segment in row.segments]
            key = content_key("scores", batch)
            scores = [Score(*stored) for stored in journal.get(key) or ()]
            if not scores:
                size = len(rows) * len(rows[0].tokens)
                score = partial(_score_rows, decoder, rows)
                found = limit.run(score, size=size, can_split=len(batch) > 1)
                if found is None:
                    break  # Divide what is left into smaller batches.
                scores = found
                journal.add({key: scores})
            for segment in batch:
                del left[segment]
            yield dict(zip(batch, scores, strict=True))


def _batches(
    decoder: Decoder, segments: Iterable[Segment], max_tokens: int
) -> list[list[PrefixTree]]:
    """Divide segments into batches of rows of similar length, of at most `max_tokens` tokens."""
    # A layer's other arithmetic is about 24 d^2 per token, that of a key 4 d at a lower speed.
    rows = prefix_trees(segments, max_tokens=max_tokens, keys_per_token=decoder.config.dim)
    batches: list[list[PrefixTree]] = []
    for row in rows:
        batch = batches[-1] if batches else []
        is_alike = batch and batch[0].is_branched == row.is_branched
        if is_alike and (len(batch) + 1) * len(batch[0].tokens) <= max_tokens:
            batch.append(row)
        else:
            batches.append([row])
    return batches


def _score_rows(decoder: Decoder, rows: list[PrefixTree]) -> list[Score]:
    """Score the segments of all rows, padded on the right."""
    device = decoder.device
    inputs = _padded([row.tokens for row in rows], device)
    positions = mask = None
    if rows[0].is_branched:
        positions = _padded([row.depths for row in rows], device)
        mask = _mask_of([row.ends() for row in rows], device)
    hidden = _last_hidden(decoder, inputs, attention_mask=mask, position_ids=positions)
    # Continuations that begin alike need the logits of a column once.
    columns: dict[int, int] = {}
    wanted: list[tuple[int, int]] = []
    for start, row in zip(range(0, inputs.numel(), inputs.size(1)), rows, strict=True):
        for segment, predicting in zip(row.segments, row.predicting, strict=True):
            for column, target in zip(predicting, segment.continuation, strict=True):
                wanted.append((columns.setdefault(start + column, len(columns)), target))
    selected = hidden.flatten(0, 1)[torch.tensor(list(columns), device=device)]
    found = zip(*_token_scores(decoder, selected, torch.tensor(wanted, device=device)), strict=True)
    scores = []
    for segment in (segment for row in rows for segment in row.segments):
        losses, hits = zip(*(next(found) for _ in segment.continuation), strict=True)
        scores.append(Score(-math.fsum(losses), all(hits)))
    return scores


def _padded(sequences: Sequence[Sequence[int]], device: torch.device, *, value: int = 0) -> Tensor:
    """Return (batch, time), padded on the right."""
    time = max(map(len, sequences))
    rows = [[*sequence, *[value] * (time - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


def _mask_of(ends: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return which column each column sees, (batch, time, time): itself and its ancestors.

    Args:
        ends: For each row and column, where the column's descendants end.
    """
    time = max(map(len, ends))
    # No token sees padding; padding sees the padding before it.
    until = _padded(ends, device, value=time)[:, None]
    columns = torch.arange(time, device=device)
    queries = columns[:, None]
    return (columns <= queries) & (queries < until)


def _last_hidden(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """Return `h_L`, (batch, time, dim), without applying the head at each position."""
    states = decoder.hidden_states(
        decoder.embedding(input_ids), attention_mask=attention_mask, position_ids=position_ids
    )
    # One after the other, so that those of earlier layers are freed.
    (last,) = deque(states, maxlen=1)
    return last


def _token_scores(
    decoder: Decoder, hidden: Tensor, wanted: Tensor
) -> tuple[list[float], list[bool]]:
    """Return the loss of each wanted token, and whether it is the likeliest.

    Args:
        hidden: (columns, dim).
        wanted: (tokens, 2): the column that predicts it, and the token.
    """
    losses, hits = hidden.new_zeros(len(wanted), dtype=torch.float64), wanted.new_zeros(len(wanted))
    num_at_once = max(1, MAX_LOGITS_AT_ONCE // decoder.config.vocab_size)
    for start in range(0, len(hidden), num_at_once):
        logits = decoder.logits(hidden[start : start + num_at_once])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        (here,) = (
            ((wanted[:, 0] >= start) & (wanted[:, 0] < start + len(logits))).nonzero().unbind(1)
        )
        columns, targets = (wanted[here] - wanted.new_tensor([start, 0])).unbind(1)
        losses[here] = -logits.log_softmax(-1)[columns, targets].double()
        hits[here] = (logits.argmax(-1)[columns] == targets).to(hits.dtype)
    return losses.tolist(), hits.bool().tolist()
