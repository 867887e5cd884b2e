"""The costs that a method's class states are those of its layers, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_tensors import LiveTensors
from method_schedules import schedule_for
from torch import Tensor, nn

from iiet.config import ModelConfig, preset
from iiet.decoder import Decoder
from iiet.losses import next_token_loss
from iiet.methods import METHODS
from iiet.methods.base import Advance, LayerCall
from iiet.methods.explicit import ExplicitEuler

BATCH, TIME, DIM, LAYERS = 2, 16, 64, 4
CASES: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("iiet", {"damping": 0.5}),
    ("iiet", {"damping": 0.5, "learn_damping": True}),
    ("iiet", {"differentiated_corrections": 2}),
    ("iiet", {"differentiated_corrections": 1, "learn_damping": True}),
    ("iiet", {"reinject_prediction": True, "damping": 0.5}),
    ("iiet", {"reinject_prediction": True, "differentiated_corrections": 1}),
]


def small(method: str, **options: Any) -> ModelConfig:
    schedule = schedule_for(method, (3, 0, 1, 2))
    return preset(
        "tiny", method=method, dim=DIM, num_layers=LAYERS, num_heads=1, ffn_dim=12, vocab_size=32,
        context_length=TIME, method_options=options or None, schedule=schedule,
    )  # fmt: skip


class KeepsNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class FreeField(nn.Module):
    """A field that keeps nothing for its backward pass."""

    def forward(self, x: Tensor, context: object, slot: int | None) -> Tensor:
        y: Tensor = KeepsNothing.apply(x)
        return y


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_a_layer_keeps_as_many_tensors_as_its_method_states(
    method: str, options: dict[str, Any]
) -> None:
    config = small(method, **options)
    decoder, kind = Decoder(config), METHODS[method]
    for layer in decoder.layers:
        layer.field = FreeField()
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveTensors(decoder) as live:
        hidden = torch.randn(BATCH, TIME, DIM, requires_grad=True)
        state, hiddens = kind.start(hidden, LAYERS), [hidden]
        kept = []
        for number, layer in enumerate(decoder.layers):
            call = LayerCall(config.corrections[number], None, shared=decoder.shared)  # type: ignore[arg-type]
            before = live.now
            hidden, state = layer(hidden, state, call)
            hiddens.append(hidden)
            kept.append((live.now - before) / hidden.nbytes - 1)
    claimed = [kind.num_kept(config.corrections, n, config.options) for n in range(LAYERS)]
    # The last layer leaves its estimate to nobody and keeps it itself.
    claimed[-1] += kind.num_left
    # Norms keep two numbers a token, too.
    assert kept == pytest.approx(claimed, abs=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_only_parameters_of_corrections_may_be_unused(method: str) -> None:
    decoder = Decoder(small(method))
    decoder(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    idle = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert not idle or METHODS[method].has_corrections


class Noisy(ExplicitEuler):
    """Draws noise before its field."""

    is_random = True

    def advance(self, evaluate: Any, hidden: Tensor, state: Any, **others: Any) -> Advance:
        return super().advance(evaluate, F.dropout(hidden, 0.5), state, **others)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(METHODS, "_classes", {**METHODS._classes, "noisy": Noisy})
    return "noisy"


def test_a_layer_that_draws_random_numbers_draws_them_again_when_it_is_recomputed(
    noisy: str,
) -> None:
    torch.manual_seed(0)
    decoder = Decoder(small(noisy))
    input_ids = torch.randint(32, (2, TIME))

    def gradients(*, recompute: bool) -> list[Tensor]:
        decoder.activation_checkpointing = recompute
        torch.manual_seed(1)
        loss = next_token_loss(decoder(input_ids), input_ids)
        return list(torch.autograd.grad(loss, list(decoder.parameters())))

    kept, recomputed = gradients(recompute=False), gradients(recompute=True)
    torch.testing.assert_close(kept, recomputed, rtol=0, atol=0)


def test_a_method_draws_no_random_numbers_unless_it_says_so() -> None:
    for method, kind in METHODS.items():
        decoder = Decoder(small(method)).train()
        before = torch.get_rng_state()
        decoder(torch.zeros(1, 8, dtype=torch.long))
        assert kind.is_random or torch.equal(torch.get_rng_state(), before), method
