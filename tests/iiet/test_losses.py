"""Losses are zero with zero gradient at equality, never negative, and equal to their formula.

Expected values come from sums written out over the vocabulary in float64, gradients from finite
differences, and the cross-entropy also from the stored reference cases.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from refusals import refused

from iiet.model import losses
from iiet.model.batch import NO_TARGET, Batch
from iiet.model.losses import cross_entropy, hidden_state_error, kl_divergence

KINDS = ("forward", "reverse")


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def divergence_of(p, q, kind):
    """Return the textbook sums over plain lists of probabilities."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    return kl(p, q) if kind == "forward" else kl(q, p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_and_flat_at_equality(kind, temperature, dtype):
    teacher = random_logits(3, 5, 17, dtype=dtype, scale=6.0)
    student = teacher.clone().requires_grad_()
    loss = kl_divergence(teacher, student, temperature=temperature, kind=kind)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_equals_the_sums_written_out(kind, temperature):
    teacher = random_logits(2, 3, 5)
    student = random_logits(2, 3, 5, seed=1)
    p = (teacher / temperature).softmax(-1).flatten(0, 1).tolist()
    q = (student / temperature).softmax(-1).flatten(0, 1).tolist()
    per_token = [divergence_of(a, b, kind) for a, b in zip(p, q, strict=True)]
    expected = temperature**2 * sum(per_token) / len(per_token)
    loss = kl_divergence(teacher, student, temperature=temperature, kind=kind)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_finite_differences(kind, monkeypatch):
    monkeypatch.setattr(losses, "CPU_ELEMENTS", 8)
    teacher = random_logits(2, 3, 5)
    student = random_logits(2, 3, 5, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert torch.autograd.gradcheck(
        lambda x: kl_divergence(teacher, x, temperature=1.7, mask=mask, kind=kind), student
    )


@settings(max_examples=examples(40))
@given(st.sampled_from(KINDS), st.integers(0, 10_000), st.floats(1e-5, 30), st.floats(0.2, 5))
def test_never_negative_however_close(kind, seed, scale, temperature):
    teacher = random_logits(1, 4, 33, seed=seed, dtype=torch.float32)
    student = teacher + random_logits(1, 4, 33, seed=seed + 1, scale=scale, dtype=torch.float32)
    loss = kl_divergence(teacher, student, temperature=temperature, kind=kind).item()
    assert loss >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_chunks_that_grow_with_the_logits_keep_results_bitwise_equal(
    kind, temperature, monkeypatch
):
    teacher, student = random_logits(2, 8 * 701, scale=3.0).float().view(2, 2, 4, 701)
    results = []
    for elements in (1, 3000, 1 << 21):
        monkeypatch.setattr(losses, "CPU_ELEMENTS", elements)
        leaf = student.clone().requires_grad_()
        loss = kl_divergence(teacher, leaf, temperature=temperature, kind=kind)
        loss.backward()
        results.append(torch.cat([loss.detach().view(1), leaf.grad.flatten()]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_have_no_effect(kind):
    teacher = random_logits(2, 4, 6)
    student = random_logits(2, 4, 6, seed=1)
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    dirty = student.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    loss = kl_divergence(teacher, dirty, mask=mask, kind=kind)
    selected_loss = kl_divergence(teacher[mask].unsqueeze(0), student[mask].unsqueeze(0), kind=kind)
    assert loss.item() == pytest.approx(selected_loss.item(), rel=1e-13)
    loss.backward()
    assert dirty.grad[~mask].abs().max() == 0
    assert dirty.grad[mask].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_both_models_exclude_do_no_harm(kind):
    teacher = random_logits(1, 2, 6)
    student = random_logits(1, 2, 6, seed=1)
    impossible = torch.tensor([False] * 5 + [True])
    leaf = student.masked_fill(impossible, -math.inf).requires_grad_()
    loss = kl_divergence(teacher.masked_fill(impossible, -math.inf), leaf, kind=kind)
    loss.backward()
    smaller = kl_divergence(teacher[..., :5], student[..., :5], kind=kind)
    assert loss.item() == pytest.approx(smaller.item(), rel=1e-12)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("loss", KINDS)
def test_gradients_of_float16_logits_survive_under_a_scaled_loss(loss):
    teacher, student = (random_logits(64, 64, 64, seed=s).half() for s in (0, 1))

    def gradient(dtype):
        leaf = student.to(dtype).requires_grad_()
        value = kl_divergence(teacher.to(dtype), leaf, kind=loss)
        (2.0**16 * value).backward()  # As a gradient scaler does; more than float16 can hold.
        assert leaf.grad.dtype == dtype
        return leaf.grad.double()

    expected = gradient(torch.float64)
    assert (gradient(torch.float16) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("count", [None, 3.0])
def test_no_loss_waits_for_the_device(count):
    # On the meta device there are no values: whoever asks for one gets an error.
    logits = torch.empty(2, 4, 6, device="meta", requires_grad=True)
    tokens = torch.empty(2, 4, device="meta", dtype=torch.long)
    for mask in (None, torch.empty(2, 4, device="meta", dtype=torch.bool)):
        options = {"mask": mask, "count": count}
        batch = Batch.of_text(tokens, mask)
        for loss in (
            cross_entropy(logits, batch.targets, mask=batch.teacher_mask, count=count),
            kl_divergence(torch.empty_like(logits), logits, **options),
            hidden_state_error([torch.empty_like(logits)], [logits], **options),
        ):
            loss.backward()


def test_wrong_use_is_named():
    teacher = random_logits(1, 2, 5)
    student = random_logits(1, 2, 6)
    with pytest.raises(ValueError, match="shape"):
        kl_divergence(teacher, student)
    for temperature in (0.0, 1e-42, 1e30, math.inf, math.nan):
        with refused(ValueError, "temperature", "0.001", "1000"):
            kl_divergence(teacher, teacher, temperature=temperature)
    for temperature in (1e-3, 1e3):
        assert kl_divergence(teacher, -teacher, temperature=temperature).isfinite()
    with pytest.raises(ValueError, match="backward"):
        kl_divergence(teacher, teacher, kind="backward")
    with refused(ValueError, "targets", "(1, 3)"):
        cross_entropy(teacher, torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("count", [None, 7.5])
def test_cross_entropy_and_its_gradient_equal_a_sum_over_single_positions(count):
    logits = random_logits(3, 4, 7).requires_grad_()
    targets = torch.tensor([[0, 3, 6, 1], [NO_TARGET, 2, 5, 0], [4, 4, NO_TARGET, 6]])
    mask = torch.tensor([[True, False, True, False], [True] * 4, [False] * 4])
    terms = [
        logits[b, t].logsumexp(-1) - logits[b, t, targets[b, t]]
        for b in range(3)
        for t in range(4)
        if mask[b, t] and targets[b, t] != NO_TARGET
    ]
    assert len(terms) == 5
    expected = torch.stack(terms).sum() / (count or 5)
    (gradient,) = torch.autograd.grad(expected, logits)
    # Whatever stands at masked positions makes no difference: no numbers, or no tokens.
    dirty = logits.detach().masked_fill(~mask.unsqueeze(-1), math.nan).requires_grad_()
    for nonsense in (-100, -5, 10**6):
        dirty_targets = targets.where(mask, torch.tensor(nonsense))
        loss = cross_entropy(dirty, dirty_targets, mask=mask, count=count)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(loss, dirty)[0], gradient)


@pytest.mark.parametrize("count", [None, 0.0])
def test_a_loss_over_nothing_is_zero_and_flat(count):
    logits = random_logits(2, 4, 6).requires_grad_()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    targets = torch.zeros(2, 4, dtype=torch.long)
    for loss in (
        cross_entropy(logits, targets, mask=mask, count=count),
        cross_entropy(logits, torch.full_like(targets, NO_TARGET), count=count),
        kl_divergence(random_logits(2, 4, 6, seed=1), logits, mask=mask, count=count),
        hidden_state_error([random_logits(2, 4, 6, seed=1)], [logits], mask=mask, count=count),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_hidden_state_error_is_relative_and_flat_at_equality():
    teacher = [random_logits(2, 3, 4, seed=seed, scale=10.0**seed) for seed in range(3)]
    student = [h.clone().requires_grad_() for h in teacher]
    error = hidden_state_error(teacher, student)
    error.backward()
    assert error.item() == 0
    assert all(h.grad.abs().max() == 0 for h in student)
    # 10% off in every layer, whatever its size, is an error of 0.01.
    assert hidden_state_error(teacher, [1.1 * h for h in teacher]).item() == pytest.approx(0.01)


def test_hidden_state_error_leaves_masked_positions_out():
    teacher = random_logits(2, 3, 4)
    student = random_logits(2, 3, 4, seed=1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    expected = hidden_state_error([teacher[mask]], [student[mask]]).item()
    student[~mask] = math.nan
    student.requires_grad_()
    error = hidden_state_error([teacher], [student], mask=mask)
    error.backward()
    assert error.item() == pytest.approx(expected, rel=1e-12)
    assert student.grad[~mask].abs().max() == 0
    nothing = hidden_state_error([teacher], [student], mask=torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.item() == 0
