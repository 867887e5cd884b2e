"""The plan drafts as many tokens as are expected to pay, under the best schedule, or none."""

import random
from collections import Counter

import pytest

from iiet.draft_plan import (
    MAX_DRAFT_TOKENS,
    DraftCosts,
    DraftPlan,
    expected_gain,
)

CHEAP = DraftCosts(draft=0.25, further_token=0.0)


def test_the_gain_is_the_published_formula():
    """Leviathan et al.: (1 - a^(g+1)) / ((1 - a)(g c + 1))."""
    assert expected_gain(0.9, 3, CHEAP) == pytest.approx((1 - 0.9**4) / (0.1 * 1.75))
    assert expected_gain(0.9, 3, DraftCosts(0.25, 0.2)) == pytest.approx(
        (1 - 0.9**4) / (0.1 * 2.35)
    )
    assert expected_gain(1.0, 4, CHEAP) == pytest.approx(5 / 2)
    assert expected_gain(0.5, 0, CHEAP) == 1


def run(plan, acceptances, *, num_rounds=400, num_rows=1):
    """Return the chosen (draft, number of tokens), None for plain; tokens are kept by chance."""
    draw, chosen = random.Random(0), []
    for _ in range(num_rounds):
        draft, num = plan.choose(100)
        chosen.append((draft, num) if num else None)
        if num:
            chance = acceptances[draft]
            kept = [
                next((k for k in range(num) if draw.random() > chance), num)
                for _ in range(num_rows)
            ]
            plan.saw(draft, num, kept)
    return chosen


def best(acceptance, costs):
    return max(range(MAX_DRAFT_TOKENS + 1), key=lambda g: expected_gain(acceptance, g, costs))


@pytest.mark.parametrize("acceptance", [0.6, 0.8, 0.95])
def test_the_number_follows_the_acceptance(acceptance):
    chosen = run(DraftPlan([CHEAP]), [acceptance], num_rows=4)
    ((_, num), _) = Counter(chosen[100:]).most_common(1)[0]
    assert abs(num - best(acceptance, CHEAP)) <= 1 + (acceptance > 0.9) * 3


def test_where_nothing_pays_decoding_is_plain_but_for_rare_trials():
    chosen = run(DraftPlan([DraftCosts(0.5, 0.2)]), [0.3], num_rounds=2000)
    assert sum(c is not None for c in chosen[50:]) < 20
    assert any(c is not None for c in chosen[1000:])


def test_a_draft_that_becomes_good_is_found_again():
    plan = DraftPlan([CHEAP])
    run(plan, [0.0], num_rounds=300)
    chosen = run(plan, [0.95], num_rounds=1200)
    assert all(c is not None for c in chosen[-100:])


def test_the_best_of_several_drafts_remains():
    plan = DraftPlan([CHEAP, DraftCosts(0.3, 0.0), CHEAP])
    chosen = Counter(draft for draft, _ in filter(None, run(plan, [0.5, 0.9, 0.6])))
    assert chosen[1] > 300
    assert plan.acceptance(1) > 0.8


def test_a_fixed_number_is_kept_up_to_the_limit():
    plan = DraftPlan([DraftCosts(5.0, 1.0)], num_tokens=4)
    assert {plan.choose(10), plan.choose(4), plan.choose(3), plan.choose(0)} == {
        (0, 4), (0, 3), (0, 0),
    }  # fmt: skip
    assert DraftPlan([]).choose(10) == DraftPlan([CHEAP], num_tokens=0).choose(10) == (0, 0)
