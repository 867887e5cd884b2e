"""A metric of another package: what it returns is the table, and what it declares is heeded."""

import pytest
import torch

from iiet import INFLUENCE_METRICS, Decoder, influence_table, preset
from iiet.extensions import ExtensionError
from iiet.influence_metrics import BatchInfluence, Comparison, InfluenceMetric
from iiet.pruning import InfluenceTable


class SquaredChange(Comparison):
    """|y(i) - y(i-1)|^2"""

    def compare(self, before, after):
        return (after - before).square().sum(-1)


class Constant(InfluenceMetric):
    """One in each layer, without a pass."""

    rows = ((1.0, 1.0), (), (1.0,))

    def measure(self, measured):
        return BatchInfluence(self.rows)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    added = {
        "squared": SquaredChange,
        "constant": Constant,
    }
    monkeypatch.setattr(INFLUENCE_METRICS, "own", {**INFLUENCE_METRICS.own, **added})


def decoder():
    torch.manual_seed(0)
    config = preset(
        "tiny", dim=16, num_layers=3, num_heads=2, ffn_dim=24, vocab_size=20, context_length=16,
        schedule=[2, 0, 1], initializer_std=0.3,
    )  # fmt: skip
    return Decoder(config).eval()


TOKENS = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_comparison_gets_consecutive_outputs_of_each_layer():
    model, outputs = decoder(), {}
    model(TOKENS, observe=lambda seen: outputs.__setitem__((seen.layer, seen.k), seen.output))
    table = influence_table(model, [TOKENS], metric="squared")
    for layer, row in enumerate(table.value_rows):
        for i, value in enumerate(row, start=1):
            change = outputs[layer, i].double() - outputs[layer, i - 1].double()
            assert value == pytest.approx(change.square().sum(-1).mean().item(), rel=1e-12)
    assert table.metric == "squared"
    assert table.worths() == table.value_rows


def test_a_table_can_be_read_without_its_metric():
    stored = influence_table(decoder(), [TOKENS], metric="constant").to_dict()
    del INFLUENCE_METRICS.own["constant"]
    table = InfluenceTable.from_dict(stored)
    assert table.value_rows == Constant.rows
    with pytest.raises(ExtensionError, match="there is no influence metric 'constant'; known: cos"):
        table.worths()
    with pytest.raises(ValueError, match="metric must be one of"):
        influence_table(decoder(), [TOKENS], metric="constant")
