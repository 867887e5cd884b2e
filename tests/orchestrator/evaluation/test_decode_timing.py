"""Decode times and costs: models take turns, and no test depends on real times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_clock import clock_of_passes
from refusals import refused
from torch import Tensor

from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.model.cache import KeyValueCache
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
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


@pytest.fixture
def three(tiny_model) -> dict[str, Decoder]:
    return {name: Decoder(ModelConfig.from_dict(tiny_model)) for name in "abc"}


def test_models_take_turns_and_the_median_ignores_one_outlier(three):
    names = {decoder: name for name, decoder in three.items()}
    order: list[str] = []

    def seconds(decoder: Decoder, tokens: Tensor) -> float:
        is_prompt = tokens.size(1) > 1
        if is_prompt:
            order.append(names[decoder])
        factor = {6: 100, 10: 0.5}.get(len(order), 1)  # One repetition is slow, one is fast.
        return factor * (5.0 if is_prompt else {"a": 1.0, "b": 2.0, "c": 4.0}[order[-1]])

    with clock_of_passes(seconds):
        timings = decode_milliseconds(three, prompt_tokens=4, new_tokens=4, repetitions=3)
    assert order == list("abc") + list("abc") + list("bca") + list("cab")  # warm-up first
    assert {name: t.median for name, t in timings.items()} == {"a": 1e3, "b": 2e3, "c": 4e3}
    assert timings["a"].first_tokens == (5e3, 5e3, 5e3)
    assert timings["c"].steps == (400e3, 4e3, 2e3)
    assert timings["a"].spread == 0.0
    assert timings["c"].spread == pytest.approx((202e3 - 3e3) / 2)


def test_every_step_of_decoding_is_timed_and_reported(decoder):
    done: list[int] = []
    with clock_of_passes(lambda *_: 1.0):
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


def test_the_warm_up_makes_the_graphs_that_are_timed(tiny_model):
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "context_length": 24}))
    replayed: list[int] = []
    captured: list[int] = []

    def capture(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        captured.append(len(replayed))

        def replay() -> Tensor:
            replayed.append(1)
            return step()

        return replay

    decode_milliseconds(
        {"model": decoder}, prompt_tokens=4, new_tokens=20, repetitions=2, capture=capture
    )
    assert captured == [0]
    assert len(replayed) == 3 * 19


@pytest.mark.parametrize(
    ("context_length", "lengths"), [(2048, (16, 32)), (48, (16, 32)), (32, (10, 22)), (3, (1, 2))]
)
def test_short_contexts_get_fewer_tokens(tiny_model, monkeypatch, context_length, lengths):
    monkeypatch.setattr(decode_timing, "SWEEP_REPETITIONS", 1)
    short = ModelConfig.from_dict({**tiny_model, "context_length": context_length})
    long = ModelConfig.from_dict({**tiny_model, "context_length": 4096})
    decoders = random_decoders({"long": long, "short": short}, "cpu")
    read: dict[Decoder, list[int]] = {decoder: [] for decoder in decoders.values()}

    def seconds(decoder: Decoder, tokens: Tensor) -> float:
        read[decoder].append(tokens.size(1))
        return 1.0

    with clock_of_passes(seconds):
        time_per_token(decoders, Progress())
    prompt_tokens, new_tokens = lengths
    warm_up = [prompt_tokens] + [1] * (min(decode_timing.WARM_UP_TOKENS, new_tokens) - 1)
    timed = [prompt_tokens] + [1] * (new_tokens - 1)
    assert [*read.values()] == [warm_up + timed] * 2


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

CONDITIONS = MeasurementSettings(batch_sizes=(1, 3), contexts=(4, 6), new_tokens=4, repetitions=2)


@pytest.fixture
def decoders(tiny_model) -> dict[str, Decoder]:
    decoder = Decoder(ModelConfig.from_dict(tiny_model))
    none = decoder.with_schedule(IterationSchedule.none(2))
    return {"none": none, "full": decoder}


def measure_by_flops(decoders: dict[str, Decoder], constant: float = 0.0) -> list[MeasuredCost]:
    """Measure where a pass takes as many seconds as it has FLOPs in one row; a step takes a
    constant more."""
    contexts: list[int] = []  # Of each prompt so far, with the tokens that were decoded after it.

    def seconds(decoder: Decoder, tokens: Tensor) -> float:
        is_prompt = tokens.size(1) > 1
        if is_prompt:
            contexts.append(0)
        contexts[-1] += tokens.size(1)
        cost = inference_cost(decoder.config, context_length=contexts[-1])
        # The machine gets slower between repetitions; within one, its speed is constant.
        factor = 1.0 + (len(contexts) - 1) // len(decoders)
        if is_prompt:
            return factor * contexts[-1] * cost.prefill_flops_per_token
        return factor * (constant + cost.decode_flops_per_token)

    with clock_of_passes(seconds):
        return measure_costs(decoders, CONDITIONS, Progress())


def test_the_residual_is_zero_if_time_follows_the_cost_model(decoders):
    costs = measure_by_flops(decoders)
    assert [(c.batch_size, c.context) for c in costs] == [
        pair for pair in [(1, 4), (1, 6), (3, 4), (3, 6)] for _ in decoders
    ]
    for cost in costs:
        for part in (DECODING, FIRST_TOKEN):
            share = cost.shares[part]
            assert share.residual() == pytest.approx(0.0, abs=1e-12)
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


def test_a_share_that_differs_from_the_prediction_is_reported(decoders):
    full = inference_cost(decoders["full"].config, context_length=6).decode_flops_per_token
    costs = measure_by_flops(decoders, constant=full)
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
