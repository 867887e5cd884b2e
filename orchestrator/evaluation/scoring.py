"""Log-likelihoods of continuations under a decoder: what lm-eval's tasks need from a model.

The continuations of one context share a row: its tokens, and then each continuation as a branch,
which sees the context and itself. So each context is evaluated once. A repeated pair is scored
once, too, and the head is applied only where a token is scored. None of this changes a number
beyond rounding. Batches have rows of similar length, and are halved when a GPU runs out of memory.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from iiet.decoder import Decoder
from orchestrator.evaluation.store import AnswerJournal
from orchestrator.workspace.errors import DeviceError, out_of_memory_text
from orchestrator.workspace.provenance import content_key

T = TypeVar("T")
Tokens = tuple[int, ...]

MAX_TOKENS_ON_CPU = 2048
"""Tokens of one pass on a CPU; more do not fit its caches and run a third slower."""
MAX_SHARED_TOKENS = 2048
"""Tokens of a row with several branches: the memory of its mask grows with their square."""
MAX_LOGITS_AT_ONCE = 1 << 24
"""64 MiB in float32, for any vocabulary."""


class Score(NamedTuple):
    """Score of one continuation."""

    log_likelihood: float
    """Sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens had the highest probability."""


class Segment(NamedTuple):
    """A part of a continuation that fits into one forward pass, after as much context as fits."""

    context: Tokens
    continuation: Tokens


class Row(NamedTuple):
    """One sequence of a batch: a context, followed by continuations without their last tokens."""

    context: Tokens
    segments: list[Segment]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return len(self.context) + sum(len(each.continuation) - 1 for each in self.segments)

    @property
    def is_shared(self) -> bool:
        """Whether there are several branches, so that a mask is needed."""
        return sum(len(each.continuation) > 1 for each in self.segments) > 1


class BatchLimit:
    """The largest size of a batch, in some unit; halved after a batch that did not fit.

    `note` is called with a sentence when the limit is halved.
    """

    def __init__(self, size: int, unit: str, note: Callable[[str], None] | None = None) -> None:
        self.size, self._unit, self._note = size, unit, note

    def run(self, work: Callable[[], T], *, size: int, can_split: bool) -> T | None:
        """Return the result of work on a batch; None if it did not fit, and is to be split.

        Raises:
            DeviceError: If a batch that cannot be split does not fit.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            if not can_split:
                raise DeviceError(
                    f"the evaluation of one sequence ran out of memory "
                    f"({out_of_memory_text(error)}); use a GPU with more memory, or --set "
                    "evaluation.precision=bf16"
                ) from None
        # Not in the handler: there, the error still holds the tensors of the batch.
        self.size = max(1, size // 2)
        torch.cuda.empty_cache()
        if self._note:
            self._note(
                f"a batch of the evaluation ran out of memory; from here on, it has at most "
                f"{self.size:,} {self._unit}"
            )
        return None


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
        decoder: The model in evaluation mode, under its own schedule.
        pairs: Context, at least one token, and continuation, which may be empty.
        batch_size: Sequences of full length in one forward pass; of shorter sequences, as many as
            have the same number of tokens. On a CPU at most `MAX_TOKENS_ON_CPU` tokens.
        on_scored: Called after each pass with the number of segments done and their total.
        note: As `BatchLimit`.
        journal: Gets the scores of each batch; batches that it holds are not run again.

    Raises:
        DeviceError: If the memory is too small for one sequence.
    """
    longest = decoder.config.context_length
    split: list[list[Segment]] = []
    for before, continuation in ((tuple(a), tuple(b)) for a, b in pairs):
        split.append([])
        for start in range(0, len(continuation), longest):
            part = continuation[start : start + longest]
            # The last token is predicted, never read, so it takes no place in the context.
            split[-1].append(Segment(before[-(longest + 1 - len(part)) :], part))
            before += part

    max_tokens = batch_size * longest
    if decoder.device.type == "cpu":
        max_tokens = min(max_tokens, MAX_TOKENS_ON_CPU)
    limit, journal = BatchLimit(max_tokens, "tokens", note), journal or AnswerJournal()
    left = dict.fromkeys(segment for segments in split for segment in segments)
    total, scores = len(left), dict[Segment, Score]()
    while left:
        for rows in _batches(make_rows(left, limit.size, decoder.config.dim), limit.size):
            batch = [segment for row in rows for segment in row.segments]
            key = content_key("scores", batch)
            found: list[Score] | None = [Score(*stored) for stored in journal.get(key) or ()]
            if not found:
                size = len(rows) * rows[0].num_tokens
                work = partial(_score_rows, decoder, rows)
                found = limit.run(work, size=size, can_split=len(batch) > 1)
                if found is None:
                    break  # Divide what is left into smaller batches.
                journal.add({key: found})
            scores.update(zip(batch, found, strict=True))
            for segment in batch:
                del left[segment]
            if on_scored:
                on_scored(len(scores), total)
    return [
        Score(
            sum(scores[segment].log_likelihood for segment in segments),
            all(scores[segment].is_greedy for segment in segments),
        )
        for segments in split
    ]


def make_rows(segments: Iterable[Segment], max_tokens: int, keys_per_token: int) -> list[Row]:
    """Return rows that hold all segments, the longest first; those that need no mask come first.

    The kernel computes all pairs of query and key, and the mask drops those of different branches.
    So a row is full when it has wasted as much as the context costs in a new row.

    Args:
        max_tokens: Most tokens of a row with several branches.
        keys_per_token: Number of keys that a query can look at in the time of one token's other
            arithmetic: a layer's is about 24 d^2 per token, that of a key 4 d at a lower speed.
    """
    by_context: defaultdict[Tokens, list[Segment]] = defaultdict(list)
    for segment in segments:
        by_context[segment.context].append(segment)
    rows = []
    for context, of_context in by_context.items():
        row, num_wasted = Row(context, []), 0
        for segment in of_context:
            read = len(segment.continuation) - 1
            num_wasted += read * (row.num_tokens - len(context))
            is_full = row.num_tokens + read > min(max_tokens, MAX_SHARED_TOKENS)
            if row.segments and (is_full or num_wasted > len(context) * keys_per_token):
                rows.append(row)
                row, num_wasted = Row(context, []), 0
            row.segments.append(segment)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.is_shared, -row.num_tokens))


def _batches(rows: Iterable[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, padded to at most `max_tokens` tokens."""
    batch: list[Row] = []
    for row in rows:
        is_alike = batch and batch[0].is_shared == row.is_shared
        if batch and not (is_alike and (len(batch) + 1) * batch[0].num_tokens <= max_tokens):
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _score_rows(decoder: Decoder, rows: list[Row]) -> list[Score]:
    """Score the segments of all rows, padded on the right to the length of the first."""
    tokens, places, owners = list[Tensor](), list[Tensor](), list[Tensor]()
    wanted: list[tuple[int, int]] = []  # A column of the batch, and the token that it predicts.
    needed: dict[int, int] = {}  # Continuations that begin alike need the logits of a column once.
    for number, row in enumerate(rows):
        read, length = [*row.context], len(row.context)
        positions, branches = [*range(length)], [0] * length
        for branch, segment in enumerate(row.segments, 1):
            more = segment.continuation[:-1]
            own = [length - 1, *range(len(read), len(read) + len(more))]
            for column, target in zip(own, segment.continuation, strict=True):
                place = number * rows[0].num_tokens + column
                wanted.append((needed.setdefault(place, len(needed)), target))
            read += more
            positions += range(length, length + len(more))
            branches += [branch] * len(more)
        for found, values in ((tokens, read), (places, positions), (owners, branches)):
            found.append(torch.tensor(values))

    device = decoder.device
    inputs = pad_sequence(tokens, batch_first=True).to(device)
    position_ids = mask = None
    if rows[0].is_shared:
        position_ids = pad_sequence(places, batch_first=True).to(device)
        # The context, branch 0, is seen by all; padding by none.
        owner = pad_sequence(owners, batch_first=True, padding_value=-1).to(device)
        order = torch.arange(inputs.size(1), device=device)
        keys = owner[:, None]
        mask = (order <= order[:, None]) & ((keys == 0) | (keys == owner[:, :, None]))
    states = decoder.hidden_states(
        decoder.embedding(inputs), attention_mask=mask, position_ids=position_ids
    )
    # One after the other, so that those of earlier layers are freed.
    (hidden,) = deque(states, maxlen=1)
    selected = hidden.flatten(0, 1)[torch.tensor(list(needed), device=device)]

    # The loss of each wanted token, and whether it is the likeliest.
    asked = torch.tensor(wanted, device=device)
    losses, hits = hidden.new_zeros(len(asked), dtype=torch.float64), asked.new_zeros(len(asked))
    num_at_once = max(1, MAX_LOGITS_AT_ONCE // decoder.config.vocab_size)
    for start in range(0, len(selected), num_at_once):
        logits = decoder.logits(selected[start : start + num_at_once])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        is_here = (asked[:, 0] >= start) & (asked[:, 0] < start + len(logits))
        (here,) = is_here.nonzero().unbind(1)
        columns, targets = (asked[here] - asked.new_tensor([start, 0])).unbind(1)
        losses[here] = -logits.log_softmax(-1)[columns, targets].double()
        hits[here] = (logits.argmax(-1)[columns] == targets).to(hits.dtype)
    scored = zip(losses.tolist(), hits.bool().tolist(), strict=True)
    scores = []
    for segment in (segment for row in rows for segment in row.segments):
        losses_of, hits_of = zip(*(next(scored) for _ in segment.continuation), strict=True)
        scores.append(Score(-math.fsum(losses_of), all(hits_of)))
    return scores
