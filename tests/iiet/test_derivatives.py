"""The plain formulas have all derivatives: second, forward-mode, and under `torch.func`."""

import pytest
import torch
from method_schedules import schedule_for
from torch.autograd import gradgradcheck

from iiet import METHODS, Decoder, plain_formulas, preset

DIM, VOCAB = 8, 7
OPTIONS = {"iiet": {"damping": 0.7, "learn_damping": True, "reinject_prediction": True}}

# PyTorch's forward derivative of SiLU and others is a script of the kind that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")


def small_decoder(method, num_kv_heads=1):
    """Two layers in float64, far from their starting point."""
    torch.manual_seed(0)
    config = preset(
        "tiny", method=method, vocab_size=VOCAB, dim=DIM, num_layers=2, num_heads=2, ffn_dim=8,
        num_kv_heads=num_kv_heads, context_length=8, initializer_std=0.3,
        schedule=schedule_for(method, (1, 2)), method_options=OPTIONS.get(method),
    )  # fmt: skip
    decoder = Decoder(config).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def embeddings(batch=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, DIM, dtype=torch.float64, generator=generator)


def a_layer(method):
    """The last layer as a function of the hidden state, the state of the one before held fixed."""
    decoder = small_decoder(method)
    seen = {}
    decoder.layers[1].register_forward_pre_hook(lambda _, args: seen.update(args=args))
    with torch.no_grad(), plain_formulas():
        decoder(inputs_embeds=embeddings())
    hidden, state, call = seen["args"]
    return lambda x: decoder.layers[1].forward(x, state, call).hidden, hidden


@pytest.mark.parametrize("method", METHODS)
def test_second_derivatives_of_a_model_equal_finite_differences(method):
    decoder = small_decoder(method)
    with plain_formulas():
        x = embeddings().requires_grad_()
        assert gradgradcheck(lambda x: decoder(inputs_embeds=x), (x,), fast_mode=True)


def test_second_derivatives_reach_the_weights():
    decoder = small_decoder("iiet")
    weights = [p for name, p in decoder.named_parameters() if "embedding" not in name]
    with plain_formulas():
        loss = decoder(inputs_embeds=embeddings()).square().mean()
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    assert all(g.abs().max() > 0 for g in again)


@pytest.mark.parametrize("method", METHODS)
def test_torch_func_differentiates_a_layer(method):
    layer, hidden = a_layer(method)
    size = hidden.numel()
    jacobian = torch.func.jacrev(layer)(hidden).reshape(size, size)
    torch.testing.assert_close(torch.func.jacfwd(layer)(hidden).reshape(size, size), jacobian)
    direction = torch.randn_like(hidden)
    _, push = torch.func.jvp(layer, (hidden,), (direction,))
    torch.testing.assert_close(push.flatten(), jacobian @ direction.flatten())
    _, pull = torch.func.vjp(layer, hidden)
    torch.testing.assert_close(pull(direction)[0].flatten(), jacobian.T @ direction.flatten())
    # An ordinary backward pass through the fast forms gives the same.
    ordinary = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(ordinary), ordinary, direction)
    torch.testing.assert_close(gradient.flatten(), jacobian.T @ direction.flatten())


@pytest.mark.parametrize("method", METHODS)
def test_torch_func_maps_over_sequences(method):
    decoder = small_decoder(method, num_kv_heads=2)
    x = embeddings(batch=3)

    def loss(sequence):
        return decoder(inputs_embeds=sequence[None]).square().mean()

    losses = torch.func.vmap(loss)(x)
    torch.testing.assert_close(losses, torch.stack([loss(sequence) for sequence in x]))
    each = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(one) for one in x]))
    torch.testing.assert_close(each[1], torch.func.grad(loss)(x[1]))
