"""Text generation: prefill once, then one token per step through the cache.

Prompts of different lengths are padded on the left. A row that has ended repeats its stop token;
generation ends when all rows have ended. The seed alone determines what is sampled
(`iiet.sampling`); with a seed for each row, a row's tokens do not depend on the other rows. Where
none is given, PyTorch's generator draws one.

On a GPU, steps have fixed shapes (`iiet.static_steps`), and no step waits for the device. Whether
all rows have ended, or logits are not finite, is read every `STOP_INTERVAL` steps, and what was
computed after the end is dropped, so the results are the same.

With a draft, the tokens are the same ones, from fewer passes (`iiet.speculative`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Literal

import torch
from torch import Tensor

from iiet.cache import KvStrategy
from iiet.decoder import Decoder
from iiet.sampling import LogitsNotFinite, Request, Sampler, Seed, not_finite, row_keys
from iiet.schedule import IterationSchedule
from iiet.speculative import DraftRecord, draft_models, drafted_steps
from iiet.static_steps import StaticSteps, keep_steps, kept_steps

__all__ = ["STOP_INTERVAL", "does_not_fit", "generate", "stream"]

STOP_INTERVAL: Final = 8
"""Steps of a GPU between two looks at whether all rows have ended; a CPU looks at each."""


def generate(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    return_record: bool = False,
    **options: Any,
) -> Any:
    """Continue prompts; all other arguments are those of `stream`.

    Args:
        decoder: the model, under its own schedule.
        input_ids: prompts, (batch, time).
        max_new_tokens: at least 1.
        return_record: also return what drafts did.

    Returns:
        Prompts and continuations, (batch, time + new), new at most `max_new_tokens`; with
        `return_record` these and a `DraftRecord`.
    """
    record = options.pop("record", None) or DraftRecord()
    steps = stream(decoder, input_ids, max_new_tokens=max_new_tokens, record=record, **options)
    tokens = torch.cat([input_ids, *(step.unsqueeze(1) for step in steps)], dim=1)
    return (tokens, record) if return_record else tokens


def stream(
    decoder: Decoder,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    attention_mask: Tensor | None = None,
    kv_strategy: KvStrategy = "exact",
    draft: IterationSchedule | Decoder | str | None = None,
    draft_tokens: int | Literal["auto"] = "auto",
    family: Collection[IterationSchedule] = (),
    record: DraftRecord | None = None,
    steps: StaticSteps | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Seed = None,
) -> Iterator[Tensor]:
    """Continue prompts, one step at a time: yield the next tokens, (batch,).

    Args:
        decoder: the model, under its own schedule.
        input_ids: prompts, (batch, time).
        max_new_tokens: at least 1.
        stop_tokens: tokens that end a row; they are part of the result.
        attention_mask: (batch, time), false for padding.
        kv_strategy: `exact`, or `last` for one cache slot per layer.
        draft: proposes tokens, which changes none: a cheaper schedule, as value or text; another
            decoder of the same vocabulary; or `auto`, which tries the schedules of `family`, or
            else the model's own with fewer corrections, and keeps the best. On a GPU, and for a
            method without corrections, `auto` finds none, and decoding is plain.
        draft_tokens: how many tokens to draft at once; `auto`: as many as are expected to pay, and
            none where none do.
        family: schedules that the weights serve, for `draft="auto"`.
        record: gets what drafts did, while it happens.
        steps: decodes in steps of fixed shapes, and lets several generations, one after the other,
            share a cache and graphs. None: on a GPU those that the decoder keeps, and steps that
            follow the number of tokens elsewhere.
        temperature: 0 takes the likeliest token; above, sample from `softmax(logits / T)`.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together hold this probability, in (0, 1].
        seed: one, or one for each row; None: one that PyTorch's generator draws, so that
            `torch.manual_seed` controls what is sampled.

    Raises:
        ValueError: a setting out of range, or more tokens than the context holds; at the call, not
        at the first step. At a step: its logits are not finite.
    """
    problems = _problems(decoder, input_ids, max_new_tokens, attention_mask)
    try:
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        if temperature > 0:
            keys = row_keys(seed, len(input_ids), input_ids.device)
            sampler = replace(sampler, row_keys=keys)
    except ValueError as error:
        problems.append(str(error))
    if draft is not None and kv_strategy != "exact":
        problems.append(
            f"drafts need the cache 'exact', got {kv_strategy!r}: with one slot per layer, tokens "
            "that are read together see other keys than tokens read one by one, so the output "
            "would differ"
        )
    if draft_tokens != "auto" and (not isinstance(draft_tokens, int) or draft_tokens < 0):
        problems.append(f"draft_tokens must be 'auto' or at least 0, got {draft_tokens!r}")
    if steps is not None and steps.decoder is not decoder:
        problems.append("steps decode with another decoder")
    if problems:
        raise ValueError("; ".join(problems))
    record = DraftRecord() if record is None else record
    request = Request(input_ids, max_new_tokens, sampler, stop_tokens, attention_mask)
    if draft is not None:
        drafts = draft_models(decoder, draft, family=family, num_tokens=request.num_tokens)
        if drafts:
            return drafted_steps(decoder, drafts, request, draft_tokens=draft_tokens, record=record)
    keeps = steps is None and decoder.device.type == "cuda"
    if keeps:
        steps = kept_steps(decoder)
    plain = _plain_steps(decoder, request, kv_strategy, steps, record)
    found = _until_all_end(plain, STOP_INTERVAL if decoder.device.type == "cuda" else 1)
    return keep_steps(decoder, steps, found) if keeps and steps is not None else found


def _plain_steps(
    decoder: Decoder,
    request: Request,
    strategy: KvStrategy,
    steps: StaticSteps | None,
    record: DraftRecord,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens, (batch,), and whether all rows have ended and whether logits are not
    finite, (2,); wait for nothing."""
    cache = (decoder.new_cache if steps is None else steps.empty_cache)(
        batch_size=len(request.input_ids), max_tokens=request.num_tokens, strategy=strategy
    )
    stops = request.stops()
    following = ended = None
    for position in range(request.max_new_tokens):
        with torch.inference_mode():
            if following is None or ended is None:
                given, mask = request.input_ids, request.attention_mask
                logits = decoder(given, cache=cache, attention_mask=mask, last_only=True)[:, -1]
                if steps is not None:
                    steps.begin(request.max_new_tokens - 1)
                latest = request.sampler(logits, position)
            else:
                if steps is not None:
                    logits = steps(following)
                else:  # The cache remembers the padding of the prompts.
                    logits = decoder(following.unsqueeze(1), cache=cache, last_only=True)[:, -1]
                record.plain_steps += len(logits)
                latest = torch.where(ended, following, request.sampler(logits, position))
            following = latest
            # `isin` would wait for a GPU.
            ended = (following.unsqueeze(1) == stops).any(1)
            state = torch.stack([ended.all(), not_finite(logits)])
        # A clone made outside of inference mode is an ordinary tensor.
        yield following.clone(), state


def _until_all_end(steps: Iterator[tuple[Tensor, Tensor]], interval: int) -> Iterator[Tensor]:
    """Yield tokens until all rows have ended.

    The first step is looked at alone, so that it is yielded at once, then `interval` steps
    together; of these, those after the end are dropped.
    """
    num_steps = 1
    while waiting := list(islice(steps, num_steps)):
        states = torch.stack([state for _, state in waiting]).tolist()  # Waits for a GPU.
        for (tokens, _), (ends, is_broken) in zip(waiting, states, strict=True):
            if is_broken:
                raise LogitsNotFinite
            yield tokens
            if ends:
                return
        num_steps = interval


def does_not_fit(num_read: int, num_new: int, context_length: int) -> str:
    """Return a sentence that says how many new tokens fit the context after a prompt."""
    return (
        f"a prompt of {num_read} tokens and {num_new} new ones do not fit the context_length of "
        f"{context_length}; at most {max(0, context_length - num_read)} new ones do"
    )


def _problems(
    decoder: Decoder, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None
) -> list[str]:
    problems: list[str] = []
    if input_ids.dim() != 2 or not input_ids.numel():
        problems.append(
            f"input_ids must be (batch, time) and not empty, got {tuple(input_ids.shape)}"
        )
    elif input_ids.size(1) + max_new_tokens > decoder.config.context_length:
        problems.append(
            does_not_fit(input_ids.size(1), max_new_tokens, decoder.config.context_length)
        )
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        problems.append(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    elif attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append(
            "prompts must be padded on the left, the mask's last column is not all true"
        )
    return problems
