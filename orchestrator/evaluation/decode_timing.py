"""Time per decoded token, measured so that models can be compared.

All models take turns within a repetition, so a slow phase of the machine affects all of them. Each
model is warmed up first. The generation is the cached, greedy one that users run, from the same
random prompt. The prefill (time to the first token) is timed apart from the steps after it.

On a GPU the warm-up captures the CUDA graphs that the timed steps replay, and nothing waits for the
device between the first token and the last. Models run in the precision of the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import stream
from iiet.static_steps import StaticSteps
from orchestrator.models.folder import DTYPES
from orchestrator.models.loading import use_tf32
from orchestrator.terminal.progress import Progress
from orchestrator.training.precision import device_precision
from orchestrator.workspace.errors import UserError

WARM_UP_TOKENS = 4
SWEEP_PROMPT_TOKENS = 16
SWEEP_NEW_TOKENS = 32
SWEEP_REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Decoding times of one model, in milliseconds; spreads are half interquartile ranges."""

    median: float
    """Median over repetitions of the time per decoding step: one new token in every row."""
    spread: float
    first_token: float
    """Median time of the prefill, up to the first new token."""
    first_token_spread: float
    repetitions: tuple[float, ...]
    """Time per step of each repetition, in order, for paired comparisons."""
    first_token_repetitions: tuple[float, ...]
    batch_size: int
    """Rows decoded together."""


def decode_milliseconds(
    decoders: Mapping[str, Decoder],
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    batch_size: int = 1,
    repetitions: int = 7,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Measure decoding of several models side by side.

    Args:
        decoders: Name to model; each uses its own schedule.
        prompt_tokens: Tokens of each prompt, read in one pass.
        new_tokens: Tokens to decode; at least 2, because the first is part of the prefill.
        on_done: Called with the number of measurements done.

    Raises:
        UserError: If a setting is out of range, or prompt and new tokens exceed a model's context.
    """
    _check(decoders, prompt_tokens, new_tokens, batch_size, repetitions)
    prompts = {name: random_prompt(d, batch_size, prompt_tokens) for name, d in decoders.items()}
    graphs = {name: _graphs(decoder) for name, decoder in decoders.items()}
    for name, decoder in decoders.items():
        # A GPU's warm-up needs all lengths of the cache, each of which may have its own graph.
        warm_up = new_tokens if graphs[name] else min(WARM_UP_TOKENS, new_tokens)
        _time_steps(decoder, prompts[name], warm_up, graphs[name])
    steps: dict[str, list[float]] = {name: [] for name in decoders}
    firsts: dict[str, list[float]] = {name: [] for name in decoders}
    names = list(decoders)
    done = 0
    for repetition in range(repetitions):
        # Each repetition begins with another model, so none always runs after the slowest.
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            decoder, prompt = decoders[name], prompts[name]
            first, per_step = _time_steps(decoder, prompt, new_tokens, graphs[name])
            firsts[name].append(first)
            steps[name].append(per_step)
            done += 1
            if on_done:
                on_done(done)
    return {
        name: Timing(
            median=statistics.median(steps[name]),
            spread=half_quartile_distance(steps[name]),
            first_token=statistics.median(firsts[name]),
            first_token_spread=half_quartile_distance(firsts[name]),
            repetitions=tuple(steps[name]),
            first_token_repetitions=tuple(firsts[name]),
            batch_size=batch_size,
        )
        for name in decoders
    }


def time_per_token(
    models: Mapping[str, ModelConfig], device: str, progress: Progress
) -> dict[str, Timing]:
    """Time how the models of a sweep decode one row; their weights are random."""
    progress.start("time per token", len(models) * SWEEP_REPETITIONS)
    decoders = random_decoders(models, device)
    context_length = min(decoder.config.context_length for decoder in decoders.values())
    prompt_tokens = sweep_prompt_length(context_length)
    # One row is too little work for several threads: they would wait for each other.
    with threads(1):
        timings = decode_milliseconds(
            decoders,
            prompt_tokens=prompt_tokens,
            new_tokens=min(SWEEP_NEW_TOKENS, context_length - prompt_tokens),
            repetitions=SWEEP_REPETITIONS,
            on_done=progress.advance,
        )
    slowest = max(timing.median for timing in timings.values())
    progress.finish(f"{len(decoders)} models, the slowest {slowest:.1f} ms")
    return timings


def sweep_prompt_length(context_length: int) -> int:
    """Return the tokens of a prompt: in a short context a third, and the new tokens the rest."""
    return min(SWEEP_PROMPT_TOKENS, context_length // 3)


def random_decoders(models: Mapping[str, ModelConfig], device: str) -> dict[str, Decoder]:
    """Return a decoder of each config; those that differ only in their schedule share weights."""
    use_tf32(device)  # As for a model that is loaded.
    dtype = DTYPES[device_precision(device)]
    made: dict[str, Decoder] = {}
    decoders = {}
    for name, config in models.items():
        shape = repr({**config.to_dict(), "schedule": None})
        if shape not in made:
            with torch.device(device):  # Large weights need no copy in the machine's memory.
                made[shape] = Decoder(config).to(dtype)
        decoders[name] = made[shape].with_schedule(config.corrections)
    return decoders


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_prompt(decoder: Decoder, batch_size: int, prompt_tokens: int) -> Tensor:
    """Return fixed random tokens of shape (batch_size, prompt_tokens), on the model's device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(decoder.config.vocab_size, shape, generator=generator)
    return prompt.to(decoder.device)


def _check(
    decoders: Mapping[str, Decoder],
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int,
    repetitions: int,
) -> None:
    smallest = {
        "prompt_tokens": (prompt_tokens, 1),
        "new_tokens": (new_tokens, 2),
        "batch_size": (batch_size, 1),
        "repetitions": (repetitions, 1),
    }
    problems = [f"{k} must be at least {n}, got {v}" for k, (v, n) in smallest.items() if v < n]
    if not decoders:
        problems.append("there is no model to measure")
    longest = min((d.config.context_length for d in decoders.values()), default=0)
    if decoders and prompt_tokens + new_tokens > longest:
        short = next(n for n, d in decoders.items() if d.config.context_length == longest)
        problems.append(
            f"{short} reads {longest} tokens, not the {prompt_tokens} + {new_tokens} of prompt and "
            "new tokens"
        )
    if problems:
        raise UserError("benchmark: " + "; ".join(problems))


def _graphs(decoder: Decoder) -> StaticSteps | None:
    return StaticSteps(decoder) if decoder.device.type == "cuda" else None


def _time_steps(
    decoder: Decoder, prompt: Tensor, new_tokens: int, graphs: StaticSteps | None
) -> tuple[float, float]:
    """Return milliseconds to the first token, and per step after it."""
    was_training = decoder.training
    decoder.eval()
    try:
        start = partial(stream, decoder, prompt, max_new_tokens=new_tokens, steps=graphs)
        return time_stream(start, new_tokens, decoder.device)
    finally:
        decoder.train(was_training)


def time_stream(
    start: Callable[[], Iterator[Tensor]], new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Return the milliseconds that a generation takes to its first token, and per token after it.

    Args:
        start: Begins the generation; it yields once per token.
        new_tokens: At least 2.
    """
    started = _now(device)
    steps = start()
    next(steps)
    first = _now(device)
    for _ in steps:
        pass
    ended = _now(device)
    return 1e3 * (first - started), 1e3 * (ended - first) / (new_tokens - 1)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def half_quartile_distance(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
