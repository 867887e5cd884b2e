"""Laws that hold for every registered method, on random models of it, in float64.

A new method is tested as soon as it is registered. Equal results agree closely, because the models
are small. That an exported model equals the core is in `test_modeling.py`.
"""

import math
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from model_cases import (
    VOCAB,
    assert_same,
    cheaper,
    gradients,
    make_model,
    models,
    paddings,
    tokens,
)
from refusals import refused

from iiet import METHODS, Decoder, IterationSchedule, next_token_loss, plain_formulas
from iiet.model.batch import Batch
from iiet.model.config import ModelConfig
from iiet.model.losses import batch_cross_entropy

TIME = 9
NEAR = {"rtol": 0, "atol": 1e-9}


def of_every_method(*others, max_examples=4):
    """Run a law on random models of each method, with more that is drawn.

    Methods without corrections have neither schedules nor options, so they get two examples only.
    """

    def decorate(law):
        @pytest.mark.law  # pytest does not see that the function inside belongs to hypothesis.
        @pytest.mark.parametrize("method", METHODS)
        def test(method):
            number = max_examples if METHODS[method].facts.has_corrections else 2

            @settings(max_examples=examples(number))
            @given(models((method,)), st.tuples(*others))
            def law_of_method(decoder, values):
                law(decoder, *values)

            law_of_method()

        test.__name__ = test.__qualname__ = law.__name__
        return test

    return decorate


@of_every_method(paddings(time=TIME), st.lists(st.integers(1, 4), max_size=6))
@torch.no_grad()
def test_cached_equals_full(decoder, mask, cuts):
    """The passes may be of any length, a single token among them; later ones need no mask."""
    ids = tokens(2, TIME)
    cache = decoder.new_cache(batch_size=2, max_tokens=TIME)
    ends = [end for end in accumulate(cuts) if end < TIME]
    num_padding = (~mask).sum(1).max()
    parts = []
    for start, end in pairwise((0, *ends, TIME)):
        mask_so_far = mask[:, :end] if start <= num_padding else None
        parts.append(decoder(ids[:, start:end], cache=cache, attention_mask=mask_so_far))
    expected = decoder(ids, attention_mask=mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], **NEAR)
    assert cache.get_seq_length() == TIME


@of_every_method()
def test_fast_forms_equal_the_plain_formulas_and_inference_equals_training(decoder):
    ids = tokens(2, TIME)
    fast_gradients = gradients(decoder)
    with torch.no_grad():
        inference_logits = decoder(ids)
    torch.testing.assert_close(decoder(ids), inference_logits, **NEAR)
    with plain_formulas():
        torch.testing.assert_close(decoder(ids), inference_logits, **NEAR)
        assert_same(fast_gradients, gradients(decoder), rtol=1e-8, atol=1e-9)


@of_every_method()
def test_activation_checkpointing_and_a_second_run_change_no_bit(decoder):
    expected = gradients(decoder)
    assert_same(gradients(decoder), expected)
    decoder.activation_checkpointing = True
    assert_same(gradients(decoder), expected)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(method, tmp_path):
    options = {"damping": 0.5, "learn_damping": "scalar"} if method == "iiet" else None
    decoder = make_model(method, method_options=options, dtype=torch.float32)
    decoder.save_pretrained(tmp_path)
    loaded = Decoder.from_pretrained(tmp_path)
    assert loaded.config == decoder.config == ModelConfig.from_dict(decoder.config.to_dict())
    loaded_weights = loaded.state_dict()
    expected = decoder.state_dict()
    assert all(torch.equal(loaded_weights[name], weight) for name, weight in expected.items())
    # The file's weights lie elsewhere in memory, which may change the order of a sum.
    torch.testing.assert_close(loaded(tokens(2, TIME)), decoder(tokens(2, TIME)))


@of_every_method(
    paddings(),
    st.sampled_from(["0", "1", "3"]),
    st.integers(2, 4),
)
def test_drafted_tokens_are_those_of_plain_decoding(decoder, mask, schedule, draft_tokens):
    """Tokens are greedy or sampled, drafts cheaper or costlier than the model."""
    if (full_level := decoder.method.facts.full_level) is not None:
        schedule = str(min(full_level, int(schedule)))
    draft_options = {"draft": schedule if decoder.method.facts.has_corrections else "auto"}
    for sampling in ({}, {"temperature": 1.0, "seed": 3, "top_k": 9}):
        options = {"max_new_tokens": 6, "attention_mask": mask, **sampling}
        expected = decoder.generate(tokens(2, TIME), **options)
        generated = decoder.generate(
            tokens(2, TIME), draft_tokens=draft_tokens, **draft_options, **options
        )
        assert torch.equal(generated, expected)


@of_every_method(paddings(batch=3, time=TIME))
def test_parts_of_a_batch_add_up_and_rows_are_independent(decoder, mask):
    ids = tokens(3, TIME)
    batch = Batch.of_text(ids, mask)

    def loss(part):
        return decoder(part.input_ids, loss_fn=partial(batch_cross_entropy, batch=part))

    whole = gradients(decoder, loss(batch))
    counted = batch.counted_as(batch.num_targets, batch.num_positions)
    parts = sum(len(part) / 3 * loss(part) for part in counted.split(2))
    assert_same(gradients(decoder, parts), whole, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        together = decoder(ids, attention_mask=mask)
        for row, is_text in enumerate(mask):
            unpadded = decoder(ids[row : row + 1, is_text])
            torch.testing.assert_close(together[row : row + 1, is_text], unpadded, **NEAR)


@of_every_method(st.integers(1, TIME - 1))
@torch.no_grad()
def test_only_earlier_tokens_matter(decoder, place):
    ids = tokens(2, TIME)
    changed = ids.clone()
    changed[:, place] = (ids[:, place] + 1) % VOCAB
    difference = (decoder(ids) - decoder(changed)).abs().amax(-1)
    assert difference[:, :place].max() < 1e-12
    assert difference[:, place:].min() > 1e-9


@of_every_method()
@torch.no_grad()
def test_branches_of_a_row_equal_their_own_rows(decoder):
    """One row holds two continuations of its first two tokens, one behind the other."""
    ids = tokens(2, TIME)
    first = ids[:, :5]
    second = torch.cat([ids[:, :2], ids[:, 5:]], 1)
    row = torch.cat([first, second[:, 2:]], 1)
    visible = torch.ones(2, TIME, TIME, dtype=torch.bool).tril()
    visible[:, 5:, 2:5] = False
    positions = torch.tensor([[*range(5), *range(2, second.size(1))]])
    logits = decoder(row, attention_mask=visible, position_ids=positions)
    expected = torch.cat([decoder(first), decoder(second)[:, 2:]], 1)
    torch.testing.assert_close(logits, expected, **NEAR)
    packed = decoder(row, position_ids=torch.tensor([[*range(5), *range(TIME - 5)]]))
    torch.testing.assert_close(packed[:, 5:], decoder(row[:, 5:]), **NEAR)


@of_every_method()
def test_half_precision_is_close_and_trains(decoder):
    ids = tokens(2, TIME)
    exact = decoder(tokens(2, TIME)).detach()
    decoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(ids)
        loss = next_token_loss(logits, ids)
    for gradient in gradients(decoder, loss).values():
        assert gradient is None or (gradient.dtype == torch.float32 and gradient.isfinite().all())
    halved = decoder.bfloat16()(ids)
    for rough in (logits, halved):
        assert (rough.double() - exact).norm() < 0.3 * exact.norm()
    next_token_loss(halved, ids).backward()


@of_every_method(max_examples=3)
def test_the_gradient_equals_finite_differences_and_reaches_every_used_parameter(decoder):
    """The difference is taken along a random direction through all parameters at once."""
    if getattr(decoder.config.options, "differentiated_corrections", None) is not None:
        return  # The gradient is then another one, on purpose.
    gradient_by_name = gradients(decoder)
    ids = tokens(2, TIME)
    used = {name: gradient for name, gradient in gradient_by_name.items() if gradient is not None}
    of_corrections = ("correction_norm", "mix.inner", "damping", "reinjection", "shared.norms.1")
    for name in gradient_by_name.keys() - used.keys():
        assert decoder.method.facts.has_corrections, name
        assert any(part in name for part in of_corrections), name
    generator = torch.Generator().manual_seed(2)
    direction = {
        name: torch.randn(gradient.shape, dtype=gradient.dtype, generator=generator)
        for name, gradient in used.items()
    }
    slope = sum(float((used[name] * direction[name]).sum()) for name in used)
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for name, change in direction.items():
                decoder.get_parameter(name).add_(step * change)
            losses.append(float(next_token_loss(decoder(ids), ids)))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=2e-4, abs=1e-6)


@of_every_method()
@torch.no_grad()
def test_evaluations_made_are_those_claimed_and_seen(decoder):
    ids = tokens(2, TIME)
    claimed = decoder.evaluations_per_layer()
    places = [(layer, k) for layer, count in enumerate(claimed) for k in range(count)]
    outputs = decoder.evaluations(ids)
    inputs = decoder.evaluations(ids, inputs=True)
    assert sorted(outputs) == sorted(inputs) == places
    torch.testing.assert_close(inputs[0, 0], decoder.model.embed_tokens(ids))
    logits, hidden = decoder(ids, return_hidden=True)
    assert len(hidden) == decoder.config.num_layers
    torch.testing.assert_close(decoder.logits(hidden[-1]), logits)
    torch.testing.assert_close(decoder(ids, last_only=True), logits[:, -1:])
    calls = []
    for layer in decoder.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(None))
    decoder(ids)
    assert len(calls) == sum(claimed)


@of_every_method()
def test_a_schedule_of_a_call_is_that_of_a_twin_with_the_same_weights(decoder):
    ids = tokens(2, TIME)
    schedule = cheaper(decoder)
    if not decoder.method.facts.has_corrections:
        with pytest.raises(ValueError, match="makes no corrections"):
            decoder(ids, schedule=IterationSchedule.uniform(decoder.config.num_layers, 3))
        return
    schedule = schedule or IterationSchedule.uniform(decoder.config.num_layers, 1)
    twin = decoder.with_schedule(schedule)
    copied = decoder.copy(schedule=schedule)
    assert torch.equal(twin(ids), decoder(ids, schedule=schedule))
    assert torch.equal(twin(ids), copied(ids))
    assert twin.schedule == schedule
    for shared, original, copied_parameter in zip(
        twin.parameters(), decoder.parameters(), copied.parameters(), strict=True
    ):
        assert shared is original
        assert copied_parameter is not original
    with refused(ValueError, "layers"):
        decoder(ids, schedule=IterationSchedule((1,) * 9))


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_than_the_context_are_refused(method):
    decoder = make_model(method, context_length=16).requires_grad_(False)
    with refused(ValueError, "17", "context_length of 16"):
        decoder(tokens(1, 17))
    cache = decoder.new_cache(batch_size=1, max_tokens=20)
    decoder(tokens(1, 10), cache=cache)
    with pytest.raises(ValueError, match="context_length"):
        decoder(tokens(1, 10), cache=cache)


@settings(max_examples=examples(10))
@given(models(("iiet",)))
def test_without_corrections_and_mix_iiet_is_the_normalized_vanilla_model(decoder):
    """With rows of C that pick the layer's own estimate, `h_l = P_l(F_l(h_{l-1}))`."""
    iiet = decoder.with_schedule(0)
    config = decoder.config
    vanilla = make_model(
        "vanilla",
        (0,) * config.num_layers,
        num_kv_heads=config.num_kv_heads,
        tie_embeddings=config.tie_embeddings,
    )
    own_names = iiet.method_parameters()
    vanilla.load_state_dict({n: w for n, w in iiet.state_dict().items() if n not in own_names})
    with torch.no_grad():
        for layer, plain in zip(iiet.model.layers, vanilla.model.layers, strict=True):
            layer.mix.outer.zero_()[-1] = 1.0
            plain.register_forward_hook(
                lambda _layer, _inputs, result, norm=layer.prediction_norm: result._replace(
                    hidden=norm(result.hidden)
                )
            )
        torch.testing.assert_close(iiet(tokens(2, TIME)), vanilla(tokens(2, TIME)), **NEAR)


@settings(max_examples=examples(10))
@given(st.integers(0, 3), st.integers(1, 3))
def test_a_looped_model_is_a_deeper_vanilla_one_whose_layers_share_their_weights(r, num_layers):
    looped = make_model("looped", (r,) * num_layers)
    deep = make_model("vanilla", (0,) * ((1 + r) * num_layers))
    deep.load_state_dict(
        {name: w for name, w in looped.state_dict().items() if "layers" not in name}, strict=False
    )
    deep.model.layers = torch.nn.ModuleList([*looped.model.layers] * (1 + r))
    logits, hidden = looped(tokens(2, TIME), return_hidden=True)
    expected, deep_hidden = deep(tokens(2, TIME), return_hidden=True)
    assert torch.equal(logits, expected)
    assert all(map(torch.equal, hidden, deep_hidden[-num_layers:]))
    if num_layers > 1:
        with refused(ValueError, "stack"):
            looped(tokens(2, TIME), schedule=(r + 1, *(r,) * (num_layers - 1)))


@pytest.mark.parametrize(("method", "order"), [("vanilla", 1), ("ode_rk2", 2), ("ode_rk4", 4)])
@settings(max_examples=examples(10))
@given(z=st.floats(0.005, 0.02))
def test_order_of_convergence(method, order, z):
    """Halving the step of `x' = z x` divides the error of one step by `2^(order + 1)`."""

    decoder = make_model(method, (0,))
    (layer,) = decoder.model.layers
    errors = []
    for step in (2 * z, z):
        layer.field = lambda x, _context, _slot, step=step: x + step * x
        ones = torch.ones(1, 1, decoder.config.dim, dtype=torch.float64)
        (hidden,) = decoder.hidden_states(ones)
        errors.append(abs(hidden[0, 0, 0].item() - math.exp(step)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.05)
