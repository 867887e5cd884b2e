"""Influence is measured once for what determines it, stored beside the weights, and shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from fake_tracking import untracked
from kept_progress import KeptProgress
from read_tokens import noted_tokens
from refusals import refused

from iiet.cost import inference_cost
from iiet.iiad.influence import influence_table
from iiet.iiad.pruning import InfluenceTable
from orchestrator.cluster.work import CPU
from orchestrator.data.store import open_tokens
from orchestrator.models.folder import check_checkpoint, load_config
from orchestrator.models.load import load_model
from orchestrator.pipelines import influence
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.influence import InfluenceResult, plan_influence, run_influence
from orchestrator.planning.price import measuring_hours
from orchestrator.records.influence import StoredRounds
from orchestrator.settings import InfluenceSettings, Settings
from orchestrator.terminal.stop import stop_when
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import Workspace

SETTINGS = InfluenceSettings(num_tokens=512)


@pytest.fixture
def make_checkpoint(tmp_path, save_tiny) -> Callable[..., Path]:
    return partial(save_tiny, tmp_path / "run")


@pytest.fixture
def context(tmp_path, tiny_tokens) -> Context:
    """A workspace with the tokens of the checkpoint."""
    workspace = Workspace(tmp_path)
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    return untracked(workspace)


def measured_or_stored(
    checkpoint: Path, context: Context, settings: InfluenceSettings = SETTINGS
) -> InfluenceTable:
    plan = plan_influence(
        Settings(influence=settings), workspace=context.workspace, model=checkpoint
    )
    return run_influence(plan, context, executor=CPU).table


def test_the_table_is_the_cores_and_lies_beside_the_weights(make_checkpoint, tiny_tokens, context):
    checkpoint = make_checkpoint()
    table = measured_or_stored(checkpoint, context)
    batches = open_tokens(tiny_tokens).validation_batches(
        context_length=16, num_tokens=512, batch_size=8
    )
    assert table == influence_table(load_model(checkpoint), batches)
    assert table.num_tokens == 512
    result = InfluenceResult(checkpoint=checkpoint, table=table)
    assert next(iter(result.shown())) == f"model: {checkpoint}"
    frame = result.to_pandas()
    assert list(zip(frame["layer"], frame["correction"], strict=True)) == [(1, 1), (1, 2), (2, 1)]
    assert frame["influence"].tolist() == [value for row in table.value_rows for value in row]
    stored = json.loads((checkpoint / "influence-cosine.json").read_text())["table"]
    assert InfluenceTable.from_dict(stored) == table
    assert stored["residuals"] == [list(row) for row in table.residual_rows]
    assert stored["contractions"] == [table.contractions[0], None]
    assert (checkpoint / "influence-cosine.png").read_bytes().startswith(b"\x89PNG")
    check_checkpoint(checkpoint)  # It is still whole.


def test_sequences_are_as_long_as_those_that_the_model_was_trained_on(
    make_checkpoint, tiny_tokens, context
):
    """A retrofit has the long context of the published model, and learns from short sequences."""
    checkpoint = make_checkpoint(provenance={"recipe": {"sequence_length": 8}})
    batches = open_tokens(tiny_tokens).validation_batches(
        context_length=8, num_tokens=512, batch_size=8
    )
    short = measured_or_stored(checkpoint, context)
    assert short == influence_table(load_model(checkpoint), batches)
    assert short != measured_or_stored(make_checkpoint(), context)


def test_sequences_of_a_model_that_was_trained_elsewhere_are_no_longer_than_asked_for(
    make_checkpoint, tiny_tokens, context
):
    """The whole context of a published model would take minutes, and more text than there is."""
    settings = InfluenceSettings(num_tokens=32)
    sizes = {"context_length": 64, "method": "vanilla", "schedule": None}

    def table_on(length: int, checkpoint: Path) -> InfluenceTable:
        batches = open_tokens(tiny_tokens).validation_batches(
            context_length=length, num_tokens=32, batch_size=8
        )
        return influence_table(load_model(checkpoint), batches, metric="loss")

    imported = make_checkpoint(**sizes)
    assert measured_or_stored(imported, context, settings) == table_on(32, imported)
    trained_here = make_checkpoint(**sizes, provenance={"recipe": {"num_steps": 4}})
    assert measured_or_stored(trained_here, context, settings) == table_on(64, trained_here)


def test_it_is_found_again_until_something_changes(make_checkpoint, context):
    checkpoint = make_checkpoint()

    def is_measured(settings: InfluenceSettings) -> bool:
        with noted_tokens() as read:
            measured_or_stored(checkpoint, context, settings)
        return bool(read.others)

    assert is_measured(SETTINGS)
    table = measured_or_stored(checkpoint, context)
    assert not is_measured(SETTINGS)
    assert measured_or_stored(checkpoint, context) == table
    assert is_measured(InfluenceSettings(num_tokens=256))
    assert is_measured(InfluenceSettings(metric="loss", num_tokens=64))


@pytest.mark.parametrize("metric", ["cosine", "loss"])
def test_of_a_model_without_corrections_each_whole_layer_is_measured(
    metric, make_checkpoint, tiny_tokens, context
):
    settings = InfluenceSettings(metric=metric, num_tokens=64)
    checkpoint = make_checkpoint(method="vanilla", schedule=None)
    table = measured_or_stored(checkpoint, context, settings)
    assert table.schedule == (0, 0)
    assert all(value > 0 for value in table.layer_values)
    assert measured_or_stored(checkpoint, context, settings) == table
    result = InfluenceResult(checkpoint=checkpoint, table=table)
    assert [table.title for table in [*result.shown()][1:]] == [
        f"Influence ({metric}, {table.num_tokens} tokens)",
        "Schedules by threshold, as --schedule takes them",
    ]
    assert result.schedules[0] == "0,0"
    assert result.schedules[1] in ("x,0", "0,x")
    assert tuple(result.to_pandas()["layer_influence"]) == table.layer_values
    assert "2 whole layers" in influence.summary(table)


ONE_AT_A_TIME = InfluenceSettings(metric="loss", num_tokens=64, one_at_a_time=True)


@pytest.fixture
def plain_runs(make_checkpoint, tmp_path) -> list[Path]:
    """Two checkpoints of one plain model of four layers."""
    checkpoint = make_checkpoint(method="vanilla", schedule=None, num_layers=4)
    copy = shutil.copytree(checkpoint.parent, tmp_path / "copy")
    return [checkpoint, copy / checkpoint.name]


def num_passes(
    checkpoint: Path,
    context: Context,
    settings: InfluenceSettings,
    *,
    stop_after: int | None = None,
) -> int:
    """Measure, and return how many passes were made; a stop is requested after some of them."""
    with (
        noted_tokens() as read,
        stop_when(lambda: len(read.others) == stop_after),
        suppress(Interrupted),
    ):
        measured_or_stored(checkpoint, context, settings)
    return len(read.others)


def test_a_stop_is_heard_and_progress_is_seen_after_each_pass(plain_runs, context):
    """A batch takes a pass without each layer, which of a large model are minutes."""
    settings = InfluenceSettings(metric="loss", num_tokens=64)  # One batch.
    for number in (1, 3):
        assert num_passes(plain_runs[0], context, settings, stop_after=number) == number
    progress = KeptProgress()
    measured_or_stored(plain_runs[0], untracked(context.workspace, progress), settings)
    assert progress.done == [1, 2, 3, 4, 5], "of all layers, and without each of the four"


def test_layers_that_leave_one_at_a_time_go_on_after_a_stop(plain_runs, context):
    stopped, undisturbed = plain_runs
    # The table and the first round take five passes each, so the second round is interrupted.
    assert num_passes(stopped, context, ONE_AT_A_TIME, stop_after=11) == 11
    num_after = num_passes(stopped, context, ONE_AT_A_TIME)
    num_undisturbed = num_passes(undisturbed, context, ONE_AT_A_TIME)
    table = measured_or_stored(stopped, context, ONE_AT_A_TIME)
    assert table == measured_or_stored(undisturbed, context, ONE_AT_A_TIME)
    # What no round has stored, the table of all layers, is measured again.
    num_of_table = num_passes(
        undisturbed, context, ONE_AT_A_TIME.model_copy(update={"one_at_a_time": False})
    )
    assert 10 + num_after == num_undisturbed + num_of_table


@pytest.mark.parametrize("change", [{"metric": "cosine"}, {"num_tokens": 128}])
def test_rounds_of_another_metric_or_of_other_tokens_are_not_taken_over(
    change, plain_runs, context
):
    stopped, undisturbed = plain_runs
    num_passes(stopped, context, ONE_AT_A_TIME, stop_after=11)
    changed = ONE_AT_A_TIME.model_copy(update=change)
    assert num_passes(stopped, context, changed) == num_passes(undisturbed, context, changed)
    table = measured_or_stored(stopped, context, changed)
    assert table == measured_or_stored(undisturbed, context, changed)


def test_rounds_that_cannot_be_stored_are_measured_all_the_same(plain_runs, context, monkeypatch):
    def write(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(StoredRounds, "write", write)
    progress = KeptProgress()
    context = untracked(context.workspace, progress)
    measured_or_stored(plain_runs[0], context, ONE_AT_A_TIME)
    [note] = progress.notes
    assert "read-only" in note


def test_a_model_of_other_tokens_is_refused(make_checkpoint, tiny_tokens, context):
    with refused(UserError, "tokens"):
        measured_or_stored(make_checkpoint(step=2, vocab_size=280), context)


def test_a_plan_says_why_it_reads_fewer_tokens_than_asked_for(
    make_checkpoint, tiny_tokens, context
):
    settings = Settings(influence=InfluenceSettings(num_tokens=10**6))
    progress = KeptProgress()
    options = {"workspace": context.workspace, "model": make_checkpoint(), "progress": progress}
    plan = plan_influence(settings, **options)
    held_out = open_tokens(tiny_tokens).num_validation_tokens
    assert plan.num_tokens == held_out
    [note] = progress.notes
    for part in ("influence.num_tokens=1000000", f"{held_out:,} tokens"):
        assert part in note


def test_a_plan_prices_each_pass_by_the_layers_that_it_runs(plain_runs, context):
    """Four layers, then one less in each round; a stored table takes nothing more."""
    config = load_config(plain_runs[0])
    flops = [
        inference_cost(config, (0,) * kept + ("x",) * (4 - kept)).forward_flops_per_token
        for kept in (4, 3, 2)
    ]
    once = ONE_AT_A_TIME.model_copy(update={"one_at_a_time": False})
    for settings, expected in (
        (once, 5 * flops[0]),
        (ONE_AT_A_TIME, 10 * flops[0] + 4 * flops[1] + 3 * flops[2]),
    ):
        arguments = {"workspace": context.workspace, "model": plain_runs[0]}
        plan = plan_influence(Settings(influence=settings), **arguments)
        assert plan.flops == pytest.approx(64 * expected)
        assert plan.hours(on_gpu=False) == measuring_hours(
            plan.flops, plan.num_evaluations, on_gpu=False
        )
        text = plan.text(on_gpu=False)
        assert text.startswith(f"{plan.num_passes} passes over 64 tokens, {plan.flops:.3g} FLOPs")
    assert plan.num_passes == num_passes(plain_runs[0], context, ONE_AT_A_TIME) == 17
    stored = plan_influence(Settings(influence=ONE_AT_A_TIME), **arguments)
    assert stored.hours(on_gpu=False) == (0.0, 0.0)
    assert stored.text(on_gpu=False) == "stored"


def test_the_last_line_says_where_an_iteration_does_not_contract():
    rows = ((0.2, 0.1), (0.2, 0.1), (0.3,))
    growing = InfluenceTable("cosine", rows, rows, 64, ((0.4, 0.2), (0.4, 0.5), (0.1,)))
    assert influence.summary(growing).endswith("1 of 2")
    assert influence.summary(InfluenceTable("cosine", rows, rows, 64)).endswith("over 64 tokens")


@pytest.mark.parametrize(
    ("metric", "largest", "is_small"),
    [
        ("cosine", 4e-5, True),
        ("cosine", 6e-5, False),
        ("relative", 0.009, True),
        ("relative", 0.011, False),
        ("loss", 0.0, False),
    ],
)
def test_the_last_line_says_that_corrections_have_learned_little(metric, largest, is_small):
    rows = ((1e-7, largest),)
    text = influence.summary(InfluenceTable(metric, rows, rows, 64))
    assert ("learned little" in text) == is_small
