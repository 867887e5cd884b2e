"""The hand-written pieces equal plain formulas, and their backward passes finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from iiet import Decoder, preset
from iiet import norm as norm_module
from iiet.attention import Attention
from iiet.context import AttentionContext
from iiet.feed_forward import FeedForward
from iiet.linear import few_rows_product
from iiet.norm import RMSNorm
from iiet.rope import Rope, rotate_


def context(time, theta=10.0, head_dim=4):
    rope = Rope(head_dim, time, theta)
    return AttentionContext(
        rope.at(slice(0, time), torch.device("cpu"), torch.float64), None, time, None
    )


def gradcheck(module, *inputs, context=()):
    """Check the gradients of inputs and parameters."""
    parameters = list(module.parameters())

    def call(*values):
        names = [name for name, _ in module.named_parameters()]
        given = dict(zip(names, values[len(inputs) :], strict=True))
        return torch.func.functional_call(module, given, (*values[: len(inputs)], *context))

    values = [value.detach().requires_grad_() for value in (*inputs, *parameters)]
    return torch.autograd.gradcheck(call, values)


def test_rms_norm():
    torch.manual_seed(0)
    norm = RMSNorm(6, eps=1e-2).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = x / ((x * x).mean(-1, keepdim=True) + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
    assert gradcheck(norm, x)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_run_on_fake_tensors_leaves_nothing_behind(with_gradients):
    """They have no numbers; one that is kept makes every later run of the process fail."""
    norm_module._constants.clear()
    tokens = torch.zeros(1, 4, dtype=torch.long)
    config = preset("tiny", dim=16, num_layers=1, num_heads=2, ffn_dim=24, method="vanilla")
    used, unused = Decoder(config), Decoder(config)
    with torch.set_grad_enabled(with_gradients):
        expected = used(tokens)
        norm_module._constants.clear()
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert type(unused(tokens)) is not torch.Tensor
            assert type(used(tokens)) is not torch.Tensor
        with FakeTensorMode():
            Decoder(config)(torch.zeros(1, 4, dtype=torch.long))
        unused.load_state_dict(used.state_dict())
        assert torch.equal(used(tokens), expected)
        assert torch.equal(unused(tokens), expected)


def test_feed_forward():
    torch.manual_seed(0)
    network = FeedForward(4, 6).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    gate, up = network.gate_up.weight.chunk(2)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ network.down.weight.T
    torch.testing.assert_close(network(x), expected)
    assert gradcheck(network, x)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_attention_gradients(num_kv_heads):
    torch.manual_seed(0)
    attention = Attention(8, 2, num_kv_heads).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert gradcheck(attention, x, context=(context(3), 0))


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3)])
@torch.no_grad()
def test_product_of_few_rows_in_all_its_ways(rows, shape):
    weight = torch.randn(*shape, dtype=torch.float64)
    x = torch.randn(rows, 1, shape[1], dtype=torch.float64)
    product = few_rows_product(x, weight, rows)
    torch.testing.assert_close(product.view(rows, 1, -1), x @ weight.T)
    assert product.is_contiguous()


def test_rotation_keeps_lengths_and_depends_on_distances_alone():
    rope = Rope(8, 32, 100.0)
    cos, sin = rope.at(slice(0, 32), torch.device("cpu"), torch.float64)
    vectors = torch.randn(2, 8, dtype=torch.float64)
    turned = rotate_(vectors.expand(1, 32, 2, 8).clone(), cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1).expand(1, 32, 2))
    products = turned[0, :, 0] @ turned[0, :, 1].T
    torch.testing.assert_close(products[5, 2], products[25, 22])
    assert abs(products[5, 2] - products[5, 3]) > 1e-6
    torch.testing.assert_close(turned[0, 0], vectors)
    torch.testing.assert_close(rotate_(turned, cos, -sin), vectors.expand(1, 32, 2, 8))


def test_rotation_angles_are_the_formula():
    cos, _ = Rope(6, 10, 50.0).at(slice(0, 10), torch.device("cpu"), torch.float64)
    for position in (0, 3, 9):
        for pair in range(3):
            angle = torch.tensor(position / 50.0 ** (2 * pair / 6), dtype=torch.float64)
            torch.testing.assert_close(cos[position, 0, pair], angle.cos())
            torch.testing.assert_close(cos[position, 0, pair + 3], angle.cos())
