"""Quantized weights: close to float32, the same with a cache as without, never trained or saved."""

import pytest
import torch
from torch import nn

from iiet import Decoder, generate, preset, quantize_weights
from iiet.quantized_linear import QuantizedLinear, check_weight_format

FORMATS = ["bf16", "int8"]
TOLERANCE = 0.04  # Of the logits' standard deviation, root mean square; bf16 rounds by 2^-9.


def has_instructions():
    try:
        check_weight_format("int8")
    except ValueError:
        return False
    return True


needs_instructions = pytest.mark.skipif(
    not has_instructions(), reason="this CPU has no AVX512-BF16, or PyTorch no oneDNN"
)


def small_decoder(method="iiet", **sizes):
    torch.manual_seed(0)
    sizes = {"dim": 64, "num_layers": 2, "num_heads": 4, "ffn_dim": 96, "vocab_size": 50, **sizes}
    return Decoder(preset("tiny", method=method, initializer_std=0.1, **sizes)).eval()


def prompt(rows=2):
    return torch.randint(50, (rows, 9), generator=torch.Generator().manual_seed(1))


def error(ours, exact):
    return float((ours - exact).square().mean().sqrt() / exact.std())


@needs_instructions
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
def test_a_product_is_that_of_the_rounded_weight(weight_format, rows):
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    weight[7] = 0.0
    x = torch.randn(2, rows, 64)
    product = QuantizedLinear(weight, weight_format)(x)
    assert product.dtype == torch.float32
    assert error(product, x @ weight.T) < 0.01
    assert not product[..., 7].any()


@needs_instructions
@torch.no_grad()
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("method", ["vanilla", "iiet", "pcformer"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_are_close_to_float32_and_the_given_decoder_stays(weight_format, method, is_tied):
    decoder = small_decoder(method, tie_embeddings=is_tied)
    exact = decoder(prompt())
    quantized = quantize_weights(decoder, weight_format)
    assert 0.0 < error(quantized(prompt()), exact) < TOLERANCE
    assert torch.equal(decoder(prompt()), exact)
    assert not any(isinstance(m, nn.Linear) for f in quantized.fields for m in f.modules())
    assert quantized.embedding.weight is decoder.embedding.weight


@needs_instructions
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_greedy_decoding_equals_the_full_forward(weight_format, rows):
    """Up to bf16's rounding of logits, in which likely tokens may tie."""
    quantized = quantize_weights(small_decoder(), weight_format)
    tokens = generate(quantized, prompt(rows), max_new_tokens=12)
    with torch.no_grad():
        logits = quantized(tokens)[:, 8:-1]
    chosen = logits.gather(-1, tokens[:, 9:, None])
    regret = (logits.amax(-1, keepdim=True) - chosen).max() / logits.std()
    assert float(regret) < TOLERANCE


@needs_instructions
def test_it_is_neither_saved_nor_quantized_again(tmp_path):
    quantized = quantize_weights(small_decoder(), "int8")
    with pytest.raises(ValueError, match="int8 are not saved; save the model before quantizing"):
        quantized.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="only plain linear layers"):
        quantize_weights(quantized, "int8")


@needs_instructions
def test_hooked_layers_are_refused():
    decoder = small_decoder()
    decoder.layers[0].field.attention.out.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="only plain linear layers can be quantized"):
        quantize_weights(decoder, "bf16")


def test_unknown_formats_and_other_processors_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="one of bf16, int8, got 'int4'"):
        quantize_weights(small_decoder(), "int4")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="need a CPU with the instructions AVX512-BF16"):
        quantize_weights(small_decoder(), "int8")
