"""Costs equal PyTorch's counts of a run, and what real layers read and keep."""

import dataclasses

import pytest
import torch
from live_tensors import LiveTensors
from model_cases import schedule_for
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iiet.cost import (
    field_parameters,
    inference_cost,
    layer_counts,
    num_parameters,
    num_trained_parameters,
    training_flops_per_token,
)
from iiet.decoder import Decoder
from iiet.freezing import freeze, trained_part
from iiet.iiad.left_out import decoder_of_kept_layers
from iiet.methods import METHODS
from iiet.methods.base import LayerCall
from iiet.methods.explicit import ExplicitEuler
from iiet.model.cache import KeyValueCache
from iiet.model.config import ModelConfig, preset
from iiet.model.facts import MethodFacts
from iiet.model.fast import plain_formulas
from iiet.model.losses import next_token_loss

SMALL = ModelConfig(
    method="vanilla", vocab_size=50, dim=8, num_layers=3, num_heads=2, num_kv_heads=1, ffn_dim=12,
    context_length=16,
)  # fmt: skip


def small(method, schedule=(2, 0, 1), **changes):
    fitting = schedule_for(method, schedule)
    return dataclasses.replace(SMALL, method=method, schedule=fitting, **changes)


# FLOPs per token of the mix and of PCformer's weighted stages, which PyTorch does not count as
# matrix products. Terms of the mix over the three layers of SMALL: in each layer the earlier
# estimates, once for all points, the layer's own in each point, and those of the hidden state.
# PCformer's levels are those of the schedule; at level 2 its prediction has two stages, else one.
SUMS = {
    "iiet": 2 * 8 * ((1 + 2 + 2) + (0 + 0 + 3) + (3 + 1 + 4)),
    "pcformer": 2 * 8 * ((1 + 1 + 2) + (0 + 0 + 3) + (3 + 1 + 4) + (2 + 1 + 1)),
    "pcformer_rk4": 2 * 8 * ((1 + 1 + 2) + (2 + 1 + 3) + (3 + 1 + 4) + 3 * 4),
}


@pytest.mark.parametrize("method", METHODS)
def test_flops_equal_what_pytorch_counts(method):
    """With plain formulas, in which the mix is made of sums, which PyTorch does not count; on a CPU
    it sees attention only with this backend, as full products."""
    config = small(method)
    time = 7
    if method in METHODS.own_classes:
        sums = SUMS.get(method, 0)
    else:
        sums = 2 * 8 * sum(layer_counts(config, layer).num_terms for layer in range(3))
    decoder = Decoder(config)
    cost = inference_cost(config, context_length=time)
    cache = KeyValueCache(config, batch_size=2, max_tokens=time)
    unseen = cost.evaluations_per_token * 4 * 8 * (time - (time + 1) / 2)

    def counted(num_tokens, **options):
        counter = FlopCounterMode(display=False)
        ids = torch.zeros(2, num_tokens, dtype=torch.long)
        with torch.no_grad(), plain_formulas(), counter, sdpa_kernel(SDPBackend.MATH):
            decoder(ids, **options)
        return counter.get_total_flops()

    assert counted(time) == 2 * time * (cost.forward_flops_per_token + unseen - sums)
    # The head runs for one token, in PyTorch's count and, spread over the prompt, in this one.
    num_prompt = time - 1
    prompt = inference_cost(config, context_length=num_prompt)
    unseen = prompt.evaluations_per_token * 4 * 8 * (num_prompt - (num_prompt + 1) / 2)
    expected = 2 * num_prompt * (prompt.prefill_flops_per_token + unseen - sums)
    assert counted(num_prompt, cache=cache, last_only=True) == pytest.approx(expected, rel=1e-12)
    assert counted(1, cache=cache) == 2 * (cost.decode_flops_per_token - sums)
    training = training_flops_per_token(config, context_length=time)
    assert training == 3 * cost.forward_flops_per_token


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


class CountingCache(KeyValueCache):
    """Adds up the bytes of the keys and values that evaluations read."""

    num_read = 0

    def update(self, *heads_and_slot):
        return self.counted(super().update(*heads_and_slot))

    def append(self, *heads_and_slot):
        return self.counted(super().append(*heads_and_slot))

    def counted(self, keys_and_values):
        self.num_read += sum(tensor.nbytes for tensor in keys_and_values)
        return keys_and_values


@pytest.mark.parametrize(
    ("method", "tied"), [(method, number % 2 == 0) for number, method in enumerate(METHODS)]
)
@torch.no_grad()
def test_bytes_equal_what_a_decoding_step_reads(method, tied):
    config = small(method, tie_embeddings=tied)
    context = 9
    decoder = Decoder(config).eval()
    method_parameters = decoder.method_parameters()
    # The method's own few values (norms, mix, gates) are left out of the count.
    parameters = [p for name, p in decoder.named_parameters() if name not in method_parameters]
    for strategy in ("exact", "last"):
        sizes = {"batch_size": 1, "max_tokens": context, "strategy": strategy}
        cache = CountingCache(config, **sizes)
        decoder(torch.zeros(1, context - 1, dtype=torch.long), cache=cache)
        cache.num_read = 0
        with ReadWeights(parameters) as read:
            decoder(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        cost = inference_cost(config, context_length=context, kv_strategy=strategy)
        assert read.num_bytes == cost.weight_bytes_per_token
        assert cache.num_read == cost.kv_bytes_read_per_token
        assert cache.num_bytes == context * cost.kv_bytes_per_token
    assert num_parameters(config) == sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize(
    ("method", "rows", "cache_bytes"),
    [
        ("iiet", 1, 1984 + 320),
        ("iiet", 2, 1984 + 640),
        ("looped", 1, 3 * 1984 + 320),
    ],
)
def test_a_processors_cache_keeps_a_layer_beside_what_an_evaluation_reads(
    method, rows, cache_bytes
):
    # A field of 1,984 bytes; 10 tokens' keys and values of 32 bytes each, for each row. A looped
    # model needs its three fields there between two runs.
    sizes = {"context_length": 10, "batch_size": rows}
    cached = inference_cost(small(method), **sizes, processor_cache_bytes=cache_bytes)
    uncached = inference_cost(small(method), **sizes, processor_cache_bytes=cache_bytes - 1)
    assert cached.weight_bytes_per_token == 4 * ((3 * 496 + 408) / rows + 8)
    assert uncached == inference_cost(small(method), **sizes)
    evaluations = uncached.evaluations_per_token
    assert uncached.weight_bytes_per_token == 4 * ((evaluations * 496 + 408) / rows + 8)


def test_a_processors_cache_holds_no_more_keys_than_a_window_lets_an_evaluation_read():
    config = small("iiet", sliding_windows=(4, 4, 4))
    # A field of 1,984 bytes, and the keys and values of four tokens of 32 bytes each.
    cached = inference_cost(config, context_length=10, processor_cache_bytes=1984 + 4 * 32)
    assert cached.weight_bytes_per_token == 4 * (3 * 496 + 408 + 8)


@pytest.mark.parametrize(("name", "millions"), [("55m", 54.9), ("340m", 341.0), ("1.3b", 1334.7)])
def test_presets_have_the_published_sizes(name, millions):
    config = preset(name)
    # The published figures count matrices only, to the digit; norms are 0.03% at most.
    norms = (2 * config.num_layers + 1) * config.dim
    assert round((num_parameters(config, include_mix=False) - norms) / 1e6, 1) == millions


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_costs_what_the_model_of_the_kept_layers_costs(method):
    config = small(method, sliding_windows=(4, None, 6), rotary_layers=(True, False, True))
    schedule = config.corrections.leaving_out([0])
    decoder = decoder_of_kept_layers(Decoder(config), schedule)
    options = {"context_length": 9, "batch_size": 2, "bytes_per_value": 2}
    cost = inference_cost(config, schedule, **options)
    assert cost == inference_cost(decoder.config, **options)
    assert cost.evaluations_per_token == sum(decoder.evaluations_per_layer())
    assert cost.num_parameters == sum(p.numel() for p in decoder.parameters())
    seen = [9, 6]
    pairs = zip(seen, decoder.evaluations_per_layer(), strict=True)
    assert cost.kv_bytes_read_per_token == 2 * 2 * 4 * sum(n * count for n, count in pairs)
    assert training_flops_per_token(config, schedule) == training_flops_per_token(decoder.config)


def test_a_truncated_backward_pass_costs_less_training():
    full = small("iiet", (3, 1, 0))
    options = METHODS["iiet"].facts.Options(differentiated_corrections=1)
    truncated = dataclasses.replace(full, method_options=options)
    # Of the first layer's four evaluations the last alone goes backward: three do not, each
    # of which would take twice its forward pass.
    whole = training_flops_per_token(full, context_length=10)
    assert whole - training_flops_per_token(truncated, context_length=10) == 2 * 3 * 1136
    assert inference_cost(truncated) == inference_cost(full)


@pytest.mark.parametrize("schedule", [(0, 2, 1), (1, 0, 2)])
def test_frozen_parts_save_what_pytorch_does_not_count(schedule):
    options = METHODS["iiet"].facts.Options(start="identity")
    config = small("iiet", schedule, method_options=options)
    time = 7

    def counted(which):
        decoder = Decoder(config)
        freeze(decoder.model, trained_part(config.corrections, which), decoder.lm_head)
        with torch.no_grad():  # At their start gates let no gradient through.
            for parameter in decoder.method_parameters().values():
                parameter.add_(0.1)
        counter = FlopCounterMode(display=False)
        ids = torch.zeros(2, time, dtype=torch.long)
        with plain_formulas(), counter, sdpa_kernel(SDPBackend.MATH):
            decoder(ids).float().square().sum().backward()
        return counter.get_total_flops()

    counted_whole = counted("all")
    whole = training_flops_per_token(config, context_length=time)
    for trained in ("corrected", "added"):
        part = trained_part(config.corrections, trained)
        frozen = range(part.first_layer)
        # Sums of the mix, which PyTorch does not count; and attention to later tokens, which it
        # does.
        sums = sum(layer_counts(config, layer).num_terms for layer in frozen) * 2 * 2 * 8
        unseen = 2 * 4 * 8 * (time - (time + 1) / 2)
        num_unseen = sum(1 + config.corrections[layer] for layer in frozen) + (trained == "added")
        saved = whole - training_flops_per_token(config, context_length=time, trained=trained)
        expected = 2 * time * (saved - sums + num_unseen * unseen)
        assert counted_whole - counted(trained) == expected


def test_trained_parameters_are_those_that_are_not_frozen():
    options = METHODS["iiet"].facts.Options(start="identity")
    config = small("iiet", (0, 2, 0), method_options=options)
    assert num_trained_parameters(config) == num_parameters(config)
    # The last two layers: two norms with their blends, the damping, and rows of the mix.
    added = 2 * (2 * 3 * 8 + 8) + 2 * 3 + 2 * 4
    assert num_trained_parameters(config, "added") == added
    assert num_trained_parameters(config, "corrected") == added + field_parameters(config)


BATCH = 2
TIME = 16
DIM = 64
LAYERS = 4
CASES = [
    *((method, {}) for method in METHODS),
    ("iiet", {"damping": 0.5}),
    ("iiet", {"damping": 0.5, "learn_damping": "scalar"}),
    ("iiet", {"learn_damping": "vector"}),
    ("iiet", {"start": "identity"}),
    ("iiet", {"start": "identity", "differentiated_corrections": 2}),
    ("iiet", {"differentiated_corrections": 2}),
    ("iiet", {"differentiated_corrections": 1, "learn_damping": "scalar"}),
    ("iiet", {"reinject_prediction": True, "damping": 0.5}),
    ("iiet", {"reinject_prediction": True, "differentiated_corrections": 1}),
]


def wide(method, **options):
    return preset(
        "tiny", method=method, dim=DIM, num_layers=LAYERS, num_heads=1, ffn_dim=12, vocab_size=32,
        context_length=TIME, method_options=options or None,
        schedule=schedule_for(method, (3, 0, 1, 2)),
    )  # fmt: skip


class KeepsNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_layer_keeps_as_many_tensors_as_are_counted(method, options):
    config = wide(method, **options)
    decoder = Decoder(config)
    kind = METHODS[method]
    for layer in decoder.model.layers:
        layer.field = lambda x, _context, _slot: KeepsNothing.apply(x)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveTensors(decoder) as live:
        hidden = torch.randn(BATCH, TIME, DIM, requires_grad=True)
        state = kind.start(hidden)
        hiddens = [hidden]
        num_kept_by_layer = []
        for number, layer in enumerate(decoder.model.layers):
            call = LayerCall(config.corrections[number], None, shared=decoder.model.shared)
            bytes_before = live.now
            hidden, state = layer(hidden, state, call)
            hiddens.append(hidden)
            num_kept_by_layer.append((live.now - bytes_before) / hidden.nbytes - 1)
    counted = [
        layer_counts(config, number).num_kept + kind.facts.num_left for number in range(LAYERS)
    ]
    # Norms keep two numbers a token, too.
    assert num_kept_by_layer == pytest.approx(counted, abs=0.3)


class Noisy(ExplicitEuler):
    """Draws noise before its field."""

    facts = MethodFacts(is_random=True)

    def advance(self, evaluate, hidden, state, **others):
        return super().advance(evaluate, torch.dropout(hidden, 0.5, True), state, **others)


def test_a_recomputed_layer_draws_the_same_random_numbers_again(monkeypatch):
    monkeypatch.setitem(METHODS.own_classes, "noisy", Noisy)
    decoder = Decoder(wide("noisy"))
    ids = torch.randint(32, (2, TIME))
    gradients = []
    for decoder.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        loss = next_token_loss(decoder(ids), ids)
        gradients.append(torch.autograd.grad(loss, list(decoder.parameters())))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_method_draws_no_random_numbers_unless_it_says_so():
    for method, kind in METHODS.items():
        decoder = Decoder(wide(method)).train()
        state_before = torch.get_rng_state()
        decoder(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
        assert kind.facts.is_random or torch.equal(torch.get_rng_state(), state_before), method
        idle = [name for name, p in decoder.named_parameters() if p.grad is None]
        assert not idle or kind.facts.has_corrections
