"""Self-speculative decoding against its rivals: a small vanilla draft, and plain steps.

Acceptance depends on what models have learned, so they are trained first, for a minute, on Python's
help topics, and are as small as such a gain can be seen at. One set of weights learns its full
schedule and none (r = 0); the rival draft is a vanilla model of two layers and half the width,
trained on the same tokens. All continue the same held-out prompts by sampling.

Each rival drafts as many tokens as its acceptance and its counted costs suggest, or none.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.report import RATIO, Goal, Row, checked, milliseconds
from benchmarks.runner import Setup
from benchmarks.shape import SHAPE, fresh_decoder, shaped_config
from benchmarks.timing import paired_ratio, take_turns
from iiet import Decoder, IterationSchedule, next_token_loss
from iiet.decoding.speculative import MAX_DRAFT_TOKENS, DraftRecord
from orchestrator.data.store import open_tokens
from orchestrator.settings import DataSettings

_GOAL = Goal("at least", 1.2)
"""For one row."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    dim: int = 256
    num_layers: int = 6
    num_corrections: int = 2
    vocab_size: int = 2048
    max_documents: int | None = None
    training_steps: int = 60
    context_length: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 96
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5


_QUICK = _Size(
    dim=64, num_layers=2, num_corrections=1, vocab_size=300, max_documents=30,
    training_steps=3, context_length=32, prompt_tokens=8, new_tokens=8, batch_sizes=(1, 2),
    repetitions=1,
)  # fmt: skip


def speculation(setup: Setup) -> Iterator[Row]:
    """Measure milliseconds per token with each draft and without."""
    size = _QUICK if setup.is_toy else _Size()
    yield Row(
        what=f"IIET, r = {size.num_corrections}, d {size.dim}, {size.num_layers} layers, {SHAPE}, "
        f"vocabulary {size.vocab_size}, tied head; {size.training_steps} training steps of 8 x "
        f"{size.context_length} tokens of Python's help topics; draft r = 0; vanilla draft of 2 "
        f"layers, half the width; prompt {size.prompt_tokens}, {size.new_tokens} new tokens, "
        f"temperature 1; {size.repetitions} repetitions in turns"
    )
    data = DataSettings(vocab_size=size.vocab_size, max_documents=size.max_documents)
    store = open_tokens(setup.tokens(data))
    train, held_out = (
        torch.from_numpy(part[:].astype("int64")) for part in (store.train, store.validation)
    )
    # Both ends of a step of fixed length fit.
    shape = size.vocab_size, size.prompt_tokens + size.new_tokens + MAX_DRAFT_TOKENS
    none = IterationSchedule.none(size.num_layers)
    config = shaped_config(size.dim, size.num_layers, *shape, schedule=size.num_corrections)
    full = _trained(fresh_decoder(config), [None, none], size, train)
    vanilla = shaped_config(size.dim // 2, 2, *shape, method="vanilla")
    small = _trained(fresh_decoder(vanilla), [None], size, train)
    drafts: dict[str, Any] = {"r = 0": none, "vanilla draft": small}
    for batch_size in size.batch_sizes:
        prompt = _windows(held_out, batch_size, size.prompt_tokens, seed=0)
        yield _check(full, small, prompt)
        yield from _rows(full, drafts, prompt, size, has_goals=not setup.is_toy)


def _windows(tokens: Tensor, count: int, num_tokens: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - num_tokens, (count,), generator=generator)
    return torch.stack([tokens[start : start + num_tokens] for start in starts.tolist()])


def _trained(
    decoder: Decoder, schedules: list[IterationSchedule | None], size: _Size, tokens: Tensor
) -> Decoder:
    optimizer = torch.optim.AdamW(decoder.parameters())
    rate = OneCycleLR(optimizer, max_lr=2e-3, total_steps=size.training_steps)
    for step in range(size.training_steps):
        ids = _windows(tokens, 8, size.context_length, seed=step)
        for schedule in schedules:
            torch.autograd.backward(next_token_loss(decoder(ids, schedule=schedule), ids))
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return decoder.eval()


def _check(full: Decoder, small: Decoder, prompt: Tensor) -> Row:
    """Compare the tokens with those of plain decoding, in float64."""
    exact = copy.deepcopy(full).double()
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    expected = exact.generate(prompt, **options)
    differing = 0
    for draft in ("auto", copy.deepcopy(small).double()):
        found = exact.generate(prompt, draft=draft, draft_tokens=3, **options)
        differing += int((found != expected).sum())
    return checked(f"tokens with and without drafts, batch {len(prompt)},", differing, 0)


def _rows(
    full: Decoder, drafts: dict[str, Any], prompt: Tensor, size: _Size, *, has_goals: bool
) -> Iterator[Row]:
    records = {name: DraftRecord() for name in drafts}

    def task(**drafting: Any) -> Callable[[], float]:
        """Return a task that generates, and returns the seconds per token with the prefill."""
        options: dict[str, Any] = {"temperature": 1.0, "seed": list(range(len(prompt)))}

        def run() -> float:
            started = time.process_time()
            full.generate(prompt, max_new_tokens=size.new_tokens, **options, **drafting)
            return (time.process_time() - started) / size.new_tokens

        return run

    tasks = {"plain": task()} | {
        name: task(draft=draft, record=records[name]) for name, draft in drafts.items()
    }
    seconds = take_turns(tasks, repetitions=size.repetitions)
    for name, record in records.items():
        yield Row(
            what=f"plain / {name}, batch {len(prompt)}",
            figures={
                "plain (ms)": milliseconds(seconds["plain"]),
                "drafted (ms)": milliseconds(seconds[name]),
                "accepted (%)": 100 * (record.acceptance or 0.0),
                "tokens per verification": record.tokens_per_verification or 1.0,
                "plain steps": record.plain_steps,
                RATIO: paired_ratio(seconds["plain"], seconds[name]),
            },
            goal=_GOAL if has_goals and name == "r = 0" and len(prompt) == 1 else None,
        )
