"""Text generation: prefill once, then one token per step through the cache.

Prompts of different lengths are padded on the left. A row that has ended repeats its last token;
generation ends when all rows have ended. The seed alone determines what is sampled
(`iiet.decoding.sampling`); with a seed for each row, a row's tokens do not depend on the other
rows. Where none is given, PyTorch's generator draws one.

On a GPU, steps have fixed shapes (`iiet.decoding.static_steps`), and no step waits for the device.
Whether all rows have ended, or logits are not finite, is read every `STOP_INTERVAL` steps, and what
was computed after the end is dropped, so the results are the same.

With a draft, the tokens are the same ones, from fewer passes (`iiet.decoding.speculative`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

import torch
from torch import Tensor

from iiet.decoding.request import GenerationOptions, GenerativeModel, Request
from iiet.decoding.sampling import LogitsNotFinite, not_finite
from iiet.decoding.speculative import DraftRecord, draft_models, drafted_steps
from iiet.decoding.static_steps import StaticSteps, keep_steps, kept_steps

__all__ = ["STOP_INTERVAL", "does_not_fit", "stream", "until_all_end"]

STOP_INTERVAL: Final = 8
"""Steps of a GPU between two looks at whether all rows have ended; a CPU looks at each."""


def stream(
    decoder: GenerativeModel,
    input_ids: Tensor,
    options: GenerationOptions,
    *,
    attention_mask: Tensor | None = None,
    record: DraftRecord | None = None,
    steps: StaticSteps | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, one step at a time: yield the next tokens, (batch,).

    `iiet.Decoder.stream` describes arguments and errors.
    """
    if problems := _problems(decoder, input_ids, options, attention_mask, steps):
        raise ValueError("; ".join(problems))
    record = DraftRecord() if record is None else record
    request = Request(input_ids, options, options.sampler(input_ids), attention_mask)
    if options.draft is not None:
        drafts = draft_models(
            decoder, options.draft, family=options.family, num_tokens=request.num_tokens
        )
        if drafts:
            return drafted_steps(decoder, drafts, request, record)
    keeps = steps is None and decoder.device.type == "cuda"
    if keeps:
        steps = kept_steps(decoder)
    plain = _plain_steps(decoder, request, steps, record)
    tokens = until_all_end(plain, STOP_INTERVAL if decoder.device.type == "cuda" else 1)
    return keep_steps(decoder, steps, tokens) if keeps and steps is not None else tokens


def _plain_steps(
    decoder: GenerativeModel, request: Request, steps: StaticSteps | None, record: DraftRecord
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens, (batch,), and whether all rows have ended and whether logits are not
    finite, (2,); wait for nothing."""
    options = request.options
    make_cache = decoder.new_cache if steps is None else steps.empty_cache
    cache = make_cache(
        batch_size=len(request.input_ids),
        max_tokens=request.num_tokens,
        strategy=options.kv_strategy,
    )
    end_tokens = request.end_tokens()
    with torch.inference_mode():
        prompt_logits = decoder(
            request.input_ids,
            cache=cache,
            attention_mask=request.attention_mask,
            last_only=True,
        )
        logits = prompt_logits[:, -1]
        if steps is not None:
            steps.begin(options.max_new_tokens - 1)
        tokens = request.sampler(logits, 0)
        has_ended, state = _state(tokens, logits, end_tokens)
    # A clone made outside of inference mode is an ordinary tensor.
    yield tokens.clone(), state
    for position in range(1, options.max_new_tokens):
        with torch.inference_mode():
            if steps is not None:
                logits = steps(tokens)
            else:  # The cache remembers the padding of the prompts.
                logits = decoder(tokens.unsqueeze(1), cache=cache, last_only=True)[:, -1]
            record.plain_steps += len(logits)
            tokens = torch.where(has_ended, tokens, request.sampler(logits, position))
            has_ended, state = _state(tokens, logits, end_tokens)
        yield tokens.clone(), state


def _state(tokens: Tensor, logits: Tensor, end_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows have ended, (batch,), and the state that `_plain_steps` yields, (2,)."""
    has_ended = (tokens.unsqueeze(1) == end_tokens).any(1)  # `isin` would wait for a GPU.
    return has_ended, torch.stack([has_ended.all(), not_finite(logits)])


def until_all_end(steps: Iterator[tuple[Tensor, Tensor]], interval: int) -> Iterator[Tensor]:
    """Yield tokens until all rows have ended.

    The first step is looked at alone, so that it is yielded at once, then `interval` steps
    together; of these, those after the end are dropped.

    Args:
        steps: The tokens of a step, (batch,), and whether all rows have ended and whether logits
            are not finite, (2,).
        interval: Steps between two looks at these facts.

    Raises:
        LogitsNotFinite: a step before the end has such logits.
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
    decoder: GenerativeModel,
    input_ids: Tensor,
    options: GenerationOptions,
    attention_mask: Tensor | None,
    steps: StaticSteps | None,
) -> list[str]:
    problems: list[str] = []
    if input_ids.dim() != 2 or not input_ids.numel():
        problems.append(
            f"input_ids must be (batch, time) and not empty, got {tuple(input_ids.shape)}"
        )
    elif input_ids.size(1) + options.max_new_tokens > decoder.config.context_length:
        problems.append(
            does_not_fit(input_ids.size(1), options.max_new_tokens, decoder.config.context_length)
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        problems.append(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    elif attention_mask is not None and not bool(attention_mask[:, -1].all()):
        problems.append(
            "prompts must be padded on the left, the mask's last column is not all true"
        )
    if steps is not None and steps.decoder is not decoder:
        problems.append("steps decode with another decoder")
    return problems
