"""One suite for every registered method: a new method is tested as soon as it is registered.

Runs in float64 on small random weights, so that equal results agree closely.
"""

import dataclasses
import itertools

import pytest
import torch
from method_schedules import schedule_for

from iiet import (
    METHODS,
    Decoder,
    IterationSchedule,
    KeyValueCache,
    ModelConfig,
    next_token_loss,
    num_parameters,
)

BATCH, TIME, VOCAB, LAYERS, DIM = 2, 11, 29, 3, 16


def config_of(method, corrections=(2, 0, 1)):
    return ModelConfig(
        method=method,
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=24,
        context_length=16,
        schedule=schedule_for(method, corrections),
    )


def decoder_of(config, dtype=torch.float64):
    torch.manual_seed(0)
    decoder = Decoder(config).to(dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder


def tokens(batch=BATCH, time=TIME):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def gradients(decoder, **settings):
    decoder.zero_grad()
    next_token_loss(decoder(tokens(), **settings), tokens()).backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def decoder(method):
    return decoder_of(config_of(method))


def test_shapes(decoder):
    logits, hidden = decoder(tokens(), return_hidden=True)
    assert logits.shape == (BATCH, TIME, VOCAB)
    assert [h.shape for h in hidden] == [(BATCH, TIME, DIM)] * LAYERS
    torch.testing.assert_close(decoder.logits(hidden[-1]), logits)
    last = decoder(tokens(), last_only=True)
    torch.testing.assert_close(last, logits[:, -1:])


@torch.no_grad()
def test_future_tokens_do_not_change_past_logits(decoder):
    changed = tokens()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCAB
    before, after = decoder(tokens()), decoder(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-12)
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


@torch.no_grad()
def test_past_tokens_do_change_later_logits(decoder):
    changed = tokens()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    assert ((decoder(tokens()) - decoder(changed)).abs().amax(-1) > 1e-6).all()


def test_gradient_reaches_every_used_parameter(decoder, method):
    for name, gradient in gradients(decoder).items():
        of_corrections = ("layers.1.correction_norm.", "layers.1.mix.inner")
        unused = name.startswith(of_corrections) and decoder.schedule[1] == 0
        unused = unused and METHODS[method].has_corrections
        assert (gradient is None) == unused, name
        assert unused or gradient.abs().max() > 0, name


def test_gradient_equals_finite_differences(decoder):
    """Along a random direction through all parameters at once."""
    found = gradients(decoder)
    torch.manual_seed(2)
    direction = {
        name: torch.randn_like(parameter) for name, parameter in decoder.named_parameters()
    }
    slope = sum(
        float((found[name] * direction[name]).sum()) for name in found if found[name] is not None
    )
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                parameter.add_(step * direction[name])
            losses.append(float(next_token_loss(decoder(tokens()), tokens())))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5)


@torch.no_grad()
def test_evaluations_counted_equal_evaluations_claimed(decoder, method):
    claimed = [
        METHODS[method].evaluations_per_layer(decoder.schedule, layer) for layer in range(LAYERS)
    ]
    made = list(decoder.evaluations(tokens()))
    assert sorted(made) == [(layer, k) for layer in range(LAYERS) for k in range(claimed[layer])]
    assert tuple(claimed) == decoder.evaluations_per_layer()
    calls = []
    for field in decoder.fields:
        field.register_forward_hook(lambda *_: calls.append(None))
    decoder(tokens())
    assert len(calls) == sum(claimed)


def test_parameters_counted_equal_parameters_claimed(decoder, method):
    config, own = decoder.config, decoder.method_parameters()
    assert sum(p.numel() for p in decoder.parameters()) == num_parameters(config)
    beside = num_parameters(config) - num_parameters(config, include_mix=False)
    assert sum(parameter.numel() for parameter in own.values()) == beside
    assert not any(".field." in name for name in own)


@pytest.mark.parametrize("cuts", [(TIME,), tuple(range(1, TIME + 1)), (4, 5, 9, TIME)])
@torch.no_grad()
def test_cached_equals_full(decoder, cuts):
    """Prefill in any number of chunks, a single token among them."""
    cache = KeyValueCache(decoder.config, batch_size=BATCH, max_tokens=TIME, dtype=torch.float64)
    parts = [
        decoder(tokens()[:, start:end], cache=cache)
        for start, end in itertools.pairwise((0, *cuts))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens()), rtol=0, atol=1e-11)
    assert cache.get_seq_length() == TIME


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(decoder):
    alone = decoder(tokens()[:, 3:])
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[:, :3] = False
    padded = decoder(tokens(), attention_mask=mask)
    torch.testing.assert_close(padded[:, 3:], alone, rtol=0, atol=1e-11)
    cache = KeyValueCache(decoder.config, batch_size=BATCH, max_tokens=TIME, dtype=torch.float64)
    prefill = decoder(tokens()[:, :7], cache=cache, attention_mask=mask[:, :7])
    rest = decoder(tokens()[:, 7:], cache=cache, attention_mask=mask)
    torch.testing.assert_close(torch.cat([prefill, rest], 1)[:, 3:], alone, rtol=0, atol=1e-11)


@torch.no_grad()
def test_branches_of_a_row_equal_their_own_rows(decoder):
    """Two continuations, of the second token of each row on, behind each other in one row."""
    first, second = tokens()[:, :5], torch.cat([tokens()[:, :2], tokens()[:, 5:]], 1)
    row = torch.cat([first, second[:, 2:]], 1)
    size = row.size(1)
    visible = torch.ones(BATCH, size, size, dtype=torch.bool).tril()
    visible[:, 5:, 2:5] = False
    positions = torch.tensor([[*range(5), *range(2, second.size(1))]])
    logits = decoder(row, attention_mask=visible, position_ids=positions)
    expected = torch.cat([decoder(first), decoder(second)[:, 2:]], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    for arguments in (
        {},
        {
            "position_ids": positions,
            "cache": KeyValueCache(decoder.config, batch_size=1, max_tokens=9),
        },
    ):
        with pytest.raises(ValueError, match=r"must be \(batch, time, time\)"):
            decoder(row, attention_mask=visible, **arguments)


def test_inference_equals_training(decoder):
    """The paths with and without gradients are different code."""
    with torch.no_grad():
        without = decoder(tokens())
    torch.testing.assert_close(decoder(tokens()), without, rtol=0, atol=1e-12)


def test_two_runs_are_bitwise_equal(method):
    first, second = (gradients(decoder_of(config_of(method), torch.float32)) for _ in range(2))
    for name, gradient in first.items():
        assert gradient is None or torch.equal(gradient, second[name]), name


def test_save_and_load(decoder, tmp_path):
    torch.save(decoder.state_dict(), tmp_path / "weights.pt")
    config = ModelConfig.from_dict(decoder.config.to_dict())
    again = Decoder(config).double()
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(again(tokens()), decoder(tokens()))


def test_activation_checkpointing_gives_the_same_gradients(decoder):
    kept = gradients(decoder)
    decoder.activation_checkpointing = True
    for name, gradient in gradients(decoder).items():
        assert (gradient is None) == (kept[name] is None)
        assert gradient is None or torch.equal(gradient, kept[name]), name


def test_schedule_of_a_call(decoder, method):
    other = schedule_for(method, (0, 3, 0))
    if other is None:
        with pytest.raises(ValueError, match="makes no corrections"):
            decoder(tokens(), schedule=IterationSchedule((0, 3, 0)))
        assert torch.equal(decoder(tokens(), schedule=decoder.schedule), decoder(tokens()))
        return
    twin = decoder.with_schedule(other)
    assert torch.equal(twin(tokens()), decoder(tokens(), schedule=other))
    assert twin.schedule == other
    assert decoder.schedule == schedule_for(method, (2, 0, 1))
    shared = zip(twin.parameters(), decoder.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in shared)
    with pytest.raises(ValueError, match="is for 2 layers, the model has 3"):
        decoder(tokens(), schedule=IterationSchedule((1, 1)))


def test_bfloat16_autocast_is_close_and_trains(method):
    decoder = decoder_of(config_of(method), torch.float32)
    exact = decoder(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(tokens())
        loss = next_token_loss(logits, tokens())
    loss.backward()
    assert (logits.float() - exact).abs().max() < 0.25 * exact.std()
    for name, parameter in decoder.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name


def test_bfloat16_weights(method):
    exact = decoder_of(config_of(method), torch.float32)
    decoder = decoder_of(config_of(method), torch.float32).bfloat16()
    next_token_loss(decoder(tokens()), tokens()).backward()
    with torch.no_grad():
        assert (decoder(tokens()).float() - exact(tokens())).abs().max() < 0.5 * exact(
            tokens()
        ).std()


def test_more_tokens_than_the_context(decoder):
    with pytest.raises(ValueError, match="17 tokens do not fit a context_length of 16"):
        decoder(tokens(1, 17))
    cache = KeyValueCache(decoder.config, batch_size=1, max_tokens=20, dtype=torch.float64)
    with torch.no_grad():
        decoder(tokens(1, 10), cache=cache)
        with pytest.raises(ValueError, match="context_length"):
            decoder(tokens(1, 7), cache=cache)


def test_evaluations_per_layer_does_not_touch_the_config(decoder):
    before = dataclasses.asdict(decoder.config)
    decoder.evaluations_per_layer()
    assert dataclasses.asdict(decoder.config) == before
