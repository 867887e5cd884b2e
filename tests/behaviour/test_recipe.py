"""A change of what a recipe trains is noticed: hashes of it are stored."""

from __future__ import annotations

import json

import pytest
from recipe_hashes import FILE, recipe_hashes

STORED: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
REMEDY = (
    "are not as stored, so the same command would train or measure something else than before. "
    "If that is meant, raise RECIPE_VERSION in orchestrator/workspace/provenance.py where finished "
    "weights must not be found again, and type: python tests/recipe_hashes.py"
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    return recipe_hashes()


@pytest.mark.parametrize("group", STORED)
def test_the_recipe_is_the_stored_one(group: str, found: dict[str, dict[str, str]]) -> None:
    stored, now = STORED[group], found[group]
    changed = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    assert not changed, f"{group}: {', '.join(changed)} {REMEDY}"


def test_every_group_is_stored(found: dict[str, dict[str, str]]) -> None:
    assert set(STORED) == set(found) == {"settings", "order of the data", "initial weights"}
