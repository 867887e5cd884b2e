"""Tests whether IIET's time per token is linear in its evaluations, so that counting predicts time.

The same weights decode under several iteration schedules, in turns, token by token. A line through
the medians, start + slope x evaluations, has as its start the cost of a token without evaluations
(embedding, head); its largest relative residual shows how well the count predicts time. Further
rows show where the count is wrong: consecutive corrections of one layer find its weights in the
processor's cache, so the same number of evaluations may be cheaper on few layers than on all.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.shape import fresh_decoder, shaped_config
from benchmarks.timing import Line, Spread, paired_ratio, stopwatch, take_turns
from iiet import Decoder, IterationSchedule, KeyValueCache

__all__ = ["measure"]

_TOLERANCE = 1e-3
_GOAL = Goal("at most", 0.1)
_FITTED = ("r = 0", "r = 0, 1 in turn", "r = 1", "r = 2", "r = 3")


@dataclass(frozen=True, kw_only=True)
class _Size:
    dims: tuple[int, ...] = (256, 512)
    num_layers: int = 12
    vocab_size: int = 8192
    prompt_tokens: int = 128
    num_steps: int = 100
    goal: Goal | None = _GOAL


_FULL = _Size()
_QUICK = _Size(dims=(64,), num_layers=4, vocab_size=256, prompt_tokens=8, num_steps=4, goal=None)


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure milliseconds per token under several iteration schedules.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    size = _QUICK if quick else _FULL
    rows: list[Row] = []
    checks: list[str] = []
    for dim in size.dims:
        say(f"schedules: d {dim}")
        decoder = _decoder(size, dim)
        checks.append(_check(decoder, _schedules(size.num_layers).values()))
        rows += _rows(decoder, size)
    setting = (
        f"IIET, {size.num_layers} layers, heads of 64, ffn 2.75 d, vocabulary {size.vocab_size}, "
        f"tied head, float32; batch 1 after a prompt of {size.prompt_tokens} tokens, "
        f"{size.num_steps} tokens each, in turns token by token"
    )
    return Report(title="schedules", setting=setting, rows=tuple(rows), checks=tuple(checks))


def _schedules(num_layers: int) -> dict[str, IterationSchedule]:
    """Return five schedules for the line, and two with as many evaluations as `r = 1`."""
    few = max(1, num_layers // 4)
    return {
        "r = 0": IterationSchedule.uniform(num_layers, 0),
        "r = 0, 1 in turn": IterationSchedule(tuple(islice(cycle((0, 1)), num_layers))),
        "r = 1": IterationSchedule.uniform(num_layers, 1),
        "r = 2": IterationSchedule.uniform(num_layers, 2),
        "r = 3": IterationSchedule.uniform(num_layers, 3),
        "few": IterationSchedule((0,) * (num_layers - few) + (num_layers // few,) * few),
        "one": IterationSchedule((0,) * (num_layers - 1) + (num_layers,)),
    }


def _decoder(size: _Size, dim: int) -> Decoder:
    config = shaped_config(
        dim,
        num_layers=size.num_layers,
        vocab_size=size.vocab_size,
        # Two more tokens: the warm-up and a spare one.
        context_length=size.prompt_tokens + size.num_steps + 2,
    )
    return fresh_decoder(config).eval()


def _check(decoder: Decoder, schedules: Collection[IterationSchedule]) -> str:
    """Compare the logits of a cached step with those of the full forward."""
    prompt, differences = _prompt(decoder, 8), []
    for schedule in schedules:
        follower = decoder.with_schedule(schedule)
        with torch.inference_mode():
            cache = KeyValueCache(follower.config, batch_size=1, max_tokens=8)
            follower(prompt[:, :-1], cache=cache)
            step, full = follower(prompt[:, -1:], cache=cache), follower(prompt)[:, -1:]
        differences.append(((step - full).abs().max() / full.std()).item())
    what = f"logits of a cached step and the full forward, {len(schedules)} schedules"
    return checked(f"{what}, d {decoder.config.dim},", max(differences), _TOLERANCE)


def _prompt(decoder: Decoder, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(decoder.config.vocab_size, (1, num_tokens), generator=generator)


def _token_step(decoder: Decoder, size: _Size) -> Callable[[], float]:
    """Return a task that decodes one more token after a prompt and returns the seconds."""
    cache = KeyValueCache(decoder.config, batch_size=1, max_tokens=decoder.config.context_length)
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.inference_mode():
        decoder(_prompt(decoder, size.prompt_tokens), cache=cache, last_only=True)

    @torch.inference_mode()
    def step() -> None:
        decoder(token, cache=cache, last_only=True)

    return stopwatch(step)


def _rows(decoder: Decoder, size: _Size) -> list[Row]:
    schedules = _schedules(size.num_layers)
    tasks = {n: _token_step(decoder.with_schedule(s), size) for n, s in schedules.items()}
    results = take_turns(tasks, repetitions=size.num_steps)
    times = {name: [1e3 * value for value in values] for name, values in results.items()}
    place = f"d {decoder.config.dim}"
    rows = [
        _schedule_row(f"{place}, {name}", times[name], schedules[name].num_evaluations)
        for name in _FITTED
    ]
    rows.append(_line_row(place, times, schedules, size.goal))
    rows += [_concentrated_row(place, name, times, schedules) for name in ("few", "one")]
    return rows


def _schedule_row(what: str, milliseconds: list[float], num_evaluations: int) -> Row:
    per_evaluation = Spread.of([value / num_evaluations for value in milliseconds])
    return Row(
        what=f"{what}: {num_evaluations} evaluations",
        quantities=(
            Quantity("token", Spread.of(milliseconds), "ms"),
            Quantity("per evaluation", per_evaluation, "ms"),
        ),
    )


def _line_row(
    place: str,
    times: dict[str, list[float]],
    schedules: dict[str, IterationSchedule],
    goal: Goal | None,
) -> Row:
    line = Line.through(
        [schedules[name].num_evaluations for name in _FITTED],
        [statistics.median(times[name]) for name in _FITTED],
    )
    return Row(
        what=f"{place}, line through {len(_FITTED)} schedules: largest relative residual",
        quantities=(
            Quantity("start", Spread.of([line.start]), "ms"),
            Quantity("per evaluation", Spread.of([line.slope]), "ms"),
        ),
        ratio=Spread.of([line.largest_relative_residual]),
        goal=goal,
    )


def _concentrated_row(
    place: str, name: str, times: dict[str, list[float]], schedules: dict[str, IterationSchedule]
) -> Row:
    return Row(
        what=f"{place}, {schedules[name].num_evaluations} evaluations, corrections on {name} "
        f"({schedules[name]}) / on all",
        quantities=(
            Quantity(f"on {name}", Spread.of(times[name]), "ms"),
            Quantity("on all", Spread.of(times["r = 1"]), "ms"),
        ),
        ratio=paired_ratio(times[name], times["r = 1"]),
    )
