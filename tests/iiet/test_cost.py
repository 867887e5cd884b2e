"""Costs equal counts by hand, PyTorch's counts of a run, and the size of a built model."""

import dataclasses
import itertools

import pytest
import torch
from method_schedules import schedule_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iiet.arithmetic import plain_formulas
from iiet.cache import KeyValueCache
from iiet.config import ModelConfig, preset
from iiet.cost import inference_cost, num_parameters, training_flops_per_token
from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.schedule import IterationSchedule

SMALL = ModelConfig(
    method="vanilla",
    vocab_size=50,
    dim=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    ffn_dim=12,
    context_length=16,
)
# Per token and evaluation of SMALL, counted by hand: q 8x8, k and v 8x4 each, o 8x8, three of 8x12.
PROJECTIONS = 2 * (64 + 32 + 32 + 64 + 3 * 96)
HEAD = 2 * 8 * 50


def small(method, schedule=(2, 0, 1)):
    return dataclasses.replace(SMALL, method=method, schedule=schedule_for(method, schedule))


# Terms of the mix over the three layers of SMALL. Per layer: earlier estimates before the first
# correction, corrections, the hidden state. Under (2, 0, 1) where there is a schedule.
MIX_TERMS = {
    "iiet": (1 + 2 + 2) + (0 + 0 + 3) + (3 + 1 + 4),
    "pcformer": (1 + 1 + 2) + (2 + 1 + 3) + (3 + 1 + 4),
    "pcformer_rk4": (1 + 1 + 2) + (2 + 1 + 3) + (3 + 1 + 4),
}


def sums_by_hand(method):
    """FLOPs of the sums, which PyTorch does not count as matrix products."""
    return 2 * 8 * MIX_TERMS.get(method, 0)


def counted_flops(run):
    """PyTorch's count; on a CPU it sees attention only with this backend, as full products.

    With plain formulas, in which the mix is made of sums, which it does not count.
    """
    counter = FlopCounterMode(display=False)
    with plain_formulas(), counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def test_vanilla_by_hand():
    cost = inference_cost(SMALL, context_length=10)
    assert cost.evaluations_per_token == 3
    # A token sees 1 to 10 tokens, 5.5 on average: scores and values, 2 x 8 each.
    body = 3 * (PROJECTIONS + 4 * 8 * 5.5)
    assert cost.forward_flops_per_token == body + HEAD
    assert cost.prefill_flops_per_token == body + HEAD / 10
    assert cost.decode_flops_per_token == 3 * (PROJECTIONS + 4 * 8 * 10) + HEAD
    assert cost.kv_bytes_per_token == 3 * 2 * 4 * 4
    assert cost.kv_bytes_read_per_token == 10 * 3 * 2 * 4 * 4
    field = 64 + 32 + 32 + 64 + 3 * 96 + 16
    assert cost.weight_bytes_per_token == 4 * (3 * field + 400 + 8 + 8)
    assert cost.num_parameters == 3 * field + 400 + 8
    assert training_flops_per_token(SMALL, context_length=10) == 3 * (body + HEAD)


def test_iiet_by_hand():
    config = small("iiet", (2, 0, 1))
    cost = inference_cost(config, context_length=10)
    assert cost.evaluations_per_token == 6
    mix = 2 * 8 * MIX_TERMS["iiet"]
    assert cost.decode_flops_per_token == 6 * (PROJECTIONS + 4 * 8 * 10) + HEAD + mix
    assert cost.kv_bytes_per_token == 6 * 2 * 4 * 4
    last = inference_cost(config, bytes_per_value=2, kv_strategy="last")
    assert last.kv_bytes_per_token == 3 * 2 * 4 * 2
    # Six evaluations read 16 tokens each, wherever those lie.
    assert last.kv_bytes_read_per_token == 16 * 6 * 2 * 4 * 2


# Counted by hand for SMALL under (2, 0, 1), at 10 tokens. An evaluation: 960 operations for its
# matrices, 320 for a token that sees 10, 176 for the mean one of a prompt, which sees 5.5; the head
# 800, of which a prompt's token has a tenth; a gate 2 x 16 in each layer. A field has 496 values, a
# token reads 416 beside them.
# Columns: evaluations, decode FLOPs, prefill FLOPs, KV bytes, weight bytes, parameters.
BY_HAND = {
    "vanilla": (3, 3 * 1280 + 800, 3 * 1136 + 80, 96, 7616, 1896),
    "iiet": (6, 6 * 1280 + 800 + 256, 6 * 1136 + 80 + 256, 192, 13568, 1896 + 18 + 96),
    "pcformer": (9, 9 * 1280 + 800 + 288, 9 * 1136 + 80 + 288, 288, 19520, 1896 + 18 + 96 + 33),
    "pcformer_rk4": (
        15, 15 * 1280 + 800 + 288, 15 * 1136 + 80 + 288, 480, 31424, 1896 + 18 + 96 + 65,
    ),
    "ode_rk2": (6, 6 * 1280 + 800, 6 * 1136 + 80, 192, 13568, 1896),
    "ode_rk4": (12, 12 * 1280 + 800, 12 * 1136 + 80, 384, 25472, 1896),
    "ode_rk2_gated": (6, 6 * 1280 + 800 + 96, 6 * 1136 + 80 + 96, 192, 13568, 1896 + 51),
    # 2 runs after the first, in every layer.
    "looped": (9, 9 * 1280 + 800, 9 * 1136 + 80, 288, 19520, 1896),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_hand(method):
    cost = inference_cost(small(method), context_length=10)
    assert (
        cost.evaluations_per_token,
        cost.decode_flops_per_token,
        cost.prefill_flops_per_token,
        cost.kv_bytes_per_token,
        cost.weight_bytes_per_token,
        cost.num_parameters,
    ) == BY_HAND[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_reading_a_prompt_equals_what_pytorch_counts(method, tied):
    config, time = dataclasses.replace(small(method), tie_embeddings=tied), 7
    decoder = Decoder(config)
    cache = KeyValueCache(config, batch_size=2, max_tokens=time)
    prompt = torch.zeros(2, time, dtype=torch.long)
    counted = counted_flops(lambda: decoder(prompt, cache=cache, last_only=True))
    cost = inference_cost(config, context_length=time)
    unseen = cost.evaluations_per_token * 4 * 8 * (time - (time + 1) / 2)
    expected = cost.prefill_flops_per_token + unseen - sums_by_hand(method)
    # The head runs for one token, in PyTorch's count and, spread over the prompt, in this one.
    assert counted == pytest.approx(2 * time * expected, rel=1e-12)


class ReadWeights(TorchDispatchMode):
    """Adds up the bytes of the parameters that operations take, views of them included."""

    def __init__(self, parameters):
        super().__init__()
        self.owners = {p.untyped_storage().data_ptr() for p in parameters}
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and self.owns(tensor):
                # Looking up one token reads one row.
                reads_row = "embedding" in str(function) or "index_select" in str(function)
                self.num_bytes += result.nbytes if reads_row else tensor.nbytes
        return result

    def owns(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.owners


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_equal_what_a_decoding_step_reads(method, tied):
    config = dataclasses.replace(small(method), tie_embeddings=tied)
    decoder = Decoder(config).eval()
    cache = KeyValueCache(config, batch_size=1, max_tokens=4)
    # The method's own few values (norms, mix, gates) are left out of the count.
    own = decoder.method_parameters()
    parameters = [p for name, p in decoder.named_parameters() if name not in own]
    with torch.no_grad():
        decoder(torch.zeros(1, 3, dtype=torch.long), cache=cache)
        with ReadWeights(parameters) as read:
            decoder(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert read.num_bytes == inference_cost(config).weight_bytes_per_token


class CountingCache(KeyValueCache):
    """Adds up the bytes of the keys and values that evaluations read."""

    num_read = 0

    def _write(self, slot, *pairs):
        held = super()._write(slot, *pairs)
        self.num_read += sum(tensor.nbytes for tensor in held)
        return held


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["exact", "last"])
def test_kv_bytes_read_equal_what_a_decoding_step_reads(method, strategy):
    config, batch, context = small(method), 3, 9
    decoder = Decoder(config).eval()
    cache = CountingCache(config, batch_size=batch, max_tokens=context, strategy=strategy)
    with torch.no_grad():
        decoder(torch.zeros(batch, context - 1, dtype=torch.long), cache=cache)
        cache.num_read = 0
        decoder(torch.zeros(batch, 1, dtype=torch.long), cache=cache)
    cost = inference_cost(config, context_length=context, batch_size=batch, kv_strategy=strategy)
    assert cache.num_read == batch * cost.kv_bytes_read_per_token


def test_rows_of_a_batch_share_the_weights_that_a_step_reads():
    config = small("iiet")
    alone, four = (inference_cost(config, batch_size=rows) for rows in (1, 4))
    # Six evaluations of 496 values, head and last norm for all; an embedding for each.
    assert alone.weight_bytes_per_token == 4 * (6 * 496 + 408 + 8)
    assert four.weight_bytes_per_token == 4 * ((6 * 496 + 408) / 4 + 8)
    assert four.kv_bytes_read_per_token == alone.kv_bytes_read_per_token


def test_a_processors_cache_keeps_a_layer_beside_what_an_evaluation_reads():
    config = small("iiet")
    # A field of 1,984 bytes; 10 tokens' keys and values of 32 bytes each, for each row.
    for rows, fits in [(1, 1984 + 320), (2, 1984 + 640)]:
        sizes = {"context_length": 10, "batch_size": rows}
        kept = inference_cost(config, **sizes, processor_cache_bytes=fits)
        none = inference_cost(config, **sizes, processor_cache_bytes=fits - 1)
        assert kept.weight_bytes_per_token == 4 * ((3 * 496 + 408) / rows + 8)
        assert none == inference_cost(config, **sizes)


H100 = 50_000_000
"""Bytes of its L2 cache."""


@pytest.mark.parametrize(
    ("name", "r", "batch", "processor_cache", "gigabytes"),
    [
        # Fields of 340m: 25.7 MB in bfloat16, and 65.5 MB for the head.
        ("340m", 3, 1, 0, 2.53),
        ("340m", 0, 1, 0, 0.68),
        ("340m", 3, 1, H100, 0.68),
        # 8.4 MB of keys and values for each row are read between two corrections.
        ("340m", 3, 2, H100, 0.34),
        ("340m", 3, 4, H100, 2.53 / 4),
        # Fields of 1.3b, 100.3 MB, and 131 MB for the head: too large for it.
        ("1.3b", 3, 1, H100, 9.76),
        ("1.3b", 0, 1, H100, 2.54),
    ],
)
def test_weight_bytes_of_published_sizes(name, r, batch, processor_cache, gigabytes):
    config = preset(name, schedule=r)
    cost = inference_cost(
        config, bytes_per_value=2, batch_size=batch, processor_cache_bytes=processor_cache
    )
    assert cost.weight_bytes_per_token / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_corrections_read_keys_and_values_as_often_as_they_store_them():
    # 340m in bfloat16: 4,096 bytes a token and slot, 2,048 tokens, 24 or 96 slots.
    none, three = (inference_cost(preset("340m", schedule=r), bytes_per_value=2) for r in (0, 3))
    assert none.kv_bytes_read_per_token == 4096 * 2048 * 24
    assert three.kv_bytes_read_per_token == 4096 * 2048 * 96


@pytest.mark.parametrize("method", METHODS)
def test_forward_equals_what_pytorch_counts(method):
    config, time = small(method), 7
    decoder = Decoder(config)
    counted = counted_flops(lambda: decoder(torch.zeros(2, time, dtype=torch.long)))
    cost = inference_cost(config, context_length=time)
    # PyTorch counts each token's attention over all 7 tokens, causal attention needs 4 on average.
    unseen = cost.evaluations_per_token * 4 * 8 * (time - (time + 1) / 2)
    expected = cost.forward_flops_per_token + unseen - sums_by_hand(method)
    assert counted == 2 * time * expected


@pytest.mark.parametrize("method", METHODS)
def test_decoding_a_token_equals_what_pytorch_counts(method):
    config, context = small(method), 9
    decoder = Decoder(config)
    cache = KeyValueCache(config, batch_size=1, max_tokens=context)
    with torch.no_grad():
        decoder(torch.zeros(1, context - 1, dtype=torch.long), cache=cache)
    counted = counted_flops(lambda: decoder(torch.zeros(1, 1, dtype=torch.long), cache=cache))
    cost = inference_cost(config, context_length=context)
    assert counted == cost.decode_flops_per_token - sums_by_hand(method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["exact", "last"])
def test_kv_bytes_equal_the_allocated_cache(method, strategy):
    for schedule in [(0, 0, 0), (2, 0, 1), (3, 3, 3)]:
        config = small(method, schedule)
        cache = KeyValueCache(config, batch_size=2, max_tokens=5, strategy=strategy)
        cost = inference_cost(config, kv_strategy=strategy)
        assert cache.num_bytes == 2 * 5 * cost.kv_bytes_per_token


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_those_of_a_built_model(method, tied):
    config = dataclasses.replace(small(method), tie_embeddings=tied)
    built = sum(parameter.numel() for parameter in Decoder(config).parameters())
    assert num_parameters(config) == built
    own = sum(parameter.numel() for parameter in Decoder(config).method_parameters().values())
    assert num_parameters(config, include_mix=False) == built - own


@pytest.mark.parametrize(("name", "millions"), [("55m", 54.9), ("340m", 341.0), ("1.3b", 1334.7)])
def test_presets_have_the_published_sizes(name, millions):
    config = preset(name)
    counted = num_parameters(config, include_mix=False)
    # The published figures count matrices only, to the digit; norms are 0.03% at most.
    norms = (2 * config.num_layers + 1) * config.dim
    assert round((counted - norms) / 1e6, 1) == millions
    assert counted / 1e6 == pytest.approx(millions, rel=6e-4)


def test_cost_rises_with_every_correction_and_the_budgets_agree():
    config = small("iiet", (3, 3, 3))
    schedules = [IterationSchedule(s) for s in [(0, 0, 0), (1, 0, 0), (1, 0, 1), (2, 1, 1)]]
    costs = [inference_cost(config, schedule) for schedule in schedules]
    for cheaper, dearer in itertools.pairwise(costs):
        assert cheaper.forward_flops_per_token < dearer.forward_flops_per_token
        assert cheaper.kv_bytes_per_token < dearer.kv_bytes_per_token
        assert cheaper.weight_bytes_per_token < dearer.weight_bytes_per_token
        assert cheaper.num_parameters == dearer.num_parameters
    for cost, schedule in zip(costs, schedules, strict=True):
        assert cost == inference_cost(dataclasses.replace(config, schedule=schedule))


def test_a_truncated_backward_pass_costs_less_training():
    full = small("iiet", (3, 1, 0))
    options = METHODS["iiet"].Options(differentiated_corrections=1)
    truncated = dataclasses.replace(full, method_options=options)
    forward = inference_cost(full, context_length=10).forward_flops_per_token
    assert training_flops_per_token(full, context_length=10) == 3 * forward
    # Of the first layer's four evaluations the last alone goes backward: three do not, each
    # of which would take twice its forward pass.
    saved = 2 * 3 * (PROJECTIONS + 4 * 8 * 5.5)
    assert training_flops_per_token(truncated, context_length=10) == 3 * forward - saved
    assert inference_cost(truncated) == inference_cost(full)


def test_without_corrections_the_cost_is_that_of_vanilla_plus_the_mix():
    vanilla, iiet = inference_cost(SMALL), inference_cost(small("iiet", (0, 0, 0)))
    difference = iiet.decode_flops_per_token - vanilla.decode_flops_per_token
    assert difference == 2 * 8 * (2 + 3 + 4)
    assert iiet.kv_bytes_per_token == vanilla.kv_bytes_per_token


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="context_length must be between 1 and the model's 16"):
        inference_cost(SMALL, context_length=17)
    with pytest.raises(ValueError, match="shared"):
        inference_cost(SMALL, kv_strategy="shared")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        inference_cost(SMALL, batch_size=0)
    with pytest.raises(ValueError, match="processor_cache_bytes must be at least 0, got -1"):
        inference_cost(SMALL, processor_cache_bytes=-1)
    with pytest.raises(ValueError, match="schedule"):
        inference_cost(SMALL, IterationSchedule((1, 1, 1)))
    with pytest.raises(ValueError, match="schedule"):
        inference_cost(small("iiet"), IterationSchedule((1, 1)))
