"""Decode times and drafts: models take turns, and no test depends on real times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.generation import generate
from iiet.schedule import IterationSchedule
from iiet.static_steps import StaticSteps
from orchestrator.evaluation import decode_timing
from orchestrator.evaluation.decode_timing import (
    decode_milliseconds,
    measure_draft,
    random_decoders,
    sweep_prompt_length,
    time_per_token,
)
from orchestrator.terminal.progress import Progress


@pytest.fixture
def decoder(tiny_model: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_dict({**tiny_model, "initializer_std": 0.5}))


def test_models_take_turns_and_the_median_ignores_one_outlier(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = {name: decoder.with_schedule(decoder.schedule) for name in "abc"}
    names = {id(twin): name for name, twin in twins.items()}
    order: list[str] = []

    def timed(start: Any, *_: Any) -> tuple[float, float]:
        order.append(names[id(start.args[0])])
        factor = {6: 100, 10: 0.5}.get(len(order), 1)  # One repetition is slow, one is fast.
        return 5.0 * factor, {"a": 1.0, "b": 2.0, "c": 4.0}[order[-1]] * factor

    monkeypatch.setattr(decode_timing, "time_stream", timed)
    timings = decode_milliseconds(twins, prompt_tokens=4, new_tokens=4, repetitions=3)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")  # warm-up first
    assert {name: t.median for name, t in timings.items()} == {"a": 1.0, "b": 2.0, "c": 4.0}
    assert timings["a"].first_tokens == (5.0, 5.0, 5.0)
    assert timings["c"].steps == (400.0, 4.0, 2.0)
    assert timings["a"].spread == 0.0
    assert timings["c"].spread == pytest.approx((202.0 - 3.0) / 2)


def test_every_step_of_decoding_is_timed_and_reported(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A fake clock that counts forward passes.
    passes: list[int] = []
    done: list[int] = []
    decoder.embedding.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(decode_timing, "_now", lambda _: float(len(passes)))
    timing = decode_milliseconds(
        {"model": decoder},
        prompt_tokens=3,
        new_tokens=5,
        batch_size=2,
        repetitions=2,
        on_done=done.append,
    )["model"]
    assert timing.first_tokens == (1000.0, 1000.0)  # the prefill is one pass
    assert timing.steps == (1000.0, 1000.0)  # and every further token one more
    assert done == [1, 2]


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

    def timed(start: Any, new_tokens: int, _: Any) -> tuple[float, float]:
        asked.append((start.args[1].shape[1], new_tokens))
        return 1.0, 1.0

    monkeypatch.setattr(decode_timing, "time_stream", timed)
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


def test_acceptance_is_the_share_of_tokens_that_draft_and_model_choose(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    size = (8, decoder.config.context_length)
    texts = torch.randint(decoder.config.vocab_size, size, generator=generator)
    same = measure_draft(decoder, decoder.with_schedule(decoder.schedule), texts)
    assert same.acceptance == 1.0
    assert min(same.ms_per_token, same.speed_up) > 0

    none = IterationSchedule.none(len(decoder.schedule))
    speed = measure_draft(decoder, none, texts)
    # After the same tokens, the same weights without corrections choose some of the same tokens.
    length = sweep_prompt_length(decoder.config.context_length)
    continued = generate(decoder, texts[:, :length], max_new_tokens=texts.size(1) - length)
    with torch.no_grad():
        choices = decoder(continued[:, :-1], schedule=none).argmax(-1)
    share = (choices == continued[:, 1:])[:, length - 1 :].float().mean().item()
    assert 0 < share < 1
    # Not every token is drafted, and a draft reads the full model's slots; so it is near.
    assert speed.acceptance == pytest.approx(share, abs=0.2)
