"""The mix's share of a training step, from the profiler's record of that step.

The difference of two steps, one of them without a mix, would be simpler, but the noise between two
steps is larger than the share. Within one step it is not. In the forward pass the functions of the
mix are marked. In the backward pass autograd's own records of their derivatives count; they include
the sum of an estimate's gradients over the layers that read it. The profiler adds time to every
operation, those of the mix and all others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.mix_variants import step
from iiet import Decoder
from iiet.methods.implicit_euler import ImplicitEuler
from iiet.mix import LayerMix, Mix

__all__ = ["mix_share"]

_STEP, _MIX = "benchmarks: step", "benchmarks: mix"
_FORWARD = (
    (ImplicitEuler, "start"),
    (Mix, "forward"),
    (LayerMix, "point"),
    (LayerMix, "leave"),
)
_BACKWARD = tuple(
    f"autograd::engine::evaluate_function: {name}Backward"
    for name in ("_Start", "_Sums", "_Leave", "_AddScaled")
)


def mix_share(decoder: Decoder, input_ids: Tensor) -> float:
    """Run a training step on `input_ids`, (batch, time), and return the mix's share of its time."""
    recording = profile(activities=[ProfilerActivity.CPU])
    with _marked(), _without_profiler_messages(), recording as record, record_function(_STEP):
        step(decoder, input_ids)
    microseconds: dict[str, float] = {
        event.key: event.cpu_time_total for event in record.key_averages()
    }
    # A renamed part must not count as nothing: a missing key is an error.
    return sum(microseconds[key] for key in (_MIX, *_BACKWARD)) / microseconds[_STEP]


@contextmanager
def _without_profiler_messages() -> Iterator[None]:
    """Drop the messages that the profiler's native library writes to standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _marked() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name in _FORWARD:
            marked = _mark(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, marked))
        yield


def _mark(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MIX):
            return function(*args, **kwargs)

    return marked
