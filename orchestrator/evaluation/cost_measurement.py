"""Measured time and memory of models on this machine, and the prediction of the cost model.

Times are compared as shares of the full model's time. Shares are taken within a repetition, where
the models ran one after the other, so a slow phase of the machine affects both.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor
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
        """Check that prompt and new tokens fit models.

        Args:
            context_lengths: Name of a model -> tokens that it reads.

        Raises:
            UserError: If they do not fit the model that reads least.
        """
        length, short = min((length, name) for name, length in context_lengths.items())
        if max(self.contexts) + self.new_tokens > length:
            raise UserError(
                f"benchmark: {short} reads {length} tokens, not the {max(self.contexts)} + "
                f"{self.new_tokens} of prompt and new tokens"
            )


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

        new_tokens = conditions.new_tokens
        with threads(conditions.num_threads):
            timings = decode_milliseconds(
                decoders,
                prompt_tokens=context,
                new_tokens=new_tokens,
                batch_size=batch_size,
                repetitions=conditions.repetitions,
                on_done=advance,
            )
            peaks = {}
            for name, decoder in decoders.items():
                prompt = random_prompt(decoder, batch_size, context)
                work = partial(_first_steps, decoder, prompt, new_tokens)
                peaks[name] = peak_bytes(work, decoder.device)
        predicted = {}
        for name, decoder in decoders.items():
            first = inference_cost(decoder.config, context_length=context)
            # Each step attends to one token more than the last; the middle one represents all.
            step = inference_cost(decoder.config, context_length=context + new_tokens // 2)
            evaluations = {SIMPLEST: float(step.evaluations_per_token)}
            predicted[name] = {
                DECODING: {PREDICTION: step.decode_flops_per_token, **evaluations},
                FIRST_TOKEN: {PREDICTION: first.prefill_flops_per_token, **evaluations},
            }
        full = max(decoders, key=lambda name: predicted[name][DECODING][PREDICTION])
        for name, decoder in decoders.items():
            timing, whole = timings[name], timings[full]
            shares = {}
            for phase, own, others in (
                (DECODING, timing.steps, whole.steps),
                (FIRST_TOKEN, timing.first_tokens, whole.first_tokens),
            ):
                ratios = [one / other for one, other in zip(own, others, strict=True)]
                shares[phase] = RelativeTime(
                    measured=statistics.median(ratios),
                    spread=half_quartile_distance(ratios),
                    predicted={
                        kind: value / predicted[full][phase][kind]
                        for kind, value in predicted[name][phase].items()
                    },
                )
            weights = sum(parameter.nbytes for parameter in decoder.parameters())
            size = next(decoder.parameters()).element_size()
            cache = inference_cost(decoder.config, bytes_per_value=size).kv_bytes_per_token
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
                    kv_bytes=cache * batch_size * (context + new_tokens),
                    peak_bytes=weights + peaks[name],
                    shares=shares,
                )
            )
    return costs


def _first_steps(decoder: Decoder, prompt: Tensor, new_tokens: int) -> None:
    # Memory does not grow after them: the cache is allocated as a whole.
    steps = stream(decoder, prompt, max_new_tokens=new_tokens)
    deque(islice(steps, STEPS_FOR_MEMORY), maxlen=0)


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
