"""Self-speculative decoding against its rivals: a small vanilla draft, and plain steps.

Acceptance depends on what models have learned, so each is trained first, for a few minutes, on
Python's help topics. One set of weights learns its full schedule and none (r = 0); the rival
draft is a vanilla model of two layers and half the width, trained on the same tokens. All continue
the same held-out prompts by sampling.

Each rival drafts as many tokens as its acceptance and its counted costs suggest, or none.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import SHAPE, fresh_decoder, shaped_config
from benchmarks.timing import paired_ratio, take_turns
from iiet import Decoder, DraftRecord, IterationSchedule, generate, next_token_loss
from iiet.speculative import MAX_DRAFT_TOKENS
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import open_workspace

_GOAL = {(256, 1): Goal("at least", 1.2), (512, 1): Goal("at least", 1.2)}


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 6
    num_corrections: int = 2
    vocab_size: int = 2048
    max_documents: int | None = None
    training_steps: int = 150
    context_length: int = 128
    prompt_tokens: int = 32
    new_tokens: int = 96
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5


_QUICK = _Size(
    dims=(64,), num_layers=2, num_corrections=1, vocab_size=300, max_documents=30,
    training_steps=3, context_length=32, prompt_tokens=8, new_tokens=8, batch_sizes=(1, 2),
    repetitions=1,
)  # fmt: skip


@dataclass(frozen=True)
class _Models:
    full: Decoder
    cheap: Decoder
    """The same weights under r = 0."""
    small: Decoder


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure milliseconds per token with each draft and without."""
    size = _QUICK if quick else _Size()
    data = DataSettings(vocab_size=size.vocab_size, max_documents=size.max_documents)
    with tempfile.TemporaryDirectory() as folder:
        store = open_tokens(prepare(data, open_workspace(Path(folder)), Progress()))
        train, held_out = (
            torch.from_numpy(part.astype("int64")) for part in (store.train, store.validation)
        )
    rows: list[Row] = []
    checks: list[str] = []
    for dim in size.dims:
        say(f"speculation: training d {dim}")
        models = _trained(size, dim, train)
        for batch_size in size.batch_sizes:
            say(f"speculation: d {dim}, batch {batch_size}")
            prompt = _windows(held_out, batch_size, size.prompt_tokens, seed=0)
            checks.append(_check(models, prompt))
            rows += _rows(models, prompt, size)
    setting = (
        f"IIET, r = {size.num_corrections}, {size.num_layers} layers, {SHAPE}, vocabulary "
        f"{size.vocab_size}, tied head; {size.training_steps} training steps of 8 x "
        f"{size.context_length} tokens of Python's help topics; draft r = 0; vanilla draft of 2 "
        f"layers, half the width; prompt {size.prompt_tokens}, {size.new_tokens} new tokens, "
        f"temperature 1; {size.repetitions} repetitions in turns"
    )
    return Report(title="speculation", setting=setting, rows=rows, checks=checks)


def _windows(tokens: Tensor, count: int, num_tokens: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - num_tokens, (count,), generator=generator)
    return torch.stack([tokens[start : start + num_tokens] for start in starts.tolist()])


def _trained(size: _Size, dim: int, tokens: Tensor) -> _Models:
    # Both ends of a step of fixed length fit.
    shape = size.vocab_size, size.prompt_tokens + size.new_tokens + MAX_DRAFT_TOKENS
    config = shaped_config(dim, size.num_layers, *shape, schedule=size.num_corrections)
    full = fresh_decoder(config)
    none = IterationSchedule.none(size.num_layers)
    _train(full, [full.schedule, none], size, tokens)
    small = fresh_decoder(shaped_config(dim // 2, 2, *shape, method="vanilla"))
    _train(small, [None], size, tokens)
    return _Models(full.eval(), full.eval().with_schedule(none), small.eval())


def _train(
    decoder: Decoder, schedules: list[IterationSchedule | None], size: _Size, tokens: Tensor
) -> None:
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


def _check(models: _Models, prompt: Tensor) -> str:
    """Compare the tokens with those of plain decoding, in float64."""
    exact = copy.deepcopy(models.full).double()
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    expected, differing = generate(exact, prompt, **options), 0
    for draft in ("auto", copy.deepcopy(models.small).double()):
        found = generate(exact, prompt, draft=draft, draft_tokens=3, **options)
        differing += int((found != expected).sum())
    width = models.full.config.dim
    return checked(f"tokens with and without drafts, d {width}, batch {len(prompt)},", differing, 0)


def _rows(models: _Models, prompt: Tensor, size: _Size) -> list[Row]:
    drafts: dict[str, Any] = {"r = 0": models.cheap.schedule, "vanilla draft": models.small}
    records = {name: DraftRecord() for name in drafts}

    def task(**drafting: Any) -> Callable[[], float]:
        """Return a task that generates, and returns the seconds per step with the prefill."""
        options: dict[str, Any] = {"temperature": 1.0, "seed": list(range(len(prompt)))}

        def run() -> float:
            started = time.perf_counter()
            generate(models.full, prompt, max_new_tokens=size.new_tokens, **options, **drafting)
            return (time.perf_counter() - started) / size.new_tokens

        return run

    tasks = {"plain": task()} | {
        name: task(draft=draft, record=records[name]) for name, draft in drafts.items()
    }
    seconds = take_turns(tasks, repetitions=size.repetitions)
    width = models.full.config.dim
    place, goal = f"d {width}, batch {len(prompt)}", _GOAL.get((width, len(prompt)))
    return [
        Row(
            what=f"plain / {name}, {place}",
            quantities=(
                *(Quantity.milliseconds(n, seconds[n]) for n in ("plain", name)),
                *_acceptance(records[name]),
            ),
            ratio=paired_ratio(seconds["plain"], seconds[name]),
            goal=goal if name == "r = 0" else None,
        )
        for name in drafts
    ]


def _acceptance(record: DraftRecord) -> tuple[Quantity, ...]:
    acceptance, tokens = record.acceptance or 0.0, record.tokens_per_verification or 1.0
    return (
        Quantity.one("accepted", 100 * acceptance, "%"),
        Quantity.one("per verification", tokens, "tokens"),
        Quantity.one("plain steps", record.plain_steps, "in all"),
    )
