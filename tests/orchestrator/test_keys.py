"""Every field of a job, a model and an evaluation is in the key, or marked as one that is not.

A field that is left out of a key returns another model's result without a word, so new fields are
found by introspection: they fail here until they have a mark, and the key is as it says.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, get_args, get_type_hints

import pytest
from lm_eval_tasks import write_choices
from pydantic import BaseModel
from sample_texts import add_opening, tokens_of

from iiet.model.config import DistillationConfig, ModelConfig, RopeScaling
from iiet.model.facts import ImplicitEulerOptions
from iiet.model.schedule import IterationSchedule
from orchestrator.evaluation.measuring import ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.tasks import load_suite
from orchestrator.models.open import open_model
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.settings.effects import Effect, fields_with, key_values
from orchestrator.settings.evaluation import Prompts
from orchestrator.settings.section import Section
from orchestrator.training.job import job_key
from orchestrator.workspace.provenance import content_key

NOT_IN_KEY: dict[type, set[str]] = {
    Suite: {"tokens_folder", "suite_folder", "include_folder", "vocabulary_folder"},
}  # fmt: skip
OTHER: dict[str, Any] = {
    "num_sequences_per_pass": 2, "iterate_ramp_fraction": 0.2, "elastic": None,
    "spike_factor": 20.0, "compile": True, "checkpoint_every_minutes": 5.0, "schedules": ("1",),
    "sequence_length": 8, "top_k": 5, "end_step": 9, "limit": 3, "num_fewshot": 2, "tasks": ("a",),
    "prompts": Prompts(), "fingerprints": {"a": "b"}, "chat_template": "short",
    "method": {"method": "pcformer", "schedule": None, "method_options": None},
    "dim": 32, "num_heads": 4,
    "num_layers": {"num_layers": 3, "schedule": IterationSchedule((2, 1, 1))},
    "num_kv_heads": 1, "head_dim": 10, "rotary_layers": (True, False),
    "rope_scaling": RopeScaling(rope_type="linear", factor=2.0), "sliding_windows": (None, 4),
    "schedule": IterationSchedule((1, 1)),
    "method_options": ImplicitEulerOptions(damping=0.5), "trained_layers": (2,),
}  # fmt: skip
"""A second value of the fields for which none can be derived from the first."""


def variants(base: Any, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return by field what `base` is with another value of that field alone."""
    hints = get_type_hints(type(base))
    names = [f.name for f in fields(base)] if is_dataclass(base) else type(base).model_fields
    found = {}
    for name in names:
        value = getattr(base, name)
        choices = [c for c in get_args(hints[name]) if c is not None]
        if name in (given or {}) or name in OTHER:
            other = {**OTHER, **(given or {})}[name]
        elif isinstance(value, bool):
            other = not value
        elif isinstance(value, int):
            other = value + 1
        elif isinstance(value, float):
            other = value / 2 or 0.25
        elif isinstance(value, str) and choices and all(isinstance(c, str) for c in choices):
            other = next(choice for choice in choices if choice != value)
        else:
            other = "another"
        changes = other if isinstance(other, dict) and name in other else {name: other}
        found[name] = (
            replace(base, **changes) if is_dataclass(base) else base.model_copy(update=changes)
        )
    return found


def test_every_field_of_a_training_is_in_its_key_or_must_not_be(
    tmp_path, tiny_tokens, tiny_model, save_tiny
):
    teacher = save_tiny(tmp_path / "teacher")
    other = save_tiny(tmp_path / "other", initializer_std=0.03)
    words = [f"word {number} " * 40 for number in range(40)]
    tokens = tokens_of(words, tmp_path / "other tokens", vocab_size=300)
    # A model with gates, whose rate is then part of the key, as those of Muon are.
    model = ModelConfig.from_dict({**tiny_model, "method_options": {"start": "identity"}})
    recipe = TrainingSettings(elastic=ElasticSettings(), optimizer="muon")
    job = TrainingJob(
        run_folder=str(tmp_path), tokens_folder=str(tiny_tokens), model=model, recipe=recipe,
        objective="distill", teacher_folder=str(teacher), initial_folder=str(teacher),
        distillation=DistillationConfig(),
    )  # fmt: skip
    folders = {"teacher_folder": str(other), "initial_folder": str(other)}
    key = job_key(job)
    parts: dict[str, Any] = {
        "recipe": recipe, "model": model, "distillation": job.distillation
    }  # fmt: skip
    changed = {name: variants(part) for name, part in parts.items()}
    given = {
        **folders, "tokens_folder": str(tokens), "kept_layers": (0, 1), "provenance": {"a": 1},
        "objective": "cross_entropy",
        **{name: next(iter(of_part.values())) for name, of_part in changed.items()},
    }  # fmt: skip
    tried = {TrainingJob: variants(job, given)}
    for name, of_part in changed.items():
        tried[type(parts[name])] = {
            field: job.model_copy(update={name: part}) for field, part in of_part.items()
        }
    tried[ElasticSettings] = {
        field: job.model_copy(update={"recipe": recipe.model_copy(update={"elastic": elastic})})
        for field, elastic in variants(recipe.elastic).items()
    }
    for kind, jobs in tried.items():
        same = {field for field, one in jobs.items() if job_key(one) == key}
        if issubclass(kind, BaseModel):  # Its fields have marks.
            assert same == set(fields_with(kind, Effect.JOURNAL, Effect.FILES)), kind.__name__
        else:
            assert not same, kind.__name__


class Unmarked(Section):
    rate: Annotated[float, Effect.WEIGHTS] = 1.0
    forgotten: float = 1.0


def test_a_field_without_a_mark_has_no_key():
    with pytest.raises(TypeError, match="no mark"):
        key_values(Unmarked())


def test_every_field_of_what_is_measured_is_in_its_key_or_must_not_be():
    suite = Suite(tokens_folder="tokens", prompts=Prompts(chat_template=True))
    given = {"prompts": Prompts(chat_template=False), "unaveraged": ("words",)}
    same = {name for name, one in variants(suite, given).items() if one.key == suite.key}
    assert same == NOT_IN_KEY[Suite]
    earlier = {**Suite().model_dump(), "beside": ["words"]}  # The field's name in earlier files.
    assert Suite.model_validate(earlier) == Suite(unaveraged=("words",))
    assert Suite(unaveraged=("words",)).key == "c9b8a15810cb99ff"
    for one in variants(Prompts()).values():
        assert one.key != Prompts().key
        assert suite.model_copy(update={"prompts": one}).key != suite.key


def test_a_stored_result_is_that_of_one_model_under_one_precision_and_limit(tmp_path, save_tiny):
    folder = write_choices(tmp_path / "tasks", "words", ["a b", "a b"])
    base = Suite(tasks=("words",), include_folder=str(folder))
    loaded = load_suite(base)
    store = EvaluationStore(tmp_path / "store")
    checkpoint, same, other = (
        save_tiny(tmp_path / name, initializer_std=std)
        for name, std in (("run", 0.02), ("same", 0.02), ("other", 0.03))
    )
    model = open_model(checkpoint)
    ModelMeasurer(model, store, base).measure_tasks(loaded)
    same_model = ModelMeasurer(open_model(same), store, base)
    assert same_model.has_stored(loaded), "a folder is not a model"

    def needs_new_results(suite: Suite) -> bool:
        asked = replace(loaded, suite=suite)
        return not ModelMeasurer(model, store, suite).has_stored(asked)

    # What is measured are the tasks that are loaded; how, is what makes another result.
    given = {
        "precision": "bf16", "limit": 1, "prompts": Prompts(chat_template=1),
        "unaveraged": ("words",),
    }  # fmt: skip
    suites = variants(base, given)
    others = {name for name, suite in suites.items() if needs_new_results(suite)}
    assert others == {"precision", "limit", "sequence_length", "prompts"}
    (same / "tokenizer.json").write_text((same / "tokenizer.json").read_text() + " ")
    others = [
        open_model(other),
        open_model(checkpoint, schedule="1,1"),
        replace(model, text_folder=same),
    ]
    assert not any(ModelMeasurer(one, store, base).has_stored(loaded) for one in others)


def test_opening_tokens_are_in_the_keys_of_tasks_and_keys_without_them_are_as_before(
    tmp_path, save_tiny
):
    folder = write_choices(tmp_path / "tasks", "words", ["a b", "a b"])
    suite = Suite(tasks=("words",), include_folder=str(folder))
    loaded = load_suite(suite)
    model = open_model(save_tiny(tmp_path / "run"))
    measurer = ModelMeasurer(model, EvaluationStore(tmp_path / "store"), suite)
    plain_key = content_key("evaluation", [*model.key, "fp32"], loaded.fingerprint("words"), None)
    assert measurer.keys(loaded) == {"words": plain_key}
    add_opening(model.text_folder / "tokenizer.json")
    assert measurer.keys(loaded) != {"words": plain_key}, "although the model's key is the old one"
