"""How many tokens to draft, and under which schedule: the choice with the largest expected gain.

With acceptance a (the chance that the next drafted token is kept), g drafted tokens yield
1 + a + ... + a^g tokens and cost g draft steps and one verification of g + 1 tokens:

    gain(g) = (1 - a^(g+1)) / ((1 - a) (g c + v(g))),      v(g) = 1 + g w

c is the cost of a draft step and w that of each further token in a verification, both in plain
steps. Where no gain exceeds 1, decoding is plain, and drafts are tried again after pauses, each
twice as long as the last.

Costs are counted, not timed, so the choice is the same in each run. Acceptance is seen: of each
draft, over about its last `_MEMORY` tokens. It starts high, so that each draft is tried and the
best remains. Source: Leviathan, Kalman, Matias 2023, theorem 3.8, with a cost for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = [
    "MAX_DRAFT_TOKENS",
    "DraftCosts",
    "DraftPlan",
    "expected_gain",
]

MAX_DRAFT_TOKENS: Final = 16
"""The most tokens that `auto` drafts at once."""
_FIRST_ACCEPTANCE: Final = 0.9
_FIRST_WEIGHT: Final = 8.0  # In tokens.
_MEMORY: Final = 100.0
_FIRST_PAUSE: Final = 32
_LONGEST_PAUSE: Final = 512


@dataclass(frozen=True)
class DraftCosts:
    """Costs in plain steps, counted or measured."""

    draft: float
    """A step of the draft."""
    further_token: float
    """Each token that a verification reads beyond the first, in every row."""

    def __post_init__(self) -> None:
        if not (0.0 <= self.draft < float("inf") and 0.0 <= self.further_token < float("inf")):
            raise ValueError(f"costs must be 0 or larger, got {self}")

    def verification(self, num_drafted: int) -> float:
        """Return v(g)."""
        return 1.0 + num_drafted * self.further_token


def expected_gain(acceptance: float, num_drafted: int, costs: DraftCosts) -> float:
    """Return the tokens per cost of a round, against plain decoding; 1 for no drafted token."""
    most = num_drafted + 1
    tokens = most if acceptance == 1.0 else (1.0 - acceptance**most) / (1.0 - acceptance)
    return tokens / (num_drafted * costs.draft + costs.verification(num_drafted))


class _Acceptance:
    """The share of drafted tokens that are kept, of late."""

    def __init__(self) -> None:
        self._kept = _FIRST_ACCEPTANCE * _FIRST_WEIGHT
        self._tried = _FIRST_WEIGHT

    @property
    def value(self) -> float:
        return self._kept / self._tried

    def add(self, num_kept: int, num_tried: int) -> None:
        remains = max(0.0, 1.0 - num_tried / _MEMORY)
        self._kept = self._kept * remains + num_kept
        self._tried = self._tried * remains + num_tried

    def forget(self) -> None:
        """Count the past for as few tokens as at the start, so that the next ones matter."""
        self._kept, self._tried = self.value * _FIRST_WEIGHT, _FIRST_WEIGHT


class DraftPlan:
    """Chooses the next draft and its number of tokens.

    Args:
        costs: of each draft.
        num_tokens: a fixed number; None: by expected gain, 0 where none exceeds 1.
    """

    def __init__(self, costs: Sequence[DraftCosts], num_tokens: int | None = None) -> None:
        self._costs = costs
        self._num_tokens = num_tokens
        self._seen = [_Acceptance() for _ in costs]
        self._num_plain = 0
        self._pause = _FIRST_PAUSE

    @property
    def max_tokens(self) -> int:
        return MAX_DRAFT_TOKENS if self._num_tokens is None else self._num_tokens

    def choose(self, limit: int) -> tuple[int, int]:
        """Return the number of the next draft and how many tokens, 0 to `limit`, it proposes."""
        if limit < 1 or not self._costs or self.max_tokens == 0:
            return 0, 0
        if self._num_plain:
            self._num_plain -= 1
            if self._num_plain:
                return 0, 0
            for seen in self._seen:
                seen.forget()
            return self._best(limit)[1:]
        gain, draft, num = self._best(limit)
        if self._num_tokens is not None:
            return draft, num
        if gain > 1.0:
            self._pause = _FIRST_PAUSE
            return draft, num
        self._num_plain, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        return 0, 0

    def saw(self, draft: int, num_proposed: int, kept: Iterable[int]) -> None:
        """Learn how many of the proposed tokens each row kept."""
        for num_kept in kept:
            # Nothing is known of the tokens after the first rejected one.
            self._seen[draft].add(num_kept, min(num_kept + 1, num_proposed))

    def acceptance(self, draft: int) -> float:
        """Return the chance that the next token of a draft is kept."""
        return self._seen[draft].value

    def _best(self, limit: int) -> tuple[float, int, int]:
        """Return gain, draft and number of tokens of the best choice with a draft."""
        most = min(self.max_tokens, limit)
        counts = range(1 if self._num_tokens is None else most, most + 1)
        return max(
            (
                (expected_gain(seen.value, count, costs), draft, count)
                for draft, (seen, costs) in enumerate(zip(self._seen, self._costs, strict=True))
                for count in counts
            ),
            key=lambda found: found[0],
        )
