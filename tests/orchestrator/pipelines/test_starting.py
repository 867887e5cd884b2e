"""Steps and held-out items of a new settings file follow from the size of the text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.pipelines.starting import MOST_HOURS, MOST_ITEMS, fit_to_text
from orchestrator.planning.devices import run_devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import price_of
from orchestrator.settings import Settings
from orchestrator.settings.files import starting_settings

SHIPPED = starting_settings("tiny", {"data.source": "files"})


def fitted(
    folder: Path, num_bytes: int, *, name: str = "text.txt", keeps_steps: bool = False
) -> Settings:
    """Return the settings for a text of this size, whose content does not matter."""
    file = folder / name
    file.touch()
    os.truncate(file, num_bytes)
    settings = starting_settings("tiny", {"data.source": "files", "data.files": [str(file)]})
    return fit_to_text(settings, keeps_steps=keeps_steps)[0]


def test_steps_are_at_least_a_pass_over_the_text(tmp_path):
    settings = fitted(tmp_path, 4_500_000)
    held_out = settings.data.validation_fraction
    assert held_out == 0.2, "700 items need more text"
    recipe = settings.training
    # Its tokenizer of 2,048 entries makes tokens of more than 3 bytes.
    assert recipe.num_steps * recipe.num_tokens_per_step >= 4_500_000 * (1 - held_out) / 3
    assert recipe.num_steps < 2 * SHIPPED.training.num_steps * 4.5
    shares = [s.distillation.training.num_steps / s.training.num_steps for s in (settings, SHIPPED)]
    assert shares[0] == pytest.approx(shares[1], rel=0.01)
    kept = fitted(tmp_path, 4_500_000, keeps_steps=True)
    assert (kept.training, kept.distillation) == (SHIPPED.training, SHIPPED.distillation)
    compressed = fitted(tmp_path, 1_500_000, name="text.jsonl.gz")
    assert compressed.training == recipe


def test_a_small_text_has_the_shipped_steps_and_a_large_one_those_of_some_hours(tmp_path):
    small = fitted(tmp_path, 20_000)
    assert small.training == SHIPPED.training
    assert small.evaluation.num_items == SHIPPED.evaluation.num_items
    large = fitted(tmp_path, 10**11)
    assert large.evaluation.num_items == MOST_ITEMS
    assert large.data.validation_fraction == SHIPPED.data.validation_fraction
    training = Estimate(
        config=large.model.build(vocab_size=large.data.vocab_size),
        recipe=large.training,
        devices=run_devices(large.cluster),
    )
    assert 0.9 * MOST_HOURS < price_of([training], tmp_path).hours[1] < 1.1 * MOST_HOURS


def test_a_text_of_unknown_size_changes_nothing():
    settings = starting_settings("tiny", {"data.source": "hub", "data.hub_name": "me/texts"})
    assert fit_to_text(settings, keeps_steps=False) == (settings, [])
