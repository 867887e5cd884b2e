from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from orchestrator.settings import TrainingSettings
from orchestrator.training.objective import make_optimizer, set_learning_rate


def groups(decoder: Decoder) -> dict[float, set[str]]:
    names = {id(p): name for name, p in decoder.named_parameters()}
    optimizer = make_optimizer(decoder, TrainingSettings(weight_decay=0.5))
    return {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group(tiny_model: dict[str, Any], tied: bool) -> None:
    decoder = Decoder(ModelConfig.from_dict({**tiny_model, "tie_embeddings": tied}))
    found = groups(decoder)
    assert found[0.5] | found[0.0] == {name for name, _ in decoder.named_parameters()}
    assert not found[0.5] & found[0.0]


def test_only_linear_weights_decay(tiny_model: dict[str, Any]) -> None:
    decoder = Decoder(ModelConfig.from_dict(tiny_model))
    linear = {
        f"{name}.weight"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    found = groups(decoder)
    assert found[0.5] == linear
    assert "embedding.weight" in found[0.0]
    rows = {f"layers.0.mix.{row}" for row in ("inner", "outer")}
    assert rows <= found[0.0], "the mix is not decayed"


def test_decay_does_not_move_the_mix(tiny_model: dict[str, Any]) -> None:
    decoder = Decoder(ModelConfig.from_dict(tiny_model))
    optimizer = make_optimizer(decoder, TrainingSettings(weight_decay=0.5, learning_rate=0.1))
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in decoder.named_parameters() if not torch.equal(p, before[n])}
    assert moved == groups(decoder)[0.5]


def test_learning_rate_is_set_in_every_group(tiny_model: dict[str, Any]) -> None:
    optimizer = make_optimizer(Decoder(ModelConfig.from_dict(tiny_model)), TrainingSettings())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
