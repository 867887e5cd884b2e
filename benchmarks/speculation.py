"""Self-speculative decoding against its rivals: a small vanilla draft, and plain steps.

Acceptance depends on what models have learned, so each is trained first, for a few minutes, on
Python's help topics. One set of weights learns its full schedule and none (r = 0); the rival
draft is a vanilla model of two layers and half the width, trained on the same tokens. All continue
the same held-out prompts by sampling.

Each rival drafts as many tokens as its acceptance and its counted costs suggest, or none. Then the
speed-up at a fixed number of drafted tokens is predicted from measured costs and acceptance, and
stands beside the measured one.
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
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns
from iiet import (
    Decoder,
    DraftRecord,
    IterationSchedule,
    KeyValueCache,
    generate,
    next_token_loss,
)
from iiet.speculative import MAX_DRAFT_TOKENS
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.settings import DataSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import open_workspace

_GOAL = {(256, 1): Goal("at least", 1.2), (512, 1): Goal("at least", 1.2)}
_FIXED = 4
"""Drafted tokens where prediction and measurement are compared."""


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


_FULL = _Size()
_QUICK = _Size(
    dims=(64,),
    num_layers=2,
    num_corrections=1,
    vocab_size=300,
    max_documents=30,
    training_steps=3,
    context_length=32,
    prompt_tokens=8,
    new_tokens=8,
    batch_sizes=(1, 2),
    repetitions=1,
)


@dataclass(frozen=True)
class _Models:
    full: Decoder
    cheap: Decoder
    """The same weights under r = 0."""
    small: Decoder


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure milliseconds per token with each draft and without.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    train, held_out = _read_text(size)
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
        f"IIET, r = {size.num_corrections}, {size.num_layers} layers, heads of 64, ffn 2.75 d, "
        f"vocabulary {size.vocab_size}, tied head, float32; {size.training_steps} training steps "
        f"of 8 x {size.context_length} tokens of Python's help topics; "
        f"draft r = 0; vanilla draft of 2 layers, half the width; prompt {size.prompt_tokens}, "
        f"{size.new_tokens} new tokens, temperature 1; {size.repetitions} repetitions in turns"
    )
    return Report(title="speculation", setting=setting, rows=tuple(rows), checks=tuple(checks))


def _read_text(size: _Size) -> tuple[Tensor, Tensor]:
    """Return Python's help topics as tokens: those for training, and the held-out ones."""
    data = DataSettings(vocab_size=size.vocab_size, max_documents=size.max_documents)
    with tempfile.TemporaryDirectory() as folder:
        store = open_tokens(prepare(data, open_workspace(Path(folder)), Progress()))
        train, held_out = (
            torch.from_numpy(part.astype("int64")) for part in (store.train, store.validation)
        )
    return train, held_out


def _windows(tokens: Tensor, count: int, num_tokens: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - num_tokens, (count,), generator=generator)
    return torch.stack([tokens[start : start + num_tokens] for start in starts.tolist()])


def _trained(size: _Size, dim: int, tokens: Tensor) -> _Models:
    shape: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        # Both ends of a step of fixed length fit.
        "context_length": size.prompt_tokens + size.new_tokens + MAX_DRAFT_TOKENS,
    }
    config = shaped_config(
        dim, num_layers=size.num_layers, num_corrections=size.num_corrections, **shape
    )
    full = fresh_decoder(config)
    none = IterationSchedule.none(size.num_layers)
    _train(full, [full.schedule, none], size, tokens)
    small = fresh_decoder(shaped_config(dim // 2, num_layers=2, method="vanilla", **shape))
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
    place = f"d {models.full.config.dim}, batch {len(prompt)}"
    drafts = {"r = 0": models.cheap.schedule, "vanilla draft": models.small}
    records = {name: DraftRecord() for name in [*drafts, "fixed"]}

    def with_draft(name: str, draft: Any, draft_tokens: Any) -> Callable[[], float]:
        return lambda: _seconds(
            models.full,
            prompt,
            size,
            draft=draft,
            draft_tokens=draft_tokens,
            record=records[name],
        )

    tasks = {"plain": lambda: _seconds(models.full, prompt, size)}
    tasks |= {name: with_draft(name, draft, "auto") for name, draft in drafts.items()}
    tasks["fixed"] = with_draft("fixed", models.cheap.schedule, _FIXED)
    seconds = take_turns(tasks, repetitions=size.repetitions)
    rows = [
        Row(
            what=f"plain / {name}, {place}",
            quantities=(
                Quantity.milliseconds("plain", seconds["plain"]),
                Quantity.milliseconds(name, seconds[name]),
                *_acceptance(records[name]),
            ),
            ratio=paired_ratio(seconds["plain"], seconds[name]),
            goal=_GOAL.get((models.full.config.dim, len(prompt))) if name == "r = 0" else None,
        )
        for name in drafts
    ]
    costs = _costs(models, prompt, size)
    return [*rows, _prediction_row(place, costs, records["fixed"], seconds)]


def _prediction_row(
    place: str, costs: tuple[float, float], record: DraftRecord, seconds: dict[str, list[float]]
) -> Row:
    """Predict the speed-up of a fixed number of drafted tokens from what each round kept."""
    tokens = record.tokens_per_verification or 1.0
    draft_cost, token_cost = costs
    predicted = tokens / (1.0 + _FIXED * (draft_cost + token_cost))
    measured = paired_ratio(seconds["plain"], seconds["fixed"])
    return Row(
        what=f"speed-up with {_FIXED} drafted tokens, predicted / measured, {place}",
        quantities=(
            Quantity.one("predicted", predicted, "times"),
            Quantity("measured", measured, "times"),
            Quantity.one("draft step", draft_cost, "plain steps"),
            Quantity.one("further verified token", token_cost, "plain steps"),
            *_acceptance(record),
        ),
        ratio=Spread(
            predicted / measured.median, predicted / measured.high, predicted / measured.low
        ),
    )


def _acceptance(record: DraftRecord) -> tuple[Quantity, ...]:
    acceptance, tokens = record.acceptance or 0.0, record.tokens_per_verification or 1.0
    return (
        Quantity.one("accepted", 100 * acceptance, "%"),
        Quantity.one("per verification", tokens, "tokens"),
        Quantity.one("plain steps", record.plain_steps, "in all"),
    )


def _seconds(decoder: Decoder, prompt: Tensor, size: _Size, **drafting: Any) -> float:
    """Return the seconds per step of a generation, prefill included."""
    options: dict[str, Any] = {
        "max_new_tokens": size.new_tokens,
        "temperature": 1.0,
        "seed": list(range(len(prompt))),
    }
    started = time.perf_counter()
    generate(decoder, prompt, **options, **drafting)
    return (time.perf_counter() - started) / size.new_tokens


def _costs(models: _Models, prompt: Tensor, size: _Size) -> tuple[float, float]:
    """Measure a step under r = 0 and a further verified token, in plain steps."""
    tasks = {
        "step": _pass(models.full, prompt, 1),
        "verify": _pass(models.full, prompt, 1 + _FIXED),
        "draft": _pass(models.cheap, prompt, 1),
    }
    seconds = take_turns(tasks, repetitions=10 * size.repetitions)
    further = paired_ratio(seconds["verify"], seconds["step"]).median - 1.0
    return paired_ratio(seconds["draft"], seconds["step"]).median, max(0.0, further) / _FIXED


def _pass(decoder: Decoder, prompt: Tensor, num_tokens: int) -> Callable[[], float]:
    """Return a task that reads some tokens after a prompt and returns the seconds."""
    cache = KeyValueCache(
        decoder.config, batch_size=len(prompt), max_tokens=prompt.size(1) + num_tokens
    )
    tokens = prompt[:, :1].expand(-1, num_tokens)
    with torch.inference_mode():
        decoder(prompt, cache=cache, last_only=True)

    @torch.inference_mode()
    def read() -> None:
        cache.set_length(prompt.size(1))
        decoder(tokens, cache=cache)

    return stopwatch(read)
