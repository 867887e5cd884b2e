"""Influence equals its formula, does not depend on the split into batches, and has correct errors.

The evaluations are stored outputs of the published code; the formula is written in numpy.
"""

import itertools
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from live_tensors import LiveTensors
from model_cases import make_model, tokens
from refusals import refused
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from iiet import INFLUENCE_METRICS
from iiet.decoder import Decoder, decoder_from_published
from iiet.extensions import ExtensionError
from iiet.iiad.influence import (
    BatchInfluence,
    Comparison,
    InfluenceMetric,
    influence_table,
    leave_out_one_at_a_time,
)
from iiet.iiad.left_out import decoder_of_kept_layers
from iiet.iiad.pruning import (
    InfluenceTable,
    LeavingRound,
    num_passes,
    num_passes_one_at_a_time,
    schedule_family,
    table_of_rounds,
)
from iiet.model.batch import NO_TARGET, Batch
from iiet.model.config import preset
from iiet.model.fast import plain_formulas
from iiet.model.losses import next_token_loss
from iiet.model.schedule import IterationSchedule

FIXTURES = Path(__file__).parent.parent / "fixtures"


def reference(name):
    """Return a stored case's config, tensors and decoder."""
    config = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    weights = {
        key.removeprefix("weight."): value
        for key, value in tensors.items()
        if key.startswith("weight.")
    }
    return config, tensors, decoder_from_published(config, weights)


def decoder_of():
    return make_model(schedule=(2, 0, 1))


def by_hand(config, tensors, metric):
    """Return influences by their definitions, from the stored outputs of the published code."""
    rows = []
    for layer, count in enumerate(config["corrections"]):
        y = [
            tensors[f"eval.layer{layer}.{k}.out"].double().numpy().reshape(-1, 32)
            for k in range(count + 1)
        ]
        row = []
        for before, after in itertools.pairwise(y):
            lengths = np.sqrt((before**2).sum(1)), np.sqrt((after**2).sum(1))
            if metric == "cosine":
                row.append(np.mean(1 - (before * after).sum(1) / (lengths[0] * lengths[1])))
            else:
                row.append(np.mean(np.sqrt(((after - before) ** 2).sum(1)) / lengths[1]))
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["iiet_r3", "iiet_schedule_201"])
@pytest.mark.parametrize("metric", ["cosine", "relative"])
def test_equals_the_definition_on_the_published_evaluations(name, metric):
    config, tensors, decoder = reference(name)
    table = influence_table(decoder, [tensors["input_ids"]], metric=metric)
    expected = by_hand(config, tensors, metric)
    assert table.schedule.corrections == tuple(config["corrections"])
    assert table.num_tokens == tensors["input_ids"].numel()
    for row, expected_row in zip(table.value_rows, expected, strict=True):
        assert row == pytest.approx(expected_row, rel=2e-5)
    assert min(value for row in table.value_rows for value in row) > 0


def test_loss_influence_is_the_rise_of_the_published_loss():
    _, tensors, decoder = reference("iiet_schedule_201")
    table = influence_table(decoder, [tensors["input_ids"]], metric="loss")
    full = tensors["loss"].item()

    def stopped(*corrections):
        logits = decoder(tensors["input_ids"], schedule=IterationSchedule(corrections))
        return next_token_loss(logits, tensors["input_ids"]).item()

    expected = (
        (stopped(0, 0, 1) - full, stopped(1, 0, 1) - full),
        (),
        (stopped(2, 0, 0) - full,),
    )
    for row, expected_row in zip(table.value_rows, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=3e-6)
    assert max(abs(value) for row in table.value_rows for value in row) > 1e-4
    assert table.num_tokens == tensors["input_ids"][:, 1:].numel()


def whole_layers_by_hand(decoder, ids, metric, left_out=()):
    """Return the influence of each layer that is left, by its definition."""
    schedule = decoder.schedule.leaving_out(left_out)
    smaller = decoder_of_kept_layers(decoder, schedule)
    if metric == "loss":
        full = next_token_loss(smaller(ids), ids).item()
        without = [
            decoder_of_kept_layers(decoder, schedule.leaving_out([layer]))
            for layer in schedule.kept_layers
        ]
        return [next_token_loss(model(ids), ids).item() - full for model in without]
    _, hidden = smaller(ids, return_hidden=True)
    pairs = itertools.pairwise([smaller.model.embed_tokens(ids), *hidden])
    if metric == "cosine":
        return [(1 - torch.cosine_similarity(a, b, dim=-1)).mean().item() for a, b in pairs]
    return [((b - a).norm(dim=-1) / b.norm(dim=-1)).mean().item() for a, b in pairs]


@torch.no_grad()
@pytest.mark.parametrize("method", ["vanilla", "iiet", "pcformer"])
@pytest.mark.parametrize("metric", ["cosine", "relative", "loss"])
def test_whole_layers_are_measured_by_the_metric_of_the_table(metric, method):
    decoder = make_model(method, (2, 0, 1))
    ids = tokens(4, 8)
    expected = whole_layers_by_hand(decoder, ids, metric)
    table = influence_table(decoder, ids.split(1), metric=metric, whole_layers=True)
    assert table.layer_values == pytest.approx(expected, rel=1e-9)
    of_batches = [whole_layers_by_hand(decoder, row, metric) for row in ids.split(1)]
    errors = np.std(of_batches, axis=0, ddof=1) / np.sqrt(4)
    assert table.layer_errors == pytest.approx(errors, rel=1e-9)
    assert InfluenceTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    corrections = influence_table(decoder, ids.split(1), metric=metric, whole_layers=False)
    assert corrections == replace(table, layer_values=(), layer_errors=())
    # Where it costs further passes, they are taken if there is nothing else to measure.
    usual = influence_table(decoder, ids.split(1), metric=metric)
    assert usual == (corrections if metric == "loss" and method != "vanilla" else table)


@torch.no_grad()
def test_the_only_layer_of_a_model_can_be_measured_by_the_loss():
    decoder = make_model("vanilla", (0,))
    ids = tokens(2, 8)
    without = next_token_loss(decoder.logits(decoder.model.embed_tokens(ids)), ids)
    rise = (without - next_token_loss(decoder(ids), ids)).item()
    assert influence_table(decoder, ids, metric="loss").layer_values == pytest.approx([rise])


@torch.no_grad()
@pytest.mark.parametrize("method", ["vanilla", "iiet"])
@pytest.mark.parametrize("metric", ["relative", "loss"])
def test_layers_leave_one_at_a_time_and_the_order_resumes(metric, method):
    decoder = make_model(method, (1, 0, 2, 0, 1))
    ids = tokens(4, 8)
    batches = ids.split(2)
    done = []
    options = {"metric": metric, "num_leaving": 4}
    rounds = [*leave_out_one_at_a_time(decoder, batches, **options, progress=done.append)]
    passes = [2 * num_passes_one_at_a_time(metric, 5, number) for number in range(5)]
    assert done == list(range(1, passes[4] + 1))
    gone = []
    for leaving in rounds:
        expected = whole_layers_by_hand(decoder, ids, metric, gone)
        remaining = [layer for layer in range(5) if layer not in gone]
        assert [leaving.values[layer] for layer in remaining] == pytest.approx(expected, rel=1e-9)
        assert all(math.isnan(leaving.values[layer]) for layer in gone)
        assert leaving.layer == remaining[int(np.argmin(expected))]
        gone.append(leaving.layer)
    stored = [LeavingRound.from_dict(json.loads(json.dumps(r.to_dict()))) for r in rounds[:2]]
    resumed = leave_out_one_at_a_time(
        decoder, batches, **options, rounds=stored, progress=done.append
    )
    assert repr([*stored, *resumed]) == repr(rounds)
    assert done[passes[4] :] == list(range(passes[2] + 1, passes[4] + 1))
    if method == "vanilla":
        table = influence_table(decoder, batches, metric=metric, whole_layers=True)
        family = schedule_family(table_of_rounds(table, rounds), max_left_out=4)
        left_out = [set(member.schedule.left_out_layers) for member in family]
        assert left_out == [set(gone[:number]) for number in range(5)]
    for wrong in (5, -1):
        with refused(ValueError, "num_leaving", wrong):
            next(leave_out_one_at_a_time(decoder, batches, num_leaving=wrong))


@contextmanager
def noted_passes():
    """Give a list that has an item for each forward pass of a decoder."""
    passes = []

    def note(module, _):  # Each pass embeds its tokens once.
        if isinstance(module, torch.nn.Embedding):
            passes.append(module)

    hook = register_module_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


@pytest.mark.parametrize("metric", ["cosine", "loss"])
def test_each_pass_is_counted_and_reported(metric):
    decoder = make_model("iiet", (1, 0, 2))
    for whole_layers in (False, True):
        with noted_passes() as passes:
            reported = []
            influence_table(
                decoder,
                tokens(4, 8).split(2),
                metric=metric,
                whole_layers=whole_layers,
                progress=lambda done, passes=passes, reported=reported: reported.append(
                    (done, len(passes))
                ),
            )
        number = 2 * num_passes(metric, decoder.schedule, whole_layers=whole_layers)
        assert reported == [(done, done) for done in range(1, number + 1)]
    plain = make_model("vanilla", (0,) * 4)
    with noted_passes() as passes:
        rounds = leave_out_one_at_a_time(plain, [tokens(2, 8)], metric=metric, num_leaving=3)
        assert len([*rounds]) == 3
    assert len(passes) == num_passes_one_at_a_time(metric, num_layers=4, num_leaving=3)


@torch.no_grad()
def test_accuracy_lost_is_that_of_stopping_early_and_text_has_none():
    decoder = decoder_of()
    ids = tokens(6, 8)
    targets = torch.where(torch.arange(8) % 3 > 0, ids.roll(1, dims=1), NO_TARGET)
    batches = Batch(ids, targets).split(2)
    table = influence_table(decoder, batches, metric="loss", whole_layers=True)

    def accuracy(*corrections):
        model = decoder_of_kept_layers(decoder, IterationSchedule(corrections))
        counted = targets != NO_TARGET
        return (model(ids).argmax(-1) == targets)[counted].double().mean().item()

    full = accuracy(2, 0, 1)
    without = (accuracy(-1, 0, 1), accuracy(2, -1, 1), accuracy(2, 0, -1))
    assert table.layer_accuracy_lost == pytest.approx([full - a for a in without], abs=1e-12)
    expected = (
        (full - accuracy(0, 0, 1), full - accuracy(1, 0, 1)),
        (),
        (full - accuracy(2, 0, 0),),
    )
    for row, expected_row in zip(table.accuracy_lost_rows, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=1e-12)
    assert any(expected[0])
    assert InfluenceTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    of_text = influence_table(decoder, [ids], metric="loss", whole_layers=True)
    assert (of_text.accuracy_lost_rows, of_text.layer_accuracy_lost) == ((), ())


@pytest.mark.parametrize("metric", ["cosine", "relative", "loss"])
def test_batches_of_different_sizes_weigh_by_their_tokens(metric):
    decoder = decoder_of()
    ids = tokens(8, 8)
    whole = influence_table(decoder, [ids], metric=metric)
    batches = [ids[:1], ids[1:6], ids[6:]]
    done = []
    parts = influence_table(decoder, batches, metric=metric, progress=done.append)
    assert parts == influence_table(decoder, batches[::-1], metric=metric), "bitwise, in any order"
    assert done == list(range(1, 3 * num_passes(metric, decoder.schedule, whole_layers=False) + 1))
    assert parts.num_tokens == whole.num_tokens
    for row, expected in zip(parts.value_rows, whole.value_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_batches_come_as_tensors_or_batches():
    decoder = decoder_of()
    batch = tokens(2, 8)
    expected = influence_table(decoder, [batch])
    for single_batch in (batch, Batch.of_text(batch)):
        for batches in (single_batch, [single_batch]):
            assert influence_table(decoder, batches).to_dict() == expected.to_dict()
    with pytest.raises(ValueError, match=r"\(batch, time\).*\(8,\)"):
        influence_table(decoder, [batch[0]])


@pytest.mark.parametrize("metric", ["cosine", "relative", "loss"])
def test_only_positions_that_count_are_measured(metric):
    decoder = decoder_of()
    ids = tokens(3, 8)
    whole = influence_table(decoder, [Batch.of_text(ids)], metric=metric)
    assert whole == influence_table(decoder, [ids], metric=metric)
    # Causal: the first six tokens are measured alike whatever follows them.
    mask = (torch.arange(8) < 6).expand(3, 8)
    batches = [
        Batch(ids, Batch.of_text(ids).targets, mask=mask & (torch.arange(8) < 5)),
        Batch(ids[:, :6], Batch.of_text(ids[:, :6]).targets),
    ]
    some, short = (influence_table(decoder, [batch], metric=metric) for batch in batches)
    assert some.num_tokens == short.num_tokens == 15
    for row, expected in zip(some.value_rows, short.value_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)
    uneven = Batch.of_text(ids, torch.arange(8) < torch.tensor([[6], [3], [8]]))
    split = influence_table(decoder, uneven.split(2), metric=metric)
    joined = influence_table(decoder, [uneven], metric=metric)
    for row, expected in zip(split.value_rows, joined.value_rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)
    with refused(ValueError, "'looped'"):
        influence_table(Decoder(preset("tiny", method="looped")), tokens(2, 8))
    with pytest.raises(ValueError, match="nothing to measure"):
        influence_table(decoder, [Batch(ids, ids, mask=mask & False)], metric=metric)


def test_errors_are_the_standard_errors_over_batches():
    decoder = decoder_of()
    batches = tokens(10, 8).split(2)
    table = influence_table(decoder, batches)
    rows_of_batches = [influence_table(decoder, [batch]).value_rows for batch in batches]
    for layer, row in enumerate(table.error_rows):
        for i, error in enumerate(row):
            means = np.array([values[layer][i] for values in rows_of_batches])
            assert error == pytest.approx(means.std(ddof=1) / np.sqrt(5), rel=1e-9)
    assert all(
        math.isnan(error)
        for row in influence_table(decoder, batches[:1]).error_rows
        for error in row
    )


@pytest.mark.parametrize("metric", ["cosine", "loss"])
def test_only_the_last_output_is_kept_in_memory(metric):
    """3 layers need no more memory beside an ordinary pass than 2."""
    size = 4 * 4 * 64 * 32
    input_ids = torch.randint(64, (4, 64))

    def extra_bytes(num_layers):
        shape = {"vocab_size": 64, "dim": 32, "ffn_dim": 64, "context_length": 64}
        config = preset("tiny", num_layers=num_layers, schedule=2, **shape)
        decoder = Decoder(config).requires_grad_(False)
        peaks = []
        for run in (
            lambda: decoder(input_ids, last_only=True),
            lambda: influence_table(decoder, [input_ids], metric=metric),
        ):
            with torch.no_grad(), LiveTensors(decoder) as live:
                run()
            peaks.append(live.peak)
        return peaks[1] - peaks[0]

    shallow = extra_bytes(2)
    deep = extra_bytes(3)
    assert deep - shallow < 0.05 * size
    assert deep < 1.5 * size


def test_residuals_are_those_of_the_estimates():
    """|g(e) - e| / |g(e)|, written out over the outputs and the layer's two norms."""
    decoder = decoder_of()
    ids = tokens(2, 8)
    outputs = decoder.evaluations(ids)
    table = influence_table(decoder, ids)
    assert table.residual_rows == influence_table(decoder, ids, metric="relative").residual_rows
    layers = decoder.model.layers
    for number, (layer, row) in enumerate(zip(layers, table.residual_rows, strict=True)):
        estimate = layer.prediction_norm(outputs[number, 0])
        expected = []
        for k in range(1, len(row) + 1):
            after = layer.correction_norm(outputs[number, k])
            sizes = (after - estimate).norm(dim=-1) / after.norm(dim=-1)
            expected.append(sizes.mean().item())
            estimate = after
        assert row == pytest.approx(expected, rel=1e-12)
    first, second = table.residual_rows[0]
    assert table.contractions[0] == pytest.approx(second / first)
    assert math.isnan(table.contractions[1])
    assert math.isnan(table.contractions[2])


@pytest.mark.parametrize(("method", "num_residuals"), [("vanilla", 0), ("pcformer_rk4", 1)])
def test_methods_without_a_schedule_have_no_influence_and_perhaps_residuals(method, num_residuals):
    table = influence_table(make_model(method), tokens(2, 8))
    assert table.value_rows == ((), (), ())
    assert len(table.layer_values) == 3
    assert [len(row) for row in table.residual_rows] == [num_residuals] * 3
    assert all(map(math.isnan, table.contractions))
    assert len(schedule_family(table)) == 1
    assert InfluenceTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@torch.no_grad()
@pytest.mark.parametrize("metric", ["cosine", "relative"])
def test_levels_are_compared_by_the_estimates_that_the_layer_would_leave(metric):
    """What layer l leaves at a level is read from a pass in which only its level differs."""
    decoder = make_model("pcformer", (2, 1, 0, 2))
    ids = tokens(3, 9)
    full = decoder.schedule
    last_estimates = {}
    for layer, level in enumerate(full):
        for lower in range(level + 1):
            hook = decoder.model.layers[layer].register_forward_hook(
                lambda *args, place=(layer, lower): last_estimates.update({place: args[-1].state})
            )
            with plain_formulas():
                decoder(ids, schedule=full.with_layer(layer, lower))
            hook.remove()
    last_estimates = {place: history.estimates[-1] for place, history in last_estimates.items()}

    def distance(before, after):
        if metric == "cosine":
            return 1 - torch.cosine_similarity(before, after, dim=-1)
        return (after - before).norm(dim=-1) / after.norm(dim=-1)

    table = influence_table(decoder, ids, metric=metric)
    assert table.schedule == full
    for layer, row in enumerate(table.value_rows):
        expected = [
            distance(last_estimates[layer, level - 1], last_estimates[layer, level]).mean().item()
            for level in range(1, full[layer] + 1)
        ]
        assert row == pytest.approx(expected, rel=1e-9)
    assert [len(row) for row in table.residual_rows] == [1, 1, 0, 1]
    assert schedule_family(table)[-1].schedule == IterationSchedule.none(4)


class SquaredChange(Comparison):
    """|y(i) - y(i-1)|^2"""

    def compare(self, before, after):
        return (after - before).square().sum(-1)


class Constant(InfluenceMetric):
    """Gives each correction an influence of one, without a pass."""

    rows = ((1.0, 1.0), (), (1.0,))

    def measure(self, measured):
        return BatchInfluence(self.rows)


@torch.no_grad()
def test_a_metric_of_another_package_gets_consecutive_outputs_and_its_table_is_read_without_it(
    monkeypatch,
):
    decoder = decoder_of()
    ids = tokens(3, 9)
    classes = {
        **INFLUENCE_METRICS.own_classes,
        "squared": SquaredChange,
        "constant": Constant,
    }
    monkeypatch.setattr(INFLUENCE_METRICS, "own_classes", classes)
    evaluations = []
    decoder(ids, observe=evaluations.append)
    outputs = {(e.layer, e.k): e.output for e in evaluations}
    table = influence_table(decoder, ids, metric="squared")
    for layer, row in enumerate(table.value_rows):
        for i, value in enumerate(row, start=1):
            change = outputs[layer, i] - outputs[layer, i - 1]
            assert value == pytest.approx(change.square().sum(-1).mean().item(), rel=1e-12)
    assert table.metric == "squared"
    assert table.worths() == table.value_rows
    assert table.evaluation_worths() == table.evaluation_rows
    states = [decoder.model.embed_tokens(ids), *decoder(ids, return_hidden=True)[1]]
    changes = [(b - a).square().sum(-1).mean().item() for a, b in itertools.pairwise(states)]
    assert [row[0] for row in table.evaluation_rows] == pytest.approx(changes, rel=1e-12)
    with refused(ValueError, "Constant", "whole layers"):
        influence_table(decoder, ids, metric="constant", whole_layers=True)
    stored = influence_table(decoder, ids, metric="constant").to_dict()
    del INFLUENCE_METRICS.own_classes["constant"]
    table = InfluenceTable.from_dict(stored)
    assert table.value_rows == Constant.rows
    with refused(ExtensionError, "'constant'", "cosine"):
        table.worths()
    with refused(ValueError, "metric"):
        influence_table(decoder, ids, metric="constant")
