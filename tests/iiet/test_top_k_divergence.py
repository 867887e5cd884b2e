"""Buckets hold all the mass, and their divergence is a true one.

It has gradient zero at equality, is never negative, and grows with k up to the full divergence.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iiet import losses
from iiet.coarse_distribution import coarse_kl_divergence, coarsen
from iiet.losses import kl_divergence

VOCAB = 17


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def written_out(teacher, student, top_k, temperature):
    """The textbook sum over plain lists of bucket masses."""
    total = count = 0.0
    for t_row, s_row in zip(teacher.flatten(0, 1), student.flatten(0, 1), strict=True):
        p, q = (t_row / temperature).softmax(-1), (s_row / temperature).softmax(-1)
        top = sorted(range(len(p)), key=lambda v: -p[v])[:top_k]
        buckets = [[v] for v in top] + [[v for v in range(len(p)) if v not in top]]
        masses = [(sum(p[v] for v in b), sum(q[v] for v in b)) for b in buckets]
        total += sum(float(a * math.log(a / b)) for a, b in masses if a > 0)
        count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("top_k", [1, 5, VOCAB, VOCAB + 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_buckets_hold_all_the_mass(top_k, temperature):
    logits = random_logits(2, 3, VOCAB)
    coarse = coarsen(logits, top_k, temperature=temperature)
    mass = coarse.log_probs.exp().sum(-1) + coarse.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    p = (logits / temperature).softmax(-1)
    torch.testing.assert_close(coarse.log_probs.exp(), p.gather(-1, coarse.ids))
    assert coarse.ids.shape == (2, 3, min(top_k, VOCAB))
    assert (p.max(-1).indices == coarse.ids[..., 0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_keep_results_bitwise_equal(dtype, monkeypatch):
    logits = (3 * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole = coarsen(logits, 4, temperature=2.0)
    monkeypatch.setattr("iiet.losses.CHUNK_ELEMENTS", 3 * 11)
    parts = coarsen(logits, 4, temperature=2.0)
    for name in ("ids", "log_probs", "log_tail"):
        assert torch.equal(getattr(parts, name), getattr(whole, name)), name


def test_a_tiny_tail_keeps_its_digits():
    logits = torch.tensor([[[0.0, -40.0, -41.0]]])
    tail = coarsen(logits, 1).log_tail.item()
    assert tail == pytest.approx(-40 + math.log1p(math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_zero_and_flat_at_equality(top_k, temperature, dtype):
    logits = random_logits(3, 5, VOCAB, dtype=dtype, scale=6.0)
    student = logits.clone().requires_grad_()
    loss = coarse_kl_divergence(coarsen(logits, top_k, temperature=temperature), student)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("top_k", [1, 4, VOCAB])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_equals_the_sum_written_out(top_k, temperature):
    teacher, student = random_logits(2, 3, VOCAB), random_logits(2, 3, VOCAB, seed=1)
    loss = coarse_kl_divergence(coarsen(teacher, top_k, temperature=temperature), student)
    expected = written_out(teacher, student, top_k, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_grows_with_k_to_the_full_divergence():
    teacher, student = random_logits(2, 3, VOCAB), random_logits(2, 3, VOCAB, seed=1)
    coarse = [coarse_kl_divergence(coarsen(teacher, k), student).item() for k in range(1, VOCAB)]
    full = kl_divergence(teacher, student).item()
    assert coarse == sorted(coarse)
    assert 0 < coarse[0] < coarse[-2] < full
    whole = coarse_kl_divergence(coarsen(teacher, VOCAB), student).item()
    assert whole == pytest.approx(full, rel=1e-12)
    # With a bucket each for all but one token, the tail is that one.
    assert coarse[-1] == pytest.approx(full, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_gradient_equals_finite_differences(top_k, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 8)
    teacher = coarsen(random_logits(2, 3, 5), top_k, temperature=1.7)
    student = random_logits(2, 3, 5, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert torch.autograd.gradcheck(lambda x: coarse_kl_divergence(teacher, x, mask=mask), student)


@pytest.mark.parametrize("gap", [1.0, 5.0, 9.5, 11.0, 30.0])
def test_the_gradient_of_a_tail_with_almost_no_mass(gap):
    teacher = torch.tensor([[[5.0, 4.9, 0.0, 0.0]]])
    grads = []
    for dtype in (torch.float32, torch.float64):
        student = torch.tensor([[[gap, 0.0, 0.0, 0.0]]], dtype=dtype, requires_grad=True)
        coarse = coarsen(teacher.to(dtype), 1, temperature=0.1)
        coarse_kl_divergence(coarse, student).backward()
        grads.append(student.grad)
    assert grads[0].numpy() == pytest.approx(grads[1].numpy(), rel=1e-4)
    assert grads[0][0, 0, 1:].max() < 0, "the tail is asked for more mass"


@settings(max_examples=40)
@given(st.integers(1, 33), st.integers(0, 10_000), st.floats(1e-5, 30), st.floats(0.2, 5))
def test_never_negative_however_close(top_k, seed, scale, temperature):
    teacher = random_logits(1, 4, 33, seed=seed, dtype=torch.float32)
    student = teacher + random_logits(1, 4, 33, seed=seed + 1, scale=scale, dtype=torch.float32)
    coarse = coarsen(teacher, top_k, temperature=temperature)
    loss = coarse_kl_divergence(coarse, student).item()
    assert 0 <= loss < math.inf


def test_masked_positions_do_not_count_even_if_they_are_nan():
    teacher, student = random_logits(2, 3, VOCAB), random_logits(2, 3, VOCAB, seed=1)
    student[0, 1] = math.nan
    student.requires_grad_()
    mask = torch.tensor([[True, False, True], [True, True, True]])
    loss = coarse_kl_divergence(coarsen(teacher, 4), student, mask=mask)
    loss.backward()
    expected = written_out(teacher[mask][None], student.detach()[mask][None], 4, 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert student.grad[0, 1].abs().max() == 0
    assert student.grad[mask].abs().min() > 0


def test_mistakes_are_named():
    teacher = random_logits(1, 2, 5)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        coarsen(teacher, 0)
    with pytest.raises(ValueError, match="temperature must be from"):
        coarsen(teacher, 2, temperature=0.0)
    for shape in ((1, 3, 5), (1, 2, 1)):
        with pytest.raises(ValueError, match="same tokens and vocabulary"):
            coarse_kl_divergence(coarsen(teacher, 2), random_logits(*shape))
