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

Passes are not of fixed shapes, so a GPU runs them without the CUDA graphs of plain decoding, which
gain more there than drafts do: on a GPU, `auto` drafts nothing. Where nothing is drafted, decoding
is that of `iiet.generation`.

Source: Leviathan, Kalman, Matias 2023; drafting with the model's own weights as in LayerSkip
(Elhoushi et al. 2024); exact sampling as in Daliri, Musco, Suresh 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from iiet import generation
from iiet.cache import KeyValueCache, KvStrategy
from iiet.decoder import Decoder
from iiet.draft_choice import DraftChoice, costs_of, named_drafts
from iiet.draft_plan import DraftCosts, DraftPlan
from iiet.drafts import CachedModel, Draft, ModelDraft, PromptLookup, Rows
from iiet.generation import cache_dtype, checked_sampler
from iiet.sampling import LogitsNotFinite, Sampler, not_finite
from iiet.schedule import IterationSchedule

__all__ = ["DraftRecord", "Speculation", "generate", "stream"]


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
    """Passes without drafted tokens, after the prompt's. Where there is no draft at all, those of
    rows that have ended count, too."""
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
    seed: SupportsIndex | Sequence[SupportsIndex] | None = None,
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
            `iiet.draft_choice.cheaper_schedules` names, and keeps to the best; on a GPU, and for a
            method without corrections, there are none, and then decoding is plain.
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
    drafts = named_drafts(decoder, draft, family, num_tokens)
    record = DraftRecord() if record is None else record
    if not drafts:
        return _plain_steps(
            generation.stream(
                decoder,
                input_ids,
                max_new_tokens=max_new_tokens,
                attention_mask=attention_mask,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                stop_tokens=stop_tokens,
            ),
            record,
        )
    plan = DraftPlan(
        costs_of(
            list(drafts.values()), decoder, costs, batch_size=len(input_ids), num_tokens=num_tokens
        ),
        None if draft_tokens == "auto" else min(draft_tokens, max_new_tokens),
    )
    rows = Rows(
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        num_drafted=min(plan.max_tokens, max_new_tokens),
    )
    decoding = _Decoding(decoder, rows, sampler, plan, drafts)
    return decoding.steps(record)


def _plain_steps(steps: Iterator[Tensor], record: DraftRecord) -> Iterator[Tensor]:
    for number, tokens in enumerate(steps):
        record.plain_steps += len(tokens) if number else 0
        yield tokens


class _Decoding:
    """The rounds of one generation."""

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        sampler: Sampler,
        plan: DraftPlan,
        drafts: Mapping[str, Decoder | PromptLookup],
    ) -> None:
        self._rows = rows
        self._sampler = sampler
        self._plan = plan
        self._model = CachedModel(decoder, _new_cache(decoder, rows), rows)
        self._given = drafts
        self._drafts: dict[str, Draft] = {}

    def steps(self, record: DraftRecord) -> Iterator[Tensor]:
        """Yield the next tokens, (batch,), until all rows have ended."""
        rows = self._rows
        with torch.inference_mode():
            self._prefill()
        num_yielded = 0
        while True:
            lengths = [len(tokens) for tokens in rows.generated]
            ready = min(lengths[row] for row in rows.open) if rows.open else max(lengths)
            for time in range(num_yielded, ready):
                # A row that has ended repeats its last token.
                step = [tokens[min(time, len(tokens) - 1)] for tokens in rows.generated]
                yield rows.tokens.new_tensor(step)
            num_yielded = ready
            if not rows.open:
                return
            with torch.inference_mode():
                self._round(record)

    def _prefill(self) -> None:
        rows = self._rows
        first = self._chosen(self._model.prefill(), 0).unsqueeze(1)
        rows.write(rows.lengths, first)
        for row, tokens in enumerate(first.tolist()):
            rows.decide(row, tokens)
        rows.catch_up()

    def _round(self, record: DraftRecord) -> None:
        """Draft, verify and decide; with no drafted token, this is a plain step."""
        rows = self._rows
        number, num_wanted = self._plan.choose(rows.room - 1)
        name, num_drafted = list(self._given)[number] if num_wanted else "", 0
        if num_wanted:
            num_drafted = self._draft(name).propose(rows, num_wanted, self._sampler)
        drafted = rows.read(rows.lengths, num_drafted).tolist()
        logits = self._model([length - 1 for length in rows.lengths], num_drafted + 1)
        chosen = self._chosen(logits, rows.positions(rows.lengths, num_drafted + 1))
        rows.write(rows.lengths, chosen)
        choices = chosen.tolist()  # Waits for a GPU.
        # What each row keeps, and how much of it lies before the row's end.
        kept = {row: _num_equal(drafted[row], choices[row]) for row in rows.open}
        num_new = {row: rows.decide(row, choices[row][: num + 1]) for row, num in kept.items()}
        rows.catch_up()
        if not num_drafted:
            record.plain_steps += len(kept)
            return
        self._plan.saw(number, num_drafted, kept.values())
        record.verifications += len(kept)
        record.drafted += num_drafted * len(kept)
        record.accepted += sum(min(num, num_new[row]) for row, num in kept.items())
        record.rounds_by_draft[name] = record.rounds_by_draft.get(name, 0) + 1

    def _chosen(self, logits: Tensor, positions: Tensor | int) -> Tensor:
        if not_finite(logits):
            raise LogitsNotFinite
        return self._sampler(logits, positions)

    def _draft(self, name: str) -> Draft:
        """Return a draft; views of the cache are made after the prompt's pass."""
        if name not in self._drafts:
            given = self._given[name]
            draft = given if isinstance(given, PromptLookup) else self._model_draft(given)
            self._drafts[name] = draft
        return self._drafts[name]

    def _model_draft(self, decoder: Decoder) -> ModelDraft:
        own = self._model
        is_view = decoder.layers is own.decoder.layers
        is_view = is_view and decoder.schedule.is_within(own.decoder.schedule)
        cache = own.cache.view(decoder.config) if is_view else _new_cache(decoder, self._rows)
        return ModelDraft(CachedModel(decoder, cache, self._rows), is_view=is_view)


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
