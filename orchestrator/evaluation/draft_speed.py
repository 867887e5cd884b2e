"""How well a cheaper model drafts for a full one: acceptance, and time per token of exact output.

The draft is a cheaper schedule of the same weights, or another model of the same vocabulary. Both
numbers come from real greedy generations that continue held-out text, so a draft is judged on the
full model's own continuations, not on given text. Acceptance is measured with one drafted token
at a time: the share of drafted tokens that the full model chooses, too. Times are those of one row
with `draft_tokens="auto"`, after the first token. Plain decoding and decoding with the draft take
turns, so a slow phase of the machine affects both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from iiet.decoder import Decoder
from iiet.generation import generate, stream
from iiet.schedule import IterationSchedule
from orchestrator.evaluation.decode_timing import sweep_prompt_length, threads, time_stream

NUM_TIMED = 6
"""Texts that are also continued one by one, with the clock; acceptance takes all."""


@dataclass(frozen=True, kw_only=True)
class DraftSpeed:
    """What a draft is worth."""

    acceptance: float
    """Share of drafted tokens that the full model keeps."""
    ms_per_token: float
    """Median time of a token of exact output, with the draft."""
    speed_up: float
    """Median ratio of plain decoding's time to that with the draft, prompt by prompt."""


@torch.inference_mode()
def measure_draft(
    full: Decoder,
    draft: Decoder | IterationSchedule,
    texts: Tensor,
) -> DraftSpeed:
    """Measure a draft of a model.

    Args:
        full: The model whose output counts, under its own schedule, in evaluation mode.
        draft: A cheaper schedule of it, or another decoder of the same vocabulary.
        texts: (texts, time), held out; the beginnings are continued to the same length.
    """
    prompts = texts[:, : sweep_prompt_length(full.config.context_length)].to(full.device)
    new_tokens = texts.size(1) - prompts.size(1)
    _, record = generate(
        full, prompts, max_new_tokens=new_tokens, draft=draft, draft_tokens=1, return_record=True
    )
    with_draft: list[float] = []
    plain: list[float] = []
    drafting: Callable[..., Iterator[Tensor]] = partial(stream, draft=draft)
    ways = [(with_draft, drafting), (plain, stream)]
    # One row is too little work for several threads: they would wait for each other.
    with threads(1):
        for number, prompt in enumerate(torch.split(prompts[:NUM_TIMED], 1)):
            # Each prompt begins with the other way.
            for times, start in ways[:: -1 if number % 2 else 1]:
                steps = partial(start, full, prompt, max_new_tokens=new_tokens)
                times.append(time_stream(steps, new_tokens, full.device)[1])
    ratios = [without / drafted for without, drafted in zip(plain, with_draft, strict=True)]
    return DraftSpeed(
        acceptance=record.acceptance or 0.0,
        ms_per_token=statistics.median(with_draft),
        speed_up=statistics.median(ratios),
    )
