"""Whatever disturbs a training, it ends like one that was left alone: to the last bit, and where
rounding differs, closely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from same_run import (
    Disturbance,
    crash,
    curve,
    damage,
    events,
    full_disk,
    in_folder,
    kill,
    press_ctrl_c,
    recipe,
    same_run,
    steps_of,
    stop,
    train,
    workers,
)

from iiet.model.config import DistillationConfig
from orchestrator.data.store import TokenStore
from orchestrator.records.training import TrainingJob
from orchestrator.settings import ElasticSettings, TrainingSettings
from orchestrator.training import trainer

RECIPE: dict[str, Any] = {
    "num_tokens_per_step": 64, "learning_rate": 1e-2, "warmup_steps": 2,
    "validate_every_steps": 5, "num_validation_tokens": 16 * 5, "checkpoint_every_steps": 4,
    "iterate_from_fraction": 0.5,
}  # fmt: skip
LEAN = {"activation_checkpointing": True, "precision": "bf16"}
FAMILY = ElasticSettings(schedules=("2,0", "1,0", "0,0"), num_drawn=2)
DAMPED = {"damping": 0.0, "learn_damping": "scalar", "differentiated_corrections": 1}
IDENTITY = {"method_options": {"start": "identity"}, "schedule": [0, 2]}
FROZEN = {"trained_layers": "corrected", "iterate_from_fraction": 0.0}
SECOND_LAYERS = ElasticSettings(schedules=("0,1", "0,0"), num_drawn=2)
HIDDEN = DistillationConfig(hidden_weight=0.5, start_step=1)
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one kept": {"recipe": {"num_checkpoints_kept": 1}},
    "elastic": {"recipe": {"elastic": FAMILY}},
    "damped": {"model": {"method_options": DAMPED}, "recipe": {"activation_checkpointing": True}},
    "student": {"distillation": HIDDEN},
    "lean student": {"distillation": HIDDEN, "recipe": LEAN},
    "student of fewer layers": {
        "distillation": DistillationConfig(),
        "kept_layers": (1,),
        "model": {"num_layers": 1, "schedule": [1]},
    },
    # The loss reads the head's own weight.
    "untied": {
        "model": {"method_options": DAMPED, "tie_embeddings": False},
        "recipe": {"activation_checkpointing": True},
    },
    "masked": {"recipe": {"num_sequences_per_pass": 1}},
    "bad": {"recipe": {"skip_bad_steps": 1}},
    "short and damped": {  # Half of the model's context.
        "model": {"method_options": DAMPED},
        "recipe": {"activation_checkpointing": True, "sequence_length": 8},
    },
    "retrofit": {"model": IDENTITY, "recipe": FROZEN},
    "retrofit near its source": {"model": IDENTITY, "recipe": {**FROZEN, "source_kl_weight": 0.5}},
    "taught family": {"distillation": HIDDEN, "recipe": {"elastic": FAMILY}},
    "muon": {"recipe": {"optimizer": "muon"}},
    "student by muon": {"distillation": HIDDEN, "recipe": {"optimizer": "muon"}},
    "elastic retrofit by muon": {
        "model": IDENTITY,
        "recipe": {**FROZEN, "elastic": SECOND_LAYERS, "optimizer": "muon"},
    },
    "elastic retrofit": {"model": IDENTITY, "recipe": {**FROZEN, "elastic": SECOND_LAYERS}},
}
"""Name of a run -> what distinguishes its job from the plain one."""


MASKED = """
from iiet.model.batch import Batch
from orchestrator.data.store import TokenStore
batch = TokenStore.batch

def masked(*arguments, **options):
    tokens = batch(*arguments, **options).input_ids
    return Batch.of_text(tokens, tokens > tokens[:, :1])

TokenStore.batch = masked
"""
"""Only some tokens count, another number of them in each worker and pass."""
BAD = """
import math
from orchestrator.training import trainer
make_objective = trainer.make_objective

def spoil(*arguments):
    inner = make_objective(*arguments)

    def compute(model, batch, step):
        loss, parts = inner(model, batch, step)
        return (loss * math.nan if step == 3 and rank == "1" else loss), parts

    return compute

trainer.make_objective = spoil
"""
"""The loss of the second worker is NaN at one step, and so is that of one who trains alone."""
PATCHES = {"masked": MASKED, "bad": BAD}
LATE = """
from orchestrator.training import trainer
trainer.NUM_RECORDED_POINTS = 1
trainer.RECORD_EVERY_SECONDS = 0.0 if rank == "1" else 1000.0
"""
"""By the clock of the second worker alone, each step is to be recorded."""


class Row(NamedTuple):
    """The disturbances of a job's run, and the events of its journal after them."""

    job: str
    disturbances: list[Disturbance]
    resumed: list[int]
    """Steps after which a process went on."""
    words: str = ""
    """Words of each event about damage, of which there are `num_damaged`."""
    num_damaged: int = 0
    rel: float = 0.0


WEIGHTS = "model.safetensors"
MOMENTS = "training_state.pt"
QUICK = {
    # Before the first step, between checkpoints, and before the last step.
    "stopped and crashed": Row(
        "plain", [stop(0), stop(3), crash(6), stop(1), stop(2)], [3, 4, 5, 7]
    ),
    "Ctrl-C, later twice": Row("plain", [press_ctrl_c(3), press_ctrl_c(6, times=2)], [5, 5]),
    "Ctrl-C on a full disk": Row(
        "plain",
        [
            press_ctrl_c(1, on_full_disk=True),
            stop(5),
            full_disk,
            press_ctrl_c(5, on_full_disk=True),
        ],
        [5, 5, 5],
    ),
    "a teacher": Row("student", [stop(3)], [3]),
    "a teacher of more layers": Row("student of fewer layers", [stop(3)], [3]),
    "a source and frozen layers": Row("retrofit", [stop(3), crash(5)], [3, 4]),
    "Muon": Row("muon", [stop(3), crash(6)], [3, 4]),
}
KILLED = {
    "killed in a step": ("step", "^6$"),
    "killed in a write": ("open", "/step_00000008/provenance.json"),
    "killed before a deletion": ("os.rename", r"/step_00000004 .*/\.step_00000004"),
    "killed in a deletion": ("os.remove", "^training_state.pt"),
}
SLOW = {
    "damaged weights": Row("plain", [stop(5), damage(WEIGHTS)], [4], "step_00000004 is used", 1),
    "damaged moments": Row(
        "plain", [stop(5), damage(MOMENTS), crash(7)], [4, 4], "step_00000004 is used", 2
    ),
    "a damaged end": Row("plain", [train, damage(WEIGHTS, b"")], [4], "step_00000004 is used", 1),
    "a family of schedules": Row("elastic", [stop(5)], [5]),
    "Muon, killed": Row("muon", [kill("step", "^6$")], [4]),
    "Muon with a teacher": Row("student by muon", [stop(5)], [5]),
    "Muon, a family and frozen layers": Row("elastic retrofit by muon", [stop(3)], [3]),
    "options of a method and a sequence length": Row("short and damped", [stop(6)], [6]),
    # The memory that a step takes, and a profile, are not part of a result's key.
    "activations computed again": Row("plain", [recipe(activation_checkpointing=True)], []),
    "several passes": Row("plain", [recipe(num_sequences_per_pass=3)], [], rel=1e-4),
    "a profile": Row("plain", [recipe(profile_steps=2)], []),
}
# Workers: replicas, shards, and two replicas of the model in two shards each.
REPLICAS = workers(2)
SHARDS = workers(2, "fsdp")
TWO_BY_TWO = workers(4, "fsdp", shards=2)
# Each kind of workers reads what another one wrote.
ONE_SHARDS_REPLICAS = [stop(2), workers(2, "fsdp", until=3), workers(2, until=2)]
ONE_COPIES = [stop(3), workers(4, "fsdp", shards=2, until=2)]
SEVERAL = {
    "one worker, then shards, then replicas": Row("plain", ONE_SHARDS_REPLICAS, [2, 5, 7]),
    "one worker, then replicas in shards": Row("plain", ONE_COPIES, [3, 5]),
    "replicas that leave parameters out": Row("damped", [REPLICAS], []),
    "shards with an own head": Row("untied", [SHARDS], []),
    "replicas of a retrofit": Row("retrofit", [REPLICAS], []),
    "replicas by Muon": Row("muon", [workers(2, until=5)], [5], rel=0.01),
    "shards of an elastic retrofit": Row("elastic retrofit", [workers(2, "fsdp", until=5)], [5]),
    "replicas in shards with a teacher": Row("student", [TWO_BY_TWO], []),
    "shards near a source": Row("retrofit near its source", [SHARDS], []),
    "replicas of a taught family": Row("taught family", [REPLICAS], []),
    "shards of a taught family": Row("taught family", [SHARDS], []),
    "lean shards": Row("lean student", [SHARDS], [], rel=0.1),
    "masked shards": Row("masked", [workers(2, "fsdp", before=MASKED)], []),
    "masked uneven shares": Row("masked", [workers(3, before=MASKED)], []),
    "a bad step of one shard": Row("bad", [workers(2, "fsdp", before=BAD)], []),
}
MORE_OF_SEVERAL = {
    "replicas of a family": Row("elastic", [REPLICAS], []),
    "shards of a family": Row("elastic", [SHARDS], []),
    "replicas in shards of a family": Row("elastic", [TWO_BY_TWO], []),
    "replicas with a teacher": Row("student", [REPLICAS], []),
    "shards with a teacher": Row("student", [SHARDS], []),
    "lean replicas": Row("lean student", [REPLICAS], [], rel=0.1),
    "masked replicas": Row("masked", [workers(2, before=MASKED)], []),
    "a bad step of one replica": Row("bad", [workers(2, before=BAD)], []),
}
"""Other pairs of what stands in `SEVERAL`."""


Make = Callable[..., TrainingJob]


@pytest.fixture(scope="module")
def make_job(tmp_path_factory, tiny_tokens, tiny_model, save_tiny) -> Make:
    """A function that returns a job by name and number of steps; what disturbs it differs, the
    folder is one."""
    folder = tmp_path_factory.mktemp("runs")
    teacher = str(save_tiny(folder / "teacher"))
    taught = {"objective": "distill", "teacher_folder": teacher, "initial_folder": teacher}
    source = save_tiny(folder / "source", method="vanilla", schedule=None)

    def make(name: str, num_steps: int = 8) -> TrainingJob:
        changes = dict(JOBS[name])
        recipe = {**RECIPE, "num_steps": num_steps, **changes.pop("recipe", {})}
        return TrainingJob(
            run_folder=str(folder / f"{name}-{num_steps}"),
            tokens_folder=str(tiny_tokens),
            model={**tiny_model, **changes.pop("model", {})},  # type: ignore[arg-type]
            recipe=TrainingSettings(**recipe),
            **(taught if "distillation" in changes else {}),
            **({"initial_folder": str(source)} if "retrofit" in name else {}),
            **changes,
        )

    return make


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_disturbed_run_ends_like_one_that_was_left_alone(make_job, name):
    row = {**QUICK, **SLOW}[name]
    job = same_run(make_job(row.job), *row.disturbances, rel=row.rel)
    assert [event["step"] for event in events(job, "resumed")] == row.resumed
    damaged = events(job, "damaged")
    assert len(damaged) == row.num_damaged
    assert all(row.words in event["text"] for event in damaged)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*SEVERAL, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_OF_SEVERAL)]
)
def test_several_workers_train_what_one_trains(make_job, name, monkeypatch):
    row = {**SEVERAL, **MORE_OF_SEVERAL}[name]
    for owner, attribute in ((TokenStore, "batch"), (trainer, "make_objective")):
        # The patches assign to these attributes, and monkeypatch puts them back afterwards.
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    exec(PATCHES.get(row.job, ""), {"rank": "1"})
    job = same_run(make_job(row.job), *row.disturbances, rel=row.rel or 1e-4)
    assert [event["step"] for event in events(job, "resumed")] == row.resumed
    assert [event["step"] for event in events(job, "skipped")] == [4] * (row.job == "bad")


@pytest.mark.slow
def test_workers_record_the_same_steps_though_only_the_clock_of_one_says_so(make_job):
    """Each tells the others about its GPU then, and would wait for ever for one that does not."""
    job = in_folder(make_job("plain", num_steps=4), "late")
    workers(2, before=LATE)(job)
    assert list(curve(job)) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLED)
def test_a_killed_run_ends_like_one_that_was_left_alone(make_job, place):
    job = make_job("one kept", num_steps=12)  # A checkpoint is deleted before the last one.
    assert steps_of(same_run(job, kill(*KILLED[place]))) == [12]
