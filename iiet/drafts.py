"""What proposes the tokens that self-speculative decoding verifies: drafts, and the rows they
continue.

    ModelDraft     a decoder: the same weights under a cheaper schedule, or a smaller model
    PromptLookup   what followed the last tokens where they occurred before; costs nothing

The rows of a batch keep different numbers of proposed tokens, so each has its own length. A pass
over rows of one length is an ordinary one; else each row writes at columns of its own
(`iiet.window.RowWindow`).

Source: Leviathan, Kalman, Matias 2023; prompt lookup is from Saxena 2023.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from iiet.cache import KeyValueCache
from iiet.decoder import Decoder
from iiet.sampling import Sampler
from iiet.window import RowWindow

__all__ = ["CachedModel", "Draft", "ModelDraft", "PromptLookup", "Rows"]

_ALIGNMENT: Final = 16  # A GPU would copy a mask of another length in each call of attention.


class Rows:
    """Tokens of a batch by column, prompts first; each row has its own number of decided tokens.

    Args:
        prompts: (batch, time).
        padding: (batch, time), false for padding on the left; None where there is none.
        max_new_tokens: the most that a row may get.
        stop_tokens: tokens that end a row, and are part of it.
        num_drafted: the most tokens that are proposed at once.
    """

    def __init__(
        self,
        prompts: Tensor,
        padding: Tensor | None,
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        num_drafted: int = 0,
    ) -> None:
        batch, self.prompt_length = prompts.shape
        self.padding = None if padding is None else padding.bool()
        self._max_new_tokens = max_new_tokens
        self._stop_tokens = frozenset(stop_tokens)
        columns = self.prompt_length + max_new_tokens + num_drafted + 1
        self.max_tokens = math.ceil(columns / _ALIGNMENT) * _ALIGNMENT
        self.tokens = prompts.new_zeros(batch, self.max_tokens)
        self.tokens[:, : self.prompt_length] = prompts
        self.lengths = [self.prompt_length] * batch
        """Columns of each row that are decided; the last of them is in no cache yet."""
        self.generated: list[list[int]] = [[] for _ in range(batch)]
        """Decided tokens of each row after the prompt."""
        self.open = list(range(batch))
        """Rows that have not ended. The others go along, so that all passes have one shape; what
        they get after their end is in no list."""

    @property
    def room(self) -> int:
        """The most tokens that an open row may still get."""
        return self._max_new_tokens - min(len(self.generated[row]) for row in self.open)

    def decide(self, row: int, tokens: Sequence[int]) -> int:
        """Add an open row's next tokens, which are in their columns already, up to its end.

        Returns how many these are.
        """
        new = list(tokens[: self._max_new_tokens - len(self.generated[row])])
        ends = [number for number, token in enumerate(new, start=1) if token in self._stop_tokens]
        if ends:
            new = new[: ends[0]]
        self.generated[row] += new
        self.lengths[row] += len(new)
        if ends or len(self.generated[row]) == self._max_new_tokens:
            self.open.remove(row)
        return len(new)

    def catch_up(self) -> None:
        """Move rows that have ended to where the shortest open row is."""
        least = min((self.lengths[row] for row in self.open), default=0)
        self.lengths = [max(length, least) for length in self.lengths]

    def text(self, row: int) -> list[int]:
        """Return a row's decided tokens, without padding."""
        prompt = self.tokens[row, : self.prompt_length]
        if self.padding is not None:
            prompt = prompt[self.padding[row]]
        return [*prompt.tolist(), *self.generated[row]]

    def columns(self, firsts: Sequence[int], num: int) -> slice | Tensor:
        """Return `num` columns of each row from its first one on: (batch, num), or one slice."""
        if min(firsts) == max(firsts):
            return slice(firsts[0], firsts[0] + num)
        device = self.tokens.device
        return torch.tensor(firsts, device=device)[:, None] + torch.arange(num, device=device)

    def read(self, firsts: Sequence[int], num: int) -> Tensor:
        """Return tokens, (batch, num), from each row's first column on."""
        columns = self.columns(firsts, num)
        if isinstance(columns, slice):
            return self.tokens[:, columns]
        return self.tokens.gather(1, columns)

    def write(self, firsts: Sequence[int], tokens: Tensor) -> None:
        """Put tokens, (batch, num), from each row's first column on."""
        columns = self.columns(firsts, tokens.size(1))
        if isinstance(columns, slice):
            self.tokens[:, columns] = tokens
        else:
            self.tokens.scatter_(1, columns, tokens)

    def positions(self, firsts: Sequence[int], num: int) -> Tensor:
        """Return how many tokens a row has generated before each of these columns."""
        columns = self.columns(firsts, num)
        if isinstance(columns, slice):
            columns = torch.arange(columns.start, columns.stop, device=self.tokens.device)[None]
        return columns - self.prompt_length


class CachedModel:
    """A decoder that reads the tokens of rows through its cache.

    The prompts must be in the cache before the first call.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache, rows: Rows) -> None:
        self.decoder = decoder
        self.cache = cache
        self._rows = rows

    def prefill(self) -> Tensor:
        """Read the prompts; return the logits of the first new tokens, (batch, vocab)."""
        rows = self._rows
        prompts = rows.tokens[:, : rows.prompt_length]
        logits: Tensor = self.decoder(
            prompts, cache=self.cache, attention_mask=rows.padding, last_only=True
        )
        # Rows of different lengths hide what is not held, but zero times infinity is not zero.
        self.cache.zero_unused()
        return logits[:, -1]

    def __call__(self, firsts: Sequence[int], num: int, *, last_only: bool = False) -> Tensor:
        """Read `num` tokens of each row from its first column on, over what the cache held there.

        Returns:
            Logits of the tokens after them, (batch, num or 1, vocab).
        """
        rows, cache = self._rows, self.cache
        columns = rows.columns(firsts, num)
        cache.window = None
        cache.set_length(min(firsts))
        if isinstance(columns, Tensor):
            size = math.ceil((max(firsts) + num) / _ALIGNMENT) * _ALIGNMENT
            cache.window = RowWindow(
                columns,
                size,
                padding=rows.padding,
                num_positions=self.decoder.config.context_length,
                dtype=cache.dtype,
            )
        tokens = rows.read(firsts, num)
        logits: Tensor = self.decoder(tokens, cache=cache, last_only=last_only)
        return logits


class Draft(Protocol):
    """Proposes tokens."""

    def propose(self, rows: Rows, num_tokens: int, sampler: Sampler) -> int:
        """Write at most `num_tokens` tokens after the decided ones of each row.

        Returns how many; where a row has fewer, the others are any tokens.
        """
        ...


class ModelDraft:
    """A decoder as a draft.

    Args:
        model: its cache is a view of the verifying model's, or empty.
        is_view: whether it is a view; verification then writes the decided tokens into it.
    """

    def __init__(self, model: CachedModel, *, is_view: bool) -> None:
        self._model = model
        self._is_view = is_view
        self._held: list[int] | None = None
        """First tokens of each row in the cache, if it is no view; None: it is empty."""

    def propose(self, rows: Rows, num_tokens: int, sampler: Sampler) -> int:
        """Decode step by step; the first step also reads decided tokens that the cache lacks."""
        num_read = 1 if self._is_view else self._num_unread(rows)
        for step in range(num_tokens):
            ends = [length + step for length in rows.lengths]
            logits = self._model([end - num_read for end in ends], num_read, last_only=True)
            rows.write(ends, sampler(logits, rows.positions(ends, 1)))
            num_read = 1
        # The last proposed token was not read.
        self._held = [length + num_tokens - 1 for length in rows.lengths]
        return num_tokens

    def _num_unread(self, rows: Rows) -> int:
        """Return how many tokens to read so that the cache holds all decided ones of each row."""
        if self._held is None:
            self._model.prefill()
            self._held = [rows.prompt_length] * len(rows.lengths)
        # Tokens that verification replaced are read again; so is the last decided one.
        return max(
            rows.lengths[row] - min(self._held[row], rows.lengths[row] - 1) for row in rows.open
        )


class PromptLookup:
    """Proposes what followed the last tokens of a row where they occurred before.

    Args:
        longest: the most last tokens to look for; then fewer, down to one. At least 1.
    """

    def __init__(self, longest: int = 3) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        self._longest = longest

    def propose(self, rows: Rows, num_tokens: int, sampler: Sampler) -> int:  # noqa: ARG002
        """Look the tokens up; rows without an occurrence get zeros."""
        found = {row: self._following(rows.text(row), num_tokens) for row in rows.open}
        longest = max(map(len, found.values()))
        if longest:
            empty: list[int] = []
            proposed = [found.get(row, empty) for row in range(len(rows.lengths))]
            padded = [tokens + [0] * (longest - len(tokens)) for tokens in proposed]
            rows.write(rows.lengths, rows.tokens.new_tensor(padded))
        return longest

    def _following(self, text: list[int], num_tokens: int) -> list[int]:
        for size in range(min(self._longest, len(text) - 1), 0, -1):
            last = text[-size:]
            # The latest occurrence that another token follows.
            for end in range(len(text) - 1, size - 1, -1):
                if text[end - size : end] == last:
                    return text[end : end + num_tokens]
        return []
