"""The key of a training is what determines it; mistakes are found before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from refusals import refused

from iiet.model.config import DistillationConfig
from orchestrator.records.training import StoredJob, TrainingJob
from orchestrator.training.job import check_job, job_key
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import RECIPE_VERSION

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make(tiny_job) -> MakeJob:
    def make(name: str = "run", *, changes: dict[str, Any] | None = None, **more: Any):
        job = tiny_job(name, **{"num_steps": 2, "learning_rate": 1e-2, **(changes or {})})
        return TrainingJob(**{**dict(job), **more})

    return make


def test_the_key_depends_on_what_determines_the_result(make, tiny_model, save_tiny, tmp_path):
    teacher = str(save_tiny(tmp_path / "teacher"))
    taught = {"objective": "distill", "teacher_folder": teacher, "initial_folder": teacher}
    equal_jobs = [
        make(),
        make("elsewhere", provenance={"note": "x"}, section="distillation.training"),
        make(storage=str(tmp_path / "store")),
        make(changes={"checkpoint_every_steps": 1, "compile": True, "profile_steps": 2}),
        make(model={**tiny_model, "method_options": {"damping": 1.0}}),
        make(changes={"sequence_length": tiny_model["context_length"]}),
        make(changes={"muon_rate_factor": 2.0, "muon_momentum": 0.5}),  # Not read by AdamW.
    ]
    other_jobs = [
        make(changes={"learning_rate": 2e-2}),
        make(changes={"seed": 1}),
        make(changes={"optimizer": "muon"}),
        make(changes={"optimizer": "muon", "muon_rate_factor": 2.0}),
        make(changes={"optimizer": "muon", "muon_momentum": 0.5}),
        make(changes={"iterate_ramp_fraction": 0.1}),
        make(changes={"sequence_length": 8}),
        make(model={**tiny_model, "schedule": [0, 0]}),
        make(model={**tiny_model, "method_options": {"damping": 0.5}}),
        make(**taught),
        make(**taught, distillation=DistillationConfig(temperature=2.0)),
        make(**taught, distillation=DistillationConfig(start_step=1)),
        make(**taught | {"objective": "cross_entropy"}),
    ]
    assert len({job_key(job) for job in equal_jobs}) == 1
    assert len({job_key(job) for job in (equal_jobs[0], *other_jobs)}) == 1 + len(other_jobs)


def test_a_folder_holds_one_job_of_one_version(make):
    job = make(distillation=DistillationConfig(kl_weight=0.5), provenance={"a": [1]})
    assert TrainingJob.model_validate(json.loads(json.dumps(job.model_dump(mode="json")))) == job
    run_job(job)
    with refused(UserError, "recipe.learning_rate", "0.01", "0.5"):
        run_job(make(changes={"learning_rate": 0.5}))
    stored = StoredJob.read(job.folder / "job.json")
    assert stored is not None
    assert stored.recipe_version == RECIPE_VERSION
    fields = stored.model_dump(mode="json")
    fields["essence"] = fields.pop("key_fields")
    assert StoredJob.model_validate(fields) == stored, "the field's name in earlier runs"
    earlier = stored.model_copy(update={"recipe_version": RECIPE_VERSION - 1})
    earlier.write(job.folder / "job.json")
    with refused(UserError, "version"):
        run_job(job)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"changes": {"num_tokens_per_step": 65}, "section": "distillation.training"},
        r"distillation\.training\.num_tokens_per_step must be .* 16, such as 64; got 65",
    ),
    ({"changes": {"num_tokens_per_step": 48}}, r"change training\.num_tokens_per_step, or .*"),
    ({"tokens_folder": "/nowhere"}, "/nowhere"),
    ({"objective": "distill", "teacher_folder": "/nowhere"}, "no checkpoint folder /nowhere"),
    ({"initial_folder": "/nowhere"}, "no checkpoint folder /nowhere"),
    ({"storage": "nowhere://x"}, r"cluster\.storage: 'nowhere://x' names no storage"),
    ({"model": {"vocab_size": 10}}, "the model's is 10"),
]


@pytest.mark.parametrize(("changes", "sentence"), MISTAKES)
def test_mistakes_are_found_before_anything_is_written(changes, sentence, make, tiny_model):
    fields = {**changes}
    if "model" in fields:
        fields["model"] = {**tiny_model, **fields["model"]}
    job = make(**fields)
    with pytest.raises(UserError, match=sentence):
        check_job(job, num_workers=2)
    check_job(make(), num_workers=4)
    assert not job.folder.exists()
