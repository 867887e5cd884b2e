"""Self-speculative decoding against its rivals: prompt lookup, a small vanilla draft, plain steps.

Acceptance depends on what models have learned, so each is trained first, for a few minutes, on
text of a Markov chain: the next symbol depends on the last two. One set of weights learns its full
schedule and none (r = 0); the rival draft is a vanilla model of two layers and half the width. All
continue the same prompts by sampling, which gives prompt lookup no loops to copy.

Each rival drafts as many tokens as its acceptance and its measured costs suggest, or none. Then
costs and acceptance are put into the formula of `iiet.draft_plan`: the prediction stands beside
the measured speed-up at a fixed number of drafted tokens, and a table shows what the same costs
would give at other acceptances.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Spread, paired_ratio, stopwatch, take_turns
from iiet import (
    Decoder,
    DraftCosts,
    IterationSchedule,
    KeyValueCache,
    PromptLookup,
    generate,
    next_token_loss,
    speculative,
)
from iiet.draft_plan import MAX_DRAFT_TOKENS, expected_gain
from iiet.speculative import DraftRecord

__all__ = ["measure"]

_GOAL = {(256, 1): Goal("at least", 1.2), (512, 1): Goal("at least", 1.2)}
_ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)
_FIXED = 4
"""Drafted tokens where prediction and measurement are compared."""


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 6
    num_corrections: int = 2
    vocab_size: int = 8192
    num_symbols: int = 64
    training_steps: int = 200
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_sizes: tuple[int, ...] = (1, 8)
    repetitions: int = 5


_FULL = _Size()
_QUICK = _Size(
    dims=(64,),
    num_layers=2,
    num_corrections=1,
    vocab_size=128,
    num_symbols=8,
    training_steps=3,
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
    chain = _Chain(size)
    rows: list[Row] = []
    checks: list[str] = []
    for dim in size.dims:
        say(f"speculation: training d {dim}")
        models = _trained(size, dim, chain)
        for batch_size in size.batch_sizes:
            say(f"speculation: d {dim}, batch {batch_size}")
            prompt = chain.text(batch_size, size.prompt_tokens, seed=1)
            checks.append(_check(models, prompt))
            rows += _rows(models, prompt, size)
    setting = (
        f"IIET, r = {size.num_corrections}, {size.num_layers} layers, heads of 64, ffn 2.75 d, "
        f"vocabulary {size.vocab_size}, tied head, float32, {size.training_steps} training steps; "
        f"draft r = 0; vanilla draft of 2 layers, half the width; prompt {size.prompt_tokens}, "
        f"{size.new_tokens} new tokens, temperature 1; {size.repetitions} repetitions in turns"
    )
    return Report(title="speculation", setting=setting, rows=tuple(rows), checks=tuple(checks))


class _Chain:
    """Text in which the last two symbols decide how likely the next one is."""

    def __init__(self, size: _Size) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (size.num_symbols, size.num_symbols, size.num_symbols)
        self._chances = (3.0 * torch.randn(shape, generator=generator)).softmax(-1)

    def text(self, batch_size: int, num_tokens: int, *, seed: int) -> Tensor:
        """Draw sequences, (batch, tokens)."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(len(self._chances), (batch_size, num_tokens), generator=generator)
        for time_ in range(2, num_tokens):
            chances = self._chances[tokens[:, time_ - 2], tokens[:, time_ - 1]]
            tokens[:, time_] = torch.multinomial(chances, 1, generator=generator)[:, 0]
        return tokens


def _trained(size: _Size, dim: int, chain: _Chain) -> _Models:
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
    _train(full, [full.schedule, none], size, chain)
    small = fresh_decoder(shaped_config(dim // 2, num_layers=2, method="vanilla", **shape))
    _train(small, [None], size, chain)
    return _Models(full.eval(), full.eval().with_schedule(none), small.eval())


def _train(
    decoder: Decoder, schedules: list[IterationSchedule | None], size: _Size, chain: _Chain
) -> None:
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for step in range(size.training_steps):
        ids = chain.text(8, size.prompt_tokens, seed=100 + step)
        for schedule in schedules:
            torch.autograd.backward(next_token_loss(decoder(ids, schedule=schedule), ids))
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _check(models: _Models, prompt: Tensor) -> str:
    """Compare the tokens with those of plain decoding, in float64."""
    exact = copy.deepcopy(models.full).double()
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    expected, differing = generate(exact, prompt, **options), 0
    for draft in ("auto", PromptLookup(), copy.deepcopy(models.small).double()):
        found, _ = speculative.generate(exact, prompt, draft=draft, draft_tokens=3, **options)
        differing += int((found != expected).sum())
    width = models.full.config.dim
    return checked(f"tokens with and without drafts, d {width}, batch {len(prompt)},", differing, 0)


def _rows(models: _Models, prompt: Tensor, size: _Size) -> list[Row]:
    place = f"d {models.full.config.dim}, batch {len(prompt)}"
    costs = {
        "r = 0": _costs(models.full, models.cheap, prompt, size),
        "prompt lookup": _costs(models.full, None, prompt, size),
        "vanilla draft": _costs(models.full, models.small, prompt, size),
    }
    drafts = {
        "r = 0": models.cheap.schedule,
        "prompt lookup": PromptLookup(),
        "vanilla draft": models.small,
    }
    records = {name: DraftRecord() for name in [*drafts, "fixed"]}

    def with_draft(name: str, draft: Any, draft_tokens: Any) -> Callable[[], float]:
        return lambda: _seconds(
            models.full,
            prompt,
            size,
            draft=draft,
            draft_tokens=draft_tokens,
            costs=costs.get(name),
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
                _milliseconds("plain", seconds["plain"]),
                _milliseconds(name, seconds[name]),
                *_acceptance(records[name]),
            ),
            ratio=paired_ratio(seconds["plain"], seconds[name]),
            goal=_GOAL.get((models.full.config.dim, len(prompt))) if name == "r = 0" else None,
        )
        for name in drafts
    ]
    rows.append(_prediction_row(place, costs["r = 0"], records["fixed"], seconds))
    return rows + [_table_row(place, acceptance, costs["r = 0"]) for acceptance in _ACCEPTANCES]


def _prediction_row(
    place: str, costs: DraftCosts, record: DraftRecord, seconds: dict[str, list[float]]
) -> Row:
    """Predict the speed-up of a fixed number of drafted tokens from what each round kept."""
    tokens = record.tokens_per_verification or 1.0
    predicted = tokens / (_FIXED * costs.draft + costs.verification(_FIXED))
    measured = paired_ratio(seconds["plain"], seconds["fixed"])
    return Row(
        what=f"speed-up with {_FIXED} drafted tokens, predicted / measured, {place}",
        quantities=(
            Quantity("predicted", Spread.of([predicted]), "times"),
            Quantity("measured", measured, "times"),
            Quantity("draft step", Spread.of([costs.draft]), "plain steps"),
            Quantity("further verified token", Spread.of([costs.further_token]), "plain steps"),
            *_acceptance(record),
        ),
        ratio=Spread(
            predicted / measured.median, predicted / measured.high, predicted / measured.low
        ),
    )


def _table_row(place: str, acceptance: float, costs: DraftCosts) -> Row:
    gains = {g: expected_gain(acceptance, g, costs) for g in range(MAX_DRAFT_TOKENS + 1)}
    best = max(gains, key=lambda g: gains[g])
    return Row(
        what=f"predicted speed-up at acceptance {acceptance:.0%}, {place}",
        quantities=(
            Quantity("gain", Spread.of([gains[best]]), "times"),
            Quantity("with", Spread.of([float(best)]), "drafted tokens"),
        ),
    )


def _acceptance(record: DraftRecord) -> tuple[Quantity, ...]:
    acceptance, tokens = record.acceptance or 0.0, record.tokens_per_verification or 1.0
    return (
        Quantity("accepted", Spread.of([100 * acceptance]), "%"),
        Quantity("per verification", Spread.of([tokens]), "tokens"),
        Quantity("plain steps", Spread.of([float(record.plain_steps)]), "in all"),
    )


def _seconds(decoder: Decoder, prompt: Tensor, size: _Size, **drafting: Any) -> float:
    """Return the seconds per step of a generation, prefill included."""
    options: dict[str, Any] = {
        "max_new_tokens": size.new_tokens,
        "temperature": 1.0,
        "seed": list(range(len(prompt))),
    }
    started = time.perf_counter()
    if drafting:
        speculative.generate(decoder, prompt, **options, **drafting)
    else:
        generate(decoder, prompt, **options)
    return (time.perf_counter() - started) / size.new_tokens


def _costs(full: Decoder, draft: Decoder | None, prompt: Tensor, size: _Size) -> DraftCosts:
    """Measure a draft step and a further verified token in plain steps."""
    tasks = {"step": _pass(full, prompt, 1), "verify": _pass(full, prompt, 1 + _FIXED)}
    if draft is not None:
        tasks["draft"] = _pass(draft, prompt, 1)
    seconds = take_turns(tasks, repetitions=10 * size.repetitions)
    further = paired_ratio(seconds["verify"], seconds["step"]).median - 1.0
    cost = 0.0 if draft is None else paired_ratio(seconds["draft"], seconds["step"]).median
    return DraftCosts(cost, max(0.0, further) / _FIXED)


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


def _milliseconds(label: str, seconds: list[float]) -> Quantity:
    return Quantity(label, Spread.of([1e3 * value for value in seconds]), "ms")
