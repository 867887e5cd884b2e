"""Fields in bfloat16 with copies of their float32 weights: as close to float32 as autocast is, with
exact sums of gradients. A CPU computes so only where `Decoder.half_weights` is set.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from method_schedules import schedule_for
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from iiet import METHODS, Decoder, next_token_loss, preset
from iiet.context import make_context
from iiet.cpu_kernels import rotate_into
from iiet.half_weights import GradientSum, HalfWeights
from iiet.rope import Rope, rotate

SIZES = {"vocab_size": 48, "dim": 32, "num_layers": 3, "num_heads": 2, "ffn_dim": 40}


def decoder_of(method="iiet"):
    torch.manual_seed(0)
    schedule = schedule_for(method, (2, 0, 3))
    sizes = {**SIZES, "context_length": 16, "initializer_std": 0.15}
    decoder = Decoder(preset("tiny", method=method, schedule=schedule, **sizes))
    decoder.half_weights = HalfWeights(decoder.fields)
    return decoder


def tokens(rows=4):
    return torch.randint(48, (rows, 16), generator=torch.Generator().manual_seed(1))


def loss_of(model, ids, *, half=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        return next_token_loss(model(ids), ids)


def gradients(decoder, *, half=True, model=None):
    decoder.zero_grad()
    loss_of(model or decoder, tokens(), half=half).backward()
    return held(decoder)


def held(decoder):
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def error(found, exact):
    difference = sum((found[name] - exact[name]).square().sum() for name in exact)
    return (difference / sum(value.square().sum() for value in exact.values())).sqrt().item()


def check_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_about_as_close_to_float32_as_those_of_autocast(method):
    decoder = decoder_of(method)
    exact, found = gradients(decoder, half=False), gradients(decoder)
    decoder.half_weights = None
    cast = gradients(decoder)
    assert found.keys() == cast.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert 0 < error(found, exact) < 2 * error(cast, exact) < 0.1


@pytest.mark.parametrize("has_gradients", [False, True])
def test_the_last_sum_of_a_field_is_not_rounded(has_gradients):
    field, x = decoder_of().fields[0].bfloat16(), torch.randn(4, 16, 32).bfloat16()
    context = make_context(x, decoder_of().rope)
    seen = {}
    field.feed_forward_norm.register_forward_hook(lambda _, given, __: seen.update(u=given[0]))
    field.feed_forward.register_forward_hook(lambda _, __, found: seen.update(change=found))
    with torch.set_grad_enabled(has_gradients):
        found = field(x, context, dtype=torch.float32)
    assert torch.equal(found, seen["u"].float() + seen["change"].float())


def test_recomputed_layers_have_the_same_gradients():
    decoder = decoder_of()
    kept = gradients(decoder)
    decoder.activation_checkpointing = True
    check_same(gradients(decoder), kept)


def test_copies_are_those_of_the_last_refresh():
    decoder = decoder_of()
    with torch.no_grad():
        before = loss_of(decoder, tokens())
        for field in decoder.fields:
            field.feed_forward.down.weight.mul_(2)
        assert loss_of(decoder, tokens()) == before
        decoder.half_weights.refresh()
        assert loss_of(decoder, tokens()) != before
    assert loss_of(decoder, tokens()) == loss_of(decoder.with_schedule(decoder.schedule), tokens())


def test_without_autocast_they_are_not_used():
    decoder = decoder_of()
    exact = gradients(decoder, half=False)
    decoder.half_weights = None
    check_same(gradients(decoder, half=False), exact)


def test_a_copied_decoder_has_copies_of_its_own():
    decoder = decoder_of()
    expected = gradients(decoder)
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    decoder.half_weights.refresh()
    twin.half_weights.refresh()
    check_same(gradients(twin), expected)


def test_passes_accumulate_in_float32():
    decoder = decoder_of()
    once = gradients(decoder)
    for _ in range(2):
        loss_of(decoder, tokens()).backward()
    check_same(held(decoder), {name: gradient * 3 for name, gradient in once.items()})


def test_a_backward_pass_that_stops_early_leaves_nothing_behind():
    decoder = decoder_of()
    expected = gradients(decoder)
    decoder.zero_grad()
    loss = loss_of(decoder, tokens())
    torch.autograd.grad(loss, decoder.norm.weight, retain_graph=True)
    torch.autograd.grad(loss, decoder.embedding.weight, retain_graph=True)
    loss.backward()
    check_same(held(decoder), expected)


def test_frozen_parameters_get_no_gradients():
    decoder = decoder_of()
    expected = gradients(decoder)
    frozen = [name for name, _ in decoder.named_parameters() if "feed_forward" in name]
    for name in frozen:
        decoder.get_parameter(name).requires_grad_(False)
    decoder.half_weights = HalfWeights(decoder.fields)
    check_same(gradients(decoder), {n: g for n, g in expected.items() if n not in frozen})


def test_a_replicated_model_gets_them_as_well():
    decoder = decoder_of()
    alone = gradients(decoder)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = DistributedDataParallel(decoder, find_unused_parameters=True)
        replicated = gradients(decoder, model=model)
    finally:
        dist.destroy_process_group()
    check_same({name: replicated[name] for name in alone}, alone)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Read by the compiler.
def test_one_compiled_graph_serves_all_evaluations():
    torch.compiler.reset()
    decoder = decoder_of()
    expected = gradients(decoder)
    graphs = CompileCounterWithBackend("aot_eager")
    for field in decoder.fields:
        field.forward = torch.compile(field.forward, backend=graphs, fullgraph=True)
    assert error(gradients(decoder), expected) < 0.02
    gradients(decoder)
    assert graphs.frame_count == 1


def test_a_gradient_sum_is_exact():
    torch.manual_seed(0)
    total, expected = GradientSum(), torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(50):
        grad, x = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 6).bfloat16()
        total.add_product(grad, x)
        expected += grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    torch.testing.assert_close(total.take().double(), expected, rtol=1e-2, atol=5e-2)
    assert total.take() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotating_by_halves(dtype):
    heads = torch.randn(2, 5, 3, 8, dtype=dtype)
    cos, sin = Rope(8, 5, 10.0).at(slice(0, 5), heads.device, dtype)
    expected = rotate(heads, cos, sin)
    target = torch.empty_like(heads)
    rotate_into(target, heads, cos, *sin.chunk(2, -1))
    torch.testing.assert_close(target, expected)
    second, first = sin.chunk(2, -1)
    rotate_into(target, target, cos, first, second)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-9
    torch.testing.assert_close(target, heads, rtol=tolerance, atol=tolerance)
