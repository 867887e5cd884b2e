"""Self-speculative decoding: a cheap schedule drafts tokens, the model verifies them at once.

    1. draft     g tokens, one step each, under a schedule with fewer corrections
    2. verify    one pass of the model over these g tokens chooses a token after each
    3. accept    the drafted tokens that equal the model's choices, up to the first that differs in
                 any row, and the model's choice after them

The output is what the model alone generates from the same seed, token for token, up to rounding:
each token is the model's choice, and its noise belongs to row and position
(`iiet.decoding.sampling`).

A draft with no more corrections in any layer reads and writes the model's own cache, in the slots
of its evaluations, and verification overwrites what it wrote: no second cache, no second prefill.
Any other draft has a cache of its own.

How many tokens to draft: with acceptance a (the chance that the next drafted token is kept), g
drafted tokens yield 1 + a + ... + a^g tokens, and cost g draft steps c and one verification
1 + g w, in plain steps. Costs are counted, not timed, so the choice is the same in each run;
acceptance is seen. Where no g gains anything, decoding is plain from there on.

Passes are not of fixed shapes, so a GPU runs them without the CUDA graphs of plain decoding, which
gain more there than drafts do: on a GPU, `auto` drafts nothing.

Source: Leviathan, Kalman, Matias 2023 (theorem 3.8); own weights as in LayerSkip (Elhoushi et al.
2024); exact sampling as in Daliri, Musco, Suresh 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from iiet.checks import check_rules, is_integer_from
from iiet.cost import inference_cost
from iiet.decoding.request import GenerativeModel, Request
from iiet.decoding.sampling import LogitsNotFinite, not_finite
from iiet.model.cache import KeyValueCache
from iiet.model.config import ModelConfig
from iiet.model.facts import facts_of
from iiet.model.schedule import IterationSchedule, ScheduleLike

__all__ = [
    "MAX_DRAFT_TOKENS",
    "DraftRecord",
    "cheaper_schedules",
    "draft_models",
    "drafted_steps",
    "step_costs",
]

MAX_DRAFT_TOKENS: Final = 16
"""The most tokens that `draft_tokens="auto"` drafts at once."""
_MEASURED_TOKENS: Final = 16  # Of each draft, before `auto` keeps the best.
_FIRST_ACCEPTANCE: Final = 0.9  # High, so that each draft is tried.
_FIRST_WEIGHT: Final = 8.0  # In tokens.
_CPU_FLOPS_PER_BYTE: Final = 2.0
"""FLOPs that take as long as reading a byte of weights: one core verified a further token of one
row for 16 to 26 % of a step. A GPU computes far faster than it reads."""
_GPU_FLOPS_PER_BYTE: Final = 100.0


@dataclass
class DraftRecord:
    """What drafting did. In a batch, each row counts by itself.

    Raises:
        ValueError: naming every count that is negative or no integer.
    """

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

    def __post_init__(self) -> None:
        counts = ("drafted", "accepted", "verifications", "verified", "plain_steps")
        rules = {
            f"{name} must be an integer from 0": is_integer_from(0, getattr(self, name))
            for name in counts
        }
        rules["rounds_by_draft must hold integers from 0"] = all(
            is_integer_from(0, rounds) for rounds in self.rounds_by_draft.values()
        )
        check_rules("draft record", self, rules)

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
    decoder: GenerativeModel,
    draft: ScheduleLike | GenerativeModel,
    *,
    family: Collection[IterationSchedule] = (),
    num_tokens: int,
) -> dict[str, GenerativeModel]:
    """Return the drafts to choose from by name; none where `auto` finds no cheaper schedule.

    Args:
        decoder: the model that verifies, under its own schedule.
        draft: a schedule, as people write it; another decoder of the same vocabulary; or `auto` for
            the schedules that `cheaper_schedules` names.
        family: schedules that the weights serve, for `auto`.
        num_tokens: prompt and continuation together.

    Raises:
        ValueError: the draft does not fit the model.
    """
    if not isinstance(draft, IterationSchedule | str | SupportsIndex | Iterable):
        config = draft.config
        vocab_size = decoder.config.vocab_size
        if config.vocab_size != vocab_size or config.context_length < num_tokens:
            raise ValueError(
                f"a draft needs the model's vocabulary of {vocab_size} tokens and a context "
                f"of at least the {num_tokens} asked for, got a decoder with "
                f"{config.vocab_size} and {config.context_length}"
            )
        return {f"{config.method} of width {config.dim}": draft}
    method = facts_of(decoder.config.method)
    if draft == "auto":
        is_gpu = decoder.device.type == "cuda"
        schedules = [] if is_gpu else cheaper_schedules(decoder.schedule, family)
        if method.repeats_stack:  # All layers make as many corrections.
            schedules = [schedule for schedule in schedules if len(set(schedule)) == 1]
    elif method.has_corrections:
        schedules = [IterationSchedule.parse(draft, num_layers=decoder.config.num_layers)]
    else:
        raise ValueError(
            f"draft={str(draft)!r}: the method {decoder.config.method!r} makes no corrections, so "
            "no schedule is cheaper; draft with another decoder, or decode without a draft"
        )
    return {str(schedule): decoder.with_schedule(schedule) for schedule in schedules}


def cheaper_schedules(
    schedule: IterationSchedule, family: Iterable[IterationSchedule] = ()
) -> list[IterationSchedule]:
    """Return the schedules that may draft for a model, cheapest first.

    These are the members of a family within the model's own schedule. Without a family: the
    model's own, cut to at most 0, 1, ... corrections per layer. Empty where the model makes none.
    """
    cheaper = {member for member in family if member.is_within(schedule) and member != schedule}
    if not cheaper:
        for limit in range(schedule.max_corrections):
            cheaper.add(IterationSchedule(tuple(min(r, limit) for r in schedule)))
    return sorted(cheaper, key=lambda member: (member.num_evaluations, member.corrections))


def step_costs(
    model: GenerativeModel, draft: GenerativeModel, *, batch_size: int, num_tokens: int
) -> tuple[float, float]:
    """Count a draft's step, and each further token of a verification, in plain steps.

    A pass takes as long as its bytes and, at the device's rate, its FLOPs together. The step has
    `batch_size` rows and sees `num_tokens` tokens.
    """
    weight = model.model.embed_tokens.weight
    rate = _CPU_FLOPS_PER_BYTE if weight.device.type == "cpu" else _GPU_FLOPS_PER_BYTE

    def bytes_of_step(config: ModelConfig) -> tuple[float, float]:
        """Return what a step costs, and what each further token of a row adds, in bytes read."""
        cost = inference_cost(
            config,
            context_length=min(num_tokens, config.context_length),
            batch_size=batch_size,
            bytes_per_value=weight.element_size(),
        )
        bytes_of_flops = batch_size * cost.decode_flops_per_token / rate
        bytes_read = cost.weight_bytes_per_token + cost.kv_bytes_read_per_token
        return batch_size * bytes_read + bytes_of_flops, bytes_of_flops

    plain_step, further_token = bytes_of_step(model.config)
    draft_step, _ = bytes_of_step(draft.config)
    return draft_step / plain_step, further_token / plain_step


class _Draft:
    """A draft of a model with its cache, its costs, and how many of its tokens were kept.

    Drafts differ in one thing: whether verification fills their cache. It does where the draft has
    the model's weights and a schedule within the model's; its cache is then a view of the model's.
    """

    def __init__(
        self, name: str, decoder: GenerativeModel, model: GenerativeModel, cache: KeyValueCache
    ) -> None:
        self.name = name
        self.num_tried = 0
        self._num_kept = 0
        self._decoder = decoder
        rows = cache.batch_size
        num_tokens = cache.max_tokens
        has_same_weights = decoder.model is model.model
        self._is_filled = has_same_weights and decoder.schedule.is_within(model.schedule)
        if self._is_filled:
            self._cache = cache.view(decoder.config)
        else:
            self._cache = decoder.new_cache(batch_size=rows, max_tokens=num_tokens)
        self._costs = step_costs(model, decoder, batch_size=rows, num_tokens=num_tokens)

    def count_round(self, num_kept: int, num_drafted: int) -> None:
        """Count a round; nothing is known of the tokens after the first rejected one."""
        self._num_kept += num_kept
        self.num_tried += min(num_kept + 1, num_drafted)

    def best(self, counts: Iterable[int]) -> tuple[float, int]:
        """Return the largest expected gain, and the number of drafted tokens that has it."""
        num_kept = _FIRST_ACCEPTANCE * _FIRST_WEIGHT + self._num_kept
        acceptance = num_kept / (_FIRST_WEIGHT + self.num_tried)
        cost_per_token = sum(self._costs)
        gains: list[tuple[float, int]] = []
        for count in counts:
            num_tokens = sum(acceptance**k for k in range(count + 1))
            gains.append((num_tokens / (1 + count * cost_per_token), count))
        # Among equals the first, with the fewest tokens, wins.
        return max(gains, key=lambda gain_and_count: gain_and_count[0])

    def propose(self, request: Request, tokens: Tensor, length: int, count: int) -> None:
        """Write `count` tokens after the first `length` of each row, step by step.

        The first step reads what the cache lacks of the decided tokens: the last one, or where
        verification does not fill the cache also others, at the first call all of them.
        """
        num_held = length - 1
        if not self._is_filled:
            num_held = min(num_held, self._cache.get_seq_length())
        num_prompt = request.input_ids.size(1)
        mask = None
        if num_held == 0 and request.attention_mask is not None:
            mask = F.pad(request.attention_mask.bool(), (0, length - num_prompt), value=True)
        for column in range(length, length + count):
            self._cache.set_length(num_held)
            logits = self._decoder(
                tokens[:, num_held:column], cache=self._cache, attention_mask=mask, last_only=True
            )
            tokens[:, column] = request.sampler(logits[:, -1], column - num_prompt)
            num_held = column
            mask = None


def drafted_steps(
    decoder: GenerativeModel,
    drafts: dict[str, GenerativeModel],
    request: Request,
    record: DraftRecord,
) -> Iterator[Tensor]:
    """Yield the next tokens, (batch,), in bursts of one or more; see `iiet.Decoder.stream`.

    All rows advance together, by what the row with the fewest accepted tokens keeps.

    Args:
        decoder: verifies.
        drafts: at least one, from `draft_models`. Of several, each drafts a few tokens, then the
            one with the largest expected gain stays.
        request: what to generate; its sampler chooses for the draft as for the model.
        record: gets what happened, while it happens.
    """
    # Prompts, then what is decided, then what is drafted.
    tokens = F.pad(request.input_ids, (0, request.options.max_new_tokens))
    batch_size, num_prompt = request.input_ids.shape
    with torch.inference_mode():
        cache = decoder.new_cache(batch_size=batch_size, max_tokens=tokens.size(1))
    has_ended = torch.zeros(batch_size, dtype=torch.bool, device=tokens.device)
    end_tokens = request.end_tokens()
    length = num_prompt  # Of each row: the prompt and what is decided.
    start = 0  # Where the next pass of the model begins; at 0 it reads the prompts.
    candidates: list[_Draft] = []
    draft: _Draft | None = None  # Nothing is drafted for the first pass.
    num_drafted = 0
    while True:
        with torch.inference_mode():
            # 1. Draft
            if draft is not None and num_drafted:
                draft.propose(request, tokens, length, num_drafted)

            # 2. Verify
            cache.set_length(start)
            logits = decoder(
                tokens[:, start : length + num_drafted],
                cache=cache,
                attention_mask=request.attention_mask if start == 0 else None,
                last_only=start == 0,
            )
            if not_finite(logits):
                raise LogitsNotFinite
            positions = torch.arange(logits.size(1), device=tokens.device) + (length - num_prompt)
            chosen = request.sampler(logits, positions[None])

            # 3. Accept
            is_equal = tokens[:, length : length + num_drafted] == chosen[:, :num_drafted]
            num_equal = is_equal.long().cumprod(1).sum(1)[~has_ended].tolist()
            num_new = min(num_equal, default=0) + 1
            new: list[Tensor] = []
            for column in range(num_new):
                # A row that has ended repeats its last token.
                latest = torch.where(has_ended, tokens[:, length - 1], chosen[:, column])
                tokens[:, length] = latest
                new.append(latest)
                length += 1
                has_ended = has_ended | (latest.unsqueeze(1) == end_tokens).any(1)
                if len(end_tokens) and has_ended.all():
                    break

        num_open = len(num_equal)
        if draft is not None and num_drafted:
            draft.count_round(min(num_equal), num_drafted)
            record.drafted += num_drafted * num_open
            record.accepted += sum(num_equal)
            record.verifications += num_open
            record.verified += len(new) * num_open
            record.rounds_by_draft[draft.name] = record.rounds_by_draft.get(draft.name, 0) + 1
        elif start > 0:
            record.plain_steps += num_open
        for latest in new:  # A clone made outside of inference mode is an ordinary tensor.
            yield latest.clone()

        num_left = tokens.size(1) - length
        if num_left == 0 or has_ended.all():
            return
        if start == 0:
            candidates = [_Draft(name, model, decoder, cache) for name, model in drafts.items()]
        # The last token of a round is the model's own.
        draft, num_drafted = _choose_draft(candidates, request.options.draft_tokens, num_left - 1)
        start = length - 1


def _choose_draft(
    candidates: list[_Draft], draft_tokens: int | Literal["auto"], most: int
) -> tuple[_Draft | None, int]:
    """Choose a draft and how many tokens it drafts, at most `most`.

    Each candidate is measured first, then the best stays; with `auto`, one that is not expected to
    pay goes.
    """
    if draft_tokens == "auto":
        counts = range(1, min(MAX_DRAFT_TOKENS, most) + 1)
    else:
        fixed = min(draft_tokens, most)
        counts = range(fixed, fixed + 1)
    if not candidates or not counts:
        return None, 0
    if len(candidates) > 1 and all(d.num_tried >= _MEASURED_TOKENS for d in candidates):
        candidates[:] = [max(candidates, key=lambda draft: draft.best(counts)[0])]
    # The least measured one; of those that are measured enough, the first.
    draft = min(candidates, key=lambda draft: min(draft.num_tried, _MEASURED_TOKENS))
    gain, num_drafted = draft.best(counts)
    if draft_tokens == "auto" and gain <= 1.0:
        candidates.remove(draft)
        num_drafted = 0
    return draft, num_drafted
