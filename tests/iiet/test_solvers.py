"""Corrections: damping, truncated gradients, and residuals for observers only."""

import dataclasses

import pytest
import torch
from live_tensors import LiveTensors, SeenOperations
from model_cases import assert_same, gradients, make_model, tokens

from iiet import Decoder, IterationSchedule, next_token_loss
from iiet.methods.implicit_euler import fixed_point
from iiet.model.context import make_context

IDS = tokens(2, 9)


def decoder_of(schedule=(3, 0, 2), **options):
    return make_model(schedule=schedule, method_options=options or None)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_learned_damping_of_zero_starts_as_the_model_without_corrections(kind):
    decoder = decoder_of(damping=0.0, learn_damping=kind)
    for layer in decoder.model.layers:
        torch.nn.init.zeros_(layer.damping)
    without = decoder(IDS, schedule=IterationSchedule.none(3))
    assert torch.equal(decoder(IDS), without)
    gradient_of = gradients(decoder)
    for layer in (0, 2):
        assert (gradient_of[f"model.layers.{layer}.damping"].abs() > 0).all()
    assert gradient_of["model.layers.1.damping"] is None, (
        "a layer without corrections does not use it"
    )


@pytest.mark.parametrize("reinjects", [False, True])
@pytest.mark.parametrize("damping", [1.0, 0.4])
@torch.no_grad()
def test_each_correction_applies_its_share_of_a_step_and_may_read_the_prediction(
    damping, reinjects
):
    decoder = decoder_of(reinject_prediction=reinjects, damping=damping)
    evaluations = []
    decoder(IDS, observe=evaluations.append)
    history = [evaluations[0].input]
    for number, layer in enumerate(decoder.model.layers):
        prediction, *corrections = (
            evaluation for evaluation in evaluations if evaluation.layer == number
        )
        *earlier, own_weight = layer.mix.inner
        e = prediction.estimate
        assert prediction.residual is None
        for correction in corrections:
            point = sum(a * s for a, s in zip(earlier, history, strict=True)) + own_weight * e
            if reinjects:
                point = point + layer.reinjection * prediction.estimate
            torch.testing.assert_close(correction.input, point)
            torch.testing.assert_close(correction.residual, correction.estimate - e)
            e = torch.lerp(e, correction.estimate, damping)
        history.append(e)
    assert len(history) == 4


@pytest.mark.parametrize("options", [{}, {"damping": 0.4}, {"differentiated_corrections": 1}])
def test_a_reinjection_starts_as_the_plain_model_and_is_learned(options):
    plain = decoder_of(**options)
    reinjecting = dataclasses.replace(plain.config.options, reinject_prediction=True)
    decoder = Decoder(dataclasses.replace(plain.config, method_options=reinjecting)).double()
    missing, _ = decoder.load_state_dict(plain.state_dict(), strict=False)
    assert missing == [f"model.layers.{layer}.reinjection" for layer in range(3)]
    assert torch.equal(decoder(IDS), plain(IDS))
    gradient_of = gradients(decoder)
    expected = gradients(plain)
    assert_same({name: gradient_of[name] for name in expected}, expected)
    assert [gradient_of[name] is None for name in missing] == [False, True, False]


@pytest.mark.parametrize("has_gradients", [False, True])
def test_residuals_are_computed_for_observers_alone(has_gradients):
    decoder = decoder_of()
    decoder(IDS)  # Makes the rotary tables.
    names = []
    for observe in (None, lambda _: None):
        with torch.set_grad_enabled(has_gradients), SeenOperations() as operations:
            decoder(IDS, observe=observe)
        names.append(sorted(operations.names))
    ordinary, observed = names
    assert "sub" not in ordinary
    assert observed == sorted([*ordinary, *["sub"] * 5])


def loss_by_hand(decoder, last):
    """Return the loss by formulas; all but the last corrections of a layer are constants."""
    hidden = decoder.model.embed_tokens(IDS)
    context = make_context(hidden, decoder.rope)
    estimates = [hidden]
    for layer, count in zip(decoder.model.layers, decoder.schedule, strict=True):
        e = prediction = layer.prediction_norm(layer.field(hidden, context))
        *earlier, own_weight = layer.mix.inner.unbind()
        for k in range(count):
            if k == count - last and k > 0:
                e = e.detach()
            sums = sum(a * s for a, s in zip(earlier, estimates, strict=True))
            if layer.reinjection is not None:
                reinjected = prediction.detach() if last < count else prediction
                sums = sums + layer.reinjection * reinjected
            e = layer.correction_norm(layer.field(sums + own_weight * e, context))
        estimates.append(e)
        hidden = sum(c * s for c, s in zip(layer.mix.outer.unbind(), estimates, strict=True))
    return next_token_loss(decoder.logits(hidden), IDS)


@pytest.mark.parametrize("reinjects", [False, True])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_truncated_backward_pass_is_that_of_the_truncated_graph(last, reinjects):
    """Values are those of the whole pass to the last bit. With 2 corrections of 2, and 3 of 3, the
    whole layer is differentiated."""
    truncated, whole = (
        decoder_of(differentiated_corrections=most, reinject_prediction=reinjects)
        for most in (last, None)
    )
    assert torch.equal(truncated(IDS), whole(IDS))
    gradient_of = gradients(truncated)
    assert_same(gradient_of, gradients(whole, loss_by_hand(whole, last)), rtol=1e-9, atol=1e-12)
    assert (gradient_of["model.layers.0.prediction_norm.weight"] is None) == (last < 3)


def test_a_recomputed_layer_keeps_its_last_correction_alone():
    """The prediction is not kept: it counts as a constant."""

    def peak(**options):
        decoder = decoder_of(schedule=(3, 3, 3), **options)
        decoder.activation_checkpointing = True
        with LiveTensors(decoder) as live:
            next_token_loss(decoder(IDS), IDS).backward()
        return live.peak

    assert peak(differentiated_corrections=1) < 0.58 * peak()


def test_the_solver_forgets_weights_that_were_cast_without_gradients():
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        value = fixed_point(linear, torch.ones(1, 4), 3, num_constant=2)
    value.float().sum().backward()
    assert linear.weight.grad.abs().max() > 0
