"""Log-likelihoods of continuations under a decoder: what lm-eval's tasks come down to.

In go pairs of token lists, a context and its continuation; out comes the sum of log-probabilities
of each continuation, and whether greedy decoding would have written it. The obvious way runs one
padded sequence per pair. Here a context that several continuations share (the choices of one
question) is run once, and the continuations attend to its keys and values; a pair that occurs twice
is scored once; and the head is applied only where a token is scored. None of it changes a number
beyond rounding: an exact cache has a slot for every evaluation.

Cost: tokens of the distinct contexts plus tokens of the continuations, sorted by length so that
padding stays small.
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

SHORTEST_SHARED_CONTEXT = 8
"""Tokens; for shorter contexts a second pass costs more than it saves."""

MOST_TOKENS_ON_CPU = 2048
"""Tokens of one pass on a CPU: more of them leave the caches and run a third slower."""

MOST_LOGITS_AT_ONCE = 1 << 24
"""Numbers; 64 MiB in float32, whatever the vocabulary."""


class Score(NamedTuple):
    """What one continuation got."""

    log_likelihood: float
    """Sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens was the likeliest."""


class Piece(NamedTuple):
    """A part of a continuation that one forward pass can score."""

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

    A context that is too long loses its beginning, as in lm-eval. A continuation that does not fit
    the decoder's context is scored in parts, each given as much of what stands before it as fits.

    Args:
        decoder: The model; its schedule is followed, and its mode (train or eval) restored.
        pairs: Context, at least one token, and continuation; an empty continuation is certain.
        batch_size: Sequences of full length in one forward pass; of shorter ones, as many as have
            the same number of tokens. On a CPU at most `MOST_TOKENS_ON_CPU` tokens.
        on_scored: Called after each pass with the parts done and the parts in all; most pairs are
            one part.

    Raises:
        ValueError: If a context is empty.
    """
    was_training = decoder.training
    decoder.eval()
    try:
        split = [_pieces(tuple(a), tuple(b), decoder.config.context_length) for a, b in pairs]
        scores: dict[Piece, Score] = {}
        distinct = list(dict.fromkeys(piece for pieces in split for piece in pieces))
        for scored in _score_pieces(decoder, distinct, _most_tokens(decoder, batch_size)):
            scores.update(scored)
            if on_scored:
                on_scored(len(scores), len(distinct))
    finally:
        decoder.train(was_training)
    return [
        Score(
            sum(scores[piece].log_likelihood for piece in pieces),
            all(scores[piece].is_greedy for piece in pieces),
        )
        for pieces in split
    ]


def _pieces(context: Tokens, continuation: Tokens, context_length: int) -> list[Piece]:
    if not context:
        raise ValueError("a context needs at least one token, such as the end-of-text token")
    pieces = []
    before = context
    for start in range(0, len(continuation), context_length):
        part = continuation[start : start + context_length]
        # The last token is predicted, never read: it needs no place in the context.
        pieces.append(Piece(before[-(context_length + 1 - len(part)) :], part))
        before += part
    return pieces


def _most_tokens(decoder: Decoder, batch_size: int) -> int:
    num_tokens = batch_size * decoder.config.context_length
    return min(num_tokens, MOST_TOKENS_ON_CPU) if decoder.device.type == "cpu" else num_tokens


def _score_pieces(
    decoder: Decoder, pieces: list[Piece], most_tokens: int
) -> Iterator[dict[Piece, Score]]:
    """Yield the scores of one batch after the other."""
    by_context: defaultdict[Tokens, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_context[piece.context].append(piece)
    alone: list[Piece] = []
    families: list[list[Piece]] = []
    for context, family in by_context.items():
        if len(family) > 1 and len(context) >= SHORTEST_SHARED_CONTEXT:
            families.append(family)
        else:
            alone += family
    alone.sort(key=lambda piece: -_length(piece))
    start = 0
    while start < len(alone):  # the first of a batch is its longest
        count = max(1, most_tokens // _length(alone[start]))
        yield _score_whole(decoder, alone[start : start + count])
        start += count
    for batch in _family_batches(families, decoder.config.context_length, most_tokens):
        yield _score_families(decoder, batch)


def _length(piece: Piece) -> int:
    return len(piece.context) + len(piece.continuation) - 1


def _family_batches(
    families: list[list[Piece]], context_length: int, most_tokens: int
) -> Iterator[list[list[Piece]]]:
    """Put families of like lengths together, so that contexts and continuations, each padded, still
    fit."""
    # By continuation first: there are several to one context, so their padding costs most.
    families = sorted(families, key=lambda f: (-_longest(f), -len(f[0].context)))
    batch: list[list[Piece]] = []
    for family in families:
        together = [*batch, family]
        length = max(len(f[0].context) for f in together) + _longest(together[0]) - 1
        too_many = sum(map(len, together)) * length > most_tokens
        if batch and (too_many or length > context_length):
            yield batch
            together = [family]
        batch = together
    if batch:
        yield batch


def _longest(family: list[Piece]) -> int:
    return max(len(piece.continuation) for piece in family)


def _score_whole(decoder: Decoder, batch: list[Piece]) -> dict[Piece, Score]:
    """Run each piece as one sequence, padded on the right, where causal attention never looks."""
    inputs = _padded([(*p.context, *p.continuation)[:-1] for p in batch], decoder.device)
    hidden = _last_hidden(decoder, inputs)
    starts = torch.tensor([len(piece.context) - 1 for piece in batch], device=decoder.device)
    return _scores(decoder, batch, hidden, starts)


def _score_families(decoder: Decoder, families: list[list[Piece]]) -> dict[Piece, Score]:
    """Run each context once, then all continuations against the contexts' keys and values."""
    device = decoder.device
    contexts = [family[0].context for family in families]
    batch = [piece for family in families for piece in family]
    of_family = [row for row, family in enumerate(families) for _ in family]
    cache = _SharedContexts(torch.tensor(of_family, device=device))
    at_context = _last_hidden(decoder, _padded(contexts, device), cache=cache)
    ends = [len(context) - 1 for context in contexts]
    first = at_context[list(range(len(contexts))), ends][of_family]
    tails = [piece.continuation[:-1] for piece in batch]
    starts = torch.zeros(len(batch), dtype=torch.long, device=device)
    if not any(tails):
        return _scores(decoder, batch, first[:, None], starts)
    cache.branch(at_context.size(1))
    inputs = _padded(tails, device)
    # Padding behind a shorter context is masked; positions count what is not.
    lengths = torch.tensor(ends, device=device)[of_family] + 1
    is_context = torch.arange(at_context.size(1), device=device) < lengths[:, None]
    mask = torch.cat([is_context, torch.ones_like(inputs, dtype=torch.bool)], 1)
    hidden = _last_hidden(decoder, inputs, cache=cache, attention_mask=mask)
    return _scores(decoder, batch, torch.cat([first[:, None], hidden], 1), starts)


def _padded(sequences: Sequence[Tokens], device: torch.device) -> Tensor:
    """Return (batch, time) with zeros behind shorter sequences; at least one column."""
    time = max(1, max(map(len, sequences)))
    rows = [[*sequence, *[0] * (time - len(sequence))] for sequence in sequences]
    return torch.tensor(rows, device=device)


def _last_hidden(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    cache: _SharedContexts | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return `h_L`, (batch, time, dim), without the head at each position."""
    output = decoder(
        input_ids, cache=cache, attention_mask=attention_mask, last_only=True, return_hidden=True
    )
    hidden: Tensor = output[1][-1]
    return hidden


def _scores(
    decoder: Decoder, batch: list[Piece], hidden: Tensor, starts: Tensor
) -> dict[Piece, Score]:
    """Turn hidden states, (pieces, time, dim), into scores; row i's first token is scored from
    column `starts[i]`, and the others from those behind it."""
    counts = torch.tensor([len(piece.continuation) for piece in batch], device=hidden.device)
    columns = torch.arange(hidden.size(1), device=hidden.device)
    is_scored = (columns >= starts[:, None]) & (columns < (starts + counts)[:, None])
    selected = hidden[is_scored]  # (tokens, dim), piece after piece
    targets = torch.tensor([t for p in batch for t in p.continuation], device=hidden.device)
    num_at_once = max(1, MOST_LOGITS_AT_ONCE // decoder.config.vocab_size)
    losses: list[float] = []
    hits: list[bool] = []
    for start in range(0, len(targets), num_at_once):
        wanted = targets[start : start + num_at_once]
        logits = decoder.logits(selected[start : start + num_at_once])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
        hits += (logits.argmax(-1) == wanted).tolist()
    scores: dict[Piece, Score] = {}
    start = 0
    for piece in batch:
        own = slice(start, start + len(piece.continuation))
        scores[piece] = Score(-math.fsum(losses[own]), all(hits[own]))
        start = own.stop
    return scores


class _SharedContexts:
    """A cache in two acts: keep the contexts' keys and values, then lend them to continuations.

    Args:
        rows: (continuations,), the row of each one's context.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._length = 0

    def branch(self, length: int) -> None:
        """Begin the second act; the contexts, padded, are `length` tokens long."""
        self._length = length

    def get_seq_length(self) -> int:
        """Return the number of tokens held."""
        return self._length

    def update(self, keys: Tensor, values: Tensor, slot: int, /) -> tuple[Tensor, Tensor]:
        """Keep a slot's keys and values, or put its context's before them; once per act."""
        if not self._length:
            self._held[slot] = keys, values
            return keys, values
        context_keys, context_values = self._held.pop(slot)
        return (
            torch.cat([context_keys[self._rows], keys], 2),
            torch.cat([context_values[self._rows], values], 2),
        )
