"""A change of what a recipe trains is noticed: hashes of it are stored."""

from __future__ import annotations

import json

from recipe_hashes import FILE, recipe_hashes

REMEDY = (
    "are not as stored, so the same command would train or measure something else than before. "
    "If that is meant, raise RECIPE_VERSION in orchestrator/workspace/provenance.py where finished "
    "weights must not be found again, and type: python tests/recipe_hashes.py"
)


def test_the_recipe_is_the_stored_one():
    stored: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))
    current = recipe_hashes()
    assert stored.keys() == current.keys()
    for group, current_hashes in current.items():
        names = {**stored[group], **current_hashes}
        changed = [name for name in names if stored[group].get(name) != current_hashes.get(name)]
        assert not changed, f"{group}: {', '.join(changed)} {REMEDY}"
