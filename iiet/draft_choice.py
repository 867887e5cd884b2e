"""Which drafts a model can choose from, and what they cost: counted, not timed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.draft_plan import DraftCosts
from iiet.drafts import PromptLookup
from iiet.schedule import IterationSchedule

__all__ = ["DraftChoice", "cheaper_schedules", "costs_of", "counted_costs", "named_drafts"]

DraftChoice = IterationSchedule | Decoder | PromptLookup | str
"""A schedule, as value or text; a decoder of the same vocabulary; prompt lookup; or `auto`."""

_FLOPS_PER_BYTE: Final = {"cpu": 2.0, "cuda": 100.0}
"""FLOPs that take as long as reading a byte of weights. On a CPU, one core verified a further token
of one row for 16 to 26 % of a step; a GPU computes far faster than it reads."""


def named_drafts(
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
        # A GPU decodes one token at a time with graphs, which drafts do not have.
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


def counted_costs(
    config: ModelConfig,
    draft: ModelConfig | None,
    *,
    num_tokens: int,
    batch_size: int = 1,
    bytes_per_value: int = 4,
    device: str = "cpu",
) -> DraftCosts:
    """Count the costs of a draft model, or (None) of one that costs nothing.

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
    return DraftCosts(0.0 if draft is None else counted(draft)[0] / step, token / step)


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


def costs_of(
    drafts: Sequence[Decoder | PromptLookup],
    decoder: Decoder,
    costs: DraftCosts | Sequence[DraftCosts] | None,
    *,
    batch_size: int,
    num_tokens: int,
) -> list[DraftCosts]:
    """Return the given costs of drafts, or counted ones.

    Args:
        drafts: the drafts to choose from.
        decoder: the model, under its schedule.
        costs: of the one draft, or of each; None: counted.
        batch_size: rows of a step.
        num_tokens: tokens that a step sees.

    Raises:
        ValueError: another number of costs.
    """
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
