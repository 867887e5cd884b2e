"""Measuring anew changes the family where pruning changes the influence, and nowhere else."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiet.config import preset
from iiet.decoder import Decoder
from iiet.influence import influence_table
from iiet.pruning import schedule_family
from iiet.remeasuring import remeasured_family
from iiet.schedule import IterationSchedule

TABLES = st.lists(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 1)), max_size=4), min_size=1, max_size=5
)


def unchanged(table):
    """An influence that pruning leaves as it is: rows cut off, nothing else."""
    return lambda schedule: [row[:kept] for row, kept in zip(table, schedule, strict=True)]


def full(table):
    return IterationSchedule(tuple(map(len, table)))


@given(TABLES)
def test_without_a_change_it_is_the_family_measured_once(table):
    assert remeasured_family(unchanged(table), full(table)) == schedule_family(table)


@given(TABLES, st.integers(1, 6), st.integers(0, 99))
def test_is_nested_from_full_to_none_and_thresholds_stop_where_they_say(table, num_dropped, seed):
    def measure(schedule):
        """Some other influence under each schedule."""
        draw = torch.Generator().manual_seed(seed + hash(schedule.corrections) % 997)
        return [torch.rand(kept, generator=draw).tolist() for kept in schedule]

    family = remeasured_family(measure, full(table), num_dropped=num_dropped)
    assert family[0].schedule == full(table)
    assert family[-1].schedule.num_corrections == 0
    for one, next_one in itertools.pairwise(family):
        assert next_one.schedule.is_within(one.schedule)
        fewer = one.schedule.num_corrections - next_one.schedule.num_corrections
        assert fewer >= min(num_dropped, one.schedule.num_corrections)
        assert one.threshold_up_to == next_one.threshold_above
        assert one.threshold_above <= one.threshold_up_to
    for threshold in (0.1, 0.5, 0.9):
        stopped = next(m for m in family if m.threshold_above < threshold <= m.threshold_up_to)
        assert stopped.schedule == pruned_until_none_lies_under(measure, family, threshold)


def pruned_until_none_lies_under(measure, family, threshold):
    """Walk down the family as a threshold says, with nothing of the interval's arithmetic."""
    for member in family:
        rows = measure(member.schedule)
        if all(max(row[i:]) >= threshold for row in rows for i in range(len(row))):
            return member.schedule
    raise AssertionError("the last member has nothing left to prune")


def test_a_correction_that_matters_more_once_another_is_gone_is_kept():
    def measure(schedule):
        rises = {(1, 1): [[0.1], [0.2]], (0, 1): [[], [0.9]]}
        return rises[schedule.corrections]

    family = remeasured_family(measure, IterationSchedule((1, 1)))
    assert [(m.threshold_above, m.threshold_up_to) for m in family] == [
        (-math.inf, 0.1), (0.1, 0.9), (0.9, math.inf),
    ]  # fmt: skip


def test_of_a_decoder_each_step_drops_what_matters_least_there():
    torch.manual_seed(0)
    config = preset(
        "tiny", dim=16, num_layers=3, num_heads=2, ffn_dim=24, vocab_size=32, context_length=16,
        schedule=IterationSchedule((2, 1, 2)), initializer_std=0.3,
    )  # fmt: skip
    decoder = Decoder(config).eval()
    batch = torch.randint(32, (4, 16))

    def measure(schedule):
        return influence_table(decoder.with_schedule(schedule), [batch])

    family = remeasured_family(measure, decoder.schedule)
    assert [m.schedule.num_corrections for m in family] == [5, 4, 3, 2, 1, 0]
    for one, next_one in itertools.pairwise(family):
        ends = {
            layer: row[-1] for layer, row in enumerate(measure(one.schedule).suffix_maxima()) if row
        }
        (layer,) = [n for n in ends if one.schedule[n] != next_one.schedule[n]]
        assert ends[layer] == min(ends.values())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="num_dropped must be at least 1, got 0"):
        remeasured_family(unchanged([[0.1]]), IterationSchedule((1,)), num_dropped=0)
    with pytest.raises(ValueError, match=r"under \(1,1\), got one of \(1,0\)"):
        remeasured_family(lambda _: [[0.1], []], IterationSchedule((1, 1)))
