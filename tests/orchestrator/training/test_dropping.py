"""Dropping layers: equal to a decoder in which the dropped ones repeat what is before them."""

import copy

import pytest
import torch
from model_cases import schedule_for
from torch import nn

from iiet import METHODS, Decoder, ModelConfig, next_token_loss, plain_formulas
from iiet.methods import Advance
from iiet.mix import History
from orchestrator.training.dropping import drop_layers, kept_config


def decoder_of(method="iiet", schedule=(2, 0, 1, 1)):
    config = ModelConfig(
        method=method,
        vocab_size=29,
        dim=16,
        num_layers=len(schedule),
        num_heads=4,
        num_kv_heads=4,
        ffn_dim=24,
        context_length=16,
        schedule=schedule_for(method, schedule),
    )
    torch.manual_seed(0)
    decoder = Decoder(config).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


TOKENS = torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(1))


class Repeat(nn.Module):
    """A layer that passes the hidden state on and repeats the estimate before it."""

    def forward(self, hidden, state, call):
        if isinstance(state, History):
            state = state.followed_by(state.estimates[-1])
        return Advance(hidden, state)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_decoder_whose_dropped_layers_repeat(method):
    decoder = decoder_of(method)
    for kept_layers in ((0, 1, 3), (1,)):
        check_dropping(decoder, kept_layers)
    complete_copy = drop_layers(decoder, range(4))
    assert torch.equal(complete_copy(TOKENS), decoder(TOKENS))
    complete_copy.model.embed_tokens.weight.zero_()  # The weights are copies.
    assert decoder.model.embed_tokens.weight.abs().min() > 0


def check_dropping(decoder, kept_layers):
    expected = copy.deepcopy(decoder)
    for layer in set(range(4)) - set(kept_layers):
        expected.model.layers[layer] = Repeat()
    smaller = drop_layers(decoder, kept_layers)
    with plain_formulas():
        torch.testing.assert_close(smaller(TOKENS), expected(TOKENS), rtol=0, atol=1e-12)
        assert (smaller(TOKENS) - decoder(TOKENS)).abs().max() > 1e-3
    assert smaller.config == kept_config(decoder.config, kept_layers)


def test_the_smaller_decoder_trains_also_if_the_full_one_is_frozen():
    decoder = decoder_of("pcformer").requires_grad_(False).eval()
    smaller = drop_layers(decoder, (0, 2))
    assert not smaller.training
    next_token_loss(smaller(TOKENS), TOKENS).backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_kept_layers_keep_their_rotation_and_window():
    config = ModelConfig(
        method="vanilla", vocab_size=20, dim=8, num_layers=4, num_heads=2, ffn_dim=8,
        context_length=16, rotary_layers=(True, False, True, False),
        sliding_windows=(4, None, 5, 6),
    )  # fmt: skip
    smaller_config = kept_config(config, (1, 2))
    assert (smaller_config.rotary_layers, smaller_config.sliding_windows) == (
        (False, True),
        (None, 5),
    )
    assert kept_config(config, (0, 2)).rotary_layers is None
