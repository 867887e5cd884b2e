"""The decoder equals the published code: logits, loss, gradients, and every evaluation.

`tests/fixtures` holds results of the published code on small random weights, in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iiet import decoder_from_published, next_token_loss
from iiet.hf.published import renamed_from_published

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES = sorted(path.stem for path in FIXTURES.glob("*.json"))


def load(name):
    config = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    return config, tensors, decoder_from_published(config, within(tensors, "weight."))


def within(tensors, prefix):
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def largest_difference(tensors, expected):
    assert set(tensors) == set(expected)
    return max(float((tensors[key] - expected[key]).abs().max()) for key in tensors)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name):
    _, tensors, decoder = load(name)
    logits = decoder(tensors["input_ids"])
    loss = next_token_loss(logits, tensors["input_ids"])
    loss.backward()
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, tensors["loss"][0], rtol=0, atol=2e-6)
    # The published matrices are whole: they have zeros where a layer does not use its row.
    gradients = {
        name: torch.zeros_like(p) if p.grad is None and ".mix." in name else p.grad
        for name, p in decoder.named_parameters()
        if p.grad is not None or ".mix." in name
    }
    expected = renamed_from_published(within(tensors, "grad."), decoder.config.num_layers)
    assert largest_difference(gradients, expected) < 1e-5


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_every_evaluation(name):
    config, tensors, decoder = load(name)
    for ends, inputs in (("out", False), ("in", True)):
        evaluations = decoder.evaluations(tensors["input_ids"], inputs=inputs)
        named = {f"layer{layer}.{k}.{ends}": value for (layer, k), value in evaluations.items()}
        expected = within(tensors, "eval.")
        expected = {key: value for key, value in expected.items() if key.endswith(f".{ends}")}
        assert largest_difference(named, expected) < 2e-5
    counts = {int(layer): count for layer, count in config["evaluations"].items()}
    assert dict(enumerate(decoder.evaluations_per_layer())) == counts


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_layer_is_that_of_the_published_matrix(name):
    _, tensors, decoder = load(name)
    weights = within(tensors, "weight.")
    for number, layer in enumerate(decoder.model.layers):
        for matrix, row in (("weight", "inner"), ("weight_c", "outer")):
            if (whole := weights.get(f"model.history.{matrix}")) is not None:
                expected = whole[number + 1, : number + 2]
                assert torch.equal(getattr(layer.mix, row), expected)
                assert not whole[number + 1, number + 2 :].any()
