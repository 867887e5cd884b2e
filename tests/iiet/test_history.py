"""The mix: starting rows, sums, gradients, and that nothing is copied for the backward pass."""

import pytest
import torch

from iiet import Decoder, preset
from iiet.history import Mix, add_scaled, running_mean, weighted_sums


def test_starting_rows_are_running_means():
    matrix = running_mean(5)
    assert torch.equal(matrix, matrix.tril())
    torch.testing.assert_close(matrix.sum(1), torch.ones(5))
    assert torch.equal(matrix[3], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]))
    mix = Mix(4, 8, 1e-5)
    assert torch.equal(mix.inner, matrix)
    assert torch.equal(mix.outer, matrix)


@pytest.mark.parametrize("size", [2, 40_000])
@pytest.mark.parametrize("count", [1, 4])
def test_weighted_sums(count, size):
    """Small and large tensors take different ways without gradients."""
    weights = torch.randn(2, count, dtype=torch.float64)
    estimates = [torch.randn(1, size, dtype=torch.float64) for _ in range(count)]
    expected = torch.einsum("rk,k...->r...", weights, torch.stack(estimates))
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            sums = weighted_sums(weights.requires_grad_(enabled), estimates)
        torch.testing.assert_close(torch.stack(sums), expected)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    estimates = [tensor(2, 3) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda w, *s: weighted_sums(w, s), (tensor(2, 3), *estimates))
    assert torch.autograd.gradcheck(add_scaled, (tensor(2, 3), tensor(2, 3), tensor()))


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


def test_sums_keep_references_and_no_copies():
    estimates = [torch.randn(1, 100_000, requires_grad=True) for _ in range(6)]
    weights = torch.randn(2, 6, requires_grad=True)

    def layers():
        prefix, _ = weighted_sums(weights, estimates)
        return [add_scaled(prefix, estimates[0], weights[0, 0]) for _ in range(3)]

    def stacked():
        return [torch.einsum("k,k...->...", weights[0], torch.stack(estimates)) for _ in range(3)]

    ours = bytes_kept(layers)
    assert ours < 6 * 400_000 + 10_000
    assert bytes_kept(stacked) > 3 * ours - 10_000


def test_memory_grows_with_evaluations_and_not_with_their_square():
    """Twice the layers keep twice the memory; a stacked mix would keep more than twice."""
    tokens = torch.zeros(1, 64, dtype=torch.long)

    def kept(num_layers):
        config = preset("tiny", num_layers=num_layers, dim=64, ffn_dim=64, vocab_size=8)
        decoder = Decoder(config)
        weights = sum(parameter.nbytes for parameter in decoder.parameters())
        return bytes_kept(lambda: decoder(tokens)) - weights

    assert kept(12) / kept(6) == pytest.approx(2.0, abs=0.05)


def test_checkpointing_keeps_what_passes_between_layers():
    decoder = Decoder(preset("tiny", vocab_size=8, dim=64, ffn_dim=128))
    tokens = torch.zeros(2, 64, dtype=torch.long)
    full = bytes_kept(lambda: decoder(tokens))
    decoder.activation_checkpointing = True
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    assert bytes_kept(lambda: decoder(tokens)) < 0.1 * full + weights
