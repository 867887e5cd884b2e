"""Leaving layers out: equal to a decoder in which these repeat what is before them."""

import copy

import pytest
import torch
from model_cases import schedule_for
from plain_models import CASES, random_model
from refusals import refused
from torch import nn
from transformers import AutoModelForCausalLM

from iiet import (
    METHODS,
    Decoder,
    ModelConfig,
    decoder_of_kept_layers,
    next_token_loss,
    plain_formulas,
)
from iiet.decoder import decoder_from_published
from iiet.exporting import export
from iiet.methods import Advance
from iiet.mix import History


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
def test_equals_a_decoder_whose_left_out_layers_repeat(method):
    decoder = decoder_of(method)
    for left_out in ((2,), (0, 2, 3)):
        expected = copy.deepcopy(decoder)
        for layer in left_out:
            expected.model.layers[layer] = Repeat()
        schedule = decoder.schedule.leaving_out(left_out)
        smaller = decoder_of_kept_layers(decoder, schedule)
        with plain_formulas():
            torch.testing.assert_close(smaller(TOKENS), expected(TOKENS), rtol=0, atol=1e-12)
            assert (smaller(TOKENS) - decoder(TOKENS)).abs().max() > 1e-3
        assert smaller.config == decoder.config.of_kept_layers(schedule)
    assert torch.equal(decoder_of_kept_layers(decoder, decoder.schedule)(TOKENS), decoder(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("method", ["iiet", "pcformer"])
def test_kept_layers_make_the_corrections_that_the_schedule_says(method):
    decoder = decoder_of(method, (2, 1, 2, 1))
    smaller = decoder_of_kept_layers(decoder, "1,x,2,0")
    assert smaller.schedule == (1, 2, 0)
    cheaper = decoder_of_kept_layers(decoder, decoder.schedule.leaving_out([1]))
    assert torch.equal(smaller(TOKENS), cheaper(TOKENS, schedule="1,2,0"))


def test_the_mix_is_folded_as_the_formula_says():
    """Row l of A and C: the weights of estimates that are left out go to the kept one before."""
    decoder = decoder_of()
    smaller = decoder_of_kept_layers(decoder, "x,1,x,0")
    for kind in ("inner", "outer"):
        rows = [getattr(layer.mix, kind) for layer in decoder.model.layers]
        first, second = (getattr(layer.mix, kind) for layer in smaller.model.layers)
        torch.testing.assert_close(first, torch.stack([rows[1][:2].sum(), rows[1][2]]))
        s = rows[3]  # Of s_0 (the embeddings) to s_4.
        torch.testing.assert_close(second, torch.stack([s[0] + s[1], s[2] + s[3], s[4]]))


@pytest.mark.parametrize("case", CASES)
def test_a_plain_model_equals_a_hand_made_one_of_the_kept_layers(case, tmp_path):
    """Weights are copied by name into a model of transformers' own class; logits are equal bitwise,
    also of the exported folder."""
    model = random_model(case)
    decoder = decoder_from_published(model.config.to_diff_dict(), model.state_dict()).eval()
    smaller = decoder_of_kept_layers(decoder, "0,x,0,0")
    values = model.config.to_dict()
    by_layer = {"layer_types": None, "no_rope_layers": None} & values.keys()
    values |= {name: [values[name][n] for n in (0, 2, 3)] for name in by_layer if values[name]}
    values["num_hidden_layers"] = 3
    by_hand = type(model)(type(model.config)(**values)).eval()
    of_layer = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate((0, 2, 3))}
    for name, weight in by_hand.state_dict().items():
        origin = name
        for old, new in reversed(of_layer.items()):
            origin = origin.replace(new, old) if new in name else origin
        weight.copy_(model.state_dict()[origin])
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = by_hand(tokens).logits
        torch.testing.assert_close(smaller(tokens), expected, rtol=0, atol=1e-5)
        read_by_name = decoder_from_published(values, by_hand.state_dict()).eval()
        assert torch.equal(smaller(tokens), read_by_name(tokens))
        folder = export(smaller, tmp_path, model_type=model.config.model_type)
        exported = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert type(exported) is type(model)
        assert torch.equal(exported(tokens).logits, expected)


def test_the_smaller_decoder_trains_also_if_the_full_one_is_frozen():
    decoder = decoder_of("pcformer").requires_grad_(False).eval()
    smaller = decoder_of_kept_layers(decoder, decoder.schedule.leaving_out([1, 3]))
    assert not smaller.training
    next_token_loss(smaller(TOKENS), TOKENS).backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_weights_are_shared_until_they_are_copied():
    decoder = decoder_of()
    smaller = decoder_of_kept_layers(decoder, "2,x,1,1")
    pairs = ((0, 0), (1, 2), (2, 3))
    for new, old in pairs:
        shared = smaller.model.layers[new].mlp.up_proj.weight
        assert shared.data_ptr() == decoder.model.layers[old].mlp.up_proj.weight.data_ptr()
    own = smaller.copy().model.embed_tokens.weight
    assert own.data_ptr() != decoder.model.embed_tokens.weight.data_ptr()


def test_kept_layers_keep_their_rotation_and_window():
    config = ModelConfig(
        method="vanilla", vocab_size=20, dim=8, num_layers=4, num_heads=2, ffn_dim=8,
        context_length=16, rotary_layers=(True, False, True, False),
        sliding_windows=(4, None, 5, 6),
    )  # fmt: skip
    smaller = config.of_kept_layers("x,0,0,x")
    assert (smaller.rotary_layers, smaller.sliding_windows) == ((False, True), (None, 5))
    assert (smaller.schedule, smaller.num_layers) == (None, 2)
    assert config.of_kept_layers("0,x,0,x").rotary_layers is None


def test_a_model_contains_kept_layers_alone():
    config = decoder_of().config
    for refuse in (
        lambda: config.with_schedule("2,x,1,1"),
        lambda: Decoder(config)(TOKENS, schedule="2,x,1,1"),
        lambda: Decoder(config).generate(TOKENS, max_new_tokens=2, draft="0,x,0,0"),
    ):
        with refused(ValueError, "schedule", ",x,", "iiet.decoder_of_kept_layers"):
            refuse()
    with refused(ValueError, "vanilla"):
        decoder_of("vanilla").config.of_kept_layers("1,x,0,0")
    with refused(ValueError, "3", "4"):
        decoder_of_kept_layers(decoder_of(), "1,x,0")
