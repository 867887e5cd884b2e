"""Random small models of every method, for the laws that hold for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.model.config import preset
from iiet.model.losses import next_token_loss
from iiet.model.schedule import IterationSchedule

VOCAB = 31
EXACT = {"rtol": 0.0, "atol": 0.0}


def make_model(
    method: str = "iiet",
    schedule: tuple[int, ...] = (2, 0, 3),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Decoder:
    """Return a decoder of three layers, its method's own weights away from their starting values,
    so that nothing passes by coincidence."""
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCAB, "dim": 16, "num_layers": len(schedule), "num_heads": 4},
        **{"num_kv_heads": 2, "ffn_dim": 24, "context_length": 48, "initializer_std": 0.3},
    }
    # Of the CPU alone: `torch.manual_seed` formats a traceback for each kind of GPU.
    torch.default_generator.manual_seed(seed)
    fitting = schedule_for(method, schedule)
    decoder = Decoder(preset("tiny", method=method, schedule=fitting, **{**sizes, **changes}))
    with torch.no_grad():
        for parameter in decoder.method_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.to(dtype).eval()


def schedule_for(method: str, corrections: Sequence[int]) -> IterationSchedule | None:
    """Return these corrections, at most the full level where the method has levels, their maximum
    in all layers where it repeats the stack, or None where it makes none."""
    if not METHODS[method].facts.has_corrections:
        return None
    if (full_level := METHODS[method].facts.full_level) is not None:
        return IterationSchedule(tuple(min(full_level, count) for count in corrections))
    if METHODS[method].facts.repeats_stack:
        return IterationSchedule.uniform(len(corrections), max(corrections))
    return IterationSchedule(tuple(corrections))


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return random tokens of a shape."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padding(*counts: int, time: int) -> Tensor:
    """Return a mask, (rows, time), with so many tokens of padding at the left of each row."""
    return torch.arange(time) >= torch.tensor(counts)[:, None]


@st.composite
def models(draw: st.DrawFn, methods: tuple[str, ...] = tuple(METHODS.own_classes)) -> Decoder:
    """Draw a model: method, schedule, options, grouped heads, tying and seed."""
    method = draw(st.sampled_from(methods))
    schedule = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    options = None
    if method == "iiet":
        starts = [{"damping": 1.0}, {"damping": 0.3}, {"start": "identity"}]
        others = st.fixed_dictionaries(
            {},
            optional={
                "learn_damping": st.sampled_from([False, "scalar", "vector"]),
                "differentiated_corrections": st.sampled_from([None, 1, 2]),
                "reinject_prediction": st.booleans(),
            },
        )
        options = draw(st.sampled_from(starts)) | draw(others)
    return make_model(
        method,
        schedule,
        seed=draw(st.integers(0, 3)),
        method_options=options or None,
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def paddings(draw: st.DrawFn, batch: int = 2, time: int = 9) -> Tensor:
    """Draw a mask, (batch, time), with padding on the left of some rows; one row has none."""
    counts = [0, *draw(st.lists(st.integers(0, time - 2), min_size=batch - 1, max_size=batch - 1))]
    return left_padding(*counts, time=time)


def cheaper(decoder: Decoder) -> IterationSchedule | None:
    """Return a schedule with fewer corrections; None where there is none."""
    if not decoder.schedule.num_corrections:
        return None
    return IterationSchedule.none(decoder.config.num_layers)


Gradients = Mapping[str, Tensor | None]
"""Name of a parameter -> its gradient."""


def gradients(decoder: Decoder, loss: Tensor | None = None) -> Gradients:
    """Return the gradients of a loss; of that of `tokens(2, 9)` if unset."""
    ids = tokens(2, 9)
    decoder.zero_grad()
    loss = next_token_loss(decoder(ids), ids) if loss is None else loss
    loss.backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


def assert_same(actual: Gradients, expected: Gradients, **tolerance: float) -> None:
    """Compare gradients bitwise, or with a tolerance."""
    for name, gradient in actual.items():
        assert (gradient is None) == (expected[name] is None), name
        torch.testing.assert_close(gradient, expected[name], **(tolerance or EXACT))
