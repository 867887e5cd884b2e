"""A GGUF file becomes the Llama that it was written from, or an error that names what is wrong."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import tiny_llama, write_llama
from transformers import AutoModelForCausalLM

from iiet.published import published_from_decoder
from orchestrator import cli
from orchestrator.models.gguf import GgufFile
from orchestrator.workspace.errors import UserError

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("good") / "tiny.gguf", tiny_llama())


@pytest.mark.parametrize("tied", [True, False])
def test_unquantized_weights_are_those_of_the_llama(tied: bool, tmp_path: Path) -> None:
    llama = tiny_llama(tied=tied)
    decoder = GgufFile(write_llama(tmp_path / "tiny.gguf", llama)).decoder()
    config = decoder.config
    assert (config.method, config.tie_embeddings, config.num_kv_heads) == ("vanilla", tied, 2)
    assert (config.rope_theta, config.rms_norm_eps, config.context_length) == (777.0, 1e-5, 64)
    weights = published_from_decoder(decoder)
    assert all(torch.equal(weights[name], llama.state_dict()[name]) for name in weights)
    with torch.no_grad():
        torch.testing.assert_close(decoder(TOKENS), llama(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_weights_are_those_that_transformers_reads(kind: str, tmp_path: Path) -> None:
    llama = tiny_llama()
    path = write_llama(tmp_path / "tiny.gguf", llama, kind=kind)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).eval()
    decoder = GgufFile(path).decoder()
    weights = published_from_decoder(decoder)
    assert all(torch.equal(weights[name], stock.state_dict()[name]) for name in weights)
    name = "model.layers.1.mlp.up_proj.weight"
    error = (weights[name] - llama.state_dict()[name]).abs().max()
    assert 0 < error < 0.1, "close to the weights before they were quantized"
    with torch.no_grad():
        torch.testing.assert_close(decoder(TOKENS), stock(TOKENS).logits, rtol=0, atol=1e-4)


READ = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
REFUSED = ("Q8_1", "Q8_K", "Q1_0", "F64", "I8", "I16", "I32", "I64")
SQUARE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
"""Rows of 256 numbers hold whole blocks of every type."""


def test_every_type_of_the_package_is_read_or_refused() -> None:
    assert {*READ, *REFUSED} == {kind.name for kind in gguf.GGMLQuantizationType}


@pytest.mark.parametrize("kind", READ)
def test_a_type_is_unpacked_as_the_package_unpacks_it(kind: str, tmp_path: Path) -> None:
    llama = tiny_llama(**SQUARE)
    path = write_llama(tmp_path / "tiny.gguf", llama, kind=kind)
    weights = published_from_decoder(GgufFile(path).decoder())
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    for theirs, ours in names.items():
        data, stored_as = stored[theirs].data, stored[theirs].tensor_type
        assert stored_as.name == kind
        expected = torch.from_numpy(np.array(gguf.dequantize(data, stored_as)))
        assert expected.isfinite().all()
        assert expected.std() > 0
        assert torch.equal(weights[ours], expected)


@pytest.mark.parametrize("kind", REFUSED)
def test_another_type_is_refused_in_a_sentence(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", tiny_llama(**SQUARE), kind=kind)
    assert cli.main(["import", str(path), "--workspace", str(tmp_path / "workspace")]) == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert f"the package gguf cannot unpack the type {kind} of " in printed
    assert "use a file of another type, such as Q8_0" in printed
    assert "Traceback" not in printed


def test_a_type_that_is_newer_than_the_package_is_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    name = b"output_norm.weight"
    start = content.index(name) + len(name)  # Number of dimensions, dimensions, type.
    (num_dimensions,) = struct.unpack_from("<I", content, start)
    place = start + 4 + 8 * num_dimensions
    assert struct.unpack_from("<I", content, place) == (gguf.GGMLQuantizationType.F32,)
    newer = tmp_path / "newer.gguf"
    newer.write_bytes(content[:place] + struct.pack("<I", 999) + content[place + 4 :])
    with pytest.raises(UserError, match=r"newer than the installed package gguf \(.*999"):
        GgufFile(newer)


def test_left_out_settings_have_the_formats_defaults(tmp_path: Path) -> None:
    llama = tiny_llama(num_key_value_heads=4, rope_parameters={"rope_theta": 10000.0})
    keys = ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size")
    path = write_llama(tmp_path / "tiny.gguf", llama, metadata=dict.fromkeys(keys))
    with torch.no_grad():
        found = GgufFile(path).decoder()(TOKENS)
        torch.testing.assert_close(found, llama(TOKENS).logits, rtol=0, atol=1e-5)


ROPE = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
"""How llama.cpp stores the scaled rotary angles of Llama 3.1."""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"metadata": {"general.architecture": "bert"}},
            "of the architecture 'bert'; only 'llama'",
        ),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"llama\.rope\.scaling\.type='yarn'"),
        ({"metadata": {"llama.expert_count": 8}}, r"does not do: llama\.expert_count=8$"),
        ({"metadata": {"llama.attention.key_length": 32}}, "key_length=32 with heads of 16"),
        ({"metadata": {"llama.attention.head_count": [4, 2]}}, r"head_count=\[4, 2\]"),
        ({"metadata": {"llama.block_count": None}}, r"does not say llama\.block_count$"),
        ({"tensors": ROPE}, r"the tensor rope_freqs\.weight"),
        ({"left_out": ["blk.1.attn_k.weight"]}, r"missing model\.layers\.1\.self_attn\.k_proj"),
        ({"left_out": ["token_embd.weight"]}, "has no embeddings"),
        ({"metadata": {"llama.feed_forward_length": 128}}, r"expected \(128, 64\)"),
        ({"metadata": {"llama.attention.head_count_kv": 7}}, "cannot use .*tiny.gguf: "),
        ({"tensors": {"output.weight": np.ones((320, 64), np.int8)}}, "the type I8 of output"),
    ],
)
def test_what_the_decoder_does_not_do_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", tiny_llama(), **changes)
    with pytest.raises(UserError, match=words):
        GgufFile(path).decoder()


def test_settings_that_switch_something_off_are_accepted(tmp_path: Path) -> None:
    off = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.vocab_size": 320}
    GgufFile(write_llama(tmp_path / "tiny.gguf", tiny_llama(), metadata=off)).decoder()


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.003, 0.01, 0.5, 0.9999])
def test_a_cut_file_is_refused(share: float, good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: max(8, int(share * len(content)))])
    with pytest.raises(UserError, match=r"cannot read .*cut\.gguf, which is damaged, not complete"):
        GgufFile(cut)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"GG", b"PK\x03\x04 a zip archive"):
        path = tmp_path / "other.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is no GGUF file, as it begins with b'"):
            GgufFile(path)


def test_without_the_package_the_error_says_what_to_install(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'iiet-orch\[gguf\]'"):
        GgufFile(good)
