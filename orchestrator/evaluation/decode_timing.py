"""Time per decoded token, and what a draft saves of it, measured so that models can be compared.

Models take turns within a repetition, so a slow phase of the machine affects all of them. Each is
warmed up first. The generation is the cached, greedy one that users run; the prefill (time to the
first token) is timed apart from the steps after it. On a GPU the warm-up captures the CUDA graphs
that the timed steps replay, and nothing waits for the device between the first token and the last.
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
from iiet.generation import generate, stream
from iiet.schedule import IterationSchedule
from iiet.static_steps import StaticSteps
from orchestrator.models.folder import DTYPES
from orchestrator.models.open import use_tf32
from orchestrator.terminal.progress import Progress
from orchestrator.training.devices import device_precision

WARM_UP_TOKENS = 4
SWEEP_PROMPT_TOKENS = 16
SWEEP_NEW_TOKENS = 32
SWEEP_REPETITIONS = 5
NUM_TIMED_TEXTS = 6
"""Texts that are continued one by one with a draft, with the clock; acceptance takes all."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Decoding times of one model in milliseconds, one for each repetition."""

    first_tokens: tuple[float, ...]
    """Time of the prefill, up to the first new token, all rows together."""
    steps: tuple[float, ...]
    """Time per decoding step after it: one new token in every row."""

    @property
    def median(self) -> float:
        """Median time per step."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the time per step."""
        return half_quartile_distance(self.steps)


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
        batch_size: Rows decoded together.
        on_done: Called with the number of measurements done.
    """
    graphs = {name: _graphs(decoder) for name, decoder in decoders.items()}

    def timed(name: str, tokens: int) -> tuple[float, float]:
        decoder = decoders[name]
        prompt = random_prompt(decoder, batch_size, prompt_tokens)
        start = partial(stream, decoder, prompt, steps=graphs[name], max_new_tokens=tokens)
        return time_stream(start, tokens, decoder.device)

    for name in decoders:
        # A GPU's warm-up needs all lengths of the cache, each of which may have its own graph.
        timed(name, new_tokens if graphs[name] else min(WARM_UP_TOKENS, new_tokens))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    names = list(decoders)
    for repetition in range(repetitions):
        # Each repetition begins with another model, so none always runs after the slowest.
        shift = repetition % len(names)
        for place, name in enumerate(names[shift:] + names[:shift], 1):
            times[name].append(timed(name, new_tokens))
            if on_done:
                on_done(repetition * len(names) + place)
    columns = {name: tuple(zip(*pairs, strict=True)) for name, pairs in times.items()}
    return {n: Timing(first_tokens=firsts, steps=steps) for n, (firsts, steps) in columns.items()}


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


def random_prompt(decoder: Decoder, batch_size: int, prompt_tokens: int) -> Tensor:
    """Return fixed random tokens of shape (batch_size, prompt_tokens), on the model's device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(decoder.config.vocab_size, shape, generator=generator)
    return prompt.to(decoder.device)


@dataclass(frozen=True, kw_only=True)
class DraftSpeed:
    """What a draft is worth for a model."""

    acceptance: float
    """Share of drafted tokens that the full model keeps."""
    ms_per_token: float
    """Median time of a token of exact output, with the draft."""
    speed_up: float
    """Median ratio of plain decoding's time to that with the draft, prompt by prompt."""


@torch.inference_mode()
def measure_draft(full: Decoder, draft: Decoder | IterationSchedule, texts: Tensor) -> DraftSpeed:
    """Measure a draft of a model by greedy generations that continue held-out text.

    So a draft is judged on the full model's own continuations. Acceptance is that of one drafted
    token at a time; times are those of one row, after the first token.

    Args:
        full: The model whose output counts, under its own schedule.
        draft: A cheaper schedule of it, or another decoder of the same vocabulary.
        texts: (texts, time), held out; the beginnings are continued to the same length.
    """
    prompts = texts[:, : sweep_prompt_length(full.config.context_length)].to(full.device)
    new_tokens = texts.size(1) - prompts.size(1)
    _, record = generate(
        full, prompts, max_new_tokens=new_tokens, draft=draft, draft_tokens=1, return_record=True
    )
    drafts: tuple[Decoder | IterationSchedule | None, ...] = (draft, None)
    times: dict[bool, list[float]] = {True: [], False: []}
    with threads(1):
        for number, prompt in enumerate(torch.split(prompts[:NUM_TIMED_TEXTS], 1)):
            # Each prompt begins with the other way.
            for one in drafts[:: -1 if number % 2 else 1]:
                steps = partial(stream, full, prompt, max_new_tokens=new_tokens, draft=one)
                times[one is not None].append(time_stream(steps, new_tokens, full.device)[1])
    ratios = [plain / drafted for plain, drafted in zip(times[False], times[True], strict=True)]
    return DraftSpeed(
        acceptance=record.acceptance or 0.0,
        ms_per_token=statistics.median(times[True]),
        speed_up=statistics.median(ratios),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def half_quartile_distance(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _graphs(decoder: Decoder) -> StaticSteps | None:
    return StaticSteps(decoder) if decoder.device.type == "cuda" else None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
