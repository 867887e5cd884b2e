"""The sampler follows the probabilities, with noise that belongs to row, position and token."""

import math

import numpy as np
import pytest
import torch
from refusals import refused

from iiet.decoding.sampling import Sampler, row_keys

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])
LOGITS = PROBABILITIES.log()


def splitmix64(seed, count):
    """Return a number of the published sequence of a seed; `count` is 0 for the first."""
    state = (seed + (count + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def sampler_of(seed=0, batch=1, **settings):
    return Sampler(**{"temperature": 1.0, **settings}, row_keys=row_keys(seed, batch))


def shares(logits, *, count=20_000, **settings):
    """Return how often each token is chosen in many positions of a row."""
    chosen = sampler_of(**settings)(logits.expand(1, count, -1), torch.arange(count)[None])
    return torch.bincount(chosen[0], minlength=logits.numel()) / count


def test_sampling_follows_the_probabilities():
    torch.testing.assert_close(shares(LOGITS), PROBABILITIES, rtol=0, atol=0.02)
    sharp = PROBABILITIES**2 / (PROBABILITIES**2).sum()
    torch.testing.assert_close(shares(LOGITS, temperature=0.5), sharp, rtol=0, atol=0.02)
    likeliest_two = torch.tensor([0, 2, 0, 1]) / 3
    for settings in ({"top_k": 2}, {"top_p": 0.75}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}):
        torch.testing.assert_close(shares(LOGITS, **settings), likeliest_two, rtol=0, atol=0.02)
    likeliest = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for settings in ({"top_k": 1}, {"top_p": 0.3}, {"top_p": 0.5}, {"temperature": 0.0}):
        assert torch.equal(shares(LOGITS, **settings), likeliest)
    torch.testing.assert_close(shares(LOGITS, top_k=9, top_p=1.0), PROBABILITIES, rtol=0, atol=0.02)


@pytest.mark.parametrize("over", ["positions", "rows", "seeds"])
def test_a_chi_square_test_finds_no_pattern_over(over):
    """The test counts pairs: neighbours are independent, too."""
    count = 40_000
    vocab = 7
    logits = torch.linspace(-1, 1, vocab)
    if over == "positions":
        chosen = sampler_of()(logits.expand(1, count, -1), torch.arange(count)[None])[0]
    else:
        seed = 3 if over == "rows" else list(range(count))
        chosen = sampler_of(seed, batch=count)(logits.expand(count, -1), 5)
    exact = logits.softmax(-1)
    pairs = torch.bincount(chosen[0::2] * vocab + chosen[1::2], minlength=vocab**2)
    expected = torch.outer(exact, exact).flatten() * (count // 2)
    statistic = float(((pairs - expected) ** 2 / expected).sum())
    degrees = vocab**2 - 1  # Mean of the statistic; its variance is twice that.
    assert abs(statistic - degrees) < 4 * math.sqrt(2 * degrees)


def test_top_k_and_top_p_do_not_change_the_noise():
    """Where the free choice is among the candidates, it stays."""
    logits = torch.randn(1, 500, 40, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(500)[None]
    free = sampler_of()(logits, positions)
    probabilities = logits.softmax(-1)
    chance = probabilities.gather(-1, free[..., None])
    likelier = probabilities * (probabilities > chance)
    rank = (likelier > 0).sum(-1)
    held_before = likelier.sum(-1)
    for settings, is_candidate in (
        ({"top_k": 8}, rank < 8),
        ({"top_p": 0.6}, held_before < 0.6),
    ):
        chosen = sampler_of(**settings)(logits, positions)
        assert 0.3 < is_candidate.float().mean() < 0.95
        assert torch.equal(chosen[is_candidate], free[is_candidate])


def test_a_choice_depends_on_seed_and_position_alone():
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).expand(3, 6)
    together = sampler_of([4, 5, 6], batch=3)(logits, positions)
    for row, seed in enumerate((4, 5, 6)):
        for time in range(6):
            assert sampler_of(seed)(logits[row : row + 1, time], time) == together[row, time]
    assert torch.equal(sampler_of(4, 3)(logits, positions)[0], together[0])
    assert not torch.equal(sampler_of(9, 3)(logits, positions), sampler_of(4, 3)(logits, positions))


def test_two_models_mostly_choose_alike():
    """Common noise: two distributions at a distance TV agree with at least (1-TV)/(1+TV)."""
    other_logits = (PROBABILITIES + torch.tensor([0.1, -0.1, 0.0, 0.0])).log()
    count = 20_000
    positions = torch.arange(count)[None]
    chosen = [sampler_of()(x.expand(1, count, -1), positions) for x in (LOGITS, other_logits)]
    agreement = float((chosen[0] == chosen[1]).float().mean())
    assert (1 - 0.1) / (1 + 0.1) - 0.02 < agreement < 1 - 0.1 + 0.02


def test_the_noise_is_that_of_the_published_generator():
    """SplitMix64 with seed 1234567 begins with these numbers (Rosetta Code)."""
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, count) for count in range(3)] == numbers
    # The key of a row is the first number of its seed's sequence, minus one step; each position
    # of the row, and each token of the position, is a number of the sequence of what is before.
    seed = 1234567
    vocab = 5
    logits = torch.randn(1, 40, vocab, generator=torch.Generator().manual_seed(0))
    for position, chosen in enumerate(sampler_of(seed)(logits, torch.arange(40)[None])[0]):
        key = splitmix64(splitmix64(seed, -1), position)
        uniform = [((splitmix64(key, token) >> 1) + 0.5) / 2**63 for token in range(vocab)]
        probabilities = logits[0, position].softmax(-1).tolist()
        scores = [p / -math.log1p(-u) for p, u in zip(probabilities, uniform, strict=True)]
        assert int(chosen) == max(range(vocab), key=scores.__getitem__)


@pytest.mark.parametrize("temperature", [1e-320, 1e-42, 1e-9])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    logits = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) - 50
    for settings in ({}, {"top_k": 5}, {"top_p": 0.9}):
        chosen = sampler_of(batch=64, temperature=temperature, **settings)(logits, 0)
        assert torch.equal(chosen, logits.argmax(-1))


def test_integers_of_numpy_are_seeds():
    for seed in (7, [7, 2**63]):
        assert torch.equal(row_keys(np.asarray(seed, np.uint64)[()], 2), row_keys(seed, 2))


def test_settings_out_of_range_and_seeds_that_do_not_fit():
    with refused(ValueError, "temperature", "-1.0", "top_k", "top_p", "1.5"):
        Sampler(temperature=-1.0, top_k=0, top_p=1.5)
    with refused(ValueError, "seed", "3 rows"):
        row_keys([1, 2], 3)
    assert not torch.equal(row_keys(None, 2), row_keys(None, 2))
