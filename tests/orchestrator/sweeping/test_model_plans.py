"""Models that a sweep trains are called by what their methods are, not by known names."""

from __future__ import annotations

import pytest

from iiet.methods import METHODS
from iiet.methods.implicit_euler import ImplicitEuler
from orchestrator.models.config import build_model_config
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.models import (
    ModelVariant,
    check_models,
    check_sweep,
    learning_rates,
    model_label,
    settings_of,
    swept_models,
    swept_variants,
    teacher_and_baselines,
)
from orchestrator.workspace.errors import UserError


class Other(ImplicitEuler):
    """A method with corrections that this project does not know by name."""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(METHODS, "_classes", {**METHODS._classes, "other": Other})
    return "other"


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("vanilla", "vanilla"),
        ("pcformer", "pcformer"),
        ("iiet", "r = 3"),
        ("looped", "looped, r = 3"),
        ("other", "other, r = 3"),
    ],
)
def test_labels_name_the_method_unless_it_is_the_usual_one(
    other: str, method: str, label: str
) -> None:
    assert model_label(method, 3) == label


def test_corrections_of_any_method_that_makes_some_are_swept(other: str) -> None:
    settings = resolve_settings(
        {},
        [
            "sweep.kind=iterations",
            "sweep.methods=[vanilla, iiet, other]",
            "sweep.iterations=[0, 2]",
        ],
    )
    assert {model.name: (model.method, model.corrections) for model in swept_models(settings)} == {
        "vanilla": ("vanilla", None),
        "r = 0": ("iiet", 0),
        "r = 2": ("iiet", 2),
        "other, r = 0": ("other", 0),
        "other, r = 2": ("other", 2),
    }
    check_models(settings)


def test_learning_rates_are_of_a_method_or_of_a_number_of_its_corrections(other: str) -> None:
    rates = "sweep.learning_rates={other: 3.0e-3, 'other, r = 2': [1.0e-3, 5.0e-4], r = 2: 7.0e-3}"
    settings = resolve_settings({}, [rates, "training.learning_rate=2e-3"])

    def of(method: str, corrections: int) -> tuple[float, ...]:
        return learning_rates(settings, ModelVariant(method=method, corrections=corrections))

    assert of("other", 1) == (3e-3,)
    assert of("other", 2) == (1e-3, 5e-4)
    assert of("iiet", 2) == (7e-3,)
    assert of("iiet", 1) == (2e-3,)


def test_variants_have_a_label_for_each_rate_and_seed() -> None:
    rates = "sweep.learning_rates={vanilla: 4.0e-3, r = 1: [1.0e-3, 5.0e-4]}"
    changes = [rates, "sweep.iterations=[1]", "sweep.seeds=[0, 7]", "sweep.kind=iterations"]
    settings = resolve_settings({}, changes)
    variants = list(swept_variants(settings))
    assert [variant.label for variant in variants] == [
        "vanilla, seed 0",
        "vanilla, seed 7",
        "r = 1, rate 0.001, seed 0",
        "r = 1, rate 0.001, seed 7",
        "r = 1, rate 0.0005, seed 0",
        "r = 1, rate 0.0005, seed 7",
    ]
    trainings = [settings_of(settings, variant).training for variant in variants]
    assert [t.learning_rate for t in trainings] == [4e-3, 4e-3, 1e-3, 1e-3, 5e-4, 5e-4]
    assert [t.seed for t in trainings] == [0, 7, 0, 7, 0, 7]


def test_a_model_at_several_depths_has_the_rates_of_the_most_specific_name() -> None:
    settings = resolve_settings(
        {},
        [
            "sweep.kind=iterations",
            "sweep.iterations=[1]",
            "model.num_layers=2",
            "sweep.num_layers={vanilla: [2, 8], r = 1: 4}",
            "sweep.learning_rates={vanilla: 4.0e-3, 'vanilla, 8 layers': [1.0e-3, 2.0e-3], r = 1: "
            "3.0e-3}",
            "sweep.seeds=[7]",
        ],
    )
    check_models(settings)
    found = {}
    for variant in swept_variants(settings):
        own = settings_of(settings, variant)
        config = build_model_config(own.model, vocab_size=300)
        found[variant.label] = (config.num_layers, own.training.learning_rate)
    assert found == {
        "vanilla, seed 7": (2, 4e-3),
        "vanilla, 8 layers, rate 0.001, seed 7": (8, 1e-3),
        "vanilla, 8 layers, rate 0.002, seed 7": (8, 2e-3),
        "r = 1, 4 layers, seed 7": (4, 3e-3),
    }


def test_a_looped_model_of_another_depth_is_named_by_both() -> None:
    settings = resolve_settings(
        {},
        [
            "sweep.kind=iterations",
            "sweep.methods=[looped]",
            "sweep.iterations=[3]",
            "model.num_layers=1",
            "sweep.num_layers={'looped, r = 3': [1, 2]}",
            "sweep.learning_rates={'looped, r = 3, 2 layers': 0.001}",
        ],
    )
    check_models(settings)
    found = {v.label: learning_rates(settings, v) for v in swept_variants(settings)}
    assert found == {"looped, r = 3": (2e-3,), "looped, r = 3, 2 layers": (1e-3,)}


@pytest.mark.parametrize("number", ["6", "[6]"])
def test_the_depth_of_the_preset_is_no_other_model(number: str) -> None:
    usual = resolve_settings({}, ["sweep.kind=iterations"])
    named = resolve_settings({}, ["sweep.kind=iterations", f"sweep.num_layers={{iiet: {number}}}"])
    assert list(swept_variants(named)) == list(swept_variants(usual))


def test_baselines_of_other_depths_stand_beside_a_teacher() -> None:
    settings = resolve_settings(
        {},
        [
            "model.num_layers=2",
            "sweep.num_layers={vanilla: [2, 8], r = 0: [1]}",
            "sweep.learning_rates={vanilla: 4.0e-3, 'vanilla, 8 layers': 1.0e-3}",
        ],
    )
    check_models(settings)
    models = teacher_and_baselines(settings)
    depths = {name: own.model.num_layers for name, own in models.items()}
    assert depths == {"teacher": 2, "vanilla": 2, "vanilla, 8 layers": 8, "r = 0, 1 layer": 1}
    assert [own.training.learning_rate for own in models.values()] == [2e-3, 4e-3, 1e-3, 2e-3]


@pytest.mark.parametrize("name", ["none, r = 2", "r = x", "other r = 2", "none, 8 layers"])
def test_a_rate_of_no_model_is_refused(other: str, name: str) -> None:
    with pytest.raises(UserError, match="is not a model"):
        resolve_settings({}, [f"sweep.learning_rates={{'{name}': 0.001}}"])


def test_a_rate_of_a_model_that_is_not_swept_is_named(other: str) -> None:
    changes = ["sweep.kind=iterations", "sweep.learning_rates={'other, r = 2': 0.001}"]
    settings = resolve_settings({}, changes)
    with pytest.raises(UserError, match=r"has a rate of other, r = 2, which is not swept"):
        check_models(settings)


def test_rates_to_end_may_be_those_of_another_method(other: str) -> None:
    rates = "sweep.learning_rates={'other, r = 2': [0.001, 0.002]}"
    changes = ["sweep.kind=iterations", "sweep.asha=true", rates]
    with pytest.raises(UserError, match="no model has more than one"):
        check_sweep(resolve_settings({}, changes))
    check_sweep(resolve_settings({}, [*changes, "sweep.methods=[vanilla, other]"]))


def test_a_teacher_of_another_method_stands_beside_the_baseline_and_its_own_start(
    other: str,
) -> None:
    settings = resolve_settings({}, ["model.method=other", "model.corrections=2"])
    check_models(settings)
    models = {name: own.model for name, own in teacher_and_baselines(settings).items()}
    assert {name: (model.method, model.corrections) for name, model in models.items()} == {
        "teacher": ("other", 2),
        "vanilla": ("vanilla", 2),
        "other, r = 0": ("other", 0),
    }


def test_options_are_of_the_models_own_method(other: str) -> None:
    settings = resolve_settings(
        {},
        [
            "sweep.kind=iterations",
            "sweep.methods=[vanilla, iiet, other]",
            "model.method_options={damping: 0.5}",
        ],
    )
    options = {
        own.name: build_model_config(settings_of(settings, own).model, vocab_size=300).to_dict()
        for own in swept_models(settings)
    }
    damped = [name for name, config in options.items() if "method_options" in config]
    assert damped == ["r = 0", "r = 1", "r = 2", "r = 3"]
    assert options["r = 2"]["method_options"] == {"damping": 0.5}
    check_models(settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.method_options={dampng: 0.5}"], "no option 'dampng'; its options: damping"),
        (["model.method_options.damping=2"], "damping must be a number from 0 to 1, got 2"),
        (
            ["model.method_options.damping=0.5", "model.method=vanilla"],
            "method 'vanilla' has no option 'damping'; its options: none",
        ),
    ],
)
def test_options_that_a_method_has_not_are_named(changes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model_config(resolve_settings({}, changes).model, vocab_size=300)
