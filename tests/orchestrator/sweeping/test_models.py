"""Models that a sweep trains are named by what they are, and what cannot be is refused first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from sample_texts import tokens_of

from iiet.iiad.pruning import InfluenceTable
from iiet.methods import METHODS
from iiet.methods.implicit_euler import ImplicitEuler
from orchestrator.models.folder import load_config
from orchestrator.records.training import TrainingJob
from orchestrator.reporting.results import model_results, teachers_of
from orchestrator.settings import TrainingSettings, read_settings, resolve_settings
from orchestrator.sweeping.models import (
    TEACHER,
    SweptModels,
    check_models,
    check_named_baselines,
    named_baselines,
    settings_of,
    swept_variants,
    teacher_and_baselines,
)
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import sweep
from orchestrator.sweeping.trials import trials_from_scratch, trials_of_teachers
from orchestrator.training.job import pretraining_job
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import open_workspace


class Other(ImplicitEuler):
    """A method with corrections that this project does not know by name."""


@pytest.fixture
def other_method(monkeypatch) -> str:
    monkeypatch.setattr(METHODS, "own_classes", {**METHODS.own_classes, "other": Other})
    return "other"


# Which models


def models_of(*assignments: str) -> dict[str, tuple[Any, ...]]:
    """Return by label what a sweep trains from scratch: method, corrections, layers, learning rate,
    seed."""
    settings = resolve_settings({}, assignments)
    check_models(settings, SweptModels.of(settings))
    if settings.sweep.kind == "iterations":
        chosen = {v.label: settings_of(settings, v) for v in swept_variants(settings)}
    else:
        chosen = teacher_and_baselines(settings, SweptModels.of(settings))
    models = {}
    for label, model_settings in chosen.items():
        config = model_settings.model.build(vocab_size=300)
        recipe = model_settings.training
        shape = (config.method, max(config.corrections), config.num_layers)
        models[label] = (*shape, recipe.learning_rate, recipe.seed)
    return models


ITERATIONS = {
    "sweep.methods=[vanilla, iiet, other]; sweep.iterations=[0, 2]": {
        "vanilla": ("vanilla", 0, 6, 4e-3, 0),
        "r = 0": ("iiet", 0, 6, 2e-3, 0),
        "r = 2": ("iiet", 2, 6, 2e-3, 0),
        "other, r = 0": ("other", 0, 6, 2e-3, 0),
        "other, r = 2": ("other", 2, 6, 2e-3, 0),
    },
    "sweep.learning_rates={vanilla: 4.0e-3, r = 1: [1.0e-3, 5.0e-4]}; sweep.iterations=[1]; "
    "sweep.seeds=[0, 7]": {
        "vanilla, seed 0": ("vanilla", 0, 6, 4e-3, 0),
        "vanilla, seed 7": ("vanilla", 0, 6, 4e-3, 7),
        "r = 1, rate 0.001, seed 0": ("iiet", 1, 6, 1e-3, 0),
        "r = 1, rate 0.001, seed 7": ("iiet", 1, 6, 1e-3, 7),
        "r = 1, rate 0.0005, seed 0": ("iiet", 1, 6, 5e-4, 0),
        "r = 1, rate 0.0005, seed 7": ("iiet", 1, 6, 5e-4, 7),
    },
    # A seed of the sweep, also 0, is the model's in place of the recipe's.
    "training.seed=5; sweep.methods=[iiet]; sweep.iterations=[1]; sweep.seeds=[0, 7]": {
        "r = 1, seed 0": ("iiet", 1, 6, 2e-3, 0),
        "r = 1, seed 7": ("iiet", 1, 6, 2e-3, 7),
    },
    # Rates and depths are those of the most specific name.
    "sweep.methods=[iiet, other]; sweep.iterations=[1, 2]; sweep.learning_rates={other: 3.0e-3, "
    "'other, r = 2': [1.0e-3, 5.0e-4], r = 2: 7.0e-3}": {
        "r = 1": ("iiet", 1, 6, 2e-3, 0),
        "r = 2": ("iiet", 2, 6, 7e-3, 0),
        "other, r = 1": ("other", 1, 6, 3e-3, 0),
        "other, r = 2, rate 0.001": ("other", 2, 6, 1e-3, 0),
        "other, r = 2, rate 0.0005": ("other", 2, 6, 5e-4, 0),
    },
    "model.num_layers=2; sweep.iterations=[1]; sweep.num_layers={vanilla: [2, 8], r = 1: 4}; "
    "sweep.learning_rates={vanilla: 4.0e-3, 'vanilla, 8 layers': [1.0e-3, 2.0e-3], r = 1: 3.0e-3}":
    {
        "vanilla": ("vanilla", 0, 2, 4e-3, 0),
        "vanilla, 8 layers, rate 0.001": ("vanilla", 0, 8, 1e-3, 0),
        "vanilla, 8 layers, rate 0.002": ("vanilla", 0, 8, 2e-3, 0),
        "r = 1, 4 layers": ("iiet", 1, 4, 3e-3, 0),
    },
    "model.num_layers=1; sweep.methods=[looped]; sweep.iterations=[3]; "
    "sweep.num_layers={'looped, r = 3': [1, 2]}; "
    "sweep.learning_rates={'looped, r = 3, 2 layers': 0.001}": {
        "looped, r = 3": ("looped", 3, 1, 2e-3, 0),
        "looped, r = 3, 2 layers": ("looped", 3, 2, 1e-3, 0),
    },
    # PCformer stands beside others at its full level.
    "sweep.methods=[vanilla, pcformer]": {
        "vanilla": ("vanilla", 0, 6, 4e-3, 0),
        "pcformer": ("pcformer", 2, 6, 2e-3, 0),
    },
}  # fmt: skip
WITH_TEACHERS = {
    "model.num_layers=2; model.corrections=2; sweep.num_layers={vanilla: [2, 8], r = 0: [1]}; "
    "sweep.learning_rates={vanilla: 4.0e-3, 'vanilla, 8 layers': 1.0e-3}": {
        "teacher": ("iiet", 2, 2, 2e-3, 0),
        "vanilla": ("vanilla", 0, 2, 4e-3, 0),
        "vanilla, 8 layers": ("vanilla", 0, 8, 1e-3, 0),
        "r = 0, 1 layer": ("iiet", 0, 1, 2e-3, 0),
    },
    "model.method=other; model.corrections=2; sweep.baselines=[r = 1]": {
        "teacher": ("other", 2, 6, 2e-3, 0),
        "vanilla": ("vanilla", 0, 6, 4e-3, 0),
        "other, r = 0": ("other", 0, 6, 2e-3, 0),
        "r = 1": ("iiet", 1, 6, 2e-3, 0),
    },
    "model.method=pcformer": {
        "teacher": ("pcformer", 2, 6, 2e-3, 0),
        "vanilla": ("vanilla", 0, 6, 4e-3, 0),
        "pcformer, level 0": ("pcformer", 0, 6, 2e-3, 0),
    },
    "model.corrections=3; sweep.baselines=[r = 1]; sweep.teachers=[r = 2, pcformer]; "
    "sweep.seeds=[0, 7]": {
        f"{name}, seed {seed}": (method, count, 6, 4e-3 if method == "vanilla" else 2e-3, seed)
        for name, method, count in (
            ("r = 3", "iiet", 3), ("r = 2", "iiet", 2), ("pcformer", "pcformer", 2),
            ("vanilla", "vanilla", 0), ("r = 0", "iiet", 0), ("r = 1", "iiet", 1),
        )
        for seed in (0, 7)
    },
}  # fmt: skip
"""Settings -> label of a model -> method, corrections, layers, learning rate, seed."""


def test_the_models_of_a_sweep_and_their_names(other_method):
    for assignments, expected in ITERATIONS.items():
        assert models_of("sweep.kind=iterations", *assignments.split("; ")) == expected
    for assignments, expected in WITH_TEACHERS.items():
        assert list(models_of(*assignments.split("; ")).items()) == [*expected.items()]
    for number in ("6", "[6]"):  # The preset has six layers, too.
        depth = f"sweep.num_layers={{iiet: {number}}}"
        assert models_of("sweep.kind=iterations", depth) == models_of("sweep.kind=iterations")
    with refused(UserError, "sweep.teachers", "model.method=vanilla"):
        settings = resolve_settings({}, ["sweep.teachers=[vanilla]"])
        check_models(settings, SweptModels.of(settings))


def test_beside_a_teacher_with_a_source_only_named_baselines_are_trained_from_random_weights():
    recipe = "training.source=plain", "training.source_kl_weight=0.5", "training.learning_rate=0.1"
    settings = resolve_settings({}, [*recipe, "sweep.baselines=[r = 1]"])
    models = teacher_and_baselines(settings, SweptModels.of(settings), settings)
    assert [*models] == ["teacher", "r = 1"]
    assert (models["teacher"].training.source, models["teacher"].training.source_kl_weight) == (
        "plain", 0.5,
    )  # fmt: skip
    baseline = models["r = 1"].training
    assert (baseline.source, baseline.source_kl_weight) == (None, 0.0)


def test_a_model_of_a_sweep_has_no_size_that_was_not_given():
    # With a source, a size that is given must be the source's; others are taken from it.
    settings = resolve_settings({}, ["sweep.kind=iterations", "model.num_layers=4"])
    for variant in swept_variants(settings):
        fields_given = settings_of(settings, variant).model.model_fields_set
        assert "num_layers" in fields_given
        assert fields_given.isdisjoint({"preset", "dim", "num_heads"})


def test_options_are_of_the_models_own_method(other_method):
    damping = "model.method_options={damping: 0.5}"
    methods = "sweep.methods=[vanilla, iiet, other]"
    settings = resolve_settings({}, ["sweep.kind=iterations", methods, damping])
    configs = {
        variant.name: settings_of(settings, variant).model.build(vocab_size=300).to_dict()
        for variant in swept_variants(settings)
    }
    damped = {name: c["method_options"] for name, c in configs.items() if "method_options" in c}
    assert damped == {f"r = {count}": {"damping": 0.5} for count in range(4)}
    check_models(settings, SweptModels.of(settings))


# What is refused


def test_a_threshold_is_negative_only_where_an_influence_may_be():
    negative = "sweep.thresholds=[-0.1]"
    for more in ("influence.metric=loss", "sweep.leave_out_layers=1"):  # Then `loss` is usual.
        settings = resolve_settings({}, [negative, more])
        check_models(settings, SweptModels.of(settings))
    for more in ("influence.metric=relative", "sweep.seeds=[]"):
        settings = resolve_settings({}, [negative, more])
        with refused(UserError, "sweep.thresholds", "below 0"):
            check_models(settings, SweptModels.of(settings))


REFUSED = [
    ("threshold", "model.method=looped", "model.method=looped repeats the whole stack"),
    ("threshold", "sweep.budgets=[1, 9]", "no schedule costs at most 1 evaluations; the che"),
    ("iterations", "sweep.asha=true", "no model has more than one"),
    ("iterations", "sweep.learning_rates={r = 7: 0.001}", "r = 7 is not swept; such models are v"),
    ("search", "sweep.num_layers={r = 2: 3}", "num_layers: r = 2 is not a baseline of this sweep"),
    ("threshold", "sweep.gpus_per_trial=8", "sweep.gpus_per_trial=8"),
    ("iterations", "evaluation.suite=heldout,no_such_task", "no_such_task"),
    ("iterations", "evaluation.apply_chat_template=true", "have no chat template"),
]


def test_what_does_not_go_together_is_refused_before_anything_starts(tmp_path):
    for kind, setting, words in REFUSED:
        with pytest.raises(UserError, match=words):
            sweep(resolve_settings({}, [f"sweep.kind={kind}", setting]), workspace=tmp_path / "w")
    assert not open_workspace(tmp_path / "w").tokens.exists(), "no data are prepared"
    with refused(UserError, "hellaswagg", "hellaswag"):
        plan_sweep(resolve_settings({}, ["evaluation.suite=hellaswagg,piqa"]))


# Several teachers, and runs that the user names

VANILLA = {"method": "vanilla", "schedule": None}


@pytest.fixture
def pretrain(space, tiny_tokens, tiny_model) -> Any:
    """A function that trains a run of one step and returns its checkpoint: the run's name, changes
    of the model, and those of the recipe."""

    def make(name: str, model: dict[str, Any], tokens: Path = tiny_tokens, **recipe: Any) -> Path:
        usual = {"num_steps": 1, "num_tokens_per_step": 64, "num_validation_tokens": 64}
        job = TrainingJob(
            run_folder=str(space.runs / name),
            tokens_folder=str(tokens),
            model={**tiny_model, **model},
            recipe=TrainingSettings(**{**usual, **recipe}),
        )
        return Path(str(run_job(job).checkpoint))

    return make


def test_students_of_several_teachers_are_named_and_keep_their_seed(space, pretrain, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    settings = resolve_settings(
        {},
        [
            "model.corrections=[2, 1]", "model.num_layers=2", "sweep.teachers=[pcformer]",
            "sweep.seeds=[0, 7]", "sweep.budgets=[3, 2]", "distillation.training.num_steps=2",
            "distillation.training.num_tokens_per_step=64",
        ],
    )  # fmt: skip
    models = {"r = 2,1": {}, "pcformer": {"method": "pcformer", "schedule": "2,2"}}
    teachers = {
        f"{name}, seed {seed}": pretrain(f"{name} {seed}", model, tokens, seed=seed)
        for name, model in models.items()
        for seed in (0, 7)
    }
    baselines = {f"vanilla, seed {n}": pretrain(f"v {n}", VANILLA, tokens, seed=n) for n in (0, 7)}

    def influence(of_first_correction: float, rows: tuple[int, int]) -> InfluenceTable:
        values = ((of_first_correction, 0.1)[: rows[0]], (0.3, 0.01)[: rows[1]])
        zeros = tuple((0.0,) * count for count in rows)
        layers = (0.1, 0.2)
        return InfluenceTable("cosine", values, zeros, num_tokens=64, layer_values=layers)

    of_teacher = [f"{name}{end}" for name in models for end in ("", ": 1,0", ": 0,0")]
    for seed in "07":  # Under this seed alone, correction 1 of layer 2 would matter most.
        tables = {
            label: influence(
                0.2 if label.endswith(seed) else 0.6, (2, 1) if label[0] == "r" else (2, 2)
            )
            for label in teachers
        }
        plan = trials_of_teachers(
            settings, SweptModels.of(settings), space, teachers, tables, baselines=baselines
        )
        groups = {trial.group for trial in plan.trials}
        assert groups == {*of_teacher, "vanilla"}
    by_label = {trial.label: trial for trial in plan.trials}
    assert len(by_label) == 2 * len(groups) == len(plan.trials)
    assert plan.teacher == str(teachers["r = 2,1, seed 0"])
    for label, trial in by_label.items():
        assert trial.seed == int(label[-1])
        if trial.job:
            teacher = f"{str(trial.group).partition(': ')[0]}, seed {trial.seed}"
            assert trial.job.teacher_folder == str(teachers[teacher])
            assert trial.job.recipe.seed == trial.seed
    for label, checkpoint in baselines.items():
        assert by_label[label].checkpoint == str(checkpoint)
    # The teachers are trained alike, but for the seed and the method.
    teacher_of = teachers_of(model_results(plan.trials))
    assert len(teacher_of) == 4
    bare = trials_of_teachers(
        settings, SweptModels.of(settings), space, teachers, {}, baselines=baselines
    )
    assert [trial.role for trial in bare.trials].count("trial") == 0


def test_runs_that_the_user_names_stand_beside_the_front(space, pretrain, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    teacher = pretrain("teacher", {}, tokens)
    runs = {
        "v": pretrain("v", VANILLA, tokens),
        "again": pretrain("again", VANILLA, tokens, seed=1),
        "deep": pretrain("deep", {**VANILLA, "num_layers": 3}, tokens),
        "ragged": pretrain("ragged", {"schedule": [1, 0]}, tokens),
        "pc": pretrain("pc", {"method": "pcformer", "schedule": "2,2"}, tokens),
    }
    names = [*runs, f"runs/v/{runs['v'].name}"]
    settings = resolve_settings({}, [f"sweep.baseline_runs={names}"])
    baselines = named_baselines(settings, SweptModels.of(settings), space, teacher)
    assert baselines == {
        "vanilla": runs["v"],
        "vanilla (again)": runs["again"],
        "vanilla, 3 layers": runs["deep"],
        "r = 1,0": runs["ragged"],
        "pcformer": runs["pc"],
    }, "one that is named twice stands there once"
    check_named_baselines(baselines, tokens, [load_config(teacher)])

    plan = trials_of_teachers(
        settings, SweptModels.of(settings), space, {TEACHER: teacher}, {}, named_baselines=baselines
    )
    assert [(trial.role, trial.label) for trial in plan.trials] == [
        ("teacher", "teacher"), *(("baseline", label) for label in baselines)
    ]  # fmt: skip
    assert [trial.checkpoint for trial in plan.trials] == [
        str(checkpoint) for checkpoint in (teacher, *baselines.values())
    ]
    bare = trials_of_teachers(settings, SweptModels.of(settings), space, {TEACHER: teacher}, {})
    assert [trial.role for trial in bare.trials] == ["teacher"], "no run is there by itself"
    # A sweep that trains its models has used their labels. The teacher of a plan is listed once.
    trains_models = resolve_settings({}, ["model.num_layers=2", "sweep.baseline_runs=[v]"])
    swept = SweptModels.of(trains_models)
    assert named_baselines(trains_models, swept, space, None) == {"vanilla (v)": runs["v"]}
    named_teacher = {"r = 2,1 (teacher)": teacher}
    plan = trials_of_teachers(
        trains_models, swept, space, {TEACHER: teacher}, {}, named_baselines=named_teacher
    )
    assert [trial.role for trial in plan.trials] == ["teacher"]


def test_a_sweep_that_trains_its_models_measures_the_named_ones_too(space, pretrain, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    checkpoint = pretrain("v", VANILLA, tokens)
    settings = resolve_settings(
        {},
        ["sweep.kind=iterations", "sweep.iterations=[1]", "sweep.methods=[iiet]",
         "model.context_length=32", "training.num_tokens_per_step=64"],
    )  # fmt: skip
    plain = trials_from_scratch(settings, space, tokens)
    with_baseline = trials_from_scratch(
        settings, space, tokens, named_baselines={"vanilla": checkpoint}
    )
    assert with_baseline.trials[:-1] == plain.trials
    assert (with_baseline.trials[-1].role, with_baseline.trials[-1].job) == ("baseline", None)
    assert (with_baseline.num_distinct, with_baseline.num_requested) == (
        plain.num_distinct,
        plain.num_requested,
    )
    assert with_baseline.key != plain.key


def test_a_run_that_cannot_be_compared_is_refused_by_the_name_of_the_setting(
    space, pretrain, tiny_tokens, tmp_path
):
    texts = [f"word {number} " * 40 for number in range(40)]
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    teacher = pretrain("teacher", {}, tokens)
    of_other_tokens = pretrain(
        "others", VANILLA, tokens_of(texts, tmp_path / "other", vocab_size=300)
    )
    half = load_config(teacher).context_length // 2
    short = pretrain("short", {**VANILLA, "context_length": half}, tokens)
    for name in ("nothing", "teacher"):
        settings = resolve_settings({}, [f"sweep.baseline_runs=[{name}]"])
        with pytest.raises(UserError, match=rf"^sweep\.baseline_runs: .*{name}"):
            plan_sweep(settings, workspace=space, teacher=teacher)
    for checkpoint, words in ((of_other_tokens, "other tokens"), (short, f"reads {half} tokens")):
        with pytest.raises(UserError, match=rf"^sweep\.baseline_runs: .*{words}"):
            check_named_baselines({"vanilla": checkpoint}, tokens, [load_config(teacher)])


def test_a_plain_teacher_of_which_nothing_may_be_left_out_is_refused(space, pretrain, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    vanilla = pretrain("vanilla", VANILLA, tokens)
    with refused(UserError, "sweep.leave_out_layers=none"):
        settings = resolve_settings({}, ["sweep.leave_out_layers=none"])
        plan_sweep(settings, workspace=space, teacher=vanilla)


def test_pcformer_is_trained_at_its_own_levels_from_the_first_step_on(space, tiny_tokens):
    of_file = resolve_settings({}, ["model.method=pcformer", "training.iterate_from_fraction=0.6"])
    job = pretraining_job(of_file, space, tiny_tokens)
    assert (str(job.model.schedule), job.recipe.iterate_from_fraction) == ("2,2,2,2,2,2", 0.0)


def test_models_whose_labels_end_with_their_seeds_are_seeds_of_one_model(space, tiny_tokens):
    tokens = shutil.copytree(tiny_tokens, space.tokens / tiny_tokens.name)
    settings = resolve_settings(
        {}, ["sweep.kind=iterations", "model.context_length=32", "training.num_tokens_per_step=64"]
    )
    seed_1 = settings.training.model_copy(update={"seed": 1})
    models = {
        "mine, seed 0": settings,
        "mine, seed 1": settings.model_copy(update={"training": seed_1}),
    }
    plan = trials_from_scratch(settings, space, tokens, models)
    assert [(trial.group, trial.seed) for trial in plan.trials] == [("mine", 0), ("mine", 1)]
    assert (plan.num_requested, plan.num_distinct) == (1, 1)
    alone = trials_from_scratch(settings, space, tokens, {"mine, seed 1": settings})
    assert [(trial.group, trial.seed) for trial in alone.trials] == [(None, None)], "its seed is 0"


@pytest.mark.parametrize(
    ("name", "changes", "points"),
    [
        ("claims", [], "1.1"),  # Two tasks of 2,000 items.
        ("claims", ["evaluation.limit=350"], "2.6"),
        ("toy", [], "2.6"),
        ("toy", ["evaluation.suite=lastword,piqa", "evaluation.limit=500"], "2.2"),
        ("toy", ["evaluation.suite=heldout,piqa"], ""),  # How many items piqa has is not known yet.
    ],
)
def test_a_plan_says_which_differences_its_items_can_show(tmp_path, name, changes, points):
    plan = plan_sweep(read_settings(name, changes), workspace=open_workspace(tmp_path))
    notes = [note for note in plan.notes if "smallest difference" in note]
    assert bool(notes) == bool(points)
    assert all(f"{points} points" in note and "6%" in note for note in notes)
