"""The looped method: the stack of layers, run several times with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from iiet.config import preset
from iiet.cost import inference_cost
from iiet.decoder import Decoder
from iiet.losses import next_token_loss

LAYERS = 3
TOKENS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))


def decoder_of(method: str, num_layers: int = LAYERS, **options: object) -> Decoder:
    torch.manual_seed(0)
    config = preset(
        "tiny", method=method, num_layers=num_layers, dim=16, num_heads=2, ffn_dim=24,
        vocab_size=29, context_length=12, initializer_std=0.3, **options,
    )  # fmt: skip
    return Decoder(config)


def gradients(decoder: Decoder) -> dict[str, Tensor]:
    loss = next_token_loss(decoder(TOKENS), TOKENS)
    parameters = dict(decoder.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_without_repetitions_it_is_the_vanilla_model_bit_by_bit() -> None:
    looped, vanilla = decoder_of("looped", schedule=0), decoder_of("vanilla")
    assert torch.equal(looped(TOKENS), vanilla(TOKENS))
    found, expected = gradients(looped), gradients(vanilla)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("r", [1, 3])
def test_it_is_a_deeper_vanilla_model_whose_layers_share_their_weights(r: int) -> None:
    looped = decoder_of("looped", schedule=r)
    deep = decoder_of("vanilla", num_layers=(1 + r) * LAYERS)
    deep.load_state_dict(
        {name: w for name, w in looped.state_dict().items() if "layers" not in name}, strict=False
    )
    deep.layers = nn.ModuleList([*looped.layers] * (1 + r))
    logits, hidden = looped(TOKENS, return_hidden=True)
    expected, deep_hidden = deep(TOKENS, return_hidden=True)
    assert torch.equal(logits, expected)
    # The hidden states are those of the last run.
    assert len(hidden) == LAYERS
    assert all(map(torch.equal, hidden, deep_hidden[-LAYERS:]))
    found, of_deep = gradients(looped), gradients(deep)
    assert found.keys() == of_deep.keys()
    torch.testing.assert_close(list(found.values()), list(of_deep.values()))


def test_evaluations_are_numbered_by_layer_and_run() -> None:
    looped = decoder_of("looped", schedule=2)
    seen = list(looped.evaluations(TOKENS))
    assert seen == [(layer, run) for run in range(3) for layer in range(LAYERS)]


def test_all_layers_make_as_many_repetitions() -> None:
    with pytest.raises(ValueError, match=r"repeats the whole stack.* got schedule 2,0,1"):
        decoder_of("looped", schedule="2,0,1")
    looped = decoder_of("looped", schedule=2)
    with pytest.raises(ValueError, match="repeats the whole stack"):
        looped(TOKENS, schedule=looped.schedule.with_layer(1, 0))


def test_a_processors_cache_must_hold_all_layers_between_two_runs() -> None:
    looped, iiet = (decoder_of(method, schedule=1).config for method in ("looped", "iiet"))
    of_two_fields = 2 * 4 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 12 * 2 * 4 * 16
    sizes = {"processor_cache_bytes": of_two_fields}
    assert inference_cost(iiet, **sizes) != inference_cost(iiet)
    assert inference_cost(looped, **sizes) == inference_cost(looped)
    sizes["processor_cache_bytes"] *= 2
    assert inference_cost(looped, **sizes) != inference_cost(looped)
