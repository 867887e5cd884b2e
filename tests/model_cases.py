"""Random small models of every method, for the laws that hold for all of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from method_schedules import schedule_for
from torch import Tensor

from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule

VOCAB = 31


def make_model(
    method: str = "iiet",
    schedule: tuple[int, ...] = (2, 0, 3),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Decoder:
    """Return a decoder of three layers, its method's own weights away from their starting values,
    so that nothing passes by coincidence."""
    from iiet.config import preset

    sizes: dict[str, Any] = {
        **{"vocab_size": VOCAB, "dim": 16, "num_layers": len(schedule), "num_heads": 4},
        **{"num_kv_heads": 2, "ffn_dim": 24, "context_length": 48, "initializer_std": 0.3},
    }
    torch.manual_seed(seed)
    fitting = schedule_for(method, schedule)
    decoder = Decoder(preset("tiny", method=method, schedule=fitting, **{**sizes, **changes}))
    with torch.no_grad():
        for parameter in decoder.method_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.to(dtype).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Return random tokens of a shape."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def models(draw: st.DrawFn, methods: tuple[str, ...] = tuple(METHODS.own)) -> Decoder:
    """Draw a model: method, schedule, options, grouped heads, tying and seed."""
    method = draw(st.sampled_from(methods))
    schedule = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    options = None
    if method == "iiet":
        options = draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "damping": st.sampled_from([0.3, 1.0]),
                    "learn_damping": st.booleans(),
                    "differentiated_corrections": st.sampled_from([None, 1, 2]),
                    "reinject_prediction": st.booleans(),
                },
            )
        )
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
    left = [0, *draw(st.lists(st.integers(0, time - 2), min_size=batch - 1, max_size=batch - 1))]
    return torch.arange(time) >= torch.tensor(left)[:, None]


def cheaper(decoder: Decoder) -> IterationSchedule | None:
    """Return a schedule with fewer corrections; None where there is none."""
    if not decoder.schedule.num_corrections:
        return None
    return IterationSchedule.none(decoder.config.num_layers)
