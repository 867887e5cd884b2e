"""Self-speculative decoding: a cheap schedule drafts tokens, the model's own verifies them at once.

    draft    g tokens, one step each, under a schedule with fewer corrections
    verify   one pass of the model over these g tokens; it chooses a token at each position
    keep     the drafted tokens that equal the model's choices, up to the first that differs,
             and the model's choice after them

The output is what the model alone generates from the same seed, token for token, up to rounding:
each token is the model's choice, and its noise belongs to row and position (`iiet.sampling`). The
draft decides only how many tokens a pass yields. Speed comes from passes that read the weights once
for several tokens; where a draft does not pay, decoding is plain (`iiet.draft_plan`).

A draft with no more corrections in any layer reads and writes the model's own cache, in the slots
of its evaluations, and verification overwrites what it wrote: no second cache, no second prefill.
Any other draft has a cache of its own.

Passes are not of fixed shapes, so a GPU runs them without the CUDA graphs of plain decoding.

Source: Leviathan, Kalman, Matias 2023; drafting with the model's own weights as in LayerSkip
(Elhoushi et al. 2024); exact sampling as in Daliri, Musco, Suresh 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from iiet.cache import KeyValueCache, KvStrategy
from iiet.decoder import Decoder
from iiet.draft_plan import DraftCosts, DraftPlan, cheaper_schedules, counted_costs
from iiet.drafts import CachedModel, Draft, ModelDraft, PromptLookup, Rows
from iiet.generation import cache_dtype, checked_sampler
from iiet.sampling import Sampler
from iiet.schedule import IterationSchedule

__all__ = ["DraftRecord", "Speculation", "generate", "stream"]

DraftChoice = IterationSchedule | Decoder | PromptLookup | str
"""A schedule, as value or text; a decoder of the same vocabulary; prompt lookup; or `auto`."""


@dataclass
class DraftRecord:
    """What drafting did. In a batch, each row counts by itself."""

    drafted: int = 0
    """Drafted tokens."""
    accepted: int = 0
    """Drafted tokens that verification kept."""
    verifications: int = 0
    """Passes that verified drafted tokens."""
    plain_steps: int = 0
    """Passes without drafted tokens, after the prompt's."""
    rounds_by_draft: dict[str, int] = field(default_factory=dict)
    """Rounds of the batch by the name of the draft."""

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were kept; None where there was no draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens that a verification yields: the kept ones and the model's own."""
        return 1 + self.accepted / self.verifications if self.verifications else None

    def __str__(self) -> str:
        if self.acceptance is None or self.tokens_per_verification is None:
            return f"nothing drafted, {self.plain_steps} plain steps"
        often = max(self.rounds_by_draft, key=lambda name: self.rounds_by_draft[name])
        return (
            f"{self.acceptance:.1%} of {self.drafted} drafted tokens accepted, "
            f"{self.tokens_per_verification:.2f} tokens per verification, "
            f"{self.plain_steps} plain steps, draft {often}"
        )


class Speculation(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor
    """Prompts and continuations, (batch, time + new)."""
    record: DraftRecord


def generate(
    decoder: Decoder, input_ids: Tensor, *, max_new_tokens: int, **options: Any
) -> Speculation:
    """Continue prompts as `iiet.generation.generate` does; all arguments are those of `stream`.

    Raises:
        ValueError: as `stream`.
    """
    record = options.pop("record", None) or DraftRecord()
    steps = stream(decoder, input_ids, max_new_tokens=max_new_tokens, record=record, **options)
    tokens = torch.cat([input_ids, *(step.unsqueeze(1) for step in steps)], dim=1)
    return Speculation(tokens, record)


def stream(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    draft: DraftChoice = "auto",
    draft_tokens: int | Literal["auto"] = "auto",
    family: Collection[IterationSchedule] = (),
    costs: DraftCosts | Sequence[DraftCosts] | None = None,
    record: DraftRecord | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] | None = None,
    stop_tokens: Collection[int] = (),
    attention_mask: Tensor | None = None,
    kv_strategy: KvStrategy = "exact",
) -> Iterator[Tensor]:
    """Continue prompts: yield the next tokens, (batch,), of all rows that have not ended.

    They are those of `iiet.generation.stream`, in bursts of one or more; rows that are ahead wait
    for the others. Other arguments are those of `iiet.generation.stream`.

    Args:
        decoder: the model, under its own schedule.
        input_ids: prompts, (batch, time).
        max_new_tokens: at least 1.
        draft: `auto` tries the schedules of `family`, or else those that
            `iiet.draft_plan.cheaper_schedules` names, and keeps to the best; a method without
            corrections has none, and then decoding is plain.
        draft_tokens: how many tokens to draft at once; `auto`: as many as are expected to pay, and
            none where none do.
        family: schedules that the weights serve, for `draft="auto"`.
        costs: measured costs, of the draft or one for each schedule of `draft="auto"`, for
            `draft_tokens="auto"`; None: counted.
        record: gets what happened, while it happens.

    Raises:
        ValueError: a setting out of range, a draft that does not fit, or more tokens than the
            context holds; at the call, not at the first step.
    """
    if kv_strategy != "exact":
        raise ValueError(
            f"drafts need kv_strategy='exact', got {kv_strategy!r}: with one slot per layer, "
            "tokens that are read together see other keys than tokens read one by one, so the "
            "output would differ"
        )
    if draft_tokens != "auto" and (not isinstance(draft_tokens, int) or draft_tokens < 0):
        raise ValueError(f"draft_tokens must be 'auto' or at least 0, got {draft_tokens!r}")
    sampler = checked_sampler(
        decoder,
        input_ids,
        max_new_tokens=max_new_tokens,
        attention_mask=attention_mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    num_tokens = input_ids.size(1) + max_new_tokens
    drafts = _named_drafts(decoder, draft, family, num_tokens)
    plan = DraftPlan(
        _all_costs(decoder, list(drafts.values()), costs, len(input_ids), num_tokens),
        None if draft_tokens == "auto" else min(draft_tokens, max_new_tokens),
    )
    rows = Rows(
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        num_drafted=min(plan.max_tokens, max_new_tokens),
    )
    decoding = _Decoding(decoder, rows, drafts, plan, sampler, max_new_tokens, stop_tokens)
    return decoding.steps(DraftRecord() if record is None else record)


def _named_drafts(
    decoder: Decoder, draft: DraftChoice, family: Collection[IterationSchedule], num_tokens: int
) -> dict[str, Decoder | PromptLookup]:
    """Return the drafts to choose from by name; a ValueError says why one does not fit."""
    if isinstance(draft, PromptLookup):
        return {"prompt lookup": draft}
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
        found = cheaper_schedules(decoder.schedule, family)
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


def _all_costs(
    decoder: Decoder,
    drafts: Sequence[Decoder | PromptLookup],
    costs: DraftCosts | Sequence[DraftCosts] | None,
    batch_size: int,
    num_tokens: int,
) -> list[DraftCosts]:
    if costs is None:
        weight = decoder.embedding.weight
        return [
            counted_costs(
                decoder.config,
                draft.config if isinstance(draft, Decoder) else None,
                num_tokens=num_tokens,
                batch_size=batch_size,
                bytes_per_value=weight.element_size(),
                device=weight.device.type,
            )
            for draft in drafts
        ]
    given = [costs] if isinstance(costs, DraftCosts) else list(costs)
    if len(given) != len(drafts):
        raise ValueError(f"costs must be one for each of {len(drafts)} drafts, got {len(given)}")
    return given


class _Decoding:
    """The rounds of one generation."""

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        drafts: dict[str, Decoder | PromptLookup],
        plan: DraftPlan,
        sampler: Sampler,
        max_new_tokens: int,
        stop_tokens: Collection[int],
    ) -> None:
        self._rows = rows
        self._plan = plan
        self._sampler = sampler
        self._max_new_tokens = max_new_tokens
        self._stop_tokens = frozenset(stop_tokens)
        self._model = CachedModel(decoder, _new_cache(decoder, rows), rows)
        self._named = drafts
        self._opened: dict[str, Draft] = {}

    def steps(self, record: DraftRecord) -> Iterator[Tensor]:
        """Yield the next tokens, (batch,), until all rows have ended."""
        rows, tokens = self._rows, self._rows.tokens
        num_yielded = 0
        while rows.open:
            with torch.inference_mode():
                self._round(record) if num_yielded else self._prefill()
            ready = min(len(rows.generated[row]) for row in rows.open or range(len(tokens)))
            if not rows.open:
                ready = max(map(len, rows.generated))
            for time in range(num_yielded, ready):
                # A row that has ended repeats its stop token.
                step = [tokens[min(time, len(tokens) - 1)] for tokens in rows.generated]
                yield torch.tensor(step, dtype=tokens.dtype, device=tokens.device)
            num_yielded = ready

    def _prefill(self) -> None:
        first = self._sampler(self._model.prefill(), 0).unsqueeze(1)
        self._rows.write(self._rows.lengths, first)
        self._decide(first.tolist(), [0] * len(first))

    def _round(self, record: DraftRecord) -> None:
        """Draft, verify and decide; with no drafted token, this is a plain step."""
        rows = self._rows
        most = self._max_new_tokens - min(len(rows.generated[row]) for row in rows.open)
        number, num_wanted = self._plan.choose(most - 1)
        num_drafted, name = 0, ""
        if num_wanted:
            name = list(self._named)[number]
            num_drafted = self._draft(name).propose(rows, num_wanted, self._sampler)
        drafted = rows.read(rows.lengths, num_drafted).tolist()
        logits = self._model([length - 1 for length in rows.lengths], num_drafted + 1)
        positions = rows.positions(rows.lengths, num_drafted + 1)
        chosen = self._sampler(logits, positions)
        rows.write(rows.lengths, chosen)
        choices = chosen.tolist()  # Waits for a GPU.
        kept = list(map(_num_equal, drafted, choices))
        verified = list(rows.open)
        num_new = self._decide(choices, kept)
        if not num_drafted:
            record.plain_steps += len(verified)
            return
        self._plan.saw(number, num_drafted, [kept[row] for row in verified])
        record.verifications += len(verified)
        record.drafted += num_drafted * len(verified)
        record.accepted += sum(min(kept[row], num_new[row]) for row in verified)
        record.rounds_by_draft[name] = record.rounds_by_draft.get(name, 0) + 1

    def _decide(self, choices: Sequence[list[int]], kept: Sequence[int]) -> dict[int, int]:
        """Add the model's choices after kept tokens to the open rows; return how many."""
        num_new: dict[int, int] = {}
        for row in list(self._rows.open):
            room = self._max_new_tokens - len(self._rows.generated[row])
            new = choices[row][: min(kept[row] + 1, room)]
            stops = [time for time, token in enumerate(new) if token in self._stop_tokens]
            new = new[: stops[0] + 1] if stops else new
            self._rows.add(row, new, is_end=bool(stops) or len(new) == room)
            num_new[row] = len(new)
        self._rows.catch_up()
        return num_new

    def _draft(self, name: str) -> Draft:
        """Return a draft; views of the cache are made after the prompt's pass."""
        draft = self._opened.get(name)
        if draft is None:
            given = self._named[name]
            draft = given if isinstance(given, PromptLookup) else self._model_draft(given)
            self._opened[name] = draft
        return draft

    def _model_draft(self, decoder: Decoder) -> ModelDraft:
        own = self._model.decoder
        shares = decoder.embedding is own.embedding and decoder.schedule.is_within(own.schedule)
        if shares:
            cache = self._model.cache.view(decoder.config)
        else:
            cache = _new_cache(decoder, self._rows)
        return ModelDraft(CachedModel(decoder, cache, self._rows), is_view=shares)


def _new_cache(decoder: Decoder, rows: Rows) -> KeyValueCache:
    return KeyValueCache(
        decoder.config,
        batch_size=len(rows.tokens),
        max_tokens=rows.max_tokens,
        device=decoder.device,
        dtype=cache_dtype(decoder),
    )


def _num_equal(drafted: Sequence[int], choices: Sequence[int]) -> int:
    """Return how many tokens are equal up to the first that differs."""
    for number, token in enumerate(drafted):
        if token != choices[number]:
            return number
    return len(drafted)
