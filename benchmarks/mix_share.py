"""Which part of a training step is the mix, from the profiler's record of that very step.

The difference of two steps, one without a mix, would be the plainest measure, but a share of a few
hundredths drowns in the noise between two steps. Within one step it does not. Forward, the
functions of the mix are marked. Backward, autograd's own record of evaluating their derivatives
counts, which includes adding an estimate's gradients up over the layers that read it. The
profiler's cost per operation falls on the mix, of few large operations, as on all else.
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
    """Run a training step and return the mix's share of its time.

    Args:
        decoder: a model with a mix.
        input_ids: (batch, time) integers.
    """
    recording = profile(activities=[ProfilerActivity.CPU])
    with _marked(), _without_chatter(), recording as record, record_function(_STEP):
        step(decoder, input_ids)
    microseconds: dict[str, float] = {
        event.key: event.cpu_time_total for event in record.key_averages()
    }
    # A part under another name would count as nothing: a missing key is an error.
    return sum(microseconds[key] for key in (_MIX, *_BACKWARD)) / microseconds[_STEP]


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Drop what the profiler's native library writes to the error stream at its start and end."""
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
