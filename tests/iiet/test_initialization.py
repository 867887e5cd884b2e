"""Weights that are drawn one module at a time are those that the constructor draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iiet.decoder import Decoder
from iiet.methods import METHODS
from iiet.model.config import preset
from iiet.model.layers import initial_weights

OPTIONS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    {"method": "iiet", "method_options": {"learn_damping": "vector", "damping": 0.5}},
    {"method": "iiet", "method_options": {"start": "identity"}},
    {"method": "iiet", "method_options": {"reinject_prediction": True}},
    {"method": "vanilla", "tie_embeddings": False, "num_kv_heads": 1},
    {"method": "vanilla", "tie_embeddings": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_values_and_the_random_state_afterwards_are_the_constructors(options):
    config = preset("tiny", num_layers=2, dim=20, num_heads=2, ffn_dim=24, **options)
    torch.manual_seed(3)
    expected = Decoder(config).state_dict()
    state = torch.get_rng_state()
    with torch.device("meta"):
        decoder = Decoder(config)
    torch.manual_seed(3)
    drawn_weights = {
        name: weight.clone() for name, weight in initial_weights(decoder, config.initializer_std)
    }
    assert drawn_weights.keys() == expected.keys()
    assert all(torch.equal(drawn_weights[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in decoder.parameters())
