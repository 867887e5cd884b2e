"""Measured time and memory of models on this machine, and the prediction of the cost model.

Times are compared as shares of the full model's time. Shares are taken within a repetition, where
the models ran one after the other, so a slow phase of the machine affects both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.generation import stream
from orchestrator.evaluation.decode_timing import (
    decode_milliseconds,
    half_quartile_distance,
    random_prompt,
    threads,
)
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

PREDICTION = "FLOPs"
"""The share of FLOPs, which includes what no schedule changes: head, mix, attention."""
SIMPLEST = "evaluations"
"""The share of evaluations alone, the simplest prediction."""
DECODING = "decoding"
FIRST_TOKEN = "first token"
HOW_MEASURED = "bytes that PyTorch's allocator handed out at once, weights included"
STEPS_FOR_MEMORY = 3
"""Memory does not grow after these steps: the cache is allocated as a whole."""


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """Conditions that models are measured under."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Rows decoded together."""
    contexts: tuple[int, ...] = (32,)
    """Tokens of the prompt."""
    new_tokens: int = 32
    """Tokens decoded after the prompt, one by one; the first is part of the prefill."""
    repetitions: int = 7
    num_threads: int = 1
    """PyTorch threads on a CPU."""

    def check(self, context_lengths: Mapping[str, int]) -> None:
        """Check that the conditions fit models.

        Args:
            context_lengths: Name of a model -> tokens that it reads.

        Raises:
            UserError: If a condition is out of range, or does not fit a model.
        """
        least = {"new_tokens": 2, "batch_sizes": 1, "contexts": 1, "repetitions": 1}
        problems = [
            f"{name} must be at least {least[name]}, got {number}"
            for name, value in asdict(self).items()
            if name in least
            for number in (value if isinstance(value, tuple) else (value,))
            if number < least[name]
        ]
        short = min(context_lengths, key=context_lengths.__getitem__)
        prompt, length = max(self.contexts), context_lengths[short]
        if prompt + self.new_tokens > length:
            problems.append(
                f"{short} reads {length} tokens, not the {prompt} + {self.new_tokens} of prompt "
                "and new tokens"
            )
        if problems:
            raise UserError("benchmark: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class RelativeTime:
    """A time divided by the full model's, measured and predicted."""

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
    """One model under one condition; spreads are half interquartile ranges."""

    model: str
    batch_size: int
    context: int
    """Tokens of the prompt."""
    first_token_ms: float
    """Median time to the first token, all rows together."""
    first_token_spread: float
    decode_ms: float
    """Median time per decoding step: one new token in every row."""
    decode_spread: float
    tokens_per_second: float
    """New tokens per second of all rows, without the prefill."""
    weight_bytes: int
    kv_bytes: int
    """Bytes of keys and values of prompt and new tokens, all rows; exact."""
    peak_bytes: int
    """Largest number of bytes allocated at once, including weights; see `peak_bytes`."""
    shares: dict[str, RelativeTime]
    """Share of the full model's time, for `decoding` and `first token`."""

    def metrics(self) -> dict[str, float]:
        """Return the tracked numbers; each name contains the condition."""
        prefix = f"cost/batch_{self.batch_size}_context_{self.context}"
        names = ("first_token_ms", "decode_ms", "tokens_per_second", "kv_bytes", "peak_bytes")
        numbers = {f"{prefix}/{name}": float(getattr(self, name)) for name in names}
        return numbers | {
            f"{prefix}/decode_spread": self.decode_spread,
            f"{prefix}/decode_share": self.shares[DECODING].measured,
            f"{prefix}/decode_share_predicted": self.shares[DECODING].predicted[PREDICTION],
        }


def measure_costs(
    decoders: Mapping[str, Decoder], conditions: MeasurementSettings, progress: Progress
) -> list[MeasuredCost]:
    """Measure models side by side under each batch size and context.

    Args:
        decoders: Name to model; each uses its own schedule. The full model is the one with the
            most FLOPs per token.
        conditions: They fit the models; see `MeasurementSettings.check`.
        progress: Shows the measurements done; the caller ends it.
    """
    pairs = [(b, c) for b in conditions.batch_sizes for c in conditions.contexts]
    num_each = len(decoders) * conditions.repetitions
    progress.start("benchmark", len(pairs) * num_each)
    costs: list[MeasuredCost] = []
    for number, (batch_size, context) in enumerate(pairs):

        def advance(done: int, before: int = number * num_each) -> None:
            progress.advance(before + done, f"batch {batch_size}, context {context}")  # noqa: B023

        with threads(conditions.num_threads):
            timings = decode_milliseconds(
                decoders,
                prompt_tokens=context,
                new_tokens=conditions.new_tokens,
                batch_size=batch_size,
                repetitions=conditions.repetitions,
                on_done=advance,
            )
            peaks = {
                name: _peak_of_decoding(decoder, batch_size, context, conditions.new_tokens)
                for name, decoder in decoders.items()
            }
        predicted = {
            name: _predictions(decoder, context, conditions.new_tokens)
            for name, decoder in decoders.items()
        }
        full = max(decoders, key=lambda name: predicted[name][DECODING][PREDICTION])
        for name, decoder in decoders.items():
            timing, whole = timings[name], timings[full]
            weights = sum(parameter.nbytes for parameter in decoder.parameters())
            size = next(decoder.parameters()).element_size()
            cache = inference_cost(decoder.config, bytes_per_value=size).kv_bytes_per_token
            phases = {
                DECODING: (timing.steps, whole.steps),
                FIRST_TOKEN: (timing.first_tokens, whole.first_tokens),
            }
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
                    weight_bytes=weights,
                    kv_bytes=cache * batch_size * (context + conditions.new_tokens),
                    peak_bytes=weights + peaks[name],
                    shares={
                        phase: _share(*times, predicted[name][phase], predicted[full][phase])
                        for phase, times in phases.items()
                    },
                )
            )
    return costs


def _predictions(decoder: Decoder, context: int, new_tokens: int) -> dict[str, dict[str, float]]:
    """Return what the cost model says of a step, and of a token of the prompt, by phase."""
    prompt = inference_cost(decoder.config, context_length=context)
    # Each step attends to one token more than the last; the middle one represents all.
    step = inference_cost(decoder.config, context_length=context + new_tokens // 2)
    evaluations = {SIMPLEST: float(step.evaluations_per_token)}
    return {
        DECODING: {PREDICTION: step.decode_flops_per_token, **evaluations},
        FIRST_TOKEN: {PREDICTION: prompt.prefill_flops_per_token, **evaluations},
    }


def _share(
    times: Sequence[float],
    full_times: Sequence[float],
    predicted: Mapping[str, float],
    full_predicted: Mapping[str, float],
) -> RelativeTime:
    ratios = [own / whole for own, whole in zip(times, full_times, strict=True)]
    return RelativeTime(
        measured=statistics.median(ratios),
        spread=half_quartile_distance(ratios),
        predicted={name: value / full_predicted[name] for name, value in predicted.items()},
    )


def _peak_of_decoding(decoder: Decoder, batch_size: int, context: int, new_tokens: int) -> int:
    prompt = random_prompt(decoder, batch_size, context)

    def work() -> None:
        steps = stream(decoder, prompt, max_new_tokens=new_tokens)
        for _ in range(min(STEPS_FOR_MEMORY, new_tokens)):
            next(steps)

    return peak_bytes(work, decoder.device)


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the largest number of bytes allocated at once during `work`, beyond those before it.

    A GPU's allocator keeps this number. On a CPU it is summed from the allocator's events. The
    resident size of the process would depend on what the C library kept from earlier work.
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
    # The profiler's public tables sum over operations; the peak needs the order of events.
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    live = most = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        live += num_bytes
        most = max(most, live)
    return most
