"""Fit the steps and the held-out share of a shipped sweep to the size of the user's text.

A shipped sweep has the steps for its own text. On a larger text, its models would see only a part;
in a smaller one, a tenth gives so few held-out items that no difference could be seen.
"""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.data.preparation import expected_tokens
from orchestrator.data.text import text_source
from orchestrator.planning.devices import run_devices
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.price import price_of
from orchestrator.settings import Settings
from orchestrator.settings.training import MAX_STEPS
from orchestrator.terminal.render import format_duration

BYTES_PER_TOKEN = 3
"""Less than English has with a vocabulary of 2,048 (3.6), so that a pass over the text is
complete."""
BYTES_PER_ITEM = 2500
"""Bytes of held-out English for one item of `lastword`: 450 kB gave 179 items."""
MOST_ITEMS = 2000
"""Most items: with so many, a standard error of an accuracy is 1.1 points."""
MOST_HELD_OUT = 0.2
MOST_HOURS = 3.0
"""Longest training of the teacher; a sweep trains about ten models, most of them cheaper."""


def fit_to_text(settings: Settings, *, keeps_steps: bool) -> tuple[Settings, list[str]]:
    """Return settings whose steps and held-out items fit the text, and sentences on both.

    Steps grow to one pass over the text, unless the teacher's training would then take more than
    `MOST_HOURS`; the students' steps grow in proportion. A text of unknown size changes nothing.

    Args:
        keeps_steps: Whether the user named the number of steps.
    """
    text_bytes = text_source(settings.data).num_bytes()
    if not text_bytes:
        return settings, []
    notes: list[str] = []

    # Held-out text: enough for the items and for the validation loss, at most a fifth.
    evaluation = settings.evaluation
    validation_bytes = settings.training.num_validation_tokens * BYTES_PER_TOKEN
    wanted_bytes = max(evaluation.num_items * BYTES_PER_ITEM, validation_bytes)
    wanted_fraction = min(MOST_HELD_OUT, math.ceil(100 * wanted_bytes / text_bytes) / 100)
    fraction = max(settings.data.validation_fraction, wanted_fraction)
    data = settings.data.model_copy(update={"validation_fraction": fraction})
    if evaluation.suite == "heldout":
        num_expected = int(text_bytes * fraction / BYTES_PER_ITEM)
        num_items = min(MOST_ITEMS, max(evaluation.num_items, num_expected // 100 * 100))
        evaluation = evaluation.model_copy(update={"num_items": num_items})
        num_measured = max(1, min(num_items, num_expected))
        points = 100 * math.sqrt(0.25 / num_measured)
        notes.append(
            f"{fraction:.0%} of the text is held out, which gives about {num_measured:,} items of "
            f"English: one standard error of an accuracy is up to {points:.2g} points"
        )
    settings = settings.model_copy(update={"data": data, "evaluation": evaluation})
    if keeps_steps:
        return settings, notes

    # Steps: one pass over the rest, rounded up, or as much as the hours allow.
    recipe = settings.training
    num_tokens = int(text_bytes * (1 - fraction) / BYTES_PER_TOKEN)
    steps_of_pass = math.ceil(num_tokens / recipe.num_tokens_per_step)
    vocab_size = expected_tokens(settings.data, None).vocab_size
    training = Estimate(
        config=settings.model.build(vocab_size=vocab_size),
        recipe=recipe.model_copy(update={"num_steps": steps_of_pass}),
        devices=run_devices(settings.cluster),
    )
    _, hours_of_pass = price_of([training], Path()).hours
    share = min(1.0, MOST_HOURS / hours_of_pass)
    num_steps = max(recipe.num_steps, math.ceil(steps_of_pass * share / 100) * 100)
    num_steps = min(num_steps, MAX_STEPS)
    times_read = num_steps * recipe.num_tokens_per_step / num_tokens
    note = f"{num_steps:,} steps read a text of about {num_tokens:,} tokens {times_read:,.1f} times"
    if num_steps < steps_of_pass:
        seconds = 3600 * hours_of_pass
        note += f"; to read it once would take the teacher up to {format_duration(seconds)} here"
    notes.append(note)
    distillation = settings.distillation
    growth = num_steps / recipe.num_steps
    student_steps = round(distillation.training.num_steps * growth)
    student_recipe = distillation.training.model_copy(update={"num_steps": student_steps})
    changes = {
        "training": recipe.model_copy(update={"num_steps": num_steps}),
        "distillation": distillation.model_copy(update={"training": student_recipe}),
    }
    return settings.model_copy(update=changes), notes
