"""Leaving layers out: equal to a decoder in which these repeat what is before them."""

import copy
import itertools
import math
import random

import pytest
import torch
from model_cases import schedule_for
from plain_models import CASES, random_model, random_values
from refusals import refused
from torch import nn
from transformers import AutoModelForCausalLM

from iiet import (
    METHODS,
    Decoder,
    ModelConfig,
    decoder_of_kept_layers,
    influence_table,
    next_token_loss,
    plain_formulas,
    schedule_at_threshold,
    schedule_family,
)
from iiet.decoder import decoder_from_published
from iiet.exporting import export
from iiet.hf.plain_models import MODEL_TYPES
from iiet.methods import Advance
from iiet.model.mix import History


def decoder_of(method="iiet", schedule=(2, 0, 1, 1), seed=0):
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
    torch.manual_seed(seed)
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


def with_repeating_layers(decoder, left_out):
    """Return a copy of a decoder in which some layers do nothing."""
    repeating = copy.deepcopy(decoder)
    for layer in left_out:
        repeating.model.layers[layer] = Repeat()
    return repeating


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_decoder_whose_left_out_layers_repeat(method):
    decoder = decoder_of(method)
    for left_out in ((2,), (0, 2, 3)):
        expected = with_repeating_layers(decoder, left_out)
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


@torch.no_grad()
def check_plain(model, kept_layers, folder):
    """Compare with a model of transformers' own class, whose weights are copied by name: logits are
    equal bitwise, also those of the exported folder."""
    decoder = decoder_from_published(model.config.to_diff_dict(), model.state_dict()).eval()
    num_layers = decoder.config.num_layers
    schedule = decoder.schedule.leaving_out(set(range(num_layers)).difference(kept_layers))
    smaller = decoder_of_kept_layers(decoder, schedule)
    values = {**model.config.to_dict(), "num_hidden_layers": len(kept_layers)}
    for name in ("layer_types", "no_rope_layers"):
        if values.get(name) is not None:
            values[name] = [values[name][layer] for layer in kept_layers]
    by_hand = type(model)(type(model.config)(**values)).eval()
    weights = model.state_dict()
    for name, weight in by_hand.state_dict().items():
        head, is_layer, rest = name.partition(".layers.")
        new, _, rest = rest.partition(".")
        origin = f"{head}.layers.{kept_layers[int(new)]}.{rest}" if is_layer else name
        weight.copy_(weights[origin])
    tokens = torch.arange(40).view(2, 20) % decoder.config.vocab_size
    expected = by_hand(tokens).logits
    torch.testing.assert_close(smaller(tokens), expected, rtol=0, atol=1e-5)
    read_by_name = decoder_from_published(values, by_hand.state_dict()).eval()
    assert smaller.config == read_by_name.config
    assert torch.equal(smaller(tokens), read_by_name(tokens))
    export(smaller, folder, model_type=model.config.model_type)
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(exported) is type(model)
    assert torch.equal(exported(tokens).logits, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_plain_model_equals_a_hand_made_one_of_the_kept_layers(case, tmp_path):
    check_plain(random_model(case), [0, 2, 3], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_random_plain_models_equal_hand_made_ones(model_type, number, tmp_path):
    seed = random.randrange(2**31)
    draw = random.Random(seed)
    values = random_values(model_type, draw)
    num_layers = values["num_hidden_layers"]
    kept_layers = sorted(draw.sample(range(num_layers), draw.randint(1, num_layers)))
    print(f"seed {seed}, layers {kept_layers} of {values}")  # Shown if the test fails.
    check_plain(random_model(model_type, seed, **values), kept_layers, tmp_path)


@torch.no_grad()
def check_family(decoder, tokens, metric):
    """Measure a model, and check the family down to each number of layers: it is nested, each
    member has its interval of thresholds, and is the model of its layers."""
    num_layers = decoder.config.num_layers
    table = influence_table(decoder, tokens, metric=metric, whole_layers=True)
    for max_left_out in range(num_layers):
        family = schedule_family(table, max_left_out=max_left_out)
        assert family[0].schedule == decoder.schedule
        for dearer, cheaper in itertools.pairwise(family):
            assert cheaper.schedule.is_within(dearer.schedule)
            assert cheaper.schedule != dearer.schedule
            assert cheaper.threshold_above == dearer.threshold_up_to
        for member in family:
            above = math.nextafter(member.threshold_above, math.inf)
            for threshold in (above, member.threshold_up_to):
                schedule = schedule_at_threshold(table, threshold, max_left_out=max_left_out)
                assert schedule == member.schedule
        assert family[-1].schedule.num_kept_layers == num_layers - max_left_out

    for member in family:  # Down to one layer.
        smaller = decoder_of_kept_layers(decoder, member.schedule)
        assert smaller.config.num_layers == member.schedule.num_kept_layers
        # What the kept layers of the full model make, the others doing nothing.
        corrections = [max(0, number) for number in member.schedule]
        repeating = with_repeating_layers(decoder, member.schedule.left_out_layers)
        with plain_formulas():
            expected = repeating(tokens, schedule=corrections)
            logits = smaller(tokens)
        if decoder.schedule.num_corrections:  # The mix is folded, which rounds.
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        else:
            assert torch.equal(logits, expected)


@pytest.mark.parametrize("metric", ["cosine", "loss"])
@pytest.mark.parametrize("method", ["vanilla", "pcformer"])
def test_members_of_a_measured_family_are_the_models_of_their_layers(method, metric):
    check_family(decoder_of(method), TOKENS, metric)


@pytest.mark.parametrize("seed", range(4))
def test_families_of_random_iiets(seed):
    draw = random.Random(seed)
    schedule = [draw.randint(0, 3) for _ in range(draw.randint(2, 5))]
    metric = draw.choice(["cosine", "relative", "loss"])
    check_family(decoder_of("iiet", schedule, seed), TOKENS, metric)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_families_of_random_plain_models(model_type, seed):
    draw = random.Random(seed)
    model = random_model(model_type, seed, **random_values(model_type, draw))
    decoder = decoder_from_published(model.config.to_diff_dict(), model.state_dict()).eval()
    tokens = torch.arange(40).view(2, 20) % decoder.config.vocab_size
    check_family(decoder, tokens, draw.choice(["cosine", "relative", "loss"]))


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
