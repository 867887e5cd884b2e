"""Measure latency per token and memory of models, and compare them with predictions.

Models take turns within a repetition, so a slow phase of the machine affects all of them. Each is
warmed up first. Decoding is greedy, with the cache, as users run it; the prefill (time to the first
token) is timed separately from the decoding steps. On a GPU the warm-up captures the CUDA graphs
that the timed steps replay, and nothing waits for the device between the first token and the last.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from iiet.cost import InferenceCost, inference_cost
from iiet.decoder import Decoder
from iiet.decoding.static_steps import Capture, StaticSteps
from iiet.model.config import ModelConfig
from orchestrator.evaluation.looped import LoopedDecoder
from orchestrator.models.load import DTYPES, device_precision, use_tf32
from orchestrator.models.open import OpenedModel
from orchestrator.records.metrics import timed_name
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

PREDICTION = "FLOPs"
"""Prediction by the share of FLOPs, including parts that do not depend on the schedule."""
SIMPLEST = "evaluations"
"""Prediction by the share of evaluations, the simplest one."""
DECODING = "decoding"
FIRST_TOKEN = "first token"
HOW_MEASURED = "most bytes allocated by PyTorch at one time, weights included"
STEPS_FOR_MEMORY = 3
"""Tokens that are decoded to measure the peak memory."""
WARM_UP_TOKENS = 4
"""Tokens that each model decodes before it is timed on a CPU."""
SWEEP_PROMPT_TOKENS = 16
SWEEP_NEW_TOKENS = 32
SWEEP_REPETITIONS = 5
"""Repetitions in a sweep; `benchmark` has an option for them."""
Timed = Decoder | LoopedDecoder
"""What is timed: a decoder, or a looped model that transformers runs."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Decoding times of one model in milliseconds, one for each repetition."""

    first_tokens: tuple[float, ...]
    """Time of the prefill, up to the first new token, for the whole batch."""
    steps: tuple[float, ...]
    """Time per decoding step after it: one new token in every sequence."""

    @property
    def median(self) -> float:
        """Median time per step."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles of the time per step."""
        return half_quartile_distance(self.steps)


def decode_milliseconds(
    decoders: Mapping[str, Timed],
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    batch_size: int = 1,
    repetitions: int = 7,
    capture: Capture | None = None,
    on_done: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Measure decoding of several models side by side.

    Args:
        decoders: Name to model; each uses its own schedule.
        prompt_tokens: Tokens of each prompt, read in one pass.
        new_tokens: Tokens to decode; at least 2, because the first is part of the prefill.
        batch_size: Sequences decoded together.
        capture: Makes a function that replays the kernels of a step; when unset, CUDA graphs on a
            GPU.
        on_done: Called with the number of finished measurements.
    """
    graphs = {name: _graphs_of(decoder, capture) for name, decoder in decoders.items()}

    def timed(name: str, tokens: int) -> tuple[float, float]:
        decoder = decoders[name]
        prompt = random_prompt(decoder, batch_size, prompt_tokens)
        start = partial(_stream, decoder, prompt, tokens, graphs[name])
        return time_stream(start, tokens, decoder.device)

    for name in decoders:
        # On a GPU the warm-up covers all cache lengths, each of which may have its own CUDA graph.
        timed(name, new_tokens if graphs[name] else min(WARM_UP_TOKENS, new_tokens))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    names = list(decoders)
    for repetition in range(repetitions):
        # Each repetition begins with another model, so that no model always follows the slowest.
        shift = repetition % len(names)
        for number, name in enumerate(names[shift:] + names[:shift], start=1):
            times[name].append(timed(name, new_tokens))
            if on_done:
                on_done(repetition * len(names) + number)
    return {
        name: Timing(
            first_tokens=tuple(first for first, _ in pairs),
            steps=tuple(step for _, step in pairs),
        )
        for name, pairs in times.items()
    }


def load_side_by_side(
    models: Mapping[str, OpenedModel], device: str, *, trust_remote_code: bool = False
) -> dict[str, Timed]:
    """Load models, each under its schedule or depth; models of one folder share weights.

    Raises:
        UserError: If one is damaged, or neither a decoder nor a looped model of a known kind.
    """
    first_of_folder: dict[Path, Any] = {}
    decoders: dict[str, Timed] = {}
    for name, model in models.items():
        same_weights = first_of_folder.get(model.path)
        if model.loops:
            decoders[name] = LoopedDecoder(
                model, trust_remote_code=trust_remote_code, device=device, shares_with=same_weights
            )
        else:
            if same_weights is None:
                same_weights = model.decoder(DTYPES[device_precision(device)], device=device)
            assert model.config is not None, "OpenedModel.decoder refuses what is no decoder"
            decoders[name] = same_weights.with_schedule(model.config.corrections)
        first_of_folder.setdefault(model.path, decoders[name])
    return decoders


def time_per_token(
    decoders: Mapping[str, Decoder], progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the latency of a sweep's models at batch size 1, by tracked name."""
    progress.start("time per token", len(decoders) * SWEEP_REPETITIONS)
    context_length = min(decoder.config.context_length for decoder in decoders.values())
    prompt_tokens = sweep_prompt_length(context_length)
    # One sequence is too little work for several threads.
    with torch_threads(1):
        timings = decode_milliseconds(
            decoders,
            prompt_tokens=prompt_tokens,
            new_tokens=min(SWEEP_NEW_TOKENS, context_length - prompt_tokens),
            repetitions=SWEEP_REPETITIONS,
            on_done=progress.advance,
        )
    slowest = max(timing.median for timing in timings.values())
    progress.finish(f"{len(decoders)} models, the slowest {slowest:.1f} ms")
    return {
        name: {"decode_ms_per_token": timing.median, "decode_ms_spread": timing.spread}
        for name, timing in timings.items()
    }


def sweep_prompt_length(context_length: int) -> int:
    """Return the tokens of a prompt: a third of a short context, whose rest the new tokens fill."""
    return min(SWEEP_PROMPT_TOKENS, context_length // 3)


def random_decoders(models: Mapping[str, ModelConfig], device: str) -> dict[str, Decoder]:
    """Return a decoder of each config; those that differ only in their schedule share weights."""
    use_tf32(device)  # As for loaded models.
    dtype = DTYPES[device_precision(device)]
    decoder_of_shape: dict[str, Decoder] = {}
    decoders = {}
    for name, config in models.items():
        shape = repr({**config.to_dict(), "schedule": None})
        if shape not in decoder_of_shape:
            with torch.device(device):  # Large weights are made on the device directly.
                decoder_of_shape[shape] = Decoder(config).to(dtype)
        decoders[name] = decoder_of_shape[shape].with_schedule(config.corrections)
    return decoders


def random_prompt(decoder: Timed, batch_size: int, prompt_tokens: int) -> Tensor:
    """Return fixed random tokens of shape (batch_size, prompt_tokens), on the model's device."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, prompt_tokens)
    prompt = torch.randint(decoder.config.vocab_size, shape, generator=generator)
    return prompt.to(decoder.device)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of PyTorch threads within the block."""
    count_before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(count_before)


def time_stream(
    start: Callable[[], Iterator[Tensor]], new_tokens: int, device: torch.device
) -> tuple[float, float]:
    """Return the milliseconds that a generation takes to its first token, and per token after it.

    Args:
        start: Begins the generation; it yields once per token.
        new_tokens: At least 2.
    """
    started = seconds_now(device)
    steps = start()
    next(steps)
    first_token_done = seconds_now(device)
    for _ in steps:
        pass
    ended = seconds_now(device)
    first_token_seconds = first_token_done - started
    seconds_per_token = (ended - first_token_done) / (new_tokens - 1)
    return 1e3 * first_token_seconds, 1e3 * seconds_per_token


def half_quartile_distance(values: Sequence[float]) -> float:
    """Return half the distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _graphs_of(decoder: Timed, capture: Capture | None) -> StaticSteps | None:
    """Return steps of fixed shapes for a GPU's CUDA graphs; None if nothing would replay them."""
    if not isinstance(decoder, Decoder) or (capture is None and decoder.device.type != "cuda"):
        return None
    return StaticSteps(decoder, capture=capture)


def _stream(
    decoder: Timed, prompt: Tensor, new_tokens: int, graphs: StaticSteps | None = None
) -> Iterator[Tensor]:
    if isinstance(decoder, Decoder):
        return decoder.stream(prompt, steps=graphs, max_new_tokens=new_tokens)
    return decoder.stream(prompt, new_tokens)


def seconds_now(device: torch.device) -> float:
    """Return the time in seconds after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Measured costs, with the cost model's prediction


def cost_of(decoder: Timed) -> Callable[..., InferenceCost]:
    """Return the function that counts a model's cost, like `inference_cost`."""
    return partial(inference_cost, decoder.config) if isinstance(decoder, Decoder) else decoder.cost


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """Conditions of a measurement."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Numbers of sequences decoded together."""
    contexts: tuple[int, ...] = (32,)
    """Tokens of the prompt."""
    new_tokens: int = 32
    """Tokens decoded after the prompt, one by one; the first is part of the prefill."""
    repetitions: int = 9
    """Measurements of each model, in turns."""
    num_threads: int = 1
    """PyTorch threads on a CPU."""

    def check(self, context_lengths: Mapping[str, int]) -> None:
        """Check that prompt and new tokens fit models.

        Args:
            context_lengths: Name of a model -> its context length.

        Raises:
            UserError: If they do not fit the shortest context.
        """
        length, name = min((length, name) for name, length in context_lengths.items())
        if max(self.contexts) + self.new_tokens > length:
            raise UserError(
                f"benchmark: {name} reads {length} tokens, not the {max(self.contexts)} + "
                f"{self.new_tokens} of prompt and new tokens; lower --contexts or --new-tokens"
            )


@dataclass(frozen=True, kw_only=True)
class RelativeTime:
    """A time divided by the full model's time, measured and predicted."""

    measured: float
    """Median over repetitions."""
    spread: float
    """Half the interquartile range over repetitions."""
    predicted: dict[str, float]
    """Prediction by name: `FLOPs`, `evaluations`."""

    def residual(self, prediction: str = PREDICTION) -> float:
        """Return the relative error: measured divided by predicted, minus 1."""
        return self.measured / self.predicted[prediction] - 1


@dataclass(frozen=True, kw_only=True)
class MeasuredCost:
    """Costs of one model under one condition; spreads are half interquartile ranges."""

    model: str
    batch_size: int
    context: int
    """Tokens of the prompt."""
    first_token_ms: float
    """Median time to the first token, for the whole batch."""
    first_token_spread: float
    decode_ms: float
    """Median time per decoding step: one new token in every sequence."""
    decode_spread: float
    tokens_per_second: float
    """New tokens per second of all sequences, without the prefill."""
    weight_bytes: int
    kv_bytes: int
    """Exact bytes of keys and values of prompt and new tokens, for all sequences."""
    peak_bytes: int
    """Most bytes allocated at one time, including weights; see `peak_bytes`."""
    shares: dict[str, RelativeTime]
    """Share of the full model's time, for `decoding` and `first token`."""

    def metrics(self) -> dict[str, float]:
        """Return the tracked numbers; each name contains the condition."""
        relative_time = self.shares[DECODING]
        measured = {
            "first_token_ms": self.first_token_ms,
            "decode_ms": self.decode_ms,
            "tokens_per_second": self.tokens_per_second,
            "kv_bytes": float(self.kv_bytes),
            "peak_bytes": float(self.peak_bytes),
            "decode_spread": self.decode_spread,
            "decode_share": relative_time.measured,
            "decode_share_predicted": relative_time.predicted[PREDICTION],
        }
        return {
            timed_name(name, batch_size=self.batch_size, context=self.context): value
            for name, value in measured.items()
        }


def measure_costs(
    decoders: Mapping[str, Timed], conditions: MeasurementSettings, progress: Progress
) -> list[MeasuredCost]:
    """Measure models side by side under each batch size and context.

    Args:
        decoders: Name to model; each uses its own schedule. The full model is the one with the
            most FLOPs per token.
        conditions: Conditions that fit the models; see `MeasurementSettings.check`.
        progress: Shows finished measurements; the caller ends it.
    """
    measured_conditions = list(product(conditions.batch_sizes, conditions.contexts))
    num_measurements = len(decoders) * conditions.repetitions
    progress.start("benchmark", len(measured_conditions) * num_measurements)
    costs: list[MeasuredCost] = []
    for number, (batch_size, context) in enumerate(measured_conditions):
        # Times and memory.
        new_tokens = conditions.new_tokens
        with torch_threads(conditions.num_threads):
            timings = decode_milliseconds(
                decoders,
                prompt_tokens=context,
                new_tokens=new_tokens,
                batch_size=batch_size,
                repetitions=conditions.repetitions,
                on_done=partial(
                    _advance_from,
                    progress,
                    number * num_measurements,
                    f"batch {batch_size}, context {context}",
                ),
            )
            peaks = {}
            for name, decoder in decoders.items():
                prompt = random_prompt(decoder, batch_size, context)
                work = partial(_first_steps, decoder, prompt, new_tokens)
                peaks[name] = peak_bytes(work, decoder.device)

        # Predictions of the cost model for both phases.
        predicted = {}
        for name, decoder in decoders.items():
            prefill = cost_of(decoder)(context_length=context)
            # Each step attends to one token more than the last; the middle step represents all.
            step = cost_of(decoder)(context_length=context + new_tokens // 2)
            evaluations = {SIMPLEST: float(step.evaluations_per_token)}
            predicted[name] = {
                DECODING: {PREDICTION: step.decode_flops_per_token, **evaluations},
                FIRST_TOKEN: {PREDICTION: prefill.prefill_flops_per_token, **evaluations},
            }

        # Both as shares of the full model's times.
        full = max(decoders, key=lambda name: predicted[name][DECODING][PREDICTION])
        full_timing = timings[full]
        for name, decoder in decoders.items():
            timing = timings[name]
            shares = {}
            for phase, times, full_times in (
                (DECODING, timing.steps, full_timing.steps),
                (FIRST_TOKEN, timing.first_tokens, full_timing.first_tokens),
            ):
                # Per repetition, as a slow phase of the machine affects both models.
                ratios = [
                    time / full_time for time, full_time in zip(times, full_times, strict=True)
                ]
                shares[phase] = RelativeTime(
                    measured=statistics.median(ratios),
                    spread=half_quartile_distance(ratios),
                    predicted={
                        prediction: value / predicted[full][phase][prediction]
                        for prediction, value in predicted[name][phase].items()
                    },
                )
            weight_bytes = sum(parameter.nbytes for parameter in decoder.parameters())
            bytes_per_value = next(decoder.parameters()).element_size()
            cost = cost_of(decoder)(bytes_per_value=bytes_per_value)
            costs.append(
                MeasuredCost(
                    model=name,
                    batch_size=batch_size,
                    context=context,
                    first_token_ms=statistics.median(timing.first_tokens),
                    first_token_spread=half_quartile_distance(timing.first_tokens),
                    decode_ms=timing.median,
                    decode_spread=timing.spread,
                    tokens_per_second=1e3 * batch_size / timing.median,
                    weight_bytes=weight_bytes,
                    kv_bytes=cost.kv_bytes_per_token * batch_size * (context + new_tokens),
                    peak_bytes=weight_bytes + peaks[name],
                    shares=shares,
                )
            )
    return costs


def _advance_from(progress: Progress, num_before: int, text: str, done: int) -> None:
    progress.advance(num_before + done, text)


def _first_steps(decoder: Timed, prompt: Tensor, new_tokens: int) -> None:
    # Memory does not grow later, because the cache is allocated at once.
    steps = _stream(decoder, prompt, new_tokens)
    deque(islice(steps, STEPS_FOR_MEMORY), maxlen=0)


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the peak of allocated bytes during `work`, beyond the bytes before it.

    A GPU's allocator keeps this number. On a CPU it is the sum of the allocator's events; the
    resident size of the process would depend on memory that earlier work has left.
    """
    device = torch.device(device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    results = record.profiler.kineto_results if record.profiler else None
    assert results is not None, "a profile that has ended has results"
    # The profiler's public tables lack the order of events, which the peak needs.
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    num_allocated = 0
    peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        num_allocated += num_bytes
        peak = max(peak, num_allocated)
    return peak
