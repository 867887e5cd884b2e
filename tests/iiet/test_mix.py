"""The mix: starting rows, how often its sums are computed, precision, and what is kept for the
backward pass. That they equal the formulas is tested in `test_plain_formulas.py`."""

import pytest
import torch
from live_tensors import SeenOperations

from iiet import Decoder, next_token_loss, preset
from iiet.model.mix import Mix


def test_starting_rows_are_means():
    for layer in range(4):
        mix = Mix(layer)
        for row in (mix.inner, mix.outer):
            assert row.tolist() == pytest.approx([1 / (layer + 2)] * (layer + 2))


@pytest.mark.parametrize("num_estimates", range(1, 9))
def test_sums_are_those_of_all_estimates(num_estimates):
    torch.manual_seed(0)
    mix = Mix(num_estimates - 1).double()
    for row in (mix.inner, mix.outer):
        torch.nn.init.normal_(row)
    *estimates, newest = torch.randn(num_estimates + 1, 1, 2, 3, dtype=torch.float64)
    for row, total in zip((mix.inner, mix.outer), mix.sums(estimates, corrects=True), strict=True):
        expected = torch.tensordot(row, torch.stack([*estimates, newest]), dims=1)
        torch.testing.assert_close(total.plus(newest, torch.float64), expected)


@torch.no_grad()
@pytest.mark.parametrize("num_corrections", [0, 1, 3])
def test_sums_over_earlier_estimates_are_computed_once_per_layer(num_corrections):
    """Each further correction adds one term; a layer without corrections computes no points."""
    decoder = Decoder(preset("tiny", num_layers=4, schedule=num_corrections))
    for layer in decoder.model.layers:
        layer.field = lambda x, _context, _slot: x  # A field that makes no operations.
    with SeenOperations() as operations:
        for _ in decoder.hidden_states(torch.randn(1, 2, 128)):
            pass
    num_rows = 2 if num_corrections else 1
    # The first layer's sum has one earlier term, to which nothing is added; the last's has four.
    num_sums = num_rows * (0 + 1 + 2 + 3) + 4 * (num_corrections + 1)
    assert operations.names.count("addcmul") == num_sums


def bytes_kept(forward):
    """Return the bytes of distinct memory that the graph keeps for its backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(size for size, _ in storages.values())


def test_memory_grows_with_depth_and_not_with_its_square():
    """Twice the layers keep twice the bytes: no layer keeps a copy of all earlier estimates."""

    def bytes_of_layers(num_layers):
        sizes = {"dim": 32, "num_heads": 2, "ffn_dim": 48, "vocab_size": 16, "context_length": 64}
        decoder = Decoder(preset("tiny", num_layers=num_layers, schedule=2, **sizes))
        tokens = torch.zeros(1, 64, dtype=torch.long)
        return bytes_kept(lambda: next_token_loss(decoder(tokens), tokens))

    four = bytes_of_layers(4)
    eight = bytes_of_layers(8)
    sixteen = bytes_of_layers(16)
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
            is_own = name in exact
            assert parameter.dtype == (torch.float32 if is_own else torch.bfloat16), name
            assert not is_own or torch.equal(parameter, exact[name])
    tokens = torch.randint(2048, (2, 8))
    logits, hidden = decoder(tokens, return_hidden=True)
    assert logits.dtype == torch.bfloat16
    assert {h.dtype for h in hidden} == {torch.bfloat16}
    next_token_loss(logits, tokens).backward()
    evaluations = []
    decoder(tokens, observe=evaluations.append)
    assert {e.estimate.dtype for e in evaluations} == {torch.float32}
    assert {e.input.dtype for e in evaluations} == {torch.bfloat16}


def test_sums_are_exact_under_autocast():
    """Weights that differ in the ninth bit are different in float32 and the same in bfloat16."""
    mix = Mix(1)
    mix.outer.data = torch.tensor([1.0, 1.0 + 2.0**-9, 1.0])
    estimates = [torch.full((1, 1, 4), 1.0), torch.full((1, 1, 4), -1.0)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, hidden_sum = mix.sums(estimates, corrects=False)
        hidden = hidden_sum.plus(torch.zeros(1, 1, 4), torch.float32)
        hidden.sum().backward()
    assert hidden.unique().item() == -(2.0**-9)
    assert mix.outer.grad.tolist() == [4.0, -4.0, 0.0]
