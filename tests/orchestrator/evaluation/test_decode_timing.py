"""Decode timing: models take turns and report their conditions. No test depends on real times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.static_steps import StaticSteps
from orchestrator.evaluation import decode_timing
from orchestrator.evaluation.decode_timing import (
    decode_milliseconds,
    random_decoders,
    time_per_token,
)
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


@pytest.fixture
def decoder(tiny_model: dict[str, Any]) -> Decoder:
    return Decoder(ModelConfig.from_dict(tiny_model))


def test_models_take_turns_and_the_median_ignores_one_outlier(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = {name: decoder.with_schedule(decoder.schedule) for name in "abc"}
    names = {id(twin): name for name, twin in twins.items()}
    order: list[str] = []

    def timed(model: Decoder, prompt: Any, new_tokens: int, _: Any) -> tuple[float, float]:
        order.append(names[id(model)])
        factor = {6: 100, 10: 0.5}.get(len(order), 1)  # One repetition is slow, one is fast.
        return 5.0 * factor, {"a": 1.0, "b": 2.0, "c": 4.0}[order[-1]] * factor

    monkeypatch.setattr(decode_timing, "_time_steps", timed)
    timings = decode_milliseconds(twins, prompt_tokens=4, new_tokens=4, repetitions=3)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")  # warm-up first
    assert {name: t.median for name, t in timings.items()} == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert {name: t.first_token for name, t in timings.items()} == dict.fromkeys("abc", 5.0)
    assert timings["c"].repetitions == (400.0, 4.0, 2.0)
    assert timings["a"].spread == 0.0
    assert timings["c"].spread == pytest.approx((202.0 - 3.0) / 2)


def test_a_measurement_reports_its_conditions(decoder: Decoder) -> None:
    done: list[int] = []
    decoder.train()
    timing = decode_milliseconds(
        {"model": decoder},
        prompt_tokens=3,
        new_tokens=5,
        batch_size=2,
        repetitions=2,
        on_done=done.append,
    )["model"]
    assert timing.median > 0
    assert timing.first_token > 0
    assert done == [1, 2]
    assert timing.batch_size == 2
    assert decoder.training


def test_every_step_of_decoding_is_timed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fake clock that counts forward passes.
    passes: list[int] = []
    decoder.embedding.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(decode_timing, "_now", lambda _: float(len(passes)))
    timing = decode_milliseconds({"model": decoder}, prompt_tokens=3, new_tokens=5, repetitions=1)[
        "model"
    ]
    assert timing.first_token == 1000.0  # the prefill is one pass
    assert timing.median == 1000.0  # and every further token one more


def test_the_warm_up_makes_the_graphs_that_are_timed(
    tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "context_length": 24}))
    replayed: list[int] = []
    captured: list[int] = []

    def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        captured.append(len(replayed))
        return lambda: replayed.append(1) or step()  # type: ignore[func-returns-value]

    monkeypatch.setattr(decode_timing, "_graphs", lambda d: StaticSteps(d, capture=capture))
    decode_milliseconds({"model": decoder}, prompt_tokens=4, new_tokens=20, repetitions=2)
    assert captured == [0]
    assert len(replayed) == 3 * 19


@pytest.mark.parametrize(
    ("context_length", "lengths"), [(2048, (16, 32)), (48, (16, 32)), (32, (10, 22)), (3, (1, 2))]
)
def test_short_contexts_get_fewer_tokens(
    tiny_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    context_length: int,
    lengths: tuple[int, int],
) -> None:
    asked: list[tuple[int, int]] = []

    def timed(model: Decoder, prompt: torch.Tensor, new_tokens: int, _: Any) -> tuple[float, float]:
        asked.append((prompt.shape[1], new_tokens))
        return 1.0, 1.0

    monkeypatch.setattr(decode_timing, "_time_steps", timed)
    short = ModelConfig.from_dict({**tiny_model, "context_length": context_length})
    long = ModelConfig.from_dict({**tiny_model, "context_length": 4096})
    time_per_token({"long": long, "short": short}, "cpu", Progress())
    assert set(asked[2:]) == {lengths}, "after the warm-up"


def test_models_that_differ_in_their_schedule_share_their_weights(
    tiny_model: dict[str, Any],
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "full": {},
        "none": {"schedule": [0, 0]},
        "deeper": {"num_layers": 3, "schedule": [2, 1, 1]},
        "vanilla": {"method": "vanilla", "schedule": None},
    }
    models = {name: ModelConfig.from_dict({**tiny_model, **own}) for name, own in changes.items()}
    decoders = random_decoders(models, "cpu")
    weights = {name: decoder.embedding.weight.data_ptr() for name, decoder in decoders.items()}
    assert weights["full"] == weights["none"]
    assert len(set(weights.values())) == 3
    for name, decoder in decoders.items():
        assert decoder.config.evaluations_per_layer() == models[name].evaluations_per_layer()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
        ({"prompt_tokens": 0, "repetitions": 0}, "prompt_tokens .* repetitions"),
        ({"prompt_tokens": 12, "new_tokens": 12}, r"model reads 16 tokens, not the 12 \+ 12"),
    ],
)
def test_invalid_settings_are_errors(
    decoder: Decoder, settings: dict[str, int], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        decode_milliseconds({"model": decoder}, **{"prompt_tokens": 2, "new_tokens": 2, **settings})


def test_no_model_is_an_error() -> None:
    with pytest.raises(UserError, match="no model"):
        decode_milliseconds({})
