"""The study of cheaper plain models: its choices, equal FLOPs, and the rules on made-up results."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cheaper_choice import (
    CHOOSES_LAYERS,
    COUNTS_OF_SMOLLM2,
    DEFAULT,
    ONE_AT_A_TIME,
    RELATIVE,
    ROLES,
    SMALL,
    SMOLLM2,
    WAYS,
    ChoiceStudy,
    ModelChoices,
    best_way,
    block_of,
    chosen_default,
    key_of,
    sequences_of,
)
from cheaper_recovery import (
    BOTH,
    CONTINUED,
    NUM_LAYERS,
    NUM_STEPS,
    PIECES,
    PRUNED,
    RATES,
    STUDENTS,
    TEXTS,
    Measured,
    Training,
    control_steps,
    flops_per_token,
    trainings_of,
)
from cheaper_results import (
    BEYOND,
    KEEPS,
    LOSES,
    PAGE,
    WITHIN,
    Reading,
    at_better_rate,
    filled,
    mean_interval,
    stored_choices,
    stored_recovery,
)
from retrofit_results import NOT_DECIDED

from iiet import ModelConfig
from iiet.model.batch import Batch

CONFIG = ModelConfig(
    method="vanilla", vocab_size=49_152, dim=576, num_layers=NUM_LAYERS, num_heads=9,
    num_kv_heads=3, ffn_dim=1536, context_length=8192,
)  # fmt: skip


def choices(num_layers: int, num_sequences: int, **rises: float) -> ModelChoices:
    """Return made-up choices: each way leaves out other layers, and has a rise; without one, 1."""
    made = ModelChoices(num_layers=num_layers, bits_per_nat=1.0)
    made.nats[""] = num_sequences * [2.0]
    for number, way in enumerate(WAYS):
        made.left_out[way] = {str(count): [number, count] for count in made.counts}
        for count in made.counts:
            nats = [3.0 if way not in rises else 2.0 + rises[way]] * num_sequences
            # Sequences differ a little, so that intervals have a width.
            nats[0] += 0.01 * number
            made.nats[key_of([number, count])] = nats
    return made


def models(of_smollm2: dict[str, float], *of_small: dict[str, float]) -> dict[str, ModelChoices]:
    small = zip(SMALL.items(), of_small, strict=True)
    return {
        SMOLLM2: choices(NUM_LAYERS, 12, **of_smollm2),
        **{name: choices(num_layers, 40, **rises) for (name, num_layers), rises in small},
    }


def test_no_heldout_sequence_serves_two_ends():
    tokens = torch.arange(3 * len(ROLES) * 4).view(-1, 1, 4)
    data = SimpleNamespace(validation_batches=lambda **_: map(Batch.of_text, tokens))
    by_role = {
        role: sequences_of(data, role, length=4, num_rounds=3) for role in dict.fromkeys(ROLES)
    }
    assert len(by_role[CHOOSES_LAYERS]) == 3
    firsts = [int(batch.input_ids[0, 0]) for part in by_role.values() for batch in part]
    assert sorted(firsts) == [*range(0, 4 * len(tokens), 4)]


def test_a_block_is_where_the_state_turns_least():
    turns = [1.0, 0.1, 0.2, 0.9, 0.4, 0.3]
    angles = torch.tensor([0.0, *turns]).cumsum(0)
    hidden = [torch.stack([angle.cos(), angle.sin()])[None].double() for angle in angles]
    assert block_of(hidden, 1) == [1]
    assert block_of(hidden, 2) == [1, 2]
    assert block_of(hidden, 3) == [1, 2, 3]


def test_choices_of_one_influence_are_nested_and_stored(tmp_path):
    made = choices(NUM_LAYERS, 12)
    made.influence["loss"] = [*map(float, range(NUM_LAYERS))]
    assert made.layers_left_out("loss", 2) == [1, 2]
    assert made.counts == COUNTS_OF_SMOLLM2
    study = ChoiceStudy(tmp_path / "choice.json")
    study.models = {SMOLLM2: made}
    study.store()
    assert ChoiceStudy(study.results_file).models == study.models
    assert made.is_complete
    del made.nats[key_of(made.left_out[ONE_AT_A_TIME]["15"])]
    assert not made.is_complete


def test_the_default_changes_only_if_the_large_model_and_two_small_ones_say_so():
    better = {RELATIVE: 0.5}
    worse = {RELATIVE: 1.5}
    assert best_way(choices(NUM_LAYERS, 12, **better)) == RELATIVE
    for of_models, default in (
        ((better, better, better, worse), RELATIVE),
        ((better, better, worse, worse), DEFAULT),
        ((worse, better, better, better), DEFAULT),
        (({RELATIVE: 0.97}, better, better, better), DEFAULT),  # Too little.
        (({ONE_AT_A_TIME: 0.85}, *3 * [{ONE_AT_A_TIME: 0.5}]), DEFAULT),  # Too little for its cost.
        (({ONE_AT_A_TIME: 0.7}, *3 * [{ONE_AT_A_TIME: 0.5}]), ONE_AT_A_TIME),
        (({"one block": 0.1}, *3 * [{"one block": 0.1}]), DEFAULT),  # No influence.
    ):
        assert chosen_default(models(*of_models), mean_interval) == default


def test_the_control_has_the_flops_of_a_student():
    for num_layers in STUDENTS:
        steps = control_steps(CONFIG, num_layers, 1000)
        of_control = steps * flops_per_token(CONFIG, NUM_LAYERS, CONTINUED)
        of_student = 1000 * flops_per_token(CONFIG, num_layers, BOTH)
        assert of_control == pytest.approx(of_student, rel=1e-3)
    assert flops_per_token(CONFIG, 27, BOTH) > flops_per_token(CONFIG, 27, "cross-entropy")


def test_pieces_begin_with_what_can_be_said_without_training():
    for piece in PIECES:
        trainings = [*trainings_of(piece, CONFIG)]
        assert len({training.name for training in trainings}) == len({*trainings})
        assert [training.arm for training in trainings[:5]] == 5 * [PRUNED]
        assert {t.rate for t in trainings if t.num_steps} == {*RATES}
    short = [*trainings_of("short", CONFIG)]
    assert len(short) == len({*short}) == 5 + 2 + 2 * len(STUDENTS) + 4


def measured(num_layers: int, arm: str, nats: float, num_right: int, **changes: float) -> Measured:
    training = Training(num_layers=num_layers, arm=arm, **changes)
    return Measured(
        training=training, training_flops=0.0, selection_nats=nats,
        nats={text: [nats, nats + 0.01] * 6 for text in TEXTS},
        agreement=dict.fromkeys(TEXTS, 0.5),
        is_right=[number < num_right for number in range(32)], cpu_seconds=60.0,
    )  # fmt: skip


def test_a_verdict_needs_the_whole_interval():
    whole = measured(NUM_LAYERS, PRUNED, 3.0, 20)
    for nats, num_right, facts, text in (
        (3.0, 32, [KEEPS, KEEPS], [WITHIN, WITHIN]),
        (
            3.0,
            20,
            [NOT_DECIDED, NOT_DECIDED],
            [WITHIN, WITHIN],
        ),  # Few questions, of which none is lost.
        (3.1, 2, [LOSES, LOSES], [BEYOND, WITHIN]),
        (3.3, 18, [NOT_DECIDED, NOT_DECIDED], [BEYOND, BEYOND]),
    ):
        student = measured(27, BOTH, nats, num_right, rate=RATES[0], num_steps=NUM_STEPS["short"])
        reading = Reading(measured=student, whole=whole, bits_per_nat=dict.fromkeys(TEXTS, 0.4))
        assert [reading.facts_verdict(share) for share in (0.98, 0.95)] == facts
        assert [reading.text_verdict(TEXTS[0], most) for most in (1.02, 1.05)] == text
        assert reading.sentence.startswith("**27 layers**: ")


def test_tables_show_the_better_rate_and_what_has_not_run():
    steps = NUM_STEPS["short"]
    stored = {
        "models": [
            result.to_dict()
            for result in (
                measured(NUM_LAYERS, PRUNED, 3.0, 20),
                measured(27, BOTH, 3.2, 20, rate=RATES[0], num_steps=steps),
                measured(27, BOTH, 3.1, 20, rate=RATES[1], num_steps=steps),
                measured(24, BOTH, 3.3, 20, rate=RATES[0], num_steps=steps),
                measured(NUM_LAYERS, CONTINUED, 2.9, 20, rate=RATES[0], num_steps=steps + 5),
            )
        ],
        "times": {},
        "bits_per_nat": dict.fromkeys(TEXTS, 0.5),
    }
    page = filled(PAGE.read_text("utf-8"), {}, stored)
    assert f"| 27 | {BOTH} | {RATES[1]:g} | 1.552 (+3.3 %" in page
    assert f"| 24 | {BOTH} | {RATES[0]:g} (the other has not run) |" in page
    assert f"| 21 | {BOTH} | not run |" in page
    assert f"| 30 | {CONTINUED} | {RATES[0]:g}" in page
    assert "The piece `long` (600 steps) has not run." in page
    assert at_better_rate({}, "short", 27, BOTH) is None


def test_the_page_is_made_from_the_stored_results():
    text = PAGE.read_text("utf-8")
    assert filled(text, stored_choices(), stored_recovery()) == text, (
        "python research/cheaper_results.py"
    )
