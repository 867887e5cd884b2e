"""Decode times and costs: models take turns, and no test depends on real times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor

from iiet.cache import KeyValueCache
from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from iiet.static_steps import StaticSteps
from orchestrator.evaluation import decode_timing
from orchestrator.evaluation.decode_timing import (
    DECODING,
    FIRST_TOKEN,
    MeasuredCost,
    MeasurementSettings,
    decode_milliseconds,
    measure_costs,
    peak_bytes,
    random_decoders,
    time_per_token,
)
from orchestrator.reporting import command_tables
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError


@pytest.fixture
def decoder(tiny_model) -> Decoder:
    torch.manual_seed(0)
    return Decoder(ModelConfig.from_dict({**tiny_model, "initializer_std": 0.5}))


def test_models_take_turns_and_the_median_ignores_one_outlier(decoder, monkeypatch):
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


def test_every_step_of_decoding_is_timed_and_reported(decoder, monkeypatch):
    # A fake clock that counts forward passes.
    passes: list[int] = []
    done: list[int] = []
    decoder.model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(decode_timing, "seconds_now", lambda _: float(len(passes)))
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


def test_the_warm_up_makes_the_graphs_that_are_timed(tiny_model, monkeypatch):
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "context_length": 24}))
    replayed: list[int] = []
    captured: list[int] = []

    def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        captured.append(len(replayed))

        def replay() -> Tensor:
            replayed.append(1)
            return step()

        return replay

    def graphs(timed: Decoder, *, uses_graphs: bool) -> StaticSteps:
        return StaticSteps(timed, capture=capture if uses_graphs else None)

    monkeypatch.setattr(decode_timing, "step_graphs", graphs)
    decode_milliseconds({"model": decoder}, prompt_tokens=4, new_tokens=20, repetitions=2)
    assert captured == [0]
    assert len(replayed) == 3 * 19


@pytest.mark.parametrize(
    ("context_length", "lengths"), [(2048, (16, 32)), (48, (16, 32)), (32, (10, 22)), (3, (1, 2))]
)
def test_short_contexts_get_fewer_tokens(tiny_model, monkeypatch, context_length, lengths):
    timed_lengths: list[tuple[int, int]] = []

    def timed(start: Any, new_tokens: int, _: Any) -> tuple[float, float]:
        timed_lengths.append((start.args[1].shape[1], new_tokens))
        return 1.0, 1.0

    monkeypatch.setattr(decode_timing, "time_stream", timed)
    short = ModelConfig.from_dict({**tiny_model, "context_length": context_length})
    long = ModelConfig.from_dict({**tiny_model, "context_length": 4096})
    decoders = random_decoders({"long": long, "short": short}, "cpu")
    time_per_token(decoders, Progress())
    assert set(timed_lengths[2:]) == {lengths}, "after the warm-up"


def test_models_that_differ_in_their_schedule_share_their_weights(tiny_model):
    changes: dict[str, dict[str, Any]] = {
        "full": {},
        "none": {"schedule": [0, 0]},
        "deeper": {"num_layers": 3, "schedule": [2, 1, 1]},
        "vanilla": {"method": "vanilla", "schedule": None},
    }
    models = {
        name: ModelConfig.from_dict({**tiny_model, **changed}) for name, changed in changes.items()
    }
    decoders = random_decoders(models, "cpu")
    weights = {
        name: decoder.model.embed_tokens.weight.data_ptr() for name, decoder in decoders.items()
    }
    assert weights["full"] == weights["none"]
    assert len(set(weights.values())) == 3
    for name, decoder in decoders.items():
        assert decoder.config.evaluations_per_layer() == models[name].evaluations_per_layer()


# Costs: shares, predictions and memory

CONDITIONS = MeasurementSettings(batch_sizes=(1, 3), contexts=(4, 6), new_tokens=4, repetitions=3)


@pytest.fixture
def decoders(tiny_model) -> dict[str, Decoder]:
    decoder = Decoder(ModelConfig.from_dict(tiny_model))
    none = decoder.with_schedule(IterationSchedule.none(2))
    return {"none": none, "full": decoder}


def measure_by_flops(
    decoders: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch, constant: float = 0.0
) -> list[MeasuredCost]:
    """Measure with a fake clock: time is proportional to FLOPs, plus a constant."""
    calls = iter(range(1000))

    def timed(start: Any, new_tokens: int, _: Any) -> tuple[float, float]:
        model, prompt, *_ = start.args
        context = prompt.size(1)
        first = inference_cost(model.config, context_length=context).prefill_flops_per_token
        step = inference_cost(model.config, context_length=context + new_tokens // 2)
        # The machine gets slower between repetitions; within one, its speed is constant.
        factor = 1.0 + next(calls) // len(decoders)
        return factor * context * first, factor * (constant + step.decode_flops_per_token)

    monkeypatch.setattr(decode_timing, "time_stream", timed)
    return measure_costs(decoders, CONDITIONS, Progress())


def test_the_residual_is_zero_if_time_follows_the_cost_model(decoders, monkeypatch):
    costs = measure_by_flops(decoders, monkeypatch)
    assert [(c.batch_size, c.context) for c in costs] == [
        pair for pair in [(1, 4), (1, 6), (3, 4), (3, 6)] for _ in decoders
    ]
    for cost in costs:
        for part in (DECODING, FIRST_TOKEN):
            share = cost.shares[part]
            if cost.model == "full":
                assert share.measured == 1.0
                assert set(share.predicted.values()) == {1.0}
            else:
                assert share.predicted["evaluations"] == 2 / 5
                assert share.predicted["evaluations"] < share.predicted["FLOPs"] < 1
    lines = command_tables.benchmark_sentences(costs)[1:]
    assert "within 0.0%" in lines[0]

    metrics = costs[0].metrics()
    assert metrics["cost/batch_1_context_4/decode_ms"] == costs[0].decode_ms
    assert len(command_tables.cost_and_share_tables([c for c in costs if c.model == "full"])) == 1


def test_a_share_that_differs_from_the_prediction_is_reported(decoders, monkeypatch):
    full = inference_cost(decoders["full"].config, context_length=6).decode_flops_per_token
    costs = measure_by_flops(decoders, monkeypatch, constant=full)
    line = command_tables.benchmark_sentences(costs)[1]
    assert "decoding" in line
    shares = [cost.shares[DECODING] for cost in costs if cost.model == "none"]
    none = shares[0]
    assert none.residual() == pytest.approx(none.measured / none.predicted["FLOPs"] - 1)
    assert none.residual("evaluations") > none.residual() > 0.10
    most = max(share.residual() for share in shares)
    assert f"within {most:.1%} of it" in line


def test_peak_bytes_counts_allocations_exactly():
    def work() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        third = torch.zeros(600)
        assert len(second) + len(third) == 1100

    # 4 bytes per number; 1,100 numbers exist at the end, 1,500 at the peak.
    assert peak_bytes(work) == pytest.approx(6000, abs=128)


def test_the_peak_includes_weights_and_cache(decoders):
    costs = measure_costs(decoders, CONDITIONS, Progress())
    for cost in costs:
        decoder = decoders[cost.model]
        cache = KeyValueCache(
            decoder.config, batch_size=cost.batch_size, max_tokens=cost.context + 4
        )
        assert cost.kv_bytes == cache.num_bytes
        assert cost.weight_bytes == sum(p.nbytes for p in decoder.parameters())
        assert cost.peak_bytes > cost.kv_bytes + cost.weight_bytes
        assert cost.tokens_per_second == pytest.approx(1e3 * cost.batch_size / cost.decode_ms)
    by_name = {(c.model, c.batch_size, c.context): c.peak_bytes for c in costs}
    assert by_name["none", 3, 6] < by_name["full", 3, 6]
    assert by_name["full", 1, 6] < by_name["full", 3, 6]


def test_conditions_that_do_not_fit_are_an_error():
    wrong = MeasurementSettings(contexts=(1, 15), new_tokens=2)
    with refused(UserError, "short", "16", "15"):
        wrong.check({"long": 99, "short": 16})
    wrong.check({"long": 99, "short": 17})
