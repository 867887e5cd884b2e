"""Corrections: damping, truncated gradients, and residuals for observers only."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from live_tensors import LiveTensors
from torch.utils._python_dispatch import TorchDispatchMode

from iiet import Decoder, IterationSchedule, next_token_loss, preset
from iiet.context import make_context
from iiet.methods.implicit_euler import fixed_point

VOCAB = 29
OPTIONS = {
    "damped": {"damping": 0.5},
    "learned": {"damping": 0.25, "learn_damping": True},
    "off": {"damping": 0.0, "learn_damping": True},
    "truncated": {"differentiated_corrections": 1},
    "reinjected": {"reinject_prediction": True},
    "all": {
        "damping": 0.7,
        "learn_damping": True,
        "differentiated_corrections": 2,
        "reinject_prediction": True,
    },
}


def small_decoder(schedule=(3, 0, 2), dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = preset(
        "tiny", vocab_size=VOCAB, dim=16, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=24,
        context_length=16, schedule=schedule, initializer_std=0.2, method_options=options,
    )  # fmt: skip
    decoder = Decoder(config).to(dtype)
    for layer in decoder.layers:
        if layer.reinjection is not None:  # It starts at 0, where nothing would be seen of it.
            torch.nn.init.constant_(layer.reinjection, 0.3 * (1 + layer.index))
    return decoder


def tokens(batch=2, time=11):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def gradients(decoder, autocast=None):
    decoder.zero_grad()
    with autocast or nullcontext():
        loss = next_token_loss(decoder(tokens()), tokens())
    loss.backward()
    return {name: parameter.grad for name, parameter in decoder.named_parameters()}


def assert_same(found, expected):
    for name, gradient in found.items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name


@torch.no_grad()
def test_damping_applies_its_share_of_each_step():
    decoder = small_decoder(damping=0.25)
    seen = []
    decoder(tokens(), observe=seen.append)
    first = [evaluation for evaluation in seen if evaluation.layer == 0]
    row = decoder.layers[0].mix.inner
    embeddings, e = first[0].input, first[0].estimate
    for correction in first[1:]:
        torch.testing.assert_close(correction.input, row[0] * embeddings + row[1] * e)
        torch.testing.assert_close(correction.residual, correction.estimate - e)
        e = 0.75 * e + 0.25 * correction.estimate


def test_a_learned_damping_of_zero_starts_as_the_model_without_corrections():
    decoder = small_decoder(**OPTIONS["off"])
    without = decoder(tokens(), schedule=IterationSchedule.none(3))
    assert torch.equal(decoder(tokens()), without)
    found = gradients(decoder)
    assert all(found[f"layers.{layer}.damping"].abs() > 0 for layer in (0, 2))
    assert found["layers.1.damping"] is None, "a layer without corrections does not use it"
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    optimizer.step()
    assert not torch.equal(decoder(tokens()), decoder(tokens(), schedule=IterationSchedule.none(3)))


@pytest.mark.parametrize("damping", [1.0, 0.4])
@torch.no_grad()
def test_each_correction_also_reads_the_prediction(damping):
    decoder = small_decoder(reinject_prediction=True, damping=damping)
    seen = []
    decoder(tokens(), observe=seen.append)
    history = [seen[0].input]
    for number, layer in enumerate(decoder.layers):
        prediction, *corrections = (one for one in seen if one.layer == number)
        *earlier, own = layer.mix.inner
        e = prediction.estimate
        for correction in corrections:
            mixed = sum(a * s for a, s in zip(earlier, history, strict=True)) + own * e
            point = mixed + 0.3 * (1 + number) * prediction.estimate
            torch.testing.assert_close(correction.input, point)
            e = torch.lerp(e, correction.estimate, damping)
        history.append(e)
    assert len(history) == 4


@pytest.mark.parametrize("options", [{}, {"damping": 0.4}, {"differentiated_corrections": 1}])
def test_a_reinjection_starts_as_the_plain_model_and_is_learned(options):
    plain = small_decoder(**options)
    decoder = Decoder(
        dataclasses.replace(
            plain.config,
            method_options=dataclasses.replace(plain.config.options, reinject_prediction=True),
        )
    ).double()
    missing, _ = decoder.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"layers.{layer}.reinjection" for layer in range(3)]
    assert torch.equal(decoder(tokens()), plain(tokens()))
    found, expected = gradients(decoder), gradients(plain)
    assert_same({name: found[name] for name in expected}, expected)
    assert [found[name] is None for name in missing] == [False, True, False]
    step = 1e-6
    for name in (missing[0], missing[2]):
        losses = []
        for value in (step, -step):
            torch.nn.init.constant_(decoder.get_parameter(name), value)
            with torch.no_grad():
                losses.append(next_token_loss(decoder(tokens()), tokens()).item())
        torch.nn.init.zeros_(decoder.get_parameter(name))
        slope = (losses[0] - losses[1]) / (2 * step)
        if "differentiated_corrections" in options:  # Constants depend on it, too.
            assert abs(found[name].item()) > 1e-6
        else:
            assert found[name].item() == pytest.approx(slope, rel=1e-5)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_gradients", [False, True])
def test_residuals_are_computed_for_observers_alone(has_gradients):
    decoder = small_decoder()
    decoder(tokens())  # Makes the rotary tables.
    names = []
    for observe in (None, lambda _: None):
        with torch.set_grad_enabled(has_gradients), Operations() as operations:
            decoder(tokens(), observe=observe)
        names.append(sorted(operations.names))
    ordinary, observed = names
    assert "aten.sub" not in ordinary
    assert observed == sorted([*ordinary, *["aten.sub"] * 5])


def loss_by_hand(decoder, last):
    """The formulas, in which all but the last corrections of a layer are constants."""
    hidden = decoder.embedding(tokens())
    context, estimates = make_context(hidden, decoder.rope), [hidden]
    for layer, count in zip(decoder.layers, decoder.schedule, strict=True):
        e = prediction = layer.prediction_norm(layer.field(hidden, context))
        *earlier, own = layer.mix.inner.unbind()
        for k in range(count):
            if k == count - last and k > 0:
                e = e.detach()
            sums = sum(a * s for a, s in zip(earlier, estimates, strict=True))
            if layer.reinjection is not None:
                first = prediction.detach() if last < count else prediction
                sums = sums + layer.reinjection * first
            e = layer.correction_norm(layer.field(sums + own * e, context))
        estimates.append(e)
        hidden = sum(c * s for c, s in zip(layer.mix.outer.unbind(), estimates, strict=True))
    return next_token_loss(decoder.logits(hidden), tokens())


@pytest.mark.parametrize("reinjects", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_truncated_backward_pass_is_that_of_the_truncated_graph(last, reinjects):
    """Values are those of the whole pass to the last bit. With 2 corrections of 2, and 3 of 3, the
    whole layer is differentiated."""
    truncated, whole = (
        small_decoder(differentiated_corrections=most, reinject_prediction=reinjects)
        for most in (last, None)
    )
    assert torch.equal(truncated(tokens()), whole(tokens()))
    found = gradients(truncated)
    loss_by_hand(whole, last).backward()
    for name, parameter in whole.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)
    assert (found["layers.0.prediction_norm.weight"] is None) == (last < 3)


def test_a_recomputed_layer_keeps_its_last_correction_alone():
    """Not the prediction, which counts as a constant."""

    def peak(**options):
        decoder = small_decoder(schedule=3, **options)
        decoder.activation_checkpointing = True
        with LiveTensors(decoder) as live:
            next_token_loss(decoder(tokens()), tokens()).backward()
        return live.peak

    assert peak(differentiated_corrections=1) < 0.58 * peak()


def test_the_solver_forgets_weights_that_were_cast_without_gradients():
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        value = fixed_point(linear, lambda: torch.ones(1, 4), 3, num_differentiated=1)
    value.float().sum().backward()
    assert linear.weight.grad.abs().max() > 0
