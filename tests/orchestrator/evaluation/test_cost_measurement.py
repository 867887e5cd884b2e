"""Measured costs: shares, predictions and memory. No test depends on real times."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iiet.cache import KeyValueCache
from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.schedule import IterationSchedule
from orchestrator.evaluation import decode_timing
from orchestrator.evaluation.cost_measurement import (
    DECODING,
    FIRST_TOKEN,
    MeasuredCost,
    MeasurementSettings,
    measure_costs,
    peak_bytes,
)
from orchestrator.reporting import command_tables
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

CONDITIONS = MeasurementSettings(batch_sizes=(1, 3), contexts=(4, 6), new_tokens=4, repetitions=3)


@pytest.fixture
def decoders(tiny_model: dict[str, Any]) -> dict[str, Decoder]:
    decoder = Decoder(ModelConfig.from_dict(tiny_model))
    none = decoder.with_schedule(IterationSchedule.none(2))
    return {"none": none, "full": decoder}


def measure_by_flops(
    decoders: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch, constant: float = 0.0
) -> list[MeasuredCost]:
    """Measure with a fake clock: time is proportional to FLOPs, plus a constant."""
    calls = iter(range(1000))

    def timed(start: Any, new_tokens: int, _: Any) -> tuple[float, float]:
        model, prompt = start.args
        context = prompt.size(1)
        first = inference_cost(model.config, context_length=context).prefill_flops_per_token
        step = inference_cost(model.config, context_length=context + new_tokens // 2)
        # The machine gets slower between repetitions; within one, its speed is constant.
        factor = 1.0 + next(calls) // len(decoders)
        return factor * context * first, factor * (constant + step.decode_flops_per_token)

    monkeypatch.setattr(decode_timing, "time_stream", timed)
    return measure_costs(decoders, CONDITIONS, Progress())


def test_the_residual_is_zero_if_time_follows_the_cost_model(
    decoders: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert lines[0].startswith("decoding: FLOPs predict every share within 0.0% of it")

    metrics = costs[0].metrics()
    assert metrics["cost/batch_1_context_4/decode_ms"] == costs[0].decode_ms
    assert len(command_tables.cost_and_share_tables([c for c in costs if c.model == "full"])) == 1


def test_a_share_that_differs_from_the_prediction_is_reported(
    decoders: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = inference_cost(decoders["full"].config, context_length=6).decode_flops_per_token
    costs = measure_by_flops(decoders, monkeypatch, constant=full)
    assert "decoding" in (line := command_tables.benchmark_sentences(costs)[1])
    shares = [cost.shares[DECODING] for cost in costs if cost.model == "none"]
    none = shares[0]
    assert none.residual() == pytest.approx(none.measured / none.predicted["FLOPs"] - 1)
    assert none.residual("evaluations") > none.residual() > 0.10
    most = max(share.residual() for share in shares)
    assert f"within {most:.1%} of it" in line


def test_peak_bytes_counts_allocations_exactly() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = torch.zeros(500)
        del first
        third = torch.zeros(600)
        assert len(second) + len(third) == 1100

    # 4 bytes per number; 1,100 numbers exist at the end, 1,500 at the peak.
    assert peak_bytes(work) == pytest.approx(6000, abs=128)


def test_the_peak_includes_weights_and_cache(decoders: dict[str, Decoder]) -> None:
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


def test_conditions_that_do_not_fit_are_one_error() -> None:
    wrong = MeasurementSettings(batch_sizes=(0,), contexts=(15,), new_tokens=1, repetitions=0)
    with pytest.raises(UserError) as error:
        wrong.check({"long": 99, "short": 15})
    for part in (
        "batch_sizes must be at least 1, got 0",
        "new_tokens must be at least 2, got 1",
        "repetitions must be at least 1, got 0",
        "short reads 15 tokens, not the 15 + 1 of prompt and new tokens",
    ):
        assert part in str(error.value)
