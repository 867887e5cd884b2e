"""Runs in this process give the same losses whatever interrupts them, and clear errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from iiet.decoder import Decoder
from iiet.distillation import DistillationConfig
from iiet.weights import WEIGHTS
from orchestrator.data.store import TokenStore
from orchestrator.models.folder import weights_key
from orchestrator.models.open import load_model
from orchestrator.records.training import TrainingJob
from orchestrator.settings import TrainingSettings
from orchestrator.training import trainer as run_module
from orchestrator.training.checkpoint import load_training_state
from orchestrator.training.job import check_job, finished_outcome, job_key
from orchestrator.training.trainer import Diverged, run_job
from orchestrator.workspace.errors import RunFailed, UserError
from orchestrator.workspace.files import read_json, write_json
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import find_checkpoints
from orchestrator.workspace.provenance import RECIPE_VERSION

RECIPE: dict[str, Any] = {
    "num_steps": 12,
    "num_tokens_per_step": 64,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "validate_every_steps": 5,
    "num_validation_tokens": 128,
    "checkpoint_every_steps": 4,
    "iterate_from_fraction": 0.5,
}

MakeJob = Callable[..., TrainingJob]


@pytest.fixture
def make_job(tmp_path: Path, tiny_tokens: Path, tiny_model: dict[str, Any]) -> MakeJob:
    def make(
        name: str = "run", *, recipe: dict[str, Any] | None = None, **more: Any
    ) -> TrainingJob:
        return TrainingJob(
            **{
                "run_folder": str(tmp_path / name),
                "tokens_folder": str(tiny_tokens),
                "model": tiny_model,
                "recipe": TrainingSettings(**{**RECIPE, **(recipe or {})}),
                **more,
            }
        )

    return make


def losses(job: TrainingJob) -> dict[int, float]:
    records, _ = read_journal(job.folder)
    return {
        r["step"]: r["values"]["train/loss"] for r in records if "train/loss" in r.get("values", {})
    }


def events(job: TrainingJob) -> list[str]:
    return [r["name"] for r in read_journal(job.folder)[0] if r["kind"] == "event"]


def stop_at(step: int) -> Callable[[], bool]:
    calls = iter(range(10**6))
    return lambda: next(calls) == step


def test_options_of_a_method_are_trained_saved_and_part_of_the_key(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    options = {"damping": 0.0, "learn_damping": True, "differentiated_corrections": 1}
    model = {**tiny_model, "method_options": options}
    recipe = {"iterate_from_fraction": 0.0, "activation_checkpointing": True}
    whole, split = (make_job(name, model=model, recipe=recipe) for name in ("whole", "split"))
    fixed = {**tiny_model, "method_options": {"damping": 0.5}}
    keys = [job_key(job) for job in (make_job(), make_job(model=fixed), whole, split)]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]
    usual = {**tiny_model, "method_options": {"damping": 1.0}}
    assert job_key(make_job(model=usual)) == keys[0]

    outcome = run_job(whole)
    assert not run_job(split, should_stop=stop_at(5)).finished
    assert run_job(split).finished
    assert losses(split) == losses(whole)
    decoder = load_model(Path(str(outcome.checkpoint)))
    assert decoder.config.to_dict()["method_options"] == options
    dampings = [p for name, p in decoder.named_parameters() if name.endswith("damping")]
    assert len(dampings) == 2
    assert all(damping.item() != 0 for damping in dampings)


def test_the_loss_falls_and_is_reported(make_job: MakeJob) -> None:
    job = make_job(recipe={"num_steps": 60, "iterate_from_fraction": 0.0})
    outcome = run_job(job)
    curve = losses(job)
    assert outcome.finished
    assert (outcome.step, outcome.num_tokens) == (60, 60 * 64)
    assert outcome.training_flops > 0
    assert list(curve) == list(range(1, 61))
    assert sum(list(curve.values())[-5:]) < sum(list(curve.values())[:5]) - 1.0
    assert outcome.checkpoint is not None
    records, _ = read_journal(job.folder)
    validation = [
        r["values"]["validation/loss"] for r in records if "validation/loss" in r.get("values", {})
    ]
    assert validation[-1] == outcome.validation_loss
    assert events(job)[0] == "started"
    assert events(job)[-1] == "finished"


def test_a_finished_job_returns_at_once(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run_job(make_job())
    monkeypatch.setattr(run_module, "Trainer", None)
    assert run_job(make_job()) == outcome
    assert finished_outcome(make_job()) == outcome


def test_two_runs_are_bitwise_equal(make_job: MakeJob) -> None:
    first, second = run_job(make_job("a")), run_job(make_job("b"))
    assert losses(make_job("a")) == losses(make_job("b"))
    assert weights_key(Path(first.checkpoint or "")) == weights_key(Path(second.checkpoint or ""))


@pytest.mark.parametrize("step", [0, 1, 4, 6, 11])
def test_a_stopped_and_resumed_run_is_bitwise_equal(make_job: MakeJob, step: int) -> None:
    whole = run_job(make_job("whole"))
    stopped = run_job(make_job("cut"), should_stop=stop_at(step))
    assert (stopped.step, stopped.finished) == (step, False)
    torch.manual_seed(step)  # Whatever else the process does in between.
    outcome = run_job(make_job("cut"))
    assert losses(make_job("cut")) == losses(make_job("whole"))
    assert outcome.validation_loss == whole.validation_loss
    assert (outcome.num_tokens, outcome.training_flops) == (whole.num_tokens, whole.training_flops)
    for name in ("model.safetensors", "config.json"):
        written = (Path(outcome.checkpoint or "") / name).read_bytes()
        assert written == (Path(whole.checkpoint or "") / name).read_bytes()


def test_a_resumed_run_draws_no_random_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job(), should_stop=stop_at(6))
    devices: list[str] = []
    built = Decoder.__init__

    def counted(self: Decoder, *arguments: Any) -> None:
        devices.append(str(torch.get_default_device()))
        built(self, *arguments)

    monkeypatch.setattr(Decoder, "__init__", counted)
    assert run_job(make_job()).finished
    assert set(devices) == {"meta"}


def test_a_crashed_run_resumes_from_the_previous_checkpoint(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(TokenStore, "batch", crash_at(7, TokenStore.batch))
        with pytest.raises(RuntimeError, match="crash"):
            run_job(make_job("cut"))
    assert find_checkpoints(make_job("cut").folder)[-1].name == "step_00000004"
    run_job(make_job("cut"))
    assert losses(make_job("cut")) == losses(make_job("whole"))
    assert "resumed" in events(make_job("cut"))


def crash_at(step: int, batch: Callable[..., Any]) -> Callable[..., Any]:
    def crashing(self: Any, now: int, **options: Any) -> Any:
        if now == step:
            raise RuntimeError("crash")
        return batch(self, now, **options)

    return crashing


def test_a_damaged_checkpoint_is_reported_and_skipped(make_job: MakeJob) -> None:
    whole = run_job(make_job("whole"))
    job = make_job("cut")
    run_job(job, should_stop=stop_at(9))
    newest = find_checkpoints(job.folder)[-1]
    assert newest.name == "step_00000009"
    (newest / "model.safetensors").write_bytes(b"cut off")
    outcome = run_job(job)
    assert "damaged" in events(job)
    assert losses(job) == losses(make_job("whole"))
    assert outcome.validation_loss == whole.validation_loss


def test_a_damaged_last_checkpoint_is_trained_again(make_job: MakeJob) -> None:
    outcome = run_job(make_job())
    weights = Path(outcome.checkpoint or "") / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(b"")
    assert run_job(make_job()).finished
    assert weights.read_bytes() == before


def test_a_run_keeps_only_the_newest_checkpoints(make_job: MakeJob) -> None:
    job = make_job(recipe={"num_checkpoints_kept": 1})
    run_job(job)
    assert [p.name for p in find_checkpoints(job.folder)] == ["step_00000012"]


def test_accumulated_passes_give_the_same_losses(make_job: MakeJob) -> None:
    run_job(make_job("one"))
    run_job(make_job("many", recipe={"num_sequences_per_pass": 3}))
    assert list(losses(make_job("many")).values()) == pytest.approx(
        list(losses(make_job("one")).values()), abs=1e-5
    )


def test_activation_checkpointing_gives_the_same_losses(make_job: MakeJob) -> None:
    run_job(make_job("one"))
    run_job(make_job("lean", recipe={"activation_checkpointing": True}))
    assert list(losses(make_job("lean")).values()) == pytest.approx(
        list(losses(make_job("one")).values()), abs=1e-5
    )


def test_bf16_losses_are_close_to_fp32(make_job: MakeJob) -> None:
    run_job(make_job("one"))
    run_job(make_job("bf16", recipe={"precision": "bf16"}))
    assert list(losses(make_job("bf16")).values()) == pytest.approx(
        list(losses(make_job("one")).values()), abs=0.1
    )


def test_first_stage_makes_no_corrections(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    forward = Decoder.forward

    def watched(self: Decoder, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            used.append(kwargs["schedule"].num_corrections)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "forward", watched)
    run_job(make_job())
    assert used == [0] * 6 + [3] * 6


def spoil(monkeypatch: pytest.MonkeyPatch, *bad_steps: int, name: str = "loss") -> None:
    """Make the loss, or only the gradient, NaN at these steps, counted from 0."""
    objective = run_module.make_objective

    def spoiled(*arguments: Any) -> Any:
        inner = objective(*arguments)

        def compute(model: Any, batch: Any, step: int) -> Any:
            loss, parts = inner(model, batch, step)
            if step in bad_steps:
                if name == "loss":
                    loss = loss * math.nan
                else:
                    factor = 1e3 if name == "spike" else math.inf
                    loss.register_hook(lambda gradient: gradient * factor)
            return loss, parts

        return compute

    monkeypatch.setattr(run_module, "make_objective", spoiled)


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_divergence_names_step_and_last_good_checkpoint(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    job = make_job()
    spoil(monkeypatch, 6, name=name)
    with pytest.raises(Diverged) as caught:
        run_job(job)
    assert "step 7" in str(caught.value)
    assert str(job.folder / "step_00000004") in str(caught.value)
    assert "training.learning_rate" in str(caught.value)
    assert "training.skip_bad_steps" in str(caught.value)
    assert [p.name for p in find_checkpoints(job.folder)] == ["step_00000004"]
    assert events(job)[-1] == "diverged"


def test_advice_names_the_settings_section_of_the_recipe(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = "distillation.training"
    spoil(monkeypatch, 6, name="loss")
    with pytest.raises(Diverged) as caught:
        run_job(make_job(section=section))
    for setting in ("learning_rate=0.01, ", "warmup_steps", "skip_bad_steps"):
        assert f" {section}.{setting}" in str(caught.value)
        assert f" training.{setting}" not in str(caught.value)
    assert "sweep.learning_rates" not in str(caught.value)
    with pytest.raises(Diverged, match=r"training\.learning_rate=0\.01 \(or its own in sweep"):
        run_job(make_job("scratch"))
    for recipe, words in (
        ({"num_tokens_per_step": 65}, f"{section}.num_tokens_per_step must be a multiple"),
        ({"num_tokens_per_step": 48}, f"change {section}.num_tokens_per_step, or the number"),
    ):
        job = make_job("wrong", recipe=recipe, section=section)
        with pytest.raises(UserError, match=words):
            check_job(job, num_workers=2)
    assert job_key(make_job(section=section)) == job_key(make_job())


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_and_is_recorded(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spoil(monkeypatch, 3, 4, 8, name=name)
    saving = {"checkpoint_every_steps": 1, "num_checkpoints_kept": 9}
    job = make_job(recipe={"skip_bad_steps": 2, "num_steps": 9, **saving})
    assert run_job(job).num_tokens == 9 * 64
    before, *skipped = [load_file(find_checkpoints(job.folder)[i] / WEIGHTS) for i in (2, 3, 4)]
    for weights in skipped:
        assert all(torch.equal(before[name], weights[name]) for name in before)
    states = [load_training_state(find_checkpoints(job.folder)[i]) for i in (2, 4)]
    moments = [state["optimizer"]["state"][0] for state in states]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    records = read_journal(job.folder)[0]
    assert [r["step"] for r in records if r.get("name") == "skipped"] == [4, 5, 9]
    counts = [r["values"]["train/skipped_steps"] for r in records if "values" in r
              and "train/skipped_steps" in r["values"]]  # fmt: skip
    assert counts == [1, 2, 3]
    assert set(losses(job)) == {1, 2, 3, 6, 7, 8}


def test_too_many_bad_steps_end_a_run_that_a_higher_limit_resumes(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 4, 5, 6)
    with pytest.raises(Diverged, match=r"step 7: loss nan, .*, after 2 skipped in a row"):
        run_job(make_job("cut", recipe={"skip_bad_steps": 2, "checkpoint_every_steps": 1}))
    # It resumes from the last saved step: skip_bad_steps is not part of the key.
    run_job(make_job("cut", recipe={"skip_bad_steps": 3}))
    run_job(make_job("whole", recipe={"skip_bad_steps": 3}))
    assert losses(make_job("cut")) == losses(make_job("whole"))


def test_a_spike_is_a_bad_step_if_the_recipe_checks_for_it(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 20, name="spike")
    recipe = {"num_steps": 24, "checkpoint_every_steps": 10}
    assert run_job(make_job("blind", recipe=recipe)).finished
    watched = {**recipe, "spike_factor": 20.0}
    with pytest.raises(Diverged, match=r"spiked .* times the usual norm\) at step 21: loss"):
        run_job(make_job("watched", recipe=watched))
    # It resumes from step 20 with the saved norms, and skips the spike.
    patient = {**watched, "skip_bad_steps": 1}
    run_job(make_job("watched", recipe=patient))
    run_job(make_job("whole", recipe=patient))
    assert losses(make_job("watched")) == losses(make_job("whole"))
    assert [r["step"] for r in read_journal(make_job("whole").folder)[0]
            if r.get("name") == "skipped"] == [21]  # fmt: skip


def test_a_spike_is_measured_by_the_latest_norms(make_job: MakeJob) -> None:
    job = make_job(recipe={"num_steps": 70, "spike_factor": 1e9, "validate_every_steps": 70})
    state = load_training_state(Path(run_job(job).checkpoint or ""))
    records, _ = read_journal(job.folder)
    norms = [r["values"].get("train/gradient_norm") for r in records if r["kind"] == "metrics"]
    assert state["position"]["recent_norms"] == [norm for norm in norms if norm][-64:]


def test_two_seeds_are_two_initial_models(make_job: MakeJob) -> None:
    still = {"num_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    outcomes = [run_job(make_job(str(n), recipe={**still, "seed": n})) for n in (0, 1)]
    first, second = (load_model(Path(outcome.checkpoint or "")) for outcome in outcomes)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


@pytest.mark.parametrize("step", [4, 5, 6])
def test_a_run_interrupted_among_skipped_steps_is_bitwise_equal(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    spoil(monkeypatch, 4, 5)
    patient = {"skip_bad_steps": 2}
    whole = run_job(make_job("whole", recipe=patient))
    run_job(make_job("cut", recipe=patient), should_stop=stop_at(step))
    outcome = run_job(make_job("cut", recipe=patient))
    assert losses(make_job("cut")) == losses(make_job("whole"))
    states = [load_training_state(Path(o.checkpoint or "")) for o in (whole, outcome)]
    assert [state["position"]["num_skipped"] for state in states] == [2, 2]
    assert weights_key(Path(whole.checkpoint or "")) == weights_key(Path(outcome.checkpoint or ""))


def test_distillation_starts_from_the_weights_and_leaves_the_teacher_alone(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    teacher = Path(run_job(make_job("teacher")).checkpoint or "")
    before = weights_key(teacher), (teacher / "model.safetensors").read_bytes()
    student = {**tiny_model, "schedule": [0, 1]}
    job = make_job(
        "student",
        model=student,
        objective="distill",
        teacher_folder=str(teacher),
        initial_folder=str(teacher),
        distillation=DistillationConfig(),
        recipe={"learning_rate": 1e-9, "iterate_from_fraction": 0.0},
    )
    outcome = run_job(job)
    decoder = load_model(Path(outcome.checkpoint or ""))
    assert decoder.schedule.corrections == (0, 1)
    for name, tensor in load_model(teacher).state_dict().items():
        assert torch.allclose(decoder.state_dict()[name], tensor, atol=1e-6), name
    assert (weights_key(teacher), (teacher / "model.safetensors").read_bytes()) == before
    first = read_journal(job.folder)[0][1]["values"]
    assert first["train/kl"] > 0
    assert first["train/loss"] == pytest.approx(
        first["train/cross_entropy"] + first["train/kl"], rel=1e-5
    )


def test_distillation_counts_the_flops_of_its_teacher(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    teacher = run_job(make_job("teacher")).checkpoint
    more = {"initial_folder": teacher, "recipe": {"num_steps": 2, "iterate_from_fraction": 0.0}}
    plain = run_job(make_job("plain", objective="cross_entropy", **more))
    taught = run_job(make_job("taught", objective="distill", teacher_folder=teacher, **more))
    assert taught.training_flops == pytest.approx(plain.training_flops * 4 / 3)


def test_the_key_depends_on_what_determines_the_result(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    key = job_key(make_job())
    assert job_key(make_job("elsewhere", provenance={"note": "x"})) == key
    assert job_key(make_job(recipe={"checkpoint_every_steps": 1})) == key
    assert job_key(make_job(recipe={"learning_rate": 2e-2})) != key
    assert job_key(make_job(recipe={"seed": 1})) != key
    assert job_key(make_job(model={**tiny_model, "schedule": [0, 0]})) != key
    teacher = run_job(make_job()).checkpoint
    taught = make_job("s", objective="distill", teacher_folder=teacher, initial_folder=teacher)
    assert job_key(taught) != key


def test_a_run_records_its_recipe_version(make_job: MakeJob) -> None:
    job = make_job()
    run_job(job)
    claim = read_json(job.folder / "job.json")
    assert claim.pop("recipe_version") == RECIPE_VERSION
    write_json(job.folder / "job.json", claim)
    with pytest.raises(UserError, match="another version of this program"):
        run_job(job)


def test_a_job_survives_json(make_job: MakeJob) -> None:
    job = make_job(distillation=DistillationConfig(kl_weight=0.5), provenance={"a": [1]})
    assert TrainingJob.model_validate(json.loads(json.dumps(job.model_dump(mode="json")))) == job


def test_a_folder_of_another_job_is_refused(make_job: MakeJob) -> None:
    run_job(make_job())
    with pytest.raises(UserError, match=r"recipe.learning_rate was 0.01, is 0.5"):
        run_job(make_job(recipe={"learning_rate": 0.5}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"recipe": {"num_tokens_per_step": 65}},
            "multiple of the context length 16, such as 64; got 65",
        ),
        ({"tokens_folder": "/nowhere"}, "/nowhere"),
        ({"objective": "distill"}, "needs a teacher"),
        ({"objective": "distill", "teacher_folder": "/nowhere"}, "no checkpoint folder /nowhere"),
        ({"initial_folder": "/nowhere"}, "no checkpoint folder /nowhere"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    make_job: MakeJob, changes: dict[str, Any], sentence: str
) -> None:
    job = make_job(**changes)
    with pytest.raises(UserError, match=sentence):
        run_job(job)
    assert not job.folder.exists()


def test_a_model_that_does_not_fit_is_refused(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="the model's is 10"):
        check_job(make_job(model={**tiny_model, "vocab_size": 10}))
    with pytest.raises(ValueError, match="dim must be a multiple"):
        make_job(model={**tiny_model, "num_heads": 3})


def test_a_batch_that_workers_cannot_divide_is_refused(make_job: MakeJob) -> None:
    check_job(make_job(), num_workers=4)
    with pytest.raises(UserError, match="3 workers"):
        check_job(make_job(), num_workers=3)


def test_weights_of_another_model_are_refused(
    make_job: MakeJob, tiny_model: dict[str, Any]
) -> None:
    teacher = run_job(make_job()).checkpoint
    job = make_job("s", initial_folder=teacher, model={**tiny_model, "ffn_dim": 64})
    with pytest.raises(UserError, match="another configuration"):
        run_job(job)


def test_a_folder_in_use_is_refused(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0.0)
    with pytest.raises(RunFailed, match="another process trained in"):
        run_job(make_job(), report=lambda *_: run_job(make_job()) and None)
