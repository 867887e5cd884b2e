"""The examples run and compute the stated values."""

from __future__ import annotations

import pytest
import torch
from model_cases import make_model

from examples import spectral_radius as example
from examples import train_distill_export
from iiet import Decoder, influence_table


def small_decoder(**options: object) -> Decoder:
    """Return a model whose whole Jacobian is quickly built; its second layer has no corrections."""
    sizes = {"dim": 8, "ffn_dim": 16, "num_heads": 2, "context_length": 16, "initializer_std": 0.2}
    decoder = make_model(schedule=(3, 0, 2), method_options=options or None, **sizes)
    return decoder.requires_grad_(False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"damping": 0.4},
        {"damping": 0.6, "learn_damping": "scalar"},
        {"reinject_prediction": True},
    ],
    ids=str,
)
def test_the_spectral_radius_is_that_of_the_whole_jacobian(options):
    decoder = small_decoder(**options)
    input_ids = torch.randint(31, (1, 6))
    maps = example.correction_maps(decoder, input_ids)
    assert list(maps) == [0, 2]
    for step, point in maps.values():
        size = point.numel()
        jacobian = torch.func.jacrev(step)(point).reshape(size, size)
        expected = torch.linalg.eigvals(jacobian).abs().max().item()
        radius = example.spectral_radius(step, point, num_products=size)
        assert radius == pytest.approx(expected, rel=1e-6)
        # A small part of the products comes close.
        rough_radius = example.spectral_radius(step, point, num_products=size // 2)
        assert rough_radius == pytest.approx(expected, rel=0.05)


def test_the_table_of_a_folder(tmp_path, tiny_tokens, capsys):
    decoder = small_decoder().float()
    decoder.save_pretrained(tmp_path)
    example.main([str(tmp_path), "--tokens", "8"])
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title == "iteration schedule 3,0,2, 8 tokens"
    assert head.split() == ["layer", "spectral", "radius", "contraction", "factor"]
    torch.manual_seed(0)
    table = influence_table(decoder, torch.randint(31, (1, 8)))
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert rows[0].split()[2] == f"{table.contractions[0]:.3f}"
    assert rows[1].split()[1:] == ["no", "corrections"]


@pytest.mark.slow
def test_the_core_trains_distills_and_exports_as_the_example_shows(tmp_path, capsys):
    losses = train_distill_export.main(str(tmp_path), num_steps=60)
    assert losses["trained"] < 3.0, "the text's letters have an entropy of about 4 bits"
    assert losses["cross_entropy"] < losses["pruned"]
    printed = capsys.readouterr().out
    assert "influence (cosine, 256 tokens)" in printed
    assert "distilled under" in printed
    assert Decoder.from_pretrained(tmp_path).schedule.num_evaluations <= 6
    assert (tmp_path / "modeling_iiet.py").is_file()
