"""Each hand-written form equals the plain formula in values and gradients, and replaces bare layers
only."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_cases import make_model, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iiet import Decoder, KeyValueCache, next_token_loss, plain_formulas, preset
from iiet.model import fast
from iiet.model.context import make_context
from iiet.model.fast import (
    add_few_rows_product,
    can_use_fast_linear,
    few_rows_product,
    few_rows_products,
    gated_product,
    normalize_few_rows,
    rms_norm,
    rotate_in_place,
)
from iiet.model.layers import FeedForward, RMSNorm, Rope, rotate
from iiet.model.losses import LazyLogits

IDS = tokens(2, 8)


def tensor(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check_equal(fast, plain, *inputs):
    """Compare values with and without gradients, gradients, and these with finite differences."""
    torch.testing.assert_close(fast(*inputs), plain(*inputs))
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), plain(*inputs))
    outputs = [f(*inputs) for f in (fast, plain)]
    output_gradient = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, output_gradient) for output in outputs]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(fast, inputs)


def tables(time, head_dim=4, theta=10.0, dtype=torch.float64):
    return Rope(head_dim, time, theta).at(torch.arange(time), torch.device("cpu"), dtype)


def test_rms_norm():
    torch.manual_seed(0)

    def plain(x, weight):
        return F.rms_norm(x, (6,), weight, 1e-2)

    check_equal(lambda x, weight: rms_norm(x, weight, 1e-2), plain, tensor(2, 3, 6), tensor(6))


def test_gated_product():
    torch.manual_seed(0)

    def plain(gate, up, down):
        return F.linear(F.silu(gate) * up, down)

    check_equal(gated_product, plain, tensor(2, 3, 6), tensor(2, 3, 6), tensor(4, 6))


def test_rotation_in_half_precision_is_rounded_once():
    torch.manual_seed(0)
    rope = tables(5, dtype=torch.bfloat16)
    assert {table.dtype for table in rope} == {torch.float32}
    heads = torch.randn(2, 5, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(rotate(heads, *rope), rotate(heads.float(), *rope).bfloat16())


@pytest.fixture(params=["GenuineIntel", "AuthenticAMD"])
def _processor(request, monkeypatch):
    """A processor of this vendor, as Linux describes it."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"vendor_id : {request.param}")
    fast.is_intel_processor.cache_clear()
    yield
    fast.is_intel_processor.cache_clear()


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 7), (150, 300), (300, 150), (600, 1000)])
@torch.no_grad()
def test_products_of_few_rows(rows, shape):
    linear = nn.Linear(shape[1], shape[0], bias=False).double()
    x = torch.randn(rows, 1, shape[1], dtype=torch.float64)
    product = few_rows_product(x, linear.weight, rows)
    torch.testing.assert_close(product.view(rows, 1, -1), linear(x))
    base = torch.randn(rows, 1, shape[0], dtype=torch.float64)
    torch.testing.assert_close(add_few_rows_product(base, x, linear.weight, rows), base + linear(x))


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("sizes", [(5, 2, 6), (180, 200, 190), (5, 200, 6)])
@torch.no_grad()
def test_several_products_stand_beside_each_other(sizes, rows):
    """The products of small weights are contiguous, those of large ones may be transposed."""
    weights = [torch.randn(size, 200, dtype=torch.float64) for size in sizes]
    x = torch.randn(rows, 1, 200, dtype=torch.float64)
    products = few_rows_products(x, weights, rows)
    assert products.is_contiguous()
    expected = torch.cat([F.linear(x, weight) for weight in weights], -1)
    torch.testing.assert_close(products.view_as(expected), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_norms_and_rotations_of_few_rows(rows, dtype):
    norm = RMSNorm(7, eps=1e-2).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(rows, 1, 7, dtype=dtype)
    normed = normalize_few_rows(x, norm)
    assert normed.dtype == dtype
    with plain_formulas():
        torch.testing.assert_close(normed.view_as(x), norm(x))
    heads = torch.randn(rows, 2, 1, 4, dtype=torch.float64)
    expected = rotate(heads, *tables(1))
    rotate_in_place(heads, *tables(1))
    torch.testing.assert_close(heads, expected)


def logits_and_gradients(decoder):
    """Return the logits of training and of decoding, and all gradients."""
    decoder.zero_grad()
    logits = decoder(IDS)
    next_token_loss(logits, IDS).backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    cache = KeyValueCache(decoder.config, batch_size=2, max_tokens=8, dtype=torch.float64)
    with torch.inference_mode():
        steps = [decoder(part, cache=cache) for part in IDS.split([4, 1, 1, 2], 1)]
    return {"logits": logits.detach(), "steps": torch.cat(steps, 1), **gradients}


FORMS = {rms_norm, gated_product, few_rows_product, few_rows_products, add_few_rows_product}


def forms_called(run):
    """Return what a function returns, and which of the forms it has called."""
    names = {form.__code__: form.__name__ for form in FORMS}
    called = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code in names:
            called.add(names[frame.f_code])

    sys.setprofile(note)
    try:
        return run(), called
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("method", ["vanilla", "iiet", "pcformer"])
def test_a_model_is_the_same_with_and_without_them(method, monkeypatch):
    decoder = make_model(method)
    fast_results, called = forms_called(lambda: logits_and_gradients(decoder))
    assert called == {form.__name__ for form in FORMS}
    with plain_formulas():
        plain_results, called = forms_called(lambda: logits_and_gradients(decoder))
    assert not called
    monkeypatch.setattr(fast, "ENABLED", False)
    results_when_off, called = forms_called(lambda: logits_and_gradients(make_model(method)))
    assert not called
    for name, value in fast_results.items():
        torch.testing.assert_close(plain_results[name], value)
        torch.testing.assert_close(results_when_off[name], value)


def test_the_switch_turns_off_forms_for_cpus_and_nothing_else(monkeypatch):
    """The switch counts at each call, also of a decoder that was made before it."""
    decoder = make_model()
    monkeypatch.setattr(fast, "ENABLED", False)
    assert forms_called(lambda: logits_and_gradients(decoder))[1] == set()
    for model in (decoder, make_model()):
        assert isinstance(model(IDS, loss_fn=lambda logits: logits), LazyLogits)


class Wrapped(torch.Tensor):
    """A weight that is a tensor subclass, such as a quantized or a distributed one."""

    def __tensor_flatten__(self):
        raise NotImplementedError


@pytest.mark.parametrize("change", ["none", "hook", "bias", "kind", "weight", "parametrized"])
def test_only_a_bare_linear_layer_is_served(change):
    linear = nn.Linear(4, 4, bias=change == "bias")
    if change == "hook":
        linear.register_forward_hook(lambda *_: None)
    if change == "kind":
        linear.__class__ = type("Adapter", (nn.Linear,), {})
    if change == "weight":
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped))
    if change == "parametrized":
        nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    assert can_use_fast_linear(linear, torch.ones(1, 4)) == (change == "none")


def test_global_hooks_turn_them_off():
    linear = nn.Linear(4, 4, bias=False)
    assert can_use_fast_linear(linear, torch.ones(1, 4))
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not can_use_fast_linear(linear, torch.ones(1, 4))
    assert can_use_fast_linear(linear, torch.ones(1, 4))


@pytest.mark.parametrize(("method", "with_gradients"), [("vanilla", True), ("iiet", False)])
def test_a_run_on_fake_tensors_caches_nothing(with_gradients, method):
    """A fake tensor has no values; a cached one would make later runs of the process fail."""
    own_eps = 1e-6 * (2 + with_gradients)  # No other test has cached it.
    used, unused = (
        make_model(method, (1,), dtype=torch.float32, rms_norm_eps=own_eps) for _ in range(2)
    )
    with torch.set_grad_enabled(with_gradients):
        with plain_formulas():
            expected = used(IDS)
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(unused(IDS)) is not torch.Tensor
            loss = next_token_loss(used(IDS), IDS)
            assert type(loss) is not torch.Tensor
            if with_gradients:
                loss.backward()
        used.zero_grad()
        with FakeTensorMode():
            Decoder(used.config)(torch.zeros(1, 4, dtype=torch.long))
        unused.load_state_dict(used.state_dict())
        torch.testing.assert_close(used(IDS), expected)
        assert torch.equal(unused(IDS), used(IDS))


def test_plain_modules_are_their_formulas():
    torch.manual_seed(0)
    config = preset("tiny", dim=4, num_heads=2, num_kv_heads=2, ffn_dim=6)
    network = FeedForward(config).double()
    norm = RMSNorm(4, eps=1e-2).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate = x @ network.gate_proj.weight.T
    up = x @ network.up_proj.weight.T
    expected = (F.silu(gate) * up) @ network.down_proj.weight.T
    root = ((x * x).mean(-1, keepdim=True) + 1e-2).sqrt()
    for _ in range(2):
        torch.testing.assert_close(network(x), expected)
        torch.testing.assert_close(norm(x), x / root)
        with plain_formulas():
            torch.testing.assert_close(network(x), expected)
            torch.testing.assert_close(norm(x), x / root)


def test_the_last_sum_of_a_field_is_not_rounded():
    decoder = make_model(dtype=torch.float32)
    layer = decoder.model.layers[0]
    x = torch.randn(2, 8, 16)
    captured = {}
    norm = layer.post_attention_layernorm
    norm.register_forward_hook(lambda _, inputs, __: captured.update(u=inputs[0]))
    layer.mlp.register_forward_hook(lambda _, __, output: captured.update(change=output))
    with torch.autocast("cpu", torch.bfloat16):
        field_output = layer.field(x, make_context(x, decoder.rope))
    assert captured["change"].dtype == torch.bfloat16
    assert torch.equal(field_output, captured["u"] + captured["change"].float())


def test_rotation_keeps_lengths_and_depends_on_distances_alone():
    cos, sin = tables(32, head_dim=8, theta=100.0)
    vectors = torch.randn(2, 8, dtype=torch.float64)
    turned = rotate(vectors.expand(1, 32, 2, 8), cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1).expand(1, 32, 2))
    products = turned[0, :, 0] @ turned[0, :, 1].T
    torch.testing.assert_close(products[5, 2], products[25, 22])
    assert abs(products[5, 2] - products[5, 3]) > 1e-6
    torch.testing.assert_close(turned[0, 0], vectors)
    torch.testing.assert_close(rotate(turned, cos, -sin), vectors.expand(1, 32, 2, 8))
