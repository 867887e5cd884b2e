"""A model of a front becomes a folder for transformers, and a version in MLflow's registry."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from refusals import assert_names, refused
from sample_trials import sample_trial, with_items

from iiet.iiad.pruning import InfluenceTable
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import weights_key
from orchestrator.models.load import load_model
from orchestrator.models.lookup import load_influence_table
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.generating import open_generator
from orchestrator.pipelines.models import PickResult, export, pick, plan_pick
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.influence import StoredInfluence, influence_path
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import read_settings
from orchestrator.workspace.errors import DamagedFile, UserError
from orchestrator.workspace.layout import open_workspace


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Context:
    # One store for all tests of the module: making a database takes seconds.
    return Context(open_workspace(tmp_path_factory.mktemp("workspace")))


SETTINGS = read_settings(None, [])
NAME = "iiet-2x16"
"""Method and size of the models."""


def pick_from(context: Context, sweep: str | None, **options: Any) -> PickResult:
    return pick(sweep, workspace=context.workspace, **options)


@pytest.fixture
def sweep(context, save_tiny) -> StoredSweep:
    teacher = save_tiny(context.workspace.runs / "teacher")
    student = save_tiny(context.workspace.runs / "student", seed=1, schedule=[1, 0])
    full = sample_trial(
        key="full",
        role="teacher",
        method="iiet",
        schedule=(2, 1),
        label="teacher",
        cost={"evaluations": 5},
        quality={"accuracy": 0.5},
        checkpoint=str(teacher),
    )
    stored_sweep = StoredSweep(
        name="two-models",
        key="sweep-key",
        results=(
            full,
            sample_trial(
                key="cheap", label="1,0", schedule=(1, 0), cost={"evaluations": 3},
                quality={"accuracy": 0.498}, checkpoint=str(student),
            ),
            sample_trial(
                key="pruned", label="0,0", schedule=(0, 0), cost={"evaluations": 2},
                quality={"accuracy": 0.3}, checkpoint=str(teacher),
            ),
        ),
    )  # fmt: skip
    stored_sweep.store(context.workspace)
    return stored_sweep


def version_of(context: Context, name: str, alias: str) -> Any:
    return context.tracking.store.connect().get_model_version_by_alias(name, alias)


@pytest.mark.parametrize(
    ("rule", "option"),
    [({"keep": 2.0}, "--keep"), ({"keep": 0.0}, "--keep"), ({"confidence": 1.5}, "--confidence")],
)
def test_a_share_above_one_is_a_mistake(context, sweep, rule, option):
    with pytest.raises(UserError, match=f"^{option} "):
        plan_pick(workspace=context.workspace, **rule)


@pytest.mark.slow
def test_the_pick_is_exported_and_registered(context, sweep, tmp_path):
    choice = pick_from(context, None)
    assert choice.point.key == "cheap"
    assert_names(choice.sentence, "99.6%", "3 of 5 NFE")
    version = version_of(context, NAME, "keep-99")
    assert choice.version == f"models:/{NAME}@keep-99"
    assert version.description == choice.sentence
    assert version.tags["sweep"] == "two-models"
    assert version.tags["schedule"] == "1,0"
    assert version.tags["cost/evaluations"] == "3"
    assert version.tags["quality/accuracy"] == "0.498"
    client = context.tracking.store.connect()
    run = client.get_run(version.run_id)
    assert (run.data.tags["iiet.key"], run.data.tags["iiet.kind"]) == ("cheap", "trial")
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert version.source == logged.artifact_location
    entry = {"name": NAME, "version": str(version.version)}
    assert entry in json.loads(logged.tags["mlflow.modelVersions"])
    assert choice.folder is not None
    card = (choice.folder / "README.md").read_text()
    assert_names(card, "`keep-99`", "`two-models`", choice.sentence)
    # The database of a copied workspace gets nothing.
    copied = shutil.copytree(context.workspace.root, tmp_path / "copied")
    choice = pick(workspace=copied, cheapest=True)
    assert choice.version is None
    assert choice.folder == copied / "exports" / "two-models" / "cheapest"
    assert [*choice.shown()][1:] == [f"exported: {choice.folder}"]


def test_generate_takes_the_pick_until_a_run_is_newer(context, sweep, save_tiny, tmp_path):
    def used(model: Path | str | None = None) -> tuple[Path, tuple[int, ...]]:
        writer = open_generator(context.workspace, model)
        return writer.checkpoint, tuple(writer.decoder.schedule)

    teacher, student, _ = (Path(str(trial.checkpoint)) for trial in sweep.results)
    context.workspace.picked.unlink(missing_ok=True)
    assert used("two-models") == (student, (1, 0)), "what `pick two-models` would choose"
    folder = tmp_path / "my-model"
    pick_from(context, "two-models", cheapest=True, to=folder)
    assert used() == used("two-models") == (teacher, (0, 0))
    assert used(folder) == (folder, (0, 0))
    token_ids = [
        open_generator(context.workspace, model).tokenizer.encode_document("abc")
        for model in (folder, None)
    ]
    assert token_ids[0] == token_ids[1], "an exported model reads text as it did before"
    later = save_tiny(context.workspace.runs / "later", seed=2)
    assert used() == (later, (2, 1))
    assert used("two-models") == (teacher, (0, 0))


@pytest.mark.slow
def test_a_pick_replaces_another_model_only_if_asked_to(context, sweep, tmp_path):
    rules: list[dict[str, Any]] = [{"best": True}, {"best": True}, {"keep": 1.0}]
    for rule in rules:
        choice = pick_from(context, "two-models", **rule, to=tmp_path / "mine")
    # Picking again makes no second version.
    best, keeping = (version_of(context, NAME, alias) for alias in ("best", "keep-100"))
    assert best.version == keeping.version
    assert keeping.description == choice.sentence
    client = context.tracking.store.connect()
    versions = client.search_model_versions(f"name = '{NAME}'")
    assert [v.version for v in versions if v.run_id == best.run_id] == [best.version]
    # The same weights under another schedule.
    plan = plan_pick("two-models", workspace=context.workspace, budget=2)
    assert (plan.point.key, plan.folder) == ("pruned", None)
    assert not (context.workspace.exports / "two-models" / "budget-2").exists()
    with refused(UserError, "mine", "--force", "--to"):
        pick_from(context, "two-models", budget=2, to=tmp_path / "mine")
    choice = pick_from(context, "two-models", budget=2, to=tmp_path / "mine", force=True)
    assert choice.folder == tmp_path / "mine"
    assert load_model(tmp_path / "mine").schedule == IterationSchedule((0, 0))


def test_of_several_seeds_one_is_exported_with_its_own_numbers(context, sweep, save_tiny, tmp_path):
    full, student, _ = sweep.results
    seeds = []
    for seed, accuracy in ((1, 0.52), (0, 0.48)):
        folder = save_tiny(context.workspace.runs / f"seed{seed}", seed=seed, schedule=[1, 0])
        result = student.model_copy(
            update={
                "key": f"cheap-{seed}",
                "label": f"1,0, seed {seed}",
                "seed": seed,
                "group": "1,0",
                "checkpoint": str(folder),
            }
        ).with_numbers("quality", {"accuracy": accuracy})
        task = TaskResult(
            name="choices", version="1", num_items=100, num_fewshot=0,
            metrics={"acc": accuracy}, items=[], values={},
        )  # fmt: skip
        items = {result.key: EvaluationResult(results={"choices": task})}
        seeds += with_items(context.workspace, [result], items)
    sweep.model_copy(update={"name": "seeds", "results": (full, *seeds)}).store(context.workspace)
    choice = pick_from(context, "seeds", cheapest=True, to=tmp_path / "seeds")
    assert choice.point.value("quality/accuracy") == pytest.approx(0.5)
    assert_names(choice.sentence, "2 seeds", "seed 0")
    card = (tmp_path / "seeds" / "README.md").read_text()
    assert "| choices | acc | 0.4800 |" in card
    assert "iiet seed0" in card
    version = version_of(context, NAME, "cheapest")
    run = context.tracking.store.connect().get_run(version.run_id)
    assert run.data.tags["iiet.key"] == "cheap-0"
    assert version.tags["quality/accuracy"] == "0.48"


def table_of(metric: str, schedule: tuple[int, ...]) -> InfluenceTable:
    rows: Any = tuple(tuple(0.5**i for i in range(count)) for count in schedule)
    return InfluenceTable(metric=metric, value_rows=rows, error_rows=rows, num_tokens=64)  # type: ignore[arg-type]


def store_table(checkpoint: Path, metric: str, schedule: tuple[int, ...]) -> None:
    stored = StoredInfluence(key="any", table=table_of(metric, schedule))
    stored.write(influence_path(checkpoint, metric))


def test_the_card_holds_the_influence_that_the_schedule_was_chosen_by(
    context, sweep, save_tiny, tmp_path
):
    teacher = Path(str(sweep.results[0].checkpoint))
    provenance = {"teacher": weights_key(teacher)}
    runs = context.workspace.runs
    student = save_tiny(runs / "taught", seed=1, schedule=[1, 0], provenance=provenance)
    store_table(student, "cosine", (1, 0))
    copy = save_tiny(runs / "copy")
    assert weights_key(copy) == provenance["teacher"], "it is as good"
    store_table(copy, "loss", (2, 1))  # Another metric than that of the settings.
    for metric in ("cosine", "loss", "relative"):
        store_table(teacher, metric, (2, 1))

    def card(name: str, *settings: str) -> str:
        folder = export(
            student,
            workspace=context.workspace,
            settings=read_settings(None, settings),
            to=tmp_path / name,
            measure=name == "usual",  # Which fails, and is said in the card: it has no tokens.
        )
        return (folder / "README.md").read_text()

    text = card("usual")
    assert_names(text, "correction (cosine)", "64 tokens")
    assert "Not measured." in text
    assert "under the schedule `2,1`" in card("again")
    assert "correction (loss)" in card("loss", "influence.metric=loss")
    result = sweep.results[1].model_copy(update={"checkpoint": str(student)})
    stored_sweep = StoredSweep(
        name="by-relative",
        key=sweep.key,
        results=(sweep.results[0], result),
        influence=table_of("relative", (2, 1)),
    )
    stored_sweep.store(context.workspace)
    choice = pick_from(context, "by-relative", cheapest=True)
    assert choice.folder is not None
    assert "correction (relative)" in (choice.folder / "README.md").read_text()


def test_an_influence_table_is_taken_only_if_one_can_be_meant(tmp_path, save_tiny):
    checkpoint = save_tiny(tmp_path / "measured")

    def metric(preferred: str | None = None) -> str | None:
        table = load_influence_table(checkpoint, preferred)
        return table.metric if table else None

    assert metric() is None
    store_table(checkpoint, "relative", (2, 1))
    assert metric() == metric("loss") == "relative", "there is no other"
    store_table(checkpoint, "loss", (2, 1))
    assert metric("loss") == "loss"
    assert metric() is None, "it could be either"
    store_table(checkpoint, "cosine", (1, 1))
    assert metric("cosine") is None, "it is another schedule's"
    influence_path(checkpoint, "loss").write_text("{")
    with refused(DamagedFile, "influence-loss.json"):
        metric("relative")
