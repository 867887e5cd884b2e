"""Self-speculative decoding: a cheap schedule drafts tokens, the model verifies them at once.

    1. draft     g tokens, one step each, under a schedule with fewer corrections
    2. verify    one pass of the model over these g tokens chooses a token after each
    3. accept    the drafted tokens that equal the model's choices, up to the first that differs in
                 any row, and the model's choice after them

The output is what the model alone generates from the same seed, token for token, up to rounding:
each token is the model's choice, and its noise belongs to row and position (`iiet.sampling`). The
draft decides only how many tokens a pass yields.

A draft with no more corrections in any layer reads and writes the model's own cache, in the slots
of its evaluations, and verification overwrites what it wrote: no second cache, no second prefill.
Any other draft has a cache of its own.

How many tokens to draft: with acceptance a (the chance that the next drafted token is kept), g
drafted tokens yield 1 + a + ... + a^g tokens and cost g draft steps and one verification:

    gain(g) = (1 - a^(g+1)) / ((1 - a) (g c + 1 + g w))

c is the cost of a draft step and w that of each further token in a verification, both in plain
steps: counted, not timed, so the choice is the same in each run. Acceptance is seen. Where no gain
exceeds 1, decoding is plain from there on.

Passes are not of fixed shapes, so a GPU runs them without the CUDA graphs of plain decoding, which
gain more there than drafts do: on a GPU, `auto` drafts nothing.

Source: Leviathan, Kalman, Matias 2023 (the gain is theorem 3.8, with a cost for each token);
drafting with the model's own weights as in LayerSkip (Elhoushi et al. 2024); exact sampling as in
Daliri, Musco, Suresh 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.cache import KeyValueCache
from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.sampling import LogitsNotFinite, Request, not_finite
from iiet.schedule import IterationSchedule

__all__ = [
    "MAX_DRAFT_TOKENS",
    "DraftRecord",
    "cheaper_schedules",
    "counted_costs",
    "draft_models",
    "drafted_steps",
    "expected_gain",
]

MAX_DRAFT_TOKENS: Final = 16
"""The most tokens that `draft_tokens="auto"` drafts at once."""
_MEASURED_TOKENS: Final = 16  # Of each draft, before `auto` keeps the best.
_FIRST_ACCEPTANCE: Final = 0.9  # High, so that each draft is tried.
_FIRST_WEIGHT: Final = 8.0  # In tokens.
_FLOPS_PER_BYTE: Final = {"cpu": 2.0, "cuda": 100.0}
"""FLOPs that take as long as reading a byte of weights. On a CPU, one core verified a further token
of one row for 16 to 26 % of a step; a GPU computes far faster than it reads."""


@dataclass
class DraftRecord:
    """What drafting did. In a batch, each row counts by itself."""

    drafted: int = 0
    """Drafted tokens."""
    accepted: int = 0
    """Drafted tokens that equal the model's choices, up to the first of the row that differs.
    Where another row differs earlier, the batch drafts the others again, and they count again."""
    verifications: int = 0
    """Passes that verified drafted tokens."""
    verified: int = 0
    """Tokens that these passes yielded: the kept ones and the model's own."""
    plain_steps: int = 0
    """Passes without drafted tokens, after the prompt's."""
    rounds_by_draft: dict[str, int] = field(default_factory=dict)
    """Rounds of the batch by the name of the draft."""

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that the model chose, too; None where there was no draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens that a verification yields; None where there was none."""
        return self.verified / self.verifications if self.verifications else None

    def __str__(self) -> str:
        if self.acceptance is None or self.tokens_per_verification is None:
            return f"nothing drafted, {self.plain_steps} plain steps"
        often = max(self.rounds_by_draft, key=lambda name: self.rounds_by_draft[name])
        return (
            f"{self.acceptance:.1%} of {self.drafted} drafted tokens accepted, "
            f"{self.tokens_per_verification:.2f} tokens per verification, "
            f"{self.plain_steps} plain steps, draft {often}"
        )


def draft_models(
    decoder: Decoder,
    draft: IterationSchedule | Decoder | str,
    *,
    family: Collection[IterationSchedule] = (),
    num_tokens: int,
) -> dict[str, Decoder]:
    """Return the drafts to choose from by name; none where `auto` finds no cheaper schedule.

    Args:
        decoder: the model that verifies, under its own schedule.
        draft: a schedule, as value or text; another decoder of the same vocabulary; or `auto` for
            the schedules that `cheaper_schedules` names.
        family: schedules that the weights serve, for `auto`.
        num_tokens: prompt and continuation together.

    Raises:
        ValueError: the draft does not fit the model.
    """
    if isinstance(draft, Decoder):
        ours, theirs = decoder.config, draft.config
        if theirs.vocab_size != ours.vocab_size or theirs.context_length < num_tokens:
            raise ValueError(
                f"a draft needs the model's vocabulary of {ours.vocab_size} tokens and a context "
                f"of at least the {num_tokens} asked for, got a decoder with "
                f"{theirs.vocab_size} and {theirs.context_length}"
            )
        return {f"{theirs.method} of width {theirs.dim}": draft}
    method = decoder.config.method
    if draft == "auto":
        is_gpu = decoder.device.type == "cuda"
        found = [] if is_gpu else cheaper_schedules(decoder.schedule, family)
        if decoder.method.repeats_stack:  # All layers make as many corrections.
            found = [s for s in found if len(set(s)) == 1]
    elif decoder.method.has_corrections:
        found = [IterationSchedule.parse(draft, num_layers=decoder.config.num_layers)]
    else:
        raise ValueError(
            f"draft={str(draft)!r}: the method {method!r} makes no corrections, so no schedule is "
            "cheaper than its own; draft with another decoder, or decode without a draft"
        )
    return {str(schedule): decoder.with_schedule(schedule) for schedule in found}


def cheaper_schedules(
    schedule: IterationSchedule, family: Iterable[IterationSchedule] = ()
) -> list[IterationSchedule]:
    """Return the schedules that may draft for a model, cheapest first.

    These are the members of a family within the model's own schedule. Without a family: the
    model's own, cut to at most 0, 1, ... corrections per layer. Empty where the model makes none.
    """
    found = {s for s in family if s.is_within(schedule) and s != schedule}
    if not found:
        limits = range(schedule.max_corrections)
        found = {IterationSchedule(tuple(min(r, limit) for r in schedule)) for limit in limits}
    return sorted(found, key=lambda s: (s.num_evaluations, s.corrections))


def expected_gain(
    acceptance: float, num_drafted: int, *, draft_cost: float, token_cost: float
) -> float:
    """Return the tokens per cost of a round, against plain decoding; 1 for no drafted token.

    Args:
        acceptance: the chance that the next drafted token is kept.
        num_drafted: tokens that are drafted at once.
        draft_cost: of a step of the draft, in plain steps.
        token_cost: of each token that a verification reads beyond the first, in plain steps.
    """
    most = num_drafted + 1
    tokens = most if acceptance == 1.0 else (1.0 - acceptance**most) / (1.0 - acceptance)
    return tokens / (1.0 + num_drafted * (draft_cost + token_cost))


def counted_costs(
    config: ModelConfig,
    draft: ModelConfig,
    *,
    num_tokens: int,
    batch_size: int = 1,
    bytes_per_value: int = 4,
    device: str = "cpu",
) -> tuple[float, float]:
    """Count `draft_cost` and `token_cost` of `expected_gain`.

    A pass takes as long as its bytes and, at the device's rate, its FLOPs together.

    Args:
        config: the verifying model, under its schedule.
        draft: the draft, under its schedule.
        num_tokens: tokens that a step sees.
        batch_size: rows of a step.
        bytes_per_value: of weights, keys and values.
        device: `cpu` or `cuda`; others count as `cuda`.
    """
    rate = _FLOPS_PER_BYTE.get(device, _FLOPS_PER_BYTE["cuda"])

    def counted(model: ModelConfig) -> tuple[float, float]:
        cost = inference_cost(
            model,
            context_length=min(num_tokens, model.context_length),
            batch_size=batch_size,
            bytes_per_value=bytes_per_value,
        )
        token = batch_size * cost.decode_flops_per_token / rate
        read = cost.weight_bytes_per_token + cost.kv_bytes_read_per_token
        return batch_size * read + token, token

    step, token = counted(config)
    return counted(draft)[0] / step, token / step


class _Draft:
    """A draft of a model with its cache, its costs, and how many of its tokens were kept.

    Args:
        name: in the record.
        decoder: proposes tokens.
        model: verifies them.
        cache: the model's, with the prompts; a draft within its schedule gets a view of it, which
            verification fills with the decided tokens.
    """

    def __init__(self, name: str, decoder: Decoder, model: Decoder, cache: KeyValueCache) -> None:
        self.name = name
        self.num_tried = 0
        self._decoder = decoder
        self._is_view = decoder.layers is model.layers and decoder.schedule.is_within(
            model.schedule
        )
        weight, num_tokens, batch_size = model.embedding.weight, cache.max_tokens, cache.batch_size
        if self._is_view:
            self._cache = cache.view(decoder.config)
        else:
            self._cache = decoder.new_cache(batch_size=batch_size, max_tokens=num_tokens)
        self._costs = counted_costs(
            model.config,
            decoder.config,
            num_tokens=num_tokens,
            batch_size=batch_size,
            bytes_per_value=weight.element_size(),
            device=weight.device.type,
        )
        self._num_held = 0
        self._num_kept = 0

    def saw(self, num_kept: int, num_drafted: int) -> None:
        """Count a round; nothing is known of the tokens after the first rejected one."""
        self._num_kept += num_kept
        self.num_tried += min(num_kept + 1, num_drafted)

    def best(self, counts: Iterable[int]) -> tuple[float, int]:
        """Return the largest expected gain, and the number of drafted tokens that has it."""
        kept = _FIRST_ACCEPTANCE * _FIRST_WEIGHT + self._num_kept
        acceptance = kept / (_FIRST_WEIGHT + self.num_tried)
        draft, token = self._costs
        gains = [
            (expected_gain(acceptance, count, draft_cost=draft, token_cost=token), count)
            for count in counts
        ]
        return max(gains, key=lambda found: found[0])

    def propose(self, decided: _Decided, count: int) -> None:
        """Write `count` tokens after the decided ones of each row, step by step.

        The first step reads what an own cache lacks: all tokens, at the first call, and what
        verification decided since the last.
        """
        request, tokens, length = decided.request, decided.tokens, decided.length
        start, mask = min(self._num_held, length - 1), None
        if self._is_view:
            start = length - 1
        elif start == 0 and request.attention_mask is not None:
            num_decided = length - decided.num_prompt
            mask = F.pad(request.attention_mask.bool(), (0, num_decided), value=True)
        for column in range(length, length + count):
            self._cache.set_length(start)
            logits = self._decoder(
                tokens[:, start:column], cache=self._cache, attention_mask=mask, last_only=True
            )
            tokens[:, column] = request.sampler(logits[:, -1], column - decided.num_prompt)
            start, mask = column, None
        self._num_held = length + count - 1  # The last proposed token was not read.


class _Decided:
    """The tokens of a request: prompts, then what is decided, then what is drafted."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = F.pad(request.input_ids, (0, request.max_new_tokens))
        self.num_prompt = self.length = request.input_ids.size(1)
        self.has_ended = torch.zeros(len(self.tokens), dtype=torch.bool, device=self.tokens.device)

    @property
    def num_left(self) -> int:
        """How many tokens a row may still get; 0 where all rows have ended."""
        return 0 if self.has_ended.all() else self.tokens.size(1) - self.length

    def accept(self, logits: Tensor, num_drafted: int) -> tuple[list[Tensor], list[int]]:
        """Choose tokens by the model's logits, (batch, 1 + drafted, vocab), and keep the drafted
        ones that equal its choices in every row, and the choice after them.

        Returns the new tokens, each (batch,), and how many drafted ones each open row has equal.
        """
        if not_finite(logits):
            raise LogitsNotFinite
        tokens, length = self.tokens, self.length
        positions = torch.arange(logits.size(1), device=tokens.device) + (length - self.num_prompt)
        chosen = self.request.sampler(logits, positions[None])
        is_equal = tokens[:, length : length + num_drafted] == chosen[:, :num_drafted]
        num_equal = is_equal.long().cumprod(1).sum(1)[~self.has_ended].tolist()
        num_new = min(num_equal, default=0) + 1
        stops, new = self.request.stops(), []
        for column in range(num_new):
            # A row that has ended repeats its last token.
            latest = torch.where(self.has_ended, tokens[:, self.length - 1], chosen[:, column])
            tokens[:, self.length] = latest
            new.append(latest)
            self.length += 1
            self.has_ended.logical_or_((latest.unsqueeze(1) == stops).any(1))
            if len(stops) and self.has_ended.all():
                break
        return new, num_equal


def drafted_steps(
    decoder: Decoder,
    drafts: dict[str, Decoder],
    request: Request,
    *,
    draft_tokens: int | Literal["auto"],
    record: DraftRecord,
) -> Iterator[Tensor]:
    """Yield the next tokens, (batch,), in bursts of one or more; see `iiet.generation.stream`.

    All rows advance together, by what the row with the fewest accepted tokens keeps.

    Args:
        decoder: verifies.
        drafts: at least one, from `draft_models`. Of several, each drafts a few tokens, then the
            one with the largest expected gain stays.
        request: what to generate; its sampler chooses for the draft as for the model.
        draft_tokens: how many tokens to draft at once, or `auto`.
        record: gets what happened, while it happens.
    """
    decided, num_prompts = _Decided(request), len(request.input_ids)
    with torch.inference_mode():
        cache = decoder.new_cache(batch_size=num_prompts, max_tokens=decided.tokens.size(1))
        logits = decoder(
            request.input_ids, cache=cache, attention_mask=request.attention_mask, last_only=True
        )
        new, _ = decided.accept(logits, 0)
        candidates = [_Draft(name, draft, decoder, cache) for name, draft in drafts.items()]
    while True:
        for latest in new:  # A clone made outside of inference mode is an ordinary tensor.
            yield latest.clone()
        if decided.num_left == 0:
            return

        # Which draft, and how many tokens. The last token is the model's own.
        draft, num_drafted = _chosen_draft(candidates, draft_tokens, decided.num_left - 1)
        with torch.inference_mode():
            # 1. Draft
            if draft is not None and num_drafted:
                draft.propose(decided, num_drafted)
            # 2. Verify
            start = decided.length - 1
            cache.set_length(start)
            logits = decoder(decided.tokens[:, start : start + 1 + num_drafted], cache=cache)
            # 3. Accept
            new, num_equal = decided.accept(logits, num_drafted)

        num_open = len(num_equal)
        if draft is None or not num_drafted:
            record.plain_steps += num_open
            continue
        draft.saw(min(num_equal), num_drafted)
        record.drafted += num_drafted * num_open
        record.accepted += sum(num_equal)
        record.verifications += num_open
        record.verified += len(new) * num_open
        record.rounds_by_draft[draft.name] = record.rounds_by_draft.get(draft.name, 0) + 1


def _chosen_draft(
    candidates: list[_Draft], draft_tokens: int | Literal["auto"], most: int
) -> tuple[_Draft | None, int]:
    """Choose a draft and how many tokens it drafts, at most `most`.

    Each candidate is measured first, then the best stays; with `auto`, one that is not expected to
    pay goes.
    """
    fixed = None if draft_tokens == "auto" else min(draft_tokens, most)
    counts = range(1, min(MAX_DRAFT_TOKENS, most) + 1) if fixed is None else [fixed]
    if not candidates or not counts:
        return None, 0
    if len(candidates) > 1 and all(d.num_tried >= _MEASURED_TOKENS for d in candidates):
        candidates[:] = [max(candidates, key=lambda draft: draft.best(counts)[0])]
    found = min(candidates, key=lambda draft: min(draft.num_tried, _MEASURED_TOKENS))
    gain, num_drafted = found.best(counts)
    if fixed is None and gain <= 1.0:
        candidates.remove(found)
        num_drafted = 0
    return found, num_drafted
