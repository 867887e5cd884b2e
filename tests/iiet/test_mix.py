"""The mix: starting rows, the forms of its sums, gradients, and what is kept for the backward."""

import pytest
import torch
from live_tensors import SeenOperations

from iiet import Decoder, next_token_loss, plain_formulas, preset
from iiet.mix import FusedHistory, Mix, _inner_products, start

SHAPE = (2, 3, 4)


def test_starting_rows_are_means():
    for layer in range(4):
        mix = Mix(layer)
        for row in (mix.inner, mix.outer):
            assert row.tolist() == pytest.approx([1 / (layer + 2)] * (layer + 2))


def run(tensors, num_layers=4, *, corrections=(2, 0, 1, 2)):
    """Everything that layers ask of a history, with fields that one can write down."""
    embeddings, rows = tensors[0], tensors[1:]
    history, outputs = start(embeddings, num_layers), []
    hidden = embeddings
    for layer in range(num_layers):
        mix = Mix(layer).double()
        del mix.inner, mix.outer
        mix.inner, mix.outer = rows[2 * layer : 2 * layer + 2]
        layer_mix = mix(history, dtype=torch.float64, corrects=corrections[layer] > 0)
        estimate = hidden.sin()
        for _ in range(corrections[layer]):
            estimate = layer_mix.point(estimate).cos()
        hidden, history = layer_mix.leave(estimate)
        outputs.append(hidden)
    return torch.stack(outputs)


def inputs(num_layers=4):
    torch.manual_seed(0)
    sizes = [SHAPE, *((layer + 2,) for layer in range(num_layers) for _ in "AC")]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@torch.inference_mode()
def test_a_layer_without_corrections_adds_few_operations_to_a_vanilla_step():
    """A norm, a copy into the stack, a product with the row of C and two views, at each layer."""
    counts = {}
    for method, options in (("vanilla", {}), ("iiet", {"schedule": 0})):
        decoder = Decoder(preset("tiny", method=method, num_layers=6, **options)).eval()
        cache = decoder.new_cache(batch_size=1, max_tokens=4)
        decoder(torch.ones(1, 3, dtype=torch.long), cache=cache)
        with SeenOperations() as seen:
            decoder(torch.ones(1, 1, dtype=torch.long), cache=cache, last_only=True)
        counts[method] = len(seen.names)
    assert counts["iiet"] - counts["vanilla"] <= 6 * 5 + 6


@pytest.mark.parametrize("used", [slice(None), slice(-1, None), slice(0, 1), slice(1, 3)])
def test_both_forms_give_the_same_gradients_and_twice_the_same(used):
    """Also where the loss reads only some layers, so that others get no gradient. The gradient
    buffer is made anew in each pass, though layers add to it in place."""
    fused, plain = inputs(), inputs()
    loss = run(fused)[used].sin().sum()
    first = torch.autograd.grad(loss, fused, retain_graph=True, allow_unused=True)
    loss.backward()
    for one, other in zip(fused, first, strict=True):
        torch.testing.assert_close(one.grad, other, rtol=0, atol=0)
    with plain_formulas():
        run(plain)[used].sin().sum().backward()
    for one, other in zip(fused, plain, strict=True):
        if one.grad is None or other.grad is None:  # Zero in the other, if it is there.
            assert not any(t.grad is not None and t.grad.any() for t in (one, other))
        else:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_the_plain_form_is_differentiable_twice():
    with plain_formulas():
        assert torch.autograd.gradgradcheck(
            lambda *tensors: run(tensors, 2, corrections=(1, 0)), inputs(2)
        )


def bytes_kept(forward):
    """Bytes of distinct memory that the graph keeps for its backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for size, _ in kept.values())


def test_memory_grows_with_depth_and_not_with_its_square():
    """Twice the layers keep twice the bytes: no layer keeps a copy of all earlier estimates."""

    def kept(num_layers):
        sizes = {"dim": 32, "num_heads": 2, "ffn_dim": 48, "vocab_size": 16, "context_length": 64}
        decoder = Decoder(preset("tiny", num_layers=num_layers, schedule=2, **sizes))
        tokens = torch.zeros(1, 64, dtype=torch.long)
        return bytes_kept(lambda: next_token_loss(decoder(tokens), tokens))

    four, eight, sixteen = kept(4), kept(8), kept(16)
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.02)


@pytest.mark.parametrize("method", ["iiet", "pcformer"])
def test_in_half_precision_rows_norms_and_sums_stay_float32(method):
    torch.manual_seed(0)
    decoder = Decoder(preset("tiny", method=method, dim=16, num_heads=2, ffn_dim=24))
    exact = {name: p.clone() for name, p in decoder.method_parameters().items()}
    for move in (
        decoder.bfloat16,
        lambda: decoder.to("cpu", torch.bfloat16),
        lambda: decoder.double().bfloat16(),
    ):
        move()
        for name, parameter in decoder.named_parameters():
            own = name in exact
            assert parameter.dtype == (torch.float32 if own else torch.bfloat16), name
            assert not own or torch.equal(parameter, exact[name])
    tokens = torch.randint(2048, (2, 8))
    logits, hidden = decoder(tokens, return_hidden=True)
    assert logits.dtype == torch.bfloat16
    assert {h.dtype for h in hidden} == {torch.bfloat16}
    next_token_loss(logits, tokens).backward()
    seen = []
    decoder(tokens, observe=seen.append)
    assert {e.estimate.dtype for e in seen} == {torch.float32}
    assert {e.input.dtype for e in seen} == {torch.bfloat16}


def test_sums_are_exact_under_autocast():
    """Rows that differ in the ninth bit are different in float32 and the same in bfloat16."""
    history = FusedHistory.started(torch.ones(1, 1, 4), 1)
    rows = torch.tensor([[1.0], [1.0 + 2.0**-9]], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, (one, more) = history.sums(rows)
        (more - one).sum().backward()
    assert (more - one).unique().item() == 2.0**-9
    assert rows.grad.tolist() == [[-4.0], [4.0]]


def test_products_in_blocks_of_tokens_are_the_whole_ones():
    """A GPU sums the gradient of the rows so."""
    grads, estimates = torch.randn(2, 3, 8, 5).double(), torch.randn(7, 3, 8, 5).double()
    whole = _inner_products(grads, estimates)
    torch.testing.assert_close(whole, torch.einsum("rbtd,kbtd->rk", grads, estimates))
    for num_blocks in (2, 8, 24):
        torch.testing.assert_close(_inner_products(grads, estimates, num_blocks), whole)
